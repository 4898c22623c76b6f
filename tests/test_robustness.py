"""`make robustness` itself: it finds what is wrong, and says so."""

import json
import stat
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "robustness"), str(HERE.parent / "benchmarks")]

import fuzz_ops  # noqa: E402
import mutate_adapters  # noqa: E402
import run as robustness  # noqa: E402
import tables  # noqa: E402
from trials import LayerTrial  # noqa: E402

import rasa_ext  # noqa: E402


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


def test_random_calls_end_as_specified(deterministic):
    outcomes = fuzz_ops.run_batch(0, 32)
    assert sum(outcomes.values()) == 32 and outcomes["WRONG"] == 0
    assert {name.split()[0] for name in outcomes if outcomes[name]} == {
        *("rasa_linear", "rasa_add", "grouped_gemm", "rasa_merge_")
    }


def test_a_wrong_result_is_found(deterministic, monkeypatch):
    call = LayerTrial.call
    monkeypatch.setattr(LayerTrial, "call", lambda *a: [y * 1.5 for y in call(*a)])
    assert fuzz_ops.run_batch(0, 32)["WRONG"] > 0


def test_a_crash_is_found_and_named(monkeypatch, tmp_path, capsys):
    crashing = tmp_path / "crash.py"
    crashing.write_text("import os, sys; print(7, file=sys.stderr, flush=True); os.abort()")
    monkeypatch.setattr(fuzz_ops, "__file__", str(crashing))
    assert fuzz_ops.run(5, 0) == {"CRASH": 1}
    assert "trial 7: the process ended with -6" in capsys.readouterr().out


def test_damaged_files_end_as_specified():
    outcomes = mutate_adapters.run(60, 0)
    assert sum(outcomes.values()) == 60 and outcomes["WRONG"] == 0
    assert {name.rpartition(" ")[2] for name in outcomes if outcomes[name]} == {"loaded", "refused"}


def test_a_refusal_that_writes_is_found(monkeypatch):
    def load(root, path):
        next(root.parameters()).data.add_(1)
        raise ValueError("too late")

    monkeypatch.setattr(rasa_ext, "load_adapter", load)
    assert mutate_adapters.run(5, 0) == {"WRONG": 5}


def test_a_load_of_other_numbers_is_found(monkeypatch):
    load = rasa_ext.load_adapter

    def doubled(root, path):
        load(root, path)
        for parameter in root.parameters():
            parameter.data.mul_(2)

    monkeypatch.setattr(rasa_ext, "load_adapter", doubled)
    outcomes = mutate_adapters.run(60, 0)
    assert outcomes["WRONG"] > 0
    assert not any(name.endswith("loaded") for name in outcomes if outcomes[name])


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ({"op right": 3}, "as specified"),
        ({"op right": 3, "WRONG": 1, "CRASH": 1}, "2 wrong"),
        ({}, "nothing tried"),
    ],
)
def test_verdict_of_counts(outcomes, verdict):
    assert robustness.counted(Counter(outcomes))["verdict"] == verdict


def sanitize_script(folder, body):
    script = folder / "sanitize"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_verdict_of_the_sanitizers(tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "HERE", tmp_path)
    sanitize_script(tmp_path, "echo '12 passed in 3s'; echo '2000 calls: {}'")
    assert robustness.sanitized() == {"tests": 12, "calls": 2000, "verdict": "clean"}
    sanitize_script(tmp_path, "echo '12 passed in 3s'; exit 1")
    assert robustness.sanitized()["verdict"] == "ended with 1"


@pytest.mark.parametrize("verdict", ["flat", "9 live tensors more"])
def test_command_fails_if_a_part_does(verdict, tmp_path, monkeypatch, capsys):
    path = tmp_path / "robustness.json"
    words = ["run.py", "--json", path, "--calls", 4, "--files", 4]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.setattr(robustness.soak, "run", lambda steps: {"steps": steps, "verdict": verdict})
    assert robustness.main() == int(verdict != "flat")
    assert json.loads(path.read_text())["calls"]["tried"] == 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"robustness: {'passed' if verdict == 'flat' else 'FAILED: soak'}"


def test_tables_count_every_ending():
    outcomes = {"op right": 3, "op special values": 2, "op refused": 1000, "WRONG": 1, "CRASH": 2}
    files = {"header bits refused": 5, "bits loaded": 4}
    record = {"calls": {"outcomes": outcomes}, "files": {"outcomes": files}}
    rows = [line.split("|")[1:-1] for line in tables.input_table(record).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["call of CRASH", "2", "0", "0", "0", "2"],
        ["call of WRONG", "1", "0", "0", "0", "1"],
        ["call of op", "1,005", "3", "2", "1,000", "0"],
        ["adapter file: bits", "4", "4", "0", "0", "0"],
        ["adapter file: header bits", "5", "0", "0", "5", "0"],
    ]
