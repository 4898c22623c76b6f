"""The oracle, and the only place a tolerance exists.

A result is right when its error against float64 is at most twice that of plain PyTorch, which
computes the authors' formula in the tested dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rasa_ext import dropout_mask

DRAWS = 2**15
MANY_ELEMENTS = 16  # of a result whose error says something


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x after the dropout that the ops draw for this seed."""
    threshold = round(p * DRAWS)
    if threshold == 0:
        return x
    assert seed is not None
    mask = dropout_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(mask, x, 0) * (DRAWS / (DRAWS - threshold))


def authors_update(
    x: Tensor,
    A: Tensor,
    A_shared: Tensor,
    Bt: Tensor,
    Bt_shared: Tensor,
    d: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The authors' formula: cat, cat, two matmuls, mixing; parameters cast to x's dtype."""
    A_all = torch.cat([A_shared, A]).to(x.dtype)
    Bt_all = torch.cat([Bt_shared, Bt]).to(x.dtype)
    return ((dropped(x, p, seed) @ A_all.T) * d.to(x.dtype)) @ Bt_all


def authors_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *adapter: Tensor, p: float, seed: Tensor
) -> Tensor:
    return F.linear(x, weight, bias) + authors_update(x, *adapter, p=p, seed=seed)


def authors_add(x: Tensor, base: Tensor, *adapter: Tensor, p: float, seed: Tensor) -> Tensor:
    return base + authors_update(x, *adapter, p=p, seed=seed)


def dense(tensors: Iterable[Any]) -> list[Any]:
    """Tensors without gaps between rows: torch's bfloat16 kernels for AMX read into them."""
    return [t.contiguous() if isinstance(t, Tensor) else t for t in tensors]


def error(out: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error against float64. NaN in, NaN out."""
    if exact.numel() == 0:
        return 0.0
    tiny = torch.finfo(torch.float64).tiny
    return ((out.double() - exact).norm() / exact.norm().clamp_min(tiny)).item()


def allowance(plain: Tensor, exact: Tensor, dtype: torch.dtype, length: int) -> float:
    """Twice plain PyTorch's error plus one rounding to `dtype`, in which both round.

    Of a result with few elements plain's error is itself a random number, and may be 0 by luck:
    two more roundings at one element, fewer as 1 / sqrt(elements).

    Nothing more exact than float64 is at hand to judge float64 by: there, the error that sums of
    `length` products may differ by (a random walk of roundings).
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return eps * (4 + 4 * math.sqrt(length))
    return 2 * error(plain, exact) + eps * (1 + 2 / math.sqrt(max(exact.numel(), 1)))


def assert_accurate(
    out: Tensor,
    plain: Tensor,
    exact: Tensor,
    what: str = "",
    length: int = 4096,
    dtype: torch.dtype | None = None,
    slack: float = 1,
) -> None:
    """`out` may be at most twice as wrong as `plain`, over all and in every row; NaN fails.

    dtype: in which the operands are rounded, where the result is wider. slack: a factor on what is
    allowed, for thousands of random cases, of which some have a lucky yardstick.
    """
    dtype = dtype or out.dtype
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)} for {tuple(exact.shape)}"
    allowed = slack * allowance(plain, exact, dtype, length)
    assert error(out, exact) <= allowed, f"{what}: {error(out, exact):.3g} > {allowed:.3g}"
    if exact.dim() != 2 or exact.numel() == 0:
        return
    # By row, against the norm of a typical row: one wrong row cannot hide in a large matrix.
    scale = exact.norm() / math.sqrt(exact.shape[0]) + torch.finfo(torch.float64).tiny
    worst = ((out.double() - exact).norm(dim=1).max() / scale).item()
    worst_plain = ((plain.double() - exact).norm(dim=1).max() / scale).item()
    allowed_row = 2 * slack * max(worst_plain, allowed / slack)  # a wrong row is wrong by far more
    assert worst <= allowed_row, f"{what}, worst row: {worst:.3g} > {allowed_row:.3g}"


def compare_with_float64(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    names: Sequence[str],
    length: int = 4096,
    slack: float = 1,
) -> None:
    """Check the forward and every gradient of `ours` against `formula` in float64.

    Gradients of few elements, and of few tokens, are those of several cotangents, one after the
    other: a yardstick of one number may be 0 by luck.
    """
    runs = []
    cotangents: list[Tensor] = []
    # With one token torch multiplies a matrix and a vector, whose sums have lengths of their own.
    slack = 2 * slack if inputs[0].dim() == 2 and inputs[0].shape[0] == 1 else slack
    has_few_tokens = inputs[0].dim() == 2 and 0 < inputs[0].shape[0] < MANY_ELEMENTS
    has_few = any(t is not None and 0 < t.numel() < MANY_ELEMENTS for t in inputs)
    num_cotangents = MANY_ELEMENTS if has_few or has_few_tokens else 1
    for fn, dtype in ((formula, torch.float64), (formula, None), (ours, None)):
        leaves = [
            None
            if t is None
            else t.detach().to(dtype or t.dtype).requires_grad_(t.is_floating_point())
            for t in (inputs if fn is ours else dense(inputs))
        ]
        y = fn(*leaves)
        if not cotangents:
            cotangents = [
                torch.randn_like(y, dtype=torch.float64).to(inputs[0].dtype)
                for _ in range(num_cotangents)
            ]
        wrt = [t for t in leaves if t is not None]
        draws = [
            torch.autograd.grad(y, wrt, dy.to(y.dtype), allow_unused=True, retain_graph=True)
            for dy in cotangents
        ]
        grads = []
        for t, of_t in zip(wrt, zip(*draws, strict=True), strict=True):
            of_few = has_few_tokens or t.numel() < MANY_ELEMENTS
            count = num_cotangents if of_few else 1
            # An update of rank 0 does not use its weights.
            used = [torch.zeros_like(t) if g is None else g for g in of_t[:count]]
            grads.append(torch.cat(used))
        runs.append([y.detach(), *grads])
    labels = ["y"] + [n for n, t in zip(names, inputs, strict=True) if t is not None]
    for label, exact, plain, out in zip(labels, *runs, strict=True):
        what = label if label == "y" else f"d{label}"
        assert_accurate(out, plain, exact, what, length, inputs[0].dtype, slack)
