"""RankAllocator: the proximal step, pruning and growing, budgets, resuming, files."""

from __future__ import annotations

import gc
import io
from typing import Any

import pytest
import torch
from allocators import (
    FIRST,
    NAMES,
    OPTIMIZERS,
    SECOND,
    allocation,
    gated,
    layers_of,
    set_gates,
    train_step,
    trained_parameters,
)
from models import LAYER, POOL, PROJECTIONS, TinyModel, plain, randomize_adapters
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from rasa_ext import (
    RankAllocator,
    apply,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_gates_change_nothing_at_first(k: int) -> None:
    models = [plain(), plain()]
    for model, gates in zip(models, (False, True), strict=True):
        torch.manual_seed(1)
        apply(model, r=4, k=k, target_modules=PROJECTIONS, gates=gates)
    x = torch.randn(3, 8)

    plain_layers, gated_layers = (layers_of(model) for model in models)

    assert torch.equal(models[0](x), models[1](x))
    for name, layer in gated_layers.items():
        assert torch.equal(layer.d, plain_layers[name].d)
        assert torch.equal(layer.c, torch.ones_like(layer.c)) and layer.c.requires_grad


@pytest.mark.parametrize("k", [0, 1])
def test_a_gate_gets_the_gradient_of_d_times_its_scale(k: int) -> None:
    model = gated(k=k).double()
    layer = layers_of(model)[FIRST]
    x = torch.randn(3, 8, dtype=torch.float64)

    layer(x).square().sum().backward()

    d = layer.d.detach().requires_grad_()
    A, Bt = layer.A.detach(), layer.Bt.detach()
    if k > 0:
        A, Bt = torch.cat([layer.pool.A_shared, A]), torch.cat([layer.pool.Bt_shared, Bt])
    (layer.base_layer(x) + ((x @ A.T) * d) @ Bt).square().sum().backward()
    torch.testing.assert_close(layer.c.grad, d.grad * layer.gate_scale, rtol=1e-12, atol=0)


def test_each_step_shrinks_the_gates_by_the_group_s_rate_and_clamps_them() -> None:
    model, optimizer, allocator = allocation(every=100, l1=0.5, gate_lr=0.2)
    set_gates(model, {FIRST: [1.5, 0.55, 0.1, 0.05]})

    allocator.step()
    optimizer.param_groups[-1]["lr"] = 0.02  # as a schedule would
    allocator.step()

    expected = torch.tensor([0.99, 0.44, 0.0, 0.0])
    torch.testing.assert_close(layers_of(model)[FIRST].c.detach(), expected)


def test_gates_have_a_group_of_their_own() -> None:
    model = gated()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.1)

    RankAllocator(model, optimizer, every=1, gate_lr=0.3)

    others, gates = optimizer.param_groups
    assert [id(p) for p in gates["params"]] == [id(x.c) for x in layers_of(model).values()]
    assert (gates["lr"], gates["weight_decay"]) == (0.3, 0.0)
    assert (others["lr"], others["weight_decay"]) == (1e-2, 0.1)
    assert len(others["params"]) + len(gates["params"]) == len(trained_parameters(model))
    RankAllocator(model, optimizer, every=1, gate_lr=0.4)
    assert len(optimizer.param_groups) == 2 and gates["lr"] == 0.4


def test_updates_come_every_share_of_the_steps_but_not_at_the_last() -> None:
    _, _, allocator = allocation(every=0.25, total_steps=10)
    updates = []
    allocator.update = lambda: bool(updates.append(allocator.steps)) or True

    changed = [allocator.step() for _ in range(10)]

    assert updates == [2, 4, 6, 8]
    assert changed == [step in updates for step in range(1, 11)]


def test_pruned_ranks_move_and_the_function_stays() -> None:
    model, _, allocator = allocation()
    set_gates(model, {FIRST: [0.5, 0.0, 1.0, 0.0], SECOND: [0.9, 1.0, 0.8, 1.0]})
    x = torch.randn(4, 8, dtype=torch.float64)
    before = model.double()(x)

    assert allocator.update()

    # Seven layers have smallest gate 1.0 and come first; the two ranks go to the first two of them.
    first, second = [name for name in NAMES if name not in (FIRST, SECOND)][:2]
    assert allocator.rank_pattern() == dict.fromkeys(NAMES, 4) | {FIRST: 2, first: 5, second: 5}
    layer = layers_of(model)[first]
    assert layer.c[-1] == 1 and not layer.Bt[-1].any() and layer.A[-1].any()
    torch.testing.assert_close(model(x), before, rtol=1e-14, atol=1e-14)
    assert not allocator.update()


