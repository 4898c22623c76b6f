"""grouped_linear: many layers in a constant number of launches, each as it is alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from layers import DTYPES, dtypes_id, new_seed, randn
from models import Conv1D, Int8Linear, K, N, randomize_adapters
from reference import assert_accurate, authors_add, authors_linear, compare_with_float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rasa_ext import RaSALinear, SharedPool, grouped_linear
from rasa_ext.layer_ops import Adapters, rasa_grouped_linear

OPS = torch.ops.rasa_ext
RS = [30, 5]  # ranks of two pools; both of layers (K, N) = (24, 20) and (33, 70)
SHAPES = [(24, 20), (33, 70)]
# M, pool or -1 (with the shape of pool 0), number of private ranks, dropout, whether its base is
# given as an output.
LAYERS = [
    (70, 0, 7, 0.3, False),
    (130, 0, 3, 0.0, False),  # of the same pool, with another rate
    (1, 0, 0, 0.3, True),  # no private ranks
    (0, 0, 7, 0.3, False),  # no tokens
    (65, 1, 2, 0.5, True),
    (40, -1, 3, 0.5, False),  # no shared ranks
    (5, -1, 0, 0.0, False),  # no ranks
    (67, 1, 7, 0.5, False),
]
POOLS = [pool for _, pool, *_ in LAYERS]
P = [p for _, _, _, p, _ in LAYERS]
L = len(LAYERS)


def seeds() -> list[Tensor | None]:
    return [new_seed(100 + i) if p > 0 else None for i, p in enumerate(P)]


def inputs(dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The tensors of LAYERS by argument; `base` holds outputs, `weight` and `bias` the others."""
    result: dict[str, list[Tensor]] = {
        name: [] for name in ("x", "weight", "bias", "base", "A", "Bt", "d")
    }
    for M, pool, Rp, _, has_base in LAYERS:
        K, N = SHAPES[max(pool, 0)]
        Rs = RS[pool] if pool >= 0 else 0
        result["x"].append(randn(M, K, dtype=dtype, strided=M % 2 == 1))
        if has_base:
            result["base"].append(randn(M, N, dtype=dtype, strided=M % 2 == 1))
        else:
            result["weight"].append(randn(N, K, dtype=dtype) * K**-0.5)
            result["bias"].append(randn(N, dtype=dtype))
        result["A"].append(randn(Rp, K, dtype=adapter_dtype) * K**-0.5)
        result["Bt"].append(randn(Rp, N, dtype=adapter_dtype) * 0.3)
        result["d"].append(randn(Rs + Rp, dtype=adapter_dtype))
    for side, column, scale in (("A", 0, 0.2), ("Bt", 1, 0.3)):
        result[f"{side}_shared"] = [
            randn(Rs, shape[column], dtype=adapter_dtype) * scale
            for Rs, shape in zip(RS, SHAPES, strict=True)
        ]
    return result


