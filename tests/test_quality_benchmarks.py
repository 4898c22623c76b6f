"""The quality benchmarks, with a tiny random Llama: what they run, choose, keep and print."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hf_models import byte_llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import code_problems  # noqa: E402
import finetune_quality  # noqa: E402
import l1ra  # noqa: E402
import reconstruction  # noqa: E402
import training_runs  # noqa: E402
from evaluation import answer_loss  # noqa: E402

SMALL = ["--layers", 2, "--steps", 4, "--batch-size", 2, "--gsm-tokens", 500, "--dtype", "fp32"]
SMALL += ["--code-tokens", 500, "--r", 4, "--seeds", 2, "--test-problems", 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return training_runs.load_tokenizer(folder)


def run(module, monkeypatch, folder, path, *words):
    command = [module.__file__, "--model", folder, "--json", path, *SMALL, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    module.main()
    return json.loads(path.read_text())


def options(**more):
    values = {"steps": 3, "batch_size": 2, "gsm_tokens": 500, "code_tokens": 500}
    values |= {"validation_problems": 2, "test_problems": 3}
    return argparse.Namespace(**(values | more))


def texts(tokenizer, batch):
    pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
    return {tokenizer.decode(ids[mask == 1]) for ids, mask in pairs}


def test_l1ra_command_moves_ranks_within_its_budgets(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "l1ra.json"
    # Half of the gates' way to zero in a step: ranks are pruned at once.
    words = ["--l1", 1, "--gate-lr", 0.5]
    record = run(l1ra, monkeypatch, folder, path, *words)
    runs = {(run["method"], run["seed"]): run for run in record["runs"]}
    assert set(runs) == {(method, seed) for method in l1ra.METHODS for seed in (0, 1)}
    lora, moved = runs["lora", 0], runs["l1ra", 0]
    assert set(lora["ranks"].values()) == {4}
    assert sum(moved["ranks"].values()) <= sum(lora["ranks"].values())
    assert set(moved["ranks"].values()) != {4}
    by_parameters = runs["l1ra, parameters", 0]
    assert by_parameters["parameters"] <= by_parameters["parameters_at_start"]
    assert 0 < moved["allocator_share"] < 1 and lora["allocator_share"] == 0
    assert moved["totals"][-1]["ranks"] == sum(moved["ranks"].values())
    assert path.with_suffix(".png").stat().st_size > 0
    assert "| l1ra, parameters |" in capsys.readouterr().out


def test_stopped_benchmark_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    path = tmp_path / "l1ra.json"
    record = run(l1ra, monkeypatch, folder, path, "--seeds", 1)

    def no_more(*args):
        raise AssertionError("a finished run was repeated")

    with monkeypatch.context() as patch:
        patch.setattr(l1ra, "measure", no_more)
        assert run(l1ra, patch, folder, path, "--seeds", 1)["runs"] == record["runs"]
    more = run(l1ra, monkeypatch, folder, path, "--seeds", 2)["runs"]
    assert more[: len(record["runs"])] == record["runs"]
    assert len(more) == 2 * len(record["runs"])
    with pytest.raises(SystemExit, match="l1ra.json holds runs with .*Name another file with"):
        run(l1ra, monkeypatch, folder, path, "--lr", 1)


def test_finetune_command_runs_all_rates_then_all_seeds_at_the_best(
    folder, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "quality.json"
    words = ["--lr", 1e-2, 1e-9, "--validation-problems", 2]
    record = run(finetune_quality, monkeypatch, folder, path, *words)
    cells = [(r["dataset"], r["method"], r["lr"], r["seed"]) for r in record["runs"]]
    both = [(d, m) for d in training_runs.DATASETS for m in finetune_quality.METHODS]
    assert set(cells) == {(*cell, *at) for cell in both for at in ((1e-2, 0), (1e-9, 0), (1e-2, 1))}
    parameters = {r["method"]: r["parameters"] for r in record["runs"]}
    gates = 7 * 2 * (2 + 3)  # seven kinds, two layers, Rs = 2 and Rp = 3
    assert parameters["rasa"] == parameters["lora"] + gates
    printed = capsys.readouterr().out
    assert "| code rasa − lora" in printed and "R = 5" in printed
    assert path.with_suffix(".png").stat().st_size > 0


def test_a_rate_that_diverges_is_not_chosen(monkeypatch, tmp_path):
    def measure(dataset, method, lr, seed, folder, args):
        return {"validation": math.nan if lr == 1 else 2.0}

    monkeypatch.setattr(finetune_quality, "measure", measure)
    file = training_runs.RunFile(tmp_path / "runs.json", {})
    args = argparse.Namespace(datasets=["code"], lr=[1, 0.1], seeds=1)
    results = finetune_quality.run_all(file, tmp_path, args)
    assert results["code"]["lora"]["lr"] == results["code"]["rasa"]["lr"] == 0.1


@pytest.mark.parametrize("dataset", training_runs.DATASETS)
def test_seeds_share_the_held_out_problems_and_no_problem_is_in_two_parts(
    dataset, folder, tokenizer
):
    parts = []
    for seed in (0, 1, 1):
        data = training_runs.load_problems(dataset, folder, seed, options())
        training = [data.training(step) for step in range(3)]
        held_out = [data.validation, data.test]
        parts.append(
            [set().union(*(texts(tokenizer, b) for b in p)) for p in (training, *held_out)]
        )
    first, second, again = parts
    assert first[1:] == second[1:] and [len(part) for part in first[1:]] == [2, 3]
    assert first[0] != second[0] and second == again
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not first[a] & first[b]


def test_code_problems_train_on_the_canonical_solution(tokenizer):
    examples = code_problems.code_examples(tokenizer, 700)
    assert len(examples) > 40
    for example in examples:
        text = tokenizer.decode(example.prompt + example.answer[:-1])
        assert text == example.entry["prompt"] + example.entry["canonical_solution"]
        assert example.answer[-1] == tokenizer.eos_token_id
        assert len(example.prompt) + len(example.answer) <= 700


def test_an_epoch_has_every_problem_once():
    drawn = code_problems.epochs(list(range(5)), 12, seed=1)
    assert len(drawn) == 12 and set(drawn[:5]) == set(drawn[5:10]) == set(range(5))
    assert drawn != code_problems.epochs(list(range(5)), 12, seed=2)


def test_too_many_held_out_code_problems_are_refused(folder):
    with pytest.raises(SystemExit, match="must leave HumanEval problems to train on, got 403 of"):
        training_runs.load_problems("code", folder, 0, options(validation_problems=400))


def test_loss_of_the_answers_alone_is_that_of_the_whole_output(folder):
    model = training_runs.load(folder, options(layers=2, dtype="fp32", device="cpu")).eval()
    batch = training_runs.load_problems("code", folder, 0, options()).training(0)
    ours, count = training_runs.answer_loss(model, batch)
    whole, same_count = answer_loss(model, batch)
    assert count == same_count
    torch.testing.assert_close(ours, whole)


def test_update_is_what_full_training_adds(folder, monkeypatch):
    monkeypatch.setattr(reconstruction, "UPDATE_LAYERS", 2)
    args = argparse.Namespace(model=folder, update_steps=2, gsm_tokens=500)
    kinds = reconstruction.update(args)
    assert len(kinds) == 7
    for M in kinds.values():
        assert M.shape[0] == 2 and 0 < M.abs().max() < 10 * reconstruction.UPDATE_LR
