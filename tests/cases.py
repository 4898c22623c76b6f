"""The named catalogue of shapes and rank layouts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Sizes of one layer. strided: every tensor is a slice of a larger one, so no row is dense."""

    name: str
    M: int
    K: int
    N: int
    Rp: int
    Rs: int
    strided: bool = False

    @property
    def R(self) -> int:
        return self.Rs + self.Rp


CASES = [
    Case("one", 1, 1, 1, 1, 1),
    Case("edge_below", 63, 31, 15, 7, 9, strided=True),  # one short of a tile in every dimension
    Case("edge_above", 65, 65, 129, 17, 33),
    Case("prime", 97, 101, 103, 13, 37, strided=True),
    Case("rank_one", 50, 40, 30, 1, 0),
    Case("no_shared", 64, 128, 96, 16, 0),
    Case("no_private", 64, 128, 96, 0, 32, strided=True),
    Case("no_ranks", 5, 16, 12, 0, 0),
    Case("no_tokens", 0, 128, 96, 8, 32),
    Case("row", 1, 512, 640, 7, 32),
    Case("column_blocks", 300, 600, 700, 3, 2),  # more than one tile of depth and of columns
    Case("page_stride", 130, 1024, 192, 7, 30),  # row strides of whole pages
    Case("many_ranks", 40, 96, 80, 28, 520),  # more ranks than one tile holds
]
# The authors' three rank layouts, Rp = r - k and Rs = k L, for models of 22, 30 and 32 layers.
CASES += [
    Case(f"r{r}k{k}_L{L}", 48, 256, 192, r - k, k * L, strided=L == 30)
    for r, k in ((8, 1), (16, 2), (32, 4))
    for L in (22, 30, 32)
]


def case_id(case: Case) -> str:
    return case.name
