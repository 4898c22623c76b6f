"""Loads, stores, atomics, copies, arguments, calls: results and findings of wrong accesses."""

from __future__ import annotations

import ctypes as C

import numpy as np
import pytest
import torch

from ptx.conftest import ModuleLoader
from ptx.executor import Buffer, ExecutorError, Kind, Module, Options, Output, Unsupported
from ptx.formats import from_bf16
from ptx.lane_values import u32
from ptx.snippets import LANES, Snippet

LANE = np.arange(LANES, dtype=np.uint32)


ADDRESS = "mov.u32 %r0, shared_bytes; shl.b32 %r1, %i0, 4; add.u32 %r0, %r0, %r1; "
CASES = [
    Snippet(
        "sign_extension",
        ADDRESS + "st.shared.b32 [%r0], 0x80FF7F01; ld.shared.s8 %o0, [%r0+3]; "
        "ld.shared.u8 %o1, [%r0+2]; ld.shared.s16 %o2, [%r0+2];",
        [LANE],
        [u32(-128), u32(255), u32(-32513)],
    ),
    Snippet(
        "vectors",
        ADDRESS + "st.shared.v4.b32 [%r0], {%i0, 1, 2, 3}; "
        "ld.shared.v2.u32 {%o0, %o1}, [%r0+8]; "
        "ld.shared.v4.u32 {%o2, _, _, _}, [%r0];",
        [LANE],
        [u32(2), u32(3), LANE],
    ),
    Snippet(
        "generic_address",
        ADDRESS + "cvt.u64.u32 %d0, %r0; cvta.shared.u64 %d0, %d0; st.b32 [%d0], %i0; "
        "ld.b32 %o0, [%d0]; cvta.to.shared.u64 %d1, %d0; "
        "ld.shared.b32 %o1, [%d1];",
        [LANE],
        [LANE, LANE],
    ),
    Snippet(
        "local_memory",
        ".local .align 8 .b8 frame[64]; and.b32 %r0, %i0, 7; "
        "shl.b32 %r0, %r0, 2; mov.u32 %r1, frame; add.u32 %r1, %r1, %r0; "
        "st.local.u32 [%r1], %i0; ld.local.u32 %o0, [%r1];",
        [LANE],
        [LANE],
    ),
    Snippet(
        "shared_atomics",
        "mov.u32 %r0, shared_bytes; setp.eq.u32 %p0, %i0, 0; "
        "@%p0 st.shared.v2.b32 [%r0], {0, 100}; bar.warp.sync 0xffffffff; "
        "atom.shared.add.u32 %r2, [%r0], 1; red.shared.min.s32 [%r0+4], %i0; "
        "bar.warp.sync 0xffffffff; ld.shared.v2.u32 {%o0, %o1}, [%r0];",
        [LANE],
        [u32(32), u32(0)],
    ),
    Snippet(
        "compare_and_swap",
        "mov.u32 %r0, shared_bytes; setp.eq.u32 %p0, %i0, 0; "
        "@%p0 st.shared.b32 [%r0], 0; bar.warp.sync 0xffffffff; "
        "add.u32 %r1, %i0, 1; atom.shared.cas.b32 %r2, [%r0], %i0, %r1; "
        "bar.warp.sync 0xffffffff; ld.shared.u32 %o0, [%r0];",
        [LANE],
        [u32(32)],
    ),
]


@pytest.mark.parametrize("snippet", CASES, ids=lambda s: s.name)
def test_memory_instruction(snippet: Snippet) -> None:
    snippet.check()


def test_zero_fill_of_cp_async(ptx_module: ModuleLoader) -> None:
    x = np.arange(512, dtype=np.uint8)
    sizes = np.resize(np.array([16, 0, 8, 12], np.int32), LANES)
    y = Buffer(np.zeros(512, np.uint8))
    result = ptx_module("access_patterns.cu").launch(
        "copy_zero_fill", 1, LANES, [Buffer(x), y, Buffer(sizes)], outputs=[y]
    )
    assert result.ok, result.report()
    expected = x.reshape(LANES, 16) * (np.arange(16) < sizes[:, None])
    assert (y.read().reshape(LANES, 16) == expected).all()
    assert result.counters.loads.bytes == sizes.sum() + 4 * LANES


