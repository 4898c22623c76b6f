"""What a RankAllocator has done: ranks over time as JSON and CSV, and a heat map."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from rasa_ext.injection import group_names
from rasa_ext.rank_allocator import RankAllocator


def rank_report(allocator: RankAllocator) -> dict[str, Any]:
    """Return the ranks of each layer at the start and after every change.

    layers: each layer's group (kind of projection and shape) and sizes, by name. history: for each
    change, after how many steps; by layer, the ranks of its own (private) and those of its pool
    that it uses (shared: gates of at least the threshold); by pool, its ranks; and the totals of
    the model: ranks (a pool's counted once) and parameters, gates included.
    """
    groups = group_names(allocator.layers)
    layers = {
        name: {
            "group": groups[name],
            "in_features": layer.in_features,
            "out_features": layer.out_features,
        }
        for name, layer in allocator.layers.items()
    }
    history = []
    for entry in allocator.history:
        Rs = dict(zip(allocator.pools, entry["pools"], strict=True))
        ranks, parameters = sum(entry["pools"]), 0
        for name, pool in allocator.pools.items():
            parameters += Rs[name] * (pool.in_features + pool.out_features + pool.num_layers)
        for layer, Rp in zip(allocator.layers.values(), entry["private"], strict=True):
            ranks += Rp
            parameters += Rp * (layer.in_features + layer.out_features + 1)
        history.append(
            {
                "step": entry["step"],
                "private": dict(zip(layers, entry["private"], strict=True)),
                "shared": dict(zip(layers, entry["shared"], strict=True)),
                "pools": Rs,
                "ranks": ranks,
                "parameters": parameters,
            }
        )
    return {"settings": dict(allocator.settings), "layers": layers, "history": history}


def save_rank_report(allocator: RankAllocator, folder: str | os.PathLike[str]) -> None:
    """Write ranks.json, ranks.csv and ranks.png into a folder, which is made if need be.

    The CSV has a row for each change and layer: step, layer, group, private, shared. The picture
    shows, for each layer and kind of projection, the ranks that it uses now, and how the mean of
    each kind came about. Needs matplotlib (pip install 'rasa_ext[demo]').
    """
    report = rank_report(allocator)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "ranks.json").write_text(json.dumps(report, indent=1) + "\n")
    with (target / "ranks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "layer", "group", "private", "shared"))
        for entry in report["history"]:
            for name, layer in report["layers"].items():
                ranks = (entry["private"][name], entry["shared"][name])
                writer.writerow((entry["step"], name, layer["group"], *ranks))
    _save_picture(report, target / "ranks.png")


def _used(entry: dict[str, Any], names: list[str]) -> list[int]:
    return [entry["private"][name] + entry["shared"][name] for name in names]


def _save_picture(report: dict[str, Any], path: Path) -> None:
    # The object-oriented interface: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    members: dict[str, list[str]] = {}
    for name, layer in report["layers"].items():
        members.setdefault(layer["group"], []).append(name)
    depth = max(map(len, members.values()))
    last = report["history"][-1]
    columns = [_used(last, names) for names in members.values()]
    # Kinds that fewer layers have leave the rest of their column empty.
    rows = [[c[i] if i < len(c) else float("nan") for c in columns] for i in range(depth)]

    figure = Figure(figsize=(10, 2.5 + 0.2 * depth), layout="constrained")
    FigureCanvasAgg(figure)
    heat, lines = figure.subplots(1, 2)
    image = heat.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
    heat.set_xticks(range(len(members)), list(members), rotation=45, ha="right")
    heat.set_ylabel("layer")
    heat.set_title(f"ranks after step {last['step']}")
    for i, row in enumerate(rows):
        for j, rank in enumerate(row):
            if rank == rank:
                heat.text(j, i, str(rank), ha="center", va="center", color="white", fontsize=7)
    figure.colorbar(image, ax=heat)
    steps = [entry["step"] for entry in report["history"]]
    for group, names in members.items():
        means = [sum(_used(entry, names)) / len(names) for entry in report["history"]]
        lines.step(steps, means, where="post", label=group)
    lines.set_xlabel("step")
    lines.set_ylabel("mean rank")
    lines.set_ylim(bottom=0)
    lines.legend(fontsize=7)
    figure.savefig(path, dpi=120)
