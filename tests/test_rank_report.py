"""The report of a RankAllocator: what the files hold."""

from __future__ import annotations

import csv
import json

from allocators import FIRST, NAMES, allocation, set_gates, trained_parameters

from rasa_ext import rank_report, save_rank_report


def test_the_report_counts_ranks_and_parameters_as_the_model_does() -> None:
    model, _, allocator = allocation(k=1)
    before = sum(p.numel() for p in trained_parameters(model))
    # 0.4 and up are used, and of three shared ranks this layer uses one.
    set_gates(model, {FIRST: [0.0, 0.0, 0.4, 0.5, 0.0, 1.0]})

    allocator.update()
    report = rank_report(allocator)

    first, last = report["history"]
    assert (first["ranks"], first["parameters"]) == (9 * 3 + 3 * 3, before)
    assert last["parameters"] == sum(p.numel() for p in trained_parameters(model))
    assert (last["private"][FIRST], last["shared"][FIRST], last["ranks"]) == (2, 1, 36)
    assert last["pools"] == dict.fromkeys(last["pools"], 3)
    assert list(report["layers"]) == NAMES
    assert report["layers"][FIRST] == {
        "group": "attn__q_proj__8x8",
        "in_features": 8,
        "out_features": 8,
    }


def test_the_files_say_the_same_and_the_picture_is_one(tmp_path) -> None:
    model, _, allocator = allocation()
    set_gates(model, {FIRST: [1.0, 0.0, 1.0, 0.0]})
    allocator.update()

    save_rank_report(allocator, tmp_path / "new" / "folder")

    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "ranks.json").read_text()) == rank_report(allocator)
    with (folder / "ranks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 9
    ranks = {row["layer"]: int(row["private"]) for row in rows[9:]}
    assert ranks == allocator.rank_pattern()
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
