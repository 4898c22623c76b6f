"""Interleaved timing: every round runs every peer once, so a slow moment hits all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

# A median of fewer says little.
FEWEST_ROUNDS = 5


def interleave(
    runs: dict[str, Callable[[], object]], rounds: int, most_seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds per run and round, after one warm-up of each; the order rotates between rounds.

    Stops after `most_seconds`, but not before FEWEST_ROUNDS. What torch.compile compiles, it
    compiles in the warm-up: a round that would do so raises.
    """
    names, begun = list(runs), time.perf_counter()
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(rounds):
            if i >= FEWEST_ROUNDS and time.perf_counter() - begun > most_seconds:
                break
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def calls_within(seconds: float, run: Callable[[], object]) -> int:
    """Return how many calls fill about that time, at least one; the first call is a warm-up."""
    run()
    start = time.perf_counter()
    run()
    return max(1, round(seconds / (time.perf_counter() - start)))


def summary(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Summary of the per-round quotients, which cancel what slowed both peers of a round."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return summary([a / b for a, b in pairs])
