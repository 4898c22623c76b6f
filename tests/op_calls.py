"""Counts the ops of the package that some code calls."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """How often each of the package's ops was called in the context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "rasa_ext" in func.name():
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
