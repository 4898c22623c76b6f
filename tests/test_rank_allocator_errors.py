"""What RankAllocator and rank patterns refuse, and that nothing has changed then."""

from __future__ import annotations

import pytest
import torch
from allocators import (
    FIRST,
    NAMES,
    SECOND,
    allocation,
    gated,
    layers_of,
    set_gates,
    trained_parameters,
)
from models import LAYER, PROJECTIONS, plain

from rasa_ext import RankAllocator, RaSALinear, apply, merge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1": -1.0}, "RankAllocator: l1 must be at least 0, got -1.0"),
        ({"gate_lr": float("nan")}, "RankAllocator: gate_lr must be at least 0, got nan"),
        ({"every": 0}, "every must be a number of steps (an integer of at least 1) or a share"),
        ({"every": 1.5}, "every must be a number of steps (an integer of at least 1) or a share"),
        ({"every": 0.1}, "every = 0.1 is a share of total_steps, got total_steps = None"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"budget": "bytes"}, "budget must be 'ranks' or 'parameters', got 'bytes'"),
        ({"min_rank": 0}, "min_rank must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        allocation(**changes)

    assert message in str(error.value)


def test_what_has_no_gates_or_does_not_train_them_is_refused() -> None:
    model = plain()
    apply(model, target_modules=PROJECTIONS)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    with pytest.raises(ValueError, match=f"must have gates, got {LAYER} without. Call"):
        RankAllocator(model, optimizer, every=1)
    with pytest.raises(ValueError, match="must have gates, got no RaSA layers. Call"):
        RankAllocator(plain(), optimizer, every=1)
    with pytest.raises(ValueError, match="must train all 9 gates, got 9 that it does not know"):
        RankAllocator(gated(), optimizer, every=1)


def test_gates_of_16_bits_are_refused() -> None:
    model = plain().bfloat16()
    apply(model, k=0, target_modules=PROJECTIONS, gates=True, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)

    with pytest.raises(ValueError) as error:
        RankAllocator(model, optimizer, every=1)

    assert str(error.value) == (
        f"RankAllocator: gates must be float32 or float64, got torch.bfloat16 in {LAYER}. "
        "Leave out apply()'s dtype"
    )


def test_half_a_pool_is_refused() -> None:
    model = gated(k=1)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    layers: dict[str, RaSALinear] = {FIRST: layers_of(model)[FIRST]}

    with pytest.raises(ValueError, match=f"must be all 3 of the pool of {FIRST}, got 1"):
        RankAllocator(layers, optimizer, every=1)


def test_layers_may_be_given_by_name() -> None:
    model = gated()
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    layers = {name: layer for name, layer in layers_of(model).items() if "q_proj" in name}

    allocator = RankAllocator(layers, optimizer, every=1)

    assert list(allocator.rank_pattern()) == [name for name in NAMES if "q_proj" in name]


def test_a_schedule_made_before_the_allocator_is_refused() -> None:
    model = gated()
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    with pytest.raises(ValueError, match="Make the schedule after the allocator"):
        RankAllocator(model, optimizer, every=1)

    assert len(optimizer.param_groups) == 1


def test_merged_layers_and_nan_are_refused_with_nothing_changed() -> None:
    model, _, allocator = allocation()
    set_gates(model, {FIRST: [0.0, 1.0, 1.0, 1.0], SECOND: [float("nan"), 1.0, 1.0, 1.0]})
    with pytest.raises(RuntimeError, match=f"gates must be numbers, got NaN in {SECOND}"):
        allocator.update()
    merge(gated())
    layers_of(model)[FIRST].merge()
    with pytest.raises(RuntimeError, match=f"{FIRST} is merged"):
        allocator.update()
    assert allocator.rank_pattern() == dict.fromkeys(NAMES, 4)


def test_the_optimizer_that_accelerate_wraps_is_found() -> None:
    model = gated()
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    wrapper = type("AcceleratedOptimizer", (), {"optimizer": optimizer})()

    assert RankAllocator(model, wrapper, every=1).optimizer is optimizer


def test_a_state_of_other_settings_or_layers_is_refused() -> None:
    model, _, allocator = allocation()
    state = allocator.state_dict()
    ranks = allocator.rank_pattern()

    for change, message in (
        ({"version": 9}, "version must be 1, got 9"),
        ({"settings": state["settings"] | {"l1": 7.0}}, "l1 must be 0.001 as in this allocator"),
        ({"private": {"other": 4}}, "the state is of other layers"),
    ):
        with pytest.raises(ValueError, match=message):
            allocator.load_state_dict(state | change)

    assert allocator.rank_pattern() == ranks


def test_a_rank_pattern_that_does_not_fit_is_refused() -> None:
    for pattern, message in (
        ({"k_proj": 3}, "rank_pattern must name adapted layers, or ends of their names, got 'k_pr"),
        ({"q_proj": 0}, "apply: rank_pattern of 'q_proj': r must be an integer of at least 1"),
        ({"q_proj": 1}, "apply: rank_pattern of 'q_proj': k must be an integer in 0 .. r = 1"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(plain(), r=4, k=2, target_modules=PROJECTIONS, rank_pattern=pattern)
