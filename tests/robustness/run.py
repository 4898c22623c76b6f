"""Runs what tests robustness, prints a verdict for each part, and keeps the counts.

    python tests/robustness/run.py                # make robustness: some ten minutes
    python tests/robustness/run.py --sanitize     # and the sanitizers, as long again
    python tests/robustness/run.py --only soak    # one part; the file keeps the others

Writes benchmarks/results/robustness.json; each part names the commit that it ran at. Exits with 1
if any part failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]

import fuzz_ops  # noqa: E402
import mutate_adapters  # noqa: E402
import report  # noqa: E402
import soak  # noqa: E402

GOOD = ("flat", "as specified", "clean")


def counted(outcomes: Counter[str]) -> dict[str, Any]:
    """The counts of random inputs, with a verdict."""
    wrong = outcomes["WRONG"] + outcomes["CRASH"]
    tried = {"tried": sum(outcomes.values()), "outcomes": dict(sorted(outcomes.items()))}
    fault = f"{wrong} wrong" if wrong else "" if outcomes else "nothing tried"
    return tried | {"verdict": fault or "as specified"}


def sanitized() -> dict[str, Any]:
    """The counts of the sanitizers' run; a report of theirs ends it."""
    done = subprocess.run([HERE / "sanitize"], capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-4000:])
        return {"verdict": f"ended with {done.returncode}"}
    tests = re.search(r"(\d+) passed", done.stdout)
    calls = re.search(r"(\d+) calls", done.stdout)
    assert tests and calls, done.stdout[-2000:]
    return {"tests": int(tests[1]), "calls": int(calls[1]), "verdict": "clean"}


def main() -> int:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="of the soak")
    parser.add_argument("--calls", type=int, default=20_000, help="of the ops")
    parser.add_argument("--files", type=int, default=5_000, help="damaged adapter files")
    parser.add_argument("--seed", type=int, default=0, help="of the first call and file")
    parser.add_argument("--sanitize", action="store_true", help="ASan and UBSan as well")
    parser.add_argument("--only", nargs="+", help="parts, of soak, calls, files and sanitizers")
    parser.add_argument("--json", type=Path, default=report.RESULTS / "robustness.json")
    args = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "soak": lambda: soak.run(args.steps),  # first: in a process that has done nothing else
        "calls": lambda: counted(fuzz_ops.run(args.calls, args.seed)),
        "files": lambda: counted(mutate_adapters.run(args.files, args.seed)),
    }
    if args.sanitize or "sanitizers" in (args.only or ()):
        parts["sanitizers"] = sanitized
    results: dict[str, Any] = {}
    if args.only:
        if unknown := set(args.only) - parts.keys():
            parser.error(f"--only: no part is called {', '.join(sorted(unknown))}")
        if args.json.exists():
            kept = json.loads(args.json.read_text())
            results = {name: kept[name] for name in (*parts, "sanitizers") if name in kept}
        parts = {name: part for name, part in parts.items() if name in args.only}
    print(report.heading())
    for name, part in parts.items():
        start, commit = time.perf_counter(), report.commit()
        results[name] = part() | {"commit": commit}
        results[name]["seconds"] = round(time.perf_counter() - start)
        counts = ", ".join(f"{k} {v}" for k, v in results[name].items() if k != "verdict")
        print(f"{name}: {results[name]['verdict']} ({counts})", flush=True)
    report.write_json(args.json, {"seed": args.seed}, results)
    failed = [name for name, result in results.items() if result["verdict"] not in GOOD]
    print(f"robustness: {'FAILED: ' + ', '.join(failed) if failed else 'passed'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
