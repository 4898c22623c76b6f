"""Values of the lanes of a warp, as numpy arrays of a PTX width."""

from __future__ import annotations

import numpy as np


def u32(*values: int) -> np.ndarray:
    """32-bit lanes; negative values wrap."""
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def u64(*values: int) -> np.ndarray:
    """64-bit lanes."""
    return np.array([v & (2**64 - 1) for v in values], np.uint64)


def u16(*values: int) -> np.ndarray:
    """16-bit lanes."""
    return np.array([v & 0xFFFF for v in values], np.uint16)


def f32(*values: float) -> np.ndarray:
    """Float lanes."""
    return np.array(values, np.float32)


def f64(*values: float) -> np.ndarray:
    """Double lanes."""
    return np.array(values, np.float64)
