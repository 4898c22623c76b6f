"""Peak memory of a training step, each peer in a process of its own.

Counted is resident memory: the high-water mark of two steps less what the process held before the
first. The weights, alike in all peers, are in both; activations, gradients, optimizer state and
every temporary are in the difference.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import step
import torch
from peers import Adapter

PROCESS = Path("/proc/self")


def resident(mark: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    found = re.search(rf"{mark}:\s+(\d+) kB", (PROCESS / "status").read_text())
    if found is None:
        raise SystemExit(f"bench: peak memory needs {mark} in /proc/self/status, as on Linux")
    return int(found[1]) * 1024


def probe(
    name: str, dtype: torch.dtype, adapter: Adapter, layers: int, batch: tuple[int, int]
) -> int:
    """Return the bytes two steps take at most beyond what was there before."""
    run = step.training_step(
        step.build(name, step.smollm2_shape(dtype, layers), adapter, layers),
        torch.randint(0, step.vocabulary(layers), batch),
    )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the high-water mark to the present size: building the model does not count.
    (PROCESS / "clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    run()
    return resident("VmHWM") - before


def measure(
    name: str,
    dtype: torch.dtype,
    adapter: Adapter,
    layers: int,
    batch: tuple[int, int] | None = None,
) -> int:
    """Run probe() in a fresh process; batch is of sequences and tokens, by default the step's."""
    arguments = [name, str(dtype).removeprefix("torch."), str(adapter.dtype).removeprefix("torch.")]
    numbers = [adapter.r, adapter.k, adapter.alpha, adapter.dropout, layers, *(batch or step.BATCH)]
    command = [sys.executable, __file__, *arguments, *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"bench: measuring the memory of '{name}' failed:\n{result.stderr}")
    return int(json.loads(result.stdout))


def main() -> None:
    """Probe one peer and print the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    for argument in ("name", "dtype", "adapter_dtype"):
        parser.add_argument(argument)
    for argument, kind in (("r", int), ("k", int), ("alpha", float), ("dropout", float)):
        parser.add_argument(argument, type=kind)
    for argument in ("layers", "sequences", "tokens"):
        parser.add_argument(argument, type=int)
    args = parser.parse_args()
    dtype, adapter_dtype = getattr(torch, args.dtype), getattr(torch, args.adapter_dtype)
    adapter = Adapter(step.TARGETS, args.r, args.k, args.alpha, args.dropout, adapter_dtype)
    batch = (args.sequences, args.tokens)
    print(probe(args.name, dtype, adapter, args.layers, batch))


if __name__ == "__main__":
    main()
