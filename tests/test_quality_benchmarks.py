"""The quality benchmarks, with a tiny random Llama: what they run, choose, keep and print."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hf_models import byte_llama

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "examples")]

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


@pytest.mark.parametrize("dataset", training_runs.DATASETS)
def test_finetune_command_runs_one_grid_then_all_seeds_at_the_best(
    dataset, folder, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "quality.json"
    words = ["--lr", 1e-2, 2e-2, 4e-2, "--validation-problems", 2]
    record = run(finetune_quality, monkeypatch, folder, path, dataset, *words)
    base, *runs = record["runs"]
    assert base["method"] == "base" and base["test"] > 0
    for method in finetune_quality.METHODS:
        mine = [r for r in runs if r["method"] == method]
        rates = sorted(r["lr"] for r in mine if r["seed"] == 0)
        assert {1e-2, 2e-2, 4e-2} <= set(rates)
        assert rates == pytest.approx([rates[0] * 2**i for i in range(len(rates))])
        best = finetune_quality.by_method(record["runs"])[method]["lr"]
        assert rates[0] < best < rates[-1]
        assert [(r["lr"], r["seed"]) for r in mine if r["seed"]] == [(best, 1)]
    parameters = {r["method"]: r["parameters"] for r in runs}
    gates = 7 * 2 * (2 + 3)  # seven kinds, two layers, Rs = 2 and Rp = 3
    assert parameters["rasa"] == parameters["lora"] + gates
    printed = capsys.readouterr().out
    assert f"| {dataset} rasa − lora" in printed and "R = 5" in printed
    assert ("right of 3 |" in printed) == (dataset == "gsm_symbolic")
    assert path.with_suffix(".png").stat().st_size > 0


def tuned(losses):
    """The best rates of methods with these losses by rate, and all rates tried for each."""
    tried = {method: set() for method in finetune_quality.METHODS}

    def run(method, lr, seed):
        tried[method].add(lr)
        return {"lr": lr, "validation": losses[method](lr)}

    return finetune_quality.tune(run, [0.5, 1.0, 2.0]), tried


@pytest.mark.parametrize(
    ("best", "grid"),
    [(0.125, {0.0625, 0.125, 0.25, 0.5, 1.0, 2.0}), (8.0, {0.5, 1.0, 2.0, 4.0, 8.0, 16.0})],
)
def test_grid_grows_for_both_methods_until_no_best_is_at_an_edge(best, grid):
    losses = {"lora": lambda lr: abs(lr - 1.0), "rasa": lambda lr: abs(lr - best)}
    found, tried = tuned(losses)
    assert found == {"lora": 1.0, "rasa": best}
    assert tried == {"lora": grid, "rasa": grid}


def test_a_rate_that_diverges_is_not_chosen():
    losses = {m: lambda lr: math.nan if lr >= 1 else abs(lr - 0.5) for m in ("lora", "rasa")}
    assert tuned(losses)[0] == {"lora": 0.5, "rasa": 0.5}


def test_a_grid_without_a_best_inside_it_ends():
    with pytest.raises(SystemExit, match="no best rate inside"):
        tuned({method: lambda lr: -lr for method in ("lora", "rasa")})


def test_right_answers_are_counted_on_the_test_problems(folder, monkeypatch):
    problems = training_runs.load_problems("gsm_symbolic", folder, 0, options())
    model = training_runs.load(folder, options(layers=2, dtype="fp32", device="cpu"))
    data = problems.answerable
    test = {tuple(e.prompt + e.answer) for e in data.held_out}
    rows = [
        tuple(ids[mask == 1].tolist())
        for b in problems.test
        for ids, mask in zip(b.input_ids, b.attention_mask, strict=True)
    ]
    assert set(rows) == test
    rights = {data.held_out[0].entry["question"], data.held_out[2].entry["question"]}
    monkeypatch.setattr(data, "is_correct", lambda e, reply: e.entry["question"] in rights)
    assert training_runs.exact_matches(model, problems) == {"answered": 3, "right": 2}
    code = training_runs.load_problems("code", folder, 0, options())
    assert training_runs.exact_matches(model, code) == {}


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
