"""Adapters exported as LoRA: stock PEFT, which knows nothing of us, computes the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_models import adapt, authors_model, language_model, logits, tokens, train
from models import plain, randomize_adapters, trained
from reference import assert_accurate
from safetensors.torch import load_file
from torch import nn

from rasa_ext.export import export_to_lora
from rasa_ext.injection import apply
from rasa_ext.module import RaSALinear
from rasa_ext.weights import merge

KINDS = ("llama", "gpt2", "bert")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# Each folder holds a model in `base` and its exported adapter in `lora`.
STOCK_PEFT = """
import sys
import warnings
from pathlib import Path
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

warnings.filterwarnings("error", message="Found missing adapter keys")
for folder in map(Path, sys.argv[1:]):
    inputs = load_file(folder / "inputs.safetensors")
    auto = transformers.AutoModelForCausalLM
    if folder.name.startswith("bert"):
        auto = transformers.AutoModelForMaskedLM
    base = auto.from_pretrained(folder / "base", dtype="auto")
    model = PeftModel.from_pretrained(base, folder / "lora").eval()
    with torch.no_grad():
        logits = model(input_ids=inputs["ids"]).logits.flatten(0, 1)
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
assert "rasa_ext" not in sys.modules
"""


def run_without_rasa_ext(script: str, *arguments: object) -> None:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By kind and dtype: a trained model, and the folder stock PEFT has written its logits to."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("exported")
    models = {}
    for kind in KINDS:
        for name, dtype in DTYPES.items():
            folder = root / f"{kind}-{name}"
            base = language_model(kind).to(dtype)
            base.save_pretrained(folder / "base")
            adapt(base, kind, r=4, k=2)
            models[kind, name] = train(base).eval(), folder
            export_to_lora(base, folder / "lora")
            save_file({"ids": tokens(seed=9)}, folder / "inputs.safetensors")
    run_without_rasa_ext(STOCK_PEFT, *(folder for _, folder in models.values()))
    return models


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_computes_the_same_logits(exported, kind: str, dtype: str) -> None:
    model, folder = exported[kind, dtype]
    ids = tokens(seed=9)
    exact = logits(authors_model(model).double(), ids)
    unadapted = logits(language_model(kind).to(DTYPES[dtype]).double(), ids)

    out = load_file(folder / "logits.safetensors")["logits"]

    assert_accurate(out, logits(authors_model(model), ids), exact, f"{kind} {dtype}", 64)
    assert (exact - unadapted).norm() > 0.1 * exact.norm()  # training moved them


@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_product_of_a_layer_is_its_delta_weight(tmp_path, k: int) -> None:
    model = trained(k=k).double()

    export_to_lora(model, tmp_path / "lora")

    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, RaSALinear):
            A, B = (tensors[f"base_model.model.{name}.lora_{s}.weight"] for s in "AB")
            torch.testing.assert_close(B @ A, layer.delta_weight())
    assert len(tensors) == 2 * sum(isinstance(m, RaSALinear) for m in model.modules())


def test_lora_is_exported_as_itself(tmp_path) -> None:
    model = trained(r=4, k=0, alpha=16)

    export_to_lora(model, tmp_path / "lora")

    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layer = model.layers[1].attn.q_proj
    assert torch.equal(tensors["base_model.model.layers.1.attn.q_proj.lora_A.weight"], layer.A)
    B = tensors["base_model.model.layers.1.attn.q_proj.lora_B.weight"]
    assert torch.equal(B, 4.0 * layer.Bt.T)


def test_all_layers_have_the_largest_rank_and_no_scaling(tmp_path) -> None:
    model = plain()
    # Two layers share q_proj's pool and three v_proj's: R = 3 + 2 and 3 + 3.
    targets = ["0.attn.q_proj", "1.attn.q_proj", "v_proj"]
    apply(model, r=4, k=1, target_modules=targets)
    randomize_adapters(model)

    max_lora_rank = export_to_lora(model, tmp_path / "lora")

    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], max_lora_rank) == (6, 6, 8)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {6}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {6}
    padded = tensors["base_model.model.layers.0.attn.q_proj.lora_B.weight"][:, 5:]
    assert torch.equal(padded, torch.zeros(8, 1))


@pytest.mark.parametrize(("R", "served"), [(1, 1), (9, 16), (39, 64), (257, 320), (513, 513)])
def test_the_rank_for_servers_is_the_next_that_vllm_offers(tmp_path, R: int, served: int) -> None:
    model = plain()
    apply(model, r=R, k=0, target_modules="q_proj")

    assert export_to_lora(model, tmp_path / "lora") == served


@pytest.mark.parametrize(
    ("adapter", "asked", "written"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_the_dtype_is_float32_unless_asked_otherwise(tmp_path, adapter, asked, written) -> None:
    model = plain().to(torch.bfloat16)
    apply(model, r=4, k=1, target_modules="q_proj", dtype=adapter)

    export_to_lora(randomize_adapters(model), tmp_path / "lora", dtype=asked)

    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {written}
    layer = model.layers[0].attn.q_proj
    exact = layer.Bt[0].double() * layer.d[-3].double()
    column = tensors["base_model.model.layers.0.attn.q_proj.lora_B.weight"][:, 3]
    assert torch.equal(column, exact.to(written))


def test_a_merged_model_exports_its_adapters(tmp_path) -> None:
    model = trained()
    export_to_lora(model, tmp_path / "apart")
    merge(model)

    export_to_lora(model, tmp_path / "merged")

    apart, merged = ((tmp_path / n / "adapter_model.safetensors") for n in ("apart", "merged"))
    assert apart.read_bytes() == merged.read_bytes()


def peft_model() -> nn.Module:
    import peft

    from rasa_ext.peft import RaSAConfig

    config = RaSAConfig(r=4, k=2, alpha=16, target_modules=["q_proj", "down_proj"])
    return peft.get_peft_model(language_model("llama").double(), config).eval()


def test_a_model_of_peft_exports_its_active_adapter(tmp_path) -> None:
    import peft

    model = randomize_adapters(peft_model())
    ids = tokens(seed=9)

    assert export_to_lora(model, tmp_path / "lora") == 8  # R = 2 + 3 x 2

    lora = peft.PeftModel.from_pretrained(language_model("llama").double(), tmp_path / "lora")
    exact = logits(model, ids)
    assert_accurate(logits(lora.eval(), ids), exact, exact)
    assert (exact - logits(language_model("llama").double(), ids)).norm() > 0.01 * exact.norm()


def test_several_active_adapters_are_not_one_lora(tmp_path) -> None:
    model = peft_model()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])

    with pytest.raises(ValueError) as error:
        export_to_lora(model, tmp_path / "lora")

    assert str(error.value) == (
        "export_to_lora: model.layers.0.self_attn.q_proj must have one active adapter, got "
        "['default', 'second']. Call set_adapter() first"
    )


def one_layer() -> nn.Module:
    return RaSALinear(nn.Linear(4, 4), None, r=2, k=0, alpha=4)


def huge() -> nn.Module:
    model = trained()
    model.layers[0].attn.q_proj.Bt.data[0] = 4.0
    model.layers[0].attn.q_proj.d.data[3] = 3e38
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            plain,
            "adapter_state_dict: the model has no RaSA adapters. Call rasa_ext.apply(model) first",
        ),
        (
            one_layer,
            "export_to_lora: model must hold the adapted layers, got one of them. PEFT names "
            "layers by their place in a model",
        ),
        (
            huge,
            "export_to_lora: base_model.model.layers.0.attn.q_proj.lora_B.weight must be finite, "
            "got 8 of 48 values NaN or inf",
        ),
    ],
)
def test_what_lora_cannot_hold_is_not_written(tmp_path, make, message: str) -> None:
    with pytest.raises(ValueError) as error:
        export_to_lora(make(), tmp_path / "lora")

    assert str(error.value) == message
    assert os.listdir(tmp_path) == []


def test_only_a_new_or_empty_folder_is_filled(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    export_to_lora(trained(), tmp_path / "empty")
    before = (tmp_path / "empty" / "adapter_model.safetensors").read_bytes()

    for taken in ("empty", "file"):
        with pytest.raises(FileExistsError) as error:
            export_to_lora(randomize_adapters(trained(), seed=4), tmp_path / taken)
        assert str(error.value) == (
            f"export_to_lora: {tmp_path / taken} exists. Name a new folder, or delete it first"
        )
    with pytest.raises(FileNotFoundError, match="the folder of .* does not exist"):
        export_to_lora(trained(), tmp_path / "missing" / "lora")

    assert (tmp_path / "empty" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]
