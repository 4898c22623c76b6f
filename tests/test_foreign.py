"""Adapters of other code: PEFT's LoRA and the authors' RaSA, imported as they compute."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict

import pytest
import torch
from hf_models import (
    LAYERS,
    TARGETS,
    authors_model,
    language_model,
    logits,
    tokens,
    train,
)
from models import plain, snapshot, trained
from reference import assert_accurate
from safetensors.torch import load_file, save_file
from torch import nn

from rasa_ext.foreign import import_lora, import_rasa
from rasa_ext.injection import adapted_layers
from rasa_ext.weights import load_adapter, save_adapter

IDS = tokens(seed=9)


# --- LoRA of PEFT --------------------------------------------------------------------------------


def save_lora(path, model: nn.Module, kind: str = "llama", **config) -> nn.Module:
    """Save a LoRA of random values with stock PEFT; return PEFT's model."""
    import peft

    arguments = {"r": 4, "lora_alpha": 12, "target_modules": list(TARGETS[kind])} | config
    lora = peft.get_peft_model(model, peft.LoraConfig(**arguments)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    lora.save_pretrained(path)
    return lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("kind", TARGETS)
def test_an_imported_lora_computes_what_it_does_in_peft(tmp_path, kind, k, dtype) -> None:
    lora = save_lora(tmp_path, language_model(kind).to(dtype), kind, lora_dropout=0.25)
    model = language_model(kind).to(dtype)

    summary = import_lora(model, tmp_path, k=k)

    exact = logits(lora.double(), IDS)
    assert_accurate(logits(model, IDS), logits(authors_model(model), IDS), exact)
    layers = adapted_layers(model).values()
    assert {(layer.r, layer.k, layer.dropout) for layer in layers} == {(4 + k, k, 0.25)}
    assert {group.Rs for group in summary.groups} == {k * LAYERS}


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers.1.*down_proj": 6}},
        {"alpha_pattern": {"1.self_attn.v_proj": 3}, "rank_pattern": {"0.mlp.up_proj": 3}},
    ],
    ids=["rslora", "ranks", "alphas"],
)
def test_scalings_and_ranks_of_single_layers_are_kept(tmp_path, config, k: int) -> None:
    lora = save_lora(tmp_path, language_model("llama"), **config)
    model = language_model("llama")

    import_lora(model, tmp_path, k=k)

    exact = logits(lora.double(), IDS)
    assert_accurate(logits(model, IDS), logits(authors_model(model), IDS), exact)


@pytest.mark.parametrize("k", [0, 1])
def test_values_arrive_bit_by_bit(tmp_path, k: int) -> None:
    save_lora(tmp_path, language_model("llama"))
    model = language_model("llama")

    import_lora(model, tmp_path, k=k)

    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        assert torch.equal(layer.A, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.Bt, stored[f"base_model.model.{name}.lora_B.weight"].T)
        assert torch.equal(layer.d[-4:], torch.full((4,), 3.0))


def test_an_imported_lora_trains_on_with_its_pool(tmp_path) -> None:
    save_lora(tmp_path / "lora", language_model("llama"), rank_pattern={"q_proj": 2})
    model = language_model("llama")
    import_lora(model, tmp_path / "lora", k=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    train(model)

    after = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert still == []
    save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = language_model("llama")
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(fresh, IDS), logits(model, IDS))


# --- checkpoints of RaSA's authors ---------------------------------------------------------------


class AuthorsLinear(nn.Module):
    """The formula of the authors' layer restated, with the order of ranks that it has."""

    def __init__(self, base: nn.Linear, r: int, k: int, shared_A, shared_B, Rs: int) -> None:
        super().__init__()
        options = {"bias": False, "dtype": base.weight.dtype}
        self.base_layer = base
        self.rasa_A = nn.Linear(base.in_features, r - k, **options)
        self.rasa_B = nn.Linear(r - k, base.out_features, **options)
        self.rasa_mixing = nn.ParameterDict({"weight": torch.randn(r - k + Rs)})
        self.shared = [shared_A, shared_B]

    def forward(self, x):
        A = torch.cat([self.rasa_A.weight, self.shared[0].weight])
        B = torch.cat([self.rasa_B.weight, self.shared[1].weight], dim=1)
        mixing = self.rasa_mixing["weight"].to(x.dtype)
        return self.base_layer(x) + ((x @ A.T) * mixing) @ B.T


