"""examples/finetune.py under torchrun: what one process computes, and resumed when stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stopped_finetune
import torch
from hf_models import byte_llama
from safetensors.torch import load_file

FINETUNE = str(Path(__file__).resolve().parent.parent / "examples" / "finetune.py")
STOPPED = stopped_finetune.__file__
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ARGUMENTS = ["--steps", "7", "--batch-size", "4", "--seq-len", "500", "--eval-problems", "2"]
ARGUMENTS += ["--answer-problems", "1", "--lr", "1e-2", "--layers", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("tiny_llama"))


def start(words: list[str], model_folder: Path, output: Path, *more: str):
    command = [sys.executable, *words, "--model", model_folder, "--output", output, *ARGUMENTS]
    # As many threads as torchrun gives, on which the last bits of a matrix product depend.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*map(str, command), *more]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def run(words: list[str], model_folder: Path, output: Path, *more: str) -> str:
    done = start(words, model_folder, output, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_run(one: Path, other: Path) -> None:
    """Every loss and every trained value is the same, bit by bit."""
    losses = [json.loads((f / "report.json").read_text())["losses"] for f in (one, other)]
    assert len(losses[0]) == 7 and losses[0] == losses[1]
    tensors = [load_file(f / "adapter.safetensors") for f in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_two_processes_train_what_one_accumulates(model_folder, tmp_path) -> None:
    options = ["--dropout", "0"]  # each process draws masks of its own

    run([FINETUNE], model_folder, tmp_path / "one", *options, "--accumulate", "2")
    printed = run([*TORCHRUN, FINETUNE], model_folder, tmp_path / "two", *options)

    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert printed.count("Exported to") == 1  # one process prints


OPTIONS = ["--dropout", "0.1", "--accumulate", "2"]


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory) -> Path:
    """The folder of a run of two processes that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run([*TORCHRUN, FINETUNE], model_folder, output, *OPTIONS)
    return output


def test_a_run_with_a_killed_process_resumes_to_the_same_result(whole, model_folder, tmp_path):
    killed = start([*TORCHRUN, STOPPED, "SIGKILL"], model_folder, tmp_path, *OPTIONS)
    step = torch.load(tmp_path / "training_state.pt", weights_only=True)["step"]
    printed = run([*TORCHRUN, FINETUNE], model_folder, tmp_path, *OPTIONS, "--resume")

    assert killed.returncode != 0 and step == 4
    assert "Resuming after step 4 of 7" in printed
    assert_same_run(whole, tmp_path)


# Of a signal torchrun tells every process, and waits 30 s for them to end.
@pytest.mark.parametrize(
    ("event", "step"), [("SIGINT", 4), ("SIGTERM", 4), ("SIGINT@evaluation", 0)]
)
def test_stopping_torchrun_saves_what_was_trained(event, step, whole, model_folder, tmp_path):
    stopped = start([*TORCHRUN, STOPPED, event], model_folder, tmp_path, *OPTIONS)
    printed = run([*TORCHRUN, FINETUNE], model_folder, tmp_path, *OPTIONS, "--resume")

    assert stopped.returncode != 0
    name = event.partition("@")[0]
    expected = (
        f"{name}: saved after step {step} of 7. Continue with\n    torchrun --nproc-per-node=2"
    )
    assert stopped.stdout.count(expected) == 1 and "--resume" in stopped.stdout
    assert stopped.stderr.count("Traceback") == 1  # torchrun's own
    assert f"Resuming after step {step} of 7" in printed
    assert_same_run(whole, tmp_path)


def test_another_number_of_processes_is_refused(model_folder, tmp_path) -> None:
    run([FINETUNE], model_folder, tmp_path / "run", "--steps", "1")

    refused = start([*TORCHRUN, FINETUNE], model_folder, tmp_path / "run", "--steps=1", "--resume")

    assert refused.returncode != 0
    assert "was trained with --nproc-per-node 1, got 2. Resume with the same" in refused.stderr


def test_every_process_needs_a_problem(model_folder, tmp_path) -> None:
    refused = start([FINETUNE], model_folder, tmp_path / "run", "--accumulate", "5")

    assert refused.returncode == 1
    assert refused.stderr == (
        "finetune: --batch-size must be at least processes x --accumulate = 1 x 5 = 5, got 4\n"
    )
