"""A causal language model and its tokenizer from a local folder; nothing is fetched from a hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative Frobenius difference of the logits of one model computed in two ways: merged, or by
# another library's sums. bf16 keeps 8 bits of a sum in which the update is the small part.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a model is loaded, beside its folder."""
    parser.add_argument("--layers", type=int, help="keep the first N layers only")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the frozen model")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1")


def check_folder(folder: Path) -> None:
    """Exit with a message unless `folder` looks like a saved model."""
    if not folder.is_dir():
        raise SystemExit(f"finetune: --model {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise SystemExit(f"finetune: --model {folder} holds no config.json, so it is no model")


def load_model(folder: Path, args: argparse.Namespace) -> nn.Module:
    """Load the model of `folder` in args.dtype onto args.device, with args.layers layers."""
    import transformers

    check_folder(folder)
    # A shortened model does not use every stored tensor, which is reported at length otherwise.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[args.dtype], local_files_only=True, **changes
        )
        return model.to(torch.device(args.device))
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"finetune: {folder} could not be loaded: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of `folder`."""
    import transformers

    check_folder(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"finetune: {folder} holds no tokenizer: {error}") from error