def split(given: dict[str, list[Tensor]], tensors: tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
    """Give a flat list of tensors the form of `given`."""
    flat = iter(tensors)
    return {name: [next(flat) for _ in some] for name, some in given.items()}


def spread(some: list[Tensor], has: list[bool]) -> list[Tensor | None]:
    """One entry for each layer, None where it has none."""
    values = iter(some)
    return [next(values) if h else None for h in has]


HAS_BASE = [base for *_, base in LAYERS]
HAS_WEIGHT = [not base for base in HAS_BASE]


def ours(z: dict[str, list[Tensor]]) -> list[Tensor]:
    adapters = Adapters(z["A"], z["Bt"], z["d"], z["A_shared"], z["Bt_shared"], POOLS)
    return rasa_grouped_linear(
        z["x"],
        [None if w is None else w.detach() for w in spread(z["weight"], HAS_WEIGHT)],
        [None if b is None else b.detach() for b in spread(z["bias"], HAS_WEIGHT)],
        spread(z["base"], HAS_BASE),
        adapters,
        P,
        seeds(),
    )


def formula(z: dict[str, list[Tensor]]) -> list[Tensor]:
    weights = spread(z["weight"], HAS_WEIGHT)
    biases, bases = spread(z["bias"], HAS_WEIGHT), spread(z["base"], HAS_BASE)
    ys = []
    for i, (x, pool, seed) in enumerate(zip(z["x"], POOLS, seeds(), strict=True)):
        A, Bt = z["A"][i], z["Bt"][i]
        none = (A[:0], Bt[:0])
        A_shared, Bt_shared = (z["A_shared"][pool], z["Bt_shared"][pool]) if pool >= 0 else none
        adapter = (A, A_shared, Bt, Bt_shared, z["d"][i])
        if bases[i] is None:
            weight, bias = weights[i].detach(), biases[i].detach()
            ys.append(authors_linear(x, weight, bias, *adapter, p=P[i], seed=seed))
        else:
            ys.append(authors_add(x, bases[i], *adapter, p=P[i], seed=seed))
    return ys


def flat_names(given: dict[str, list[Tensor]]) -> list[str]:
    return [f"{name}[{i}]" for name, some in given.items() for i in range(len(some))]


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_every_layer_and_gradient_equals_the_authors_formula(dtypes, launcher):
    given = inputs(*dtypes)

    def together(fn):
        return lambda *tensors: torch.cat([y.flatten() for y in fn(split(given, tensors))])

    compare_with_float64(
        together(ours),
        together(formula),
        [t for some in given.values() for t in some],
        flat_names(given),
    )


def test_each_output_is_as_accurate_as_alone():
    given = inputs(torch.float32, torch.float32)
    in_float64 = {name: [t.double() for t in some] for name, some in given.items()}
    for i, (y, plain, exact) in enumerate(
        zip(ours(given), formula(given), formula(in_float64), strict=True)
    ):
        assert_accurate(y, plain, exact, f"layer {i}")


def test_gradcheck():
    small = inputs(torch.float64, torch.float64)
    leaves = [
        t.detach().requires_grad_(name not in ("weight", "bias"))
        for name, some in small.items()
        for t in some
    ]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for y in ours(split(small, tensors)) if y.numel() > 0)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def call_arguments(requires_grad: bool = False) -> tuple:
    z = inputs(torch.float32, torch.float32)
    trained = ("x", "base", "A", "Bt", "d", "A_shared", "Bt_shared")
    for name in trained:
        z[name] = [t.detach().requires_grad_(requires_grad) for t in z[name]]
    optional = [
        spread(z["weight"], HAS_WEIGHT),
        spread(z["bias"], HAS_WEIGHT),
        spread(z["base"], HAS_BASE),
    ]
    lists = [z[name] for name in ("A", "Bt", "d", "A_shared", "Bt_shared")]
    return (z["x"], *optional, *lists, POOLS, P, seeds())


@pytest.mark.parametrize("op", ["rasa_grouped_linear", "rasa_grouped_backward"])
def test_opcheck(op):
    torch.use_deterministic_algorithms(False)  # opcheck compares views that NaN filling would write
    if op == "rasa_grouped_linear":
        torch.library.opcheck(OPS.rasa_grouped_linear.default, call_arguments())
        torch.library.opcheck(OPS.rasa_grouped_linear.default, call_arguments(requires_grad=True))
        return
    xs, weights, biases, bases, *adapters, pools, p, seed_list = call_arguments()
    ys, s = OPS.rasa_grouped_linear(xs, weights, biases, bases, *adapters, pools, p, seed_list)
    dys = [None if i == 1 else torch.randn_like(y) for i, y in enumerate(ys)]
    mask = [i % 3 != 0 and i % L != 1 for i in range(5 * L)] + [True, False, True, True]
    arguments = (dys, xs, weights, *adapters, pools, s, p, seed_list, mask)
    torch.library.opcheck(OPS.rasa_grouped_backward.default, arguments)