def save_authors(path, r: int = 4, k: int = 2, dtype=torch.float32) -> nn.Module:
    """Save what the authors' tuner saves for a Llama, with random values; return the model."""
    model = language_model("llama").to(dtype)
    torch.manual_seed(5)
    groups = defaultdict(list)
    for name, module in model.named_modules():
        if name.endswith(TARGETS["llama"]):
            suffix = re.search(r"layers\.(\d+)\.(.+)", name)[2].replace(".", "__")
            groups[suffix].append((name, module))
    stored = {}
    for suffix, members in groups.items():
        Rs, base = k * len(members), members[0][1]
        shared_A = nn.Linear(base.in_features, Rs, bias=False, dtype=dtype)
        shared_B = nn.Linear(Rs, base.out_features, bias=False, dtype=dtype)
        stored[f"base_model.rasa_shared_A.{suffix}.weight"] = shared_A.weight
        stored[f"base_model.rasa_shared_B.{suffix}.weight"] = shared_B.weight
        for name, module in members:
            layer = AuthorsLinear(module, r, k, shared_A, shared_B, Rs)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            for tensor, value in layer.named_parameters():
                if tensor.startswith("rasa_"):
                    stored[f"base_model.model.{name}.{tensor}"] = value
    config = {"peft_type": "RASA", "r": r, "rasa_k": k, "rasa_alpha": 8, "rasa_dropout": 0.05}
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    stored = {key: value.detach().contiguous() for key, value in stored.items()}
    save_file(stored, path / "adapter_model.safetensors")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("r", "k"), [(4, 1), (8, 3), (3, 3)])
def test_the_authors_checkpoint_computes_what_their_formula_does(tmp_path, r, k, dtype) -> None:
    theirs = save_authors(tmp_path / "rasa", r, k, dtype)
    model = language_model("llama").to(dtype)

    summary = import_rasa(model, tmp_path / "rasa")

    exact = logits(theirs.double(), IDS)
    assert_accurate(logits(model, IDS), logits(authors_model(model), IDS), exact)
    layers = adapted_layers(model).values()
    assert {(la.r, la.k, la.alpha, la.dropout) for la in layers} == {(r, k, 8.0, 0.05)}
    assert {(group.Rp, group.Rs) for group in summary.groups} == {(r - k, k * LAYERS)}


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path):
    """A small LoRA folder for plain(), and a way to change its tensors and configuration."""
    stored = {}
    for i in range(3):
        stored[f"base_model.model.layers.{i}.attn.q_proj.lora_A.weight"] = torch.randn(2, 8)
        stored[f"base_model.model.layers.{i}.attn.q_proj.lora_B.weight"] = torch.randn(8, 2)
    return write(tmp_path, stored, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})


@pytest.fixture
def authors(tmp_path):
    stored = {
        "base_model.rasa_shared_A.attn__q_proj.weight": torch.randn(6, 8),
        "base_model.rasa_shared_B.attn__q_proj.weight": torch.randn(8, 6),
    }
    for i in range(3):
        prefix = f"base_model.model.layers.{i}.attn.q_proj"
        stored[f"{prefix}.rasa_A.weight"] = torch.randn(2, 8)
        stored[f"{prefix}.rasa_B.weight"] = torch.randn(8, 2)
        stored[f"{prefix}.rasa_mixing.weight"] = torch.randn(8)
    config = {"peft_type": "RASA", "r": 4, "rasa_k": 2, "rasa_alpha": 8, "rasa_dropout": 0.0}
    return write(tmp_path, stored, config)


