"""DDP, FSDP1 and FSDP2 train and save what one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distributed_training
import pytest
import torch
from distributed_training import DTYPES, ENGINES, PROCESSES, initial, train, write_initial
from hf_models import authors_model, language_model, logits, tokens
from models import plain, snapshot, trained
from reference import assert_accurate
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rasa_ext.export import export_to_lora
from rasa_ext.injection import apply
from rasa_ext.weights import adapter_state_dict, load_adapter

RUNS = [(e, d) for d in DTYPES for e in ENGINES if (e, d) != ("fsdp1", "bfloat16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes wrote, in a folder for each dtype."""
    root = tmp_path_factory.mktemp("distributed")
    for name, dtype in DTYPES.items():
        (root / name).mkdir()
        write_initial(dtype, root / name)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    words = [sys.executable, *launch, distributed_training.__file__, str(root)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[dict[str, Tensor]]]:
    """By dtype, what one process trains on all rows: exactly, in plain torch, and with the ops."""
    runs = {}
    for name, dtype in DTYPES.items():
        exact = authors_model(initial(dtype, folder / name).double())
        models = [
            exact,
            authors_model(initial(dtype, folder / name)),
            initial(dtype, folder / name),
        ]
        for model in models:
            train(model, slice(None))
        runs[name] = [adapter_state_dict(model) for model in models]
    return runs


@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_two_processes_train_what_one_does(folder, alone, engine, dtype, capsys) -> None:
    exact, in_plain_torch, with_the_ops = alone[dtype]

    out = load_file(folder / dtype / f"{engine}-trained.safetensors")

    before = load_file(folder / dtype / "initial.safetensors")
    assert out.keys() == exact.keys()
    for name, tensor in out.items():
        assert_accurate(tensor, in_plain_torch[name], exact[name], name, dtype=DTYPES[dtype])
        assert not torch.equal(tensor, before[name])
    worst = max((out[name] - with_the_ops[name]).abs().max().item() for name in out)
    with capsys.disabled():
        print(f"\n{engine}, {dtype}: largest difference to one process {worst:.1e}")


@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_a_sharded_save_is_the_full_save(folder, engine: str, dtype: str) -> None:
    full = contents(folder / dtype / "initial.safetensors")

    names = ["untrained", "reloaded"] if engine == "fsdp2" else ["untrained"]

    for name in names:
        assert contents(folder / dtype / f"{engine}-{name}.safetensors") == full


def contents(path: Path) -> tuple:
    """Return a file's metadata, whose order safetensors leaves open, and its tensors' bytes."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return metadata, {n: (t.dtype, t.numpy().tobytes()) for n, t in load_file(path).items()}


def test_a_sharded_export_is_the_full_export(folder, tmp_path) -> None:
    model = language_model("llama").double()
    load_adapter(model, folder / "float64" / "fsdp2-trained.safetensors")

    export_to_lora(model, tmp_path / "lora")

    for file in ("adapter_model.safetensors", "adapter_config.json"):
        sharded = folder / "float64" / "fsdp2-lora" / file
        assert sharded.read_bytes() == (tmp_path / "lora" / file).read_bytes()


def test_what_was_trained_sharded_runs_alone(folder) -> None:
    models = [language_model("llama").double() for _ in ENGINES]
    for model, engine in zip(models, ENGINES, strict=True):
        load_adapter(model, folder / "float64" / f"{engine}-trained.safetensors")

    outs = [logits(model, tokens()) for model in models]

    exact = logits(authors_model(models[0]), tokens())
    for out in outs:
        assert_accurate(out, exact, exact)


# --- ZeRO-3 and FSDP2, by what they leave of a parameter ------------------------------------------


def partitioned(model: nn.Module) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
        parameter.data = torch.empty(0)
    return model


def test_a_partitioned_model_is_refused() -> None:
    model = partitioned(plain())
    before = snapshot(model)

    with pytest.raises(ValueError) as error:
        apply(model, target_modules="q_proj")

    assert snapshot(model) == before
    assert str(error.value) == (
        "apply: layers.0.attn.q_proj.weight is partitioned by DeepSpeed ZeRO-3, which gathers a "
        "module's own parameters only, and layers use their pool's. Use ZeRO-2, or FSDP"
    )


def test_a_sharded_model_is_refused() -> None:
    model = plain()
    model.head.weight.full_tensor = model.head.weight.detach  # as a DTensor has it
    before = snapshot(model)

    with pytest.raises(ValueError) as error:
        apply(model, target_modules="q_proj")

    assert snapshot(model) == before
    assert str(error.value) == (
        "apply: head.weight is sharded already, and adapters put in now would be no part of that: "
        "their gradients would differ between processes. Adapt the model, then shard"
    )


def test_a_pool_that_is_not_gathered_is_refused() -> None:
    model = trained()
    partitioned(model.rasa_pools)

    with pytest.raises(RuntimeError) as error:
        model(torch.randn(3, 8))

    assert str(error.value) == (
        "RaSALinear: the pool's A_shared must be (Rs, K) while a layer runs, got [0]. DeepSpeed "
        "ZeRO-3 gathers a module's own parameters only: use ZeRO-2, or FSDP with the pools in the "
        "root's unit"
    )
