"""Warp-wide and matrix instructions, lane by lane."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.executor import Kind
from ptx.formats import from_bf16, to_bf16, to_tf32
from ptx.snippets import LANES, Snippet

LANE = np.arange(LANES, dtype=np.uint32)
ALL = "0xffffffff"


def lanes(values: object) -> np.ndarray:
    """32 values as .u32."""
    return np.array(values, np.uint32)


def op(
    name: str,
    text: str,
    *expected: np.ndarray,
    inputs: tuple[np.ndarray, ...] = (LANE,),
    arch: str = "sm_80",
) -> Snippet:
    """%i0 holds the lane number."""
    return Snippet(name, text, inputs, expected, arch)


CASES = [
    op(
        "shfl_up",
        f"shfl.sync.up.b32 %o0|%p0, %i0, 3, 0, {ALL}; selp.u32 %o1, 1, 0, %p0;",
        lanes([i if i < 3 else i - 3 for i in range(32)]),
        lanes([int(i >= 3) for i in range(32)]),
    ),
    op(
        "shfl_down",
        f"shfl.sync.down.b32 %o0, %i0, 5, 31, {ALL};",
        lanes([i if i > 26 else i + 5 for i in range(32)]),
    ),
    op("shfl_bfly", f"shfl.sync.bfly.b32 %o0, %i0, 9, 31, {ALL};", LANE ^ 9),
    op(
        "shfl_segments",
        f"add.u32 %r0, %i0, 5; shfl.sync.idx.b32 %o0, %i0, %r0, 0x181f, {ALL};",
        lanes([(i & 24) + ((i + 5) & 7) for i in range(32)]),
    ),
    op(
        "vote",
        f"setp.lt.u32 %p0, %i0, 4; vote.sync.ballot.b32 %o0, %p0, {ALL}; "
        f"vote.sync.any.pred %p1, %p0, {ALL}; "
        f"vote.sync.all.pred %p2, %p0, {ALL}; "
        f"vote.sync.uni.pred %p3, %p0, {ALL}; selp.u32 %o1, 1, 0, %p1; "
        "selp.u32 %o2, 1, 0, %p2; selp.u32 %o3, 1, 0, %p3;",
        lanes([15]),
        lanes([1]),
        lanes([0]),
        lanes([0]),
    ),
    op(
        "vote_member_mask",
        "setp.lt.u32 %p0, %i0, 16; mov.u32 %o0, 0; @!%p0 bra HIGH; "
        "setp.ne.u32 %p1, %i0, 0; "
        "vote.sync.ballot.b32 %o0, %p1, 0xffff; bra END; "
        "HIGH: vote.sync.ballot.b32 %o0, 1, 0xffff0000; END:",
        lanes([0xFFFE] * 16 + [0xFFFF0000] * 16),
    ),
    op(
        "match_any",
        f"and.b32 %r0, %i0, 3; match.any.sync.b32 %o0, %r0, {ALL};",
        lanes([0x11111111 << (i & 3) for i in range(32)]),
    ),
    op(
        "redux",
        f"redux.sync.add.s32 %o0, %i0, {ALL}; "
        f"redux.sync.max.u32 %o1, %i0, {ALL}; sub.u32 %r0, 10, %i0; "
        f"redux.sync.min.s32 %o2, %r0, {ALL}; "
        f"redux.sync.xor.b32 %o3, %i0, {ALL};",
        lanes([496]),
        lanes([31]),
        lanes([2**32 - 21]),
        lanes([0]),
    ),
    op(
        "activemask",
        "mov.u32 %o0, 0; setp.ge.u32 %p0, %i0, 8; @%p0 bra END; activemask.b32 %o0; END:",
        lanes([255] * 8 + [0] * 24),
    ),
    op(
        "special",
        "mov.u32 %o0, %laneid; mov.u32 %o1, %lanemask_lt; mov.u32 %o2, %ntid.x;",
        LANE,
        lanes([(1 << i) - 1 for i in range(32)]),
        lanes([32]),
    ),
]


@pytest.mark.parametrize("snippet", CASES, ids=lambda s: s.name)
def test_warp_instruction(snippet: Snippet) -> None:
    snippet.check()


def test_elect_chooses_one_lane() -> None:
    text = f"elect.sync %o0|%p0, {ALL}; selp.u32 %o1, 1, 0, %p0;"
    op("elect", text, lanes([0]), lanes([1] + [0] * 31), arch="sm_90").check()


def test_shuffle_from_an_absent_lane_is_misuse() -> None:
    text = (
        "setp.lt.u32 %p0, %i0, 16; mov.u32 %o0, 0; @!%p0 bra END; "
        "shfl.sync.idx.b32 %o0, %i0, 20, 31, 0xffff; END:"
    )
    result, _ = op("absent", text, lanes([0])).run()
    assert result.kinds == {Kind.MISUSE}


def test_lanes_at_different_warp_instructions_are_divergent() -> None:
    text = (
        f"setp.lt.u32 %p0, %i0, 16; @%p0 bra LOW; bar.warp.sync {ALL}; "
        f"bra END; LOW: vote.sync.ballot.b32 %o0, 1, {ALL}; END:"
    )
    result, _ = op("different", text, lanes([0])).run()
    assert result.kinds == {Kind.DIVERGENT}


# A matrix element (r, c) as 16 bits that name it.
TILE = (np.arange(8)[:, None] * 256 + np.arange(8)).astype(np.uint16)


def fragment(tile: np.ndarray) -> np.ndarray:
    """One 8 × 8 matrix as each lane holds it: row l/4, columns 2 (l%4) and the next."""
    return np.ascontiguousarray(tile, np.uint16).reshape(-1).view(np.uint32)


STORE_ROW = (
    "shl.b32 %r0, %i0, 2; mov.u32 %r1, shared_bytes; "
    "add.u32 %r2, %r1, %r0; st.shared.b32 [%r2], %i1; "
    "bar.warp.sync 0xffffffff; "
)
ROW_ADDRESS = "and.b32 %r3, %i0, 7; shl.b32 %r3, %r3, 4; add.u32 %r4, %r1, %r3; "


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_the_fragment_of_the_rows(transposed: bool) -> None:
    suffix, expected = (".trans", TILE.T) if transposed else ("", TILE)
    text = (
        STORE_ROW
        + ROW_ADDRESS
        + f"ldmatrix.sync.aligned.m8n8.x1{suffix}.shared.b16 {{%o0}}, [%r4];"
    )
    op("ldmatrix", text, fragment(expected), inputs=(LANE, fragment(TILE))).check()


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_inverse(transposed: bool) -> None:
    suffix, expected = (".trans", TILE.T) if transposed else ("", TILE)
    text = (
        "mov.u32 %r1, shared_bytes; "
        + ROW_ADDRESS
        + f"stmatrix.sync.aligned.m8n8.x1{suffix}.shared.b16 [%r4], {{%i1}}; "
        "bar.warp.sync 0xffffffff; shl.b32 %r0, %i0, 2; "
        "add.u32 %r2, %r1, %r0; ld.shared.b32 %o0, [%r2];"
    )
    op("stmatrix", text, fragment(expected), inputs=(LANE, fragment(TILE)), arch="sm_90").check()


def test_movmatrix_transposes() -> None:
    text = "movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i1;"
    op("movmatrix", text, fragment(TILE.T), inputs=(LANE, fragment(TILE))).check()


def a_fragments(words: np.ndarray) -> list[np.ndarray]:
    """A (16, words) as mma's registers: rows l/4 and l/4 + 8, words l%4, then the next four."""
    num_quads = words.shape[1] // 4
    return [
        np.ascontiguousarray(words[8 * half : 8 * half + 8, 4 * quad : 4 * quad + 4]).reshape(-1)
        for quad in range(num_quads)
        for half in range(2)
    ]


