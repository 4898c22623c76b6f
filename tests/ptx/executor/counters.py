"""Counters of a launch: global traffic, shared wavefronts, tensor-core work, instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np

from .accesses import access_kind
from .encoder import EncodedKernel
from .syntax import Instruction, SourceLine

SECTOR_BYTES = 32
_KINDS = ("loads", "stores", "atomics")

Line = SourceLine | int
"""A CUDA source line, or a PTX line where there is no -lineinfo."""


@dataclass
class Traffic:
    """Global memory of one kind of access. Parameter, local and constant loads are not in it."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    """Sectors summed over accesses: what L2 delivers."""
    unique_sectors: int = 0
    """Different sectors: what DRAM must deliver at least once."""

    @property
    def efficiency(self) -> float:
        """Requested bytes over the bytes of their sectors."""
        return self.bytes / (SECTOR_BYTES * self.sectors) if self.sectors else 1.0


@dataclass
class SharedTraffic:
    """Wavefronts (passes over the banks) against the fewest that could move the words."""

    requests: int = 0
    bytes: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    @property
    def conflict_factor(self) -> float:
        """1.0 without bank conflicts."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 1.0


@dataclass
class Counts:
    """Counters of a launch or of one source line."""

    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    atomics: Traffic = field(default_factory=Traffic)
    shared: dict[str, SharedTraffic] = field(default_factory=dict)
    """By opcode: ld, st, cp.async, ldmatrix, stmatrix, atom."""
    flops: int = 0
    """Of tensor-core instructions, 2 per multiply-add."""
    warp_instructions: int = 0
    thread_instructions: int = 0

    def traffic(self) -> tuple[Traffic, Traffic, Traffic]:
        """Loads, stores, atomics."""
        return self.loads, self.stores, self.atomics

    @property
    def sectors(self) -> int:
        """Sectors of all accesses."""
        return sum(t.sectors for t in self.traffic())

    def _add_memory(self, i: Instruction, row: np.void) -> None:
        kind = access_kind(i)
        if kind is not None and row["global_bytes"]:
            traffic = self.traffic()[kind]
            traffic.requests += int(row["global_requests"])
            traffic.bytes += int(row["global_bytes"])
            traffic.sectors += int(row["sectors"])
        if row["shared_requests"]:
            name = {"cp": "cp.async", "red": "atom"}.get(i.opcode, i.opcode)
            shared = self.shared.setdefault(name, SharedTraffic())
            shared.requests += int(row["shared_requests"])
            shared.bytes += int(row["shared_bytes"])
            shared.wavefronts += int(row["wavefronts"])
            shared.ideal_wavefronts += int(row["ideal_wavefronts"])
        self.flops += int(row["flops"])


@dataclass
class Counters(Counts):
    """Counters of a launch, with those of its source lines and the instructions by opcode."""

    by_line: dict[Line, Counts] = field(default_factory=dict)
    opcodes: Counter[str] = field(default_factory=Counter)
    """Executions by a warp, per opcode with its modifiers."""
    unique_sectors: int = 0
    """Different sectors touched by any access."""


def collect(
    kernel: EncodedKernel,
    counts: np.ndarray,
    block_runs: np.ndarray,
    block_lanes: np.ndarray,
    unique_by_slot: np.ndarray,
    unique_by_kind: np.ndarray,
) -> Counters:
    """Sum what the runtime counted per instruction and per basic block."""
    total = Counters(unique_sectors=int(unique_by_kind[-1]))
    for number, i in enumerate(kernel.instructions):
        line = total.by_line.setdefault(i.source or i.line, Counts())
        for target in (total, line):
            target._add_memory(i, counts[number])
    for block, runs, lanes in zip(
        kernel.blocks, block_runs.tolist(), block_lanes.tolist(), strict=True
    ):
        ends = [block.branch] if block.branch >= 0 else []
        for number in [n for n, _ in block.instructions] + ends:
            i = kernel.instructions[number]
            total.opcodes[i.op] += runs
            for target in (total, total.by_line[i.source or i.line]):
                target.warp_instructions += runs
                target.thread_instructions += lanes
    for (where, kind), unique in zip(kernel.slots, unique_by_slot.tolist(), strict=False):
        total.by_line[where].traffic()[kind].unique_sectors = unique  # type: ignore[index]
    for traffic, unique in zip(total.traffic(), unique_by_kind.tolist(), strict=False):
        traffic.unique_sectors = unique
    return total


@dataclass(frozen=True)
class CounterRow:
    """One row of the benchmarks' table; compulsory bytes are what any kernel must move."""

    name: str
    compulsory_bytes: int
    unique_bytes: int
    unique_ratio: float
    l2_bytes: int
    l2_ratio: float
    bank_conflict_factor: float
    mma_gflop: float
    warp_instructions: int
    instructions_per_mma: float


def counter_row(name: str, counters: Counters, compulsory_bytes: int) -> CounterRow:
    """Relate a launch's traffic to the bytes it cannot avoid."""
    unique = SECTOR_BYTES * sum(t.unique_sectors for t in counters.traffic())
    l2 = SECTOR_BYTES * counters.sectors
    wavefronts = sum(s.wavefronts for s in counters.shared.values())
    ideal = sum(s.ideal_wavefronts for s in counters.shared.values())
    mma = sum(n for op, n in counters.opcodes.items() if op.startswith(("mma.", "wgmma.mma_async")))
    return CounterRow(
        name=name,
        compulsory_bytes=compulsory_bytes,
        unique_bytes=unique,
        unique_ratio=unique / compulsory_bytes,
        l2_bytes=l2,
        l2_ratio=l2 / compulsory_bytes,
        bank_conflict_factor=wavefronts / ideal if ideal else 1.0,
        mma_gflop=counters.flops / 1e9,
        warp_instructions=counters.warp_instructions,
        instructions_per_mma=counters.warp_instructions / mma if mma else float("nan"),
    )


def counter_table(rows: Iterable[CounterRow]) -> str:
    """Markdown table, one row per launch."""
    names = [f.name for f in fields(CounterRow)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [getattr(row, n) for n in names]
        cells = [
            v if isinstance(v, str) else f"{v:,}" if isinstance(v, int) else f"{v:.3f}"
            for v in values
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def line_table(counters: Counters, limit: int = 20) -> str:
    """Markdown table of the source lines with most traffic and instructions."""
    header = (
        "line",
        *(f"{k} {n}" for k in _KINDS for n in ("sectors", "unique")),
        "bank conflicts",
        "warp instructions",
    )
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    ranked = sorted(
        counters.by_line.items(), key=lambda item: (-item[1].sectors, -item[1].warp_instructions)
    )
    for where, counts in ranked[:limit]:
        ideal = sum(s.ideal_wavefronts for s in counts.shared.values())
        factor = sum(s.wavefronts for s in counts.shared.values()) / ideal if ideal else 1.0
        cells = [str(where)]
        cells += [str(v) for t in counts.traffic() for v in (t.sectors, t.unique_sectors)]
        lines.append(
            "| " + " | ".join([*cells, f"{factor:.2f}", str(counts.warp_instructions)]) + " |"
        )
    return "\n".join(lines)
