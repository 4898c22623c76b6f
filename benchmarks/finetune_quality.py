"""RaSA against LoRA at equal parameters: a language model on mathematics and on code.

    python benchmarks/finetune_quality.py gsm_symbolic           # SmolLM2-135M, whole
    python benchmarks/finetune_quality.py code --steps 100       # HumanEval, for longer

Both methods choose from one grid of learning rates, a factor of two apart, by the validation loss
of the first seed. The grid grows, for both methods, until neither has its best at an edge. Then
all seeds run at each method's best. The test problems, whose loss is reported, choose nothing; of
gsm_symbolic the model also answers them, and its right final numbers are counted. Solutions of
HumanEval are not run. Parameters are equal but for RaSA's diagonals. A run that was stopped goes
on where it stopped. Writes tables, a JSON file and a plot beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, heading, table
from training_runs import (
    DATASETS,
    RunFile,
    add_arguments,
    exact_matches,
    folder_of,
    load,
    load_problems,
    mean_and_deviation,
    mean_loss,
    settings_of,
    smooth_mean,
    train,
)

import rasa_ext

METHODS = ("lora", "rasa")
MODEL_LAYERS = 30
# Few problems are held out of HumanEval, since it has few in all.
PRESETS = {
    "gsm_symbolic": {"steps": 32, "validation_problems": 16, "test_problems": 48},
    "code": {"steps": 24, "validation_problems": 16, "test_problems": 36},
}
MOST_RATES = 12

Runs = list[dict[str, Any]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=DATASETS)
    add_arguments(parser)
    parser.add_argument("--k", type=int, default=1, help="of RaSA")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="to begin")
    dataset = parser.parse_args().dataset
    parser.set_defaults(layers=MODEL_LAYERS, **PRESETS[dataset])
    return parser.parse_args()


def measure_base(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the model does without an adapter."""
    model = load(folder, args)
    problems = load_problems(args.dataset, folder, 0, args)
    return {"test": mean_loss(model, problems.test)} | exact_matches(model, problems)


