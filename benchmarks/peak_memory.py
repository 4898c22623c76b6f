"""Peak memory of a training step, each peer in a process of its own.

resident: the high-water mark of two steps less what the process held before the first. The weights,
alike in all peers, are in both; activations, gradients, optimizer state and every temporary are in
the difference. Only the compiled peer runs once before, forward and backward: compiling takes more.

allocated: what torch's allocator handed out at most during a third step, beyond what lived before
it: gradients, but no optimizer state, and nothing that libraries or malloc keep for themselves.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import step
import torch
from peers import Adapter
from torch.profiler import ProfilerActivity, profile

# Else the profiler reports on stderr that it started, and that it stopped.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

PROCESS = Path("/proc/self")


def resident(mark: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    found = re.search(rf"{mark}:\s+(\d+) kB", (PROCESS / "status").read_text())
    if found is None:
        raise SystemExit(f"bench: peak memory needs {mark} in /proc/self/status, as on Linux")
    return int(found[1]) * 1024


def peak_allocated(run: Callable[[], object]) -> int:
    """Return the bytes that torch's allocator hands out at most, beyond what lived before `run`."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    blocks: dict[int, int] = {}
    live = peak = 0
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("name") != "[memory]":
            continue
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        # One that is freed has a negative size. If it lived before, it is not among the blocks.
        live -= blocks.pop(address, 0)
        if size > 0:
            blocks[address] = size
            live += size
        peak = max(peak, live)
    return peak


def probe(
    name: str, dtype: torch.dtype, adapter: Adapter, layers: int, batch: tuple[int, int]
) -> dict[str, int]:
    """Return the resident and the allocated bytes of this process."""
    model = step.build(name, step.smollm2_shape(dtype, layers), adapter, layers)
    tokens = torch.randint(0, step.vocabulary(layers), batch)
    run = step.training_step(model, tokens)
    if name == "compiled":
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the high-water mark to the present size: building the model does not count.
    (PROCESS / "clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    run()
    taken = resident("VmHWM") - before
    return {"resident": taken, "allocated": peak_allocated(run)}


def measure(
    name: str,
    dtype: torch.dtype,
    adapter: Adapter,
    layers: int,
    batch: tuple[int, int] | None = None,
) -> dict[str, int]:
    """Run probe() in a fresh process; batch is of sequences and tokens, by default the step's."""
    arguments = [name, str(dtype).removeprefix("torch."), str(adapter.dtype).removeprefix("torch.")]
    numbers = [adapter.r, adapter.k, adapter.alpha, adapter.dropout, layers, *(batch or step.BATCH)]
    command = [sys.executable, __file__, *arguments, *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"bench: measuring the memory of '{name}' failed:\n{result.stderr}")
    measured: dict[str, int] = json.loads(result.stdout)
    return measured


def main() -> None:
    """Probe one peer and print the bytes as JSON."""
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
    print(json.dumps(probe(args.name, dtype, adapter, args.layers, batch)))


if __name__ == "__main__":
    main()
