"""The Hopper set: TMA, mbarrier, wgmma and proxy fences in a GEMM, with its planted defects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.conftest import ModuleLoader
from ptx.executor import Buffer, ExecutorError, Kind, Module, Options, Result, tensor_map
from ptx.formats import from_bf16, relative_error, to_bf16

TILE, STAGES, THREADS = 64, 3, 160
SHARED_BYTES = STAGES * 2 * TILE * TILE * 2 + TILE * TILE * 2 + 1024
AS_LATE_AS_POSSIBLE, AT_RANDOM, AT_ONCE = 0, 1, 2


def run_gemm(module: Module, M: int, N: int, K: int, options: Options) -> tuple[Result, float]:
    """Run gemm_wgmma; returns the result and the relative error."""
    rng = np.random.default_rng(M + N + K)
    a, b = to_bf16(rng.standard_normal((M, K))), to_bf16(rng.standard_normal((N, K)))
    scale = rng.standard_normal(N).astype(np.float32)
    buffers = Buffer(a), Buffer(b), Buffer(np.full((M, N), 0x7FC0, np.uint16))
    maps = [
        tensor_map(buffer, 2, [columns, rows], [2 * columns], [TILE, TILE], swizzle="128B")
        for buffer, rows, columns in zip(buffers, (M, N, M), (K, K, N), strict=True)
    ]
    grid = ((N + TILE - 1) // TILE, (M + TILE - 1) // TILE)
    result = module.launch(
        "gemm_wgmma",
        grid,
        THREADS,
        [*maps, Buffer(scale), N, K],
        shared_bytes=SHARED_BYTES,
        outputs=[buffers[2]],
        options=options,
    )
    exact = (from_bf16(a).astype(float) @ from_bf16(b).astype(float).T) * scale
    return result, relative_error(from_bf16(buffers[2].read()), exact)


@pytest.mark.parametrize("timing", [AS_LATE_AS_POSSIBLE, AT_RANDOM, AT_ONCE])
@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (64, 64, 512), (65, 72, 200), (200, 136, 264)], ids=str
)
def test_gemm_is_right(
    ptx_module: ModuleLoader, shape: tuple[int, int, int], adversarial: bool, timing: int
) -> None:
    options = Options(adversarial=adversarial, bulk_copy_timing=timing)
    result, error = run_gemm(ptx_module("gemm_sm90.cu", "sm_90a"), *shape, options)
    assert result.ok, result.report()
    assert error <= 2.0**-8


def test_counters_of_bulk_copies(ptx_module: ModuleLoader) -> None:
    """128³: every operand tile is loaded twice, the output stored once."""
    counters = run_gemm(ptx_module("gemm_sm90.cu", "sm_90a"), 128, 128, 128, Options())[0].counters
    operand, scale_loads = 128 * 128 * 2, 4 * 128 * 128  # each element's thread loads its scale
    assert counters.loads.bytes == 4 * operand + scale_loads
    assert counters.loads.unique_sectors == (2 * operand + 4 * 128) // 32
    assert counters.stores.bytes == operand and counters.stores.unique_sectors == operand // 32
    assert counters.flops == 2 * 128**3


SEEDS = {
    "SEED_NO_EMPTY_WAIT": {Kind.UNFINISHED_COPY, Kind.SHARED_WRITE_AFTER_READ, Kind.MISUSE},
    "SEED_FEWER_BYTES": {Kind.UNFINISHED_COPY, Kind.DEADLOCK},
    "SEED_MORE_BYTES": {Kind.DEADLOCK},
    "SEED_WRONG_PARITY": {Kind.UNINITIALISED, Kind.UNFINISHED_COPY, Kind.DEADLOCK},
    "SEED_EARLY_RELEASE": {Kind.SHARED_WRITE_AFTER_READ},
    "SEED_NO_PROXY_FENCE": {Kind.PROXY},
    "SEED_NO_STORE_WAIT": {Kind.EXIT_WITH_BULK},
}


@pytest.mark.parametrize("seed", SEEDS)
def test_defect_is_named(ptx_module: ModuleLoader, seed: str) -> None:
    module = ptx_module("gemm_sm90.cu", "sm_90a", seed)
    for timing in (AS_LATE_AS_POSSIBLE, AT_RANDOM):
        result, _ = run_gemm(
            module, 130, 72, 520, Options(bulk_copy_timing=timing, adversarial=timing == AT_RANDOM)
        )
        assert result.kinds & SEEDS[seed], result.report()


def test_mma_of_fp8(ptx_module: ModuleLoader) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        torch.from_numpy(rng.standard_normal(s)).to(torch.float8_e4m3fn)
        for s in ((16, 32), (8, 32))
    )
    c = Buffer(np.zeros((16, 8), np.float32))
    module = ptx_module("gemm_sm90.cu", "sm_90a")
    result = module.launch("multiply_e4m3", 1, 32, [Buffer(a), Buffer(b), c], outputs=[c])
    assert result.ok, result.report()
    assert relative_error(c.read(), (a.double() @ b.double().T).numpy()) <= 1e-6


def test_a_tensor_map_that_the_driver_would_refuse_is_refused() -> None:
    buffer = Buffer(np.zeros(4096, np.uint16))
    with pytest.raises(ExecutorError, match="stride is no multiple of 16"):
        tensor_map(buffer, 2, [60, 8], [120], [64, 8])
    with pytest.raises(ExecutorError, match="inner box size exceeds the swizzle width"):
        tensor_map(buffer, 2, [128, 8], [256], [128, 8], swizzle="128B")
