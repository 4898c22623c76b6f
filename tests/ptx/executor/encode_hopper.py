"""Handlers of the Hopper set: mbarrier, bulk copies and TMA, wgmma."""

from __future__ import annotations

import re

from .encode_warp import MMA_TYPES
from .encoder import Encoder, Handlers
from .layouts import NO_OPERAND
from .modifiers import Modifiers
from .syntax import Address, Immediate, Instruction, Operand, Unsupported, Vector


def mbarrier(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle init, inval, expect_tx, arrive, try_wait, test_wait on the own block's barriers."""
    m.take("b64", "shared", "shared::cta", "cta", "acquire", "release")
    operands, action = (
        i.operands,
        m.require(("init", "inval", "expect_tx", "arrive", "try_wait", "test_wait")),
    )
    if action in ("try_wait", "test_wait"):
        _wait(e, i, m)
        return
    first = 1 if action == "arrive" else 0
    base, address = e.address(operands[first])
    if action == "init":
        e.emit("mbarrier.init", [base, e.source(operands[1], "u32")], address)
    elif action == "inval":
        e.emit("mbarrier.inval", [base], address)
    elif action == "expect_tx":
        e.emit(
            "mbarrier.arrive",
            [base, NO_OPERAND, NO_OPERAND, e.source(operands[1], "u32")],
            [*address, 0],
        )
    else:
        state = e.target(operands[0], "b64")
        value = e.source(operands[2], "u32") if len(operands) > 2 else NO_OPERAND
        counts = [NO_OPERAND, value] if m.take("expect_tx") else [value, NO_OPERAND]
        e.emit("mbarrier.arrive", [base, state, *counts], [*address, 1])


def _wait(e: Encoder, i: Instruction, m: Modifiers) -> None:
    parity = m.take("parity")
    base, address = e.address(i.operands[1])
    phase = e.source(i.operands[2], "u32" if parity else "b64")
    e.emit("mbarrier.wait", [base, e.predicate(i.operands[0]), phase], [*address, parity])


def bulk_copy(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle cp.async.bulk, with and without a tensor map."""
    if m.take("commit_group"):
        e.emit("bulk.commit_group", [])
    elif m.take("wait_group"):
        m.take("read")
        assert isinstance(i.operands[0], Immediate)
        e.emit("bulk.wait_group", [], [i.operands[0].bits])
    elif m.take("prefetch"):
        m.take(*i.parts)
    elif m.take("tensor"):
        _tensor_copy(e, i, m)
    else:
        m.take("shared::cluster", "shared::cta", "global", "mbarrier::complete_tx::bytes")
        if not i.parts[3].startswith("shared"):
            raise Unsupported("bulk store without a tensor map")
        shared, source = _plain_base(e, i.operands[0]), i.operands[1]
        assert isinstance(source, Address)
        size, barrier = e.source(i.operands[2], "u32"), _plain_base(e, i.operands[3])
        e.emit("bulk_load", [shared, e.source(source.base, "u64"), size, barrier])


def _plain_base(e: Encoder, operand: Operand | None) -> int:
    """Operand of a 32-bit shared address without an offset."""
    if not isinstance(operand, Address) or operand.offset:
        raise Unsupported("address with an offset")
    return e.source(operand.base, "u32")


def _tensor_copy(e: Encoder, i: Instruction, m: Modifiers) -> None:
    rank = int(m.require(("1d", "2d", "3d", "4d", "5d"))[0])
    is_load = i.parts[5].startswith("shared")
    m.take(
        "shared::cluster",
        "shared::cta",
        "global",
        "tile",
        "mbarrier::complete_tx::bytes",
        "bulk_group",
    )
    shared, tensor = (i.operands[0], i.operands[1]) if is_load else (i.operands[1], i.operands[0])
    assert isinstance(shared, Address) and isinstance(tensor, Address)
    coordinates = tensor.extra[0]
    assert isinstance(coordinates, Vector)
    barrier, barrier_offset = NO_OPERAND, 0
    if is_load:
        operand = i.operands[2]
        assert isinstance(operand, Address)
        barrier, barrier_offset = e.source(operand.base, "u32"), operand.offset
    args = [e.source(shared.base, "u32"), e.source(tensor.base, "u64"), barrier]
    args += [e.source(c, "s32") for c in coordinates.items]
    e.emit("tensor_copy", args, [rank, tensor.offset, barrier_offset, shared.offset])


def wgmma(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle wgmma.fence, commit_group, wait_group and mma_async."""
    if m.take("fence"):
        return
    if m.take("commit_group"):
        e.emit("wgmma.commit_group", [])
    elif m.take("wait_group"):
        assert isinstance(i.operands[0], Immediate)
        e.emit("wgmma.wait_group", [], [i.operands[0].bits])
    else:
        _multiply(e, i, m)


def _multiply(e: Encoder, i: Instruction, m: Modifiers) -> None:
    shape = next(p for p in i.parts if re.fullmatch(r"m64n\d+k\d+", p))
    m.take("mma_async", shape)
    N, K = map(int, re.findall(r"\d+", shape)[1:])
    d_type, a_type, b_type = i.parts[-3:]
    m.take(a_type)
    if d_type not in ("f32", "f16") or a_type not in MMA_TYPES or a_type != b_type:
        raise Unsupported("types")
    d, a = i.operands[:2]
    assert isinstance(d, Vector)
    targets = [e.source(o, "b32") for o in d.items]
    fragments = [e.source(o, "b32") for o in a.items] if isinstance(a, Vector) else []
    descriptor_a = NO_OPERAND if isinstance(a, Vector) else e.source(a, "b64")
    flags = [o.bits for o in i.operands[4:] if isinstance(o, Immediate)]
    scale, transposes = flags[0] * flags[1], flags[2:]
    transpose_b = transposes[-1] if transposes else 0
    transpose_a = transposes[0] if len(transposes) > 1 else 0
    args = [
        e.source(i.operands[2], "b64"),
        e.predicate(i.operands[3]),
        descriptor_a,
        *targets,
        *fragments,
    ]
    half = d_type == "f16"
    e.emit(
        "wgmma",
        args,
        [
            N,
            K,
            MMA_TYPES[a_type],
            half,
            scale,
            transpose_a,
            transpose_b,
            len(targets),
            len(fragments),
        ],
    )


HANDLERS: Handlers = {"mbarrier": mbarrier, "wgmma": wgmma}
