"""Adapters on disk: exact, small, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import stat

import pytest
import torch
from models import LAYER, PROJECTIONS, plain, randomize_adapters, trainable, trained
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from rasa_ext.injection import apply
from rasa_ext.module import RaSALinear, SharedPool
from rasa_ext.weights import adapter_state_dict, load_adapter, save_adapter

# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_adapter_is_exactly_what_trains(k: int) -> None:
    model = trained(k=k)

    state = adapter_state_dict(model)

    assert state.keys() == trainable(model).keys()
    assert all(
        torch.equal(state[n], p) and not state[n].requires_grad for n, p in trainable(model).items()
    )


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("naming", ["layers", "transformer.h"])
def test_a_plain_model_loads_to_the_same_function(tmp_path, k: int, naming: str) -> None:
    model, path = trained(k=k, naming=naming), tmp_path / "adapter.safetensors"
    x = torch.randn(3, 8)
    save_adapter(model, path)
    fresh = plain(naming)

    summary = load_adapter(fresh, str(path))

    assert torch.equal(fresh(x), model(x))
    assert summary.trainable == sum(p.numel() for p in trainable(model).values())
    assert trainable(fresh).keys() == trainable(model).keys()


def test_an_adapted_model_loads_to_the_same_function(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = trained(alpha=8, dropout=0.5)
    save_adapter(model, path)
    other = randomize_adapters(trained(alpha=32, dropout=0.1), seed=9).eval()
    pointers = [p.data_ptr() for p in other.parameters()]

    load_adapter(other, path)

    x = torch.randn(3, 8)
    assert torch.equal(other(x), model.eval()(x))
    assert [p.data_ptr() for p in other.parameters()] == pointers
    layer = other.layers[0].attn.q_proj
    assert (layer.alpha, layer.dropout) == (8.0, 0.1)


def test_saved_bytes_are_trained_bytes(tmp_path) -> None:
    model, path = trained(), tmp_path / "adapter.safetensors"
    save_adapter(model, path)

    tensors = load_file(path)

    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    bytes_trained = sum(p.numel() * p.element_size() for p in trainable(model).values())
    assert tensors.keys() == trainable(model).keys()
    assert path.stat().st_size == header + bytes_trained


def test_the_file_says_how_to_apply_it(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(r=6, k=2, alpha=12, dropout=0.25), path)

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    assert (metadata["format"], metadata["rasa_ext"]) == ("pt", "1")
    assert json.loads(metadata["config"]) == {
        "r": 6,
        "k": 2,
        "alpha": 12.0,
        "target_modules": sorted(PROJECTIONS),
        "dropout": 0.25,
        "dtype": "float32",
    }


def test_a_partly_adapted_model_is_described_by_whole_names(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = trained(target_modules=["0.attn.q_proj", "1.attn.q_proj"])
    save_adapter(model, path)
    fresh = plain()

    load_adapter(fresh, path)

    assert type(fresh.layers[2].attn.q_proj) is nn.Linear
    assert torch.equal(fresh(torch.ones(1, 8)), model(torch.ones(1, 8)))


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_adapter_keeps_its_dtype(tmp_path, base: torch.dtype, adapter: torch.dtype) -> None:
    path = tmp_path / "adapter.safetensors"
    model = plain().to(base)
    apply(model, r=4, k=1, target_modules="q_proj", dtype=adapter)
    save_adapter(randomize_adapters(model), path)
    fresh = plain().to(base)

    load_adapter(fresh, path)

    assert {t.dtype for t in load_file(path).values()} == {adapter}
    assert all(torch.equal(trainable(fresh)[n], p) for n, p in trainable(model).items())


def test_compiled_models_save_and_load_under_plain_names(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = trained()
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    compiled = torch.compile(model, backend="eager")
    save_adapter(compiled, path)
    fresh = plain()

    load_adapter(fresh, path)
    load_adapter(compiled, path)

    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), model(x))


def test_views_of_one_storage_are_saved(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = trained()
    layer = model.layers[0].attn.q_proj
    flat = torch.cat([layer.A.detach().flatten(), layer.Bt.detach().flatten()])
    layer.A.data, layer.Bt.data = flat[:24].view(3, 8), flat[24:].view(3, 8)

    save_adapter(model, path)

    assert torch.equal(load_file(path)[f"{LAYER}.Bt"], layer.Bt)


def test_a_model_put_together_by_hand_saves_and_loads(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"

    def by_hand() -> nn.Module:
        model = plain(num_layers=2).requires_grad_(False)
        model.my_pool = SharedPool(8, 8, 1, 2)
        for block in model.layers:
            block.attn.q_proj = RaSALinear(block.attn.q_proj, model.my_pool, 4, 1, 16)
        return model

    model, other = randomize_adapters(by_hand()), by_hand()
    save_adapter(model, path)

    load_adapter(other, path)

    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


# --- a save is whole or nothing ------------------------------------------------------------------


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "rasa_ext.weights.save"])
def test_a_failed_save_leaves_the_previous_file(tmp_path, monkeypatch, broken: str) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    before = path.read_bytes()
    model = randomize_adapters(trained(), seed=4)
    monkeypatch.setattr(broken, fail)

    with pytest.raises(OSError) as error:
        save_adapter(model, path)

    assert str(error.value) == (
        f"save_adapter: {path} could not be written and is as it was: [Errno 28] No space left on "
        "device"
    )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter.safetensors"]


def test_an_interrupted_save_leaves_the_previous_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    before = path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(randomize_adapters(trained(), seed=4), path)

    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter.safetensors"]


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    events = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))

    save_adapter(trained(), tmp_path / "adapter.safetensors")

    assert events == ["fsync", "replace", "fsync"]


def test_a_saved_file_is_as_readable_as_any_new_file(tmp_path) -> None:
    path, other = tmp_path / "adapter.safetensors", tmp_path / "other"
    save_adapter(trained(), path)
    other.write_bytes(b"")

    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_link_to_the_file_stays_a_link(tmp_path) -> None:
    link, path = tmp_path / "latest", tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    link.symlink_to(path)

    save_adapter(randomize_adapters(trained(), seed=4), link)

    assert link.is_symlink()
    assert torch.equal(load_file(path)[f"{LAYER}.A"], load_file(link)[f"{LAYER}.A"])


def shrunk() -> nn.Module:
    """A model as ZeRO-3 leaves it between steps: its parameters are empty."""
    model = trained()
    model.layers[0].attn.q_proj.A.data = torch.empty(0)
    return model


def nan() -> nn.Module:
    model = trained()
    model.layers[0].attn.q_proj.d.data[1] = math.nan
    return model


def unregistered() -> nn.Module:
    model = trained(target_modules="q_proj")
    del model.rasa_pools
    return model


def two_configs() -> nn.Module:
    model = trained()
    model.layers[0].attn.q_proj.alpha = 8.0
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            plain,
            "adapter_state_dict: the model has no RaSA adapters. Call rasa_ext.apply(model) first",
        ),
        (
            shrunk,
            f"adapter_state_dict: {LAYER}.A must be (Rp, K) = [3, 8], got [0]. Gather sharded "
            "parameters first",
        ),
        (nan, f"save_adapter: {LAYER}.d must be finite, got 1 of 6 values NaN or inf"),
        (
            unregistered,
            f"adapter_state_dict: the pool of {LAYER} belongs to no module of the model, so "
            "state_dict() and optimizers miss it. Register it on the root once",
        ),
        (
            two_configs,
            "save_adapter: the layers must have one (k, alpha, dropout, gates), got "
            "(1, 8.0, 0.0, False), (1, 16.0, 0.0, False). Save adapter_state_dict(model) instead",
        ),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path, make, message: str) -> None:
    path = tmp_path / "adapter.safetensors"

    with pytest.raises(ValueError) as error:
        save_adapter(make(), path)

    assert str(error.value) == message
    assert os.listdir(tmp_path) == []


def test_a_folder_is_no_file(tmp_path) -> None:
    missing = tmp_path / "missing" / "adapter.safetensors"

    with pytest.raises(IsADirectoryError) as error:
        save_adapter(trained(), tmp_path)
    assert str(error.value) == f"save_adapter: {tmp_path} is a folder; name a file in it"
    with pytest.raises(FileNotFoundError) as error:
        save_adapter(trained(), missing)
    assert str(error.value) == f"save_adapter: the folder of {missing} does not exist"
    with pytest.raises(IsADirectoryError) as error:
        load_adapter(trained(), tmp_path)
    assert str(error.value) == f"load_adapter: {tmp_path} is a folder; name the file in it"
    with pytest.raises(FileNotFoundError) as error:
        load_adapter(trained(), missing)
    assert str(error.value) == f"load_adapter: {missing} does not exist"
