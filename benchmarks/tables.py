"""Results of bench.py and of tests/robustness as Markdown tables."""

from __future__ import annotations

from typing import Any

from peers import PEERS
from report import spread, table

# Figures to reach for RaSA r=8, k=1: a quotient, and its upper bound in fp32 and bf16.
FIGURES = {
    "rasa p=0.05 / frozen": {"fp32": 1.25, "bf16": 1.30},
    "rasa p=0.05 / lora p=0.05": {"fp32": 0.72, "bf16": 0.65},
    "rasa p=0.05 / authors p=0.05": {"fp32": 0.68, "bf16": 0.62},
    "rasa p=0 / lora p=0": {"fp32": 1.05, "bf16": 0.95},
}
MEMORY_FIGURE = 1.00
# What peak_memory measures: a column's header, and a quotient's name.
MEMORY = {
    "resident": ("resident MiB", "peak resident memory"),
    "allocated": ("allocated MiB", "peak allocated memory"),
}
# How a random input of tests/robustness may end; anything else is a failure with a row of its own.
ENDINGS = {"right": 0, "loaded": 0, "special values": 1, "refused": 2}


def mebibytes(sizes: dict[str, int], name: str, digits: int = 0) -> str:
    """One cell of `sizes`, which are in bytes; empty where there is none of that name."""
    return f"{sizes[name] / 2**20:.{digits}f}" if name in sizes else ""


