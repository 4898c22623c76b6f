"""Global memory: buffers filled from numpy arrays or torch tensors and read back as such."""

from __future__ import annotations

import ctypes as C
import weakref
from typing import Any

import numpy as np

from .runtime import ExecutorError, runtime


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "untyped_storage")


def to_bytes(value: Any) -> bytes:
    """Bytes of an array, tensor, ctypes structure or bytes-like, in row-major order."""
    if _is_tensor(value):
        import torch

        flat = value.detach().contiguous().reshape(-1)
        return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
    if isinstance(value, np.ndarray | np.generic):
        return np.ascontiguousarray(value).tobytes()
    return bytes(value)


class Buffer:
    """Device memory holding a copy of an array; accesses outside its bytes are findings.

    `read()` returns the memory in the form of the array it was made from. The memory lives
    as long as the object: keep a reference when only the address is passed on, as in a struct.
    """

    def __init__(self, array: Any) -> None:
        """Copy the array."""
        data = to_bytes(array)
        self.num_bytes = len(data)
        self._template = array
        self.address = int(runtime().ptx_allocate(self.num_bytes))
        if not self.address:
            raise ExecutorError(f"no memory for a buffer of {self.num_bytes} bytes")
        self._finalizer = weakref.finalize(self, runtime().ptx_free, self.address)
        C.memmove(self.address, data, self.num_bytes)

    def at(self, byte_offset: int) -> int:
        """Address of a byte, to pass a view into the buffer as an argument."""
        return self.address + byte_offset

    def read(self) -> Any:
        """Copy the memory out."""
        data = bytearray(C.string_at(self.address, self.num_bytes))
        if _is_tensor(self._template):
            import torch

            shape, dtype = self._template.shape, self._template.dtype
            if not data:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(data, dtype=dtype).reshape(shape)
        if isinstance(self._template, np.ndarray):
            return np.frombuffer(data, self._template.dtype).reshape(self._template.shape)
        return bytes(data)

    def write(self, array: Any) -> None:
        """Replace the contents."""
        data = to_bytes(array)
        if len(data) != self.num_bytes:
            raise ExecutorError(f"write of {len(data)} bytes to a buffer of {self.num_bytes}")
        C.memmove(self.address, data, self.num_bytes)
