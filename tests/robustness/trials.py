"""One random call of an op: its arguments, right or wrong, and the formula that it must equal."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layers import DTYPES  # noqa: E402
from reference import authors_add, authors_linear  # noqa: E402

from rasa_ext import rasa_add, rasa_linear  # noqa: E402

SIZES = (0, 1, 2, 7, 15, 16, 17, 31, 64, 65, 100, 130)
RANKS = (0, 1, 3, 7, 8, 14, 28, 39, 78)
Arguments = dict[str, Tensor | None]


class Trial:
    """What the trials of all ops have in common.

    A subclass draws `arguments` by name, and says which of them may have any strides, which are
    written, and what the op and its formula return.
    """

    op: str
    any_strides: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    has_gradients = False

    def __init__(self, seed: int) -> None:
        """Draw dtypes."""
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtypes = self.rng.choice(DTYPES)
        self.wrong: list[str] = []
        self.special = self.overflows = False
        self.arguments: Arguments = {}

    def values(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        values = torch.randn(*size, generator=self.generator, dtype=torch.float64) * scale
        return values.to(dtype)

    def call(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Call the op."""
        raise NotImplementedError

    def formula(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Compute the same in plain torch."""
        raise NotImplementedError

    def is_right_with(self, name: str, kind: str) -> bool:
        """Whether this mutation of this argument makes another right call."""
        raise NotImplementedError

    def other_mistakes(self) -> dict[str, Callable[[], object]]:
        """What can be wrong beside one tensor: by kind, a function that makes it so."""
        return {}

    def relayout(self) -> None:
        """Put arguments into other memory layouts that are allowed."""
        for name, t in self.arguments.items():
            if t is None or t.dim() != 2 or self.rng.random() < 0.5:
                continue
            wide = torch.full((t.shape[0], t.shape[1] + 5), torch.nan, dtype=t.dtype)
            first = self.rng.randrange(6)
            wide[:, first : first + t.shape[1]] = t
            self.arguments[name] = wide[:, first : first + t.shape[1]]
        for name in self.any_strides:
            t = self.arguments.get(name)
            if t is None or self.rng.random() < 0.7:
                continue
            kind = self.rng.choice(("transposed", "broadcast", "overlapping"))
            if kind == "transposed":
                self.arguments[name] = t.t().contiguous().t()
            elif name in self.written:
                continue
            elif kind == "broadcast" and t.shape[0] > 0:
                self.arguments[name] = t[:1].expand(t.shape)
            elif t.numel() > 0:
                flat = self.values(t.shape[0] + t.shape[1], dtype=t.dtype)
                self.arguments[name] = flat.as_strided(t.shape, (1, 1))
        if self.rng.random() < 0.2:
            self.share()

    def share(self) -> None:
        """Pass one tensor in two places, where one fits."""
        names = [n for n, t in self.arguments.items() if t is not None and n not in self.written]
        name = self.rng.choice(names)
        mine = self.arguments[name]
        for other in self.rng.sample(names, len(names)):
            t = self.arguments[other]
            if other != name and (t.shape, t.dtype) == (mine.shape, mine.dtype):
                if mine.stride(-1) == 1 or other in self.any_strides:
                    self.arguments[other] = mine
                return

    def spoil_values(self) -> None:
        """Write NaN, infinities or huge numbers somewhere."""
        names = [n for n, t in self.arguments.items() if t is not None and n not in self.written]
        t = self.arguments[self.rng.choice(names)]
        assert t is not None
        if t.numel() == 0 or 0 in t.stride():
            return
        huge = torch.finfo(t.dtype).max
        value = self.rng.choice((torch.nan, torch.inf, -torch.inf, huge))
        self.overflows = value == huge  # or not: that depends on the order of multiplications
        t[tuple(self.rng.randrange(n) for n in t.shape)] = value
        self.special = True

    def make_wrong(self) -> None:
        """Make one argument wrong."""
        name = self.rng.choice([n for n, t in self.arguments.items() if t is not None])
        t = self.arguments[name]
        assert t is not None
        mutations: dict[str, Callable[[], Tensor]] = {
            "a row more": lambda: torch.cat([t, t.new_zeros(1, *t.shape[1:])]),
            "a dimension more": lambda: t[None],
            "integers": lambda: t.int(),
            "another device": lambda: t.to("meta"),
            "complex": lambda: t.to(torch.complex64),
        }
        if t.dim() == 2:
            mutations["a column more"] = lambda: torch.cat([t, t.new_zeros(t.shape[0], 1)], 1)
        others = self.other_mistakes()
        kind = self.rng.choice((*mutations, *others))
        if kind in others:
            others[kind]()
            name = "call"
        elif self.is_right_with(name, kind):
            return
        else:
            self.arguments[name] = mutations[kind]()
        self.wrong.append(f"{name}: {kind}")

    def describe(self) -> str:
        """What a report names."""
        shapes = {n: None if t is None else (*t.shape,) for n, t in self.arguments.items()}
        return f"{self.op} {self.dtypes} {shapes} wrong={self.wrong}"


class LayerTrial(Trial):
    """A call of rasa_linear or rasa_add."""

    any_strides = ("x", "base")
    has_gradients = True

    def __init__(self, seed: int) -> None:
        """Draw sizes and values."""
        super().__init__(seed)
        self.op = self.rng.choice(("rasa_linear", "rasa_add"))
        M, K, N = (self.rng.choice(SIZES) for _ in range(3))
        Rp, Rs = self.rng.choice(RANKS), self.rng.choice(RANKS)
        self.p = self.rng.choice((0.0, 0.0, 0.05, 0.5, 0.999))
        self.seed: Tensor | None = torch.tensor(self.rng.randrange(-(2**63), 2**63))
        x_dtype, dtype = self.dtypes
        scale, rank_scale = max(K, 1) ** -0.5, max(Rp + Rs, 1) ** -0.5
        right: Arguments = {"x": self.values(M, K, dtype=x_dtype)}
        if self.op == "rasa_linear":
            right["weight"] = self.values(N, K, dtype=x_dtype, scale=scale)
            right["bias"] = self.values(N, dtype=x_dtype) if self.rng.random() < 0.5 else None
        else:
            right["base"] = self.values(M, N, dtype=x_dtype)
        self.arguments = right | {
            "A": self.values(Rp, K, dtype=dtype, scale=scale),
            "A_shared": self.values(Rs, K, dtype=dtype, scale=scale),
            "Bt": self.values(Rp, N, dtype=dtype, scale=rank_scale),
            "Bt_shared": self.values(Rs, N, dtype=dtype, scale=rank_scale),
            "d": self.values(Rs + Rp, dtype=dtype),
        }

    def call(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Call the op."""
        op = rasa_linear if self.op == "rasa_linear" else rasa_add
        return [op(*arguments.values(), p=self.p, seed=self.seed)]

    def formula(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """The authors' formula."""
        formula = authors_linear if self.op == "rasa_linear" else authors_add
        return [formula(*arguments.values(), p=self.p, seed=self.seed)]

    def is_right_with(self, name: str, kind: str) -> bool:
        """Another M is right."""
        return (name, kind, self.op) == ("x", "a row more", "rasa_linear")

    def other_mistakes(self) -> dict[str, Callable[[], object]]:
        """A wrong p, or a seed that is missing or too long."""

        def set_dropout(p: float, seed: Tensor | None) -> None:
            self.p, self.seed = p, seed

        wrong = self.rng.choice((-0.1, 1.0, 1.5, float("nan"), float("inf")))
        return {
            "p": lambda: set_dropout(wrong, self.seed),
            "no seed": lambda: set_dropout(0.5, None),
            "seed of two": lambda: set_dropout(0.5, torch.zeros(2, dtype=torch.int64)),
        }
