"""A function body to basic blocks.

A warp runs a block for a set of lanes. A warp-wide instruction starts a block, so that lanes wait
there until all it needs have arrived; a guarded one is preceded by a block that branches around it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from .syntax import Instruction, Label, PtxError, Register, Symbol


class End(IntEnum):
    """How a block ends; mirrored by machine.h."""

    FALL_THROUGH = 0
    BRANCH = 1
    EXIT = 2
    BARRIER = 3
    POLL = 4


class Collective(IntEnum):
    """Which lanes the first instruction of a block needs; mirrored by machine.h."""

    NONE = 0
    ALL_LANES = 1
    MEMBER_MASK = 2


_ALL_LANES = {"ldmatrix", "stmatrix", "movmatrix", "mma", "wgmma", "bar", "barrier", "setmaxnreg"}
_MEMBER_MASK = {"shfl", "vote", "match", "redux", "elect"}


@dataclass
class Block:
    """Numbered instructions (number, instruction) without the branch that ends the block."""

    instructions: list[tuple[int, Instruction]] = field(default_factory=list)
    end: End = End.FALL_THROUGH
    target: int = -1
    guard: Register | None = None
    guard_negated: bool = False
    branch: int = -1  # number of the bra or ret that ends it


def collective(instruction: Instruction) -> Collective:
    """Which lanes the instruction needs."""
    parts = instruction.parts
    if parts[0] in _MEMBER_MASK or parts[:2] == ["bar", "warp"]:
        return Collective.MEMBER_MASK
    return Collective.ALL_LANES if parts[0] in _ALL_LANES else Collective.NONE


def _end_of(instruction: Instruction) -> End | None:
    parts = instruction.parts
    if parts[0] == "bra":
        return End.BRANCH
    if parts[0] in ("ret", "exit"):
        return End.EXIT
    if parts[0] in ("bar", "barrier") and parts[1] not in ("warp", "cluster"):
        return End.BARRIER
    if parts[0] == "mbarrier" and parts[1] in ("try_wait", "test_wait"):
        return End.POLL
    return None


def split_into_blocks(body: list[Instruction | Label]) -> tuple[list[Block], list[Instruction]]:
    """Return the blocks, the last one an empty exit, and the instructions by number."""
    blocks = [Block()]
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []

    def start_block() -> None:
        if blocks[-1].instructions or blocks[-1].end is not End.FALL_THROUGH:
            blocks.append(Block())

    for item in body:
        if isinstance(item, Label):
            start_block()
            labels[item.name] = len(blocks) - 1
            continue
        number, end = len(instructions), _end_of(item)
        instructions.append(item)
        starts = collective(item) is not Collective.NONE
        alone = starts or (end is not None and end is not End.BRANCH)
        if starts:
            start_block()
        if item.guard and alone:
            blocks[-1].end, blocks[-1].target = End.BRANCH, len(blocks) + 1
            blocks[-1].guard, blocks[-1].guard_negated = item.guard, not item.guard_negated
            blocks.append(Block())
        if end in (End.BRANCH, End.EXIT):
            blocks[-1].branch = number
        else:
            blocks[-1].instructions.append((number, item))
        if end is not None:
            blocks[-1].end = end
        if end is End.BRANCH:
            blocks[-1].guard, blocks[-1].guard_negated = item.guard, item.guard_negated
        if end is not None or (item.guard and alone):
            blocks.append(Block())
    blocks.append(Block(end=End.EXIT))
    for block in blocks:
        if block.end is End.BRANCH and block.branch >= 0:
            block.target = _target(instructions[block.branch], labels)
    return blocks, instructions


def _target(branch: Instruction, labels: dict[str, int]) -> int:
    target = branch.operands[0]
    if not isinstance(target, Symbol) or target.name not in labels:
        raise PtxError(f"PTX line {branch.line}: {branch.op}: branch to {target}")
    return labels[target.name]
