"""A kernel to the op table that the runtime interprets: operands, constants, symbols and guards."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from .accesses import access_kind
from .blocks import Block, Collective, End, collective, split_into_blocks
from .calls import call_variables, inline_calls
from .layouts import BASIC_BLOCK, CONST_BIT, ENCODED_OP, NEGATE_BIT, NO_OPERAND
from .modifiers import Modifiers
from .syntax import (
    WIDTH,
    Address,
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Symbol,
    SyntaxTree,
    Unsupported,
    Variable,
    Vector,
)

SHARED_BASE = 1024
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 0xF0 << 48, 0xF1 << 48, 0xF2 << 48
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}

# In the order of set_special_registers in scheduler.cpp.
SPECIAL_REGISTERS = [
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ntid.y",
    "%ntid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%lanemask_eq",
    "%lanemask_lt",
    "%lanemask_ge",
    "%lanemask_le",
    "%lanemask_gt",
    "%cluster_ctarank",
    "%cluster_nctarank",
    "%smid",
    "%clock",
]
_UNTIMED = ("%clock64", "%globaltimer")  # no time passes: they read 0

_LANES = 32


def round_up(value: int, multiple: int) -> int:
    """Return the next multiple."""
    return (value + multiple - 1) // multiple * multiple


class Encoder:
    """Encodes one kernel; `handlers` turn an instruction into calls of emit()."""

    def __init__(
        self,
        tree: SyntaxTree,
        entry: Function,
        op_index: Callable[[str], int],
        global_address: Callable[[Variable], int],
    ) -> None:
        """Lay out parameters and variables and split the body into blocks."""
        self.tree, self.op_index, self.global_address = tree, op_index, global_address
        self.entry = inline_calls(tree, entry)
        self.blocks, self.instructions = split_into_blocks(self.entry.body)
        self.ops: list[tuple[int, int, int, int, int]] = []
        self.args: list[int] = []
        self.imms: list[int] = []
        self.constants: dict[tuple[int, int], int] = {}
        self.constant_bytes = bytearray()
        self.register_bytes = len(SPECIAL_REGISTERS) * 4 * _LANES
        self.register_offsets: dict[str, int] = {}
        self.number = 0
        self._layout()

    # ---- where parameters and variables lie

    def _layout(self) -> None:
        self.params: dict[str, tuple[int, int]] = {}
        self.param_bytes = 0
        for p in self.entry.params:
            self.param_bytes = round_up(self.param_bytes, p.align)
            self.params[p.name] = (self.param_bytes, p.num_bytes)
            self.param_bytes += p.num_bytes
        self.local_bytes, self.local_offsets = 0, {}
        local = [v for v in self.entry.variables.values() if v.space == "local"]
        for v in local + call_variables(self.entry):
            self.local_bytes = round_up(self.local_bytes, v.align)
            self.local_offsets[v.name] = self.local_bytes
            self.local_bytes += v.num_bytes
        self.local_bytes = round_up(self.local_bytes, 16)
        self._layout_shared()

    def _layout_shared(self) -> None:
        """Place static shared memory first, dynamic shared memory behind it."""
        used = {o.name for i in self.instructions for o in _symbols(i.operands)}
        variables = [*self.tree.variables.values(), *self.entry.variables.values()]
        shared = [v for v in variables if v.space == "shared" and v.name in used]
        self.static_shared_bytes, self.shared_offsets = 0, {}
        for v in sorted(shared, key=lambda v: v.count == 0):
            align = max(v.align, 16) if v.count == 0 else v.align
            offset = round_up(self.static_shared_bytes, align)
            self.shared_offsets[v.name] = offset
            self.static_shared_bytes = max(self.static_shared_bytes, offset + v.num_bytes)

    def symbol_address(self, name: str) -> int:
        """Address of a variable within its state space; of a parameter, its generic address."""
        if name in self.params:
            return PARAM_WINDOW | self.params[name][0]
        if name in self.local_offsets:
            return self.local_offsets[name]
        if name in self.shared_offsets:
            return SHARED_BASE + self.shared_offsets[name]
        variable = self.entry.variables.get(name) or self.tree.variables.get(name)
        if variable is None:
            raise Unsupported(f"symbol {name}")
        return self.global_address(variable)

    # ---- operands

    def width(self, operand: Operand | None) -> int | None:
        """Bytes of a declared register; 0 for a predicate; None for anything else."""
        return self.entry.registers.get(operand.name) if isinstance(operand, Register) else None

    def scratch(self, index: int, width: int) -> Register:
        """Return a register that no instruction names."""
        name = f"scratch{index}.{width}"
        self.entry.registers[name] = width
        return Register(name)

    def register(self, register: Register) -> int:
        """Operand of a declared register."""
        width = self.entry.registers.get(register.name)
        if width is None:
            raise Unsupported(f"special register {register.name}")
        if register.name not in self.register_offsets:
            self.register_bytes = round_up(self.register_bytes, 64 if width else 4)
            self.register_offsets[register.name] = self.register_bytes
            self.register_bytes += width * _LANES if width else 4
        return self.register_offsets[register.name]

    def constant(self, bits: int, width: int) -> int:
        """Operand of a value that all lanes share."""
        bits &= (1 << 8 * width) - 1
        if (bits, width) not in self.constants:
            self.constants[bits, width] = len(self.constant_bytes) | CONST_BIT
            self.constant_bytes += bits.to_bytes(width, "little") * _LANES
        return self.constants[bits, width]

    def source(self, operand: Operand | None, type_: str, any_width: bool = False) -> int:
        """Operand read as `type_`."""
        width = WIDTH[type_]
        if isinstance(operand, Immediate):
            return self.constant(_literal_bits(operand, type_), width)
        if isinstance(operand, Symbol):
            return self.constant(self.symbol_address(operand.name), width)
        if not isinstance(operand, Register):
            raise Unsupported(f"operand {operand}")
        if operand.name in SPECIAL_REGISTERS:
            if width != 4 and not any_width:
                raise Unsupported(f"special register {operand.name} used as .{type_}")
            return SPECIAL_REGISTERS.index(operand.name) * 4 * _LANES
        if operand.name in _UNTIMED:
            return self.constant(0, 8)
        offset, actual = self.register(operand), self.width(operand)
        if actual != width and not any_width:
            raise Unsupported(f"register {operand.name} of {actual} bytes used as .{type_}")
        return offset

    def target(self, operand: Operand | None, type_: str, any_width: bool = False) -> int:
        """Operand written as `type_`; the sink _ gives NO_OPERAND."""
        if operand is None:
            return NO_OPERAND
        if not isinstance(operand, Register):
            raise Unsupported(f"destination {operand}")
        offset = self.register(operand)
        if self.width(operand) != WIDTH[type_] and not any_width:
            raise Unsupported(
                f"register {operand.name} of {self.width(operand)} bytes written as .{type_}"
            )
        return offset

    def predicate(self, operand: Operand | None, negated: bool = False) -> int:
        """Operand of a predicate, possibly negated."""
        if isinstance(operand, Negated):
            return self.predicate(operand.item, not negated)
        if isinstance(operand, Immediate):
            return self.constant(-1 if bool(operand.bits) != negated else 0, 4)
        if not isinstance(operand, Register) or self.width(operand) != 0:
            raise Unsupported(f"predicate {operand}")
        return self.register(operand) | (NEGATE_BIT if negated else 0)

    def address(self, operand: Operand | None) -> tuple[int, list[int]]:
        """(base operand, [offset, base bytes]) of a memory operand."""
        if not isinstance(operand, Address):
            raise Unsupported(f"memory operand {operand}")
        base = operand.base
        if isinstance(base, Register):
            width = self.width(base) or 0
            if width not in (4, 8):
                raise Unsupported(f"address register {base.name}")
            return self.register(base), [operand.offset, width]
        if isinstance(base, Immediate):
            return self.constant(base.bits, 8), [operand.offset, 8]
        assert isinstance(base, Symbol)
        return self.constant(self.symbol_address(base.name), 8), [operand.offset, 8]

    # ---- code

    def emit(self, name: str, args: Sequence[int], imms: Sequence[int] = ()) -> None:
        """Append one op; guarded by the current instruction's predicate."""
        index = self.op_index(name)
        if index < 0:
            raise Unsupported(f"no model of {name}")
        guard = NO_OPERAND
        instruction = self.instructions[self.number]
        if instruction.guard and collective(instruction) is Collective.NONE:
            guard = self.predicate(instruction.guard, instruction.guard_negated)
        self.ops.append((index, self.number, guard, len(self.args), len(self.imms)))
        self.args += args
        self.imms += [i - (1 << 64) if i >= 1 << 63 else i for i in imms]

    def encode(self, handlers: Handlers) -> EncodedKernel:
        """Encode all blocks."""
        rows = []
        for block in self.blocks:
            first = len(self.ops)
            for self.number, instruction in block.instructions:
                _encode_instruction(self, instruction, handlers)
            rows.append(self._block_row(block, first))
        return EncodedKernel(self, np.array(rows, BASIC_BLOCK))

    def _block_row(self, block: Block, first: int) -> tuple[int, ...]:
        kind, member = Collective.NONE, NO_OPERAND
        if block.instructions:
            leader = block.instructions[0][1]
            kind = collective(leader)
            if kind is Collective.MEMBER_MASK:
                member = self.source(leader.operands[-1], "b32")
        guard = self.predicate(block.guard, block.guard_negated) if block.guard else NO_OPERAND
        target = block.target if block.end is End.BRANCH else 0
        return first, len(self.ops) - first, kind, member, block.end, target, guard


