"""The ops as Python functions: typed wrappers that say what each op computes.

Shapes throughout: M tokens, K in_features, N out_features, Rp private ranks (r - k), Rs shared
ranks (k L), R = Rs + Rp. Every weight is (rank, features). Source: RaSA (ICLR 2025), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dropout_mask", "grouped_gemm", "rasa_add", "rasa_linear", "rasa_linears"]

_ops = torch.ops.rasa_ext


def rasa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    A_shared: Tensor,
    Bt: Tensor,
    Bt_shared: Tensor,
    d: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute a linear layer with its RaSA update.

    Semantics::

        threshold = min(math.floor(p * 2**15 + 0.5), 2**15 - 1)
        mask = dropout_mask(seed, M, K, p) if p > 0 else torch.ones(M, K)
        x_dropped = x * mask / (1 - threshold / 2**15)
        s = x_dropped @ torch.cat([A_shared, A]).T
        return F.linear(x, weight, bias) + (s * d) @ torch.cat([Bt_shared, Bt])

    Shapes: x (M,K), weight (N,K), bias (N) or None, A (Rp,K), A_shared (Rs,K), Bt (Rp,N),
    Bt_shared (Rs,N), d (Rs+Rp) with the shared ranks first, seed one int64 element -> (M,N). M, Rp
    and Rs may be 0.

    Dtypes: float32, float64, bfloat16, float16. weight and bias have x's dtype. The adapter tensors
    share one dtype: x's, or float32 under bfloat16 and float16. Sums are kept in float32 (float64
    for float64).

    Saves x, s (M, round_up(R, 8)) and references to the weights for backward; the mask is drawn
    again. Gradients are computed only for tensors that require one. There is no second derivative.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype, device or strides, p is not in [0, 1), or
            p > 0 comes without a seed. The message names the argument, what was expected and what
            came.
    """
    y: Tensor = _ops.rasa_linear(x, weight, bias, A, A_shared, Bt, Bt_shared, d, p, seed)[0]
    return y


def rasa_linears(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    A_shared: Sequence[Tensor],
    Bt: Sequence[Tensor],
    Bt_shared: Sequence[Tensor],
    d: Sequence[Tensor],
    p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Compute layers that are fed the same x, q, k and v say, in one op.

    Semantics::

        layers = zip(weight, bias, A, A_shared, Bt, Bt_shared, d)
        return [rasa_linear(x, *layer, p, seed) for layer in layers]

    bit by bit in y and in the gradients of the weights; x's gradient is one sum over the layers,
    in another order. x is read once in each direction, and one dropout mask serves all layers.

    Shapes: x (M,K); each list has one entry for each layer, of the shapes of :func:`rasa_linear`,
    where N, Rp and Rs may differ between layers -> a list of (M,N).

    Dtypes: those of :func:`rasa_linear`; the adapter tensors of all layers share one dtype.

    Saves x, one s (M, sum of round_up(R, 8)) and references to the weights. A layer whose output
    is not used costs nothing in backward.

    Raises:
        RuntimeError: as :func:`rasa_linear`, naming the layer; or lists of different lengths.
    """
    y: list[Tensor] = _ops.rasa_linears(x, weight, bias, A, A_shared, Bt, Bt_shared, d, p, seed)[0]
    return y


def rasa_add(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    A_shared: Tensor,
    Bt: Tensor,
    Bt_shared: Tensor,
    d: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Add a RaSA update to the output of any base layer.

    Semantics::

        threshold = min(math.floor(p * 2**15 + 0.5), 2**15 - 1)
        mask = dropout_mask(seed, M, K, p) if p > 0 else torch.ones(M, K)
        x_dropped = x * mask / (1 - threshold / 2**15)
        s = x_dropped @ torch.cat([A_shared, A]).T
        return base + (s * d) @ torch.cat([Bt_shared, Bt])

    Shapes: base (M,N); the others, the dtypes, what is saved and the errors are those of
    :func:`rasa_linear`. base has x's dtype and is not written.
    """
    y: Tensor = _ops.rasa_add(x, base, A, A_shared, Bt, Bt_shared, d, p, seed)[0]
    return y


def grouped_gemm(
    layout: str,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    segments: Sequence[int] | None = None,
    C_in: Sequence[Tensor | None] = (),
    scale_m: Sequence[Tensor | None] = (),
    scale_k: Sequence[Tensor | None] = (),
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Compute a group of matrix products, each a sum over segments, in one launch.

    Semantics, for each problem, over its own run of ``segments[i]`` entries of A, B, scale_m and
    scale_k::

        op_A = A.T if layout[0] == "T" else A
        op_B = B.T if layout[1] == "T" else B
        C = C_in + sum(scale_m[:, None] * (op_A @ (scale_k[:, None] * op_B)) for each segment)

    Shapes: NN A (M,K) B (K,N); NT A (M,K) B (N,K); TN A (K,M) B (K,N); C_in (M,N), scale_m (M),
    scale_k (K). The segments of a problem share M and N; K and everything else may differ. None, or
    an empty list, means no C_in and ones. segments defaults to one segment for each problem. A
    segment with K = 0 adds nothing, even if its scale_m is not finite.

    Dtypes: all of A and B have one dtype; out_dtype is that dtype (the default) or float32; scales
    have one dtype, A's or float32. Sums are kept in float32 (float64 for float64) and rounded once.
    Has no derivative.

    Raises:
        RuntimeError: shapes, dtypes, devices or list lengths do not fit, or a tensor requires a
            gradient while gradients are recorded.
    """
    if not A and not B:
        return []  # nothing says which device's kernel to call
    counts = [1] * len(A) if segments is None else list(segments)
    results: list[Tensor] = _ops.grouped_gemm(
        layout, list(A), list(B), counts, list(C_in), list(scale_m), list(scale_k), out_dtype
    )
    return results


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Return the mask (M,K), True where kept, that the ops draw for this seed.

    Element (m, c) depends on seed, m and c only (``csrc/philox.h`` has the mapping), on any device;
    it is dropped when its 15-bit draw is below the threshold of :func:`rasa_linear`. For tests and
    for reading; the ops never store a mask.

    Raises:
        RuntimeError: p is not in [0, 1), or seed is not one int64 element.
    """
    mask: Tensor = _ops.dropout_mask(seed, M, K, p)
    return mask
