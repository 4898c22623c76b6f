"""Merging many layers at once: the ops, one launch for all, and all or nothing."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from models import POOL, Conv1D, make_layer, randomize_adapters, snapshot_bits, trained
from op_calls import Calls
from reference import assert_accurate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import rasa_ext
from rasa_ext import merging
from rasa_ext.base_layer import is_transposed
from rasa_ext.injection import adapted_layers
from rasa_ext.layer_ops import Adapters, rasa_delta_weights, rasa_merge_

OPS = torch.ops.rasa_ext
# K, N and number of private ranks of layers; the pool of layers with the same (K, N), or -1.
LAYERS = [(24, 16, 3, 0), (24, 16, 3, 0), (40, 130, 7, 1), (40, 130, 0, 1), (5, 7, 2, -1)]
Rs = {0: 6, 1: 30}
HALF = [torch.bfloat16, torch.float16]


def random_adapters(dtype: torch.dtype, scale: float = 1.0) -> Adapters:
    def normal(rows: int, cols: int) -> Tensor:
        return (torch.randn(rows, cols, dtype=torch.float64) * scale).to(dtype)

    sizes = {pool: (K, N) for K, N, _, pool in LAYERS if pool >= 0}
    return Adapters(
        [normal(Rp, K) for K, _, Rp, _ in LAYERS],
        [normal(Rp, N) for _, N, Rp, _ in LAYERS],
        [normal(1, Rs.get(pool, 0) + Rp)[0] for _, _, Rp, pool in LAYERS],
        [normal(Rs[pool], sizes[pool][0]) for pool in sorted(sizes)],
        [normal(Rs[pool], sizes[pool][1]) for pool in sorted(sizes)],
        [pool for *_, pool in LAYERS],
    )


def formula(adapters: Adapters, i: int, dtype: torch.dtype) -> Tensor:
    """The docstring of rasa_delta_weights, as code."""
    A, Bt, pool = adapters.A[i], adapters.Bt[i], adapters.pools[i]
    if pool >= 0:
        A = torch.cat([adapters.A_shared[pool], A])
        Bt = torch.cat([adapters.Bt_shared[pool], Bt])
    return (Bt.to(dtype) * adapters.d[i].to(dtype)[:, None]).T @ A.to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_all_updates_of_one_call_equal_the_formula(dtype, launcher):
    adapters = random_adapters(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for i, delta in enumerate(rasa_delta_weights(adapters)):
        exact = formula(adapters, i, torch.float64)
        assert delta.dtype == compute
        assert_accurate(delta, formula(adapters, i, compute), exact, str(LAYERS[i]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_merge_op_adds_the_same_updates_and_rounds_once(dtype):
    adapters = random_adapters(torch.float64 if dtype == torch.float64 else torch.float32)
    weights = [torch.randn(N, K).to(dtype) for K, N, *_ in LAYERS]
    # Every layout of a weight: a slice of a wider one, and columns that follow each other.
    weights[1] = torch.randn(16, 30).to(dtype)[:, 3:27]
    weights[2] = weights[2].T.contiguous().T
    expected = [
        (w.to(delta.dtype) + delta).to(dtype)
        for w, delta in zip(weights, rasa_delta_weights(adapters), strict=True)
    ]
    versions = [w._version for w in weights]

    rasa_merge_(weights, adapters)

    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
    assert all(w._version > v for w, v in zip(weights, versions, strict=True))


def test_updates_can_be_differentiated_twice():
    adapters = random_adapters(torch.float64)
    leaves = [t.requires_grad_() for tensors in adapters[:5] for t in tensors]

    def call(*tensors: Tensor) -> list[Tensor]:
        lists, L = [], len(LAYERS)
        for size in (L, L, L, 2, 2):
            lists.append(list(tensors[:size]))
            tensors = tensors[size:]
        return rasa_delta_weights(Adapters(*lists, adapters.pools))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("op", ["rasa_delta_weights", "rasa_merge_"])
def test_opcheck(op):
    torch.use_deterministic_algorithms(False)  # opcheck compares views that NaN filling would write
    adapters = random_adapters(torch.float32)
    if op == "rasa_merge_":
        torch.library.opcheck(
            OPS.rasa_merge_.default, ([torch.randn(N, K) for K, N, *_ in LAYERS], *adapters)
        )
        return
    torch.library.opcheck(OPS.rasa_delta_weights.default, tuple(adapters))
    leaves = [[t.requires_grad_() for t in tensors] for tensors in adapters[:5]]
    torch.library.opcheck(OPS.rasa_delta_weights.default, (*leaves, adapters.pools))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, w: a.Bt.__setitem__(2, a.Bt[2][:, 1:]),
            "rasa_merge_: layer 2: Bt must be (Rp, N) = [7, 130], got [7, 129]",
        ),
        (
            lambda a, w: a.d.__setitem__(1, a.d[1].double()),
            "rasa_merge_: layer 1: d must have A's dtype Float, got Double",
        ),
        (
            lambda a, w: a.A.__setitem__(4, a.A[4].half()),
            "rasa_merge_: layer 4: A must have the first layer's dtype Float, got Half",
        ),
        (
            lambda a, w: w.__setitem__(3, w[3].double()),
            "rasa_merge_: layer 3: A must have weight's dtype Double, got Float",
        ),
        (
            lambda a, w: w.__setitem__(1, w[0]),
            "rasa_merge_: weights must not share memory: a tied weight would get two updates. "
            "Untie them",
        ),
        (
            lambda a, w: a.pools.__setitem__(0, 2),
            "rasa_merge_: pools must be -1 (no pool) or the index of one of 2 pools, got 2",
        ),
        (
            lambda a, w: a.d.pop(),
            "rasa_merge_: d must have one entry for each layer = 5, got 4",
        ),
        (
            lambda a, w: w.pop(),
            "rasa_merge_: weights must have one entry for each layer = 5, got 4",
        ),
        (
            lambda a, w: w[0].requires_grad_(),
            "rasa_merge_: has no derivative; call it under torch.no_grad()",
        ),
    ],
)
def test_merge_op_says_what_is_wrong_and_changes_nothing(change, message):
    adapters = random_adapters(torch.float32)
    weights = [torch.randn(N, K) for K, N, *_ in LAYERS]
    change(adapters, weights)
    before = [w.clone() for w in weights]

    with pytest.raises(RuntimeError) as error:
        rasa_merge_(weights, adapters)

    assert str(error.value).split("\n")[0] == message
    assert all(torch.equal(w, bits) for w, bits in zip(weights, before, strict=True))


def llama_like(dtype: torch.dtype = torch.float32) -> nn.Module:
    """32 layers of seven linears, two of them of GPT-2's kind, with random adapters."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(32))
    shapes = {"q": (8, 8), "k": (8, 4), "v": (8, 4), "o": (8, 8), "gate": (8, 20), "up": (8, 20)}
    for block in model.layers:
        for name, (K, N) in shapes.items():
            block.add_module(name, Conv1D(N, K) if name in ("k", "v") else nn.Linear(K, N))
        block.down = nn.Linear(20, 8)
    rasa_ext.apply(model.to(dtype), r=4, k=1, target_modules=(*shapes, "down"))
    return randomize_adapters(model).eval()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_seven_kinds_of_32_layers_merge_in_one_launch(dtype):
    model = llama_like(dtype)
    before = copy.deepcopy(model)

    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = rasa_ext.merge(model)

    assert calls.count["rasa_merge_"] == 1 and calls.count["rasa_delta_weights"] == 1
    assert len(report.layers) == 224
    merged = adapted_layers(model)
    for name, layer in adapted_layers(before).items():
        A, Bt = (
            torch.cat([layer.pool.get_parameter(f"{side}_shared"), layer.get_parameter(side)])
            for side in ("A", "Bt")
        )
        exact = (Bt.double() * layer.d.double()[:, None]).T @ A.double()
        plain = (Bt * layer.d[:, None]).T @ A
        if is_transposed(layer.base_layer):
            exact, plain = exact.T, plain.T
        weight = layer.base_layer.weight
        out = merged[name].base_layer.weight
        assert_accurate(out, (weight + plain).to(dtype), weight.double() + exact, name)
    rasa_ext.unmerge(model)
    assert snapshot_bits(model) == snapshot_bits(before)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_layers_with_and_without_ranks_of_their_own_merge_together(k):
    """k = 0 has no pool, k = r no ranks of its own; each layer is what it is alone."""
    model = trained(k=k).eval()
    model.layers[1].attn.q_proj.d.data.zero_()
    alone = copy.deepcopy(model)

    report = rasa_ext.merge(model)

    for layer in adapted_layers(alone).values():
        layer.merge()
    for name, layer in adapted_layers(alone).items():
        ours = model.get_submodule(name).base_layer.weight
        assert torch.equal(layer.base_layer.weight, ours), name
    errors = {layer.name: layer.error for layer in report.layers}
    assert errors["layers.1.attn.q_proj"] == 0, "an update of zeros"
    assert errors["layers.0.attn.q_proj"] > 0


