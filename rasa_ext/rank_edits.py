"""Change the number of ranks of layers and pools in place: weights, gradients, optimizer state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rasa_ext.module import RaSALinear, SharedPool

# Optimizers that keep their state compressed or spread over processes, where no rank is a row.
_REFUSED = re.compile(r"[48]bit|fp8|zeroredundancy|deepspeed|fsdp", re.IGNORECASE)


@dataclass(frozen=True)
class RowEdit:
    """One tensor's ranks: the rows that survive, in order, and the new ones after them."""

    parameter: Tensor
    keep: Tensor
    new_rows: Tensor

    def of(self, tensor: Tensor, new_rows: Tensor) -> Tensor:
        """Return the edited copy of the parameter, or of a tensor of its shape."""
        return torch.cat([tensor.index_select(0, self.keep), new_rows])

    def of_state(self, tensor: Tensor) -> Tensor:
        """Return the edited copy of a gradient or moment: new ranks start from zero."""
        return self.of(tensor, torch.zeros_like(self.new_rows, dtype=tensor.dtype))


def layer_edits(
    layer: RaSALinear, keep_shared: Sequence[int], keep_private: Sequence[int], A_new: Tensor
) -> list[RowEdit]:
    """Return the edits of a gated layer: its ranks that survive, and new ones with these A.

    New ranks have Bt = 0 and c = 1, so that the layer computes what the surviving ranks compute.
    """
    Rs = layer.c.numel() - layer.Rp
    keep = _index(layer.A, keep_private)
    keep_all = torch.cat([_index(layer.A, keep_shared), Rs + keep])
    new = A_new.shape[0]
    return [
        RowEdit(layer.A, keep, A_new.to(layer.A)),
        RowEdit(layer.Bt, keep, layer.Bt.new_zeros(new, layer.out_features)),
        RowEdit(layer.c, keep_all, layer.c.new_ones(new)),
        RowEdit(layer.gate_scale, keep_all, layer.c.new_full((new,), layer.private_scale)),
    ]


def pool_edits(pool: SharedPool, keep_shared: Sequence[int]) -> list[RowEdit]:
    """Return the edits of a pool: its ranks that survive. Its layers' c must be edited too."""
    keep = _index(pool.A_shared, keep_shared)
    return [RowEdit(t, keep, t.new_empty(0, t.shape[1])) for t in (pool.A_shared, pool.Bt_shared)]


def _index(like: Tensor, rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


@torch.no_grad()
def resize(
    layers: Sequence[RaSALinear],
    Rp: Sequence[int],
    Rs: Mapping[SharedPool, int],
    optimizer: Optimizer | None = None,
) -> None:
    """Give gated layers, and pools all of whose layers these are, these numbers of ranks.

    The first ranks stay; new ones have A = 0, to be loaded.
    """
    edits = []
    for layer, wanted in zip(layers, Rp, strict=True):
        keep_shared = range(0 if layer.pool is None else Rs[layer.pool])
        A_new = layer.A.new_zeros(max(wanted - layer.Rp, 0), layer.in_features)
        edits += layer_edits(layer, keep_shared, range(min(wanted, layer.Rp)), A_new)
    for pool, wanted in Rs.items():
        edits += pool_edits(pool, range(wanted))
    apply_edits(edits, optimizer)
    for pool, wanted in Rs.items():
        pool.Rs = wanted
    for layer, wanted in zip(layers, Rp, strict=True):
        layer.Rp = wanted


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise TypeError, by name, for an optimizer whose state is not kept by rank."""
    if _REFUSED.search(type(optimizer).__name__):
        raise TypeError(
            f"RankAllocator: optimizer must keep its state in tensors of the parameters' shapes, "
            f"got {type(optimizer).__name__}. Use a 32-bit optimizer in one piece, e.g. "
            "torch.optim.AdamW"
        )


@torch.no_grad()
def apply_edits(edits: Iterable[RowEdit], optimizer: Optimizer | None = None) -> None:
    """Edit parameters, their gradients and what the optimizer keeps of them, all or nothing.

    The parameters stay the same objects, so the optimizer's groups stay as they are. Moments of
    surviving ranks are kept exactly, new ranks start from zero; scalars (step counts) stay.

    Raises TypeError or ValueError if a state is not kept by rank; nothing has changed then.
    """
    edits = list(edits)
    for edit in edits:
        check_plain(edit.parameter)
    states = [_edited_state(edit, optimizer) for edit in edits]
    data = [edit.of(edit.parameter.detach(), edit.new_rows) for edit in edits]
    grads = [None if (g := e.parameter.grad) is None else e.of_state(g) for e in edits]
    for edit, value, grad, state in zip(edits, data, grads, states, strict=True):
        _replace(edit.parameter, value, grad)
        if optimizer is not None and state:
            optimizer.state[edit.parameter] |= state


def check_plain(parameter: Tensor) -> None:
    """Raise TypeError for a parameter that is sharded or wrapped."""
    if type(parameter) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"RankAllocator: ranks of a {type(parameter).__name__} cannot be edited: sharded and "
            "wrapped parameters have one shape for life. Leave the adapters out of the sharding "
            "(ignored_params of fully_shard) and average their gradients"
        )


def _edited_state(edit: RowEdit, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return the optimizer's tensors for one parameter, edited."""
    state = {} if optimizer is None else optimizer.state.get(edit.parameter, {})
    edited = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if type(value) is not Tensor or value.shape != edit.parameter.shape:
            raise ValueError(
                f"RankAllocator: the state {key!r} of {type(optimizer).__name__} must be a plain "
                f"tensor of its parameter's shape {list(edit.parameter.shape)}, got a "
                f"{type(value).__name__} of {list(value.shape)}: its ranks cannot be edited"
            )
        if not value.is_floating_point():
            raise ValueError(
                f"RankAllocator: the state {key!r} of {type(optimizer).__name__} must be "
                f"floating-point, got {value.dtype}: its ranks cannot be edited"
            )
        edited[key] = edit.of_state(value)
    return edited


def _replace(parameter: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Put data and grad of another shape into a parameter that stays the same object."""
    parameter.grad = None
    # While an earlier loss lives, its graph keeps the parameter's gradient accumulator, of the old
    # shape, and the next graph would share it. torch makes a new one when the dtype changes.
    other = torch.float32 if parameter.dtype != torch.float32 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data
    parameter.grad = grad
