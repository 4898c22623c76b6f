"""rasa_grouped_linear: each layer of a call is as it is alone, forward and backward."""

from __future__ import annotations

import pytest
import torch
from layers import DTYPES, dtypes_id, new_seed, randn
from reference import assert_accurate, authors_add, authors_linear, compare_with_float64
from torch import Tensor

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
