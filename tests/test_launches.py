"""How many CUDA kernels an op launches beside the base products, as csrc/cuda/plan.h says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from cases import Case
from layers import new_seed, sibling_inputs

import rasa_ext
from rasa_ext import rasa_linears

SUM, SPLIT = "sum of partials", ", split"  # a launch that is split stores partials
KIB = 1024
# (num_sms, shared memory of a block) of a 4090, an A100 and an H100
DEVICES = {"sm_89": (128, 99 * KIB), "sm_80": (108, 163 * KIB), "sm_90": (132, 227 * KIB)}
FAMILIES = {"alone": (576,), "qkv": (576, 192, 192), "gate_up": (1536, 1536), "narrow": (96, 576)}
RANKS = [(r, k, L) for r, k in ((8, 1), (16, 2), (32, 4)) for L in (30, 32)]
BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "tf32"])


@pytest.fixture
def one_sm() -> Iterator[None]:
    """A GPU that any tile fills, so that no plan splits."""
    rasa_ext._C.start_recording(1, 99 * KIB)
    yield
    rasa_ext._C.stop_recording()


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
    """Two launches and three; a sum of partials follows each that is split, and no other."""
    kernels = [[name for name in names if not name.startswith(SUM)] for names in programs]
    assert list(map(len, kernels)) == [2, 3], programs
    for names in programs:
        assert not names[0].startswith(SUM), names
        for name, following in pairwise([*names, ""]):
            assert following.startswith(SUM) == name.endswith(SPLIT), names


def family_cases(family: str, ranks: tuple[int, int, int], M: int = 264) -> list[Case]:
    r, k, L = ranks
    return [Case(family, M, 576, N, r - k, L * k) for N in FAMILIES[family]]


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: "r{}k{}L{}".format(*ranks))
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_takes_two_launches_and_backward_three(family, ranks, p, dtype, recorder):
    assert_few(launches(family_cases(family, ranks), p, dtype))


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("M", [1, 264])
@pytest.mark.parametrize("ranks", RANKS[1::2], ids=lambda ranks: "r{}k{}L{}".format(*ranks))
@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_split_there_are_five_launches_in_all(family, ranks, M, p, dtype, one_sm):
    forward, backward = launches(family_cases(family, ranks, M), p, dtype)
    assert [name[:2] for name in forward] == ["NT", "NN"], forward
    assert [name[:2] for name in backward] == ["NT", "NN", "TN"], backward


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_tiles_that_fill_a_gpu_need_no_sum(p, dtype, recorder):
    """x has so many features that dA alone has a tile for each SM; only the shrink of x is long."""
    forward, backward = launches([Case("wide", 16, 40_000, 8, 28, 128)], p, dtype)
    assert [name[:2] for name in backward] == ["NT", "NN", "TN"], backward
    assert forward[0].endswith(SPLIT) and forward[1].startswith(SUM) and len(forward) == 3


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


@DTYPES
def test_the_gradient_of_d_alone_takes_a_shrink_and_a_diagonal(dtype, one_sm):
    inputs = sibling_inputs(family_cases("alone", RANKS[0]), dtype, dtype)
    (d,) = inputs[-1]
    (y,) = rasa_linears(*inputs[:-1], [d.requires_grad_()], p=0.05, seed=new_seed())
    y.sum().backward()
    _, backward = rasa_ext._C.stop_recording()
    assert [name[:2] for name in backward] == ["NT", "TN"], backward


@pytest.mark.parametrize("count", [2, 40])
def test_merges_of_any_number_keep_the_kernel_of_their_rank(count, recorder):
    """Many problems fill launches anyway; none of them is computed in tiles of another's rank."""
    ranks = [14 + 80 * (i % 2) for i in range(count)]
    A, B = ([torch.randn(R, 64, dtype=BF16) for R in ranks] for _ in range(2))
    d = [torch.randn(R, dtype=BF16) for R in ranks]
    rasa_ext.grouped_gemm("TN", A, B, scale_k=d)
    (names,) = rasa_ext._C.stop_recording()
    assert {name.split()[1] for name in names} >= {"128x128x80"} and len(set(names)) == 2
