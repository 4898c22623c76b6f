"""What a benchmark run leaves behind: tables for people, one JSON file for later."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def cpu_name() -> str:
    """The processor's model name, without the frequency some vendors append."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].split(" @")[0].strip() if found else platform.machine()


def machine() -> dict[str, Any]:
    """The hardware, in words that identify no host."""
    on_gpu = torch.get_default_device().type == "cuda"
    return {
        **({"gpu": torch.cuda.get_device_name()} if on_gpu else {}),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Installed versions of everything that is timed; a package that is absent has no entry."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "rasa_ext"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout, '-dirty' with uncommitted changes, 'unknown' outside git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def heading() -> str:
    """One line above every table."""
    m, v = machine(), versions()
    packages = ", ".join(f"{name} {version}" for name, version in v.items())
    gpu = f"{m['gpu']}; " if "gpu" in m else ""
    return f"{gpu}{m['cpu']}, {m['threads']} threads, {m['capability']}; {packages} ({commit()})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def spread(value: dict[str, float], digits: int = 2, unit: float = 1.0) -> str:
    """`median (min-max)`."""
    median, low, high = (value[key] / unit for key in ("median", "min", "max"))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def write_json(path: Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the run with all that is needed to read it later: machine, versions, commit, date."""
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: a run of many parts writes it after each and may be stopped.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def timing_path(subject: str) -> Path:
    """One file per machine and subject; what depends on no machine has a name without one."""
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return RESULTS / f"{slug}_{subject}.json"
