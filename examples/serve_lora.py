"""Answer with a base model and an exported LoRA, by stock PEFT: rasa_ext is never imported.

    python examples/serve_lora.py MODEL LORA [--question TEXT] [--device cuda] [--dtype bf16]
    python examples/serve_lora.py MODEL LORA --logits FILE    # compare with the trained model

LORA is the folder that rasa_ext.export_to_lora() wrote, lora/ in finetune.py's --output. FILE is a
safetensors file with input_ids and the logits they gave before the export; exits with 1 if PEFT's
differ by more than the order of their sums explains. Other servers of LoRA take the folder as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gsm_symbolic import prompt_ids
from language_model import TOLERANCE, add_model_arguments, load_model, load_tokenizer
from safetensors.torch import load_file
from torch import nn

QUESTION = (
    "A baker fills 6 trays with 12 rolls each and sells 45 of the rolls. How many are left? "
    "Give the result as your final answer. Do not include units."
)


def load_lora(folder: Path, lora: Path, args: argparse.Namespace) -> nn.Module:
    """Load the base model and put the LoRA on it."""
    import peft

    if not (lora / "adapter_config.json").is_file():
        raise SystemExit(f"serve_lora: {lora} holds no adapter_config.json, so it is no LoRA")
    model: nn.Module = peft.PeftModel.from_pretrained(load_model(folder, args), lora)
    if "rasa_ext" in sys.modules:
        raise SystemExit("serve_lora: rasa_ext was imported, so this shows nothing of stock PEFT")
    return model.eval()


@torch.inference_mode()
def compare(model: nn.Module, path: Path, args: argparse.Namespace) -> None:
    """Compute the logits again; exit unless they are the saved ones within tolerance."""
    saved = load_file(path)
    expected = saved["logits"].double()
    logits = model(input_ids=saved["input_ids"].to(args.device)).logits.cpu().double()
    difference = ((logits - expected).norm() / expected.norm()).item()
    tolerance = TOLERANCE[args.dtype]
    if not difference <= tolerance:
        raise SystemExit(
            f"serve_lora: logits differ by {difference:.1e} (relative), must be within "
            f"{tolerance:.0e}"
        )
    print(
        f"Served by stock PEFT in process {os.getpid()}, without rasa_ext: {logits.numel():,} "
        f"logits equal within {difference:.1e} (relative, tolerance {tolerance:.0e})"
    )


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, args: argparse.Namespace) -> str:
    """Return the model's reply, greedily decoded."""
    prompt = torch.tensor([prompt_ids(tokenizer, question)], device=args.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=args.max_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    reply: str = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    return reply


def main() -> None:
    """Load, then compare or answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=160, help="of the reply")
    parser.add_argument("--logits", type=Path, help="compare with these instead of answering")
    add_model_arguments(parser)
    args = parser.parse_args()

    model = load_lora(args.model, args.lora, args)
    if args.logits is not None:
        compare(model, args.logits, args)
        return
    print(f"Question: {args.question}\n")
    print(f"Answer: {answer(model, load_tokenizer(args.model), args.question, args)}")


if __name__ == "__main__":
    main()
