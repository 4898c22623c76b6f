"""Runs the GEMMs of kernels/gemm_sm80.cu on random operands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.executor import Buffer, Module, Options, Output, Result
from ptx.formats import from_bf16, relative_error, to_bf16

TILE, STAGES, THREADS = 64, 3, 128
SHARED_BYTES = STAGES * 2 * TILE * 32 * 2
NAN_BF16, NAN_F16 = 0x7FC0, 0x7E00

# M, N, K: one tile, several, ragged edges in every dimension, a single row, a single K step.
SHAPES = [(64, 64, 64), (128, 64, 96), (65, 70, 40), (1, 8, 8), (33, 127, 104), (200, 66, 256)]


@dataclass(frozen=True)
class Run:
    """A launch, its relative error against float64, and the output bits."""

    result: Result
    error: float
    out: np.ndarray


def _operands(
    M: int, N: int, K: int, half: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(A bits, B bits, scale, exact A·Bᵀ)."""
    rng = np.random.default_rng(M * 7 + N * 5 + K)
    a, b, scale = (rng.standard_normal(s).astype(np.float32) for s in ((M, K), (N, K), (N,)))
    if half:
        a_bits, b_bits = a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16)
        a, b = a_bits.view(np.float16), b_bits.view(np.float16)
    else:
        a_bits, b_bits = to_bf16(a), to_bf16(b)
        a, b = from_bf16(a_bits), from_bf16(b_bits)
    return a_bits, b_bits, scale, a.astype(np.float64) @ b.astype(np.float64).T


def _tiles(M: int, N: int) -> tuple[int, int]:
    return (N + TILE - 1) // TILE, (M + TILE - 1) // TILE


def run_gemm(
    module: Module, shape: tuple[int, int, int], options: Options | None = None, half: bool = False
) -> Run:
    """Run gemm_bf16 or gemm_f16."""
    M, N, K = shape
    a, b, scale, product = _operands(M, N, K, half)
    c = Buffer(np.full((M, N), NAN_F16 if half else NAN_BF16, np.uint16))
    args = [Buffer(a), Buffer(b), Buffer(scale), c, M, N, K]
    name = "gemm_f16" if half else "gemm_bf16"
    result = module.launch(
        name, _tiles(M, N), THREADS, args, shared_bytes=SHARED_BYTES, outputs=[c], options=options
    )
    out = c.read()
    values = out.view(np.float16) if half else from_bf16(out)
    return Run(result, relative_error(values, product * scale), out)


def run_split(
    module: Module,
    kernel: str,
    shape: tuple[int, int, int],
    k_chunk: int,
    options: Options | None = None,
) -> Run:
    """Run gemm_split_atomic or gemm_split_ordered."""
    M, N, K = shape
    a, b, _, product = _operands(M, N, K, half=False)
    splits, tiles = (K + k_chunk - 1) // k_chunk, _tiles(M, N)
    ordered = kernel == "gemm_split_ordered"
    c = Buffer(np.full((M, N), np.nan if ordered else 0, np.float32))
    extra: list[Buffer] = []
    outputs: list[Buffer | Output] = []
    if ordered:
        extra = [
            Buffer(np.full((splits, M, N), np.nan, np.float32)),
            Buffer(np.zeros(tiles[0] * tiles[1], np.uint32)),
        ]
        outputs = [c, extra[0]]
    args = [Buffer(a), Buffer(b), c, *extra, M, N, K, k_chunk]
    result = module.launch(
        kernel,
        (*tiles, splits),
        THREADS,
        args,
        shared_bytes=SHARED_BYTES,
        outputs=outputs,
        options=options,
    )
    out = c.read()
    return Run(result, relative_error(out, product), out)
