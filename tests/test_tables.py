"""Tables of results that lack figures: cells stay empty, columns without a figure are left out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import tables  # noqa: E402

ONE = {"median": 1.0, "min": 1.0, "max": 1.0}
BOTH = {"resident": 3 * 2**20, "allocated": 2**20}


def rows(text):
    """Cells of a Markdown table, by header."""
    header, _, *lines = [[c.strip() for c in row[1:-1].split("|")] for row in text.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def step_result(**memory):
    seconds = {name if name == "frozen" else f"{name} p=0": ONE for name in memory}
    ratios = {f"{run} / frozen": ONE for run in seconds}
    return {
        "seconds": seconds,
        "ratios": ratios,
        "error": dict.fromkeys(memory, 0.0),
        "memory": memory,
    }


def layer_result(**more):
    us = {"frozen": ONE, "lora": ONE}
    shape = {"M": 1, "K": 2, "N": 3}
    result = {"dtype": "float32", "dropout": 0.0, "shape": shape, "us": us, "over_frozen": us}
    return result | more


def test_step_tables_show_an_empty_cell_for_memory_that_was_not_measured():
    result = step_result(frozen=BOTH, lora=BOTH, rasa={"resident": 6 * 2**20})
    (_, lora, rasa) = rows(tables.step_table({"fp32": result}, 0.0))
    assert (lora["resident MiB"], lora["allocated MiB"]) == ("3", "1")
    assert (rasa["resident MiB"], rasa["allocated MiB"]) == ("6", "")
    (_, lora, rasa) = rows(tables.step_summary({"fp32": result}, 0.0))
    assert (lora["allocated MiB"], rasa["allocated MiB"]) == ("1", "")
    (row,) = rows(tables.figures_table({"fp32": result}))
    assert (row["quotient"], row["measured"]) == ("peak resident memory, rasa / lora", "2.00")


def test_step_tables_leave_out_memory_that_no_peer_has():
    result = step_result(frozen={"resident": 1}, rasa={"resident": 1})
    for table in (tables.step_table, tables.step_summary):
        (frozen, _) = rows(table({"fp32": result}, 0.0))
        assert "resident MiB" in frozen and "allocated MiB" not in frozen


def test_step_tables_show_memory_only_with_the_dropout_it_was_measured_with():
    result = step_result(frozen=BOTH, rasa=BOTH)
    (frozen, rasa) = rows(tables.step_table({"fp32": result}, 0.05))
    assert (frozen["allocated MiB"], rasa["allocated MiB"]) == ("1", "")


def test_layer_table_shows_an_empty_cell_for_memory_that_was_not_measured():
    settings = {"r": 8, "k": 1, "layers": 30}
    with_memory = layer_result(allocated={"frozen": 2**19, "lora": 2**20})
    first, second = rows(tables.layer_table([with_memory, layer_result()], settings))
    assert (first["frozen, MiB"], first["lora, MiB"]) == ("0.5", "1.0")
    assert (second["frozen, MiB"], second["lora, MiB"]) == ("", "")
    (only,) = rows(tables.layer_table([layer_result()], settings))
    assert not any("MiB" in header for header in only)
