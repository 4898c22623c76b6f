"""Results of lane-by-lane instructions, by hand, family by family."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from ptx.executor import Module, Unsupported, find_nvcc
from ptx.snippets import Snippet, module_of

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F32, F64 = np.float32, np.float64
NAN, INF = np.nan, np.inf
TINY = np.float32(2.0**-140)  # subnormal


def u32(*values: int) -> np.ndarray:
    """32-bit lanes; negative values wrap."""
    return np.array([v & 0xFFFFFFFF for v in values], U32)


def u64(*values: int) -> np.ndarray:
    """64-bit lanes."""
    return np.array([v & (2**64 - 1) for v in values], U64)


def u16(*values: int) -> np.ndarray:
    """16-bit lanes."""
    return np.array([v & 0xFFFF for v in values], U16)


def f32(*values: float) -> np.ndarray:
    """Float lanes."""
    return np.array(values, F32)


def f64(*values: float) -> np.ndarray:
    """Double lanes."""
    return np.array(values, F64)


def op(
    name: str, text: str, inputs: list[np.ndarray], *expected: np.ndarray, arch: str = "sm_80"
) -> Snippet:
    """One instruction or a few."""
    return Snippet(name, text, inputs, expected, arch)


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

FLOAT = [
    op("add_f32", "add.f32 %o0, %i0, %i1;", [f32(1, INF), f32(2**-24, -INF)], f32(1, NAN)),
    op(
        "add_directions",
        "add.rz.f32 %o0, %i0, %i1; add.rp.f32 %o1, %i0, %i1; add.rm.f32 %o2, %i0, %i1;",
        [f32(1, -1), f32(2**-25, -(2**-25))],
        f32(1, -1),
        f32(1 + 2**-23, -1),
        f32(1, -1 - 2**-23),
    ),
    op(
        "fma_is_fused",
        "fma.rn.f32 %o0, %i0, %i1, %i2;",
        [f32(1 + 2**-12), f32(1 - 2**-12), f32(-1)],
        f32(-(2.0**-24)),
    ),
    op(
        "fma_rz",
        "fma.rz.f32 %o0, %i0, %i1, %i2;",
        [f32(1), f32(1), f32(-(2**-30))],
        f32(1 - 2**-24),
    ),
    op("mul_f64", "mul.f64 %o0, %i0, %i1;", [f64(3), f64(0.1)], f64(3 * 0.1)),
    op("div_rn", "div.rn.f32 %o0, %i0, %i1;", [f32(1, 0), f32(3, 0)], f32(1 / 3, NAN)),
    op(
        "div_directions",
        "div.rp.f32 %o0, %i0, %i1; div.rm.f32 %o1, %i0, %i1;",
        [f32(1), f32(3)],
        f32(1 / 3),
        np.nextafter(f32(1 / 3), F32(0)),
    ),
    op(
        "sqrt_rcp",
        "sqrt.rn.f32 %o0, %i0; rcp.rn.f32 %o1, %i0;",
        [f32(4, 2)],
        f32(2, 2**0.5),
        f32(0.25, 0.5),
    ),
    op(
        "min_number",
        "min.f32 %o0, %i0, %i1; max.f32 %o1, %i0, %i1;",
        [f32(NAN, 1, -0.0), f32(2, 3, 0.0)],
        f32(2, 1, -0.0),
        f32(2, 3, 0.0),
    ),
    op("min_nan", "min.NaN.f32 %o0, %i0, %i1;", [f32(NAN, 1), f32(2, 3)], f32(NAN, 1)),
    op("abs_neg_f32", "abs.f32 %o0, %i0; neg.f32 %o1, %i0;", [f32(-2, 0)], f32(2, 0), f32(2, -0.0)),
    op(
        "ex2",
        "ex2.approx.f32 %o0, %i0; lg2.approx.f32 %o1, %i1;",
        [f32(3, -INF), f32(8, 0)],
        f32(8, 0),
        f32(3, -INF),
    ),
    op("rsqrt", "rsqrt.approx.f32 %o0, %i0;", [f32(4, 16)], f32(0.5, 0.25)),
    op(
        "tanh_sin_cos",
        "tanh.approx.f32 %o0, %i0; sin.approx.f32 %o1, %i0; cos.approx.f32 %o2, %i0;",
        [f32(0)],
        f32(0),
        f32(0),
        f32(1),
    ),
    op(
        "saturate",
        "add.sat.f32 %o0, %i0, %i1;",
        [f32(1, -3, NAN, 0.25), f32(1, 1, 0, 0.25)],
        f32(1, 0, 0, 0.5),
    ),
    op(
        "ftz_inputs",
        "add.ftz.f32 %o0, %i0, %i1; add.f32 %o1, %i0, %i1;",
        [np.array([TINY, -TINY], F32), f32(0, -0.0)],
        f32(0, -0.0),
        np.array([TINY, -TINY], F32),
    ),
    op(
        "ftz_result",
        "mul.ftz.f32 %o0, %i0, %i1; mul.f32 %o1, %i0, %i1;",
        [f32(2.0**-100), f32(2.0**-40)],
        f32(0),
        f32(2.0**-140),
    ),
    op(
        "setp_ftz",
        "setp.gt.ftz.f32 %p0, %i0, %i1; selp.u32 %o0, 1, 0, %p0; "
        "setp.gt.f32 %p1, %i0, %i1; selp.u32 %o1, 1, 0, %p1;",
        [np.array([TINY], F32), f32(0)],
        u32(0),
        u32(1),
    ),
]

HALF = [
    op("add_f16", "add.f16 %o0, %i0, %i1;", [u16(0x3C00), u16(0x4000)], u16(0x4200)),
    op(
        "fma_bf16",
        "fma.rn.bf16 %o0, %i0, %i1, %i2;",
        [u16(0x4000), u16(0x4040), u16(0x3F80)],
        u16(0x40E0),
    ),
    op(
        "add_f16x2", "add.f16x2 %o0, %i0, %i1;", [u32(0x3C004000), u32(0x40003C00)], u32(0x42004200)
    ),
    op(
        "mul_bf16x2",
        "mul.bf16x2 %o0, %i0, %i1;",
        [u32(0x40003F80), u32(0x40404040)],
        u32(0x40C04040),
        arch="sm_90",
    ),
    op(
        "fma_f16x2",
        "fma.rn.f16x2 %o0, %i0, %i1, %i2;",
        [u32(0x40003C00), u32(0x40003C00), u32(0x3C003C00)],
        u32(0x45004000),
    ),
    op(
        "max_bf16x2",
        "max.bf16x2 %o0, %i0, %i1;",
        [u32(0x3F80C000), u32(0x40003F80)],
        u32(0x40003F80),
    ),
    op("neg_f16x2", "neg.f16x2 %o0, %i0;", [u32(0x3C00C000)], u32(0xBC004000)),
    op(
        "set_f16x2",
        "set.lt.f16x2.f16x2 %o0, %i0, %i1;",
        [u32(0x3C004000), u32(0x40003C00)],
        u32(0x3C000000),
    ),
    op(
        "set_mask_f16x2",
        "set.ge.u32.f16x2 %o0, %i0, %i1;",
        [u32(0x3C004000), u32(0x40003C00)],
        u32(0x0000FFFF),
    ),
    op(
        "set_bf16x2",
        "set.gt.bf16x2.bf16x2 %o0, %i0, %i1;",
        [u32(0x3F804000), u32(0x40003F80)],
        u32(0x00003F80),
        arch="sm_90",
    ),
    op(
        "set_mask_bf16x2",
        "set.gt.u32.bf16x2 %o0, %i0, %i1;",
        [u32(0x3F804000), u32(0x40003F80)],
        u32(0x0000FFFF),
        arch="sm_90",
    ),
    op(
        "set_nan_f16x2",
        "set.ltu.f16x2.f16x2 %o0, %i0, %i1; set.lt.f16x2.f16x2 %o1, %i0, %i1;",
        [u32(0x7E003C00), u32(0x3C004000)],
        u32(0x3C003C00),
        u32(0x00003C00),
    ),
    op(
        "set_f32",
        "set.eq.u32.f32 %o0, %i0, %i1; set.lt.f32.s32 %o1, %i2, 0;",
        [f32(1, 2), f32(1, 1), u32(-1, 1)],
        u32(-1, 0),
        f32(1, 0),
    ),
    op(
        "setp_f16x2",
        "setp.lt.f16x2 %p0|%p1, %i0, %i1; selp.u32 %o0, 1, 0, %p0; selp.u32 %o1, 1, 0, %p1;",
        [u32(0x40003C00), u32(0x3C004000)],
        u32(1),
        u32(0),
    ),
    op(
        "selp_packed",
        "setp.ne.u32 %p0, %i2, 0; selp.b32 %o0, %i0, %i1, %p0;",
        [u32(0x3C003C00), u32(0x40004000), u32(1, 0)],
        u32(0x3C003C00, 0x40004000),
    ),
    op("ex2_f16x2", "ex2.approx.f16x2 %o0, %i0;", [u32(0x3C000000)], u32(0x40003C00)),
]

CONVERSION = [
    op(
        "extend", "cvt.s64.s32 %o0, %i0; cvt.u64.u32 %o1, %i0;", [u32(-2)], u64(-2), u64(0xFFFFFFFE)
    ),
    op(
        "narrow",
        "cvt.u32.u8 %o0, %i0; cvt.s32.s8 %o1, %i0; cvt.u16.u32 %h0, %i0; cvt.u32.u16 %o2, %h0;",
        [u32(0x12345680)],
        u32(0x80),
        u32(-128),
        u32(0x5680),
    ),
    op(
        "to_integer",
        "cvt.rzi.s32.f32 %o0, %i0; cvt.rni.s32.f32 %o1, %i0; "
        "cvt.rmi.s32.f32 %o2, %i0; cvt.rpi.s32.f32 %o3, %i0;",
        [f32(2.5, -2.5)],
        u32(2, -2),
        u32(2, -2),
        u32(2, -3),
        u32(3, -2),
    ),
    op(
        "to_integer_clamps",
        "cvt.rzi.s32.f32 %o0, %i0; cvt.rzi.u32.f32 %o1, %i0;",
        [f32(3e9, -3e9, NAN)],
        u32(2**31 - 1, -(2**31), 0),
        u32(3000000000, 0, 0),
    ),
    op(
        "from_integer",
        "cvt.rn.f32.u32 %o0, %i0; cvt.rn.f32.s32 %o1, %i0; cvt.rz.f32.u32 %o2, %i0;",
        [u32(0xFFFFFFFF)],
        f32(2**32),
        f32(-1),
        f32(2**32 - 256),
    ),
    op("widths", "cvt.f64.f32 %d0, %i0; cvt.rn.f32.f64 %o0, %d0;", [f32(0.1)], f32(0.1)),
    op(
        "to_half_ties",
        "cvt.rn.bf16.f32 %o0, %i0; cvt.rn.f16.f32 %o1, %i0;",
        [f32(1 + 2**-8, 1 + 3 * 2**-8, 65520)],
        u16(0x3F80, 0x3F82, 0x4780),
        u16(0x3C04, 0x3C0C, 0x7C00),
    ),
    op(
        "to_packed",
        "cvt.rn.bf16x2.f32 %o0, %i0, %i1; cvt.rn.relu.f16x2.f32 %o1, %i0, %i1;",
        [f32(-1), f32(2)],
        u32(0xBF804000),
        u32(0x00004000),
    ),
    op(
        "from_half",
        "cvt.f32.f16 %o0, %i0; cvt.f32.bf16 %o1, %i0;",
        [u16(0x3C00)],
        f32(1),
        f32(0.0078125),
        arch="sm_90",
    ),
    op("to_tf32", "cvt.rna.tf32.f32 %o0, %i0;", [f32(1 + 2**-11, 1 + 2**-12)], f32(1 + 2**-10, 1)),
    op(
        "round_f32",
        "cvt.rmi.f32.f32 %o0, %i0; cvt.sat.f32.f32 %o1, %i0;",
        [f32(-0.5, 1.5)],
        f32(-1, 1),
        f32(0, 1),
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
        [f32(NAN, 1), f32(1, 2)],
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

ALL = INTEGER + FLOAT + HALF + CONVERSION + PREDICATE


@pytest.mark.parametrize("snippet", ALL, ids=lambda s: s.name)
def test_instruction_gives_the_value_computed_by_hand(snippet: Snippet) -> None:
    snippet.check()


def test_the_snippets_are_ptx_that_the_assembler_accepts(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    text = tmp_path / "all.ptx"
    text.write_text(module_of(ALL, "sm_90"))
    command = [nvcc, "-arch=sm_90", "-cubin", str(text), "-o", str(tmp_path / "all.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("add.rz.f16 %o0, %i0, %i0;", "modifier .rz is not modelled"),
        ("div.f16 %o0, %i0, %i0;", "no model of div.f16"),
        ("add.sat.s32 %r0, %r1, %r1;", "modifier .sat is not modelled"),
        ("cvt.rn.satfinite.f16.f32 %o0, %r0;", "modifier .satfinite is not modelled"),
        ("min.xorsign.abs.f32 %r0, %r1, %r2;", "modifier .xorsign is not modelled"),
        ("tex.1d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%d0, {%r4}];", "no model of this instruction"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0}, {%r1}, {%r2}, {%r0};",
            "shape or types",
        ),
    ],
)
def test_what_is_not_modelled_is_refused_by_its_ptx_line(text: str, words: str) -> None:
    snippet = Snippet("refused", text, [u16(0)], [u16(0)])
    line = 1 + snippet.module_text().splitlines().index(text)
    with pytest.raises(Unsupported, match=f"PTX line {line}: .*{words}"):
        Module(snippet.module_text()).kernel("refused")
