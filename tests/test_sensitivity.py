"""Ranks from sensitivity: scores against gradients by hand, and what a budget buys."""

from __future__ import annotations

import pytest
import torch
from models import PROJECTIONS, Int8Linear, plain, snapshot
from torch import Tensor, nn

from rasa_ext import allocate_ranks, apply, sensitivity_scores


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).square().mean()


BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("score", ["fisher", "second_order"])
def test_scores_are_means_over_batches_of_squared_gradients(score: str) -> None:
    model = plain().double().requires_grad_(False)
    before = snapshot(model)
    batches = [x.double() for x in BATCHES]

    scores = sensitivity_scores(model, loss, batches, PROJECTIONS, score=score)

    assert snapshot(model) == before and all(p.grad is None for p in model.parameters())
    weight = model.layers[1].attn.q_proj.weight.requires_grad_()
    expected = 0.0
    for x in batches:
        (grad,) = torch.autograd.grad(loss(model, x), weight)
        scale = 0.5 * weight.detach().square() if score == "second_order" else 1.0
        expected += (scale * grad.square()).sum().item() / 3
    assert scores["layers.1.attn.q_proj"] == pytest.approx(expected, rel=1e-12)
    assert len(scores) == 9


def test_ranks_go_where_the_score_is() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    scores = {"a": 6.0, "b": 2.0, "c": 0.0}

    # Shares 6/2 6/3 6/4 ... and 2/2 2/3 ...: a a a (2/2 ties with 6/6: a is first) a a, b.
    assert allocate_ranks(model, scores, 3) == {"a": 1, "b": 1, "c": 1}
    assert allocate_ranks(model, scores, 7) == {"a": 5, "b": 1, "c": 1}
    assert allocate_ranks(model, scores, 9) == {"a": 6, "b": 2, "c": 1}
    assert allocate_ranks(model, scores, 9, max_rank=4) == {"a": 4, "b": 4, "c": 1}
    assert allocate_ranks(model, scores, 24) == {"a": 8, "b": 8, "c": 8}


def test_the_pattern_is_what_apply_takes() -> None:
    model = plain()
    scores = sensitivity_scores(model, loss, BATCHES, PROJECTIONS)

    pattern = allocate_ranks(model, scores, total_rank=4 * len(scores))
    apply(model, r=4, k=0, target_modules=PROJECTIONS, rank_pattern=pattern)

    ranks = {name: model.get_submodule(name).Rp for name in pattern}
    assert ranks == pattern and sum(ranks.values()) == 36 and len(set(ranks.values())) > 1


def test_what_cannot_be_scored_or_spent_is_refused() -> None:
    model = plain()
    with pytest.raises(ValueError, match="score must be 'fisher' or 'second_order', got 'hessian'"):
        sensitivity_scores(model, loss, BATCHES, PROJECTIONS, score="hessian")
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        sensitivity_scores(model, loss, [], PROJECTIONS)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        sensitivity_scores(model, loss, [torch.full((4, 8), float("nan"))], PROJECTIONS)
    for total in (8, 9 * 8 + 1):
        with pytest.raises(ValueError, match=rf"9 \.\. 72, .* got total_rank = {total} and"):
            allocate_ranks(model, {f"layers.{i}.{p}": 1.0 for i in range(3) for p in FULL}, total)
    model.layers[0].attn.q_proj = Int8Linear(model.layers[0].attn.q_proj)
    with pytest.raises(TypeError, match="layers.0.attn.q_proj must have a floating-point weight"):
        sensitivity_scores(model, loss, BATCHES, PROJECTIONS)


FULL = ("attn.q_proj", "attn.v_proj", "down_proj")