def test_new_ranks_are_normal_with_standard_deviation_one_over_r() -> None:
    model = TinyModel(width=256)
    apply(model, r=16, k=0, target_modules=["down_proj"], gates=True)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    allocator = RankAllocator(model, optimizer, every=1)
    set_gates(model, {"layers.0.down_proj": [1.0] + [0.0] * 15})

    allocator.update()

    rows = layers_of(model)["layers.1.down_proj"].A[16:]
    assert rows.shape == (8, 512)
    # 4096 draws: the standard error of their deviation is 1 / sqrt(2 * 4096) of it.
    assert abs(rows.std().item() * 16 - 1) < 5 / (2 * 4096) ** 0.5
    assert abs(rows.mean().item() * 16) < 5 / 4096**0.5


def test_a_layer_whose_ranks_are_all_dead_keeps_the_first() -> None:
    model, optimizer, allocator = allocation(reassign=False)
    set_gates(model, dict.fromkeys(NAMES, [0.0] * 4))
    rows = layers_of(model)[FIRST].A[:1].clone()

    allocator.update()

    assert allocator.rank_pattern() == dict.fromkeys(NAMES, 1)
    assert torch.equal(layers_of(model)[FIRST].A, rows)
    train_step(model, optimizer, 0)


def test_a_shared_rank_that_no_layer_uses_is_freed_in_all_layers() -> None:
    model, optimizer, allocator = allocation(k=1, reassign=False)
    members = [name for name in NAMES if name.endswith("q_proj")]
    for i, name in enumerate(members):
        set_gates(model, {name: [0.5, 0.0, 0.2 * i, 0.3, 0.4, 0.5]})
    kept = model.get_submodule(POOL).A_shared[[0, 2]].clone()
    x = torch.randn(4, 8, dtype=torch.float64)
    before = model.double()(x)

    allocator.update()

    pool = model.get_submodule(POOL)
    assert pool.Rs == 2 and torch.equal(pool.A_shared.float(), kept)
    for i, name in enumerate(members):
        expected = torch.tensor([0.5, 0.2 * i, 0.3, 0.4, 0.5], dtype=torch.float64)
        torch.testing.assert_close(layers_of(model)[name].c.detach(), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(model(x), before, rtol=1e-14, atol=1e-14)
    assert allocator.history[-1]["pools"] == [2, 3, 3]
    assert allocator.history[-1]["shared"][:4] == [1, 3, 3, 2]
    train_step(model.float(), optimizer, 0)


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in trained_parameters(model))


@pytest.mark.parametrize("k", [0, 1])
def test_the_parameter_budget_is_never_exceeded_and_misses_by_less_than_a_rank(k: int) -> None:
    model, _, allocator = allocation(k=k, budget="parameters")
    before = parameters_of(model)
    wide = [name for name in NAMES if name.endswith("down_proj")]
    dead = [0.5, 0.0, 0.0] + [1.0] * (3 if k else 1)
    for name in wide:
        set_gates(model, {name: [1.0] * 3 * k + dead[: 4 - k]})

    allocator.update()

    assert allocator.budget == before
    assert before - (8 + 8 + 1) < parameters_of(model) <= before
    # Two ranks of 8 + 16 + 1 parameters from each of three layers: 150 = 8 * 17 + 14.
    assert sum(allocator.rank_pattern().values()) == 9 * (4 - k) - 6 + 8


def test_the_rank_budget_lets_parameters_drift() -> None:
    model, _, allocator = allocation(budget="ranks")
    before = parameters_of(model)
    set_gates(model, {FIRST: [1.0, 0.0, 0.0, 0.0], SECOND: [1.0, 0.0, 0.0, 0.0]})

    allocator.update()

    assert sum(allocator.rank_pattern().values()) == 9 * 4
    assert parameters_of(model) > before


