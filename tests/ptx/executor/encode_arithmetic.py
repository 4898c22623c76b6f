"""Handlers of lane-by-lane instructions: arithmetic, bits, comparison, selection, moves."""

from __future__ import annotations

from collections.abc import Sequence

from .encoder import Encoder, Handlers
from .modifiers import Modifiers
from .syntax import WIDTH, Immediate, Instruction, Operand, Register, Unsupported, Vector

FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
DIRECTIONS = ("rz", "rm", "rp")
_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}

# Results do not depend on the sign of the type.
_SIGNLESS = {
    "add",
    "sub",
    "mul",
    "mad",
    "and",
    "or",
    "xor",
    "not",
    "shl",
    "selp",
    "mov",
    "neg",
    "brev",
    "popc",
    "clz",
    "bfi",
    "slct",
}
_FLOAT_ONLY = ("fma", "ex2", "lg2", "sin", "cos", "tanh", "rcp", "sqrt", "rsqrt")


def runtime_type(opcode: str, type_: str) -> str:
    """The type under which the runtime registers an op: unsigned where the sign is idle."""
    if type_[0] == "b" and type_ not in FLOATS:
        return "u" + type_[1:]
    if type_[0] == "s" and opcode in _SIGNLESS:
        return "u" + type_[1:]
    return type_


_UNARY = ("abs", "neg", "not", "brev", *_FLOAT_ONLY[1:])


def _require_arity(i: Instruction) -> None:
    """Refuse forms with more operands than are modelled, such as a min of three."""
    expected = 1 if i.opcode in _UNARY else 3 if i.opcode in ("fma", "mad") else 2
    if len(i.operands) - 1 != expected:
        raise Unsupported(f"{i.opcode} takes {expected} sources, got {len(i.operands) - 1}")


class FloatOperands:
    """Operands of a floating-point instruction; .ftz flushes inputs into scratch registers."""

    def __init__(self, e: Encoder, type_: str, flush: bool) -> None:
        """`flush` is whether the instruction has .ftz."""
        self.e, self.type, self.flush, self.num_scratch = e, type_, flush, 0

    def source(self, operand: Operand | None) -> int:
        """Operand to read, flushed first if asked."""
        value = self.e.source(operand, self.type)
        if not self.flush or not isinstance(operand, Register):
            return value
        scratch = self.e.target(self.e.scratch(self.num_scratch, WIDTH[self.type]), self.type)
        self.num_scratch += 1
        self.e.emit(f"flush_subnormals.{self.type}", [scratch, value])
        return scratch


def emit_elementwise(e: Encoder, i: Instruction, name: str, type_: str, m: Modifiers) -> None:
    """Emit d = f(a, b, ...) with .ftz, .sat and a rounding direction where the type is a float."""
    _require_arity(i)
    is_float = type_ in FLOATS
    flush = is_float and m.take("ftz")
    saturate = type_ == "f32" and m.take("sat")
    direction = m.choose(DIRECTIONS) if type_ in ("f32", "f64") else None
    if is_float:
        m.take("rn")
    operands = FloatOperands(e, type_, flush)
    d = e.target(i.operands[0], type_)
    sources = [operands.source(o) for o in i.operands[1:]]
    prefix = f"{name}.{direction}" if direction else name
    e.emit(f"{prefix}.{runtime_type(i.opcode, type_)}", [d, *sources])
    if flush:
        e.emit(f"flush_subnormals.{type_}", [d, d])
    if saturate:
        e.emit("saturate", [d, d])


