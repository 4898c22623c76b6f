"""Siblings in a model: one op, one mask, and every way in which an output could go stale."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from layers import new_seed
from models import assert_as_accurate, authors_layer, randomize_adapters, saved
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rasa_ext
from rasa_ext import RaSALinear, apply, link_siblings

K = 24
NAMES = ("q_proj", "k_proj", "v_proj")


def nothing(x: Tensor) -> None:
    pass


class Attention(nn.Module):
    """q, k and v of one x, or k and v of memory; `between` runs after q."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(K, 16)
        self.k_proj = nn.Linear(K, 8, bias=False)
        self.v_proj = nn.Linear(K, 8)
        self.between: Callable[[Tensor], Tensor | None] = nothing

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q = self.q_proj(x) * 0.5
        x = x if memory is None else memory
        replaced = self.between(x)
        x = x if replaced is None else replaced
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.narrow = nn.Linear(32, K)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.narrow(layer(x)).tanh()
        return x


def adapted(model: nn.Module, **kwargs) -> nn.Module:
    apply(model, **{"r": 4, "k": 1, "target_modules": NAMES, "dropout": 0.0} | kwargs)
    return randomize_adapters(model)


def make_attention(**kwargs) -> Attention:
    torch.manual_seed(0)
    return adapted(Attention(), **kwargs)


def make_model(**kwargs) -> Model:
    torch.manual_seed(0)
    return adapted(Model(), **kwargs)


class Calls(TorchDispatchMode):
    """How many layers each call of the forward op computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.rasa_ext.rasa_linears.default:
            self.layers.append(len(args[1]))
        elif func is torch.ops.rasa_ext.rasa_linear.default:  # in inference mode
            self.layers.append(1)
        return func(*args, **(kwargs or {}))


def calls_of(fn: Callable[[], object]) -> list[int]:
    with Calls() as calls:
        fn()
    return calls.layers


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(y: Tensor, of: list[Tensor]) -> list[Tensor]:
    """By backward(), which reentrant checkpointing asks for."""
    for t in of:
        t.grad = None
    y.square().sum().backward()
    grads = [t.grad for t in of]
    for t in of:
        t.grad = None
    return grads


def outputs_and_gradients(model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    """The output, and the gradients of x and of what trains, with one seed."""
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    y = model(x) if run is None else run(x)
    return [y.detach(), *gradients(y, [x, *trained(model)])]


def assert_same(first: list[Tensor], second: list[Tensor], x_is_exact: bool = True) -> None:
    """Bit by bit but, unless x_is_exact, x's gradient: a sum in another order."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if i == 1 and not x_is_exact:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), i