def write(folder, stored, config):
    save_file(stored, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def change(folder, tensors=None, **fields) -> None:
    """Replace tensors (None removes one) and fields."""
    stored = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    stored = {key: value for key, value in stored.items() if value is not None}
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    write(folder, stored, {key: value for key, value in config.items() if value is not None})


def refuse(load, folder, model=None, kind: type = ValueError) -> str:
    model = model or plain()
    before = snapshot(model)
    with pytest.raises(kind) as error:
        load(model, folder)
    assert snapshot(model) == before
    return str(error.value)


LORA_A = "base_model.model.layers.1.attn.q_proj.lora_A.weight"
RASA = "base_model.model.layers.1.attn.q_proj.rasa"
SHARED_B = "base_model.rasa_shared_B.attn__q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({LORA_A: torch.ones(2, 7)}, f"{LORA_A} must be (r, K) = [2, 8], got [2, 7]"),
        ({LORA_A: torch.ones(0, 8)}, f"{LORA_A} must be (r, K) = [2, 8], got [0, 8]"),
        (
            {LORA_A.replace("_A", "_B"): None},
            f"{LORA_A.replace('_A', '_B')} must be (N, r) = [8, 2], got no such tensor",
        ),
        (
            {"base_model.model.layers.7.attn.q_proj.lora_A.weight": torch.ones(2, 8)},
            "base_model.model.layers.7.attn.q_proj.lora_A.weight is unknown to the model, got "
            "shape [2, 8]",
        ),
        (
            {"base_model.model.layers.1.attn.q_proj.lora_magnitude_vector": torch.ones(8)},
            "base_model.model.layers.1.attn.q_proj.lora_magnitude_vector is unknown to the model, "
            "got shape [8]",
        ),
        (
            {LORA_A: torch.ones(2, 8, dtype=torch.int8)},
            f"{LORA_A} must be floating-point, got torch.int8",
        ),
    ],
)
def test_a_lora_tensor_that_does_not_fit_is_named(lora, tensors, message: str) -> None:
    change(lora, tensors)

    assert refuse(import_lora, lora) == f"import_lora: {lora} does not fit the model: {message}"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({SHARED_B: torch.ones(6, 8)}, f"{SHARED_B} must be (N, Rs) = [8, 6], got [6, 8]"),
        ({SHARED_B: None}, f"{SHARED_B} must be (N, Rs) = [8, 6], got no such tensor"),
        (
            {f"{RASA}_mixing.weight": torch.ones(7)},
            f"{RASA}_mixing.weight must be (Rp + Rs) = [8], got [7]",
        ),
        (
            {f"{RASA}_A.weight": torch.ones(4, 8)},
            f"{RASA}_A.weight must be (Rp, K) = [2, 8], got [4, 8]",
        ),
    ],
)
def test_an_authors_tensor_that_does_not_fit_is_named(authors, tensors, message: str) -> None:
    change(authors, tensors)

    assert refuse(import_rasa, authors) == (
        f"import_rasa: {authors} does not fit the model: {message}"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("modules_to_save", ["head"]),
        ("layer_replication", [[0, 2]]),
        ("something_new", {"x": 1}),
    ],
)
def test_variants_of_lora_are_refused(lora, field: str, value) -> None:
    change(lora, **{field: value})

    assert refuse(import_lora, lora) == (
        f"import_lora: {lora} must be a plain LoRA, got {field} = {value!r} in "
        "adapter_config.json. Merge it into the base model with PEFT, or convert it to LoRA there"
    )


@pytest.mark.parametrize(
    "fields",
    [{"r": None}, {"r": 0}, {"lora_alpha": "high"}, {"rank_pattern": {"(": 3}}],
    ids=["no r", "r", "alpha", "pattern"],
)
def test_an_unusable_lora_configuration_is_refused(lora, fields) -> None:
    change(lora, **fields)

    message = refuse(import_lora, lora)
    assert message.startswith(f"import_lora: {lora} has no usable adapter_config.json: ")


@pytest.mark.parametrize("fields", [{"rasa_k": None}, {"rasa_k": 0}, {"rasa_k": 5}])
def test_an_unusable_authors_configuration_is_refused(authors, fields) -> None:
    change(authors, **fields)

    message = refuse(import_rasa, authors)
    assert message.startswith(f"import_rasa: {authors} has no usable adapter_config.json: ")


def test_files_that_are_none_are_refused(lora) -> None:
    assert refuse(import_rasa, lora) == f"import_rasa: {lora} must have peft_type RASA, got LORA"
    (lora / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "is damaged, or is not a safetensors file" in refuse(import_lora, lora)
    (lora / "adapter_config.json").write_text("[]")
    assert "has no usable adapter_config.json" in refuse(import_lora, lora)
    (lora / "adapter_model.safetensors").unlink()
    message = refuse(import_lora, lora, kind=FileNotFoundError)
    assert message == f"import_lora: {lora / 'adapter_model.safetensors'} does not exist"


def test_nan_is_refused(lora) -> None:
    change(lora, {LORA_A: torch.full((2, 8), math.nan)})

    assert refuse(import_lora, lora) == (
        f"import_lora: {LORA_A} must be finite, got 16 of 16 values NaN or inf"
    )


def test_a_file_for_another_model_is_refused(lora) -> None:
    assert refuse(import_lora, lora, plain("encoder.layer")) == (
        f"import_lora: {lora} does not fit the model: no layer of it is there; its first tensor is "
        "base_model.model.layers.0.attn.q_proj.lora_A.weight"
    )


def test_a_model_with_adapters_is_refused(lora) -> None:
    assert "the model has adapters already" in refuse(import_lora, lora, trained())
