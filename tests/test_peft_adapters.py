"""Several RaSA adapters in one PEFT model: they add up, switch, and leave nothing behind."""

from __future__ import annotations

import peft
import pytest
import torch
from hf_models import LAYERS, tokens
from models import assert_as_accurate
from peft_models import (
    GROUPS,
    KINDS,
    adapted,
    authors_layer,
    base_model,
    config,
    layers,
    logits,
    pools_of,
    since_peft_0_21,
    trained,
    two_adapters,
)

from rasa_ext.peft import RaSAModel


def test_active_adapters_add_up() -> None:
    model = two_adapters(target_modules=["q_proj", "down_proj"])
    model.base_model.set_adapter(["default", "other"])

    assert len(layers(model)[0].active_adapters) == 2
    for layer in (layers(model)[0], layers(model)[6]):
        x = torch.randn(4, layer.in_features)
        if "other" in layer.rasa_settings:
            assert_as_accurate(layer, authors_layer, layer, x)


def test_every_adapter_keeps_its_own_pools_tied() -> None:
    model = two_adapters()

    first, second = pools_of(model, "default"), pools_of(model, "other")

    assert len(first) == len(second) == 2 * GROUPS["llama"]
    assert first.isdisjoint(second)
    assert first | second <= {id(p) for p in model.parameters()}
    assert layers(model)[0].rasa_pools["other"].A_shared.shape[0] == 2 * LAYERS


def test_switching_adapters_switches_the_function_and_what_trains() -> None:
    model = two_adapters()
    first = logits(model)
    assert all(".default" in name for name in trained(model))

    model.set_adapter("other")

    assert not torch.equal(logits(model), first)
    assert all(".other" in name for name in trained(model))
    assert len([name for name in trained(model) if "_shared.other." in name]) == 14
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_training_one_adapter_leaves_the_other_bitwise() -> None:
    model = two_adapters()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".other" in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()

    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is not None and p.grad.any() for p in trained(model).values())


def test_gradients_can_be_set_without_activating() -> None:
    model = two_adapters()

    model.set_requires_grad("other")
    model.set_requires_grad("default", requires_grad=False)

    assert all(".other" in name for name in trained(model))
    assert len(trained(model)) == len(list(model.base_model.rasa_A_shared["other"])) * 2 + 3 * 21


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_gives_the_base_model_and_ends_with_the_context(kind: str) -> None:
    model = adapted(kind)
    before, names = logits(model), trained(model).keys()

    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(kind)))
        assert not trained(model)

    assert torch.equal(logits(model), before)
    assert trained(model).keys() == names


def test_disabling_a_merged_model_unmerges_it() -> None:
    model = adapted()
    before = logits(model)
    model.merge_adapter()

    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model()))

    assert torch.equal(logits(model), before)


def test_a_deleted_adapter_leaves_nothing() -> None:
    model = two_adapters()
    model.set_adapter("other")
    kept = logits(model)

    model.delete_adapter("default")

    assert not [name for name in model.state_dict() if ".default" in name]
    assert list(model.peft_config) == ["other"] and model.active_adapter == "other"
    assert torch.equal(logits(model), kept)


def test_deleting_the_active_adapter_activates_another_and_the_last_leaves_the_base() -> None:
    model = two_adapters()

    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.base_model.active_adapters == ["other"]
    model.delete_adapter("other")

    # The tuner: PeftModel.forward needs an active adapter.
    assert torch.equal(logits(model.base_model), logits(base_model()))
    assert not [name for name in model.state_dict() if "rasa" in name]


@since_peft_0_21
def test_a_merged_adapter_is_not_deleted() -> None:
    model = two_adapters()
    model.merge_adapter()

    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_a_second_get_peft_model_keeps_the_first_adapter() -> None:
    model = adapted()
    before, base = logits(model), model.get_base_model()

    with pytest.warns(UserWarning, match="multiple adapters"):
        again = peft.get_peft_model(base, config(k=2), adapter_name="other")

    assert pools_of(again, "default") <= {id(p) for p in again.parameters()}
    again.set_adapter("default")
    assert torch.equal(logits(again), before)


def test_the_status_names_what_there_is() -> None:
    model = two_adapters()

    status = model.get_model_status()

    assert status.peft_types == {"default": "RASA", "other": "RASA"}
    assert status.requires_grad == {"default": True, "other": False}
    assert (status.adapter_model_type, status.num_adapter_layers) == ("RaSAModel", 21)
    assert status.trainable_params == sum(p.numel() for p in trained(model).values())
    assert status.available_adapters == ["default", "other"]
    assert isinstance(model.base_model, RaSAModel)
