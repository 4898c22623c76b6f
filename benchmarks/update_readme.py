"""Writes the tables of README.md and benchmarks/README.md from the files in benchmarks/results.

    python benchmarks/update_readme.py             # writes
    python benchmarks/update_readme.py --check     # fails where a table is not that of its file

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being a key of TABLES.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

import finetune_quality
import l1ra
import reconstruction
import roofline
import scaling
import tables
from report import REPOSITORY, RESULTS

DOCUMENTS = (REPOSITORY / "README.md", REPOSITORY / "benchmarks" / "README.md")


def read_all(name: str) -> list[dict[str, Any]]:
    """Return what a benchmark left on each machine, for which `*` stands, the newest first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob(name)]
    if not found:
        raise SystemExit(f"readme: expected a file {name} in benchmarks/results, got none")
    return sorted(found, key=lambda record: str(record.get("date")), reverse=True)


def read(name: str) -> dict[str, Any]:
    """Return the newest of read_all()."""
    return read_all(name)[0]


def origin(record: dict[str, Any]) -> str:
    """Say where and when a result was measured."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"Measured {record['date'][:10]} at commit {record['commit']} on {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['capability']}, torch {versions['torch']}.\n\n"
    )


def step_table(name: str) -> str:
    """Return the times of a step's peers."""
    record = read(name)
    return tables.step_table(record["results"], record["settings"]["memory_dropout"])


def step_summary(name: str) -> str:
    """Return the same in one row for each peer."""
    record = read(name)
    summary = tables.step_summary(record["results"], record["settings"]["memory_dropout"])
    return origin(record) + summary


def step_figures(name: str) -> str:
    """Return a step's quotients beside the figures to reach."""
    record = read(name)
    return origin(record) + tables.figures_table(record["results"])


def step_machines() -> str:
    """Return the quotients of all machines' steps."""
    records = [r for layers in (8, 30) for r in read_all(f"*_step_{layers}_layers.json")]
    return tables.machines_table(records)


def layer_summary() -> str:
    """Return the suite of single linears."""
    record = read("*_linears.json")
    return origin(record) + tables.layer_table(record["results"], record["settings"])


def merge_times() -> str:
    """Return the times of merging."""
    record = read("*_merge.json")
    return origin(record) + tables.merge_table(record["results"])


def parts_times() -> str:
    """Return the times of siblings with parts of rasa_ext left out."""
    record = read("*_parts.json")
    return origin(record) + tables.parts_table(record["results"])


def growth() -> str:
    """Return how time and memory grow."""
    record = read("*_scaling.json")
    return origin(record) + scaling.growth_table(record["results"])


def reconstruction_ratios(start: str) -> str:
    """Return how near real matrices RaSA comes, beside LoRA."""
    record = read("reconstruction.json")
    sources = {run["source"]: run["kinds"] for run in record["runs"]}
    return reconstruction.ratio_table(sources, start)


def l1ra_runs() -> list[dict[str, Any]]:
    """Return the runs of L1RA and LoRA."""
    runs: list[dict[str, Any]] = read("l1ra.json")["runs"]
    return runs


def finetune_losses(dataset: str) -> str:
    """Return what RaSA and LoRA came to on one data set."""
    record = read(f"finetune_{dataset}.json")
    runs = record["runs"]
    text = finetune_quality.description(record["settings"], runs)
    return text + finetune_quality.loss_table(dataset, runs)


def finetune_rates(dataset: str) -> str:
    """Return the validation losses that chose the learning rates."""
    return finetune_quality.tuning_table(dataset, read(f"finetune_{dataset}.json")["runs"])


def robustness() -> str:
    """Return what `make robustness` tried, and its verdicts."""
    record = read("robustness.json")
    parts = (tables.verdict_table(record), tables.input_table(record))
    return origin(record) + "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "step-summary": lambda: step_summary("*_step_8_layers.json"),
    "step": lambda: step_table("*_step_8_layers.json"),
    "step-figures": lambda: step_figures("*_step_8_layers.json"),
    "step-full": lambda: step_table("*_step_30_layers.json"),
    "step-full-figures": lambda: step_figures("*_step_30_layers.json"),
    "step-machines": step_machines,
    "parts": parts_times,
    "layers": layer_summary,
    "merge": merge_times,
    "scaling": growth,
    "reconstruction-lora": lambda: reconstruction_ratios("lora"),
    "reconstruction-random": lambda: reconstruction_ratios("random"),
    "l1ra": lambda: l1ra.loss_table(l1ra_runs()) + "\n\n" + l1ra.rank_table(l1ra_runs()),
    "finetune": lambda: finetune_losses("gsm_symbolic"),
    "finetune-rates": lambda: finetune_rates("gsm_symbolic"),
    "finetune-code": lambda: finetune_losses("code"),
    "finetune-code-rates": lambda: finetune_rates("code"),
    "robustness": robustness,
    "modelled-r8k1": lambda: roofline.modelled_table(read("modelled_r8k1_*.json")),
    "modelled-r32k4": lambda: roofline.modelled_table(read("modelled_r32k4_*.json")),
}


def filled(text: str) -> str:
    """Return a document with all its tables written anew."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    names = "|".join(map(re.escape, TABLES))
    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Write the documents, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for path in DOCUMENTS:
        before = path.read_text()
        after = filled(before)
        if args.check and before != after:
            raise SystemExit(f"{path.name} has other tables than its results: make readme")
        path.write_text(after)


if __name__ == "__main__":
    main()
