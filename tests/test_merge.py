"""merge() and unmerge() of a layer and of a model: right, exact to take back, all or nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import (
    LAYER,
    Conv1D,
    Int8Linear,
    K,
    N,
    assert_as_accurate,
    authors_update,
    make_layer,
    plain,
    saved,
    snapshot,
    trained,
)
from torch import Tensor, nn

from rasa_ext.injection import apply
from rasa_ext.module import RaSALinear
from rasa_ext.weights import merge, unmerge

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_the_float32_sum_once_and_unmerge_is_exact(
    base: str, dtype: torch.dtype
) -> None:
    base_layer = (nn.Linear(K, N) if base == "linear" else Conv1D(N, K)).to(dtype)
    layer = make_layer(base=base_layer).eval()
    before = base_layer.weight.clone()
    delta = layer.delta_weight() if base == "linear" else layer.delta_weight().T

    layer.merge()

    assert layer.merged
    assert torch.equal(base_layer.weight, (before.float() + delta).to(dtype))
    assert torch.equal(
        layer(torch.ones(3, K, dtype=dtype)), base_layer(torch.ones(3, K, dtype=dtype))
    )
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(base_layer.weight, before)


def test_merged_layer_computes_what_it_did() -> None:
    layer = make_layer().eval()
    merged = copy.deepcopy(layer)
    merged.merge()

    def unmerged(layer: RaSALinear, x: Tensor) -> Tensor:
        return layer.base_layer(x) + authors_update(layer, x)

    assert_as_accurate(merged, unmerged, layer, torch.randn(5, K))


def test_merged_layer_copies_and_moves_with_its_original_weight() -> None:
    layer = make_layer()
    before = layer.base_layer.weight.clone()
    layer.merge()

    for twin in (copy.deepcopy(layer), torch.load(saved(layer), weights_only=False)):
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, before)
    layer.double().unmerge()
    assert torch.equal(layer.base_layer.weight, before.double())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda layer: layer.merge(), "RaSALinear.merge: already merged. Call unmerge() first"),
        (
            lambda layer: layer.train()(torch.ones(1, K)),
            "RaSALinear: merged and in training mode, where its adapter would get no gradient. "
            "Call unmerge(), or eval() to run the merged layer",
        ),
        (
            lambda layer: layer.state_dict(),
            "RaSALinear.state_dict: merged; base weight and adapter would count the update twice. "
            "Call unmerge() first",
        ),
        (
            lambda layer: layer.load_state_dict({}),
            "RaSALinear.load_state_dict: merged; base weight and adapter would count the update "
            "twice. Call unmerge() first",
        ),
    ],
)
def test_a_merged_layer_refuses(act, message: str) -> None:
    layer = make_layer()
    layer.merge()

    with pytest.raises(RuntimeError) as error:
        act(layer)
    assert str(error.value) == message


def test_unmerge_needs_a_merged_layer() -> None:
    with pytest.raises(RuntimeError, match=r"^RaSALinear.unmerge: not merged$"):
        make_layer().unmerge()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merge_refuses_what_is_not_finite(value: float) -> None:
    layer = make_layer()
    layer.d.data[0] = value
    before = layer.base_layer.weight.clone()

    with pytest.raises(ValueError) as error:
        layer.merge()

    assert str(error.value) == (
        "RaSALinear.merge: the merged weight would hold NaN or inf in torch.float32. Check the "
        "adapter's weights and d"
    )
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)


def test_merge_refuses_overflow_of_float16() -> None:
    layer = make_layer(base=nn.Linear(K, N).half())
    layer.d.data.fill_(1e6)

    with pytest.raises(ValueError, match=r"would hold NaN or inf in torch\.float16"):
        layer.merge()


def test_merge_needs_a_weight_to_add_to() -> None:
    layer = make_layer(base=Int8Linear(nn.Linear(K, N)))

    with pytest.raises(TypeError) as error:
        layer.merge()

    assert str(error.value) == (
        "RaSALinear.merge: Int8Linear has no floating-point weight of shape (N, K) = [16, 24] to "
        "add to"
    )


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_merged_model_computes_the_same_and_unmerges_exactly(k: int) -> None:
    model = trained(k=k).eval()
    merged, bits = copy.deepcopy(model), snapshot(model)

    merge(merged)
    merge(model)

    assert all(m.merged for m in merged.modules() if isinstance(m, RaSALinear))
    unmerge(model)
    assert snapshot(model) == bits
    assert_as_accurate(merged, lambda model, x: model(x), model, torch.randn(5, 8))


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda model: (merge(model), merge(model)),
            RuntimeError,
            f"merge: {LAYER} is merged already. Call unmerge(model) first",
        ),
        (lambda model: unmerge(model), RuntimeError, "unmerge: no layer is merged"),
        (
            lambda model: merge(plain()),
            ValueError,
            "merge: the model has no RaSA adapters. Call rasa_ext.apply(model) first",
        ),
        (
            lambda model: unmerge(plain()),
            ValueError,
            "unmerge: the model has no RaSA adapters. Call rasa_ext.apply(model) first",
        ),
    ],
)
def test_merge_and_unmerge_say_what_is_wrong(act, kind: type, message: str) -> None:
    with pytest.raises(kind) as error:
        act(trained())
    assert str(error.value) == message


def test_unmerge_restores_the_layers_that_are_merged() -> None:
    model = trained()
    bits = snapshot(model)
    model.layers[1].attn.q_proj.merge()

    unmerge(model)

    assert snapshot(model) == bits


def test_all_layers_merge_or_none() -> None:
    model = trained()
    model.layers[2].down_proj.A.data[0, 0] = math.nan
    bits = snapshot(model)

    with pytest.raises(ValueError) as error:
        merge(model)

    assert str(error.value) == (
        "merge: layers.2.down_proj: RaSALinear.merge: the merged weight would hold NaN or inf in "
        "torch.float32. Check the adapter's weights and d"
    )
    assert snapshot(model) == bits
    assert not any(m.merged for m in model.modules() if isinstance(m, RaSALinear))


def test_a_quantised_base_is_not_merged() -> None:
    model = plain()
    model.layers[1].attn.q_proj = Int8Linear(model.layers[1].attn.q_proj)
    apply(model, r=4, k=1, target_modules="q_proj")

    with pytest.raises(
        TypeError, match=r"^merge: layers\.1\.attn\.q_proj: RaSALinear\.merge: Int8"
    ):
        merge(model)

    assert not model.layers[0].attn.q_proj.merged


def test_merged_copies_unmerge_by_themselves() -> None:
    model = trained()
    bits = [p.detach().clone() for p in model.parameters()]
    merge(model)
    twin = copy.deepcopy(model)

    unmerge(twin)

    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), bits, strict=True))
    assert model.layers[0].attn.q_proj.merged
