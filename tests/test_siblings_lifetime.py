"""What siblings keep and for how long: outputs nobody takes, failures, checkpointing."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from sibling_models import (
    NAMES,
    Attention,
    K,
    adapted,
    assert_same,
    calls_of,
    gradients,
    kept_tensors,
    make_attention,
    make_model,
    outputs_and_gradients,
    separate,
    trained,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
