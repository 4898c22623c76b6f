"""Siblings in a model: one op, one mask, and every way in which an output could go stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import assert_as_accurate, authors_layer
from sibling_models import (
    NAMES,
    Attention,
    K,
    adapted,
    assert_same,
    calls_of,
    kept_tensors,
    make_attention,
    outputs_and_gradients,
    separate,
)
from torch import Tensor, nn

from rasa_ext import apply, link_siblings

# ---------------------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,), (0, K)])
def test_one_op_computes_what_separate_ops_compute(shape, dropout):
    model = make_attention(dropout=dropout)
    x = torch.randn(shape)

    assert calls_of(lambda: model(x)) == [3]
    together = outputs_and_gradients(model, x)
    with separate(model):
        assert calls_of(lambda: model(x)) == [1, 1, 1]
        alone = outputs_and_gradients(model, x)

    assert_same(together, alone, x_is_exact=False)


def test_values_are_the_authors_formula():
    model = make_attention()

    def formula(model: Attention, x: Tensor) -> Tensor:
        q, k, v = (authors_layer(getattr(model, name), x) for name in NAMES)
        return torch.cat([q * 0.5, k, v], dim=-1)

    assert_as_accurate(model, formula, model, torch.randn(7, K))


@pytest.mark.parametrize("are_separate", [False, True])
def test_siblings_share_one_mask_and_the_next_call_draws_another(are_separate):
    model = make_attention(dropout=0.5)
    x = torch.randn(9, K)

    def run() -> Tensor:
        torch.manual_seed(3)
        return torch.stack([model(x), model(x)])

    if are_separate:
        with separate(model):
            first, second = run()
    else:
        first, second = run()

    torch.manual_seed(3)
    seeds = [torch.randint(2**63 - 1, ()) for _ in range(2)]
    for y, seed in ((first, seeds[0]), (second, seeds[1])):
        expected = [getattr(model, name).compute(x, 0.5, seed) for name in NAMES]
        assert torch.equal(y, torch.cat([expected[0] * 0.5, *expected[1:]], dim=-1))
    assert not torch.equal(first, second)


def test_an_x_used_twice_is_two_calls():
    model = make_attention(dropout=0.5)
    x = torch.randn(9, K)
    again: list[Tensor] = []
    model.between = lambda x: again.append(model.q_proj(x))

    first = model(x)

    assert not torch.equal(first[:, :16], again[0] * 0.5)
    with separate(model):
        torch.manual_seed(1)
        expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_apply_links_what_is_fed_alike_by_its_name():
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(K, 32), nn.Linear(K, 32)
            self.down_proj = nn.Linear(32, K)

    def linked(parent: nn.Module, **kwargs) -> dict[str, int]:
        names = [name for name, child in parent.named_children() if isinstance(child, nn.Linear)]
        apply(parent, target_modules=names, **kwargs)
        groups = {name: getattr(parent, name).siblings for name in names}
        return {name: 0 if group is None else len(group.members) for name, group in groups.items()}

    assert linked(MLP()) == {"gate_proj": 2, "up_proj": 2, "down_proj": 0}
    assert linked(Attention()) == dict.fromkeys(NAMES, 3)
    assert linked(Attention(), siblings=False) == dict.fromkeys(NAMES, 0)
    other = Attention()
    other.v_proj = nn.Linear(K + 1, 8)
    assert linked(other) == {"q_proj": 2, "k_proj": 2, "v_proj": 0}


def test_layers_of_other_names_are_linked_by_hand():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, 8), nn.Linear(K, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    parent = adapted(Parent(), target_modules=["a", "b"])
    assert calls_of(lambda: parent(torch.randn(3, K))) == [1, 1]
    link_siblings(parent, ["a", "b"])
    assert calls_of(lambda: parent(torch.randn(3, K))) == [2]


def test_link_siblings_names_what_is_wrong():
    model = make_attention(siblings=False)
    with pytest.raises(ValueError, match="link_siblings: names must be of two layers or more"):
        link_siblings(model, ["q_proj"])
    with pytest.raises(ValueError, match="link_siblings: q_proj has siblings already"):
        link_siblings(model, ["q_proj", "q_proj"])
    model.k_proj.dropout = 0.1
    with pytest.raises(ValueError, match=r"one \(in_features, dropout\), got q_proj: \(24, 0.0\)"):
        link_siblings(model, NAMES)
    model.plain = nn.Linear(K, 8)
    with pytest.raises(TypeError, match="plain must be a RaSALinear, got Linear"):
        link_siblings(model, ["q_proj", "plain"])
    assert model.q_proj.siblings is None and not model._forward_hooks
    link_siblings(model, ["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="q_proj has siblings already"):
        link_siblings(model, ["q_proj", "v_proj"])


# ---------------------------------------------------------------------------------------------
# What must not be taken for the same
# ---------------------------------------------------------------------------------------------


def change_weight(name: str) -> Callable[[Attention, Tensor], None]:
    def change(model: Attention, x: Tensor) -> None:
        with torch.no_grad():
            model.k_proj.get_parameter(name).add_(1)

    return change


def change_pool(model: Attention, x: Tensor) -> None:
    with torch.no_grad():
        model.k_proj.pool.A_shared.mul_(2)


def replace_parameter(model: Attention, x: Tensor) -> None:
    model.k_proj.A = nn.Parameter(model.k_proj.A.detach() * 2)


def replace_base_weight(model: Attention, x: Tensor) -> None:
    weight = model.k_proj.base_layer.weight.detach() * 2
    model.k_proj.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def write_x(model: Attention, x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1)


CHANGES = {
    "A": change_weight("A"),
    "Bt": change_weight("Bt"),
    "d": change_weight("d"),
    "base weight": change_weight("base_layer.weight"),
    "pool": change_pool,
    "another A": replace_parameter,
    "another base weight": replace_base_weight,
    "x": write_x,
    "merge": lambda model, x: model.k_proj.eval().merge(),
    "training": lambda model, x: model.k_proj.train(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_between_two_members_is_seen(what):
    model = make_attention(dropout=0.3).eval()
    x = torch.randn(6, K)
    model.between = lambda x: CHANGES[what](model, x) and None

    with torch.no_grad():
        y = model(x)
        k = model.k_proj.compute(x, 0.0, None) if what != "training" else None

    if what == "merge":
        assert model.k_proj.merged and torch.equal(y[:, 16:24], model.k_proj(x))
    elif k is not None:
        assert torch.equal(y[:, 16:24], k)
    else:
        with separate(model), torch.no_grad():
            model.k_proj.eval()
            assert not torch.equal(y[:, 16:24], model.k_proj(x))


def test_a_change_of_the_scale_of_gates_is_seen():
    model = make_attention(gates=True).eval()
    x = torch.randn(6, K)
    assert calls_of(lambda: model(x)) == [3]
    model.between = lambda x: change_gate_scale(model)

    with torch.no_grad():
        y = model(x)

    assert torch.equal(y[:, 16:24], model.k_proj.compute(x, 0.0, None))


def change_gate_scale(model: Attention) -> None:
    model.k_proj.gate_scale.mul_(2)


@pytest.mark.parametrize("other", [Tensor.clone, Tensor.detach, lambda x: x[:]])
def test_another_tensor_is_not_x(other):
    model = make_attention()
    x = torch.randn(6, K)
    model.between = other

    assert calls_of(lambda: model(x))[0] == 3
    assert len(calls_of(lambda: model(x))) > 1
    with separate(model):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_a_tensor_in_the_memory_of_a_freed_x_is_not_x():
    model = make_attention()
    k, group = model.k_proj, model.q_proj.siblings
    memory = bytearray(4 * 6 * K)  # an allocator that is certain to give the same place again

    def tensor_of(values: Tensor) -> Tensor:
        memory[:] = values.numpy().tobytes()
        return torch.frombuffer(memory, dtype=torch.float32).view(values.shape)

    with torch.no_grad():
        group.begin(model, ())
        x = tensor_of(torch.randn(6, K))
        was = (x.data_ptr(), x._version)
        model.q_proj(x)
        assert kept_tensors(group) == 2
        del x
        x = tensor_of(torch.randn(6, K))
        assert (x.data_ptr(), x._version) == was
        assert torch.equal(k(x), k.compute(x, 0.0, None))
        group.end(model, (), None)


def test_grad_mode_is_part_of_the_call():
    model = make_attention()
    with torch.no_grad():
        model.between = lambda x: torch._C._set_grad_enabled(True)
        y = model(torch.randn(6, K))
    assert y.requires_grad
    torch.autograd.grad(y.sum(), model.k_proj.A)


def test_x_that_begins_to_require_grad_is_another():
    model = make_attention()
    x = torch.randn(6, K)
    model.between = lambda x: x.requires_grad_()
    y = model(x)
    assert torch.autograd.grad(y.sum(), x)[0].any()


def test_autocast_is_part_of_the_call():
    model = make_attention()
    x = torch.randn(6, K)
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    model.between = lambda x: context.__enter__() and None

    y = model(x)
    context.__exit__(None, None, None)

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(y[:, 16:24], model.k_proj.compute(x, 0.0, None).float())


def test_autocast_gives_what_separate_ops_give():
    model = make_attention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(6, K)
        assert calls_of(lambda: model(x)) == [3]
        y = model(x)
        with separate(model):
            expected = model(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize(
    "hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_member_with_hooks_is_computed_alone(hook):
    model = make_attention()
    x = torch.randn(6, K, requires_grad=True)
    expected = outputs_and_gradients(model, x)
    called = []
    getattr(model.k_proj, hook)(lambda *args: called.append(hook))

    y = outputs_and_gradients(model, x)

    assert calls_of(lambda: model(x)) == [2, 1]
    assert called
    assert_same(y, expected, x_is_exact=False)


def test_a_hook_on_the_base_or_a_training_base_is_computed_alone():
    model = make_attention()
    x = torch.randn(6, K)
    model.k_proj.base_layer.register_forward_hook(lambda *args: None)
    assert calls_of(lambda: model(x)) == [2]  # k is rasa_add
    model.v_proj.base_layer.weight.requires_grad_()
    assert calls_of(lambda: model(x)) == [1]
    model.v_proj.base_layer.weight.requires_grad_(False)
    assert calls_of(lambda: model(x)) == [2], "nothing was given up"


def test_a_merged_member_is_computed_alone():
    model = make_attention().eval()
    x = torch.randn(6, K)
    model.k_proj.merge()
    with separate(model):
        expected = model(x)
    assert calls_of(lambda: model(x)) == [2]
    assert torch.equal(model(x), expected)
    model.k_proj.unmerge()
    assert calls_of(lambda: model(x)) == [3]


def test_inference_mode_keeps_nothing():
    """Its tensors have no version: a write between two members would not be seen."""
    model = make_attention()
    with torch.inference_mode():
        x = torch.randn(6, K)
        assert calls_of(lambda: model(x)) == [1, 1, 1]
        model.between = lambda x: x.add_(1)
        k = model(x)[:, 16:24]
        assert torch.equal(k, model.k_proj.compute(x, 0.0, None))


def test_members_called_outside_their_parent_keep_nothing():
    model = make_attention(dropout=0.4)
    x = torch.randn(6, K)
    assert calls_of(lambda: [getattr(model, name)(x) for name in NAMES]) == [1, 1, 1]
    torch.manual_seed(2)
    y = torch.cat([model.q_proj(x) * 0.5, model.k_proj(x), model.v_proj(x)], dim=-1)
    torch.manual_seed(2)
    assert torch.equal(y, model(x))