class Problem(C.Structure):
    """Problem of arguments.cu."""

    _fields_ = [
        ("x", C.c_uint64),
        ("y", C.c_uint64),
        ("n", C.c_int32),
        ("step", C.c_int32),
        ("factor", C.c_float * 4),
    ]


class Arguments(C.Structure):
    """Arguments of arguments.cu: 32,760 bytes, the largest multiple of 8 that a launch can take."""

    _fields_ = [("problems", Problem * 818), ("num_problems", C.c_int32), ("unused", C.c_int32 * 9)]


def test_a_struct_of_32_kilobytes_by_value_is_indexed_dynamically(ptx_module: ModuleLoader) -> None:
    arguments, buffers = Arguments(), []
    sizes = [5, 64, 100]
    for block, n in enumerate(sizes):
        x, y = Buffer(np.arange(n, dtype=np.float32)), Buffer(np.zeros(2 * n, np.float32))
        arguments.problems[block] = Problem(x.address, y.address, n, 2, (1, 2, 3, block))
        buffers.append((x, y, n))
    result = ptx_module("arguments.cu").launch("scale_problems", len(sizes), 32, bytes(arguments))
    assert result.ok, result.report()
    for block, (_, y, n) in enumerate(buffers):
        i = np.arange(n)
        assert (y.read()[::2] == i * np.array([1, 2, 3, block])[i & 3]).all()
    traffic = result.counters
    assert (
        traffic.loads.bytes == traffic.stores.bytes == 4 * sum(sizes)
    )  # parameters are not traffic


def test_arguments_of_the_wrong_size_are_refused(ptx_module: ModuleLoader) -> None:
    kernel = ptx_module("arguments.cu").kernel("scale_problems")
    with pytest.raises(ExecutorError, match="argument block must have 32760 bytes, got 8"):
        kernel.launch(1, 32, b"12345678")
    with pytest.raises(ExecutorError, match="2 arguments for 1 parameters"):
        kernel.launch(1, 32, [1, 2])


