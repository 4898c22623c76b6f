"""RaSA against LoRA at equal parameters: a language model on mathematics and on code.

    python benchmarks/finetune_quality.py                # SmolLM2-135M, 8 of 30 layers
    python benchmarks/finetune_quality.py --layers 30    # the whole model

Both methods get the same learning rates to choose from: one run each with the first seed, and the
one with the lowest validation loss is run with every seed. The test problems, whose loss is
reported, choose nothing. Parameters are equal but for RaSA's diagonals. A run that was stopped goes
on where it stopped. Writes a table, a JSON file and a plot beside it.

Exact match is not measured: a model without its last layers writes no solution that could be right.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from report import heading, results_path, table
from training_runs import (
    DATASETS,
    RunFile,
    add_arguments,
    folder_of,
    load,
    load_problems,
    mean_and_deviation,
    settings_of,
    smooth_mean,
    train,
)

import rasa_ext

METHODS = ("lora", "rasa")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    # Few problems, since HumanEval has few in all.
    parser.set_defaults(validation_problems=16, test_problems=36, steps=100)
    parser.add_argument("--k", type=int, default=1, help="of RaSA")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    return parser.parse_args()


def measure(
    dataset: str, method: str, lr: float, seed: int, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one method with one seed and return what it came to."""
    model = load(folder, args)
    torch.manual_seed(seed)
    k = args.k if method == "rasa" else 0
    summary = rasa_ext.apply(model, args.r, k, args.alpha, dropout=args.dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    problems = load_problems(dataset, folder, seed, args)
    result = train(model, optimizer, problems, args, lr=lr, seed=seed)
    return result | {"parameters": summary.trainable, "R": max(g.R for g in summary.groups)}


def run_all(file: RunFile, folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run what is missing; return tuning runs and those of the seeds, by data set and method."""

    def run(dataset: str, method: str, lr: float, seed: int) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            return measure(dataset, method, lr, seed, folder, args)

        return file.run(make, dataset=dataset, method=method, lr=lr, seed=seed)

    for dataset in args.datasets:
        rates = {}
        for method in METHODS:
            rates[method] = best_rate([run(dataset, method, lr, 0) for lr in args.lr])
        for seed in range(args.seeds):
            for method, lr in rates.items():
                run(dataset, method, lr, seed)
    return by_dataset(file.runs)


def best_rate(tuning: list[dict[str, Any]]) -> float:
    """Return the learning rate of the lowest validation loss."""
    # A loss that is not a number compares as larger than any.
    best = min(tuning, key=lambda r: (r["validation"] != r["validation"], r["validation"]))
    return float(best["lr"])


def by_dataset(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return tuning runs and those of the seeds, by data set and method."""
    results: dict[str, dict[str, Any]] = {}
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        results[dataset] = {}
        for method in METHODS:
            mine = [run for run in runs if (run["dataset"], run["method"]) == (dataset, method)]
            tuning = sorted((run for run in mine if run["seed"] == 0), key=lambda run: run["lr"])
            lr = best_rate(tuning)
            chosen = sorted((r for r in mine if r["lr"] == lr), key=lambda run: run["seed"])
            results[dataset][method] = {"lr": lr, "tuning": tuning, "runs": chosen}
    return results


def loss_table(results: dict[str, dict[str, Any]]) -> str:
    """One row for each data set and method, and one for the differences of runs with one seed."""
    rows = []
    for dataset, methods in results.items():
        for method, result in methods.items():
            runs = result["runs"]
            losses = {name: [run[name] for run in runs] for name in ("train_loss", "test")}
            row = [f"{dataset} {method}", f"{result['lr']:g}", f"{runs[0]['parameters']:,}"]
            rows.append([*row, *(mean_and_deviation(values) for values in losses.values())])
        pairs = list(zip(methods["rasa"]["runs"], methods["lora"]["runs"], strict=True))
        differences = [
            mean_and_deviation([rasa[name] - lora[name] for rasa, lora in pairs])
            for name in ("train_loss", "test")
        ]
        rows.append([f"{dataset} rasa − lora", "", "", *differences])
    return table(["run", "learning rate", "parameters", "train loss", "held-out loss"], rows)


def tuning_table(results: dict[str, dict[str, Any]]) -> str:
    """One row for each data set and method: the validation loss of each learning rate."""
    each = [(d, m, r["tuning"]) for d, methods in results.items() for m, r in methods.items()]
    rates = sorted({run["lr"] for _, _, tuning in each for run in tuning})
    rows = []
    for dataset, method, tuning in each:
        losses = {run["lr"]: f"{run['validation']:.4f}" for run in tuning}
        rows.append([f"{dataset} {method}", *(losses.get(lr, "") for lr in rates)])
    return table(["validation loss, seed 0", *(f"{lr:g}" for lr in rates)], rows)


def save_plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Plot, for each data set, loss by step, the choice of the rate, and held-out loss by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (13, 4 * len(results))
    figure, axes = pyplot.subplots(
        len(results), 3, figsize=size, layout="constrained", squeeze=False
    )
    for (dataset, methods), (curves, rates, seeds) in zip(results.items(), axes, strict=True):
        for method, result in methods.items():
            runs = result["runs"]
            losses = [run["losses"] for run in runs]
            curves.plot(
                smooth_mean(losses, max(1, len(losses[0]) // 10)),
                label=f"{method}, learning rate {result['lr']:g}",
            )
            tuning = result["tuning"]
            rates.plot([r["lr"] for r in tuning], [r["validation"] for r in tuning], "o-")
            held_out = [run["test"] for run in runs]
            mean = statistics.mean(held_out)
            seeds.plot(range(len(runs)), held_out, "o", label=mean_and_deviation(held_out))
            seeds.axhline(mean, color=seeds.lines[-1].get_color(), linewidth=1)
        curves.set(title=dataset, xlabel="step", ylabel="training loss, mean over seeds")
        curves.set_yscale("log")
        curves.legend()
        rates.set(xscale="log", xlabel="learning rate", ylabel="validation loss, seed 0")
        seeds.set(xlabel="seed", ylabel="held-out loss", xticks=range(len(runs)))
        seeds.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, then print and plot all."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    file = RunFile(args.json or results_path("finetune_quality"), settings_of(args, "k"))
    results = run_all(file, folder_of(args), args)
    print(heading())
    a_run = next(iter(results.values()))["rasa"]["runs"][0]
    print(
        f"the first {args.layers} layers of {file.settings['model']}, {args.steps} steps of "
        f"{args.batch_size} problems, {args.seeds} seeds; r = {args.r}; rasa: k = {args.k}, "
        f"R = {a_run['R']}"
    )
    print(loss_table(results))
    print(tuning_table(results))
    save_plot(file.path.with_suffix(".png"), results)


if __name__ == "__main__":
    main()
