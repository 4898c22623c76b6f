"""Ranks are edited in place: parameter, gradient and optimizer state by name."""

from __future__ import annotations

import pytest
import torch
from allocators import FIRST, OPTIMIZERS, allocation, layers_of, set_gates, train_step
from torch import Tensor, nn

from rasa_ext import RankAllocator
from rasa_ext.rank_edits import RowEdit, apply_edits

STATES = {
    "adam": {"exp_avg", "exp_avg_sq"},
    "adamw": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "sgd": {"momentum_buffer"},
    "lion-like": {"exp_avg"},
}


def edit_of(parameter: Tensor, keep: list[int], new: int) -> RowEdit:
    rows = torch.full((new, *parameter.shape[1:]), 7.0, dtype=parameter.dtype)
    return RowEdit(parameter, torch.tensor(keep), rows)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(4, 3), (4,)], ids=["matrix", "vector"])
def test_state_of_survivors_is_kept_to_the_bit_and_new_ranks_start_at_zero(name, shape) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = OPTIMIZERS[name]([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(shape)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    value, grad = parameter.detach().clone(), parameter.grad.clone()

    apply_edits([edit_of(parameter, [3, 1], 2)], optimizer)

    state = optimizer.state[parameter]
    assert {key for key in state if key != "step"} == STATES[name]
    for key in STATES[name]:
        assert torch.equal(state[key][:2], before[key][[3, 1]])
        assert torch.equal(state[key][2:], torch.zeros_like(state[key][2:]))
    assert state.get("step") == before.get("step")
    assert torch.equal(parameter[:2], value[[3, 1]]) and (parameter[2:] == 7).all()
    assert torch.equal(parameter.grad[:2], grad[[3, 1]]) and not parameter.grad[2:].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_the_same_parameter_objects(name: str) -> None:
    model, optimizer, allocator = allocation(optimizer=name)
    objects = [id(p) for group in optimizer.param_groups for p in group["params"]]
    kept_loss = train_step(model, optimizer, 0)  # its graph holds accumulators of the old shapes
    set_gates(model, {FIRST: [1.0, 0.0, 1.0, 0.0]})

    assert allocator.update()
    train_step(model, optimizer, 1)

    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == objects
    assert kept_loss.isfinite()
    for layer in layers_of(model).values():
        for parameter in (layer.A, layer.Bt, layer.c):
            for value in optimizer.state[parameter].values():
                assert value.dim() == 0 or value.shape == parameter.shape


class AdamW8bit(torch.optim.AdamW):
    """Named like the optimizers of bitsandbytes and torchao."""


class ZeroRedundancyAdam(torch.optim.Adam):
    """Named like torch.distributed's."""


@pytest.mark.parametrize("optimizer", [AdamW8bit, ZeroRedundancyAdam])
def test_optimizers_with_compressed_or_spread_state_are_refused_by_name(optimizer) -> None:
    model, _, _ = allocation()
    parameters = [p for p in model.parameters() if p.requires_grad]

    with pytest.raises(TypeError) as error:
        RankAllocator(model, optimizer(parameters), every=1)

    assert str(error.value) == (
        "RankAllocator: optimizer must keep its state in tensors of the parameters' shapes, got "
        f"{optimizer.__name__}. Use a 32-bit optimizer in one piece, e.g. torch.optim.AdamW"
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(2), "must be a plain tensor of its parameter's shape [4, 3], got a Tensor of"),
        (torch.zeros(4, 3, dtype=torch.uint8), "must be floating-point, got torch.uint8"),
        (nn.Parameter(torch.zeros(4, 3)), "must be a plain tensor of its parameter's shape"),
    ],
)
def test_a_state_that_is_not_kept_by_rank_is_refused_before_anything_changes(
    state, message
) -> None:
    first, second = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    values = [first.detach().clone(), second.detach().clone()]
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    optimizer.state[second]["compressed"] = state

    with pytest.raises(ValueError) as error:
        apply_edits([edit_of(first, [0], 0), edit_of(second, [0], 0)], optimizer)

    assert "the state 'compressed' of SGD" in str(error.value) and message in str(error.value)
    assert torch.equal(first, values[0]) and torch.equal(second, values[1])


def test_factored_moments_are_refused_by_name() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.randn(4, 3)
    optimizer.step()

    with pytest.raises(ValueError, match="the state 'row_var' of Adafactor"):
        apply_edits([edit_of(parameter, [0], 0)], optimizer)


class Wrapped(Tensor):
    """A tensor subclass, as sharding makes."""


def test_sharded_parameters_are_refused() -> None:
    parameter = torch.randn(4, 3).as_subclass(Wrapped)

    with pytest.raises(TypeError, match="ranks of a Wrapped cannot be edited"):
        apply_edits([edit_of(parameter, [0], 0)])
