"""L1RA against LoRA at an equal rank budget: a language model on grade-school mathematics.

    python benchmarks/l1ra.py                    # SmolLM2-135M, 10 of 30 layers, 3 seeds
    python benchmarks/l1ra.py --layers 30        # the whole model

Runs every method with every seed and adds each result to --output/l1ra.json at once, so a stopped
run goes on where it stopped; runs with other settings are refused. Then writes l1ra.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from evaluation import answer_loss, held_out_loss  # noqa: E402
from gsm_symbolic import GsmSymbolic  # noqa: E402
from language_model import load_model, load_tokenizer  # noqa: E402
from smollm2 import model_folder  # noqa: E402
from training import learning_rate  # noqa: E402

import rasa_ext  # noqa: E402

# Arguments of apply() and of RankAllocator (None: without).
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "lora": ({"k": 0}, None),
    "l1ra": ({"k": 0, "gates": True}, {"budget": "ranks"}),
    "l1ra, parameters": ({"k": 0, "gates": True}, {"budget": "parameters"}),
}
SETTINGS = ("layers", "steps", "batch_size", "seq_len", "r", "lr", "l1", "gate_lr", "eval_problems")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: SmolLM2-135M of the package)")
    add("--layers", type=int, default=10, help="keep the first N layers only")
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=4)
    add("--seq-len", type=int, default=160)
    add("--r", type=int, default=8)
    add("--lr", type=float, default=2e-3)
    add("--l1", type=float, default=5e-3, help="the authors' experiments have 5e-3")
    add("--gate-lr", type=float, default=2e-2)
    add("--seeds", type=int, default=3)
    add("--eval-problems", type=int, default=48)
    add("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args()
    args.dtype, args.device = "fp32", "cpu"
    return args


def train(method: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one method with one seed and return what it came to."""
    to_apply, to_allocate = METHODS[method]
    model = load_model(folder, args)
    torch.manual_seed(seed)
    summary = rasa_ext.apply(model, r=args.r, alpha=2 * args.r, dropout=0.05, **to_apply)
    data = GsmSymbolic(
        load_tokenizer(folder),
        seed=seed,
        max_tokens=args.seq_len,
        batch_size=args.batch_size,
        held_out=args.eval_problems,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    allocator = None
    if to_allocate is not None:
        allocator = rasa_ext.RankAllocator(
            model,
            optimizer,
            l1=args.l1,
            gate_lr=args.gate_lr,
            total_steps=args.steps,
            **to_allocate,
        )
    before = held_out_loss(model, data, torch.device("cpu"))
    model.train()
    losses, in_allocator, started = [], 0.0, time.perf_counter()
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)  # the gates' is constant
        (batch,) = data.training_batches(step, 1)
        total, count = answer_loss(model, batch)
        loss = total / count
        loss.backward()
        optimizer.step()
        if allocator is not None:
            start = time.perf_counter()
            allocator.step()
            in_allocator += time.perf_counter() - start
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    result = {
        "method": method,
        "seed": seed,
        "before": before,
        "after": held_out_loss(model, data, torch.device("cpu")),
        "losses": losses,
        "seconds": seconds,
        "allocator_share": in_allocator / seconds,
        "parameters_at_start": summary.trainable,
        "parameters": sum(p.numel() for p in parameters),
        "ranks": {name: layer.Rp for name, layer in layers_of(model).items()},
    }
    if allocator is not None:
        result["report"] = rasa_ext.rank_report(allocator)
    return result


def layers_of(model: torch.nn.Module) -> dict[str, rasa_ext.RaSALinear]:
    """Return the adapted layers by name."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, rasa_ext.RaSALinear)}


def load_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results so far; exit if they were made with other settings."""
    if not path.exists():
        return {"settings": settings, "torch": torch.__version__, "runs": []}
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise SystemExit(
            f"l1ra: {path} holds runs with {content['settings']}, got {settings}. Name another "
            "folder with --output"
        )
    return content


def save_results(path: Path, content: dict[str, Any]) -> None:
    """Write the file under another name and rename it: it is never half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def save_plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """Plot the loss by step, and the final ranks of each kind of projection, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds = sorted({name.rpartition(".")[2] for name in runs[0]["ranks"]})
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for i, method in enumerate(methods):
        of_method = [run for run in runs if run["method"] == method]
        means = [statistics.mean(s) for s in zip(*(r["losses"] for r in of_method), strict=True)]
        window = max(1, len(means) // 20)
        smooth = [statistics.mean(means[max(0, j - window) : j + 1]) for j in range(len(means))]
        after = statistics.mean(run["after"] for run in of_method)
        curves.plot(smooth, label=f"{method} (held-out {after:.4f})")
        ranks = [
            statistics.mean(
                rank
                for run in of_method
                for name, rank in run["ranks"].items()
                if name.rpartition(".")[2] == kind
            )
            for kind in kinds
        ]
        width = 0.8 / len(methods)
        bars.bar([x + i * width for x in range(len(kinds))], ranks, width, label=method)
    curves.set(xlabel="step", ylabel="training loss, mean over seeds")
    curves.legend()
    bars.set_xticks([x + 0.4 - 0.4 / len(methods) for x in range(len(kinds))], kinds, rotation=45)
    bars.set_ylabel("final rank, mean over layers and seeds")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, then print and plot all."""
    args = parse_arguments()
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["model"] = "SmolLM2-135M-Instruct" if args.model is None else args.model.name
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "l1ra.json"
    content = load_results(path, settings)
    done = {(run["method"], run["seed"]) for run in content["runs"]}
    folder = args.model or model_folder(Path("demo/SmolLM2-135M-Instruct"))
    for seed in range(args.seeds):
        for method in METHODS:
            if (method, seed) not in done:
                print(f"{method}, seed {seed} ...", flush=True)
                content["runs"].append(train(method, seed, folder, args))
                save_results(path, content)
    print(f"{'method':<18}{'seed':>5}{'held-out loss':>15}{'parameters':>12}{'allocator':>11}")
    for run in content["runs"]:
        print(
            f"{run['method']:<18}{run['seed']:>5}{run['after']:>15.4f}{run['parameters']:>12,}"
            f"{run['allocator_share']:>10.2%} "
        )
    save_plot(args.output / "l1ra.png", content["runs"])


if __name__ == "__main__":
    main()
