"""An emulated cuTensorMapEncodeTiled: checks what the driver documents."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .buffers import Buffer
from .runtime import ExecutorError

_MAGIC = 0x4D545850
_SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
_SWIZZLE_BYTES = {"32B": 32, "64B": 64, "128B": 128}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ExecutorError(f"cuTensorMapEncodeTiled: {what}")


def tensor_map(
    buffer: Buffer | int,
    element_bytes: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: str = "none",
) -> bytes:
    """Encode a map: dims and box innermost first, in elements; strides in bytes."""
    address = buffer.address if isinstance(buffer, Buffer) else buffer
    rank = len(dims)
    _require(1 <= rank <= 5 and len(strides) == rank - 1 and len(box) == rank, "rank")
    _require(address % 16 == 0, "global address is no multiple of 16")
    _require(all(0 < d <= 2**32 for d in dims), "dimension")
    _require(all(s % 16 == 0 and 0 < s < 2**40 for s in strides), "stride is no multiple of 16")
    _require(all(1 <= b <= 256 for b in box), "box dimension is not within 1..256")
    inner = box[0] * element_bytes
    _require(inner % 16 == 0, "inner box size is no multiple of 16 bytes")
    _require(
        inner <= _SWIZZLE_BYTES.get(swizzle, inner), "inner box size exceeds the swizzle width"
    )
    _require(not strides or strides[0] >= dims[0] * element_bytes, "stride is less than a row")

    def pad(values: Sequence[int], n: int) -> list[int]:
        return [*values, *[0] * (n - len(values))]

    head = (_MAGIC, rank, element_bytes, _SWIZZLES[swizzle], 0)
    data = struct.pack(
        "<IBBBB5H5BBQ5Q4Q",
        *head,
        *pad(box, 5),
        *pad([1] * rank, 5),
        0,
        address,
        *pad(dims, 5),
        *pad(strides, 4),
    )
    return data.ljust(128, b"\0")
