"""Ranks before training, by how sensitive the loss is to each weight (Sensitivity-LoRA, 2025)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from rasa_ext.base_layer import base_weight, features
from rasa_ext.injection import TARGET_MODULES, clean_name, match, unwrapped

Batch = TypeVar("Batch")


def sensitivity_scores(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    target_modules: str | Iterable[str] = TARGET_MODULES,
    *,
    score: str = "fisher",
) -> dict[str, float]:
    """Return by layer how much the loss depends on its weight, over a few batches.

    Semantics, with g the gradient of loss(model, batch) at the layer's weight W::

        fisher:        mean over batches of g.square().sum()
        second_order:  mean over batches of 0.5 * (W.square() * g.square()).sum()

    g * g stands for the diagonal of the Hessian; second_order is then what leaving out single
    weights would cost. The model gets no gradients and stays as it was; put it into the mode
    (train or eval) that is wanted before. Memory: one gradient of each target weight.

    Raises ValueError for an unknown score, no batches, targets that do not occur, and scores that
    are not finite; TypeError for a target without a floating-point weight.
    """
    if score not in ("fisher", "second_order"):
        raise ValueError(
            f"sensitivity_scores: score must be 'fisher' or 'second_order', got {score!r}"
        )
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    weights: dict[str, Tensor] = {}
    for name, module in match(unwrapped(model), targets).items():
        weight = base_weight(module)
        if weight is None:
            raise TypeError(
                f"sensitivity_scores: {clean_name(name)} must have a floating-point weight, got "
                f"{type(module).__name__}"
            )
        weights[clean_name(name)] = weight
    required = [weight.requires_grad for weight in weights.values()]
    totals = dict.fromkeys(weights, 0.0)
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            count += 1
            with torch.enable_grad():
                value = loss(model, batch)
            grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for (name, weight), grad in zip(weights.items(), grads, strict=True):
                if grad is None:
                    continue
                squares = grad.double().square()
                if score == "second_order":
                    squares = 0.5 * weight.detach().double().square() * squares
                totals[name] += squares.sum().item()
    finally:
        for weight, was in zip(weights.values(), required, strict=True):
            weight.requires_grad_(was)
    if count == 0:
        raise ValueError("sensitivity_scores: batches must hold at least one batch, got none")
    for name, total in totals.items():
        if not 0 <= total < float("inf"):
            raise ValueError(f"sensitivity_scores: the score of {name} must be finite, got {total}")
    return {name: total / count for name, total in totals.items()}


def allocate_ranks(
    model: nn.Module,
    scores: Mapping[str, float],
    total_rank: int,
    *,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Return a rank_pattern for apply() that spends total_rank in proportion to the scores.

    Each layer gets min_rank; every further rank goes to the layer with the largest
    score / (rank + 1), of equal ones the first, that has not reached max_rank or min(N, K).

        scores = sensitivity_scores(model, loss, batches)
        pattern = allocate_ranks(model, scores, total_rank=8 * len(scores))
        rasa_ext.apply(model, r=8, k=0, rank_pattern=pattern)

    Raises ValueError if total_rank cannot be spent within these limits.
    """
    root = unwrapped(model)
    modules = {clean_name(name): module for name, module in root.named_modules()}
    limits = {name: min(features(modules[name]) or (0, 0)) for name in scores}
    if max_rank is not None:
        limits = {name: min(limit, max_rank) for name, limit in limits.items()}
    least, most = min_rank * len(scores), sum(limits.values())
    if min_rank < 1 or not least <= total_rank <= most or min_rank > min(limits.values()):
        raise ValueError(
            f"allocate_ranks: total_rank must be in min_rank * layers .. sum of the limits = "
            f"{least} .. {most}, with min_rank in 1 .. {min(limits.values(), default=0)}, got "
            f"total_rank = {total_rank} and min_rank = {min_rank}"
        )
    ranks = dict.fromkeys(scores, min_rank)
    order = {name: i for i, name in enumerate(scores)}
    queue = [(-scores[name] / (min_rank + 1), order[name], name) for name in scores]
    heapq.heapify(queue)
    left = total_rank - least
    while left > 0:
        _, _, name = heapq.heappop(queue)
        if ranks[name] == limits[name]:
            continue
        ranks[name] += 1
        left -= 1
        heapq.heappush(queue, (-scores[name] / (ranks[name] + 1), order[name], name))
    return ranks
