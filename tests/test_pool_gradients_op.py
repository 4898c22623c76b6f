"""rasa_pool_gradients_: gradients of pools, summed over layers in place."""

from __future__ import annotations

import pytest
import torch
from layers import new_seed, randn
from reference import assert_accurate, dropped
from torch import Tensor

from rasa_ext.layer_ops import rasa_pool_gradients_

OPS = torch.ops.rasa_ext


# (M, K, N, Rs, R, p) of 33 layers in two pools, one without tokens and one of two rates.
SIZES = [(5 + i % 7 if i != 3 else 0, 24, 40, 5, 8, 0.3) for i in range(32)]
SIZES += [(70, 130, 16, 7, 7, 0.0), (9, 130, 16, 7, 11, 0.5)]
OF_POOL = [0] * 32 + [1, 1]
POOL_SIZES = [(24, 40, 5), (130, 16, 7)]


def op_arguments(dtype: torch.dtype, param_dtype: torch.dtype) -> tuple:
    def padded(M: int, R: int) -> Tensor:
        rows = randn(M, (R + 7) // 8 * 8, dtype=dtype)
        rows[:, R:] = 0
        return rows

    return (
        [randn(Rs, K, dtype=param_dtype) for K, _, Rs in POOL_SIZES],
        [randn(Rs, N, dtype=param_dtype) for _, N, Rs in POOL_SIZES],
        [randn(M, K, dtype=dtype) for M, K, *_ in SIZES],
        [randn(M, N, dtype=dtype) for M, _, N, *_ in SIZES],
        [padded(M, R) for M, *_, R, _ in SIZES],
        [padded(M, R) for M, *_, R, _ in SIZES],
        [randn(R, dtype=param_dtype) for *_, R, _ in SIZES],
        OF_POOL,
        [p for *_, p in SIZES],
        [new_seed(i) if size[-1] > 0 else None for i, size in enumerate(SIZES)],
    )


def op_formula(dtype: torch.dtype, arguments: tuple) -> list[Tensor]:
    """The docstring of rasa_pool_gradients_, as code."""
    dA, dBt, xs, dys, g, s, d = ([t.to(dtype) for t in tensors] for tensors in arguments[:7])
    of_pool, rates, seeds = arguments[7:]
    for i, (pool, p, seed) in enumerate(zip(of_pool, rates, seeds, strict=True)):
        Rs = POOL_SIZES[pool][2]
        d_rows = d[i][:Rs, None]
        dA[pool] = dA[pool] + d_rows * (g[i][:, :Rs].T @ dropped(xs[i], p, seed))
        dBt[pool] = dBt[pool] + d_rows * (s[i][:, :Rs].T @ dys[i])
    return [*dA, *dBt]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_33_segments_with_their_own_seeds_and_scales_add_in_place(dtypes, launcher):
    arguments = op_arguments(*dtypes)
    exact = op_formula(torch.float64, arguments)
    plain = op_formula(dtypes[1], arguments)

    rasa_pool_gradients_(*arguments)

    for ours, p, e in zip([*arguments[0], *arguments[1]], plain, exact, strict=True):
        assert_accurate(ours, p, e, dtype=dtypes[0])


def test_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares views that NaN filling would write
    torch.library.opcheck(
        OPS.rasa_pool_gradients_.default, op_arguments(torch.float32, torch.float32)
    )


@pytest.mark.parametrize(
    ("index", "entry", "message"),
    [
        (2, randn(5, 23, dtype=torch.float32), "layer 0: dA_shared must be (Rs, K) = [5, 23], got"),
        (3, randn(4, 40, dtype=torch.float32), "layer 0: dy must be (M, N) = [5, 40], got [4, 40]"),
        (4, randn(5, 16, dtype=torch.float32), "layer 0: g must be (M, round_up(R, 8)) = [5, 8]"),
        (6, randn(3, dtype=torch.float32), "layer 0: d must have at least Rs = 5 elements, got 3"),
        (7, 2, "layer 0: pools must be the index of one of 2 pools, got 2"),
        (9, None, "layer 0: seed must be given when p > 0, got None with p = 0.3"),
        (0, randn(5, 24, dtype=torch.float64), "dA_shared must have d's dtype Float, got Double"),
    ],
)
def test_the_op_names_what_does_not_fit_and_changes_nothing(index, entry, message):
    arguments = op_arguments(torch.float32, torch.float32)
    arguments = tuple(list(argument) for argument in arguments)
    arguments[index][0] = entry
    before = [t.clone() for t in (*arguments[0], *arguments[1])]

    with pytest.raises(RuntimeError) as error:
        rasa_pool_gradients_(*arguments)

    assert str(error.value).startswith(f"rasa_pool_gradients_: {message}")
    after = (*arguments[0], *arguments[1])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