@contextmanager
def separate(model: nn.Module) -> Iterator[None]:
    """Within it, every layer is computed on its own: a hook that does nothing is on each."""
    layers = [m for m in model.modules() if isinstance(m, RaSALinear)]
    handles = [layer.register_forward_hook(lambda *args: None) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


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
    reused = 0
    with torch.no_grad():
        group.begin(model, ())
        for _ in range(20):
            x = torch.randn(6, K)
            where = x.data_ptr()
            model.q_proj(x)
            assert kept_tensors(group) == 2
            del x
            candidates = [torch.randn(6, K) for _ in range(20)]
            x = next((t for t in candidates if t.data_ptr() == where), candidates[0])
            reused += x.data_ptr() == where
            assert torch.equal(k(x), k.compute(x, 0.0, None))
            group.end(model, (), None)
            group.begin(model, ())
        group.end(model, (), None)
    assert reused > 0


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


# ---------------------------------------------------------------------------------------------
# What no member asks for
# ---------------------------------------------------------------------------------------------


def test_cross_attention_is_left_alone_at_once_without_gradients(caplog):
    model = make_attention()
    x, memory = torch.randn(6, K), torch.randn(6, K)
    caplog.set_level(logging.INFO)

    with torch.no_grad():
        first = model(x, memory)
        assert calls_of(lambda: model(x, memory)) == [1, 1, 1]
        second = model(x, memory)

    assert torch.equal(first, second)
    assert [r.getMessage() for r in caplog.records] == [
        "rasa_ext: q_proj, k_proj, v_proj of Attention are fed different tensors; "
        "each is computed on its own from now on"
    ]
    assert not model.q_proj.siblings.fuses


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cross_attention_computes_what_separate_ops_compute(dropout):
    model = make_attention(dropout=dropout)
    x, memory = torch.randn(6, K), torch.randn(9, K)[:6]
    for _ in range(3):  # together, and then no more
        together = outputs_and_gradients(model, x, lambda x: model(x, memory))
        with separate(model):
            alone = outputs_and_gradients(model, x, lambda x: model(x, memory))
        assert_same(together, alone)
    assert calls_of(lambda: model(x, memory)) == [1, 1, 1]


def kept_tensors(group) -> int:
    return sum(len(turn.outputs) for turn in group._turns.values())


def test_nothing_is_kept_when_every_member_was_called():
    model = make_attention()
    x = torch.randn(6, K, requires_grad=True)
    y = model(x)
    assert not model.q_proj.siblings._turns
    x_ref = weakref.ref(x)
    del y, x
    gc.collect()
    assert x_ref() is None, "a graph keeps x"


class OnlyQ(Attention):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        assert kept_tensors(self.q_proj.siblings) == 2
        if self.fails:
            raise RuntimeError("after q")
        return q


@pytest.mark.parametrize("fails", [False, True])
def test_what_nobody_took_dies_with_the_parents_forward(fails):
    model = adapted(OnlyQ())
    model.fails = fails
    x = torch.randn(6, K, requires_grad=True)
    if fails:
        with pytest.raises(RuntimeError, match="after q"):
            model(x)
    else:
        model(x)
    x_ref = weakref.ref(x)
    del x
    gc.collect()
    assert not model.q_proj.siblings._turns
    assert x_ref() is None, "a graph keeps x"
    assert model.q_proj.siblings.fuses


def test_unused_members_get_no_gradient():
    model = adapted(OnlyQ())
    model(torch.randn(6, K)).sum().backward()
    assert model.q_proj.A.grad is not None
    assert model.k_proj.A.grad is None and model.k_proj.d.grad is None


# ---------------------------------------------------------------------------------------------
# Checkpointing
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_the_model_changes_nothing(use_reentrant, dropout):
    model = make_model(dropout=dropout)
    x = torch.randn(7, K)

    def run(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
            x = model.narrow(x).tanh()
        return x

    assert_same(outputs_and_gradients(model, x, run), outputs_and_gradients(model, x))
    assert all(not layer.q_proj.siblings._turns for layer in model.layers)


class Inside(Attention):
    """Checkpoints within its own forward: backward calls the members outside any call of it."""

    use_reentrant = False
    parts: tuple[str, ...] = NAMES
    is_checkpointed = True

    def forward(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return torch.cat([getattr(self, name)(x).sin() for name in self.parts], dim=-1)

        before = [getattr(self, name)(x).sin() for name in NAMES if name not in self.parts]
        if not self.is_checkpointed:
            return torch.cat([*before, part(x)], dim=-1)
        return torch.cat([*before, checkpoint(part, x, use_reentrant=self.use_reentrant)], dim=-1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_inside_the_parent_repeats_the_mask(use_reentrant):
    model = adapted(Inside(), dropout=0.4)
    model.use_reentrant = use_reentrant
    x = torch.randn(7, K)

    again = outputs_and_gradients(model, x)
    model.is_checkpointed = False

    assert_same(again, outputs_and_gradients(model, x))
    assert not model.q_proj.siblings._turns


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("parts", [("k_proj", "v_proj"), ("v_proj",)])
def test_a_checkpointed_part_does_not_take_from_outside(parts, use_reentrant):
    """Backward repeats the part without what was before it: it must draw its own mask."""
    model = adapted(Inside(), dropout=0.4)
    model.parts, model.use_reentrant = parts, use_reentrant
    x = torch.randn(7, K, requires_grad=True)
    torch.manual_seed(5)
    y = model(x)
    grads = gradients(y, [x, *trained(model)])

    torch.manual_seed(5)
    first = torch.randint(2**63 - 1, ())
    second = torch.randint(2**63 - 1, ())
    outputs = {
        name: getattr(model, name).compute(x, 0.4, second if name in parts else first).sin()
        for name in NAMES
    }
    order = [*(n for n in NAMES if n not in parts), *parts]
    expected = torch.cat([outputs[name] for name in order], dim=-1)
    assert torch.equal(y, expected)
    wanted = gradients(expected, [x, *trained(model)])
    for gradient, its_expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(gradient, its_expected)


def test_a_recomputation_that_stops_early_leaves_nothing_and_gives_up_nothing():
    model = make_model()
    x = torch.randn(7, K, requires_grad=True)
    stopped = []

    class Last(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            stopped.append(kept_tensors(self.q_proj.siblings))
            q = q.sin()  # saves q: the last tensor that backward needs
            stopped.append("past it")
            return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)

    model = adapted(Last())
    y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward()

    assert stopped == [2, "past it", 2], "the recomputation did not stop between q and k"
    assert not model.q_proj.siblings._turns
    assert not model.q_proj.siblings._wastes


def test_a_recomputation_outside_the_parent_that_stops_early_leaves_nothing():
    class InsideLast(Attention):
        def forward(self, x: Tensor) -> Tensor:
            def part(x: Tensor) -> Tensor:
                return torch.cat([self.q_proj(x).sin(), self.k_proj(x), self.v_proj(x)], dim=-1)

            return checkpoint(part, x, use_reentrant=False)

    model = adapted(InsideLast())
    model(torch.randn(7, K, requires_grad=True)).sum().backward()
    assert not model.q_proj.siblings._turns


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("memory_is_x", [False, True])
def test_two_arguments_under_checkpointing_keep_their_gradients(memory_is_x, use_reentrant):
    """Reentrant checkpointing makes two tensors of one that it is given twice."""
    model = make_attention(dropout=0.3)
    x, memory = torch.randn(7, K), torch.randn(7, K)

    def plain(x: Tensor) -> Tensor:
        return model(x, x if memory_is_x else memory)

    def checkpointed(x: Tensor) -> Tensor:
        given = x if memory_is_x else memory
        return checkpoint(model, x, given, use_reentrant=use_reentrant)

    for _ in range(3):
        again = outputs_and_gradients(model, x, checkpointed)
        assert_same(again, outputs_and_gradients(model, x, plain), x_is_exact=not memory_is_x)


def test_cross_attention_is_given_up_when_checkpointing_has_repeated_it():
    model = make_attention()
    memory = torch.randn(7, K)
    xs = [torch.randn(7, K, requires_grad=True) for _ in range(2)]
    ys = [checkpoint(model, x, memory, use_reentrant=False) for x in xs]
    for y in ys:
        assert model.q_proj.siblings.fuses
        y.sum().backward()
    assert calls_of(lambda: model(xs[0], memory)) == [1, 1, 1]
    assert not model.q_proj.siblings.fuses


# ---------------------------------------------------------------------------------------------
# Torch's rituals
# ---------------------------------------------------------------------------------------------


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