def resume(state: dict[str, Any], k: int, optimizer_name: str) -> tuple:
    """What a new process does: apply, allocator, then the three states in this order."""
    model, optimizer, allocator = allocation(k=k, optimizer=optimizer_name, **SETTINGS)
    allocator.load_state_dict(state["allocator"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer, allocator


SETTINGS = {"every": 4, "l1": 1.0, "gate_lr": 0.1, "total_steps": 40}


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_resuming_in_the_middle_is_an_uninterrupted_run_to_the_bit(k, optimizer_name) -> None:
    model, optimizer, allocator = allocation(k=k, optimizer=optimizer_name, **SETTINGS)
    for step in range(10):
        train_step(model, optimizer, step)
        allocator.step()
    file = io.BytesIO()
    states = {"model": model, "optimizer": optimizer, "allocator": allocator}
    torch.save({name: part.state_dict() for name, part in states.items()}, file)
    file.seek(0)

    runs = [(model, optimizer, allocator), resume(torch.load(file), k, optimizer_name)]
    for model, optimizer, allocator in runs:
        for step in range(10, 24):
            train_step(model, optimizer, step)
            allocator.step()

    through, resumed = ([p.detach() for p in trained_parameters(run[0])] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))
    assert runs[0][2].state_dict() == runs[1][2].state_dict()
    assert len(runs[0][2].history) > 2


@pytest.mark.parametrize("k", [0, 1])
def test_ragged_adapters_are_saved_loaded_and_merged(tmp_path, k: int) -> None:
    model, optimizer, allocator = allocation(r=7, k=k, **SETTINGS)
    for step in range(16):
        train_step(model, optimizer, step)
        allocator.step()
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)

    loaded = plain()
    summary = load_adapter(loaded, path)

    x = torch.randn(4, 8)
    assert len(set(allocator.rank_pattern().values())) > 2
    assert torch.equal(loaded(x), model(x))
    assert summary.trainable == parameters_of(model)
    assert min(group.Rp_min for group in summary.groups) == min(allocator.rank_pattern().values())
    again = tmp_path / "again.safetensors"
    save_adapter(loaded, again)
    assert load_adapter(model, again) == summary
    apart = loaded.double()(x.double())
    merge(loaded)
    torch.testing.assert_close(loaded.eval()(x.double()), apart, rtol=1e-12, atol=1e-12)
    unmerge(loaded)
    assert torch.equal(loaded(x.double()), apart)


def test_gates_of_another_scale_are_not_loaded_into_a_model(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(gated(r=4), path)
    other = plain()
    apply(other, r=4, k=0, alpha=8, target_modules=PROJECTIONS, gates=True)

    with pytest.raises(ValueError) as error:
        load_adapter(other, path)

    assert str(error.value) == (
        f"load_adapter: alpha must be 8 as in {LAYER}, got 16; with k = 0 it is no trained weight"
    )
    ungated = plain()
    apply(ungated, r=4, k=0, target_modules=PROJECTIONS)
    with pytest.raises(ValueError, match=r"\(gates, r, alpha\) must be \(False, 4, 16.0\)"):
        load_adapter(ungated, path)


@pytest.mark.parametrize("k", [0, 2])
def test_rank_pattern_gives_layers_their_own_r(tmp_path, k: int) -> None:
    model = plain()
    pattern = {"q_proj": 3, "layers.1.attn.q_proj": 5}

    summary = apply(model, r=4, k=k, target_modules=PROJECTIONS, rank_pattern=pattern)

    layers = layers_of(model)
    assert [layer.r for layer in layers.values()] == [3, 4, 4, 5, 4, 4, 3, 4, 4]
    assert summary.groups[0].ranks == f"{3 + 2 * k}..{5 + 2 * k} = {3 * k} + {3 - k}..{5 - k}"
    if k == 0:
        assert torch.equal(layers[FIRST].d, torch.full((3,), 16 / 3))
    path = tmp_path / "adapter.safetensors"
    save_adapter(randomize_adapters(model), path)
    loaded = plain()
    load_adapter(loaded, path)
    x = torch.randn(2, 8)
    assert torch.equal(loaded(x), model(x))


def test_gradient_checkpointing_and_accumulation_see_the_new_ranks() -> None:
    grads = []
    for checkpointed in (False, True):
        model, optimizer, allocator = allocation()
        set_gates(model, {FIRST: [1.0, 0.0, 1.0, 0.0]})
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            y = x
            for block in model.layers:
                y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
            y.square().mean().backward()
        # Accumulated gradients of survivors stay where an update falls before zero_grad().
        before = layers_of(model)[FIRST].A.grad[[0, 2]].clone()
        allocator.update()
        assert torch.equal(layers_of(model)[FIRST].A.grad, before)
        optimizer.step()
        train_step(model, optimizer, 1)
        grads.append([p.detach().clone() for p in trained_parameters(model)])

    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def live_bytes() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    # Lazy parameters of other tests have no storage.
    return sum(t.untyped_storage().nbytes() for t in tensors if not is_lazy(t))


def test_a_thousand_updates_leave_no_memory_behind() -> None:
    model, optimizer, allocator = allocation(k=1)
    sizes = []
    for step in range(1000):
        name = NAMES[step % len(NAMES)]
        layer = layers_of(model)[name]
        with torch.no_grad():
            layer.c[-1] = 0.0
        if step % 100 == 0:
            train_step(model, optimizer, step)
        allocator.update()
        assert sum(allocator.rank_pattern().values()) <= 9 * 3
        if step in (199, 999):
            sizes.append(live_bytes())

    bytes_of_a_rank = 4 * 4 * (8 + 16 + 1)  # weights and two moments, amply
    assert len(allocator.history) > 200
    assert sizes[1] - sizes[0] <= 9 * bytes_of_a_rank
    assert len(optimizer.state) == len(trained_parameters(model))
