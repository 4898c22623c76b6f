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
        RuntimeError: as in :func:`rasa_delta_weights`, or weights overlap one another or
            themselves, or a tensor requires a gradient while gradients are recorded. No weight is
            changed then.
    """
    if adapters.A:
        _ops.rasa_merge_(list(weights), *adapters)


def rasa_grouped_linear(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    adapters: Adapters,
    p: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> list[Tensor]:
    """Compute many linear layers, each of its own input, with their RaSA updates.

    Semantics, for each layer with its pool (see rasa_ext.ops for the two)::

        return (
            rasa_add(x, base, A, A_shared, Bt, Bt_shared, d, p, seed)
            if weight is None
            else rasa_linear(x, weight, bias, A, A_shared, Bt, Bt_shared, d, p, seed)
        )

    All shrinks are one launch and all expands another; backward has one launch for every g, one
    for every dx and one for all weight gradients, in which a pool's gradient is one sum over its
    layers. Base products are the library's, one for each layer.

    Shapes: x (M,K), weight (N,K), bias (N), base (M,N); M, K and N may differ from layer to layer.
    Dtypes: as in rasa_linear, one for all x and one for all adapters. weights and biases get no
    gradient. Saves each x and s (M, round_up(R, 8)) for backward.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype, device or strides, a layer has not
            exactly one of weight and base, a weight or bias requires a gradient, p is not in
            [0, 1), or p > 0 comes without a seed. The message names the layer.
    """
    if not xs and not adapters.A:
        return []  # nothing says which device's kernel to call
    ys: list[Tensor] = _ops.rasa_grouped_linear(
        list(xs), list(weights), list(biases), list(bases), *adapters, list(p), list(seeds)
    )[0]
    return ys


def rasa_pool_gradients_(
    dA_shared: Sequence[Tensor],
    dBt_shared: Sequence[Tensor],
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    g: Sequence[Tensor],
    s: Sequence[Tensor],
    d: Sequence[Tensor],
    pools: Sequence[int],
    p: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> None:
    """Add what layers contribute to the gradients of their pools, in place and in one launch.

    Semantics, for each layer i of pool ``pools[i]``, whose ranks are the first of s, g and d::

        dA_shared += d[:Rs, None] * (g[:, :Rs].T @ dropped(x))
        dBt_shared += d[:Rs, None] * (s[:, :Rs].T @ dy)

    All layers of a pool are summed in one accumulator of float32 (float64), which is rounded once
    (once for each dropout rate). dropped(x) is what rasa_linear drops for the layer's p and seed.

    Shapes: dA_shared (Rs,K), dBt_shared (Rs,N), or no rows where not wanted; x (M,K), dy (M,N), g
    and s (M, round_up(R, 8)), d (R). Dtypes: one of x, dy, g and s; one of d and the gradients.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype, device or strides; the message names the
            layer. No gradient is changed then.
    """
    if xs:
        _ops.rasa_pool_gradients_(
            list(dA_shared),
            list(dBt_shared),
            list(xs),
            list(dys),
            list(g),
            list(s),
            list(d),
            list(pools),
            list(p),
            list(seeds),
        )