def elementwise(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle add, sub, div, rem, abs, neg, not, min, max, fma and the transcendental functions."""
    if m.is_predicate:
        e.emit(
            f"{i.opcode}.pred",
            [e.predicate(i.operands[0]), *(e.predicate(o) for o in i.operands[1:])],
        )
        return
    name, type_ = i.opcode, m.types[-1]
    if name in ("min", "max") and m.take("NaN"):
        name += ".NaN"
    if name == "fma" and m.take("relu"):
        name += ".relu"
    if name in _FLOAT_ONLY or (name == "div" and type_ in FLOATS):
        m.take("approx", "full")
    emit_elementwise(e, i, name, type_, m)


def multiply(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle mul and mad, with the low, high or whole product of integers."""
    type_ = m.types[-1]
    if type_ in FLOATS:
        emit_elementwise(e, i, "fma" if i.opcode == "mad" else "mul", type_, m)
        return
    part = m.require(("lo", "hi", "wide"))
    operands = i.operands
    if part == "lo":
        emit_elementwise(e, i, i.opcode, type_, m)
        return
    wide = _WIDE[type_] if part == "wide" else type_
    args = [e.target(operands[0], wide), e.source(operands[1], type_), e.source(operands[2], type_)]
    if i.opcode == "mad":
        args.append(e.source(operands[3], wide))
    e.emit(f"{i.opcode}.{part}.{type_}", args)


def with_u32_operands(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle shl, shr, bfe (typed d, a) and bfi (typed d, a, b), whose other operands are .u32."""
    type_, typed = m.types[-1], 2 if i.opcode == "bfi" else 1
    sources = [e.source(o, type_ if k < typed else "u32") for k, o in enumerate(i.operands[1:])]
    e.emit(
        f"{i.opcode}.{runtime_type(i.opcode, type_)}", [e.target(i.operands[0], type_), *sources]
    )


def funnel_shift(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle shf."""
    left = m.require(("l", "r")) == "l"
    clamp = m.require(("clamp", "wrap")) == "clamp"
    e.emit("shf", _all_u32(e, i.operands), [left, clamp])


def logic3(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle lop3 without its predicate form."""
    table = i.operands[4]
    assert isinstance(table, Immediate)
    e.emit("lop3", _all_u32(e, i.operands[:4]), [table.bits])


def permute(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle prmt in its default mode."""
    e.emit("prmt", _all_u32(e, i.operands))


def _all_u32(e: Encoder, operands: Sequence[Operand | None]) -> list[int]:
    return [e.target(operands[0], "b32"), *(e.source(o, "b32") for o in operands[1:])]


def count_bits(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle popc, clz, bfind: the result is .u32."""
    type_ = m.types[-1]
    args = [e.target(i.operands[0], "u32"), e.source(i.operands[1], type_)]
    e.emit(f"{i.opcode}.{runtime_type(i.opcode, type_)}", args)


_INTEGER_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMPARISONS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
    "lo",
    "ls",
    "hi",
    "hs",
)
_COMBINE = {"and": 1, "or": 2, "xor": 3}


def set_predicate(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle setp: p|q and an optional predicate to combine with."""
    type_, comparison = m.types[-1], m.require(_COMPARISONS)
    comparison = _INTEGER_COMPARISONS.get(comparison, comparison)
    combine = m.choose(_COMBINE)
    operands = FloatOperands(e, type_, type_ in FLOATS and m.take("ftz"))
    d = i.operands[0]
    targets = d.items if isinstance(d, Vector) else (d, None)
    args = [0xFFFFFFFF if t is None else e.predicate(t) for t in targets]
    args += [operands.source(i.operands[1]), operands.source(i.operands[2])]
    args.append(e.predicate(i.operands[3]) if combine else 0xFFFFFFFF)
    e.emit(
        f"setp.{comparison}.{runtime_type('setp', type_)}",
        args,
        [_COMBINE[combine] if combine else 0],
    )


_TRUE = {"f32": 0x3F800000, "f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80}


def set_value(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle set: true is 1.0 or all ones, by the destination; per half for packed operands."""
    d_type, type_ = m.types
    comparison = m.require(_COMPARISONS)
    comparison = _INTEGER_COMPARISONS.get(comparison, comparison)
    packed = type_ in ("f16x2", "bf16x2")
    operands = FloatOperands(e, type_, type_ in FLOATS and m.take("ftz"))
    width = 2 if packed or WIDTH[d_type] == 2 else 4
    truth = _TRUE.get(d_type, (1 << 8 * width) - 1)
    args = [
        e.target(i.operands[0], d_type),
        operands.source(i.operands[1]),
        operands.source(i.operands[2]),
    ]
    e.emit(f"set.{comparison}.b{8 * width}.{runtime_type('set', type_)}", args, [truth])


def select(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle selp on registers of any type of 2, 4 or 8 bytes."""
    bits = f"u{8 * WIDTH[m.types[-1]]}"
    a, b = (e.source(o, m.types[-1]) for o in i.operands[1:3])
    e.emit(f"selp.{bits}", [e.target(i.operands[0], bits), a, b, e.predicate(i.operands[3])])


def select_by_sign(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle slct."""
    type_, sign_type = m.types
    bits = f"u{8 * WIDTH[type_]}"
    a, b = (e.source(o, type_) for o in i.operands[1:3])
    e.emit(
        f"slct.{bits}.{sign_type}",
        [e.target(i.operands[0], bits), a, b, e.source(i.operands[3], sign_type)],
    )


def move(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle mov: registers, predicates, addresses of variables, packing and unpacking."""
    d, s = i.operands
    if m.is_predicate:
        e.emit("mov.pred", [e.predicate(d), e.predicate(s)])
        return
    type_ = m.types[-1]
    bits = f"u{8 * WIDTH[type_]}"
    if isinstance(d, Vector):
        part = WIDTH[type_] // len(d.items)
        for k, item in enumerate(d.items):
            if item is not None:
                target = e.target(item, f"b{8 * part}")
                e.emit(f"unpack.{bits}.u{8 * part}", [target, e.source(s, type_)], [8 * part * k])
        return
    if isinstance(s, Vector):
        part = WIDTH[type_] // len(s.items)
        sources = [e.source(o, f"b{8 * part}") for o in s.items]
        e.emit(f"pack.{bits}.u{8 * part}", [e.target(d, type_), *sources])
        return
    e.emit(f"mov.{bits}", [e.target(d, type_), e.source(s, type_)])


HANDLERS: Handlers = {
    **dict.fromkeys(
        ("add", "sub", "div", "rem", "abs", "neg", "min", "max", *_FLOAT_ONLY), elementwise
    ),
    **dict.fromkeys(("and", "or", "xor", "not", "brev"), elementwise),
    **dict.fromkeys(("mul", "mad"), multiply),
    **dict.fromkeys(("shl", "shr", "bfe", "bfi"), with_u32_operands),
    **dict.fromkeys(("popc", "clz", "bfind"), count_bits),
    "shf": funnel_shift,
    "lop3": logic3,
    "prmt": permute,
    "setp": set_predicate,
    "set": set_value,
    "selp": select,
    "slct": select_by_sign,
    "mov": move,
}