def b_fragments(words: np.ndarray) -> list[np.ndarray]:
    """B as (8 columns, words along K): column l/4, words l%4."""
    return [
        np.ascontiguousarray(words[:, 4 * q : 4 * q + 4]).reshape(-1)
        for q in range(words.shape[1] // 4)
    ]


def c_fragments(c: np.ndarray) -> list[np.ndarray]:
    """C (16, 8) float: register q holds row l/4 + 8 (q/2), column 2 (l%4) + q%2."""
    return [
        np.ascontiguousarray(c[8 * (q // 2) : 8 * (q // 2) + 8, q % 2 :: 2]).reshape(-1)
        for q in range(4)
    ]


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Small integers: their products and sums are exact in every format and order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def encode(values: np.ndarray, type_: str) -> np.ndarray:
    """Rows of 32-bit words of a type's elements."""
    if type_ == "tf32":
        return to_tf32(values).view(np.uint32)
    bits = to_bf16(values) if type_ == "bf16" else values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)


@pytest.mark.parametrize(
    ("type_", "K"), [("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)]
)
def test_mma_multiplies_and_adds(type_: str, K: int) -> None:
    A, B, C = integers((16, K), 1), integers((8, K), 2), integers((16, 8), 3)
    fragments = a_fragments(encode(A, type_)) + b_fragments(encode(B, type_)) + c_fragments(C)
    num_a, num_b = (
        len(fragments) - 4 - len(b_fragments(encode(B, type_))),
        len(b_fragments(encode(B, type_))),
    )
    names = [f"%i{k}" for k in range(len(fragments))]
    a, b, c = names[:num_a], names[num_a : num_a + num_b], names[num_a + num_b :]
    groups = ", ".join("{" + ", ".join(g) + "}" for g in (["%o0", "%o1", "%o2", "%o3"], a, b, c))
    text = f"mma.sync.aligned.m16n8k{K}.row.col.f32.{type_}.{type_}.f32 {groups};"
    Snippet("mma", text, fragments, c_fragments(A @ B.T + C)).check()


def test_mma_with_half_accumulators() -> None:
    A, B = integers((16, 16), 4), integers((8, 16), 5)
    exact = (A @ B.T).astype(np.float16).view(np.uint16)
    expected = [np.ascontiguousarray(exact[h : h + 8]).reshape(-1).view(np.uint32) for h in (0, 8)]
    zero = np.zeros(1, np.uint32)
    fragments = [*a_fragments(encode(A, "f16")), *b_fragments(encode(B, "f16")), zero, zero]
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%o0, %o1}, {%i0, %i1, %i2, %i3}, {%i4, %i5}, {%i6, %i7};"
    )
    Snippet("mma_half", text, fragments, expected).check()


def test_mma_ignores_the_low_bits_of_tf32() -> None:
    one_and_a_bit = np.array([0x3F800FFF], np.uint32)
    zero = np.zeros(1, np.float32)
    inputs = [one_and_a_bit] * 3 + [zero]
    text = (
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
        "{%o0, %o1, %o2, %o3}, {%i0, %i1}, {%i2}, {%i3, %i3, %i3, %i3};"
    )
    Snippet("mma_low_bits", text, inputs, [np.full(1, 4, np.float32)] * 4).check()


def test_bf16_helpers_round_to_even() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -2.0], np.float32)
    assert from_bf16(to_bf16(values)).tolist() == [1.0, 1 + 2**-6, -2.0]
