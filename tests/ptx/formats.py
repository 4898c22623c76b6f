"""bf16 for numpy, which has no such type: values as uint16 bits."""

from __future__ import annotations

import numpy as np


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bf16 bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest tf32, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Largest error over the largest exact value; NaN counts as infinite."""
    error = np.abs(out.astype(np.float64) - exact)
    return float(
        np.nan_to_num(error, nan=np.inf).max(initial=0) / max(np.abs(exact).max(initial=0), 1e-30)
    )
