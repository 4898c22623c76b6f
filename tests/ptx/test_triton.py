"""Agreement with PTX that Triton wrote: right against float64, and no findings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptx.executor import Buffer, Module, Options

pytest.importorskip("triton", reason="the optional test dependency triton is not installed")

from ptx import triton_kernels as kernels  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPSILON = {
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
    "fp32": 2.0**-10,
}  # one rounding; of the operands for tf32
SCHEDULES = [Options(), Options(adversarial=True, seed=1), Options(adversarial=True, seed=2)]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Triton from finding, or leaving, anything in the user's home."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launch(
    compiled: kernels.Compiled,
    grid: tuple[int, ...],
    args: list[Any],
    out: Buffer,
    options: Options,
) -> None:
    """Launch; parameters behind the arguments are Triton's scratch pointers, here unused."""
    kernel = Module(compiled.ptx).kernel(compiled.name)
    args = args + [0] * (len(kernel.code.params) - len(args))
    result = kernel.launch(grid, compiled.threads, args, compiled.shared_bytes, [out], options)
    assert result.ok, result.report()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(dtype: str, capability: int) -> None:
    M, N, K = 112, 96, 160  # less than two tiles, and a ragged last K step
    constants = {"BM": 64, "BN": 64, "BK": 64}
    pointers = dict.fromkeys("abc", dtype)
    compiled = kernels.compile_kernel(
        kernels.matmul, pointers, ["M", "N", "K"], constants, capability
    )
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    operands = {"bf16": "bf16", "fp16": "f16", "fp32": "tf32"}[dtype]
    assert re.search(rf"{instruction}\S*\.f32\.{operands}\.{operands}", compiled.ptx)
    assert "cp.async" in compiled.ptx
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in ((M, K), (K, N)))
    exact = a.double() @ b.double()
    scale = (a.double().abs() @ b.double().abs()).max().item()
    for options in SCHEDULES:
        c = Buffer(torch.full((M, N), torch.nan, dtype=DTYPES[dtype]))
        launch(compiled, (2, 2), [Buffer(a), Buffer(b), c, M, N, K], c, options)
        assert (c.read().double() - exact).abs().max().item() <= EPSILON[dtype] * scale


@pytest.mark.parametrize("capability", [80, 90])
def test_softmax(capability: int) -> None:
    rows, columns = 5, 304
    compiled = kernels.compile_kernel(
        kernels.softmax, {"x": "fp32", "y": "fp32"}, ["num_columns"], {"BLOCK": 512}, capability
    )
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    exact = torch.softmax(torch.from_numpy(x).double(), 1)
    for options in SCHEDULES:
        y = Buffer(np.full_like(x, np.nan))
        launch(compiled, (rows,), [Buffer(x), y, columns], y, options)
        torch.testing.assert_close(torch.from_numpy(y.read()).double(), exact, rtol=1e-6, atol=0)
