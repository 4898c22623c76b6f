"""Handlers of warp-wide instructions, matrix instructions and block barriers."""

from __future__ import annotations

import re

from .encoder import Encoder, Handlers
from .layouts import NO_OPERAND
from .modifiers import Modifiers
from .syntax import Instruction, Operand, Unsupported, Vector

_SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
_VOTES = {"all": 0, "any": 1, "uni": 2, "ballot": 3}
_REDUCTIONS = {"add": 0, "min": 1, "max": 2, "and": 5, "or": 6, "xor": 7}
_MATRICES = {"x1": 1, "x2": 2, "x4": 4}
MMA_TYPES = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4}
_MMA_SHAPES = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "e4m3": (16, 32), "e5m2": (16, 32)}


def shuffle(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle shfl.sync."""
    mode = _SHUFFLES[m.require(_SHUFFLES)]
    d = i.operands[0]
    value, in_range = d.items if isinstance(d, Vector) else (d, None)
    p = NO_OPERAND if in_range is None else e.predicate(in_range)
    e.emit(
        "shfl", [e.target(value, "b32"), p, *(e.source(o, "b32") for o in i.operands[1:])], [mode]
    )


def vote(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle vote.sync."""
    mode = m.require(_VOTES)
    d = e.target(i.operands[0], "b32") if mode == "ballot" else e.predicate(i.operands[0])
    e.emit("vote", [d, e.predicate(i.operands[1]), e.source(i.operands[2], "b32")], [_VOTES[mode]])


def reduce(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle redux.sync on 32-bit integers."""
    operation, type_ = m.require(_REDUCTIONS), m.types[-1]
    code = _REDUCTIONS[operation] + (2 if type_ == "s32" and operation in ("min", "max") else 0)
    if type_ == "f32":
        raise Unsupported("type .f32")
    e.emit(
        "redux",
        [e.target(i.operands[0], "b32"), *(e.source(o, "b32") for o in i.operands[1:])],
        [code],
    )


def match(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle match.any.sync."""
    m.require(("any",))
    type_ = m.types[-1]
    args = [
        e.target(i.operands[0], "b32"),
        e.source(i.operands[1], type_),
        e.source(i.operands[2], "b32"),
    ]
    e.emit(f"match.any.u{type_[1:]}", args)


def elect(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle elect.sync."""
    d = i.operands[0]
    assert isinstance(d, Vector)
    e.emit("elect", [e.target(d.items[0], "b32"), e.predicate(d.items[1])])


def active_mask(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle activemask."""
    e.emit("activemask", [e.target(i.operands[0], "b32")])


def barrier(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle bar.sync, bar.arrive, barrier.cta and bar.warp.sync."""
    if m.take("warp"):
        e.emit("bar.warp", [])
        return
    m.take("cta")
    waits = not m.take("arrive")
    number = e.source(i.operands[0], "u32")
    threads = e.source(i.operands[1], "u32") if len(i.operands) > 1 else NO_OPERAND
    if "red" in i.parts or "cluster" in i.parts:
        raise Unsupported("barrier with a reduction or of a cluster")
    e.emit("bar.sync", [number, threads], [waits])


def trap(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle trap."""
    e.emit("trap", [])


def _registers(e: Encoder, operand: Operand | None) -> list[int]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    return [e.source(o, "b32") for o in items]


def _matrix_count(m: Modifiers) -> tuple[int, int]:
    m.require(("m8n8",))
    m.take("shared", "shared::cta")
    return _MATRICES[m.require(_MATRICES)], int(m.take("trans"))


def load_matrix(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle ldmatrix of 8x8 16-bit matrices."""
    count, transposed = _matrix_count(m)
    base, address = e.address(i.operands[1])
    e.emit("ldmatrix", [base, *_registers(e, i.operands[0])], [count, transposed, *address])


def store_matrix(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle stmatrix."""
    count, transposed = _matrix_count(m)
    base, address = e.address(i.operands[0])
    e.emit("stmatrix", [base, *_registers(e, i.operands[1])], [count, transposed, *address])


def move_matrix(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle movmatrix."""
    m.require(("m8n8",))
    m.require(("trans",))
    e.emit("movmatrix", [e.target(i.operands[0], "b32"), e.source(i.operands[1], "b32")])


def multiply_accumulate(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle mma.sync m16n8 with float or half accumulators."""
    shape = next(p for p in i.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
    m.take(shape)
    M, N, K = map(int, re.findall(r"\d+", shape))
    if not m.take("row") or not m.take("col"):
        raise Unsupported("layout")
    d_type, a_type, b_type, c_type = i.parts[-4:]
    m.take(a_type)
    known = (
        a_type in MMA_TYPES and a_type == b_type and d_type == c_type and d_type in ("f32", "f16")
    )
    if not known or (M, N) != (16, 8) or K not in _MMA_SHAPES[a_type]:
        raise Unsupported("shape or types")
    args = [r for operand in i.operands[:4] for r in _registers(e, operand)]
    e.emit(f"mma.{a_type}", args, [K, d_type == "f16"])


HANDLERS: Handlers = {
    "shfl": shuffle,
    "vote": vote,
    "redux": reduce,
    "match": match,
    "elect": elect,
    "activemask": active_mask,
    "bar": barrier,
    "barrier": barrier,
    "trap": trap,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "movmatrix": move_matrix,
    "mma": multiply_accumulate,
}
