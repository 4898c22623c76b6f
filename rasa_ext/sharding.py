"""Parameters that FSDP2 has sharded: DTensors, of which each process holds a part."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor as every process may use it; a collective if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; a collective if that is sharded."""
    if _is_sharded(parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def writes_files(model: nn.Module) -> bool:
    """Return whether this process writes what all have gathered: of a sharded model, rank 0."""
    return not any(map(_is_sharded, model.parameters())) or dist.get_rank() == 0


def refuse_partitioned(op: str, model: nn.Module) -> None:
    """Raise ValueError for a model that ZeRO-3 or FSDP2 has taken apart already."""
    for name, parameter in model.named_parameters():
        if _is_sharded(parameter):
            raise ValueError(
                f"{op}: {name} is sharded already, and adapters put in now would be no part of "
                "that: their gradients would differ between processes. Adapt the model, then shard"
            )
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{op}: {name} is partitioned by DeepSpeed ZeRO-3, which gathers a module's own "
                "parameters only, and layers use their pool's. Use ZeRO-2, or FSDP"
            )


def _is_sharded(tensor: Tensor) -> bool:
    # A DTensor. Not isinstance: importing the class costs a second where nothing is distributed.
    return hasattr(tensor, "full_tensor")
