"""Kernels in Triton, compiled to PTX without a GPU: PTX that another compiler wrote."""

# Triton is optional and has no types.
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,misc"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C (M,N) = A (M,K) · B (K,N), float accumulators, ragged edges masked."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        rest = K - k0
        tile_a = tl.load(
            a + m[:, None] * K + (k0 + k)[None, :], (m[:, None] < M) & (k[None, :] < rest), 0.0
        )
        tile_b = tl.load(
            b + (k0 + k)[:, None] * N + n[None, :], (k[:, None] < rest) & (n[None, :] < N), 0.0
        )
        acc = tl.dot(tile_a, tile_b, acc, input_precision="tf32")
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), inside)


@triton.jit
def softmax(x, y, num_columns, BLOCK: tl.constexpr):
    """One row per program."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * num_columns + columns, columns < num_columns, -float("inf"))
    numerator = tl.exp(values - tl.max(values, 0))
    tl.store(
        y + row * num_columns + columns, numerator / tl.sum(numerator, 0), columns < num_columns
    )


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and what its launch needs."""

    ptx: str
    name: str
    threads: int
    shared_bytes: int


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    sizes: list[str],
    constants: dict[str, int],
    capability: int,
) -> Compiled:
    """Compile for an architecture such as 80 or 90. All arguments are multiples of 16."""
    signature = {**{p: f"*{t}" for p, t in pointers.items()}, **dict.fromkeys(sizes, "i32")}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers) + len(sizes))}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    binary = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    return Compiled(binary.asm["ptx"], binary.metadata.name, 128, binary.metadata.shared)
