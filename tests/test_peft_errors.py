"""RaSA through PEFT: what is refused says why and changes nothing."""

from __future__ import annotations

import peft
import pytest
import torch
from peft_models import (
    adapted,
    assert_same,
    base_model,
    config,
    layers,
    logits,
    since_peft_0_21,
    weights,
)
from torch import nn

import rasa_ext
from rasa_ext.peft import RaSAConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "RaSAConfig: r must be an integer of at least 1, got 0"),
        ({"r": 2, "k": 3}, r"RaSAConfig: k must be an integer in 0 .. r = 2, got 3"),
        ({"alpha": 0}, "RaSAConfig: alpha must be a finite number above 0, got 0"),
        ({"dropout": 1.0}, r"RaSAConfig: dropout must be in \[0, 1\), got 1.0"),
        ({"bias": "lora_only"}, "RaSAConfig: bias must be one of .*, got 'lora_only'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be .* max\(k, 1\) = 1, got 0"),
        ({"k": 4, "rank_pattern": {"q": 3}}, r"at least max\(k, 1\) = 4, got 3"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]: alpha must be .*, got -1"),
        ({"layers_pattern": "layers"}, "layers_to_transform must be given with layers_pattern"),
        (
            {"target_modules": "q.*", "layers_to_transform": 1},
            "layers_to_transform must be None when target_modules is a regular expression, got 1",
        ),
    ],
)
def test_a_configuration_out_of_range_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaSAConfig(**arguments)


def everything(model: nn.Module) -> list:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    return [modules, [p.requires_grad for p in model.parameters()]]


class Tied(nn.Module):
    """Linear layers of which two share a weight, and one is in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.second.weight = self.first.weight
        self.again = self.third
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["second"], ValueError, "RaSAModel: second.weight is tied to first.weight"),
        (["third"], ValueError, "third and again are one module under two names"),
        (["attention"], TypeError, "Target module attention is not supported: MultiheadAttention"),
        (["out_proj"], TypeError, "attention.out_proj belongs to an nn.MultiheadAttention"),
    ],
)
def test_a_layer_that_cannot_have_an_adapter_is_refused(targets, error, message: str) -> None:
    model = Tied()
    before = everything(model)

    with pytest.raises(error, match=message):
        peft.get_peft_model(model, RaSAConfig(target_modules=targets))

    assert everything(model) == before


def test_a_tied_head_is_refused() -> None:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 8}
    model = t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    with (
        pytest.raises(ValueError, match="lm_head.weight is tied to transformer.wte.weight"),
        pytest.warns(UserWarning, match="tie_word_embeddings"),
    ):
        peft.get_peft_model(model, RaSAConfig(target_modules=["lm_head"]))


def test_a_layer_of_apply_is_refused() -> None:
    model = base_model()
    rasa_ext.apply(model, target_modules=["q_proj"])

    with pytest.raises(TypeError, match=r"q_proj has an adapter of rasa_ext.apply"):
        peft.get_peft_model(model, config(target_modules=["q_proj"]))


def test_a_target_that_does_not_occur_is_named() -> None:
    with pytest.raises(ValueError, match=r"Target modules {'nowhere'} not found"):
        peft.get_peft_model(base_model(), config(target_modules=["nowhere"]))


def test_layers_of_two_dtypes_cannot_share_a_pool() -> None:
    model = base_model()
    model.model.layers[1].self_attn.q_proj.double()

    with pytest.raises(ValueError, match=r"one adapter dtype, got torch.float32, torch.float64"):
        peft.get_peft_model(model, config(target_modules=["q_proj"]))
    assert layers(peft.get_peft_model(model, config(target_modules=["q_proj"], k=0)))


def test_an_adapter_that_cannot_be_added_leaves_the_model_as_it_was() -> None:
    model = adapted(target_modules=["q_proj"])
    before, state, structure = logits(model), weights(model), everything(model)

    with pytest.raises(TypeError, match="embed_tokens is not supported"):
        model.add_adapter("other", config(target_modules=["q_proj", "k_proj", "embed_tokens"]))

    assert_same(weights(model), state)
    assert everything(model) == structure
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def test_an_adapter_s_name_is_used_once() -> None:
    model = adapted(target_modules=["q_proj"])
    base, before = model.get_base_model(), logits(model)

    with (
        pytest.raises(ValueError, match="adapter_name must be new to the model, got 'default'"),
        pytest.warns(UserWarning, match="for a second time"),
    ):
        peft.get_peft_model(base, config(target_modules=["k_proj"]))

    assert torch.equal(logits(model), before)


@since_peft_0_21
def test_two_adapters_cannot_train_biases() -> None:
    model = adapted("bert", bias="all")

    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", config("bert", bias="rasa_only"))


@since_peft_0_21
def test_injecting_without_the_tuner_is_refused() -> None:
    with pytest.raises(ValueError, match="uses shared state"):
        peft.inject_adapter_in_model(config(), base_model())


def test_a_batch_of_several_adapters_is_refused() -> None:
    model = adapted()

    with pytest.raises(ValueError, match=r"adapter_names is not supported.*\['default', 'x'\]"):
        model(input_ids=torch.ones(2, 3, dtype=torch.int64), adapter_names=["default", "x"])


def test_a_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be .* = \[..., 16\], got \[2, 8\]"):
        layers(adapted())[0](torch.ones(2, 8))
