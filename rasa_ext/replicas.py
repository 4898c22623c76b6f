"""Keep decisions the same on all processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Gates lie in [0, 1]. Replicas that get the same gradients agree to the bit on equal hardware and
# within roundings elsewhere; further apart, the gradients were not averaged.
_MOST_APART = 1e-2


@torch.no_grad()
def synchronize_gates(gates: Sequence[Tensor], process_group: Any = None) -> None:
    """Give all processes of the group the gates of its first; nothing without a group.

    Raises RuntimeError, on all processes, if gates are further apart than rounding explains.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_world_size(process_group) == 1:
        return
    # float64 holds every gate exactly; layers may lie on several devices.
    flat = torch.cat([gate.to(gates[0].device, torch.float64) for gate in gates])
    first = flat.clone()
    dist.broadcast(first, group=process_group, group_src=0)
    # One number that is the same on all processes, so that all raise or none.
    apart = (flat - first).abs().max() if flat.numel() > 0 else flat.new_zeros(())
    dist.all_reduce(apart, dist.ReduceOp.MAX, process_group)
    if not apart.item() <= _MOST_APART:
        raise RuntimeError(
            "RankAllocator: gates must be the same on all processes, got values "
            f"{apart.item():.2g} apart: gradients were not averaged. Wrap the model in "
            "DistributedDataParallel again whenever step() returns True"
        )
    parts = torch.split(first, [gate.numel() for gate in gates])
    for gate, part in zip(gates, parts, strict=True):
        gate.copy_(part)