def test_peak_memory_is_the_kept_originals_and_a_bounded_rest(monkeypatch):
    monkeypatch.setattr(merging, "_ELEMENTS_HELD", 1)  # one layer's update at a time
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(24)))
    rasa_ext.apply(model, r=2, k=0, target_modules=[str(i) for i in range(24)])
    rasa_ext.merge(randomize_adapters(model))
    rasa_ext.unmerge(model)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        rasa_ext.merge(model)

    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    originals = 24 * 512 * 512 * 4
    assert originals <= held and peak < 2 * originals


# -------------------------------------------------------------------------------------------------
# All or nothing
# -------------------------------------------------------------------------------------------------


def nothing_changed(model: nn.Module, bits: list[bytes]) -> bool:
    layers = adapted_layers(model).values()
    kept = any(layer.merged or layer.original_weight is not None for layer in layers)
    return snapshot_bits(model) == bits and not kept


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("broken", ["private", "pool", "overflow", "weight"])
def test_one_value_that_is_not_finite_leaves_every_layer_as_it_was(broken, rounding):
    model = trained().half()
    layer = model.layers[2].attn.v_proj
    if broken == "private":
        layer.A.data[0, 0] = math.nan
    elif broken == "pool":
        model.get_submodule(POOL).Bt_shared.data[1, 2] = math.inf
    elif broken == "overflow":
        layer.Bt.data.fill_(6e4)
        layer.d.data.fill_(100)
    else:
        layer.base_layer.weight.data[1, 1] = math.nan
    bits = snapshot_bits(model)

    with pytest.raises(ValueError, match=r"would hold NaN or inf in torch\.float16"):
        rasa_ext.merge(model, rounding=rounding)

    assert nothing_changed(model, bits)


@pytest.mark.parametrize("step", ["rasa_merge_", "rasa_delta_weights", "_norms", "_report"])
def test_an_interruption_leaves_every_layer_as_it_was(step, monkeypatch):
    model = trained()
    bits = snapshot_bits(model)
    real = getattr(merging, step)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        rasa_ext.merge(model)

    assert nothing_changed(model, bits)


def test_a_warning_made_an_error_leaves_every_layer_as_it_was():
    model = trained().bfloat16()
    for layer in adapted_layers(model).values():
        layer.d.data.mul_(1e-4)
    bits = snapshot_bits(model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="changed the update"):
            rasa_ext.merge(model)

    assert nothing_changed(model, bits)


def test_two_layers_on_one_weight_are_refused():
    model = nn.Module()
    model.a, model.b = nn.Linear(24, 16), nn.Linear(24, 16)
    model.b.weight = model.a.weight
    model.a, model.b = make_layer(k=0, base=model.a), make_layer(k=0, base=model.b)
    bits = snapshot_bits(model)

    with pytest.raises(ValueError) as error:
        rasa_ext.merge(model)

    assert str(error.value) == (
        "merge: b and a have one weight, which would get both their updates. Untie them"
    )
    assert nothing_changed(model, bits)
