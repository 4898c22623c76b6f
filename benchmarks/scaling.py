"""How time and memory grow with layers, ranks, tokens and adapters; a table and a plot.

    python benchmarks/scaling.py

Each series varies one of them. Its growth is what one more of it costs between the two largest
sizes, over what it costs between the largest but one and the largest but three: 1 is linear, 2.4
is quadratic where sizes double. A constant part, or one that only small sizes see, does not hide a
term. The plot's straight line goes through the latter two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import layer
import peak_memory
import step
import torch
from peers import Adapter
from report import RESULTS, heading, table, timing_path, write_json
from timing import calls_within, interleave, summary

LAYERS = (2, 4, 8, 16, 30)
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
MIXED_ROWS = 1024
MEMORY_PROCESSES = 3
# A growth above it is a term worse than linear.
LARGEST_GROWTH = 1.25

Series = dict[str, Any]


def series(name: str, unit: str, sizes: Sequence[int], values: list[dict[str, float]]) -> Series:
    """Return the measured values of one curve, with their growth."""
    medians = [value["median"] for value in values]
    return {
        "name": name,
        "unit": unit,
        "sizes": list(sizes),
        "values": values,
        "growth": growth(sizes, medians),
    }


def growth(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the cost of one more at the end, over that before; 0 where nothing grows."""
    last = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
    before = cost_before(sizes, values)
    return last / before if last > 0 and before > 0 else 0.0


