"""RaSA through PEFT on disk: exactly the trained bytes, back to the bit, whole or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import randomize_adapters
from peft_models import (
    GROUPS,
    KINDS,
    adapted,
    assert_same,
    base_model,
    config,
    layers,
    logits,
    pools_of,
    reload,
    since_peft_0_21,
    trained,
    weights,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FILE = "adapter_model.safetensors"


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_saved_bytes_are_trained_bytes(tmp_path, kind: str, k: int) -> None:
    model = adapted(kind, k=k)

    model.save_pretrained(tmp_path)

    tensors, data = load_file(tmp_path / FILE), (tmp_path / FILE).read_bytes()
    assert tensors.keys() == {name.replace(".default", "") for name in trained(model)}
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == size(tensors.values()) == size(trained(model).values())


@since_peft_0_21
def test_the_state_dict_of_an_adapter_holds_its_tensors_and_no_other() -> None:
    model = adapted()
    model.add_adapter("other", config(k=2))

    state = peft.get_peft_model_state_dict(model, adapter_name="other")

    own = {n: p for n, p in model.named_parameters() if n.endswith(".other") or ".other." in n}
    assert state.keys() == {name.replace(".other", "") for name in own}
    assert all(torch.equal(state[name.replace(".other", "")], p) for name, p in own.items())


@since_peft_0_21
def test_each_adapter_has_its_own_folder(tmp_path) -> None:
    model = adapted()
    model.add_adapter("other", config(k=2))
    model.set_adapter("other")
    randomize_adapters(model, seed=5)
    other = logits(model)

    model.save_pretrained(tmp_path)

    first, second = load_file(tmp_path / FILE), load_file(tmp_path / "other" / FILE)
    assert first.keys() == second.keys()
    assert len([name for name in second if "_shared" in name]) == 2 * GROUPS["llama"]
    loaded = reload(tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    assert len(pools_of(loaded, "second")) == 2 * GROUPS["llama"]
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), other)


def test_the_configuration_and_the_model_card_are_peft_s(tmp_path) -> None:
    model = adapted(alpha=8, dropout=0.25, rank_pattern={"q_proj": 3}, bias="none")
    model.save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "adapter_config.json").read_text())

    expected = {"peft_type": "RASA", "r": 4, "k": 1, "alpha": 8, "dropout": 0.25}
    assert expected.items() <= saved.items()
    assert saved["rank_pattern"] == {"q_proj": 3} and saved["inference_mode"] is True
    assert sorted(saved["target_modules"]) == sorted(config().target_modules)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config()) and loaded.to_dict() == saved | {
        "target_modules": config().target_modules
    }
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_reload_is_exact(tmp_path, kind: str, k: int) -> None:
    model = adapted(kind, k=k)
    model.save_pretrained(tmp_path)

    loaded = reload(tmp_path, kind)

    assert_same(weights(loaded), weights(model))
    assert torch.equal(logits(loaded), logits(model))
    assert not trained(loaded) and not loaded.training


@pytest.mark.parametrize("kwargs", [{"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_exact_in_every_way_of_loading(tmp_path, dtype: torch.dtype, kwargs) -> None:
    model = adapted(dtype=dtype)
    model.save_pretrained(tmp_path)

    loaded = reload(tmp_path, dtype=dtype, **kwargs)

    assert_same(weights(loaded), weights(model))
    assert len(pools_of(loaded, "default")) == 2 * GROUPS["llama"]
    assert pools_of(loaded, "default") <= {id(p) for p in loaded.parameters()}
    assert bool(trained(loaded)) == ("is_trainable" in kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {
            "rank_pattern": {r"layers\.1\..*q_proj": 6, "v_proj": 2},
            "alpha_pattern": {"k_proj": 2.0},
        },
        {"layers_to_transform": [0, 2], "exclude_modules": ["o_proj"]},
        {"target_modules": "all-linear", "k": 0},
    ],
    ids=["patterns", "some layers", "all-linear"],
)
def test_reload_is_exact_for_every_choice_of_layers_and_ranks(tmp_path, kwargs) -> None:
    model = adapted(**kwargs)
    model.save_pretrained(tmp_path)

    loaded = reload(tmp_path)

    assert_same(weights(loaded), weights(model))
    assert torch.equal(logits(loaded), logits(model))


def test_16_bit_adapters_come_back_in_16_bits(tmp_path) -> None:
    model = peft.get_peft_model(base_model().bfloat16(), config(), autocast_adapter_dtype=False)
    randomize_adapters(model).eval().save_pretrained(tmp_path)

    for low in (False, True):
        loaded = reload(
            tmp_path, dtype=torch.bfloat16, low_cpu_mem_usage=low, autocast_adapter_dtype=False
        )
        assert_same(weights(loaded), weights(model))


@since_peft_0_21
def test_trained_biases_and_modules_come_back(tmp_path) -> None:
    model = adapted("bert", target_modules=["query"], modules_to_save=["cls"], bias="rasa_only")
    model.save_pretrained(tmp_path)

    loaded = reload(tmp_path, "bert")

    assert_same(weights(loaded), weights(model))


def test_a_whole_state_dict_goes_round() -> None:
    model, other = adapted(), adapted(init_weights=False)

    other.load_state_dict(model.state_dict())

    assert_same(weights(other), weights(model))


SCRIPT = """
import sys
import peft
try:
    peft.PeftModel.from_pretrained(object(), sys.argv[2] + "/llama")
