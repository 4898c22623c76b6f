"""What a launch found wrong: named findings with PTX line and CUDA source line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .syntax import Instruction, SourceLine

_NOBODY = 0xFFFFFFFF


class Kind(IntEnum):
    """Names of findings; those that the runtime reports are mirrored by grid.h."""

    OUT_OF_BOUNDS = 1
    MISALIGNED = 2
    DIVERGENT = 3
    DEADLOCK = 4
    SHARED_READ_AFTER_WRITE = 5
    SHARED_WRITE_AFTER_WRITE = 6
    SHARED_WRITE_AFTER_READ = 7
    UNFINISHED_COPY = 8
    UNINITIALISED = 9
    STORED_TWICE = 10
    STORED_NEVER = 11
    WATCHDOG = 12
    MISUSE = 13
    EXIT_WITH_COPY = 14
    WARP_RACE = 15
    PROXY = 16
    EXIT_WITH_BULK = 17
    BLOCK_ORDER = 18
    GLOBAL_RACE = 19
    CRASH = 20
    BANK_CONFLICT = 21
    WRONG_RESULT = 22


DESCRIPTIONS = {
    Kind.OUT_OF_BOUNDS: "access out of bounds",
    Kind.MISALIGNED: "misaligned access",
    Kind.DIVERGENT: "divergent barrier or warp-wide instruction",
    Kind.DEADLOCK: "deadlock",
    Kind.SHARED_READ_AFTER_WRITE: "shared-memory race: read after unordered write",
    Kind.SHARED_WRITE_AFTER_WRITE: "shared-memory race: write after unordered write",
    Kind.SHARED_WRITE_AFTER_READ: "shared-memory race: write after unordered read",
    Kind.UNFINISHED_COPY: "access to bytes of an unfinished asynchronous copy",
    Kind.UNINITIALISED: "read of uninitialised shared memory",
    Kind.STORED_TWICE: "output bytes stored twice",
    Kind.STORED_NEVER: "output bytes never stored",
    Kind.WATCHDOG: "watchdog: the launch did not end in time",
    Kind.MISUSE: "misuse of an instruction",
    Kind.EXIT_WITH_COPY: "exit with an unfinished cp.async",
    Kind.WARP_RACE: "race within a warp (no __syncwarp)",
    Kind.PROXY: "async proxy reads a generic write without fence.proxy.async",
    Kind.EXIT_WITH_BULK: "exit with an unfinished bulk store or wgmma",
    Kind.BLOCK_ORDER: "no release/acquire orders this access after another block's",
    Kind.GLOBAL_RACE: "global-memory race within a block",
    Kind.CRASH: "the executor process crashed",
    Kind.BANK_CONFLICT: "more shared-memory wavefronts than allowed",
    Kind.WRONG_RESULT: "output differs from the exact result",
}


@dataclass(frozen=True)
class Finding:
    """One kind of defect at one instruction (and the one it conflicts with)."""

    kind: Kind
    line: int | None
    op: str
    source: SourceLine | None
    other_line: int | None
    other_op: str
    other_source: SourceLine | None
    block: int | None
    thread: int | None
    other_block: int | None
    other_thread: int | None
    address: int
    count: int
    message: str

    def __str__(self) -> str:
        """One line: name, where, against what, who first, how often."""
        text = f"{self.kind.name}: {DESCRIPTIONS[self.kind]}"
        if self.line is not None:
            text += f" at {_place(self.line, self.op, self.source)}"
        if self.other_line is not None:
            text += f" against {_place(self.other_line, self.other_op, self.other_source)}"
        if self.thread is not None:
            text += f", block {self.block} thread {self.thread}"
        if self.other_thread is not None:
            block = f"block {self.other_block} " if self.other_block is not None else ""
            text += f" (other: {block}thread {self.other_thread})"
        if self.count > 1:
            text += f", {self.count} times"
        return text + (f": {self.message}" if self.message else "")


def finding_at(kind: Kind, message: str, i: Instruction | None = None) -> Finding:
    """Make a finding that no thread is to blame for."""
    return Finding(
        kind=kind,
        line=i.line if i else None,
        op=i.op if i else "",
        source=i.source if i else None,
        other_line=None,
        other_op="",
        other_source=None,
        block=None,
        thread=None,
        other_block=None,
        other_thread=None,
        address=0,
        count=1,
        message=message,
    )


def _place(line: int, op: str, source: SourceLine | None) -> str:
    return f"PTX line {line} `{op}`" + (f" ({source})" if source else "")


def decode_findings(rows: np.ndarray, instructions: list[Instruction]) -> list[Finding]:
    """Turn records into findings; "@n" in a message becomes the place of instruction n."""

    def instruction(number: int) -> Instruction | None:
        return instructions[number] if 0 <= number < len(instructions) else None

    def place(match: re.Match[str]) -> str:
        i = instruction(int(match[1]))
        return _place(i.line, i.op, i.source) if i else "the end"

    def known(value: int) -> int | None:
        return None if value == _NOBODY else int(value)

    findings = []
    for row in rows:
        i, other = instruction(row["instruction"]), instruction(row["other_instruction"])
        findings.append(
            Finding(
                kind=Kind(int(row["kind"])),
                line=i.line if i else None,
                op=i.op if i else "",
                source=i.source if i else None,
                other_line=other.line if other else None,
                other_op=other.op if other else "",
                other_source=other.source if other else None,
                block=known(row["block"]),
                thread=known(row["thread"]),
                other_block=known(row["other_block"]),
                other_thread=known(row["other_thread"]),
                address=int(row["address"]),
                count=int(row["count"]),
                message=re.sub(r"@(-?\d+)", place, row["message"].decode(errors="replace")),
            )
        )
    return findings
