"""Which instructions access global memory, and how: the three kinds that counters keep apart."""

from __future__ import annotations

from enum import IntEnum

from .syntax import Instruction


class AccessKind(IntEnum):
    """Kinds of access; their order is that of the runtime's results."""

    LOAD = 0
    STORE = 1
    ATOMIC = 2


_KINDS = {
    "ld": AccessKind.LOAD,
    "ldu": AccessKind.LOAD,
    "cp": AccessKind.LOAD,
    "st": AccessKind.STORE,
    "atom": AccessKind.ATOMIC,
    "red": AccessKind.ATOMIC,
}


def access_kind(instruction: Instruction) -> AccessKind | None:
    """Kind of an instruction that can access global memory; None for any other."""
    parts = instruction.parts
    kind = _KINDS.get(parts[0])
    if kind is None or {"param", "local", "const"} & set(parts):
        return None
    if "bulk" in parts:  # the destination's space comes first
        spaces = [p.split("::")[0] for p in parts if p.split("::")[0] in ("global", "shared")]
        return AccessKind.STORE if spaces[:1] == ["global"] else AccessKind.LOAD
    return kind