except KeyError as error:
    assert error.args == ("RASA",)
else:
    raise AssertionError("PEFT alone knows RASA")
sys.path.insert(0, sys.argv[1])
import torch
from peft_models import KINDS, base_model, logits
for kind in KINDS:
    folder = sys.argv[2] + "/" + kind
    model = peft.PeftModel.from_pretrained(base_model(kind), folder)
    torch.save({"logits": logits(model), "state": model.state_dict()}, folder + "/result.pt")
"""


def test_a_fresh_process_computes_the_same_once_it_imports_the_plug_in(tmp_path) -> None:
    models = {kind: adapted(kind) for kind in KINDS}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]

    subprocess.run(words, check=True, cwd=tmp_path)

    for kind, model in models.items():
        got = torch.load(tmp_path / kind / "result.pt")
        assert torch.equal(got["logits"], logits(model))
        assert_same(got["state"], weights(model))


def test_importing_rasa_ext_imports_no_peft() -> None:
    code = "import sys, rasa_ext; assert not {'peft', 'transformers'} & sys.modules.keys()"

    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# --- what is refused -----------------------------------------------------------------------------


def broken(folder: Path, change) -> None:
    """Save an adapter and change its tensors."""
    adapted().save_pretrained(folder)
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


POOL = "base_model.rasa_A_shared.self_attn__q_proj__16x16"
A = "base_model.model.model.layers.1.self_attn.q_proj.rasa_A"


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (POOL, None, r"rasa_A_shared.default.* must be \(Rs, K\) = \[3, 16\], got no such tensor"),
        (A, None, r"rasa_A.default must be \(Rp, K\) = \[3, 16\], got no such tensor"),
        (A, torch.zeros(0), r"rasa_A.default must be \(Rp, K\) = \[3, 16\], got \[0\]"),
        (POOL, torch.zeros(0, 16), r"must be \(Rs, K\) = \[3, 16\], got \[0, 16\]"),
        (A.replace("_A", "_d"), torch.zeros(1), r"must be \(Rs \+ Rp\) = \[6\], got \[1\]"),
    ],
    ids=["no pool", "no A", "empty A", "empty pool", "one gate"],
)
def test_an_adapter_that_is_not_all_there_is_refused(tmp_path, key, tensor, message) -> None:
    def change(tensors) -> None:
        tensors.pop(key)
        if tensor is not None:
            tensors[key] = tensor

    broken(tmp_path, change)
    model = adapted(init_weights=False)
    before = weights(model)

    with pytest.raises(ValueError, match=message):
        reload(tmp_path)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")

    assert_same(weights(model), before)


def test_an_adapter_of_another_k_is_refused(tmp_path) -> None:
    adapted(k=2).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"must be \(Rp, K\) = \[3, 16\], got \[2, 16\]; 76 more"):
        adapted().load_adapter(tmp_path, "default")


def test_a_truncated_file_is_refused(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-8])

    with pytest.raises(SafetensorError):
        reload(tmp_path)


@since_peft_0_21
def test_what_could_not_be_loaded_is_not_saved(tmp_path) -> None:
    model = adapted()
    layer = layers(model)[0]
    # What DeepSpeed's ZeRO-3 leaves of a parameter outside its own context.
    layer.rasa_A["default"].data = torch.empty(0)

    with pytest.raises(ValueError, match=r"save_pretrained.* \[3, 16\], got \[0\].*Gather"):
        model.save_pretrained(tmp_path)

    assert not (tmp_path / FILE).exists()
