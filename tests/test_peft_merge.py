"""RaSA through PEFT merged into the base weights: right, exact to take back, all or nothing."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from hf_models import LAYERS
from models import Int8Linear, randomize_adapters
from peft_models import KINDS, adapted, assert_same, base_model, config, layers, logits, weights
from reference import assert_accurate
from torch import nn

from rasa_ext.peft import RaSAConfig


def double_logits(model: nn.Module) -> torch.Tensor:
    return logits(copy.deepcopy(model).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_merged_model_computes_what_it_did_and_unmerges_to_the_bit(kind: str, k: int) -> None:
    model = adapted(kind, k=k)
    before, exact, state = logits(model), double_logits(model), weights(model)

    model.merge_adapter()

    assert all(layer.merged for layer in layers(model))
    # The merged weights were rounded once more than those of the model before.
    assert_accurate(logits(model), before, exact, slack=1.5)
    assert not torch.equal(layers(model)[0].base_layer.weight, state[_first_weight(state)])
    model.unmerge_adapter()
    assert_same(weights(model), state)
    assert torch.equal(logits(model), before)


def _first_weight(state: dict[str, torch.Tensor]) -> str:
    return next(name for name in state if name.endswith("base_layer.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    layer = layers(model)[0]
    before = layer.base_layer.weight.float()
    first = layer.get_delta_weight("default")
    model.add_adapter("other", config(init_weights=False))
    second = layer.get_delta_weight("other")

    model.merge_adapter()
    with pytest.warns(UserWarning, match="You are now additionally merging other"):
        model.merge_adapter(adapter_names=["other"])

    assert torch.equal(layer.base_layer.weight, (before + first + second).to(dtype))
    assert layer.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.float(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_leaves_a_plain_model(kind: str, safe_merge: bool) -> None:
    model = adapted(kind)
    before, exact = logits(model), double_logits(model)

    plain = model.merge_and_unload(safe_merge=safe_merge)

    base = base_model(kind)
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert_accurate(logits(plain), before, exact)


def test_only_the_named_adapters_are_merged() -> None:
    model = adapted()
    model.add_adapter("other", config(init_weights=False, target_modules=["q_proj"]))
    model.set_adapter("other")
    other = logits(model)
    exact = double_logits(model)
    model.set_adapter("default")

    plain = model.merge_and_unload(adapter_names=["other"])

    assert_accurate(logits(plain), other, exact)


def test_merging_twice_warns_and_changes_nothing() -> None:
    model = adapted()
    model.merge_adapter()
    state = weights(model)

    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()

    assert_same(weights(model), state)


def test_unmerging_twice_warns() -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted().unmerge_adapter()


def test_setting_an_adapter_unmerges_first() -> None:
    model = adapted()
    before = logits(model)
    model.merge_adapter()

    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")

    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_broken_adapter_is_merged_nowhere(merge: str, safe_merge: bool, value: float) -> None:
    model = adapted()
    with torch.no_grad():
        layers(model)[-1].rasa_A["default"][0] = value
    state = weights(model)

    with pytest.raises(ValueError, match=r"layers.2.*down_proj: NaNs detected.*adapter default"):
        getattr(model, merge)(safe_merge=safe_merge)

    assert_same(weights(model), state)
    assert not any(layer.merged for layer in layers(model))


def test_a_layer_without_a_weight_to_add_to_cannot_be_merged() -> None:
    model = nn.Sequential(Int8Linear(nn.Linear(8, 8)), nn.Linear(8, 8))
    model = peft.get_peft_model(model, RaSAConfig(target_modules=["0", "1"], k=0))
    randomize_adapters(model)
    state = weights(model)

    with pytest.raises(TypeError, match="0: RaSA merge: Int8Linear has no floating-point weight"):
        model.merge_adapter()

    assert_same(weights(model), state)


# --- as a LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_converts_it_to_a_lora(tmp_path, kind: str) -> None:
    peft_convert = pytest.importorskip("peft.tuners.lora.conversion")
    model = adapted(kind, target_modules=["q_proj", "c_attn"])
    before = logits(model)
    assert model.supports_lora_conversion()

    peft_convert.save_as_lora(tmp_path, model, rank=LAYERS + 3)  # R: nothing is lost

    lora = peft.PeftModel.from_pretrained(base_model(kind), tmp_path)
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(logits(lora), before)
