"""Random calls of grouped_gemm, and of rasa_merge_, which writes what it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_grouped_gemm import formula  # noqa: E402
from trials import RANKS, SIZES, Arguments, Trial  # noqa: E402

from rasa_ext import grouped_gemm  # noqa: E402
from rasa_ext.layer_ops import Adapters, rasa_merge_  # noqa: E402


class GemmTrial(Trial):
    """A call of grouped_gemm: up to five problems of up to three segments."""

    op = "grouped_gemm"

    def __init__(self, seed: int) -> None:
        """Draw sizes and values."""
        super().__init__(seed)
        dtype, other = self.dtypes  # other: of the scales and perhaps of the result
        self.layout = self.rng.choice(("NN", "NT", "TN"))
        self.out_dtype: torch.dtype | None = self.rng.choice((None, dtype, other))
        self.segments = [self.rng.randint(1, 3) for _ in range(self.rng.randint(1, 5))]
        arguments: Arguments = {}
        segment = 0
        for problem, count in enumerate(self.segments):
            M, N = self.rng.choice(SIZES), self.rng.choice(SIZES)
            has_C_in = self.rng.random() < 0.5
            C_dtype = self.out_dtype or dtype
            arguments[f"C_in{problem}"] = self.values(M, N, dtype=C_dtype) if has_C_in else None
            for i in range(segment, segment + count):
                K = self.rng.choice(SIZES)
                A, B = (K, M) if self.layout == "TN" else (M, K), (K, N)
                scale = max(K, 1) ** -0.5
                arguments[f"A{i}"] = self.values(*A, dtype=dtype, scale=scale)
                arguments[f"B{i}"] = self.values(
                    *(B[::-1] if self.layout == "NT" else B), dtype=dtype
                )
                for name, size in (("scale_m", M), ("scale_k", K)):
                    has_scale = self.rng.random() < 0.4
                    vector = self.values(size, dtype=other) if has_scale else None
                    arguments[f"{name}{i}"] = vector
            segment += count
        self.arguments = arguments
        self.any_strides = tuple(name for name in arguments if not name.startswith("scale"))

    def _lists(self, arguments: Mapping[str, Tensor | None]) -> list[list]:
        """The arguments as grouped_gemm takes them, from layout on."""
        lists: dict[str, list] = {name: [] for name in ("A", "B", "C_in", "scale_m", "scale_k")}
        for name, t in arguments.items():
            lists[name.rstrip("0123456789")].append(t)
        return [lists["A"], lists["B"], self.segments, *list(lists.values())[2:]]

    def call(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Call the op."""
        return grouped_gemm(self.layout, *self._lists(arguments), out_dtype=self.out_dtype)

    def formula(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Its docstring, as code; a segment without terms adds none, whatever its scale."""
        by_row = 0 if self.layout == "TN" else 1
        terms = dict(arguments)
        for name, t in arguments.items():
            if name.startswith("A") and t is not None and t.shape[by_row] == 0:
                terms[f"scale_m{name[1:]}"] = None
        return formula(self.layout, *self._lists(terms))

    def is_right_with(self, name: str, kind: str) -> bool:
        """A larger M or N is right where nothing else of the problem has one."""
        larger = {
            "A": "a column more" if self.layout == "TN" else "a row more",
            "B": "a row more" if self.layout == "NT" else "a column more",
        }
        if larger.get(name[0]) != kind or name.startswith("scale"):
            return False
        segment, first = int(name[1:]), 0
        for problem, count in enumerate(self.segments):
            if first <= segment < first + count:
                scaled = name[0] == "A" and self.arguments[f"scale_m{segment}"] is not None
                return count == 1 and self.arguments[f"C_in{problem}"] is None and not scaled
            first += count
        raise AssertionError(name)

    def other_mistakes(self) -> dict[str, Callable[[], object]]:
        """Segments that do not add up, and a layout that does not exist."""
        wrong = self.rng.choice(([], [0], [2**62, 2**62], [-1], [*self.segments, 1]))
        return {
            "segments": lambda: setattr(self, "segments", wrong),
            "layout": lambda: setattr(self, "layout", self.rng.choice(("TT", "", "nn"))),
        }


class MergeTrial(Trial):
    """A call of rasa_merge_ on up to four layers, some of them of one pool."""

    op = "rasa_merge_"

    def __init__(self, seed: int) -> None:
        """Draw sizes and values."""
        super().__init__(seed)
        weight_dtype, dtype = self.dtypes
        N, K, Rs = self.rng.choice(SIZES), self.rng.choice(SIZES), self.rng.choice(RANKS)
        arguments: Arguments = {
            "A_shared0": self.values(Rs, K, dtype=dtype),
            "Bt_shared0": self.values(Rs, N, dtype=dtype),
        }
        self.pools = [self.rng.choice((0, 0, -1)) for _ in range(self.rng.randint(1, 4))]
        for i, pool in enumerate(self.pools):
            if pool < 0:
                N, K = self.rng.choice(SIZES), self.rng.choice(SIZES)
            else:
                N, K = arguments["Bt_shared0"].shape[1], arguments["A_shared0"].shape[1]
            Rp = self.rng.choice(RANKS)
            arguments[f"weight{i}"] = self.values(N, K, dtype=weight_dtype)
            arguments[f"A{i}"] = self.values(Rp, K, dtype=dtype, scale=max(Rp + Rs, 1) ** -0.5)
            arguments[f"Bt{i}"] = self.values(Rp, N, dtype=dtype)
            arguments[f"d{i}"] = self.values(Rp + (Rs if pool == 0 else 0), dtype=dtype)
        self.arguments = arguments
        self.written = self.any_strides = tuple(f"weight{i}" for i in range(len(self.pools)))

    def _lists(self, arguments: Mapping[str, Tensor | None]) -> dict[str, list]:
        names = ("weight", "A", "Bt", "d", "A_shared", "Bt_shared")
        lists: dict[str, list] = {name: [] for name in names}
        for name, t in arguments.items():
            lists[name.rstrip("0123456789")].append(t)
        return lists

    def call(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Call the op, and return what it has written."""
        lists = self._lists(arguments)
        weights = lists.pop("weight")
        rasa_merge_(weights, Adapters(**lists, pools=self.pools))
        return weights

    def formula(self, arguments: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Its docstring, as code; written elsewhere."""
        lists = self._lists(arguments)
        merged = []
        for i, pool in enumerate(self.pools):
            W, A, Bt, d = (lists[name][i] for name in ("weight", "A", "Bt", "d"))
            if pool == 0:
                A = torch.cat([lists["A_shared"][0], A])
                Bt = torch.cat([lists["Bt_shared"][0], Bt])
            dtype = torch.promote_types(W.dtype, torch.float32)
            delta = (Bt.to(dtype) * d.to(dtype)[:, None]).T @ A.to(dtype)
            merged.append((W.to(dtype) + delta).to(W.dtype))
        return merged

    def is_right_with(self, name: str, kind: str) -> bool:
        """A pool of no layer is not looked at."""
        return name.endswith("_shared0") and 0 not in self.pools and kind != "another device"

    def other_mistakes(self) -> dict[str, Callable[[], object]]:
        """Weights that share memory with each other or with themselves."""
        mistakes: dict[str, Callable[[], object]] = {
            "pools": lambda: setattr(self, "pools", [*self.pools[1:], 7]),
        }
        first = self.arguments["weight0"]
        if first.numel() == 0 or self.arguments["d0"].numel() == 0:
            return mistakes

        def overlap_itself() -> None:
            kind = self.rng.choice(("row", "shifted"))
            if kind == "row" and first.shape[0] > 1:
                self.arguments["weight0"] = first[:1].clone().expand(first.shape)
            else:
                flat = self.values(2 + sum(first.shape), dtype=first.dtype)
                self.arguments["weight0"] = flat.as_strided(first.shape, (1, 1))

        if min(first.shape) > 1:
            mistakes["a weight overlaps itself"] = overlap_itself
        for i in range(1, len(self.pools)):
            same = self.arguments[f"weight{i}"].shape == first.shape
            if same and self.arguments[f"d{i}"].numel() > 0:
                mistakes["two weights are one"] = lambda i=i: self._overlap(i, 0)
                mistakes["two weights overlap"] = lambda i=i: self._overlap(i, 1)
        return mistakes

    def _overlap(self, i: int, shift: int) -> None:
        """Make weight i start `shift` elements after weight 0, in the same memory."""
        N, K = self.arguments["weight0"].shape
        flat = self.values(N * K + shift, dtype=self.dtypes[0])
        self.arguments["weight0"] = flat[: N * K].view(N, K)
        self.arguments[f"weight{i}"] = flat[shift:].view(N, K)
