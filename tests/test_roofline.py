"""The GPU model: bytes and flops by hand, and the script that prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_model  # noqa: E402
from gpu_model import Device, Kernel, Layer  # noqa: E402

DEVICE = Device("toy", bandwidth=1e9, library_flops=1e12, mma_flops=5e11)


def test_a_kernel_takes_the_longer_of_its_two_times_and_a_launch():
    by_bytes = Kernel("copy", bytes=1e6, flops=1.0)
    by_flops = Kernel("mma", bytes=1.0, flops=1e9, is_library=False)
    assert by_bytes.seconds(DEVICE) == 1e6 / 1e9 + gpu_model.LAUNCH_SECONDS
    assert by_flops.seconds(DEVICE) == 1e9 / 5e11 + gpu_model.LAUNCH_SECONDS


def test_our_step_has_five_launches_and_the_bytes_of_the_design():
    M, K, N, R = 4096, 1024, 2048, 39
    kernels = gpu_model.rasa_step(Layer("toy", M, K, N), R, dict.fromkeys(
        ("shrink", "expand", "wgrad"), 1.0
    ))  # fmt: skip
    ours = [kernel for kernel in kernels if not kernel.is_library]
    weights_and_ranks = sum(kernel.bytes for kernel in ours) - 2 * M * (4 * K + 4 * N)
    assert len(ours) == 5
    assert weights_and_ranks == 2 * (6 * M * R + 4 * R * (K + N))


def test_peers_pay_for_dropout_where_it_is_on():
    layer = Layer("toy", 512, 64, 64)
    for step in (
        lambda p: gpu_model.lora_step(layer, 8, p),
        lambda p: gpu_model.authors_step(layer, 7, 32, p),
    ):
        assert gpu_model.seconds(step(True), DEVICE) > gpu_model.seconds(step(False), DEVICE)


@pytest.fixture
def counters(tmp_path: Path) -> Path:
    path = tmp_path / "counters.json"
    forms = ("shrink", "expand", "wgrad")
    path.write_text(json.dumps([{"form": f, "R": 39, "traffic_ratio": 1.0} for f in forms]))
    return path


def test_the_table_says_that_it_is_modelled(counters, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "roofline.py", "--counters", counters, "--json", out]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    record = json.loads(out.read_text())
    assert run.stdout.startswith("Modelled, not measured")
    assert record["modelled"] is True
    assert len(record["rows"]) == len(gpu_model.DEVICES) * 4
    assert all(0 < row["frozen"] < row["rasa"] < row["lora"] for row in record["rows"])
