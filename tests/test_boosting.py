"""Boosting with rank-1 adapters: the sum is kept in float32 and the model computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import PROJECTIONS, Conv1D, Int8Linear, plain, randomize_adapters, trainable
from torch import nn

from rasa_ext import BoostedUpdate, apply

NAME = "layers.1.attn.q_proj"


def boosted_model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, BoostedUpdate]:
    model = plain().to(dtype)
    apply(model, r=1, k=0, alpha=1, target_modules=PROJECTIONS)
    return model, BoostedUpdate(model)


def test_folding_changes_nothing_but_where_the_update_is() -> None:
    model, boosted = boosted_model(torch.float64)
    randomize_adapters(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    before = model(x)

    boosted.fold()

    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert all(not layer.Bt.any() and layer.A.any() for layer in boosted.layers.values())


def test_many_small_updates_are_rounded_once() -> None:
    model, boosted = boosted_model(torch.bfloat16)
    original = boosted.layers[NAME].base_layer.weight.clone()
    exact = torch.zeros(8, 8, dtype=torch.float64)
    for round_ in range(50):
        randomize_adapters(model, seed=round_)
        with torch.no_grad():
            for layer in boosted.layers.values():
                layer.Bt.mul_(1e-3).abs_()  # one alone is below half a unit of most weights
                layer.A.abs_()
        exact += boosted.layers[NAME].delta_weight().detach().double()
        boosted.fold()

    weight = boosted.layers[NAME].base_layer.weight
    assert boosted.accumulated[NAME].dtype == torch.float32
    torch.testing.assert_close(boosted.accumulated[NAME].double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(weight, (original + boosted.accumulated[NAME]).to(torch.bfloat16))
    assert not torch.equal(weight, original)


def test_undoing_restores_every_bit() -> None:
    model, boosted = boosted_model(torch.bfloat16)
    weights = [layer.base_layer.weight.clone() for layer in boosted.layers.values()]
    randomize_adapters(model)
    boosted.fold()

    boosted.undo()

    after = [layer.base_layer.weight for layer in boosted.layers.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))
    assert not any(update.any() for update in boosted.accumulated.values())


def test_only_the_chosen_layers_learn() -> None:
    model, boosted = boosted_model()

    boosted.select([NAME])

    assert set(trainable(model)) == {f"{NAME}.A", f"{NAME}.Bt"}
    with pytest.raises(ValueError, match="names must be adapted layers, got 'head'"):
        boosted.select(["head"])
    assert set(trainable(model)) == {f"{NAME}.A", f"{NAME}.Bt"}


def test_rounds_of_rank_one_reach_what_one_rank_cannot() -> None:
    torch.manual_seed(0)
    target = torch.randn(8, 6) @ torch.randn(6, 8) / 4
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    nn.init.zeros_(model[0].weight)
    apply(model, r=1, k=0, alpha=1, target_modules=["0"])
    boosted = BoostedUpdate(model)
    errors = []
    for _ in range(6):
        boosted.select(boosted.layers)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            (model[0].weight - target).square().sum().backward()
            optimizer.step()
        boosted.fold()
        errors.append((model[0].weight - target).norm().item())

    singular = torch.linalg.svdvals(target)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * singular[1:].norm().item()  # the best that any single rank leaves
    assert torch.linalg.matrix_rank(boosted.accumulated["0"], rtol=1e-3) > 1


def test_a_transposed_weight_gets_the_transposed_sum() -> None:
    model = nn.Sequential(Conv1D(6, 8)).double()
    apply(model, r=1, k=0, target_modules=["0"])
    boosted = BoostedUpdate(model)
    randomize_adapters(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    before = model(x)

    boosted.fold()

    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_folded_is_refused_with_nothing_changed() -> None:
    with pytest.raises(ValueError, match="the model has no RaSA adapters"):
        BoostedUpdate(plain())
    shared = plain()
    apply(shared, r=2, k=1, target_modules=PROJECTIONS)
    with pytest.raises(ValueError, match="k must be 0, got 1 in layers.0.attn.q_proj"):
        BoostedUpdate(shared)
    quantized = plain()
    quantized.layers[0].attn.q_proj = Int8Linear(quantized.layers[0].attn.q_proj)
    apply(quantized, r=1, k=0, target_modules=PROJECTIONS)
    with pytest.raises(TypeError, match="must have a floating-point weight to add to, got Int8"):
        BoostedUpdate(quantized)
    model, boosted = boosted_model()
    with torch.no_grad():
        boosted.layers[NAME].Bt.fill_(float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"the weight of {NAME} must be finite"):
        boosted.fold()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    boosted.layers[NAME].reset_parameters()
    boosted.layers[NAME].merge()
    with pytest.raises(RuntimeError, match=f"{NAME} is merged"):
        boosted.fold()
