"""What load_adapter refuses. Each refusal leaves the model as it was, to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from models import LAYER, POOL, plain, randomize_adapters, snapshot, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rasa_ext.weights import load_adapter, merge, save_adapter


def refuse(model: nn.Module, path, kind: type = ValueError) -> str:
    before = snapshot(model)
    with pytest.raises(kind) as error:
        load_adapter(model, path)
    assert snapshot(model) == before
    return str(error.value)


def rewrite(path, change) -> None:
    """Write the file again after `change(tensors, metadata)`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def set_tensor(key: str, change):
    return lambda tensors, metadata: tensors.update({key: change(tensors[key])})


def set_config(**changes):
    def change(tensors, metadata) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)

    return change


def with_nan(tensor: Tensor) -> Tensor:
    tensor[0, 0], tensor[1, 1] = math.nan, math.inf
    return tensor


TENSOR_REFUSALS = [
    (
        set_tensor(f"{LAYER}.A", lambda t: t[:, :7].contiguous()),
        f"{LAYER}.A must be (Rp, K) = [3, 8], got [3, 7]",
    ),
    (
        set_tensor(f"{LAYER}.Bt", lambda t: t[:0]),
        f"{LAYER}.Bt must be (Rp, N) = [3, 8], got [0, 8]",
    ),
    (
        set_tensor(f"{LAYER}.d", lambda t: torch.empty(0)),
        f"{LAYER}.d must be (Rs + Rp) = [6], got [0]",
    ),
    (
        set_tensor(f"{POOL}.A_shared", lambda t: t[1:].contiguous()),
        f"{POOL}.A_shared must be (Rs, K) = [3, 8], got [2, 8]",
    ),
    (
        set_tensor(f"{POOL}.Bt_shared", lambda t: t.double()),
        f"{POOL}.Bt_shared must be torch.float32, got torch.float64",
    ),
    (
        lambda tensors, metadata: tensors.pop(f"{LAYER}.d"),
        f"{LAYER}.d must be (Rs + Rp) = [6], got no such tensor",
    ),
    (
        lambda tensors, metadata: tensors.update(extra=torch.ones(2, 3)),
        "extra is unknown to the model, got shape [2, 3]",
    ),
]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("change", "message"), TENSOR_REFUSALS)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message: str, adapted: bool) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    rewrite(path, change)

    error = refuse(randomize_adapters(trained(), seed=9) if adapted else plain(), path)

    assert error == f"load_adapter: {path} does not fit the model: {message}"


@pytest.mark.parametrize("adapted", [False, True])
def test_values_that_are_not_finite_are_refused(tmp_path, adapted: bool) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    rewrite(path, set_tensor(f"{POOL}.A_shared", with_nan))

    error = refuse(trained() if adapted else plain(), path)

    assert error == f"load_adapter: {POOL}.A_shared must be finite, got 2 of 24 values NaN or inf"


def test_a_model_of_another_size_is_refused(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)

    assert refuse(plain(width=16), path) == (
        f"load_adapter: {path} does not fit the model: layers.0.attn.q_proj.A must be (Rp, K) = "
        "[3, 16], got [3, 8]; 29 more do not fit"
    )
    assert refuse(trained(r=5), path) == (
        f"load_adapter: {path} does not fit the model: layers.0.attn.q_proj.A must be (Rp, K) = "
        "[4, 8], got [3, 8]; 26 more do not fit"
    )


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep: int) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    path.write_bytes(path.read_bytes()[:keep])

    for model in (plain(), trained()):
        error = refuse(model, path)
        assert error.startswith(f"load_adapter: {path} is damaged, or is not a safetensors file: ")


def test_a_corrupted_header_is_refused(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    data = bytearray(path.read_bytes())
    data[10:14] = b"\xff\xff\xff\xff"
    path.write_bytes(data)

    assert "is damaged, or is not a safetensors file" in refuse(plain(), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, metadata: metadata.pop("rasa_ext"),
            "was not written by save_adapter; this version reads format 1",
        ),
        (
            lambda tensors, metadata: metadata.update(rasa_ext="2"),
            "has format 2; this version reads format 1",
        ),
        (
            lambda tensors, metadata: metadata.pop("config"),
            "has no usable config in its metadata: JSONDecodeError('Expecting value: line 1 column "
            "1 (char 0)')",
        ),
        (
            lambda tensors, metadata: metadata.update(config="{}"),
            "has no usable config in its metadata: KeyError('dtype')",
        ),
        (
            set_config(r=0),
            "has no usable config in its metadata: ValueError('config: r must be an integer of at "
            "least 1, got 0')",
        ),
        (
            set_config(dtype="nn"),
            'has no usable config in its metadata: ValueError("dtype must be a torch dtype, got '
            "'nn'\")",
        ),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, change, message: str) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    rewrite(path, change)

    for model in (plain(), trained()):
        assert refuse(model, path) == f"load_adapter: {path} {message}"


def test_a_plain_model_without_the_targets_is_refused(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)

    assert refuse(nn.Sequential(nn.Linear(8, 8)), path) == (
        "apply: no module is named 'down_proj', 'q_proj', 'v_proj'. Linear layers of this model: 0"
    )


def test_an_alpha_that_no_tensor_carries_must_agree(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(k=0, alpha=8), path)

    assert refuse(trained(k=0, alpha=16), path) == (
        f"load_adapter: alpha must be 16 as in {LAYER}, got 8; with k = 0 it is no trained weight"
    )


def test_a_merged_model_is_not_loaded_into(tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = trained()
    save_adapter(model, path)
    merge(model)

    assert refuse(model, path, RuntimeError) == (
        f"load_adapter: {LAYER} is merged. Call unmerge(model) first"
    )
    save_adapter(model, path)
    load_adapter(plain(), path)
