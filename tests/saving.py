"""Each way of saving; as a script, a process that stops in the middle of a save."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from models import randomize_adapters, trained
from safetensors.torch import load_file
from torch import Tensor, nn

from rasa_ext.export import export_to_lora
from rasa_ext.weights import save_adapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from training_state import TrainingState  # noqa: E402

KINDS = ("adapter", "lora", "state")


def model_of(seed: int) -> nn.Module:
    return randomize_adapters(trained(r=64), seed=seed)


def save_state(model: nn.Module, path: Path) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    TrainingState({"steps": 1}).save(path, model, torch.optim.AdamW(trainable))


def save(kind: str, path: Path, seed: int) -> None:
    """Save the model of this seed. A LoRA goes to a new folder for each seed."""
    model = model_of(seed)
    if kind == "adapter":
        save_adapter(model, path / "adapter.safetensors")
    elif kind == "lora":
        export_to_lora(model, path / f"lora-{seed}")
    else:
        save_state(model, path / "state.pt")


def load(kind: str, path: Path, seed: int) -> dict[str, Tensor]:
    """Return the tensors that save() wrote."""
    if kind == "adapter":
        return load_file(path / "adapter.safetensors")
    if kind == "lora":
        return load_file(path / f"lora-{seed}" / "adapter_model.safetensors")
    return torch.load(path / "state.pt", weights_only=True)["adapter"]


def stop_at(name: str) -> None:
    """Make os.<name> say that it was reached, and never return."""

    def stop(*args: object) -> None:
        print("reached", flush=True)
        time.sleep(600)

    setattr(os, name, stop)


if __name__ == "__main__":
    kind, path, seed, where = sys.argv[1:]
    stop_at(where)
    save(kind, Path(path), int(seed))
