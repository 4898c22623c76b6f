"""L1RA against LoRA at an equal rank budget: a language model on grade-school mathematics.

    python benchmarks/l1ra.py                    # SmolLM2-135M, 8 of 30 layers, 3 seeds
    python benchmarks/l1ra.py --layers 30        # the whole model

Every method starts with r ranks in each layer. L1RA moves them, with the number of ranks as the
budget or, as `l1ra, parameters`, that of parameters. A run that was stopped goes on where it
stopped. Writes a table, a JSON file and a plot beside it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, heading, table
from training_runs import (
    RunFile,
    add_arguments,
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
from rasa_ext.injection import adapted_layers

# Arguments of RankAllocator (None: without).
METHODS: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "l1ra": {"budget": "ranks"},
    "l1ra, parameters": {"budget": "parameters"},
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    # Nothing is chosen, so there is nothing to validate.
    parser.set_defaults(validation_problems=0, steps=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    # The authors have 5e-3 in runs of thousands of steps; in 200 that takes 0.02 from a gate. This
    # brings an idle gate to 0 halfway through the run.
    parser.add_argument("--l1", type=float, default=0.5)
    parser.add_argument("--gate-lr", type=float, default=2e-2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


def measure(method: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one method with one seed and return what it came to."""
    options = METHODS[method]
    model = load(folder, args)
    torch.manual_seed(seed)
    gates = options is not None
    summary = rasa_ext.apply(model, args.r, 0, args.alpha, dropout=args.dropout, gates=gates)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    allocator = None
    if options is not None:
        allocator = rasa_ext.RankAllocator(
            model,
            optimizer,
            l1=args.l1,
            gate_lr=args.gate_lr,
            total_steps=args.steps,
            seed=seed,
            **options,
        )
    problems = load_problems("gsm_symbolic", folder, seed, args)
    result: dict[str, Any] = {"before": mean_loss(model, problems.test)}
    result |= train(model, optimizer, problems, args, lr=args.lr, seed=seed, allocator=allocator)
    result |= {
        "parameters_at_start": summary.trainable,
        "parameters": sum(p.numel() for p in parameters),
        "ranks": {name: layer.Rp for name, layer in adapted_layers(model).items()},
    }
    if allocator is not None:
        history = rasa_ext.rank_report(allocator)["history"]
        result["totals"] = [
            {name: entry[name] for name in ("step", "ranks", "parameters")} for entry in history
        ]
    return result


def mean_ranks(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean final rank of each kind of projection, over layers and seeds."""
    ranks: dict[str, list[int]] = {}
    for run in runs:
        for name, rank in run["ranks"].items():
            ranks.setdefault(name.rpartition(".")[2], []).append(rank)
    return {kind: statistics.mean(values) for kind, values in sorted(ranks.items())}


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each method."""
    methods = dict.fromkeys(run["method"] for run in runs)
    return {method: [run for run in runs if run["method"] == method] for method in methods}


def loss_table(runs: list[dict[str, Any]]) -> str:
    """One row for each method: means and standard deviations over seeds."""
    rows = []
    for method, mine in by_method(runs).items():
        shares = [run["allocator_share"] for run in mine]
        rows.append(
            [
                method,
                mean_and_deviation([run["train_loss"] for run in mine]),
                mean_and_deviation([run["test"] for run in mine]),
                f"{statistics.mean(sum(run['ranks'].values()) for run in mine):.0f}",
                f"{statistics.mean(run['parameters'] for run in mine):,.0f}",
                f"{max(shares):.2%}" if max(shares) > 0 else "",
            ]
        )
    header = ["method", "train loss", "held-out loss", "ranks", "parameters", "controller"]
    return table(header, rows)


def rank_table(runs: list[dict[str, Any]]) -> str:
    """One row for each method: the mean final rank of each kind of projection."""
    ranks = {method: mean_ranks(mine) for method, mine in by_method(runs).items()}
    kinds = list(next(iter(ranks.values())))
    rows = [[method, *(f"{mean[kind]:.1f}" for kind in kinds)] for method, mean in ranks.items()]
    return table(["final rank", *kinds], rows)


def save_plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """Plot the loss by step, and the final ranks of each kind of projection, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    methods = by_method(runs)
    width = 0.8 / len(methods)
    for i, (method, mine) in enumerate(methods.items()):
        losses = [run["losses"] for run in mine]
        held_out = mean_and_deviation([run["test"] for run in mine])
        curves.plot(
            smooth_mean(losses, max(1, len(losses[0]) // 20)),
            label=f"{method} (held-out {held_out})",
        )
        ranks = mean_ranks(mine)
        bars.bar([x + i * width for x in range(len(ranks))], ranks.values(), width, label=method)
        bars.set_xticks([x + 0.4 - width / 2 for x in range(len(ranks))], ranks, rotation=45)
    curves.set(xlabel="step", ylabel="training loss, mean over seeds", yscale="log")
    curves.legend()
    bars.set_ylabel("final rank, mean over layers and seeds")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, then print and plot all."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    file = RunFile(args.json or RESULTS / "l1ra.json", settings_of(args, "lr", "l1", "gate_lr"))
    folder = folder_of(args)
    runs = []
    for seed in range(args.seeds):
        for method in args.methods:

            def make(method: str = method, seed: int = seed) -> dict[str, Any]:
                return measure(method, seed, folder, args)

            runs.append(file.run(make, method=method, seed=seed))
    print(heading())
    print(
        f"gsm_symbolic; the first {args.layers} layers of {file.settings['model']}, {args.steps} "
        f"steps of {args.batch_size} problems, {args.seeds} seeds; loss before: "
        f"{runs[0]['before']:.2f}; controller: the largest share of the steps' time"
    )
    print(loss_table(runs))
    print(rank_table(runs))
    save_plot(file.path.with_suffix(".png"), runs)


if __name__ == "__main__":
    main()
