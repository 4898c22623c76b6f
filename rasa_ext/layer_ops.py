"""The ops that work on many layers at once, as Python functions.

Each takes its adapters as Adapters: one entry for each layer, and each pool once. Shapes are those
of rasa_ext.ops. Source: RaSA (ICLR 2025), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rasa_ext.module import RaSALinear, SharedPool

_ops = torch.ops.rasa_ext


class Adapters(NamedTuple):
    """Adapters of a list of layers: pools[i] is layer i's index into A_shared, or -1 for none."""

    A: list[Tensor]
    Bt: list[Tensor]
    d: list[Tensor]
    A_shared: list[Tensor]
    Bt_shared: list[Tensor]
    pools: list[int]


def adapters_of(layers: Sequence[RaSALinear], transposed: Sequence[bool] | None = None) -> Adapters:
    """Return the tensors of some layers' adapters.

    Where transposed, A and Bt change places: the adapter's update is then the layer's, transposed.
    """
    result = Adapters([], [], [], [], [], [])
    index: dict[tuple[SharedPool, bool], int] = {}
    for i, layer in enumerate(layers):
        is_swapped = transposed is not None and transposed[i]
        result.A.append(layer.Bt if is_swapped else layer.A)
        result.Bt.append(layer.A if is_swapped else layer.Bt)
        result.d.append(layer.d)
        pool = layer.pool
        if pool is None:
            result.pools.append(-1)
            continue
        if (pool, is_swapped) not in index:
            index[pool, is_swapped] = len(index)
            result.A_shared.append(pool.Bt_shared if is_swapped else pool.A_shared)
            result.Bt_shared.append(pool.A_shared if is_swapped else pool.Bt_shared)
        result.pools.append(index[pool, is_swapped])
    return result


def rasa_delta_weights(adapters: Adapters) -> list[Tensor]:
    """Compute the updates of many layers as matrices, in one launch.

    Semantics, for each layer with its pool::

        A_all, Bt_all = torch.cat([A_shared, A]), torch.cat([Bt_shared, Bt])
        return (Bt_all.float() * d.float()[:, None]).T @ A_all.float()

    Shapes: A (Rp,K), Bt (Rp,N), d (Rs+Rp), A_shared (Rs,K), Bt_shared (Rs,N) -> (N,K) each; sizes
    may differ from layer to layer.

    Dtypes: float32, float64, bfloat16, float16, one for all layers; the result is float32, or
    float64 for float64. Differentiable, twice too. Saves references to its inputs.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype, device or strides; the message names the
            layer.
    """
    if not adapters.A:
        return []  # nothing says which device's kernel to call
    deltas: list[Tensor] = _ops.rasa_delta_weights(*adapters)
    return deltas


def rasa_merge_(weights: Sequence[Tensor], adapters: Adapters) -> None:
    """Add the updates of many layers to their weights, in place and in one launch.

    Semantics: ``W.copy_((W.float() + delta).to(W.dtype))`` with the deltas of
    :func:`rasa_delta_weights`; the sum is rounded once.

    Shapes: weights (N,K) each. Dtypes: the adapters have one dtype, the weights' or float32 under
    bfloat16 and float16, which may be mixed. Has no derivative.

    Raises:
        RuntimeError: as in :func:`rasa_delta_weights`, or two weights share memory, or a tensor
            requires a gradient while gradients are recorded. No weight is changed then.
    """
    if adapters.A:
        _ops.rasa_merge_(list(weights), *adapters)
