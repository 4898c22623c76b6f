"""How many CUDA kernels an op launches beside the base products, as csrc/cuda/plan.h says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case
from layers import new_seed, sibling_inputs

import rasa_ext
from rasa_ext import rasa_linears

SUM = "sum of partials"  # of a split reduction, and of dd over the tiles of features
KIB = 1024
# (num_sms, shared memory of a block) of a 4090, an A100 and an H100
DEVICES = {"sm_89": (128, 99 * KIB), "sm_80": (108, 163 * KIB), "sm_90": (132, 227 * KIB)}
FAMILIES = {"alone": (576,), "qkv": (576, 192, 192), "gate_up": (1536, 1536), "narrow": (96, 576)}
RANKS = [(r, k, L) for r, k in ((8, 1), (16, 2), (32, 4)) for L in (30, 32)]
BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "tf32"])


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def recorder(request: pytest.FixtureRequest) -> Iterator[None]:
    rasa_ext._C.start_recording(*request.param)
    yield
    rasa_ext._C.stop_recording()


def launches(cases: list[Case], p: float, dtype: torch.dtype) -> list[list[str]]:
    """The kernels of forward and of backward with every gradient."""
    inputs = sibling_inputs(cases, dtype, dtype)
    for t in (inputs[0], *(t for column in inputs[1:] for t in column if t is not None)):
        t.requires_grad_()
    y = rasa_linears(*inputs, p=p, seed=new_seed())
    torch.autograd.backward(y, [torch.ones_like(t) for t in y])
    return rasa_ext._C.stop_recording()


def assert_few(programs: list[list[str]]) -> None:
    """Two launches and three; a sum of partials may follow a shrink, and the wgrad."""
    forward, backward = programs
    sums = [sum(name.startswith(SUM) for name in names) for names in programs]
    assert len(forward) - sums[0] == 2, forward
    assert len(backward) - sums[1] == 3, backward
    assert sums[0] <= 1 and sums[1] <= 2, programs


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: "r{}k{}L{}".format(*ranks))
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_takes_two_launches_and_backward_three(family, ranks, p, dtype, recorder):
    r, k, L = ranks
    cases = [Case(family, 264, 576, N, r - k, L * k) for N in FAMILIES[family]]
    assert_few(launches(cases, p, dtype))


@DTYPES
@pytest.mark.parametrize("M", [1, 100, 161])
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_few_tokens_take_as_few_launches(M, p, dtype, recorder):
    assert_few(launches([Case("few", M, 200, N, 28, 128) for N in (200, 72, 72)], p, dtype))


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_siblings_of_unlike_ranks_share_the_kernels_of_the_widest(p, dtype, recorder):
    layers = [(200, 7, 32), (72, 3, 0), (72, 20, 128)]
    assert_few(launches([Case("unlike", 264, 200, *layer) for layer in layers], p, dtype))


@pytest.mark.parametrize("count", [2, 40])
def test_merges_of_any_number_keep_the_kernel_of_their_rank(count, recorder):
    """Many problems fill launches anyway; none of them is computed in tiles of another's rank."""
    ranks = [14 + 80 * (i % 2) for i in range(count)]
    A, B = ([torch.randn(R, 64, dtype=BF16) for R in ranks] for _ in range(2))
    d = [torch.randn(R, dtype=BF16) for R in ranks]
    rasa_ext.grouped_gemm("TN", A, B, scale_k=d)
    (names,) = rasa_ext._C.stop_recording()
    assert {name.split()[1] for name in names} >= {"128x128x80"} and len(set(names)) == 2
