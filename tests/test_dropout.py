"""Dropout inside the ops: one mask, drawn from the seed, the same wherever it is needed."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case
from layers import DTYPES, add_inputs, dtypes_id, new_seed
from torch import Tensor

from rasa_ext import dropout_mask, rasa_add

pytestmark = pytest.mark.usefixtures("device")


KEYS = (0x9E3779B9, 0xBB67AE85)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
DRAWS = 2**15


def draw(seed: int, m: int, c: int) -> int:
    """The mapping of csrc/philox.h in Python integers."""
    w = [(m % 8) * 4 + (c % 8) // 2, m // 16, c // 16, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        p0, p1 = MULTIPLIERS[0] * w[0], MULTIPLIERS[1] * w[2]
        w = [p1 >> 32 ^ w[1] ^ key[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ w[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(k + step) & 0xFFFFFFFF for k, step in zip(key, KEYS, strict=True)]
    return w[(m // 8) % 2 + 2 * ((c // 8) % 2)] >> 16 * (c % 2) & 0x7FFF


def masks_of_the_op(M: int, K: int, p: float, seed: Tensor, dtype=torch.float32) -> list[Tensor]:
    """The masks that the forward, dx and dA of an op with this seed applied.

    A = Bt = identity, d = 1, base = 0: y is x after dropout, and dx is dy after the same.
    """
    x = torch.ones(M, K, dtype=dtype, requires_grad=True)
    eye = torch.eye(K, dtype=dtype)
    none = torch.empty(0, K, dtype=dtype)
    A = eye.clone().requires_grad_()
    zero, ones = torch.zeros(M, K, dtype=dtype), torch.ones(K, dtype=dtype)
    y = rasa_add(x, zero, A, none, eye, none, ones, p, seed)
    dx, dA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
    # dA[j, c] = sum over tokens of dy[m, j] mask[m, c]: columns of the mask, counted.
    return [y.detach(), dx, dA]


@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC_DEF0, 2**63 - 1])
def test_the_mask_is_the_documented_function_of_seed_and_element(seed):
    p = 0.25
    mask = dropout_mask(torch.tensor(seed), 35, 37, p)
    expected = [[draw(seed, m, c) >= p * DRAWS for c in range(37)] for m in range(35)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("M,K", [(1, 1), (17, 33), (130, 200)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_dx_and_wgrad_apply_one_mask(M, K, dtype, micro_kernel):
    p, seed = 0.3, new_seed()
    mask = dropout_mask(seed, M, K, p)
    y, dx, dA = masks_of_the_op(M, K, p, seed, dtype)
    scale = 1 / (1 - round(p * DRAWS) / DRAWS)
    kept = torch.tensor(scale, dtype=torch.float64).to(dtype)  # rounded once, as an element of y
    assert torch.equal(y, mask * kept)
    assert torch.equal(dx, mask * kept)
    counts = (dA.double() / scale).round()
    assert torch.equal(counts, mask.sum(0).double().expand(K, K))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_keep_rate_is_within_its_statistical_bounds(p):
    M, K = 700, 600
    kept = dropout_mask(new_seed(), M, K, p).double()
    rate, sigma = 1 - p, math.sqrt(p * (1 - p))
    assert abs(kept.mean().item() - rate) < 5 * sigma / math.sqrt(M * K)
    # By row and by column too: no stripe of the matrix is treated otherwise.
    assert (kept.mean(1) - rate).abs().max().item() < 6 * sigma / math.sqrt(K)
    assert (kept.mean(0) - rate).abs().max().item() < 6 * sigma / math.sqrt(M)


def test_neighbours_and_seeds_are_not_correlated():
    M, K, p = 512, 512, 0.5
    first = dropout_mask(torch.tensor(1), M, K, p).double() - 0.5
    other = dropout_mask(torch.tensor(2), M, K, p).double() - 0.5
    products = {
        "next column": first[:, 1:] * first[:, :-1],
        "next row": first[1:] * first[:-1],
        "next block": first[:, 16:] * first[:, :-16],
        "half a block": first[8:] * first[:-8],
        "another seed": first * other,
    }
    for name, product in products.items():
        correlation = product.mean().item() * 4
        assert abs(correlation) < 5 / math.sqrt(product.numel()), name


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_p_zero_is_an_exact_no_op(dtypes):
    inputs = add_inputs(Case("p0", 70, 48, 40, 3, 5), *dtypes)
    assert torch.equal(rasa_add(*inputs, p=0.0, seed=new_seed()), rasa_add(*inputs))


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_mask_does_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    expected = masks_of_the_op(600, 64, 0.5, new_seed())
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, masks_of_the_op(600, 64, 0.5, new_seed()), expected))
    finally:
        torch.set_num_threads(before)


def test_another_seed_is_another_mask():
    a, b = (dropout_mask(torch.tensor(s), 64, 64, 0.5) for s in (7, 7 + 2**40))
    assert not torch.equal(a, b)