Handler = Callable[[Encoder, Instruction, Modifiers], None]
Handlers = dict[str, Handler]


class EncodedKernel:
    """The op table and what is needed to launch it and to read its counters."""

    def __init__(self, e: Encoder, blocks: np.ndarray) -> None:
        """Copy what a launch needs out of the encoder."""
        self.entry, self.instructions, self.blocks = e.entry, e.instructions, e.blocks
        self.block_rows = blocks
        self.ops = np.array(e.ops, ENCODED_OP)
        self.args = np.array(e.args, np.uint32)
        self.imms = np.array(e.imms, np.int64)
        self.constants = np.frombuffer(bytes(e.constant_bytes), np.uint8)
        self.register_bytes = round_up(e.register_bytes, 64)
        self.local_bytes, self.param_bytes, self.params = e.local_bytes, e.param_bytes, e.params
        self.static_shared_bytes = e.static_shared_bytes
        self.slots, self.slot_of = _line_slots(self.instructions)


def _line_slots(instructions: list[Instruction]) -> tuple[list[tuple[object, int]], np.ndarray]:
    """One slot per source line (PTX line without -lineinfo) and kind: load, store, atomic."""
    slots: dict[tuple[object, int], int] = {}
    slot_of = np.full(max(1, len(instructions)), -1, np.int32)
    for number, i in enumerate(instructions):
        kind = access_kind(i)
        if kind is None:
            continue
        slot_of[number] = slots.setdefault((i.source or i.line, kind), len(slots))
    return list(slots), slot_of


