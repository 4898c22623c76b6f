"""Named groups of problems for the grouped GEMM kernels, in the shapes of RaSA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptx.planned_gemm import Device, ProblemCase, SegmentCase

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RANKS = {7: (0, 7), 14: (1, 13), 28: (16, 12), 39: (32, 7), 78: (64, 14), 156: (128, 28)}


@dataclass(frozen=True)
class Group:
    """What a plan is made from. `make` builds fresh tensors."""

    name: str
    layout: str
    make: Callable[[], list[ProblemCase]]
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype = BF16
    device: Device = Device()


class Maker:
    """Random tensors; strided ones lie in memory full of NaN."""

    def __init__(self, dtype: torch.dtype = BF16, adapter: torch.dtype | None = None) -> None:
        """adapter: the dtype of rank operands, gradients and scales."""
        self.dtype, self.adapter = dtype, adapter or dtype
        self.generator = torch.Generator().manual_seed(7)
        self.extra = 0  # columns between rows

    def matrix(self, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
        """A (rows, cols) matrix."""
        memory = torch.full((rows, cols + self.extra), torch.nan, dtype=dtype or self.dtype)
        memory[:, :cols] = torch.randn(rows, cols, generator=self.generator)
        return memory[:, :cols]

    def stack(self, R: int, cols: int) -> list[Tensor]:
        """Shared and private rows."""
        return [self.matrix(rows, cols, self.adapter) for rows in RANKS[R] if rows]

    def empty(self, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
        """A result, full of NaN."""
        dtype = dtype or self.dtype
        return torch.full((rows, cols + self.extra), torch.nan, dtype=dtype)[:, :cols]

    def scale(self, n: int) -> Tensor:
        """A vector of factors."""
        return torch.randn(n, generator=self.generator).to(self.adapter)


def _round_up(n: int) -> int:
    return (n + 7) // 8 * 8


def shrink(m: Maker, M: int, K: int, R: int) -> ProblemCase:
    """s = x · [A_shared ; A]ᵀ, with pad columns."""
    s = m.empty(M, _round_up(R))
    return ProblemCase(M, s.shape[1], [SegmentCase([m.matrix(M, K)], m.stack(R, K), K)], [s])


def expand(m: Maker, M: int, N: int, R: int, in_place: bool = False) -> ProblemCase:
    """y = base + (s ∘ d) · [Bt_shared ; Bt]."""
    width = _round_up(R)
    s = m.matrix(M, width)
    s[:, R:] = 0
    d = torch.cat([m.scale(R), torch.zeros(width - R, dtype=m.adapter)])
    base = m.matrix(M, N)
    y = base if in_place else m.empty(M, N)
    return ProblemCase(M, N, [SegmentCase([s], m.stack(R, N), width, scale_k=d)], [y], [base])


def wgrad(m: Maker, tokens: int, N: int, R: int, wanted: tuple[bool, bool]) -> ProblemCase:
    """dA = d ∘rows gᵀ · x, into a block for each of shared and private ranks."""
    g, x = m.matrix(tokens, _round_up(R))[:, :R], m.matrix(tokens, N)
    out: list[Tensor | int] = [
        m.empty(rows, N, m.adapter) if want else rows
        for rows, want in zip(RANKS[R], wanted, strict=True)
        if rows
    ]
    return ProblemCase(R, N, [SegmentCase([g], [x], tokens, scale_m=m.scale(R))], out)


def tiny(case: ProblemCase) -> ProblemCase:
    """As early in training: Bt of 1e-5 and d of 0.2, whose product fp16 hardly holds."""
    for s in case.segments:
        assert s.scale_k is not None
        s.scale_k[:] = s.scale_k.sign() * 0.2
        for block in s.B:
            block *= 1e-5
    return replace(case, C=[torch.full((case.M, case.N), torch.nan)], C_in=[])


def merge(m: Maker, N: int, K: int, R: int, pool: list[list[Tensor]] | None = None) -> ProblemCase:
    """W += [Bt_shared ; Bt]ᵀ · diag(d) · [A_shared ; A], in place; pool: shared blocks."""
    W, Bt, A = m.matrix(N, K), m.stack(R, N), m.stack(R, K)
    if pool is not None:
        Bt[0], A[0] = pool[0][0], pool[1][0]
    return ProblemCase(N, K, [SegmentCase(Bt, A, R, scale_k=m.scale(R))], [W], [W])


def segments(
    m: Maker, layout: str, M: int, N: int, Ks: list[int], scaled: bool, dtype: torch.dtype
) -> ProblemCase:
    """A sum of products of different lengths."""

    def one(K: int) -> SegmentCase:
        A = m.matrix(K, M) if layout == "TN" else m.matrix(M, K)
        B = m.matrix(N, K) if layout == "NT" else m.matrix(K, N)
        return SegmentCase([A], [B], K, scale_m=m.scale(M) if scaled else None)

    return ProblemCase(M, N, [one(K) for K in Ks], [m.empty(M, N, dtype)])


def dropped(case: ProblemCase, p: float = 0.3) -> ProblemCase:
    """The same with dropout."""
    seeds = [
        torch.tensor([0x1234_5678_9ABC + i], dtype=torch.int64) for i in range(len(case.segments))
    ]
    segments = [replace(s, seed=seed) for s, seed in zip(case.segments, seeds, strict=True)]
    return replace(case, p=p, segments=segments)


def dotted(m: Maker, case: ProblemCase) -> ProblemCase:
    """The same with dd = Σ_n A ∘ (gᵀ · x)."""
    weights = [m.matrix(t if isinstance(t, int) else t.shape[0], case.N, m.adapter) for t in case.C]
    return replace(case, row_dot_with=weights, row_dot=m.empty(1, case.M, m.adapter)[0])


def strided(m: Maker, extra: int) -> Maker:
    """Rows further apart."""
    m.extra = extra
    return m


def _forms(name: str, R: int, M: int, width: int, make: Callable[[], Maker]) -> list[Group]:
    m = make()
    types = (m.dtype, m.adapter)
    return [
        Group(f"shrink-{name}", "NT", lambda: [shrink(make(), M, width, R)], *types),
        Group(f"expand-{name}", "NN", lambda: [expand(make(), M, width, R)], *types),
        Group(f"wgrad-{name}", "TN", lambda: [wgrad(make(), M, width, R, (True, True))], *types),
    ]


def _dropout(R: int) -> list[Group]:
    return [
        Group(f"shrink-drop-R{R}", "NT", lambda: [dropped(shrink(Maker(), 130, 104, R))]),
        Group(f"expand-drop-R{R}", "NN", lambda: [dropped(expand(Maker(), 70, 152, R))]),
        Group(
            f"wgrad-drop-R{R}", "TN", lambda: [dropped(wgrad(Maker(), 100, 152, R, (True, True)))]
        ),
    ]


def _segments(scaled: bool) -> list[Group]:
    name = "scaled" if scaled else "summed"
    return [
        Group(
            f"{layout}-{name}",
            layout,
            lambda layout=layout, dtype=dtype: [  # type: ignore[misc]
                segments(Maker(), layout, M, N, [40, 72, 8], scaled, dtype)
                for M, N in ((70, 40), (39, 136))
            ],
        )
        for layout, dtype in (("NT", BF16), ("NN", BF16), ("TN", F32))
    ]


SPLITTING = Device(num_sms=7, reduce_launch=0)


def _splits(R: int, long: int, short: int) -> list[Group]:
    """Long reductions of few tiles."""

    def shrinks() -> list[ProblemCase]:
        m = Maker()
        return [shrink(m, 70, long, R), shrink(m, 33, short, R)]

    def wgrads() -> list[ProblemCase]:
        m = Maker()
        return [
            dotted(m, wgrad(m, short, 72, R, (False, True))),
            dotted(m, wgrad(m, long, 136, R, (True, True))),
        ]

    return [
        Group(f"shrink-split-R{R}", "NT", shrinks, device=SPLITTING),
        Group(f"wgrad-split-R{R}", "TN", wgrads, device=SPLITTING),
        Group(
            f"shrink-split-drop-R{R}",
            "NT",
            lambda: [dropped(case) for case in shrinks()],
            device=SPLITTING,
        ),
        Group(
            f"wgrad-split-drop-R{R}",
            "TN",
            lambda: [dropped(case) for case in wgrads()],
            device=SPLITTING,
        ),
    ]


def _row_dots() -> list[Group]:
    def make(wanted: tuple[bool, bool], M: int = 100, N: int = 152) -> ProblemCase:
        m = Maker()
        return dotted(m, wgrad(m, M, N, 39, wanted))

    f32 = Maker(BF16, F32)
    return [
        Group("row-dot", "TN", lambda: [make((True, True))]),
        Group("row-dot-alone", "TN", lambda: [make((False, False))]),
        Group("row-dot-drop", "TN", lambda: [dropped(make((True, False)))]),
        Group("row-dot-one-column", "TN", lambda: [make((True, True), N=1)]),
        Group("row-dot-no-column", "TN", lambda: [make((True, True), N=0)]),
        Group("row-dot-no-token", "TN", lambda: [make((True, True), M=0)]),
        Group("row-dot-wide", "TN", lambda: [make((True, True), 30, 1100)]),
        Group(
            "row-dot-f32",
            "TN",
            lambda: [dotted(f32, wgrad(f32, 70, 136, 78, (True, True)))],
            BF16,
            F32,
        ),
    ]


GROUPS: list[Group] = [
    *(g for R in (7, 14, 28) for g in _forms(f"R{R}", R, 33, 72, Maker)),
    *_forms("R39", 39, 200, 136, Maker),
    *_forms("R78", 78, 130, 136, Maker),
    *_forms("R156", 156, 130, 72, Maker),
    *_forms("f16", 39, 70, 136, lambda: Maker(F16)),
    *_forms("f32-adapter", 39, 70, 136, lambda: Maker(BF16, F32)),
    *_forms("f32-adapter-f16", 14, 33, 40, lambda: Maker(F16, F32)),
    Group("expand-tiny-f16", "NN", lambda: [tiny(expand(Maker(F16, F32), 40, 72, 39))], F16, F32),
    Group("merge-tiny-f16", "TN", lambda: [tiny(merge(Maker(F16), 168, 40, 14))], F16, F16),
    *_forms("aligned-stride", 39, 70, 136, lambda: strided(Maker(), 8)),
    *_forms("odd-stride", 39, 70, 136, lambda: strided(Maker(), 3)),
    *_forms("odd-width", 14, 33, 61, Maker),
    *_forms("one-row", 14, 1, 40, Maker),
    Group("expand-in-place", "NN", lambda: [expand(Maker(), 130, 136, 39, in_place=True)]),
    Group("wgrad-private-only", "TN", lambda: [wgrad(Maker(), 70, 40, 39, (False, True))]),
    Group("merge", "TN", lambda: [merge(Maker(), 200, 136, 39)]),
    Group("merge-f16", "TN", lambda: [merge(Maker(F16, F32), 168, 40, 14)], F16, F32),
    *_segments(scaled=False),
    *_segments(scaled=True),
    *(g for R in (39, 78, 156) for g in _dropout(R)),
    *_row_dots(),
    *_splits(39, 520, 392),
    *_splits(78, 712, 392),
    *_splits(156, 904, 608),
]