def layer_table(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """One row for each dtype, dropout and shape.

    flops: those of an adapted linear, forward and backward, over the frozen one's. MiB: the peak
    that one forward and backward allocate.
    """
    R = settings["r"] - settings["k"] + settings["layers"] * settings["k"]
    measured = {name for result in results for name in result["us"]}
    adapters = [name for name in PEERS[1:] if name in measured]
    probed = {name for result in results for name in result.get("allocated", {})}
    sized = [name for name in PEERS if name in probed]
    shape = ["dtype", "dropout", "M", "K", "N"]
    ratios, sizes = [f"{name} / frozen" for name in adapters], [f"{name}, MiB" for name in sized]
    header = [*shape, "frozen, us", *ratios, "flops", *sizes]
    rows = [
        [
            result["dtype"],
            f"{result['dropout']:g}",
            *map(str, result["shape"].values()),
            spread(result["us"]["frozen"], 0),
            *(spread(over[name]) if name in over else "" for name in adapters),
            f"{1 + 6 * R * (K + N) / (4 * K * N):.3f}",
            *(mebibytes(result.get("allocated", {}), name, 1) for name in sized),
        ]
        for result, over, K, N in (
            (result, result["over_frozen"], result["shape"]["K"], result["shape"]["N"])
            for result in results
        )
    ]
    return table(header, rows)


def merge_table(results: list[dict[str, Any]]) -> str:
    """One row for each dtype and peer."""
    rows = []
    for result in results:
        for name, seconds in result["seconds"].items():
            ratio = result["ratios"].get(f"{name} / formula")
            cells = [spread(seconds, 1, 1e-3), spread(ratio) if ratio else "1"]
            rows.append([name, result["dtype"], *cells])
    return table(["peer", "dtype", "ms", "/ formula"], rows)


def parts_table(results: list[dict[str, Any]]) -> str:
    """One row for each variant, with the time and the quotient of each dtype."""
    header = ["variant"]
    rows = {name: [name] for name in results[0]["seconds"]}
    flops = ["flops alone"]
    for result in results:
        header += [f"{result['dtype']}, ms", "/ frozen"]
        for name, row in rows.items():
            ratio = spread(result["over_frozen"][name]) if name != "frozen" else "1"
            row += [spread(result["seconds"][name], 2, 1e-3), ratio]
        flops += ["", f"{result['flops_over_frozen']:.2f}"]
    return table(header, [*rows.values(), flops])


def memory_kinds(results: dict[str, Any]) -> list[str]:
    """The keys of MEMORY that any peer has a figure of."""
    memories = [memory for result in results.values() for memory in result["memory"].values()]
    return [kind for kind in MEMORY if any(kind in memory for memory in memories)]


def memory_cells(
    result: dict[str, Any], run: str, kinds: list[str], memory_dropout: float
) -> list[str]:
    """One cell for each of `kinds`; memory was measured with one dropout only."""
    name, _, dropout = run.partition(" p=")
    has_memory = dropout in ("", f"{memory_dropout:g}")
    return [mebibytes(result["memory"][name] if has_memory else {}, kind) for kind in kinds]


def step_table(results: dict[str, Any], memory_dropout: float) -> str:
    """One row for each dtype and peer."""
    rows = []
    kinds = memory_kinds(results)
    for dtype, result in results.items():
        for run, seconds in result["seconds"].items():
            ratio = result["ratios"].get(f"{run} / frozen")
            rows.append(
                [
                    run,
                    dtype,
                    spread(seconds, 0, 1e-3),
                    spread(ratio) if ratio else "1",
                    f"{result['error'][run.partition(' p=')[0]]:.1e}",
                    *memory_cells(result, run, kinds, memory_dropout),
                ]
            )
    memory = [MEMORY[kind][0] for kind in kinds]
    return table(["peer", "dtype", "ms", "/ frozen", "error", *memory], rows)


def step_summary(results: dict[str, Any], memory_dropout: float) -> str:
    """One row for each peer, with the quotients to frozen of all dtypes."""
    header = ["peer"]
    kinds = memory_kinds(results)
    rows = {run: [run] for run in next(iter(results.values()))["seconds"]}
    for dtype, result in results.items():
        header += [f"{dtype}, ms", "/ frozen", *(MEMORY[kind][0] for kind in kinds)]
        for run, row in rows.items():
            row.append(f"{result['seconds'][run]['median'] * 1e3:.0f}")
            ratio = result["ratios"].get(f"{run} / frozen")
            row.append(spread(ratio) if ratio else "1")
            row += memory_cells(result, run, kinds, memory_dropout)
    return table(header, list(rows.values()))


def figures_table(results: dict[str, Any]) -> str:
    """Print measured quotients and their upper bounds; a quotient needs both its peers."""
    rows = []
    for dtype, result in results.items():
        for pair, bounds in FIGURES.items():
            if pair in result["ratios"]:
                ratio, bound = result["ratios"][pair], bounds[dtype]
                verdict = "reached" if ratio["median"] <= bound else "missed"
                rows.append([pair, dtype, spread(ratio), f"{bound:.2f}", verdict])
        rasa, lora = (result["memory"].get(name, {}) for name in ("rasa", "lora"))
        for kind, (_, label) in MEMORY.items():
            if kind in rasa and kind in lora:
                value = rasa[kind] / lora[kind]
                verdict = "reached" if value <= MEMORY_FIGURE else "missed"
                row = [f"{label}, rasa / lora", dtype, f"{value:.2f}", f"{MEMORY_FIGURE:.2f}"]
                rows.append([*row, verdict])
    return table(["quotient", "dtype", "measured", "at most", ""], rows)


def machines_table(records: list[dict[str, Any]]) -> str:
    """One row for each machine's step and dtype: the medians of the quotients."""
    rows = []
    for record in records:
        for dtype, result in record["results"].items():
            ratios = result["ratios"]
            medians = [f"{ratios[p]['median']:.2f}" if p in ratios else "" for p in FIGURES]
            where = [record["machine"]["cpu"], record["date"][:10]]
            rows.append([*where, str(record["settings"]["layers"]), dtype, *medians])
    bounds = [", ".join(f"{bound:.2f}" for bound in b.values()) for b in FIGURES.values()]
    rows.append(["at most, fp32, bf16", "", "", "", *bounds])
    return table(["processor", "date", "layers", "dtype", *FIGURES], rows)


def input_table(record: dict[str, Any]) -> str:
    """One row for each kind of random input: how many were tried, and how they ended."""
    rows = []
    for part, label in (("calls", "call of {}"), ("files", "adapter file: {}")):
        counts: dict[str, list[int]] = {}
        for outcome, count in record[part]["outcomes"].items():
            ending = next((e for e in ENDINGS if outcome.endswith(f" {e}")), "")
            row = counts.setdefault(outcome.removesuffix(f" {ending}"), [0, 0, 0, 0])
            row[ENDINGS.get(ending, 3)] += count
        for kind, row in sorted(counts.items()):
            rows.append([label.format(kind), f"{sum(row):,}", *(f"{n:,}" for n in row)])
    ends = ["right", "right, with NaN, ∞ or overflow", "refused", "wrong"]
    return table(["random input", "tried", *ends], rows)


def verdict_table(record: dict[str, Any]) -> str:
    """One row for each part of tests/robustness that was run."""
    soak = record["soak"]
    rows = [
        ["calls of the ops", f"{record['calls']['tried']:,} calls", record["calls"]["verdict"]],
        ["damaged adapters", f"{record['files']['tried']:,} files", record["files"]["verdict"]],
        [
            "soak",
            f"{soak['steps']:,} steps, {soak['ranks_pruned']:,} ranks pruned, "
            f"{soak['ranks_grown']:,} grown; {soak['live_tensors_more']} tensors and "
            f"{soak['allocated_MiB_more_in_second_half']} MiB more in the second half",
            soak["verdict"],
        ],
    ]
    sanitizers = record.get("sanitizers")
    if sanitizers is not None:
        done = f"{sanitizers.get('tests', 0):,} tests, {sanitizers.get('calls', 0):,} calls"
        rows.append(["ASan and UBSan", done, sanitizers["verdict"]])
    parts = ("calls", "files", "soak", "sanitizers")
    commits = [record[part]["commit"] for part in parts if part in record]
    rows = [[*row, commit] for row, commit in zip(rows, commits, strict=True)]
    return table(["part", "what was done", "verdict", "at commit"], rows)
