"""Handlers of cvt and cvta."""

from __future__ import annotations

from .encode_arithmetic import FLOATS, FloatOperands
from .encoder import SPECIAL_REGISTERS, WINDOWS, Encoder, Handlers
from .modifiers import Modifiers
from .syntax import WIDTH, Instruction, Operand, Register, Unsupported

_TO_INTEGER = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
_DIRECTIONS = ("rz", "rm", "rp")


def convert(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle cvt."""
    if "tf32" in i.parts:
        _to_tf32(e, i, m)
    elif m.types[0] in ("f16x2", "bf16x2"):
        _to_packed(e, i, m)
    else:
        d_type, s_type = m.types
        pair = (d_type in FLOATS, s_type in FLOATS)
        if pair == (True, True):
            _float_to_float(e, i, m, d_type, s_type)
        elif pair == (True, False):
            _integer_to_float(e, i, m, d_type, s_type)
        elif pair == (False, True):
            _float_to_integer(e, i, m, d_type, s_type)
        else:
            _integer_to_integer(e, i, d_type, s_type)


def _to_tf32(e: Encoder, i: Instruction, m: Modifiers) -> None:
    rounding = m.require(("rna", "rn"))
    args = [e.target(i.operands[0], "b32"), e.source(i.operands[1], "b32")]
    e.emit("cvt.tf32.f32", args, [rounding == "rna"])


def _to_packed(e: Encoder, i: Instruction, m: Modifiers) -> None:
    m.take("rn")
    relu = m.take("relu")
    high, low = (e.source(o, "f32") for o in i.operands[1:3])
    e.emit(f"cvt.{m.types[0]}.f32", [e.target(i.operands[0], "b32"), high, low], [relu])


def _float_to_float(e: Encoder, i: Instruction, m: Modifiers, d_type: str, s_type: str) -> None:
    flush, saturate = m.take("ftz"), m.take("sat")
    if (flush or saturate) and (d_type, s_type) != ("f32", "f32"):
        raise Unsupported("modifiers .ftz and .sat are modelled from f32 to f32 only")
    d = e.target(i.operands[0], d_type)
    a = FloatOperands(e, s_type, flush).source(i.operands[1])
    to_integer = m.choose(_TO_INTEGER)
    if d_type == s_type:
        if to_integer:
            e.emit(f"cvt.round.{d_type}", [d, a], [_TO_INTEGER[to_integer]])
        else:
            e.emit(f"mov.u{8 * WIDTH[d_type]}", [d, a])
    else:
        m.take("rn")
        relu = "relu." if m.take("relu") else ""
        e.emit(f"cvt.{relu}{d_type}.{s_type}", [d, a])
    if saturate:
        e.emit("saturate", [d, d])


def _integer_source(e: Encoder, operand: Operand | None, type_: str) -> tuple[int, str]:
    """(operand, width of its register): a register may be wider than the type."""
    width = WIDTH[type_]
    if isinstance(operand, Register) and operand.name in SPECIAL_REGISTERS:
        width = 4
    elif isinstance(operand, Register):
        width = e.width(operand) or width
    return e.source(operand, type_, any_width=True), f"b{8 * max(width, 2)}"


def _bits(type_: str) -> list[int]:
    return [8 * WIDTH[type_], int(type_[0] == "s")]


def _integer_to_float(e: Encoder, i: Instruction, m: Modifiers, d_type: str, s_type: str) -> None:
    direction = m.choose(_DIRECTIONS)
    d = e.target(i.operands[0], d_type)
    if direction:
        e.emit(f"cvt.{direction}.{d_type}.{s_type}", [d, e.source(i.operands[1], s_type)])
        return
    m.take("rn")
    a, register = _integer_source(e, i.operands[1], s_type)
    e.emit(f"cvt.{d_type}.{register}", [d, a], _bits(s_type))


def _float_to_integer(e: Encoder, i: Instruction, m: Modifiers, d_type: str, s_type: str) -> None:
    flush = m.take("ftz")
    rounding = _TO_INTEGER[m.require(_TO_INTEGER)]
    a = FloatOperands(e, s_type, flush).source(i.operands[1])
    width = e.width(i.operands[0]) or WIDTH[d_type]
    e.emit(
        f"cvt.int.b{8 * width}.{s_type}",
        [e.target(i.operands[0], d_type, True), a],
        [rounding, *_bits(d_type)],
    )


def _integer_to_integer(e: Encoder, i: Instruction, d_type: str, s_type: str) -> None:
    a, register = _integer_source(e, i.operands[1], s_type)
    width = e.width(i.operands[0]) or WIDTH[d_type]
    args = [e.target(i.operands[0], d_type, any_width=True), a]
    e.emit(f"cvt.int.b{8 * width}.{register}", args, [*_bits(s_type), *_bits(d_type)])


def convert_address(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle cvta: generic addresses of shared, local and parameter space carry a window."""
    to_space = m.take("to")
    space = m.require(("global", "const", "shared", "shared::cta", "local", "param")).split("::")[0]
    args = [e.target(i.operands[0], "u64"), e.source(i.operands[1], "u64")]
    e.emit("cvta", args, [WINDOWS.get(space, 0), to_space])


HANDLERS: Handlers = {"cvt": convert, "cvta": convert_address}
