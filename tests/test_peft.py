"""RaSA through PEFT: what it computes, in which dtypes, and what trains beside it."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from hf_models import LAYERS, TARGETS, tokens
from models import assert_as_accurate, randomize_adapters
from peft_models import (
    GROUPS,
    KINDS,
    adapted,
    apply_model,
    assert_same,
    authors_layer,
    base_model,
    config,
    layers,
    logits,
    pools_of,
    since_peft_0_21,
    trained,
    two_adapters,
    weights,
)
from torch import nn

from rasa_ext.peft import RaSAConfig

# --- one adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_peft_computes_what_apply_computes(kind: str, k: int) -> None:
    model = adapted(kind, k=k)

    plain = apply_model(model, kind, k=k)

    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(base_model(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_new_adapter_leaves_the_function_as_it_was(kind: str, k: int) -> None:
    model = peft.get_peft_model(base_model(kind), config(kind, k=k))

    assert torch.equal(logits(model), logits(base_model(kind)))


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_new_adapter_starts_as_the_authors_do(k: int) -> None:
    model = peft.get_peft_model(base_model(), config(k=k, alpha=8))

    layer = layers(model)[0]
    A, A_shared, Bt, Bt_shared, d = layer.adapter("default")
    Rs, Rp = LAYERS * k, 4 - k
    assert (A_shared.shape[0], A.shape[0]) == (Rs, Rp)
    assert not Bt.any() and not Bt_shared.any()
    half = 0.5 if k > 0 else 1.0
    shared, private = [half * 8 / max(Rs, 1)] * Rs, [half * 8 / max(Rp, 1)] * Rp
    assert torch.equal(d, torch.tensor(shared + private))


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_train_and_each_pool_once(kind: str) -> None:
    model = adapted(kind)

    names = trained(model)

    per_layer = {"rasa_A", "rasa_Bt", "rasa_d"}
    pools = [name for name in names if "_shared" in name]
    assert len(pools) == 2 * GROUPS[kind]
    assert all(
        name.startswith(("base_model.rasa_A_shared.", "base_model.rasa_Bt_shared."))
        for name in pools
    )
    assert {name.split(".")[-2] for name in names if name not in pools} == per_layer
    assert len(names) - len(pools) == 3 * len(layers(model))
    assert len(pools_of(model, "default")) == 2 * GROUPS[kind]


def test_a_layer_that_does_not_share_has_no_pool() -> None:
    model = adapted(k=0)

    assert not [
        name for name, _ in model.named_parameters() if "shared" in name or "rasa_d" in name
    ]
    assert pools_of(model, "default") == set()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [0, 2, 4])
def test_a_layer_is_as_accurate_as_the_authors_formula(kind: str, k: int) -> None:
    layer = layers(adapted(kind, k=k))[0]

    assert_as_accurate(layer, authors_layer, layer, torch.randn(2, 5, layer.in_features))


def test_dropout_acts_in_training_only_and_follows_the_generator() -> None:
    model = adapted(dropout=0.5)
    evaluated = logits(model)
    model.train()

    torch.manual_seed(3)
    first = logits(model)
    second = logits(model)
    torch.manual_seed(3)

    assert not torch.equal(first, evaluated) and not torch.equal(first, second)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("size", [(5, 16), (16,), (0, 16), (2, 3, 4, 16)])
def test_a_layer_takes_any_number_of_dimensions(size: tuple[int, ...]) -> None:
    layer = layers(adapted())[0]

    assert layer(torch.randn(*size)).shape == size[:-1] + (layer.out_features,)


def test_a_base_layer_with_hooks_is_called() -> None:
    model = adapted()
    expected, layer = logits(model), layers(model)[0]
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))

    out = logits(model)

    assert calls == [1]
    torch.testing.assert_close(out, expected)


def test_a_layer_on_another_device_moves_the_pool_to_its_input() -> None:
    layer = layers(adapted())[0].to("meta")  # the pool, which is the tuner's, stays

    y = layer(torch.empty(3, 16, device="meta"))

    assert layer.rasa_pools["default"].A_shared.device.type == "cpu"
    assert y.device.type == "meta" and y.shape == (3, 16)


def test_copies_keep_sharing() -> None:
    model = adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        owned = {id(p) for p in twin.parameters()}

        assert len(pools_of(twin, "default")) == 2 * GROUPS["llama"]
        assert pools_of(twin, "default") <= owned
        assert torch.equal(logits(twin), logits(model))


# --- which layers --------------------------------------------------------------------------------


def adapted_names(**kwargs) -> set[str]:
    return set(peft.get_peft_model(base_model(), config(**kwargs)).base_model.targeted_module_names)


def test_targets_are_chosen_as_in_peft() -> None:
    two = {f"model.layers.{i}.self_attn.{q}" for i in range(LAYERS) for q in ("q_proj", "v_proj")}

    assert adapted_names(target_modules=["q_proj", "v_proj"]) == two
    assert adapted_names(target_modules=None) == two  # PEFT's choice for a Llama
    assert adapted_names(target_modules=r".*\.(q|v)_proj") == two
    assert adapted_names(target_modules="all-linear") == adapted_names()
    assert adapted_names(exclude_modules=["k_proj", "o_proj"]) < adapted_names()
    assert len(adapted_names(layers_to_transform=[0, 2])) == 2 * len(TARGETS["llama"])
    assert len(adapted_names(layers_to_transform=1, layers_pattern="layers")) == 7


def test_only_the_chosen_layers_share_a_pool() -> None:
    model = peft.get_peft_model(base_model(), config(layers_to_transform=[0, 2]))

    assert {layer.rasa_settings["default"].Rs for layer in layers(model)} == {2}


def test_rank_and_alpha_patterns_change_private_ranks_and_gates() -> None:
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"k_proj": 2.0}}
    model = adapted(**patterns)

    def settings(name: str):
        layer = model.base_model.model.model.get_submodule(name)
        return layer.rasa_settings["default"]

    assert [settings(f"layers.{i}.self_attn.q_proj").Rp for i in range(3)] == [3, 5, 3]
    assert settings("layers.0.self_attn.k_proj").alpha == 2.0
    assert settings("layers.0.self_attn.q_proj").alpha == 16.0
    for layer in layers(model)[:9]:
        assert_as_accurate(layer, authors_layer, layer, torch.randn(4, layer.in_features))


# --- dtypes --------------------------------------------------------------------------------------


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if "rasa_" in n}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_adapters_of_half_models_are_float32_unless_told_otherwise(
    dtype: torch.dtype, k: int
) -> None:
    models = {
        torch.float32: peft.get_peft_model(base_model().to(dtype), config(k=k)),
        dtype: peft.get_peft_model(
            base_model().to(dtype), config(k=k), autocast_adapter_dtype=False
        ),
    }

    for adapter_dtype, model in models.items():
        assert dtypes_of(model) == {adapter_dtype}
        out = randomize_adapters(model).eval()(input_ids=tokens()).logits
        assert out.dtype == dtype and out.isfinite().all()
        layer = layers(model)[0]
        assert_as_accurate(layer, authors_layer, layer, torch.randn(4, 16, dtype=dtype))


def test_adapters_of_double_models_are_double() -> None:
    model = adapted(dtype=torch.float64)

    assert dtypes_of(model) == {torch.float64}
    assert logits(model).dtype == torch.float64


@since_peft_0_21
def test_a_second_adapter_is_cast_too() -> None:
    model = adapted(dtype=torch.bfloat16)

    model.add_adapter("other", config(), autocast_adapter_dtype=False)

    kinds = {n.rpartition(".")[2]: p.dtype for n, p in model.named_parameters() if "rasa_d" in n}
    assert kinds == {"default": torch.float32, "other": torch.bfloat16}
    assert model.base_model.rasa_A_shared["other"]["mlp__up_proj__24x16"].dtype == torch.bfloat16


def test_a_quantised_base_of_another_dtype_gets_its_dtype_back() -> None:
    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).to(torch.bfloat16)

    model = peft.get_peft_model(
        nn.Sequential(Rounded(8, 8), nn.Identity()), RaSAConfig(target_modules=["0"], k=0)
    )

    assert model(torch.randn(3, 8)).dtype == torch.bfloat16


# --- modules_to_save and bias --------------------------------------------------------------------


def test_modules_to_save_train_in_full() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])

    names = trained(model)

    assert "base_model.model.lm_head.modules_to_save.default.weight" in names
    assert all("rasa_" in name for name in names if "lm_head" not in name)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model()))


@since_peft_0_21
@pytest.mark.parametrize("bias", ["none", "all", "rasa_only"])
def test_biases_train_as_in_peft(bias: str) -> None:
    model = adapted("bert", bias=bias, target_modules=["query"])

    biases = {name for name in trained(model) if name.endswith(".bias")}

    targeted = {
        name for name, _ in model.named_parameters() if name.endswith("query.base_layer.bias")
    }
    every = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert biases == {"none": set(), "all": every, "rasa_only": targeted}[bias]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(trained(model)[name].grad is not None for name in targeted & biases)


@since_peft_0_21
def test_disabling_with_trained_biases_warns() -> None:
    model = adapted("bert", bias="all")

    with (
        pytest.warns(UserWarning, match="does not produce the same output"),
        model.disable_adapter(),
    ):
        pass


def test_unloading_gives_the_base_model_back() -> None:
    model = two_adapters()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model.unload()

    assert_same(weights(plain), weights(base_model()))
    assert not layers(plain) and torch.equal(logits(plain), logits(base_model()))
