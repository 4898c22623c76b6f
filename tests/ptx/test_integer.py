"""Results of integer, bit and predicate instructions, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.lane_values import f32, u16, u32, u64
from ptx.snippets import Snippet, op

INTEGER = [
    op(
        "add_wraps",
        "add.s32 %o0, %i0, %i1;",
        [u32(1, 0x7FFFFFFF, -1), u32(2, 1, 1)],
        u32(3, 0x80000000, 0),
    ),
    op("sub_16", "sub.s16 %o0, %i0, %i1;", [u16(3, 0), u16(5, 1)], u16(-2, -1)),
    op("mul_lo_64", "mul.lo.u64 %o0, %i0, %i1;", [u64(2**40 + 1), u64(2**30)], u64(2**30)),
    op(
        "mul_hi_u32",
        "mul.hi.u32 %o0, %i0, %i1;",
        [u32(0xFFFFFFFF), u32(0xFFFFFFFF)],
        u32(0xFFFFFFFE),
    ),
    op("mul_hi_s32", "mul.hi.s32 %o0, %i0, %i1;", [u32(-1, -(2**31)), u32(1, 4)], u32(-1, -2)),
    op("mul_hi_u64", "mul.hi.u64 %o0, %i0, %i1;", [u64(2**63), u64(6)], u64(3)),
    # Philox4x32: the two products of a round, as mul.wide and as mul.hi + mul.lo.
    op(
        "philox_product",
        "mul.wide.u32 %d0, %i0, 0xD2511F53; mov.b64 {%o0, %o1}, %d0;",
        [u32(0x12345678)],
        u32(0x12345678 * 0xD2511F53),
        u32(0x12345678 * 0xD2511F53 >> 32),
    ),
    op("mul_wide_s16", "mul.wide.s16 %o0, %i0, %i1;", [u16(-3), u16(7)], u32(-21)),
    op("mad_lo", "mad.lo.s32 %o0, %i0, %i1, %i2;", [u32(-3), u32(7), u32(1)], u32(-20)),
    op("mad_hi", "mad.hi.u32 %o0, %i0, %i1, %i2;", [u32(2**31), u32(6), u32(10)], u32(13)),
    op("mad_wide", "mad.wide.s32 %o0, %i0, %i1, %i2;", [u32(-3), u32(7), u64(1)], u64(-20)),
    op("div_s32", "div.s32 %o0, %i0, %i1;", [u32(-7, 7), u32(2, -2)], u32(-3, -3)),
    op("rem_s32", "rem.s32 %o0, %i0, %i1;", [u32(-7, 7), u32(2, -2)], u32(-1, 1)),
    op("div_u32", "div.u32 %o0, %i0, %i1;", [u32(-7), u32(2)], u32(0x7FFFFFFC)),
    op(
        "min_s_u",
        "min.s32 %o0, %i0, %i1; max.u32 %o1, %i0, %i1;",
        [u32(-1), u32(1)],
        u32(-1),
        u32(-1),
    ),
    op("abs_neg", "abs.s32 %o0, %i0; neg.s32 %o1, %i0;", [u32(-5, 5)], u32(5, 5), u32(5, -5)),
    op("shl_clamps", "shl.b32 %o0, %i0, %i1;", [u32(1, 1, 3), u32(31, 32, 1)], u32(2**31, 0, 6)),
    op("shr_s", "shr.s32 %o0, %i0, %i1;", [u32(-8, -8, 8), u32(1, 40, 2)], u32(-4, -1, 2)),
    op("shr_u64", "shr.u64 %o0, %i0, %i1;", [u64(2**63, 2**63), u32(63, 64)], u64(1, 0)),
    op(
        "shf_l_wrap",
        "shf.l.wrap.b32 %o0, %i0, %i1, %i2;",
        [u32(0x80000001), u32(2), u32(33)],
        u32(5),
    ),
    op("shf_r_clamp", "shf.r.clamp.b32 %o0, %i0, %i1, %i2;", [u32(7), u32(9), u32(40)], u32(9)),
    op(
        "lop3_xor3",
        "lop3.b32 %o0, %i0, %i1, %i2, 0x96;",
        [u32(12), u32(10), u32(1)],
        u32(12 ^ 10 ^ 1),
    ),
    op(
        "lop3_mix",
        "lop3.b32 %o0, %i0, %i1, %i2, 0xCA;",
        [u32(12), u32(10), u32(1)],
        u32(12 & 10 | ~12 & 1),
    ),
    op(
        "prmt_selects",
        "prmt.b32 %o0, %i0, %i1, 0x7610;",
        [u32(0x33221100), u32(0x77665544)],
        u32(0x77661100),
    ),
    op("prmt_sign", "prmt.b32 %o0, %i0, %i1, 0xB908;", [u32(0x80FF017F), u32(0)], u32(0xFF007F00)),
    op(
        "bfe_u_s",
        "bfe.u32 %o0, %i0, 4, 4; bfe.s32 %o1, %i0, 4, 4;",
        [u32(0xF5, 0x3A0)],
        u32(15, 10),
        u32(-1, -6),
    ),
    op("bfi", "bfi.b32 %o0, %i0, %i1, 8, 4;", [u32(0xAB), u32(0xFFFFFFFF)], u32(0xFFFFFBFF)),
    op("popc_clz", "popc.b32 %o0, %i0; clz.b32 %o1, %i0;", [u32(0xF0, 0)], u32(4, 0), u32(24, 32)),
    op("popc_64", "popc.b64 %o0, %i0; clz.b64 %o1, %i0;", [u64(2**40 | 1)], u32(2), u32(23)),
    op(
        "brev_bfind",
        "brev.b32 %o0, %i0; bfind.u32 %o1, %i0;",
        [u32(1, 6)],
        u32(2**31, 3 << 29),
        u32(0, 2),
    ),
    op(
        "not_and_or",
        "not.b32 %r0, %i0; and.b32 %o0, %r0, 0xFF; or.b32 %o1, %i0, 1;",
        [u32(0xF0)],
        u32(0x0F),
        u32(0xF1),
    ),
]

PREDICATE = [
    op(
        "setp_pair",
        "setp.lt.s32 %p0|%p1, %i0, %i1; selp.u32 %o0, 1, 0, %p0; selp.u32 %o1, 1, 0, %p1;",
        [u32(-1, 2), u32(1, 1)],
        u32(1, 0),
        u32(0, 1),
    ),
    op(
        "setp_combines",
        "setp.eq.u32 %p0, %i0, 1; setp.lo.and.u32 %p1, %i1, 5, !%p0; selp.u32 %o0, 1, 0, %p1;",
        [u32(1, 0, 0), u32(2, 2, 7)],
        u32(0, 1, 0),
    ),
    op(
        "unordered",
        "setp.lt.f32 %p0, %i0, %i1; setp.ltu.f32 %p1, %i0, %i1; "
        "setp.ne.f32 %p2, %i0, %i1; setp.neu.f32 %p3, %i0, %i1; "
        "selp.u32 %o0, 1, 0, %p0; selp.u32 %o1, 1, 0, %p1; "
        "selp.u32 %o2, 1, 0, %p2; selp.u32 %o3, 1, 0, %p3;",
        [f32(np.nan, 1), f32(1, 2)],
        u32(0, 1),
        u32(1, 1),
        u32(0, 1),
        u32(1, 1),
    ),
    op(
        "guards",
        "setp.gt.s32 %p0, %i0, 0; mov.u32 %o0, 7; @%p0 mov.u32 %o0, 1; @!%p0 add.u32 %o0, %o0, 1;",
        [u32(1, -1)],
        u32(1, 8),
    ),
    op(
        "logic",
        "setp.gt.s32 %p0, %i0, 0; setp.gt.s32 %p1, %i1, 0; "
        "and.pred %p2, %p0, %p1; xor.pred %p3, %p0, %p1; "
        "not.pred %p4, %p3; selp.u32 %o0, 1, 0, %p2; selp.u32 %o1, 1, 0, %p4;",
        [u32(1, 1, 0), u32(1, 0, 0)],
        u32(1, 0, 0),
        u32(1, 0, 1),
    ),
    op("slct", "slct.u32.s32 %o0, 5, 6, %i0;", [u32(0, -1)], u32(5, 6)),
    op(
        "loop",
        "mov.u32 %o0, 0; mov.u32 %r0, %i0; LOOP: setp.eq.u32 %p0, %r0, 0; "
        "@%p0 bra DONE; add.u32 %o0, %o0, %r0; "
        "sub.u32 %r0, %r0, 1; bra LOOP; DONE:",
        [u32(0, 1, 4, 10)],
        u32(0, 1, 10, 55),
    ),
    op(
        "pack",
        "mov.b32 %o0, {%i0, %i1}; mov.b32 {%o1, _}, %o0; "
        "mov.b64 %d0, {%o0, %o0}; shr.u64 %d0, %d0, 48; cvt.u32.u64 %o2, %d0;",
        [u16(1), u16(2)],
        u32(0x20001),
        u16(1),
        u32(2),
    ),
]


@pytest.mark.parametrize("snippet", INTEGER + PREDICATE, ids=lambda s: s.name)
def test_instruction_gives_the_value_computed_by_hand(snippet: Snippet) -> None:
    snippet.check()
