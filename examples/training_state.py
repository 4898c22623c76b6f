"""What an interrupted run needs to go on as if nothing had happened, in one file."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rasa_ext import RankAllocator, adapter_state_dict


def write_atomically(path: Path, content: Any) -> None:
    """torch.save through a temporary file and a rename: `path` is never half a file.

    Exits with a message if the disk is full; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    serialized = io.BytesIO()  # torch.save reports a full disk in its own words
    torch.save(content, serialized)
    try:
        with temporary.open("wb") as file:
            file.write(serialized.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(
            f"finetune: {path} could not be written and is as it was: {error}"
        ) from error


@dataclass
class TrainingState:
    """Steps taken, which is also the position in the data, and what was measured on the way."""

    settings: dict[str, Any]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    before: dict[str, Any] | None = None
    allocator: RankAllocator | None = None

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write adapter, optimizer and this record.

        All in one file: two files could be from two moments if a crash falls between them.
        """
        content = {
            **vars(self),
            "allocator": None if self.allocator is None else self.allocator.state_dict(),
            "adapter": adapter_state_dict(model),
            "optimizer": optimizer.state_dict(),
        }
        write_atomically(path, content)

    @classmethod
    def resume(
        cls,
        path: Path,
        settings: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        allocator: RankAllocator | None = None,
    ) -> TrainingState:
        """Read `path` back into model and optimizer.

        Exits with a message if the file is damaged or was made with other settings, which would
        give another result than an uninterrupted run.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved = content["settings"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            raise SystemExit(f"finetune: {path} is no training state: {error}") from error
        for name in settings:
            if saved.get(name) != settings[name]:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(
                    f"finetune: {path} was trained with {flag} {saved.get(name)}, got "
                    f"{settings[name]}. Resume with the same settings"
                )
        if allocator is not None:  # first: it gives the layers the ranks of then
            allocator.load_state_dict(content["allocator"])
        parameters = adapter_state_dict(model)
        if parameters.keys() != content["adapter"].keys():
            raise SystemExit(f"finetune: {path} does not fit this model: it adapts other layers")
        for name, value in content["adapter"].items():
            parameters[name].copy_(value)
        optimizer.load_state_dict(content["optimizer"])
        return cls(saved, content["step"], content["losses"], content["before"], allocator)
