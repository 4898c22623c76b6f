"""Named groups of problems for the grouped GEMM kernels, in the shapes of RaSA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ptx.planned_gemm import LARGE_SMEM, SMALL_SMEM, Device, ProblemCase, SegmentCase

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SPLITTING, TWELVE_SMS = (Device(num_sms=n, reduce_launch=0) for n in (7, 12))
NAMES = {BF16: "bf16", F16: "f16", F32: "f32"}
# R = L·k + (r - k): (r, k) = (8, 1), (16, 2) and (32, 4) at L = 30 and 32, and odd ones.
RANKS = {7: (0, 7), 14: (1, 13), 28: (16, 12)} | {
    L * k + 7 * k: (L * k, 7 * k) for L in (30, 32) for k in (1, 2, 4)
}


@dataclass(frozen=True)
class Group:
    """What a plan is made from. `make` builds fresh tensors."""

    name: str
    layout: str
    make: Callable[[], list[ProblemCase]]
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype = BF16
    device: Device = Device()
    is_full_precision: bool = False


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
    """y = base + (s ∘ d) · [Bt_shared ; Bt]; there is no d for the pad columns of s."""
    width = _round_up(R)
    s = m.matrix(M, width)
    s[:, R:] = 0
    base = m.matrix(M, N)
    y = base if in_place else m.empty(M, N)
    return ProblemCase(
        M, N, [SegmentCase([s], m.stack(R, N), width, scale_k=m.scale(R))], [y], [base]
    )


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


def dropped(case: ProblemCase, p: float = 0.3, one_seed: bool = False) -> ProblemCase:
    """The same with dropout, of one seed where the product of all segments is dropped."""

    def seed(i: int) -> torch.Tensor:
        return torch.tensor([0x1234_5678_9ABC + (0 if one_seed else i)], dtype=torch.int64)

    segments = [replace(s, seed=seed(i)) for i, s in enumerate(case.segments)]
    return replace(case, p=p, segments=segments)


def diagonal(m: Maker, tokens: int, R: int) -> ProblemCase:
    """dd = the diagonal of gᵀ · s."""
    g, s = (m.matrix(tokens, _round_up(R))[:, :R] for _ in range(2))
    segments = [SegmentCase([g], [s], tokens)]
    return ProblemCase(R, R, segments, [m.empty(1, R, m.adapter)], is_diagonal=True)


def gradients(m: Maker, tokens: int, N: int, R: int) -> list[ProblemCase]:
    """dBt, and dd beside it."""
    return [wgrad(m, tokens, N, R, (True, True)), diagonal(m, tokens, R)]


def strided(m: Maker, extra: int) -> Maker:
    """Rows further apart."""
    m.extra = extra
    return m


def forms(
    name: str, R: int, M: int, width: int, make: Callable[[], Maker], drops: bool = False
) -> list[Group]:
    m = make()

    def group(form: str, layout: str, case: Callable[[Maker], ProblemCase]) -> Group:
        def cases() -> list[ProblemCase]:
            return [dropped(case(make())) if drops else case(make())]

        return Group(f"{form}-{name}", layout, cases, m.dtype, m.adapter)

    return [
        group("shrink", "NT", lambda m: shrink(m, M, width, R)),
        group("expand", "NN", lambda m: expand(m, M, width, R)),
        group("wgrad", "TN", lambda m: wgrad(m, M, width, R, (True, True))),
    ]


def _ranks() -> list[Group]:
    """Every tile shape with every dtype, with and without dropout."""
    groups = []
    for R30, R32 in ((37, 39), (74, 78), (148, 156)):
        for dtype in (BF16, F16):
            for drops in (False, True):
                R = R30 if drops == (dtype is BF16) else R32
                name = f"R{R}-{NAMES[dtype]}" + ("-drop" if drops else "")
                groups += forms(name, R, 70, 136, partial(Maker, dtype), drops)
    return groups


def _segments() -> list[Group]:
    """Sums over segments: with one sum, with a scale_m and a seed for each, and split."""

    def group(layout: str, dtype: torch.dtype, scaled: bool, drops: bool, split: bool) -> Group:
        def cases() -> list[ProblemCase]:
            m = Maker(dtype)
            shape = (70, 40) if dtype is BF16 else (39, 136)
            C_dtype = F32 if layout == "TN" else dtype
            Ks = [400, 136, 8] if split else [40, 72, 8]
            case = segments(m, layout, *shape, Ks, scaled, C_dtype)
            return [dropped(case, one_seed=layout == "NN") if drops else case]

        words = ("scaled" if scaled else "summed", NAMES[dtype])
        name = "-".join(
            (layout, *words, *(["drop"] if drops else []), *(["split"] if split else []))
        )
        return Group(name, layout, cases, dtype, dtype, SPLITTING if split else Device())

    forms = [(layout, dtype) for layout in ("NT", "NN", "TN") for dtype in (BF16, F16)]
    return [
        *(group(*form, scaled=False, drops=form[1] is F16, split=False) for form in forms),
        group("NN", BF16, scaled=False, drops=True, split=False),
        group("NN", F16, scaled=False, drops=False, split=False),
        *(
            group(*form, scaled=True, drops=drops, split=False)
            for form in forms
            for drops in (False, True)
        ),
        *(group("TN", dtype, scaled=True, drops=True, split=True) for dtype in (BF16, F16)),
    ]


def _walks(R: int, dtype: torch.dtype, smem_bytes: int = LARGE_SMEM) -> list[Group]:
    """Several tiles, columns and problems to a block."""
    types = (dtype, dtype, Device(num_sms=1, smem_bytes=smem_bytes))
    name = f"walk-R{R}-{NAMES[dtype]}-{smem_bytes // 1024}KiB"

    def expands() -> list[ProblemCase]:
        return [expand(Maker(dtype), M, N, R) for M, N in ((136, 264), (100, 40))]

    def merges() -> list[ProblemCase]:
        return [merge(Maker(dtype), N, K, R) for N, K in ((168, 264), (168, 40))]

    return [
        Group(f"expand-{name}", "NN", expands, *types),
        Group(f"expand-drop-{name}", "NN", lambda: [dropped(c) for c in expands()], *types),
        Group(f"merge-{name}", "TN", merges, *types),
    ]


def _merged_twice(dtype: torch.dtype) -> list[ProblemCase]:
    """Two deltas at once."""
    m = Maker(dtype)
    first, second = merge(m, 200, 136, 39), merge(m, 200, 136, 14)
    return [replace(first, segments=[*first.segments, *second.segments])]


def backward_of_siblings(
    R: int,
    features: tuple[int, ...],
    drops: bool,
    dtype: torch.dtype = BF16,
    tokens: int = 100,
) -> list[ProblemCase]:
    """dA of all layers that share x, with gaps between their ranks; dBt and dd of each."""
    m, width = Maker(dtype), _round_up(R)
    rows = width * (len(features) - 1) + R
    out: list[Tensor | int] = []
    for i in range(len(features)):
        out += [m.empty(n, 136) for n in RANKS[R] if n]
        out += [width - R] if i + 1 < len(features) and width > R else []
    g, x = m.matrix(tokens, rows), m.matrix(tokens, 136)
    dA = ProblemCase(rows, 136, [SegmentCase([g], [x], tokens, scale_m=m.scale(rows))], out)
    others = [case for N in features for case in gradients(m, tokens, N, R)]
    return [dropped(dA) if drops else dA, *others]


def pool(rows: int, layers: int, dtype: torch.dtype, drops: bool = True) -> list[ProblemCase]:
    """dA_shared += Σ_layers d ∘ gᵀ · dropped x: a seed and gates for each layer, into fp32."""
    m = Maker(dtype, F32)
    case = segments(m, "TN", rows, 40, [16] * layers, True, F32)
    total = m.matrix(rows, 40, F32)
    case = replace(case, C=[total], C_in=[total])
    return [dropped(case) if drops else case]


def continued(m: Maker, layout: str) -> list[ProblemCase]:
    """More row blocks than the arguments of one launch hold, added to C in place."""

    def cut(t: Tensor) -> list[Tensor]:
        return [row[None] for row in t]

    if layout == "TN":  # blocks of one token each
        case = segments(m, "TN", 14, 24, [700, 700, 700], True, BF16)
        parts = [replace(s, A=cut(s.A[0])) for s in case.segments]
    else:
        case = segments(m, "NN", 340, 24, [8] * 7, False, BF16)
        parts = [replace(s, A=cut(s.A[0])) for s in case.segments]
    C = m.matrix(case.M, case.N)
    return [dropped(replace(case, segments=parts, C=[C], C_in=[C]), one_seed=layout == "NN")]


def splits(R: int, long: int, short: int, dtype: torch.dtype, drops: bool) -> list[Group]:
    """Long reductions of few tiles."""

    def shrinks() -> list[ProblemCase]:
        m = Maker(dtype)
        cases = [shrink(m, 70, long, R), shrink(m, 33, short, R)]
        return [dropped(case) if drops else case for case in cases]

    def wgrads() -> list[ProblemCase]:
        m = Maker(dtype)
        cases = [wgrad(m, short, 72, R, (False, True)), wgrad(m, long, 136, R, (True, True))]
        cases = [dropped(case) if drops else case for case in cases]
        return [*cases, diagonal(m, long, R)]

    types, name = (dtype, dtype, SPLITTING), f"R{R}-{NAMES[dtype]}" + ("-drop" if drops else "")
    return [
        Group(f"shrink-split-{name}", "NT", shrinks, *types),
        Group(f"wgrad-split-{name}", "TN", wgrads, dtype, dtype, TWELVE_SMS),
    ]


def in_place(layout: str, dtype: torch.dtype) -> list[ProblemCase]:
    """Added to an fp32 C."""
    m = Maker(dtype)
    if layout == "TN":
        case = wgrad(m, 70, 72, 39, (True, True))
        total = [m.matrix(rows, 72, F32) for rows in RANKS[39]]
    else:
        case = shrink(m, 33, 72, 39) if layout == "NT" else expand(m, 33, 72, 39)
        total = [m.matrix(case.M, case.N, F32)]
    return [replace(case, C=list(total), C_in=total)]


def _empty() -> list[ProblemCase]:
    """No rows, no columns, no reduction; then one with all."""
    m = Maker()
    cases = [expand(m, M, N, 14) for M, N in ((0, 8), (8, 0))]
    nothing = ProblemCase(9, 24, [SegmentCase([], [], 0)], [m.empty(9, 24)])
    return [*cases, nothing, expand(m, 9, 24, 14)]


def _diagonals() -> list[Group]:
    """Alone, beside problems of every kernel, of more ranks than a tile holds, and split."""

    def alone(name: str, tokens: int, R: int, make: Callable[[], Maker] = Maker) -> Group:
        m = make()
        return Group(
            f"diagonal-{name}", "TN", lambda: [diagonal(make(), tokens, R)], m.dtype, m.adapter
        )

    def split() -> list[ProblemCase]:
        m = Maker()
        return [diagonal(m, 900, 39), diagonal(m, 700, 78), diagonal(m, 40, 7)]

    def wide() -> list[ProblemCase]:
        m = Maker()
        return [wgrad(m, 40, 40, 156, (True, True)), diagonal(m, 70, 600)]

    return [
        *(alone(f"R{R}", 100, R) for R in (7, 39, 148)),
        alone("R148-f16", 70, 148, lambda: Maker(F16)),
        alone("f32-adapter", 70, 78, lambda: Maker(BF16, F32)),
        alone("odd-stride", 33, 39, lambda: strided(Maker(), 3)),
        alone("one-token", 1, 39),
        alone("no-token", 0, 39),
        alone("R600", 40, 600),
        Group("diagonal-beside-wider-tiles", "TN", wide),
        Group(
            "diagonal-beside-wgrad", "TN", lambda: gradients(Maker(F16, F32), 70, 72, 78), F16, F32
        ),
        Group("diagonal-split", "TN", split, device=TWELVE_SMS),
    ]


GROUPS: list[Group] = [
    *_ranks(),
    *(g for R in (7, 14, 28) for g in forms(f"R{R}", R, 33, 40, Maker)),
    *forms("many-tiles", 39, 200, 264, Maker),
    *forms("f32-adapter", 39, 33, 72, lambda: Maker(BF16, F32)),
    *forms("f32-adapter-f16", 14, 33, 40, lambda: Maker(F16, F32)),
    Group("expand-tiny-f16", "NN", lambda: [tiny(expand(Maker(F16, F32), 40, 72, 39))], F16, F32),
    Group("merge-tiny-f16", "TN", lambda: [tiny(merge(Maker(F16), 168, 40, 14))], F16, F16),
    *forms("aligned-stride", 39, 33, 72, lambda: strided(Maker(), 8)),
    *forms("odd-stride", 39, 33, 72, lambda: strided(Maker(), 3)),
    *forms("odd-width", 14, 33, 61, Maker),
    *forms("one-row", 14, 1, 40, Maker),
    Group("expand-in-place", "NN", lambda: [expand(Maker(), 70, 72, 39, in_place=True)]),
    Group("shrink-in-place-f32", "NT", lambda: in_place("NT", BF16)),
    Group("expand-in-place-f32", "NN", lambda: in_place("NN", F16), F16, F16),
    Group("wgrad-in-place-f32", "TN", lambda: in_place("TN", F16), F16, F16),
    Group("wgrad-private-only", "TN", lambda: [wgrad(Maker(), 70, 40, 39, (False, True))]),
    Group("empty", "NN", _empty),
    Group("merge", "TN", lambda: [merge(Maker(), 200, 136, 39)]),
    Group("merge-f16", "TN", lambda: [merge(Maker(F16, F32), 168, 40, 14)], F16, F32),
    *_segments(),
    Group("pool-30-layers", "TN", lambda: pool(30, 30, BF16), BF16, F32),
    Group("pool-32-layers-f16", "TN", lambda: pool(64, 32, F16), F16, F32),
    Group("pool-plain", "TN", lambda: pool(30, 3, BF16, drops=False), BF16, F32),
    Group("pool-R128", "TN", lambda: pool(128, 5, BF16), BF16, F32),
    Group("pool-R128-plain-f16", "TN", lambda: pool(128, 3, F16, drops=False), F16, F32),
    Group("TN-continued", "TN", lambda: continued(Maker(), "TN")),
    Group("NN-continued", "NN", lambda: continued(Maker(), "NN")),
    *_walks(39, BF16),
    *_walks(78, F16),
    *(g for dtype in (BF16, F16) for s in (SMALL_SMEM, LARGE_SMEM) for g in _walks(156, dtype, s)),
    Group("merged-twice", "TN", lambda: _merged_twice(BF16)),
    Group("merged-twice-f16", "TN", lambda: _merged_twice(F16), F16, F16),
    Group("backward-R156", "TN", lambda: backward_of_siblings(156, (264,), False)),
    Group("backward-R156-drop", "TN", lambda: backward_of_siblings(156, (72,), True)),
    Group("backward-qkv-R39-drop", "TN", lambda: backward_of_siblings(39, (264, 72, 72), True)),
    Group("backward-qkv-R78", "TN", lambda: backward_of_siblings(78, (136, 40, 40), False)),
    *forms("R156-tall", 156, 264, 264, Maker),
    *forms("R156-tall-f16", 156, 136, 136, lambda: Maker(F16)),
    *forms("R156-f32-adapter", 156, 136, 72, lambda: Maker(BF16, F32)),
    Group("shrink-drop-tall", "NT", lambda: [dropped(shrink(Maker(), 264, 72, 156))]),
    Group(
        "shrink-drop-tall-f16", "NT", lambda: [dropped(shrink(Maker(F16), 264, 72, 156))], F16, F16
    ),
    Group(
        "wgrad-drop-R156-f16",
        "TN",
        lambda: [dropped(wgrad(Maker(F16), 100, 264, 156, (True, True)))],
        F16,
        F16,
    ),
    *_diagonals(),
    *splits(39, 520, 392, BF16, drops=True),
    *splits(37, 520, 392, F16, drops=False),
    *splits(78, 712, 392, F16, drops=True),
    *splits(156, 904, 608, BF16, drops=False),
    *splits(148, 904, 608, BF16, drops=True),
]
