"""Runs the GEMMs of kernels/gemm_sm80.cu on random operands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ptx.executor import Buffer, Module, Options, Output, Result
from ptx.formats import relative_error

TILE, STAGES, THREADS = 64, 3, 128
SHARED_BYTES = STAGES * 2 * TILE * 32 * 2
ONE_ROUNDING = 2.0**-8  # to bf16, relative

# M, N, K: one tile, several, ragged edges in every dimension, a single row, a single K step.
SHAPES = [(64, 64, 64), (128, 64, 96), (65, 70, 40), (1, 8, 8), (33, 127, 104), (200, 66, 256)]


@dataclass(frozen=True)
class Run:
    """A launch, its relative error against float64, and the output."""

    result: Result
    error: float
    out: torch.Tensor


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _tiles(M: int, N: int) -> tuple[int, int]:
    return (N + TILE - 1) // TILE, (M + TILE - 1) // TILE


def run_gemm(
    module: Module,
    shape: tuple[int, int, int],
    options: Options | None = None,
    dtype: torch.dtype = torch.bfloat16,
    check_values: bool = False,
) -> Run:
    """Run gemm_bf16 or gemm_f16; check_values makes a wrong result a finding."""
    M, N, K = shape
    a, b, scale = (
        _random((M, K), dtype, 1),
        _random((N, K), dtype, 2),
        _random((N,), torch.float32, 3),
    )
    exact = ((a.double() @ b.double().T) * scale.double()).numpy()
    c = Buffer(torch.full((M, N), torch.nan, dtype=dtype))
    output = Output(c, exact=exact if check_values else None, max_error=ONE_ROUNDING)
    result = module.launch(
        "gemm_f16" if dtype is torch.float16 else "gemm_bf16",
        _tiles(M, N),
        THREADS,
        [Buffer(a), Buffer(b), Buffer(scale), c, M, N, K],
        shared_bytes=SHARED_BYTES,
        outputs=[output],
        options=options,
    )
    out = c.read()
    return Run(result, relative_error(out.double().numpy(), exact), out)


def run_split(
    module: Module,
    kernel: str,
    shape: tuple[int, int, int],
    k_chunk: int,
    options: Options | None = None,
) -> Run:
    """Run gemm_split_atomic or gemm_split_ordered."""
    M, N, K = shape
    a, b = _random((M, K), torch.bfloat16, 1), _random((N, K), torch.bfloat16, 2)
    splits, tiles = (K + k_chunk - 1) // k_chunk, _tiles(M, N)
    ordered = kernel == "gemm_split_ordered"
    c = Buffer(torch.full((M, N), torch.nan if ordered else 0.0))
    extra: list[Buffer] = []
    if ordered:
        workspace = Buffer(torch.full((splits, M, N), torch.nan))
        extra = [workspace, Buffer(np.zeros(tiles[0] * tiles[1], np.uint32))]
    result = module.launch(
        kernel,
        (*tiles, splits),
        THREADS,
        [Buffer(a), Buffer(b), c, *extra, M, N, K, k_chunk],
        shared_bytes=SHARED_BYTES,
        outputs=[c, extra[0]] if ordered else [],
        options=options,
    )
    out = c.read()
    return Run(result, relative_error(out.numpy(), (a.double() @ b.double().T).numpy()), out)