def measure(
    method: str, lr: float, seed: int, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one method with one seed and return what it came to."""
    model = load(folder, args)
    torch.manual_seed(seed)
    k = args.k if method == "rasa" else 0
    summary = rasa_ext.apply(model, args.r, k, args.alpha, dropout=args.dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    problems = load_problems(args.dataset, folder, seed, args)
    result = train(model, optimizer, problems, args, lr=lr, seed=seed)
    sizes = {"parameters": summary.trainable, "R": max(g.R for g in summary.groups)}
    return result | exact_matches(model, problems) | sizes


def run_all(file: RunFile, folder: Path, args: argparse.Namespace) -> Runs:
    """Run what is missing; return all runs."""

    def run(method: str, lr: float, seed: int) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            return measure(method, lr, seed, folder, args)

        return file.run(make, method=method, lr=lr, seed=seed)

    file.run(lambda: measure_base(folder, args), method="base")
    best = tune(run, args.lr)
    for seed in range(args.seeds):
        for method, lr in best.items():
            run(method, lr, seed)
    return file.runs


def tune(run: Callable[[str, float, int], dict[str, Any]], rates: list[float]) -> dict[str, float]:
    """Return each method's best rate of a grid that grows for all until no best is at its edge."""
    rates = sorted(rates)
    while len(rates) <= MOST_RATES:
        best = {method: best_rate([run(method, lr, 0) for lr in rates]) for method in METHODS}
        if rates[0] in best.values():
            rates.insert(0, rates[0] / 2)
        elif rates[-1] in best.values():
            rates.append(rates[-1] * 2)
        else:
            return best
    raise SystemExit(f"finetune_quality: no best rate inside {rates}: begin elsewhere with --lr")


def best_rate(tuning: Runs) -> float:
    """Return the learning rate of the lowest validation loss."""
    # A loss that is not a number compares as larger than any.
    best = min(tuning, key=lambda r: (r["validation"] != r["validation"], r["validation"]))
    return float(best["lr"])


def by_method(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return each method's tuning runs, its best rate, and the runs of all seeds at that rate."""
    results: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        tuning = sorted((run for run in mine if run["seed"] == 0), key=lambda run: run["lr"])
        lr = best_rate(tuning)
        chosen = sorted((r for r in mine if r["lr"] == lr), key=lambda run: run["seed"])
        results[method] = {"lr": lr, "tuning": tuning, "runs": chosen}
    return results


def description(settings: dict[str, Any], runs: Runs) -> str:
    """Say what one data set's runs have in common."""
    seeds = len(by_method(runs)["rasa"]["runs"])
    R = max(run.get("R", 0) for run in runs)
    return (
        f"{settings['dataset']}: {settings['model']}, {settings['layers']} of {MODEL_LAYERS} "
        f"layers, {settings['dtype']} base, {settings['steps']} steps of {settings['batch_size']} "
        f"problems, {seeds} seeds; r = {settings['r']}, k = {settings['k']}, R = {R}.\n\n"
    )


def loss_table(dataset: str, runs: Runs) -> str:
    """One row for the base, one for each method, one for the differences of runs of one seed."""
    base = next(run for run in runs if run["method"] == "base")
    answered = base.get("answered")
    digits = {"train_loss": 4, "test": 4} | ({"right": 1} if answered else {})

    def cells(values: Runs) -> list[str]:
        return [mean_and_deviation([v[name] for v in values], n) for name, n in digits.items()]

    right = [str(base["right"])] if answered else []
    rows = [[f"{dataset} base", "", "", "", f"{base['test']:.4f}", *right]]
    methods = by_method(runs)
    for method, result in methods.items():
        mine = result["runs"]
        row = [f"{dataset} {method}", f"{result['lr']:g}", f"{mine[0]['parameters']:,}"]
        rows.append([*row, *cells(mine)])
    pairs = zip(methods["rasa"]["runs"], methods["lora"]["runs"], strict=True)
    differences = [{name: rasa[name] - lora[name] for name in digits} for rasa, lora in pairs]
    rows.append([f"{dataset} rasa − lora", "", "", *cells(differences)])
    header = ["run", "learning rate", "parameters", "train loss", "held-out loss"]
    return table([*header, *([f"right of {answered}"] if answered else [])], rows)


def tuning_table(dataset: str, runs: Runs) -> str:
    """One row for each method: the validation loss of each learning rate."""
    tuning = {method: result["tuning"] for method, result in by_method(runs).items()}
    rates = [f"{run['lr']:g}" for run in tuning["lora"]]
    rows = [
        [f"{dataset} {method}", *(f"{run['validation']:.4f}" for run in mine)]
        for method, mine in tuning.items()
    ]
    return table(["validation loss, seed 0", *rates], rows)


def save_plot(path: Path, dataset: str, runs: Runs) -> None:
    """Plot loss by step, the choice of the rate, and held-out loss by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, rates, seeds) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for method, result in by_method(runs).items():
        chosen, tuning = result["runs"], result["tuning"]
        losses = [run["losses"] for run in chosen]
        curves.plot(
            smooth_mean(losses, max(1, len(losses[0]) // 10)),
            label=f"{method}, learning rate {result['lr']:g}",
        )
        rates.plot([r["lr"] for r in tuning], [r["validation"] for r in tuning], "o-")
        held_out = [run["test"] for run in chosen]
        seeds.plot(range(len(chosen)), held_out, "o", label=mean_and_deviation(held_out))
        mean = statistics.mean(held_out)
        seeds.axhline(mean, color=seeds.lines[-1].get_color(), linewidth=1)
    curves.set(title=dataset, xlabel="step", ylabel="training loss, mean over seeds")
    curves.set_yscale("log")
    curves.legend()
    rates.set(xscale="log", xlabel="learning rate", ylabel="validation loss, seed 0")
    seeds.set(xlabel="seed", ylabel="held-out loss", xticks=range(len(chosen)))
    seeds.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, then print and plot all."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.json or RESULTS / f"finetune_{args.dataset}.json"
    file = RunFile(path, settings_of(args, "dataset", "k", "lr"))
    runs = run_all(file, folder_of(args), args)
    print(heading())
    print(description(file.settings, runs) + loss_table(args.dataset, runs))
    print(tuning_table(args.dataset, runs))
    save_plot(file.path.with_suffix(".png"), args.dataset, runs)


if __name__ == "__main__":
    main()
