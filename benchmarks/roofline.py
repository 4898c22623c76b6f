"""Modelled GPU times of one training step of each linear, ours against eager peers.

    python benchmarks/roofline.py                 # Llama-8B's linears, 4096 tokens, r = 8, k = 1
    python benchmarks/roofline.py --r 32 --k 4

Traffic comes from the counters of our kernels' PTX (results/kernels_ptx.json), device figures from
gpu_model.py. Nothing here was measured on a GPU, and every table says so. On a machine with a GPU
the same command measures rasa_linear beside the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import gpu_model
import torch
from gpu_model import DEVICES, Device, Layer
from report import RESULTS, commit, table

import rasa_ext

COUNTERS = RESULTS / "kernels_ptx.json"
LLAMA_8B = {  # in, out
    "q_proj, o_proj": (4096, 4096),
    "k_proj, v_proj": (4096, 1024),
    "gate_proj, up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
LAYERS = 32


def counted_traffic(path: Path, R: int) -> dict[str, float]:
    """Unique sectors over compulsory bytes of each form, at the smallest counted rank >= R."""
    rows = json.loads(path.read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    traffic = {}
    for form in ("shrink", "expand", "wgrad"):
        ours = [row for row in rows if row["form"] == form and row.get("splits", 1) == 1]
        ours = [row for row in ours if row.get("dtype") != "f32"]  # the model is of 16 bits
        if not ours:
            raise SystemExit(f"roofline: {path.name} has no unsplit row of {form}")
        rank = min((row["R"] for row in ours if row["R"] >= R), default=max(r["R"] for r in ours))
        traffic[form] = max(row["traffic_ratio"] for row in ours if row["R"] == rank)
    return traffic


def modelled(
    layer: Layer, device: Device, r: int, k: int, traffic: dict[str, float]
) -> dict[str, float]:
    """Milliseconds of each peer."""
    Rp, Rs = r - k, k * LAYERS
    steps = {
        "frozen": gpu_model.frozen_step(layer),
        "lora": gpu_model.lora_step(layer, r, has_dropout=True),
        "authors": gpu_model.authors_step(layer, Rp, Rs, has_dropout=True),
        "rasa": gpu_model.rasa_step(layer, Rp + Rs, traffic),
    }
    return {name: 1e3 * gpu_model.seconds(kernels, device) for name, kernels in steps.items()}


def measure(layer: Layer, r: int, k: int, device: str, dtype: torch.dtype, rounds: int) -> float:
    """Milliseconds of forward and backward of rasa_linear, median; base weight frozen."""
    Rp, Rs = r - k, k * LAYERS
    M, K, N = layer.M, layer.K, layer.N

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype).div_(size[-1] ** 0.5)

    x, weight = random(M, K).requires_grad_(), random(N, K)
    adapter = [random(Rp, K), random(Rs, K), random(Rp, N), random(Rs, N), random(Rp + Rs)]
    for t in adapter:
        t.requires_grad_()
    dy, seed = random(M, N), torch.zeros((), dtype=torch.int64, device=device)
    milliseconds = []
    for _ in range(rounds + 3):
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        y = rasa_ext.rasa_linear(x, weight, None, *adapter, p=0.05, seed=seed)
        torch.autograd.grad(y, [x, *adapter], dy)
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return statistics.median(milliseconds[3:])


def main() -> None:
    """Print the tables and write them beside the counters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--counters", type=Path, default=COUNTERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    R = args.r - args.k + args.k * LAYERS
    traffic = counted_traffic(args.counters, R)
    rows: list[dict[str, Any]] = []
    for device in DEVICES:
        for name, (K, N) in LLAMA_8B.items():
            layer = Layer(name, args.tokens, K, N)
            rows.append({"device": device.name, "layer": name, "K": K, "N": N})
            rows[-1] |= modelled(layer, device, args.r, args.k, traffic)
    print(f"modelled, not measured: one training step of a linear, {args.tokens} tokens, bf16,")
    print(f"r = {args.r}, k = {args.k}, R = {R}, dropout 0.05; times × the frozen layer's")
    header = ["device", "layer", "frozen ms", "LoRA", "authors", "rasa_ext", "rasa_ext / LoRA"]
    cells = [
        [row["device"], row["layer"], f"{row['frozen']:.3f}"]
        + [f"{row[peer] / row['frozen']:.2f}" for peer in ("lora", "authors", "rasa")]
        + [f"{row['rasa'] / row['lora']:.2f}"]
        for row in rows
    ]
    print(table(header, cells))
    record = {
        "modelled": True,
        "commit": commit(),
        "inputs": {
            "counters": args.counters.name,
            "traffic": traffic,
            "launch_seconds": gpu_model.LAUNCH_SECONDS,
            "library_efficiency": gpu_model.LIBRARY_EFFICIENCY,
            "devices": [vars(device) for device in DEVICES],
        },
        "tokens": args.tokens,
        "r": args.r,
        "k": args.k,
        "rows": rows,
    }
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        print(f"\nmeasured on {name}: rasa_linear, milliseconds")
        record["measured_on"], record["measured"] = name, {}
        for layer_name, (K, N) in LLAMA_8B.items():
            layer = Layer(layer_name, args.tokens, K, N)
            ms = measure(layer, args.r, args.k, "cuda", torch.bfloat16, rounds=30)
            record["measured"][layer_name] = ms
            print(f"  {layer_name}: {ms:.3f}")
    path = args.json or RESULTS / f"modelled_r{args.r}k{args.k}_{args.tokens}_tokens.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
