"""Named groups of fp32 problems: in TF32, and those of merging in full precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ptx.gemm_programs import (
    BF16,
    F16,
    F32,
    SPLITTING,
    Group,
    Maker,
    backward_of_siblings,
    continued,
    diagonal,
    dropped,
    expand,
    forms,
    gradients,
    in_place,
    merge,
    pool,
    segments,
    shrink,
    splits,
    strided,
    wgrad,
)
from ptx.planned_gemm import SMALL_SMEM, Device, ProblemCase, SegmentCase

LARGE, SMALL = Device(), Device(smem_bytes=SMALL_SMEM)
MAKE = partial(Maker, F32)
# R, and rows and columns of the long matrices.
SHAPES = {37: (70, 136), 39: (33, 61), 78: (70, 72), 74: (130, 40), 156: (70, 136), 148: (33, 72)}

Make = Callable[[], list[ProblemCase]]


def _f32(name: str, layout: str, make: Make, device: Device = LARGE) -> Group:
    return Group(name, layout, make, F32, F32, device)


def _full(name: str, make: Make, scale_dtype: torch.dtype = F32) -> Group:
    return Group(name, "TN", make, F32, scale_dtype, SMALL, is_full_precision=True)


def _ranks() -> list[Group]:
    return [
        group
        for R, shape in SHAPES.items()
        for drops in (False, True)
        for group in forms(f"R{R}-f32" + ("-drop" if drops else ""), R, *shape, MAKE, drops)
    ]


def _segments() -> list[Group]:
    """Sums over segments: with one sum, with a scale_m and a seed for each, and split."""

    def group(layout: str, scaled: bool, drops: bool, split: bool = False) -> Group:
        def cases() -> list[ProblemCase]:
            Ks = [100, 72, 8] if split else [20, 39, 8]
            case = segments(MAKE(), layout, 70, 40, Ks, scaled, F32)
            return [dropped(case, one_seed=layout == "NN") if drops else case]

        words = [layout, "scaled" if scaled else "summed", "f32"]
        words += ["drop"] * drops + ["split"] * split
        return _f32("-".join(words), layout, cases, SPLITTING if split else LARGE)

    return [
        *(
            group(layout, scaled, drops)
            for layout in ("NT", "NN", "TN")
            for scaled, drops in ((False, False), (True, False), (True, True))
        ),
        group("TN", scaled=True, drops=True, split=True),
    ]


def _tiles(layout: str) -> list[ProblemCase]:
    """Several tiles and problems to a block, of odd widths and in strided memory."""
    m = strided(MAKE(), 3)
    form = {"NT": shrink, "NN": expand}.get(layout)
    if form is None:
        return [wgrad(m, 45, 264, 39, (True, False)), wgrad(m, 20, 40, 39, (True, True))]
    return [form(m, 200, 139, 39), form(m, 70, 40, 39)]


def _merges(m: Maker, W_dtype: torch.dtype = F32) -> list[ProblemCase]:
    """Of wide and narrow layers and of several ranks, into weights of another dtype."""
    cases = [merge(m, N, K, R) for N, K, R in ((136, 264, 39), (40, 24, 156), (20, 40, 14))]
    weights = [m.matrix(case.M, case.N, W_dtype) for case in cases]
    return [replace(case, C=[W], C_in=[W]) for case, W in zip(cases, weights, strict=True)]


def deltas(m: Maker) -> list[ProblemCase]:
    """Updates alone, in fp32."""
    return [
        replace(merge(m, N, K, R), C=[m.empty(N, K, F32)], C_in=[])
        for N, K, R in ((136, 40, 156), (61, 67, 37), (1, 1, 7))
    ]


def _empty_merges() -> list[ProblemCase]:
    m = MAKE()
    W = m.matrix(9, 24)
    no_rank = ProblemCase(9, 24, [SegmentCase([], [], 0)], [W], [W])
    return [merge(m, 0, 8, 14), no_rank, merge(m, 8, 0, 14), merge(m, 9, 24, 14)]


F32_GROUPS: list[Group] = [
    *_ranks(),
    *forms("one-row-f32", 14, 1, 40, MAKE),
    *forms("aligned-stride-f32", 28, 33, 72, lambda: strided(MAKE(), 4)),
    *_segments(),
    *(
        _f32(f"{layout}-tiles-f32", layout, partial(_tiles, layout))
        for layout in ("NT", "NN", "TN")
    ),
    *(
        _f32(f"{layout}-in-place-f32", layout, partial(in_place, layout, F32))
        for layout in ("NT", "NN", "TN")
    ),
    _f32("pool-30-layers-f32", "TN", lambda: pool(30, 30, F32)),
    *(
        _f32(f"{layout}-continued-f32", layout, lambda layout=layout: continued(MAKE(), layout))
        for layout in ("TN", "NN")
    ),
    *(_f32(f"diagonal-R{R}-f32", "TN", lambda R=R: [diagonal(MAKE(), 45, R)]) for R in (37, 148)),
    _f32("gradients-R78-f32", "TN", lambda: gradients(MAKE(), 70, 72, 78)),
    _f32("backward-R156-f32", "TN", lambda: backward_of_siblings(156, (72,), False, F32)),
    _f32("backward-R156-f32-drop", "TN", lambda: backward_of_siblings(156, (72, 40), True, F32)),
    _f32("backward-R39-f32-drop", "TN", lambda: backward_of_siblings(39, (40, 24, 24), True, F32)),
    *splits(39, 260, 196, F32, drops=True),
    *splits(156, 452, 304, F32, drops=False),
    _full("merge-f32", lambda: _merges(MAKE())),
    _full("merge-f32-strided", lambda: _merges(strided(MAKE(), 3))),
    _full("merge-f32-into-bf16", lambda: _merges(MAKE(), BF16)),
    _full("merge-bf16", lambda: _merges(Maker(BF16), BF16), BF16),
    _full("merge-f16", lambda: _merges(Maker(F16), F16), F16),
    _full("merge-f16-strided", lambda: _merges(strided(Maker(F16), 3), F16), F16),
    _full("merge-f16-into-f32", lambda: _merges(Maker(F16), F32), F16),
    _full("delta-f32", lambda: deltas(MAKE())),
    _full("delta-bf16", lambda: deltas(Maker(BF16)), BF16),
    _full("merge-empty-f32", _empty_merges),
]
