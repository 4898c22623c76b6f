"""grouped_gemm against the plain loop over problems and segments."""

from __future__ import annotations

import pytest
import torch
from layers import DTYPES, dtypes_id, randn
from reference import assert_accurate, dense
from torch import Tensor

from rasa_ext import grouped_gemm

pytestmark = pytest.mark.usefixtures("device")


# (M, N, [K of each segment])
PROBLEMS = [
    (130, 70, [96]),
    (1, 1, [1]),
    (65, 33, [7, 30]),
    (16, 600, [5, 0, 33]),
    (300, 17, [600]),
    (0, 8, [4]),
    (8, 0, [4]),
    (5, 6, [0]),
]


def formula(
    layout: str,
    A: list[Tensor],
    B: list[Tensor],
    segments: list[int],
    C_in: list[Tensor | None],
    scale_m: list[Tensor | None],
    scale_k: list[Tensor | None],
) -> list[Tensor]:
    """The docstring of grouped_gemm, as code."""
    results, first = [], 0
    for problem, count in enumerate(segments):
        C = C_in[problem] if C_in else None
        for i in range(first, first + count):
            op_A = A[i].T if layout[0] == "T" else A[i]
            op_B = B[i].T if layout[1] == "T" else B[i]
            if scale_k and scale_k[i] is not None:
                op_B = scale_k[i][:, None].to(op_B.dtype) * op_B
            product = op_A @ op_B
            if scale_m and scale_m[i] is not None:
                product = scale_m[i][:, None].to(product.dtype) * product
            C = product if C is None else C + product
        results.append(C)
        first += count
    return results


def group(layout, dtype, scale_dtype, with_scales, with_C_in, out_dtype, strided=False):
    A, B, segments, C_in, scale_m, scale_k = [], [], [], [], [], []
    for i, (M, N, Ks) in enumerate(PROBLEMS):
        segments.append(len(Ks))
        C_in.append(randn(M, N, dtype=out_dtype, strided=strided) if with_C_in and i % 3 else None)
        for j, K in enumerate(Ks):
            A.append(randn(*((K, M) if layout == "TN" else (M, K)), dtype=dtype, strided=strided))
            B.append(randn(*((N, K) if layout == "NT" else (K, N)), dtype=dtype, strided=strided))
            scaled = with_scales and (i + j) % 4 != 3
            scale_m.append(randn(M, dtype=scale_dtype) if scaled else None)
            scale_k.append(randn(K, dtype=scale_dtype) if scaled else None)
    return [A, B, segments, C_in, scale_m, scale_k]


def in_float64(arguments):
    return [
        [t.double() if isinstance(t, Tensor) else t for t in argument] for argument in arguments
    ]


def plain_formula(layout, arguments):
    return formula(layout, *map(dense, arguments))


@pytest.mark.parametrize("with_scales", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("with_C_in", [False, True], ids=["zero", "C_in"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
def test_each_problem_is_its_own_sum(layout, dtypes, strided, with_C_in, with_scales, micro_kernel):
    dtype, other = dtypes  # other: of the scales and of the result
    arguments = group(layout, dtype, other, with_scales, with_C_in, other, strided)
    results = grouped_gemm(layout, *arguments, out_dtype=other)
    exact = formula(layout, *in_float64(arguments))
    plain = plain_formula(layout, arguments)
    for C, plain_C, exact_C, problem in zip(results, plain, exact, PROBLEMS, strict=True):
        assert C.dtype == other
        assert_accurate(C, plain_C, exact_C, str(problem), dtype=dtype)


def test_segments_may_come_in_any_order():
    A, B = (
        [randn(40, K, dtype=torch.float32) for K in (7, 30)],
        [randn(K, 50, dtype=torch.float32) for K in (7, 30)],
    )
    (C,) = grouped_gemm("NN", A, B, [2])
    (swapped,) = grouped_gemm("NN", A[::-1], B[::-1], [2])
    exact = A[0].double() @ B[0].double() + A[1].double() @ B[1].double()
    plain = A[0] @ B[0] + A[1] @ B[1]
    assert_accurate(C, plain, exact)
    assert_accurate(swapped, plain, exact)


def test_224_problems_in_one_call():
    """Seven kinds of linears in 32 layers, as merging a whole model will ask."""
    A = [randn(12, 40, dtype=torch.float32) for _ in range(224)]
    B = [randn(12, 24, dtype=torch.float32) for _ in range(224)]
    for C, a, b in zip(grouped_gemm("TN", A, B), A, B, strict=True):
        assert_accurate(C, a.T @ b, a.double().T @ b.double())


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_40_segments_with_scales_of_their_own_are_one_sum(dtypes, micro_kernel):
    """A pool's gradient: a segment for each of its layers, each with its own number of tokens."""
    dtype, other = dtypes
    Ks = [(7 * i) % 90 for i in range(40)]
    A = [randn(K, 30, dtype=dtype) for K in Ks]
    B = [randn(K, 200, dtype=dtype) for K in Ks]
    scale_m = [randn(30, dtype=other) if i % 5 else None for i in range(40)]
    arguments = [A, B, [40], [randn(30, 200, dtype=other)], scale_m, []]
    (C,) = grouped_gemm("TN", *arguments, out_dtype=other)
    (exact,), (plain,) = formula("TN", *in_float64(arguments)), plain_formula("TN", arguments)
    assert_accurate(C, plain, exact, dtype=dtype)


def test_no_problems_give_no_results():
    assert grouped_gemm("NN", [], []) == []