def _encode_instruction(e: Encoder, i: Instruction, handlers: Handlers) -> None:
    where = f"PTX line {i.line}: {i.op}"
    try:
        handler = handlers.get(i.opcode)
        if handler is None:
            raise Unsupported("no model of this instruction")
        modifiers = Modifiers(i)
        handler(e, i, modifiers)
        modifiers.require_all_used()
    except Unsupported as error:
        raise Unsupported(f"{where}: {error}") from None
    except (IndexError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise Unsupported(f"{where}: operands of an unexpected form ({error})") from None


def _literal_bits(literal: Immediate, type_: str) -> int:
    """Bits of a literal as `type_`: a float literal takes the type's precision."""
    if not literal.float_bytes or literal.float_bytes == WIDTH[type_]:
        return literal.bits
    if literal.float_bytes == 8 and type_ == "f32":
        value = struct.unpack("<d", struct.pack("<Q", literal.bits))[0]
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    raise Unsupported(f"float literal of {literal.float_bytes} bytes used as .{type_}")


def _symbols(operands: Sequence[Operand | None]) -> list[Symbol]:
    found: list[Symbol] = []
    for operand in operands:
        match operand:
            case Symbol():
                found.append(operand)
            case Address(base, _, extra):
                found += _symbols([base, *extra])
            case Vector(items):
                found += _symbols(items)
    return found
