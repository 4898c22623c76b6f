"""What merging loses to the dtype of the weights, and stochastic rounding, which does not."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from models import snapshot, snapshot_bits, trained
from reference import assert_accurate
from torch import nn

import rasa_ext
from rasa_ext.injection import adapted_layers
from rasa_ext.merging import round_stochastically

HALF = [torch.bfloat16, torch.float16]


def layer_of(dtype: torch.dtype, scale: float, N: int = 96, K: int = 80) -> rasa_ext.RaSALinear:
    """One layer whose update is `scale` times the size of its weight."""
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=False)
    base.weight.data.normal_(std=0.02)
    layer = rasa_ext.RaSALinear(base.to(dtype), None, r=8, k=0, alpha=8)
    nn.init.normal_(layer.A)
    nn.init.normal_(layer.Bt)
    layer.d *= scale * 0.02 / layer.delta_weight().square().mean().sqrt()
    return layer


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_reported_error_is_that_of_float64(dtype, rounding):
    layer = layer_of(dtype, 1e-2)
    W = layer.base_layer.weight.detach().clone()
    exact_delta = (layer.Bt.double() * layer.d.double()[:, None]).T @ layer.A.double()

    result = layer.merge(
        rounding, torch.Generator().manual_seed(1) if rounding != "nearest" else None
    )

    merged = layer.base_layer.weight.detach()
    exact = (merged.double() - W.double() - exact_delta).norm() / exact_delta.norm()
    delta = exact_delta.float()
    plain = (merged.float() - W.float() - delta).norm() / delta.norm()
    assert_accurate(torch.tensor(result.error), plain, exact)
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_reported_error_is_at_most_one_rounding_of_the_sum(dtype):
    layer = layer_of(dtype, 0.5)
    delta = layer.delta_weight()

    result = layer.merge()

    sum_size = layer.base_layer.weight.float().norm() / delta.norm()
    assert 0 < result.error <= torch.finfo(dtype).eps * sum_size.item()


def test_merge_warns_once_of_updates_that_bfloat16_swallows():
    model = trained()
    rasa_ext.merge(model.to(torch.bfloat16).float())  # nothing to warn of in float32
    model = trained(dtype=torch.float32)
    for layer in adapted_layers(model).values():
        layer.d.data.mul_(1e-4)
        layer.base_layer.to(torch.bfloat16)

    with pytest.warns(UserWarning) as caught:
        report = rasa_ext.merge(model)

    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message).startswith(
        "merge: torch.bfloat16 changed the update by more than 50% in 9 of 9 layers, by "
    )
    assert report.worst.error == max(layer.error for layer in report.layers) > 0.5
    assert str(report).splitlines()[0].startswith("layers.0.attn.q_proj")


def test_a_typical_update_in_bfloat16_moves_few_weights():
    """The figure that the threshold is chosen by: an update of 1/700 of the weights' size."""
    layer = layer_of(torch.bfloat16, 1 / 700, 400, 300)
    before = layer.base_layer.weight.detach().clone()

    with pytest.warns(UserWarning, match="changed the update by more than 50%"):
        error = layer.merge().error

    unmoved = (layer.base_layer.weight == before).float().mean()
    assert 0.6 < unmoved < 0.8 and 0.6 < error < 0.8


# -------------------------------------------------------------------------------------------------
# Stochastic rounding
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(dtype):
    """Each draw is lower or lower + spacing, so by Hoeffding the mean of n draws is further than
    t spacings from its expectation with a probability of at most 2 exp(-2 n t^2)."""
    tiny = torch.finfo(dtype).tiny
    values = [
        0.0,
        1.0,
        -1.0,
        1.0003,
        -3.14159,
        0.02 + 2.8e-5,
        6.1e4,
        1.3 * tiny,
        tiny / 3,
        -tiny / 7,
    ]
    totals = torch.tensor(values, dtype=torch.float64)
    n, failure = 4000, 1e-9
    t = math.sqrt(math.log(2 * len(values) / failure) / (2 * n))

    draws = round_stochastically(
        totals.expand(n, -1), dtype, torch.Generator().manual_seed(0)
    ).double()

    lower, upper = draws.amin(0), draws.amax(0)
    nearest = totals.to(dtype)
    assert torch.equal(lower[:3], totals[:3]) and torch.equal(upper[:3], totals[:3]), "held exactly"
    assert ((lower <= totals) & (totals <= upper)).all()
    steps = upper.to(dtype).view(torch.int16) - lower.to(dtype).view(torch.int16)
    assert (steps.abs() <= 1).all() and ((nearest == lower) | (nearest == upper)).all()
    spacing = upper - lower
    assert ((draws.mean(0) - totals).abs() <= t * spacing).all()


def test_stochastic_rounding_of_what_is_too_large_is_infinite():
    total = torch.tensor([1e6, -1e6, math.inf, math.nan], dtype=torch.float64)

    rounded = round_stochastically(total, torch.float16)

    assert rounded[0] == math.inf and rounded[1] == -math.inf
    assert not rounded[2:].isfinite().any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_merges_average_to_the_update_that_nearest_swallows(dtype):
    """The mean over n merges: each element of an average of n roundings moves by at most one
    spacing, so by Hoeffding, summed over all elements against the signs of the update."""
    n, failure = 64, 1e-9
    layer = layer_of(dtype, 2e-4)
    W = layer.base_layer.weight.detach().double()
    delta = layer.delta_weight().detach().double()
    total = torch.zeros_like(W)
    for seed in range(n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge("stochastic", torch.Generator().manual_seed(seed))
        total += layer.base_layer.weight.double() - W
        layer.unmerge()

    arrived = (total * delta.sign()).sum() / n
    wanted = delta.abs().sum()
    # One draw spans one spacing, at most eps times the larger neighbour.
    spans = torch.finfo(dtype).eps * (W.abs() + delta.abs()) * 2
    bound = math.sqrt(math.log(2 / failure) * spans.square().sum().item() / (2 * n))
    assert abs(arrived - wanted) <= bound
    assert bound < wanted, "a bound that nothing could break proves nothing"


def test_stochastic_merge_repeats_under_its_generator_and_differs_otherwise():
    merged = []
    for seed in (1, 1, 2):
        model = trained().bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rasa_ext.merge(
                model, rounding="stochastic", generator=torch.Generator().manual_seed(seed)
            )
        merged.append(snapshot_bits(model))
        assert all(layer.merged for layer in adapted_layers(model).values())
    assert merged[0] == merged[1] != merged[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, "merge: rounding must be one of nearest, stochastic, got 'up'"),
        (
            {"rounding": "stochastic"},
            "merge: layers.0.attn.q_proj: RaSALinear.merge: stochastic rounding is for "
            "torch.bfloat16 and torch.float16, got torch.float32, which loses nothing worth it",
        ),
        (
            {"generator": torch.Generator()},
            'merge: generator must be None unless rounding = "stochastic"',
        ),
    ],
)
def test_merge_refuses_a_rounding_it_cannot_do(arguments, message):
    model = trained()
    bits = snapshot(model)

    with pytest.raises(ValueError) as error:
        rasa_ext.merge(model, **arguments)

    assert str(error.value) == message and snapshot(model) == bits