def test_backward_computes_only_what_is_asked_for():
    xs, weights, biases, bases, *adapters, pools, p, seed_list = call_arguments()
    ys, s = OPS.rasa_grouped_linear(xs, weights, biases, bases, *adapters, pools, p, seed_list)
    dys = [torch.randn_like(y) for y in ys]

    def gradients(mask: list[bool]) -> list[Tensor]:
        lists = OPS.rasa_grouped_backward(dys, xs, weights, *adapters, pools, s, p, seed_list, mask)
        return [grad for some in lists for grad in some]

    full = gradients([True] * (5 * L + 4))
    for which in range(5 * L + 4):
        grads = gradients([i == which for i in range(5 * L + 4)])
        for i, (grad, expected) in enumerate(zip(grads, full, strict=True)):
            is_g = 4 * L <= i < 5 * L
            if i == which:
                assert torch.equal(grad, expected)
            elif not is_g:  # others need g
                assert grad.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a[0].pop(),
            "rasa_grouped_linear: xs must have one entry for each layer = 8, got 7",
        ),
        (
            lambda a: a[0].__setitem__(1, a[0][1][:, :5]),
            "rasa_grouped_linear: layer 1: weight must be (N, K) = [20, 5], got [20, 24]",
        ),
        (
            lambda a: a[0].__setitem__(2, a[0][2].half()),
            "rasa_grouped_linear: layer 2: x must have the first layer's dtype Float, got Half",
        ),
        (
            lambda a: a[1].__setitem__(0, None),
            "rasa_grouped_linear: layer 0: must have a weight or a base, got neither",
        ),
        (
            lambda a: a[3].__setitem__(0, torch.ones(70, 20)),
            "rasa_grouped_linear: layer 0: must have a weight or a base, got both",
        ),
        (
            lambda a: a[3].__setitem__(2, torch.ones(2, 20)),
            "rasa_grouped_linear: layer 2: base must be (M, N) = [1, 20], got [2, 20]",
        ),
        (
            lambda a: a[4].__setitem__(7, a[4][7][1:]),
            "rasa_grouped_linear: layer 7: Bt must be (Rp, N) = [6, 70], got [7, 70]",
        ),
        (
            lambda a: a[11].__setitem__(4, None),
            "rasa_grouped_linear: layer 4: seed must be given when p > 0, got None with p = 0.5",
        ),
        (
            lambda a: a[1][0].requires_grad_(),
            "rasa_grouped_linear: weights and biases must be frozen; give the base of a layer "
            "that trains",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = tuple(
        list(argument) if isinstance(argument, list) else argument for argument in call_arguments()
    )
    change(arguments)

    with pytest.raises(RuntimeError) as error:
        OPS.rasa_grouped_linear(*arguments)

    assert str(error.value).split("\n")[0] == message


# -------------------------------------------------------------------------------------------------
# grouped_linear over modules
# -------------------------------------------------------------------------------------------------


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


class Calls(TorchDispatchMode):
    """Counts the package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "rasa_ext" in func.name():
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_results_do_not_depend_on_the_number_of_threads(dtypes, threads):
    """Many small chains of problems, dealt to threads. The base outputs are given: their products
    are the library's."""
    z = inputs(*dtypes)
    sizes = [(M, SHAPES[max(pool, 0)][1]) for M, pool, *_ in LAYERS]
    bases = [randn(*size, dtype=dtypes[0]) for size in sizes]
    trained = ("x", "A", "Bt", "d", "A_shared", "Bt_shared")
    leaves = [t.requires_grad_() for name in trained for t in z[name] if t.numel() > 0]
    adapters = Adapters(*(z[name] for name in trained[1:]), POOLS)
    none: list[Tensor | None] = [None] * L

    def results() -> list[Tensor]:
        ys = rasa_grouped_linear(z["x"], none, none, bases, adapters, P, seeds())
        grads = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
        return [*ys, *grads]

    before = torch.get_num_threads()
    expected = results()
    try:
        torch.set_num_threads(threads)
        again = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_copies_of_layers_group_with_their_own_pool():
    layers, xs = make_layers()[:2], make_inputs()[:2]
    twins = copy.deepcopy(layers)
    twins[0].pool.A_shared.data.zero_()

    changed = grouped_linear(xs, twins)

    assert torch.equal(grouped_linear(xs, layers)[0], layers[0](xs[0]))
    assert not torch.equal(changed[0], layers[0](xs[0]))
