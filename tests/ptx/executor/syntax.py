"""The parts of a PTX module: operands, instructions, variables, functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

WIDTH = {
    "pred": 0,
    "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8,
    "b128": 16,
}  # fmt: skip
"""Bytes of each PTX type; 0 for a predicate."""


class PtxError(Exception):
    """The text is no PTX that the executor can read or model; the message names the PTX line."""


class Unsupported(PtxError):
    """An instruction or modifier that would change a result and is not modelled."""


@dataclass(frozen=True)
class Register:
    """A register, or a special register when the name starts with % and nothing declares it."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: the bits of an integer or of a float of `float_bytes`."""

    bits: int
    float_bytes: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter, label or function."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], with what follows a comma inside the brackets in `extra`."""

    base: Operand
    offset: int = 0
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}, (a, b, ...) or p|q; None stands for the sink _."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Negated:
    """!p."""

    item: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Negated


@dataclass(frozen=True)
class SourceLine:
    """A line of the CUDA source, known when compiled with -lineinfo."""

    file: str
    line: int

    def __str__(self) -> str:
        """Show the file's name without its folders."""
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


@dataclass(frozen=True)
class Instruction:
    """One instruction with its guard predicate."""

    op: str
    operands: tuple[Operand | None, ...]
    line: int
    guard: Register | None = None
    guard_negated: bool = False
    source: SourceLine | None = None

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.op.split(".")

    @property
    def opcode(self) -> str:
        """The name before the first modifier."""
        return self.op.split(".", 1)[0]


@dataclass(frozen=True)
class Label:
    """A branch target, unique in its function."""

    name: str


@dataclass(frozen=True)
class Variable:
    """A variable; count 0 means extern, with its size given at launch."""

    name: str
    space: str
    type: str
    align: int
    count: int
    initial: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.count * WIDTH[self.type]


@dataclass
class Function:
    """A kernel (.entry) or device function (.func)."""

    name: str
    line: int
    is_entry: bool
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | Label] = field(default_factory=list)
    max_threads: int | None = None
    parse_body: Callable[[], None] | None = None
    """Fills registers, variables and body; None for a declaration."""

    @property
    def is_defined(self) -> bool:
        """Whether the function has a body."""
        return self.parse_body is not None

    def parsed(self) -> Function:
        """Return the function with its body."""
        if self.parse_body and not self.body:
            self.parse_body()
        return self


@dataclass
class SyntaxTree:
    """A parsed module."""

    target: str = ""
    version: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
