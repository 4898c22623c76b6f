"""grouped_linear: many layers in a constant number of launches, each as it is alone."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Conv1D, Int8Linear, K, N, randomize_adapters
from op_calls import Calls
from reference import assert_accurate
from torch import Tensor, nn

from rasa_ext import RaSALinear, SharedPool, grouped_linear


def make_layers(dropout: float = 0.0) -> list[RaSALinear]:
    """Two pools, plain LoRA, all-shared, a GPT-2 and a quantised base, and a base with hooks."""
    torch.manual_seed(0)
    pool, narrow = SharedPool(K, N, 1, 3), SharedPool(K, 5, 2, 2)
    hooked = nn.Linear(K, N)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    layers = [
        RaSALinear(nn.Linear(K, N), pool, 4, 1, 16, dropout),
        RaSALinear(Conv1D(N, K), pool, 4, 1, 16, dropout),
        RaSALinear(nn.Linear(K, 5, bias=False), narrow, 2, 2, 16, dropout),
        RaSALinear(nn.Linear(K, 7), None, 3, 0, 16, dropout),
        RaSALinear(Int8Linear(nn.Linear(K, 5)), narrow, 4, 2, 16, dropout),
        RaSALinear(hooked, pool, 4, 1, 16, dropout),
    ]
    for module in (pool, narrow, *layers):
        randomize_adapters(module)
    return layers


def make_inputs() -> list[Tensor]:
    sizes = [(5,), (2, 3), (), (2, 2, 2), (0,), (9,)]
    return [torch.randn(*size, K, requires_grad=True) for size in sizes]


def parameters(layers: list[RaSALinear]) -> list[Tensor]:
    pools = {layer.pool for layer in layers if layer.pool is not None}
    own = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return own + [p for pool in sorted(pools, key=id) for p in pool.parameters()]


def outputs_and_gradients(fn, layers, xs) -> list[Tensor]:
    torch.manual_seed(5)
    ys = fn(xs, layers)
    loss = sum((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in ys)
    wrt = [*xs, *parameters(layers)]
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(wrt, grads, strict=True)]
    return [*ys, *zeros]


def one_by_one(xs: list[Tensor], layers: list[RaSALinear]) -> list[Tensor]:
    return [layer(x) for x, layer in zip(xs, layers, strict=True)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layers_together_equal_layers_one_by_one(dropout):
    """In float64, where both are right, and with the masks that calls in turn would draw."""
    layers, xs = make_layers(dropout), make_inputs()
    layers[3].dropout = 0.1 if dropout else 0.0
    for layer in layers:
        layer.double().train()
        if layer.pool is not None:
            layer.pool.double()
    xs = [x.detach().double().requires_grad_() for x in xs]

    together = outputs_and_gradients(grouped_linear, layers, xs)
    alone = outputs_and_gradients(one_by_one, layers, xs)

    for ours_, exact in zip(together, alone, strict=True):
        assert_accurate(ours_, exact, exact)


def test_one_layer_may_occur_twice_and_an_output_may_be_unused():
    layers = make_layers()[:2] * 2
    xs = [torch.randn(M, K, dtype=torch.float64, requires_grad=True) for M in (3, 4, 5, 6)]
    for layer in layers[:2]:
        layer.double().pool.double()

    def unused(fn):
        return lambda xs, layers: fn(xs, layers)[:3]

    together = outputs_and_gradients(unused(grouped_linear), layers, xs)
    alone = outputs_and_gradients(unused(one_by_one), layers, xs)

    for ours_, exact in zip(together, alone, strict=True):
        assert_accurate(ours_, exact, exact)


def test_merged_layers_are_their_base_and_refuse_to_train():
    layers, xs = make_layers()[:3], make_inputs()[:3]
    for layer in layers:
        layer.eval()
    layers[1].merge()

    ys = grouped_linear(xs, layers)

    for y, expected in zip(ys, one_by_one(xs, layers), strict=True):
        torch.testing.assert_close(y, expected)
    with pytest.raises(RuntimeError, match="^RaSALinear: merged and in training mode"):
        grouped_linear(xs, [layer.train() for layer in layers])


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda xs, layers: grouped_linear(xs[:2], layers),
            ValueError,
            "grouped_linear: xs must have one entry for each layer = 3, got 2",
        ),
        (
            lambda xs, layers: grouped_linear(xs, [*layers[:2], nn.Linear(K, N)]),
            TypeError,
            "grouped_linear: layers[2] must be a RaSALinear, got Linear",
        ),
        (
            lambda xs, layers: grouped_linear([xs[0], xs[1][..., 1:], xs[2]], layers),
            ValueError,
            "RaSALinear: x must be a tensor (..., in_features) = [..., 24], got shape [2, 3, 23]",
        ),
    ],
)
def test_grouped_linear_says_what_is_wrong(act, kind, message):
    with pytest.raises(kind) as error:
        act(make_inputs()[:3], make_layers()[:3])
    assert str(error.value) == message


def test_no_layers_give_no_outputs():
    assert grouped_linear([], []) == []


def test_layers_of_several_dtypes_take_one_launch_for_each():
    layers, xs = make_layers(), make_inputs()
    for i in (0, 3):
        layers[i].base_layer.to(torch.bfloat16)
        xs[i] = xs[i].detach().bfloat16().requires_grad_()

    with Calls() as calls:
        sum(y.float().sum() for y in grouped_linear(xs, layers)).backward()

    assert calls.count == {"rasa_grouped_linear": 2, "rasa_grouped_backward": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype_and_returns_float32_gradients(dtype):
    layers, xs = make_layers()[:4], make_inputs()[:4]

    with torch.autocast("cpu", dtype=dtype):
        ys = grouped_linear(xs, layers)
        alone = one_by_one(xs, layers)
    sum(y.float().sum() for y in ys).backward()

    for y, expected in zip(ys, alone, strict=True):
        assert y.dtype == dtype and torch.equal(y, expected)
    for t in (*xs, *parameters(layers)):
        assert t.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_in_one_graph(dropout):
    layers, xs = make_layers(dropout)[:4], make_inputs()[:4]
    for layer in layers:
        layer.train()
    compiled = torch.compile(
        lambda *xs: grouped_linear(xs, layers), fullgraph=True, backend="aot_eager"
    )

    eager = outputs_and_gradients(lambda xs, layers: grouped_linear(xs, layers), layers, xs)
    graph = outputs_and_gradients(lambda xs, layers: compiled(*xs), layers, xs)

    assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


def test_copies_of_layers_group_with_their_own_pool():
    layers, xs = make_layers()[:2], make_inputs()[:2]
    twins = copy.deepcopy(layers)
    twins[0].pool.A_shared.data.zero_()

    changed = grouped_linear(xs, twins)

    assert torch.equal(grouped_linear(xs, layers)[0], layers[0](xs[0]))
    assert not torch.equal(changed[0], layers[0](xs[0]))
