"""A multistage GEMM with ragged edges: right results, no findings, within half a second."""

from __future__ import annotations

import pytest
import torch

from ptx.conftest import ModuleLoader
from ptx.executor import Options
from ptx.gemm_cases import ONE_ROUNDING, SHAPES, run_gemm, run_split

PLAIN = Options()
ADVERSARIAL = [Options(adversarial=True, seed=s) for s in (1, 2)]


@pytest.mark.parametrize("options", [PLAIN, *ADVERSARIAL], ids=["plain", "seed1", "seed2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_gemm_is_right_at_ragged_edges(
    ptx_module: ModuleLoader,
    arch: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: Options,
) -> None:
    run = run_gemm(ptx_module("gemm_sm80.cu", arch), shape, options, dtype)
    assert run.result.ok, run.result.report()
    assert run.error <= ONE_ROUNDING


@pytest.mark.parametrize("kernel", ["gemm_split_atomic", "gemm_split_ordered"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_gemm_is_right(
    ptx_module: ModuleLoader, kernel: str, shape: tuple[int, int, int]
) -> None:
    for options in (PLAIN, *ADVERSARIAL):
        run = run_split(ptx_module("gemm_sm80.cu"), kernel, shape, 32, options)
        assert run.result.ok, run.result.report()
        assert run.error <= 1e-6


def test_ordered_split_gives_the_same_bits_in_every_schedule(ptx_module: ModuleLoader) -> None:
    runs = [
        run_split(ptx_module("gemm_sm80.cu"), "gemm_split_ordered", (65, 70, 160), 32, options)
        for options in (PLAIN, *ADVERSARIAL)
    ]
    assert all(torch.equal(r.out, runs[0].out) for r in runs)


def test_the_same_seed_gives_the_same_schedule(ptx_module: ModuleLoader) -> None:
    counts = [
        run_gemm(
            ptx_module("gemm_sm80.cu"), (65, 70, 40), Options(adversarial=True, seed=s)
        ).result.counters
        for s in (5, 5, 6)
    ]
    assert counts[0].opcodes == counts[1].opcodes != counts[2].opcodes


def test_a_gemm_with_all_checks_takes_less_than_half_a_second(ptx_module: ModuleLoader) -> None:
    module = ptx_module("gemm_sm80.cu")
    runs = [run_gemm(module, (256, 256, 512)) for _ in range(3)]
    assert all(r.result.ok for r in runs)
    assert min(r.result.seconds for r in runs) <= 0.5


def test_gemm_counters(ptx_module: ModuleLoader) -> None:
    """(128, 128, 128): 2 × 2 tiles, so each operand is read twice."""
    counters = run_gemm(ptx_module("gemm_sm80.cu"), (128, 128, 128)).result.counters
    copies = counters.shared["cp.async"]
    operand = 128 * 128 * 2
    assert counters.flops == 2 * 128**3
    assert counters.opcodes["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == 128**3 // (
        16 * 8 * 16
    )
    assert counters.shared["ldmatrix"].conflict_factor == 1.0 and copies.conflict_factor == 1.0
    scale_bytes = 4 * 128 * 128  # every thread loads the scale of each of its elements
    assert counters.loads.bytes == 2 * 2 * operand + scale_bytes
    assert counters.loads.unique_sectors == (2 * operand + 4 * 128) // 32
    assert counters.stores.bytes == operand and counters.stores.unique_sectors == operand // 32
    assert copies.bytes == 2 * 2 * operand
