"""Results of floating-point instructions and conversions, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.lane_values import f32, f64, u16, u32, u64
from ptx.snippets import Snippet, op

NAN, INF = np.nan, np.inf
TINY = np.float32(2.0**-140)  # subnormal

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
        np.nextafter(f32(1 / 3), np.float32(0)),
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
        [np.array([TINY, -TINY], np.float32), f32(0, -0.0)],
        f32(0, -0.0),
        np.array([TINY, -TINY], np.float32),
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
        [np.array([TINY], np.float32), f32(0)],
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


@pytest.mark.parametrize("snippet", FLOAT + HALF + CONVERSION, ids=lambda s: s.name)
def test_instruction_gives_the_value_computed_by_hand(snippet: Snippet) -> None:
    snippet.check()
