"""The launcher in torch's own ops, on the CPU: the contract on every layout, case and dtype."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, case_id
from layers import (
    ADD_NAMES,
    DTYPES,
    LINEAR_NAMES,
    add_inputs,
    dtypes_id,
    linear_inputs,
    new_seed,
    randn,
)
from reference import assert_accurate, authors_add, authors_linear, compare_with_float64
from test_grouped_gemm import PROBLEMS, formula, group, in_float64, plain_formula

from rasa_ext import dropout_mask, grouped_gemm, rasa_add, rasa_linear


@pytest.fixture(autouse=True)
def library(cpu_launcher):
    cpu_launcher("library")


@pytest.mark.parametrize("with_scales", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("with_C_in", [False, True], ids=["zero", "C_in"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
def test_each_problem_is_its_own_sum(layout, dtypes, strided, with_C_in, with_scales):
    dtype, other = dtypes
    arguments = group(layout, dtype, other, with_scales, with_C_in, other, strided)
    results = grouped_gemm(layout, *arguments, out_dtype=other)
    exact = formula(layout, *in_float64(arguments))
    plain = plain_formula(layout, arguments)
    for C, plain_C, exact_C, problem in zip(results, plain, exact, PROBLEMS, strict=True):
        assert_accurate(C, plain_C, exact_C, str(problem), dtype=dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_linear_and_its_gradients_equal_the_authors_formula(case, dtypes, p):
    compare_with_float64(
        lambda *t: rasa_linear(*t, p=p, seed=new_seed()),
        lambda *t: authors_linear(*t, p=p, seed=new_seed()),
        linear_inputs(case, *dtypes),
        LINEAR_NAMES,
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_add_and_its_gradients_equal_the_authors_formula(case, dtypes):
    compare_with_float64(
        lambda *t: rasa_add(*t, p=0.3, seed=new_seed()),
        lambda *t: authors_add(*t, p=0.3, seed=new_seed()),
        add_inputs(case, *dtypes),
        ADD_NAMES,
    )


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone_is_the_one_among_all(wanted):
    """Blocks without memory are not written, and the dot of their rows is still computed."""
    x, base, *adapter = add_inputs(Case("wanted", 40, 24, 32, 7, 9), torch.float32, torch.float32)
    _, s = torch.ops.rasa_ext.rasa_add(x, base, *adapter, 0.3, new_seed())

    def backward(mask):
        lists = [[base], x, [None], *([t] for t in adapter)]
        return torch.ops.rasa_ext.rasa_backward(*lists, s, 0.3, new_seed(), mask)

    alone, all_six = backward([i == wanted for i in range(6)])[wanted], backward([True] * 6)[wanted]
    assert torch.equal(alone, all_six)


def test_nan_in_a_dropped_element_does_not_reach_the_result():
    x, base, *adapter = add_inputs(Case("nan", 9, 8, 4, 2, 3), torch.float32, torch.float32)
    mask = dropout_mask(new_seed(), 9, 8, 0.5)
    x[~mask] = float("nan")
    assert rasa_add(x, base, *adapter, p=0.5, seed=new_seed()).isfinite().all()


def test_autocast_does_not_reach_into_the_launcher():
    A, B = randn(33, 200, dtype=torch.float32), randn(200, 40, dtype=torch.float32)
    (expected,) = grouped_gemm("NN", [A], [B])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (C,) = grouped_gemm("NN", [A], [B])
    assert torch.equal(C, expected)
