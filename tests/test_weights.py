"""Adapters on disk: exact, small, whole or not at all; and merged into a model."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import stat

import pytest
import torch
from models import PROJECTIONS, Int8Linear, TinyModel, randomize_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rasa_ext.injection import apply
from rasa_ext.module import RaSALinear, SharedPool
from rasa_ext.weights import adapter_state_dict, load_adapter, merge, save_adapter, unmerge

POOL = "rasa_pools.attn__q_proj__8x8"
LAYER = "layers.0.attn.q_proj"


def plain(naming: str = "layers", **kwargs) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(naming, **kwargs)


def trained(r: int = 4, k: int = 1, naming: str = "layers", **kwargs) -> TinyModel:
    model = plain(naming)
    apply(model, r=r, k=k, target_modules=kwargs.pop("target_modules", PROJECTIONS), **kwargs)
    return randomize_adapters(model)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> list:
    """All that must not change: modules, values to the bit, and who trains."""
    modules = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    tensors = [(n, p.detach().numpy().tobytes()) for n, p in model.named_parameters()]
    return [modules, tensors, [p.requires_grad for p in model.parameters()]]


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
            "save_adapter: the layers must have one (r, k, alpha, dropout), got (4, 1, 8.0, 0.0), "
            "(4, 1, 16.0, 0.0). Save adapter_state_dict(model) instead",
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


# --- a file that does not fit is refused and the model stays as it was ---------------------------


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


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_merged_model_computes_the_same_and_unmerges_exactly(k: int) -> None:
    model = trained(k=k).double().eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    before, bits = model(x), snapshot(model)

    merge(model)

    torch.testing.assert_close(model(x), before)
    assert all(m.merged for m in model.modules() if isinstance(m, RaSALinear))
    unmerge(model)
    assert snapshot(model) == bits
    assert torch.equal(model(x), before)


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
