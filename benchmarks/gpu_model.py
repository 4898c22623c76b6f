"""What a GPU cannot do faster: bytes over bandwidth, flops over the tensor peak, one launch each.

Every figure made from this file is modelled, not measured. A kernel takes the longer of its DRAM
time and its tensor time, plus a launch; kernels follow each other without overlap. Peers get the
same model with their kernels' compulsory traffic, which favours them: no kernel of theirs is
charged for more than reading each operand once and writing each result once. Not in the model: the
partial sums of reductions that the plan splits to fill a GPU, L2, and the first wave of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of an element: bfloat16
LAUNCH_SECONDS = 3e-6  # assumed, between kernels queued back to back
LIBRARY_EFFICIENCY = 0.75  # assumed share of the dense tensor peak that a library GEMM reaches


@dataclass(frozen=True)
class Device:
    """Published figures of one GPU; flops are dense bfloat16 with float32 sums."""

    name: str
    bandwidth: float  # bytes/s
    library_flops: float  # flop/s
    mma_flops: float  # flop/s through mma.sync


# Vendors' data sheets. The share of the peak that mma.sync reaches is assumed: 0.62 where the peak
# is that of a newer instruction (wgmma, tcgen05: 0.45 on B200), 0.9 where mma.sync is the way.
DEVICES = (
    Device("A100", 2.039e12, 312e12, 0.9 * 312e12),
    Device("H100", 3.35e12, 989e12, 0.62 * 989e12),
    Device("H200", 4.8e12, 989e12, 0.62 * 989e12),
    Device("B200", 8.0e12, 2250e12, 0.45 * 2250e12),
    Device("RTX 4090", 1.008e12, 165.2e12, 0.9 * 165.2e12),
)


@dataclass(frozen=True)
class Kernel:
    """One launch: DRAM bytes, flops, and whether a library GEMM does them."""

    name: str
    bytes: float
    flops: float = 0.0
    is_library: bool = True

    def seconds(self, device: Device) -> float:
        """Modelled time on a device."""
        peak = LIBRARY_EFFICIENCY * device.library_flops if self.is_library else device.mma_flops
        return max(self.bytes / device.bandwidth, self.flops / peak) + LAUNCH_SECONDS


@dataclass(frozen=True)
class Layer:
    """One linear layer in training: M tokens, K in, N out."""

    name: str
    M: int
    K: int
    N: int


def gemm(name: str, M: int, K: int, N: int, reads_C: bool = False) -> Kernel:
    """(M,K) by (K,N): operands read once, result written once."""
    return Kernel(name, BYTES * (M * K + K * N + (2 if reads_C else 1) * M * N), 2.0 * M * K * N)


def elementwise(name: str, reads: float, writes: float) -> Kernel:
    """A map over elements."""
    return Kernel(name, BYTES * (reads + writes))


def frozen_step(layer: Layer) -> list[Kernel]:
    """Forward and dx of the base layer, which every peer pays."""
    M, K, N = layer.M, layer.K, layer.N
    return [gemm("y = x Wᵀ", M, K, N), gemm("dx = dy W", M, N, K)]


def _dropout(M: int, K: int) -> list[Kernel]:
    mask = 0.5 * M * K  # one byte an element
    return [
        elementwise("x̃ = dropout(x)", M * K, M * K + mask),
        elementwise("dx += mask ∘ dx̃", M * K + mask, M * K),
    ]


def lora_step(layer: Layer, r: int, has_dropout: bool) -> list[Kernel]:
    """Eager LoRA: y + scaling · B(A(dropout(x))), each arrow a kernel, and its derivative."""
    M, K, N = layer.M, layer.K, layer.N
    return [
        *frozen_step(layer),
        *(_dropout(M, K) if has_dropout else []),
        gemm("h = x̃ Aᵀ", M, K, r),
        gemm("u = h Bᵀ", M, r, N),
        elementwise("u = u · scaling", M * N, M * N),
        elementwise("y = y + u", 2 * M * N, M * N),
        elementwise("du = dy · scaling", M * N, M * N),
        gemm("dB = duᵀ h", N, M, r),
        gemm("dh = du B", M, N, r),
        gemm("dA = dhᵀ x̃", r, M, K),
        gemm("dx̃ = dh A", M, r, K),
        elementwise("dx = dx + dx̃", 2 * M * K, M * K),
    ]


def authors_step(layer: Layer, Rp: int, Rs: int, has_dropout: bool) -> list[Kernel]:
    """The RaSA authors' layer: both weights concatenated at each call, gates as a kernel."""
    M, K, N, R = layer.M, layer.K, layer.N, Rp + Rs
    return [
        *frozen_step(layer),
        *(_dropout(M, K) if has_dropout else []),
        elementwise("A = cat(A_S, A_i)", R * K, R * K),
        elementwise("B = cat(B_S, B_i)", R * N, R * N),
        gemm("s = x̃ Aᵀ", M, K, R),
        elementwise("t = s ∘ d", M * R, M * R),
        gemm("u = t Bᵀ", M, R, N),
        elementwise("y = y + u", 2 * M * N, M * N),
        gemm("dB = dyᵀ t", N, M, R),
        gemm("dt = dy B", M, N, R),
        elementwise("ds = dt ∘ d", M * R, M * R),
        elementwise("dd = Σ dt ∘ s", 2 * M * R, R),
        gemm("dA = dsᵀ x̃", R, M, K),
        gemm("dx̃ = ds A", M, R, K),
        elementwise("dx = dx + dx̃", 2 * M * K, M * K),
        elementwise("dA_S += dA, dA_i", 2 * R * K, R * K),
        elementwise("dB_S += dB, dB_i", 2 * R * N, R * N),
    ]


def rasa_step(layer: Layer, R: int, traffic: dict[str, float]) -> list[Kernel]:
    """Ours: 2 + 3 launches. traffic: unique sectors over compulsory bytes, by form, as counted."""
    M, K, N = layer.M, layer.K, layer.N

    def ours(name: str, form: str, elements: float, flops: float) -> Kernel:
        return Kernel(name, BYTES * elements * traffic[form], flops, is_library=False)

    return [
        *frozen_step(layer),
        ours("s = x̃ [A_S ; A_i]ᵀ", "shrink", M * K + R * K + M * R, 2.0 * M * K * R),
        ours("y += (s∘d) [B_S ; B_i]", "expand", 2 * M * N + M * R + R * N, 2.0 * M * N * R),
        ours("g = dy [B_S ; B_i]ᵀ", "shrink", M * N + R * N + M * R, 2.0 * M * N * R),
        ours("dx += (g∘d) [A_S ; A_i]", "expand", 2 * M * K + M * R + R * K, 2.0 * M * K * R),
        ours(
            "dA, dB, dd",
            "wgrad",
            M * (K + N) + 2 * M * R + 2 * R * (K + N),
            2.0 * M * R * (K + N),
        ),
    ]


def seconds(kernels: list[Kernel], device: Device) -> float:
    """Modelled time of kernels that follow each other."""
    return sum(kernel.seconds(device) for kernel in kernels)
