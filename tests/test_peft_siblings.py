"""Siblings among PEFT's layers: one op and one mask, whatever becomes of the adapters meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import peft
import pytest
import torch
from models import randomize_adapters
from peft_models import adapted as adapted_transformer
from peft_models import layers, trained
from sibling_models import NAMES, Attention, K, Model, calls_of
from torch import Tensor, nn

from rasa_ext import siblings
from rasa_ext.peft import RaSAConfig


def config(**kwargs) -> RaSAConfig:
    return RaSAConfig(**({"r": 4, "k": 1, "target_modules": list(NAMES)} | kwargs))


def make_model(**kwargs) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), config(**kwargs))
    return randomize_adapters(model).train()


def attention(model: peft.PeftModel, i: int = 0) -> Attention:
    return model.base_model.model.layers[i]


@contextmanager
def separate(model: nn.Module) -> Iterator[None]:
    """Within it, every layer is computed on its own: a hook that does nothing is on each."""
    handles = [layer.register_forward_hook(lambda *args: None) for layer in layers(model)]
    yield
    for handle in handles:
        handle.remove()


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of what trains, with one seed."""
    torch.manual_seed(5)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(trained(model).values()))]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_op_computes_what_separate_ops_compute(dropout):
    model, x = make_model(dropout=dropout), torch.randn(2, 5, K)

    assert calls_of(lambda: model(x)) == [3, 3]
    together = step(model, x)
    with separate(model):
        assert calls_of(lambda: model(x)) == [1] * 6
        alone = step(model, x)

    assert torch.equal(together[0], alone[0])
    # Below the last layer: behind a dx, which is a sum over the siblings in another order.
    for a, b in zip(together[1:], alone[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_siblings_share_one_mask():
    model, x = make_model(dropout=0.5), torch.randn(9, K)
    parent = attention(model)
    torch.manual_seed(3)
    y = parent(x)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, ())
    expected = [getattr(parent, name).compute(x, 0.5, seed) for name in NAMES]
    assert torch.equal(y, torch.cat([expected[0] * 0.5, *expected[1:]], dim=-1))


def test_the_projections_of_a_transformer_are_linked():
    model = adapted_transformer("llama").train()
    ids = torch.arange(6)[None]
    assert calls_of(lambda: model(input_ids=ids)) == [3, 1, 2, 1] * 3
    assert calls_of(lambda: adapted_transformer("gpt2")(input_ids=ids)) == []  # Conv1D is called


def switch(model: peft.PeftModel) -> None:
    model.set_adapter("other")


def activate_both(model: peft.PeftModel) -> None:
    model.base_model.set_adapter(["default", "other"])


def disable(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: peft.PeftModel) -> None:
    model.merge_adapter()


def delete(model: peft.PeftModel) -> None:
    model.set_adapter("other")
    model.delete_adapter("default")


def cast(model: peft.PeftModel) -> None:
    attention(model).k_proj.cast_adapter("default", torch.float64)
    attention(model).k_proj.cast_adapter("default", torch.float32)


def write(model: peft.PeftModel) -> None:
    with torch.no_grad():
        attention(model).k_proj.rasa_pools["default"].A_shared.mul_(2)


def stop_dropout(model: peft.PeftModel) -> None:
    model.eval()


@pytest.mark.parametrize(
    "event", [switch, activate_both, disable, merge, delete, cast, write, stop_dropout]
)
def test_no_output_is_older_than_its_adapters(event: Callable[[nn.Module], None]):
    model, x = make_model(dropout=0.4 if event is stop_dropout else 0.0), torch.randn(5, K)
    model.add_adapter("other", config(r=6, k=2))
    switch(model)
    randomize_adapters(model, seed=9)
    model.set_adapter("default")
    parent = attention(model)
    before = parent(x)
    parent.between = lambda x: event(model)

    y = parent(x)  # q, the event, then k and v

    with separate(model):
        now = torch.cat([parent.k_proj(x), parent.v_proj(x)], dim=-1)
    assert torch.equal(y[:, 16:], now)
    assert torch.equal(y[:, 16:], before[:, 16:]) == (event is cast)  # which rounds nothing


@pytest.mark.parametrize("k", [0, 4])
def test_an_adapter_without_private_or_shared_ranks_is_computed_alone_with_the_mask(k):
    model, x = make_model(k=k, dropout=0.5), torch.randn(5, K)
    parent = attention(model)
    assert calls_of(lambda: parent(x)) == [1, 1, 1]
    torch.manual_seed(3)
    y = parent(x)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, ())
    assert torch.equal(y[:, 16:24], parent.k_proj.compute(x, 0.5, seed))


def test_another_adapter_is_computed_together_as_well():
    model, x = make_model(), torch.randn(5, K)
    model.add_adapter("other", config(r=6, k=2))
    assert calls_of(lambda: model(x)) == [3, 3]
    model.set_adapter("other")
    assert calls_of(lambda: model(x)) == [3, 3]
    model.base_model.set_adapter(["default", "other"])
    assert calls_of(lambda: model(x)) == [1] * 6
    model.base_model.set_adapter("default")
    assert calls_of(lambda: model(x)) == [3, 3]


def test_a_copy_has_groups_of_its_own():
    model, x = make_model(), torch.randn(5, K)
    twin = copy.deepcopy(model)
    parent = attention(twin)
    assert parent.q_proj.siblings.members == [getattr(parent, name) for name in NAMES]
    assert parent.q_proj.siblings is not attention(model).q_proj.siblings
    assert calls_of(lambda: twin(x)) == [3, 3] == calls_of(lambda: model(x))


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_unloading_leaves_no_hook(unload: str):
    model = make_model()
    base = getattr(model, unload)()
    assert type(base) is Model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C._autograd, "_top_saved_tensors_default_hooks"),
        (torch._C, "_current_graph_task_id"),
        (torch.autograd.Variable, "_execution_engine"),
    ],
)
def test_a_torch_without_what_siblings_ask_computes_each_alone(owner, name, monkeypatch):
    model, x = make_model(dropout=0.4), torch.randn(5, K)
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        assert siblings._Torch.find() is None
    assert siblings._Torch.find() == siblings._torch is not None
    monkeypatch.setattr(siblings, "_torch", None)

    assert calls_of(lambda: model(x)) == [1] * 6
    assert all(gradient.isfinite().all() for gradient in step(model, x))
