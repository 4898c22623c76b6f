"""rasa_linears: layers that share x, in one op, as each alone; and float64's verdict on the sum."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Case
from layers import DTYPES, LINEAR_NAMES, dtypes_id, new_seed, sibling_inputs
from reference import authors_linear, compare_with_float64
from torch import Tensor

import rasa_ext
from rasa_ext import rasa_linear, rasa_linears


def siblings(M: int, K: int, *layers: tuple[int, int, int], strided: bool = False) -> list[Case]:
    """Cases that share x; layers: (N, Rp, Rs) of each."""
    return [Case("sibling", M, K, N, Rp, Rs, strided) for N, Rp, Rs in layers]


FAMILIES = {
    "qkv": siblings(130, 96, (80, 7, 30), (33, 7, 30), (33, 7, 30)),
    "unlike": siblings(97, 101, (103, 13, 37), (15, 0, 9), (40, 4, 0), strided=True),
    "one_without_ranks": siblings(64, 128, (96, 16, 0), (24, 0, 0), (96, 0, 32)),
    "no_ranks": siblings(5, 16, (12, 0, 0), (7, 0, 0)),
    "no_tokens": siblings(0, 128, (96, 8, 32), (24, 8, 32)),
    "row": siblings(1, 512, (640, 7, 32), (96, 28, 128)),
    "column_blocks": siblings(300, 600, (700, 3, 2), (520, 3, 2)),
    "many_ranks": siblings(40, 96, (80, 28, 250), (80, 28, 240), (16, 1, 3)),
    "alone": siblings(20, 24, (18, 3, 5)),
}


def layer_of(inputs: list, i: int) -> list[Tensor | None]:
    """The tensors of LINEAR_NAMES of one layer, without x."""
    return [column[i] for column in inputs[1:]]


def leaves_of(inputs: list) -> list[Tensor]:
    return [inputs[0], *(t for column in inputs[1:] for t in column if t is not None)]


def with_grad(inputs: list) -> list:
    for t in leaves_of(inputs):
        t.requires_grad_()
    return inputs


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_bit_by_bit_what_it_is_alone(family, dtypes, p, device, micro_kernel):
    inputs = with_grad(sibling_inputs(FAMILIES[family], *dtypes, device=device))
    seed, count = new_seed(device=device), len(FAMILIES[family])

    y = rasa_linears(*inputs, p=p, seed=seed)

    cotangents = [torch.randn_like(t) for t in y]
    together = torch.autograd.grad(y, leaves_of(inputs)[1:], cotangents, allow_unused=True)
    alone = [rasa_linear(inputs[0], *layer_of(inputs, i), p=p, seed=seed) for i in range(count)]
    expected = torch.autograd.grad(alone, leaves_of(inputs)[1:], cotangents, allow_unused=True)
    assert all(map(torch.equal, y, alone))
    assert all(map(torch.equal, together, expected))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_all_gradients_are_the_authors_formula(family, dtypes, p, device):
    cases, seed = FAMILIES[family], new_seed(device=device)
    x, *columns = sibling_inputs(cases, *dtypes, device=device)
    count, width = len(cases), len(columns)

    def split(x: Tensor, *flat: Tensor | None) -> list:
        return [x, *(list(flat[i * count : (i + 1) * count]) for i in range(width))]

    def formula(*flat: Tensor | None) -> Tensor:
        inputs = split(*flat)
        layers = (layer_of(inputs, i) for i in range(count))
        return torch.cat([authors_linear(inputs[0], *t, p=p, seed=seed) for t in layers], dim=1)

    compare_with_float64(
        lambda *flat: torch.cat(rasa_linears(*split(*flat), p=p, seed=seed), dim=1),
        formula,
        [x, *(t for column in columns for t in column)],
        ["x", *(f"{name}[{i}]" for name in LINEAR_NAMES[1:] for i in range(count))],
    )


@pytest.mark.parametrize("used", [[0], [2], [0, 1], [1, 2]], ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[3]], ids=dtypes_id)
def test_a_layer_whose_output_is_unused_has_no_gradient_and_adds_none(used, dtypes):
    inputs = with_grad(sibling_inputs(FAMILIES["qkv"], *dtypes))

    def gradients(y: list[Tensor]) -> tuple[Tensor | None, ...]:
        loss = sum(y[i].float().square().sum() for i in used)
        return torch.autograd.grad(loss, leaves_of(inputs), allow_unused=True)

    of_all = gradients(rasa_linears(*inputs, p=0.1, seed=new_seed()))
    only = [inputs[0], *([column[i] for i in used] for column in inputs[1:])]
    of_used = rasa_linears(*only, p=0.1, seed=new_seed())
    expected = gradients([of_used[used.index(i)] if i in used else None for i in range(3)])
    for gradient, its_expected in zip(of_all, expected, strict=True):
        assert (gradient is None) == (its_expected is None)
        assert gradient is None or torch.equal(gradient, its_expected)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", LINEAR_NAMES)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(name, layer):
    inputs = with_grad(
        sibling_inputs(siblings(50, 24, (18, 3, 5), (30, 7, 9)), torch.float32, torch.float32)
    )
    which = LINEAR_NAMES.index(name)
    target = inputs[0] if which == 0 else inputs[which][layer]
    if target is None:
        pytest.skip("this layer has no bias")

    def gradient_of(wanted: list[Tensor]) -> Tensor:
        for t in leaves_of(inputs):
            t.requires_grad_(any(t is w for w in wanted))
        y = rasa_linears(*inputs, p=0.1, seed=new_seed())
        return torch.autograd.grad(sum(t.square().sum() for t in y), target)[0]

    assert torch.equal(gradient_of([target]), gradient_of(leaves_of(inputs)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    cases = siblings(5, 6, (4, 2, 3), (3, 1, 0), (2, 0, 0))
    x, *columns = with_grad(sibling_inputs(cases, torch.float64, torch.float64))

    def flat(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        lists = [list(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        return tuple(rasa_linears(x, *lists, p=p, seed=new_seed()))

    assert torch.autograd.gradcheck(flat, (x, *(t for column in columns for t in column)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_an_infinite_row_does_not_reach_the_padding_between_layers(dtypes, micro_kernel):
    inputs = sibling_inputs(FAMILIES["qkv"], *dtypes)
    inputs[0][3, 5] = float("inf")
    _, s = torch.ops.rasa_ext.rasa_linears(*inputs, 0.0, None)
    assert s.shape == (130, 120)
    padding = torch.ones(120, dtype=torch.bool)
    for first in (0, 40, 80):
        padding[first : first + 37] = False
    assert not s[:, padding].any() and not s[3, ~padding].isfinite().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    cases = siblings(520, 576, (192, 7, 30), (96, 7, 30))
    inputs = with_grad(sibling_inputs(cases, torch.float64, torch.float64))
    for column in (inputs[1], inputs[2]):  # the base product is the library's
        for t in filter(lambda t: t is not None, column):
            t.data.zero_()

    def run() -> list[Tensor]:
        y = rasa_linears(*inputs, p=0.1, seed=new_seed())
        wanted = leaves_of([inputs[0], *inputs[3:]])
        return [*y, *torch.autograd.grad(y, wanted, list(map(torch.ones_like, y)))]

    before = torch.get_num_threads()
    expected = run()
    try:
        torch.set_num_threads(threads)
        again = run()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, expected, again))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compiles_to_one_graph_for_any_number_of_tokens(p):
    compiled = torch.compile(rasa_linears, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (12, 7, 33):
        cases = siblings(M, 16, (24, 3, 6), (10, 0, 5))
        inputs = with_grad(sibling_inputs(cases, torch.float32, torch.float32))
        results = []
        for fn in (rasa_linears, compiled):
            y = fn(*inputs, p=p, seed=new_seed())
            loss = sum(t.square().sum() for t in y)
            results.append([*y, *torch.autograd.grad(loss, leaves_of(inputs))])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_base_and_keeps_the_adapters(dtype):
    inputs = with_grad(sibling_inputs(FAMILIES["qkv"], torch.float32, torch.float32))

    with torch.autocast("cpu", dtype=dtype):
        y = rasa_linears(*inputs)
    gradients = torch.autograd.grad(sum(t.float().sum() for t in y), leaves_of(inputs))

    cast = [inputs[0], *([t if t is None else t.to(dtype) for t in c] for c in inputs[1:3])]
    assert all(map(torch.equal, y, rasa_linears(cast[0].to(dtype), *cast[1:], *inputs[3:])))
    assert all(g.dtype == torch.float32 for g in gradients)


MUTATIONS = [
    ("weight", lambda t: t[:, :5], "layer 1: weight must be (N, K) = [3, 7], got [3, 5]"),
    ("bias", lambda t: torch.ones(9), "layer 1: bias must be (N) = [3], got [9]"),
    ("A", lambda t: t[:, :6], "layer 1: A must be (Rp, K) = [2, 7], got [2, 6]"),
    ("A_shared", lambda t: t.double(), "layer 1: A_shared must have A's dtype Float, got Double"),
    ("Bt", lambda t: t[:1], "layer 1: Bt must be (Rp, N) = [2, 3], got [1, 3]"),
    ("d", lambda t: t[:1], "layer 1: d must be (Rs + Rp) = [3], got [1]"),
]


@pytest.mark.parametrize(("name", "mutate", "message"), MUTATIONS)
def test_errors_name_the_layer_and_the_argument(name, mutate, message):
    inputs = sibling_inputs(siblings(5, 7, (6, 3, 4), (3, 2, 1)), torch.float32, torch.float32)
    column = inputs[LINEAR_NAMES.index(name)]
    column[1] = mutate(column[1])
    with pytest.raises(RuntimeError, match=re.escape(f"rasa_linears: {message}")):
        rasa_linears(*inputs)


def test_errors_of_the_lists():
    inputs = sibling_inputs(siblings(5, 7, (6, 3, 4), (3, 2, 1)), torch.float32, torch.float32)
    for i in range(2, len(LINEAR_NAMES)):
        short = [*inputs[:i], inputs[i][:1], *inputs[i + 1 :]]
        message = f"rasa_linears: {LINEAR_NAMES[i]} must have one entry for each layer = 2, got 1"
        for device in ("cpu", "meta"):
            moved = [
                t.to(device)
                if isinstance(t, Tensor)
                else [u if u is None else u.to(device) for u in t]
                for t in short
            ]
            with pytest.raises(RuntimeError, match=re.escape(message)):
                rasa_linears(*moved)
    with pytest.raises(RuntimeError, match="must be called with at least one layer"):
        rasa_linears(inputs[0], [], [], [], [], [], [], [])
    mixed = sibling_inputs(siblings(5, 7, (6, 3, 4), (3, 2, 1)), torch.bfloat16, torch.float32)
    for column in mixed[3:]:
        column[1] = column[1].bfloat16()
    with pytest.raises(RuntimeError, match="layer 1: A must have layer 0's dtype Float, got BFl"):
        rasa_linears(*mixed)


def test_backward_refuses_gradients_of_a_layer_without_dy():
    inputs = sibling_inputs(siblings(5, 7, (6, 3, 4), (3, 2, 1)), torch.float32, torch.float32)
    x, weight, _, *adapters = inputs
    y, s = torch.ops.rasa_ext.rasa_linears(*inputs, 0.0, None)
    arguments = [[y[0], None], x, weight, *adapters, s, 0.0, None]
    call = torch.ops.rasa_ext.rasa_backward
    with pytest.raises(RuntimeError, match="layer 1: output_mask must not ask for gradients of a"):
        call(*arguments, [True] * 11)
    with pytest.raises(
        RuntimeError, match=re.escape("must have 1 + 5 * layers = 11 entries, got 6")
    ):
        call(*arguments, [True] * 6)
    gradients = call(*arguments, [True] * 6 + [False] * 5)
    assert [g.numel() > 0 for g in gradients] == [True] * 6 + [False] * 5


def test_a_launch_reads_x_once_and_draws_one_mask():
    """s of all layers is one matrix, and the layers that follow read their columns of it."""
    inputs = sibling_inputs(FAMILIES["qkv"], torch.float32, torch.float32)
    _, together = torch.ops.rasa_ext.rasa_linears(*inputs, 0.5, new_seed())
    alone = [
        torch.ops.rasa_ext.rasa_linear(inputs[0], *layer_of(inputs, i), 0.5, new_seed())[1]
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone, dim=1))
    assert rasa_ext.dropout_mask(new_seed(), 130, 96, 0.5).float().mean() < 0.6