def test_an_argument_block_may_have_32764_bytes_and_no_more() -> None:
    text = """.version 8.1
.target sm_80
.address_size 64
.visible .entry last_word(.param .align 4 .b8 block[{size}], .param .u64 y) {{
.reg .b32 %r<2>; .reg .b64 %d<2>;
ld.param.u32 %r0, [block+{last}]; ld.param.u64 %d0, [y]; st.global.u32 [%d0], %r0; ret; }}
"""
    words, y = np.arange(8189, dtype=np.uint32), Buffer(np.zeros(1, np.uint32))
    room = words[: (32_764 - 12) // 4]  # the pointer needs 8 bytes at a multiple of 8
    module = Module(text.format(size=room.nbytes, last=room.nbytes - 4))
    assert module.launch("last_word", 1, 1, [room, y]).ok
    assert y.read()[0] == room[-1]
    with pytest.raises(ExecutorError, match="32776 bytes of parameters; the limit is 32764"):
        Module(text.format(size=32_764, last=0)).launch("last_word", 1, 1, [words[:8191], y])


def test_reading_past_the_arguments_is_out_of_bounds(ptx_module: ModuleLoader) -> None:
    arguments, y = Arguments(), Buffer(np.zeros(1, np.float32))
    arguments.problems[0].y, arguments.num_problems = y.address, 100_000
    module = ptx_module("arguments.cu")
    result = module.launch("read_past_arguments", 1, 1, bytes(arguments))
    assert (
        result.kinds == {Kind.OUT_OF_BOUNDS} and "bytes of arguments" in result.findings[0].message
    )


def test_calls_that_are_not_inlined_run(ptx_module: ModuleLoader) -> None:
    module = ptx_module("arguments.cu")
    assert any(not f.is_entry and f.is_defined for f in module.tree.functions.values())
    x, c = np.linspace(-2, 2, 32, dtype=np.float32), np.array([1, 2, 3], np.float32)
    y = Buffer(np.zeros(32, np.float32))
    result = module.launch("call_functions", 1, 32, [Buffer(x), Buffer(c), y], outputs=[y])
    assert result.ok, result.report()
    np.testing.assert_allclose(y.read(), np.where(x > 0, 2 + 6 * x**2, 1 + 2 * x), rtol=1e-6)


def test_an_extern_call_is_refused_only_where_it_is_used() -> None:
    text = """.version 8.0
.target sm_80
.address_size 64
.extern .func (.param .b32 status) vprintf(.param .b64 format, .param .b64 values);
.visible .entry good() { ret; }
.visible .entry bad() { .reg .b32 %r<2>;
{ .param .b64 a; .param .b64 b; .param .b32 r;
call (r), vprintf, (a, b);
} ret; }
"""
    module = Module(text)
    assert module.launch("good", 1, 32, []).ok
    with pytest.raises(Unsupported, match=r"PTX line 8: call.extern.vprintf"):
        module.kernel("bad")


def test_constant_local_and_module_memory(ptx_module: ModuleLoader) -> None:
    module = ptx_module("arguments.cu")
    x = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
    y, count = Buffer(np.zeros(32, np.float32)), Buffer(np.zeros(1, np.int32))
    result = module.launch("look_up", 1, 32, [Buffer(x), y, count])
    assert result.ok, result.report()
    shift = x >> 5 & 7
    rotated = np.where(shift == 0, x, x << shift | x >> (32 - shift) % 32)
    entry = ((x & 7) + 1).astype(np.float32)
    assert (y.read() == entry + rotated.astype(np.float32)).all()
    assert (
        count.read()[0] == 3 and int.from_bytes(module.variable("launches").read(), "little") == 4
    )


def test_a_trap_is_a_finding(ptx_module: ModuleLoader) -> None:
    x = np.zeros(32, np.int32)
    x[7] = -1
    result = ptx_module("arguments.cu").launch("check_assertion", 1, 32, [Buffer(x)])
    assert result.kinds == {Kind.MISUSE} and result.findings[0].thread == 7


ATOMIC_RESULT = {"f": 8128.0, "b": (128, 64), "h": (32, 128), "u": 8128}


@pytest.mark.parametrize("adversarial", [False, True])
def test_global_atomics_of_every_type(ptx_module: ModuleLoader, adversarial: bool) -> None:
    f, b, h = (
        Buffer(np.zeros(1, np.float32)),
        Buffer(np.zeros(2, np.uint16)),
        Buffer(np.zeros(2, np.float16)),
    )
    s, u = Buffer(np.zeros(6, np.int32)), Buffer(np.zeros(1, np.uint64))
    options = Options(adversarial=adversarial)
    result = ptx_module("reductions.cu", "sm_90").launch(
        "atomics", 2, 64, [f, b, h, s, u], options=options
    )
    assert result.ok, result.report()
    assert f.read()[0] == 8128 and u.read()[0] == 8128
    assert from_bf16(b.read()).tolist() == [128, 64] and h.read().tolist() == [32, 128]
    top, bottom, swapped, exchanged, wrapped, bits = s.read().tolist()
    assert (top, bottom, exchanged, bits) == (127, -127, 7, 255)
    assert 1 <= swapped <= 128 and wrapped == 128 % 10


@pytest.mark.parametrize("adversarial", [False, True])
def test_softmax(ptx_module: ModuleLoader, adversarial: bool) -> None:
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    y = Buffer(torch.full(x.shape, torch.nan, dtype=torch.bfloat16))
    args = [Buffer(torch.from_numpy(x)), y, 300]
    result = ptx_module("reductions.cu").launch(
        "row_softmax", 5, 128, args, outputs=[y], options=Options(adversarial=adversarial)
    )
    assert result.ok, result.report()
    exact = torch.softmax(torch.from_numpy(x).double(), 1)
    assert y.read().dtype is torch.bfloat16
    torch.testing.assert_close(y.read().double(), exact, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("adversarial", [False, True])
def test_histogram_with_a_divergent_loop(ptx_module: ModuleLoader, adversarial: bool) -> None:
    n = 1000
    x = np.random.default_rng(1).integers(0, 500, n).astype(np.int32)
    bins, steps, ballots = (
        Buffer(np.zeros(s, t)) for s, t in ((16, np.int32), (1, np.int32), (32, np.uint32))
    )
    args = [Buffer(x), n, bins, steps, ballots]
    result = ptx_module("reductions.cu").launch(
        "histogram", 8, 128, args, options=Options(adversarial=adversarial)
    )
    assert result.ok, result.report()
    assert (bins.read() == np.bincount(x & 15, minlength=16)).all()

    def collatz(t: int) -> int:
        return 0 if t <= 1 else 1 + collatz(3 * t + 1 if t & 1 else t >> 1)

    assert steps.read()[0] == sum(collatz(int(t)) for t in x)
    odd = np.concatenate([x & 1, np.ones(24, np.int32)]).astype(np.uint8)  # lanes past n hold -1
    assert (ballots.read() == np.packbits(odd, bitorder="little").view(np.uint32)).all()


def wrong_access(text: str, arch: str = "sm_80") -> tuple[Kind, str]:
    """Run a snippet that must end with one finding."""
    result, _ = Snippet("wrong", text, [LANE], [u32(0)], arch).run()
    assert len(result.findings) == 1, result.report()
    return result.findings[0].kind, result.findings[0].message


def test_out_of_bounds_and_misaligned_accesses_are_named() -> None:
    global_ = "ld.param.u64 %d0, [i0]; "
    assert wrong_access(global_ + "ld.global.u32 %r0, [%d0+128];")[0] is Kind.OUT_OF_BOUNDS
    kind, message = wrong_access(global_ + "ld.global.u32 %r0, [%d0+-4];")
    assert kind is Kind.OUT_OF_BOUNDS and "at byte -4 of a buffer of 128 bytes" in message
    assert wrong_access("mov.u64 %d0, 64; ld.global.u32 %r0, [%d0];")[0] is Kind.OUT_OF_BOUNDS
    assert wrong_access(global_ + "ld.global.v2.u32 {%r0, %r1}, [%d0+4];")[0] is Kind.MISALIGNED
    assert (
        wrong_access("mov.u32 %r0, shared_bytes; st.shared.u32 [%r0+4096], 1;")[0]
        is Kind.OUT_OF_BOUNDS
    )
    assert (
        wrong_access("mov.u32 %r0, shared_bytes; st.shared.u32 [%r0+2], 1;")[0] is Kind.MISALIGNED
    )
    unaligned_row = (
        "mov.u32 %r0, shared_bytes; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0+8];"
    )
    assert wrong_access(unaligned_row)[0] is Kind.MISALIGNED


def test_output_bytes_stored_twice_or_never(ptx_module: ModuleLoader) -> None:
    module = ptx_module("synchronisation.cu")
    y = Buffer(np.zeros(100, np.int16))
    never = module.launch("store_range", 1, 32, [y, 0, 90], outputs=[y])
    assert never.kinds == {Kind.STORED_NEVER}
    assert "20 of 200 bytes, the first at byte 180" in never.findings[0].message
    expected = np.arange(100) < 90
    assert module.launch("store_range", 1, 32, [y, 0, 90], outputs=[Output(y, expected)]).ok
    twice = module.launch("store_range", 2, 32, [y, 0, 100], outputs=[y])
    assert Kind.STORED_TWICE in twice.kinds


def test_buffers_keep_the_form_of_what_they_copy() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    assert Buffer(array).read().dtype == np.float16 and (Buffer(array).read() == array).all()
    tensor = torch.arange(6).to(torch.bfloat16)
    assert Buffer(tensor).read().dtype is torch.bfloat16 and torch.equal(
        Buffer(tensor).read(), tensor
    )
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(Buffer(transposed).read(), transposed)
    assert Buffer(b"abc").read() == b"abc"
    assert Buffer(np.zeros((0, 3))).read().shape == (0, 3)
