"""Siblings under torch's rituals: copies, threads, compile, DDP, FSDP."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from layers import new_seed
from models import saved
from sibling_models import (
    NAMES,
    K,
    Model,
    adapted,
    calls_of,
    make_attention,
    make_model,
    outputs_and_gradients,
    separate,
    trained,
)
from torch import Tensor, nn

import rasa_ext


def test_gradients_accumulate():
    model = make_model()
    xs = [torch.randn(5, K), torch.randn(5, K)]

    def run() -> list[Tensor]:
        for x in xs:
            model(x).square().sum().backward()
        grads = [p.grad for p in trained(model)]
        model.zero_grad()
        return grads

    together = run()
    with separate(model):
        alone = run()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: torch.load(saved(m), weights_only=False)]
)
def test_copies_of_a_model_have_groups_of_their_own(copied):
    model = make_model()
    x = torch.randn(5, K)

    twin = copied(model)

    for layer, original in zip(twin.layers, model.layers, strict=True):
        assert layer.q_proj.siblings.members == [layer.q_proj, layer.k_proj, layer.v_proj]
        assert layer.q_proj.siblings is not original.q_proj.siblings
    assert original.q_proj.siblings.members == [getattr(original, name) for name in NAMES]
    assert calls_of(lambda: twin(x)) == [3, 3] == calls_of(lambda: model(x))
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.layers[0].k_proj.A.zero_()
    assert not torch.equal(twin(x), model(x))


def test_the_copy_of_one_layer_is_alone_and_brings_no_sibling_along():
    model = make_attention()
    layer = copy.deepcopy(model.q_proj)
    assert layer.siblings.members == [layer]
    x = torch.randn(5, K)
    assert torch.equal(layer(x), model.q_proj(x))


def test_a_replaced_member_leaves_the_group():
    model = make_attention()
    model.k_proj = nn.Linear(K, 8)
    gc.collect()
    assert model.q_proj.siblings.members == [model.q_proj, model.v_proj]
    assert calls_of(lambda: model(torch.randn(5, K))) == [2]


def test_the_state_knows_nothing_of_siblings():
    linked, alone = make_model(), make_model(siblings=False)
    assert list(linked.state_dict()) == list(alone.state_dict())
    alone.load_state_dict(linked.state_dict(), strict=True)
    x = torch.randn(5, K)
    assert torch.equal(alone(x), linked(x))


def test_siblings_move_with_the_model():
    model = make_model()
    x = torch.randn(5, K, dtype=torch.float64)
    model.double()
    assert calls_of(lambda: model(x)) == [3, 3]
    assert model.to("meta")(x.to("meta")).is_meta


def test_half_precision_with_float32_adapters():
    torch.manual_seed(0)
    model = adapted(Model().bfloat16(), dropout=0.2)
    x = torch.randn(5, K).bfloat16()
    assert model.layers[0].q_proj.A.dtype == torch.float32
    assert calls_of(lambda: model(x)) == [3, 3]
    together = outputs_and_gradients(model, x)
    with separate(model):
        alone = outputs_and_gradients(model, x)
    assert torch.equal(together[0], alone[0])


def test_a_member_of_another_dtype_is_computed_alone():
    model = make_attention(k=0)
    model.k_proj.bfloat16()
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls_of(lambda: model(x)) == [2, 1]


def test_threads_do_not_see_each_others_turns():
    model = make_model()
    xs = [torch.randn(5 + i, K) for i in range(4)]
    expected = [model(x).detach() for x in xs]
    failures: list[object] = []
    barrier = threading.Barrier(len(xs))

    def work(x: Tensor, y: Tensor) -> None:
        barrier.wait()
        for _ in range(20):
            x = x.detach().requires_grad_()
            out = model(x)
            if not torch.equal(out, y):
                failures.append(out)
            torch.autograd.grad(out.sum(), x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    for layer in model.layers:
        assert not layer.q_proj.siblings._turns and layer.q_proj.siblings.fuses


def test_the_turn_of_one_thread_is_not_another_threads():
    model = make_attention(dropout=0.5)
    x = torch.randn(5, K)
    seen: list[list[int]] = []

    def in_another_thread(x: Tensor) -> None:
        thread = threading.Thread(target=lambda: seen.append(calls_of(lambda: model.k_proj(x))))
        thread.start()
        thread.join()

    model.between = in_another_thread
    assert calls_of(lambda: model(x)) == [3]
    assert seen == [[1]]


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph_and_trains(backend, dropout):
    torch._dynamo.reset()
    model = make_model(dropout=dropout)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for M in (5, 9, 7):
        x = torch.randn(M, K)
        result = outputs_and_gradients(model, x, compiled)
        assert all(t.isfinite().all() for t in result)
        expected = outputs_and_gradients(model, x)
        for value, its_expected in zip(result, expected, strict=True):
            assert dropout > 0.0 or torch.allclose(value, its_expected, atol=1e-6)
    assert all(not layer.q_proj.siblings._turns for layer in model.layers)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_ddp_reduces_every_gradient(find_unused_parameters, process_group):
    model, x = make_model(), torch.randn(5, K)
    expected = outputs_and_gradients(model, x)
    wrapped = nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=find_unused_parameters
    )
    for _ in range(2):
        model.zero_grad()
        assert calls_of(lambda: wrapped(x).square().sum().backward()) == [3, 3]
        grads = [p.grad for p in trained(model)]
        for gradient, its_expected in zip(grads, expected[2:], strict=True):
            torch.testing.assert_close(gradient, its_expected)


@pytest.mark.parametrize("wrap_members", [False, True])
def test_fsdp_shards_parents_and_members(wrap_members, process_group):
    from torch.distributed.fsdp import fully_shard

    model, x = make_model(), torch.randn(5, K)
    expected = outputs_and_gradients(model, x)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.layers:
        for name in NAMES if wrap_members else ():
            fully_shard(getattr(layer, name), mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    y = model(x)
    y.square().sum().backward()
    assert torch.equal(y, expected[0])
    for parameter, its_expected in zip(trained(model), expected[2:], strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), its_expected)


def test_functional_call_reaches_every_member():
    model = make_attention()
    x = torch.randn(5, K)
    zeros = {"k_proj.d": torch.zeros_like(model.k_proj.d)}
    y = torch.func.functional_call(model, zeros, x)
    assert torch.equal(y[:, 16:24], nn.functional.linear(x, model.k_proj.base_layer.weight))


def test_merging_the_model_and_back():
    model = make_model().eval()
    x = torch.randn(5, K)
    before = model(x)
    rasa_ext.merge(model)
    assert calls_of(lambda: model(x)) == []
    rasa_ext.unmerge(model)
    assert torch.equal(model(x), before)


def test_the_mask_of_siblings_is_that_of_the_seed():
    """compute() is what a member does alone with a seed: the reference of the tests above."""
    model = make_attention(dropout=0.5)
    layer, x, seed = model.q_proj, torch.randn(5, K), new_seed()
    adapter = (layer.A, layer.pool.A_shared, layer.Bt, layer.pool.Bt_shared, layer.d)
    base = layer.base_layer
    expected = rasa_ext.rasa_linear(x, base.weight, base.bias, *adapter, 0.5, seed)
    assert torch.equal(layer.compute(x, 0.5, seed), expected)
