"""Load model and adapter in a process of their own and compare logits with the training process.

    python examples/reload.py MODEL ADAPTER --logits FILE [--layers N] [--dtype D] [--device D]

FILE is a safetensors file with input_ids and the logits they gave. Exits with 1 unless the
logits are identical, bit for bit.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from language_model import add_model_arguments, load_model
from safetensors.torch import load_file

import rasa_ext


def main() -> None:
    """Load, compute, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--logits", type=Path, required=True)
    add_model_arguments(parser)
    args = parser.parse_args()

    saved = load_file(args.logits)
    model = load_model(args.model, args)
    rasa_ext.load_adapter(model, args.adapter)
    with torch.inference_mode():
        logits = model.eval()(saved["input_ids"].to(args.device)).logits.cpu()
    if not torch.equal(logits, saved["logits"]):
        difference = (logits.double() - saved["logits"].double()).abs().max().item()
        raise SystemExit(f"reload: logits differ by up to {difference:.3e}, must be identical")
    print(f"Reloaded in process {os.getpid()}: {logits.numel():,} logits identical, bit for bit")


if __name__ == "__main__":
    main()