def cost_before(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the cost of one more before the last size, over two steps: noise is less of those."""
    first = max(len(sizes) - 4, 0)
    return (values[-2] - values[first]) / (sizes[-2] - sizes[first])


def over_sizes(runs: dict[int, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of each size's run, interleaved."""
    return [summary([1e3 * t for t in times]) for times in interleave_sizes(runs, rounds)]


def interleave_sizes(runs: dict[int, Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each size's run; small ones are repeated until a clock can see them."""
    repeats = {size: calls_within(layer.SAMPLE_SECONDS, run) for size, run in runs.items()}

    def repeated(size: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats[size]):
                runs[size]()

        return run

    seconds = interleave({str(size): repeated(size) for size in runs}, rounds)
    return [[t / repeats[size] for t in seconds[str(size)]] for size in runs]


def single_linear(M: int, adapter: Adapter, shape: tuple[int, int]) -> Callable[[], None]:
    """Return forward and backward of one adapted linear, in a pool of its own."""
    model = layer.convert("rasa", layer.Projections(1, *shape), adapter)
    xs = [torch.randn(M, shape[0]).requires_grad_()]
    return layer.one_pass(model, xs, torch.randn(M, shape[1]), 1, 1)


def lora(r: int, dropout: float = 0.05) -> Adapter:
    """Ranks without a pool: R = r."""
    return Adapter(step.TARGETS, r, 0, 16, dropout)


def time_by_ranks(rounds: int) -> Series:
    """Time a linear whose effective rank grows."""
    one = ("proj",)
    runs = {R: single_linear(512, Adapter(one, R, 0, 16, 0.05), (1536, 1536)) for R in (*RANKS,)}
    return series("time of a linear (512 × 1536 × 1536)", "ms", RANKS, over_sizes(runs, rounds))


def time_by_tokens(rounds: int) -> Series:
    """Time a linear on more and more tokens."""
    adapter = Adapter(("proj",), 37, 0, 16, 0.05)
    runs = {M: single_linear(M, adapter, (576, 576)) for M in TOKENS}
    return series("time of a linear (R = 37, 576 × 576)", "ms", TOKENS, over_sizes(runs, rounds))


def time_by_layers(rounds: int) -> Series:
    """Time a training step of more and more layers, each with the ranks of the whole model."""
    runs = {}
    for layers in LAYERS:
        adapter = Adapter(step.TARGETS)
        model = step.build("rasa", step.smollm2_shape(torch.float32, layers), adapter, layers)
        tokens = torch.randint(0, step.vocabulary(layers), (1, 128))
        runs[layers] = step.training_step(model, tokens)
    return series("training step (R = 37)", "ms", LAYERS, over_sizes(runs, rounds))


def time_by_adapters(rounds: int) -> Series:
    """Time a batch whose rows use more and more adapters."""
    import rasa_ext

    x, base = torch.randn(MIXED_ROWS, 576), torch.randn(MIXED_ROWS, 576)
    runs = {}
    for count in ADAPTERS:
        adapters = [random_adapter(7, 30, 576) for _ in range(count)]
        index = torch.arange(MIXED_ROWS) * count // MIXED_ROWS
        runs[count] = lambda adapters=adapters, index=index: rasa_ext.mixed_add(
            x, base, adapters, index
        )
    name = f"{MIXED_ROWS} rows over n adapters"
    return series(name, "ms", ADAPTERS, over_sizes(runs, rounds))


def random_adapter(Rp: int, Rs: int, features: int) -> tuple[torch.Tensor, ...]:
    """Return A, A_shared, Bt, Bt_shared and d of one layer."""
    rows = (Rp, Rs, Rp, Rs)
    return (*(torch.randn(R, features) for R in rows), torch.randn(Rs + Rp))


def memory(adapter: Adapter, layers: int, tokens: int) -> dict[str, float]:
    """Peak MiB, resident, of a training step of ours, in several processes: malloc differs."""
    batch = (1, tokens)
    measured = [
        peak_memory.measure("rasa", torch.float32, adapter, layers, batch)["resident"]
        for _ in range(MEMORY_PROCESSES)
    ]
    return summary([size / 2**20 for size in measured])


def all_series(rounds: int) -> dict[str, list[Series]]:
    """Measure everything, by what grows."""
    layers = [memory(Adapter(step.TARGETS), n, 128) for n in LAYERS]
    ranks = [memory(lora(R), 2, 128) for R in RANKS]
    tokens = [memory(Adapter(step.TARGETS), 2, M) for M in TOKENS]
    return {
        "layers": [
            time_by_layers(rounds),
            series("peak memory of a step", "MiB", LAYERS, layers),
        ],
        "effective rank": [
            time_by_ranks(rounds),
            series("peak memory of a step, 2 layers", "MiB", RANKS, ranks),
        ],
        "tokens": [
            time_by_tokens(rounds),
            series("peak memory of a step, 2 layers", "MiB", TOKENS, tokens),
        ],
        "adapters in a batch": [time_by_adapters(rounds)],
    }


def growth_table(found: dict[str, list[Series]]) -> str:
    """One row for each curve."""
    rows = []
    for axis, curves in found.items():
        for curve in curves:
            ends = [f"{curve['values'][i]['median']:.4g} {curve['unit']}" for i in (0, -1)]
            sizes = f"{curve['sizes'][0]}-{curve['sizes'][-1]}"
            is_linear = curve["growth"] <= LARGEST_GROWTH
            verdict = "linear or better" if is_linear else "WORSE THAN LINEAR"
            rows.append([curve["name"], axis, sizes, *ends, f"{curve['growth']:.2f}", verdict])
    return table(["what", "grows with", "from-to", "first", "last", "growth", ""], rows)


def save_plot(path: Path, found: dict[str, list[Series]]) -> None:
    """Draw one panel for each curve, with the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(found), figsize=(15, 6), layout="constrained")
    for column, (axis, curves) in enumerate(found.items()):
        for row in range(2):
            panel = panels[row][column]
            if row >= len(curves):
                panel.axis("off")
                continue
            curve = curves[row]
            sizes = curve["sizes"]
            median, low, high = (
                [value[key] for value in curve["values"]] for key in ("median", "min", "max")
            )
            panel.fill_between(sizes, low, high, alpha=0.3)
            label = f"measured, growth {curve['growth']:.2f}"
            panel.plot(sizes, median, marker="o", label=label)
            per_size = cost_before(sizes, median)
            ideal = [max(0.0, median[-2] + per_size * (size - sizes[-2])) for size in sizes]
            panel.plot(sizes, ideal, "--", color="gray", label="linear")
            panel.set(xlabel=axis, ylabel=curve["unit"], title=curve["name"], ylim=(0, None))
            panel.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=timing_path("scaling"))
    parser.add_argument("--plot", type=Path, default=RESULTS / "scaling.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    found = all_series(args.rounds)
    print(heading())
    print(growth_table(found))
    write_json(args.json, {"subject": "scaling", "rounds": args.rounds}, {"results": found})
    save_plot(args.plot, found)


if __name__ == "__main__":
    main()
