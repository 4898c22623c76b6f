"""The modifiers of one instruction: what no handler takes is refused."""

from __future__ import annotations

from .syntax import WIDTH, Instruction, Unsupported

# These change neither results nor order: cache and prefetch hints, and promises of the compiler.
_WITHOUT_EFFECT = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "sync", "aligned", "L2")


def is_hint(modifier: str) -> bool:
    """Whether a modifier is a cache hint."""
    return modifier.startswith(("L1::", "L2::")) or modifier in _WITHOUT_EFFECT


class Modifiers:
    """Types and the other modifiers, taken one by one."""

    def __init__(self, instruction: Instruction) -> None:
        """Drop hints; keep types apart."""
        parts = instruction.parts[1:]
        self.types = [p for p in parts if p in WIDTH and p != "pred"]
        self.is_predicate = "pred" in parts
        self._left = [p for p in parts if p not in WIDTH and not is_hint(p)]

    def take(self, *names: str) -> bool:
        """Whether any of the names is there; takes them all."""
        found = [n for n in self._left if n in names]
        self._left = [n for n in self._left if n not in names]
        return bool(found)

    def choose(self, names: dict[str, int] | tuple[str, ...]) -> str | None:
        """Take and return the first modifier that is one of `names`."""
        for name in self._left:
            if name in names:
                self._left.remove(name)
                return name
        return None

    def require(self, names: dict[str, int] | tuple[str, ...]) -> str:
        """Take and return the modifier that must be one of `names`."""
        name = self.choose(names)
        if name is None:
            raise Unsupported(f"expects one of {', '.join(names)}")
        return name

    def require_all_used(self) -> None:
        """Refuse what is left."""
        if self._left:
            raise Unsupported(f"modifier .{self._left[0]} is not modelled")
