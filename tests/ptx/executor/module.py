"""Modules, kernels and launches."""

from __future__ import annotations

import ctypes as C
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import encode_arithmetic, encode_convert, encode_hopper, encode_memory, encode_warp
from .buffers import Buffer, to_bytes
from .counters import Counters, collect
from .encoder import EncodedKernel, Encoder
from .findings import Finding, Kind, decode_findings, finding_at
from .layouts import (
    FINDING,
    INSTRUCTION_COUNT,
    LaunchShape,
    OptionsLayout,
    OutputLayout,
    ProgramImage,
    ResultsLayout,
    findings_capacity,
)
from .parser import parse
from .runtime import ExecutorError, op_index, runtime
from .syntax import Instruction, Variable

MAX_PARAM_BYTES = 32_764
MAX_THREADS = 1024

_HANDLERS = {
    **encode_arithmetic.HANDLERS,
    **encode_convert.HANDLERS,
    **encode_memory.HANDLERS,
    **encode_warp.HANDLERS,
    **encode_hopper.HANDLERS,
}


@dataclass(frozen=True)
class Options:
    """How to run a launch."""

    seed: int = 1
    adversarial: bool = False
    """Random order of warps and lanes, preempted between basic blocks; inflates counters."""
    check_races: bool = True
    """Races, unfinished copies, uninitialised reads, order between blocks."""
    poison: bool = True
    """Fill the destination of an asynchronous copy with 0xff until it arrives."""
    count: bool = True
    resident_blocks: int = 4
    """Blocks that run together; a kernel whose blocks wait for each other needs all of those."""
    bulk_copy_timing: int = 0
    """When bulk copies land: 0 as late as possible, 1 at random, 2 at once."""
    max_findings: int = 32
    """Of each kind."""
    max_conflict_factor: float | None = None
    """Wavefronts of a shared-memory instruction over the ideal; more is a finding."""
    time_limit: float = 60.0
    """Seconds until the watchdog ends the launch."""


@dataclass(frozen=True)
class Output:
    """A buffer whose bytes (those of `expected`, if given) must be stored exactly once."""

    buffer: Buffer
    expected: np.ndarray | None = None
    exact: np.ndarray | None = None
    """What the buffer must hold after the launch, in float64."""
    max_error: float = 0.0
    """Largest difference from `exact`, relative to its largest value."""


@dataclass(frozen=True)
class Result:
    """What a launch did."""

    findings: list[Finding]
    ended: bool
    """Whether the kernel ran to its end."""
    seconds: float
    counters: Counters

    @property
    def ok(self) -> bool:
        """Whether the kernel ended without a finding."""
        return self.ended and not self.findings

    @property
    def kinds(self) -> set[Kind]:
        """Names of the findings."""
        return {f.kind for f in self.findings}

    def report(self) -> str:
        """One line per kind of finding and pair of source lines."""
        groups: dict[object, list[Finding]] = {}
        for f in self.findings:
            groups.setdefault(
                (f.kind, f.source or f.line, f.other_source or f.other_line), []
            ).append(f)
        lines = ["ok" if self.ok else "FAILED"]
        for first, *others in groups.values():
            more = f" [and at {len(others)} more PTX lines of this source]" if others else ""
            lines.append(f"  {first}{more}")
        return "\n".join(lines)


Dim = int | Sequence[int]
Argument = Any
"""A Buffer (its address), int, float, or what to_bytes() takes, of the parameter's size."""


class Module:
    """Parsed PTX. Kernels are encoded on first use; module variables are allocated once."""

    def __init__(self, ptx: str) -> None:
        """Parse the module level."""
        self.tree = parse(ptx)
        self._kernels: dict[str, Kernel] = {}
        self._variables: dict[str, Buffer] = {}

    @property
    def entries(self) -> list[str]:
        """Names of the kernels."""
        return [f.name for f in self.tree.functions.values() if f.is_entry and f.is_defined]

    def kernel(self, name: str) -> Kernel:
        """Encode a kernel, given by its name or a part of it that only one kernel has."""
        matches = [n for n in self.entries if n == name] or [n for n in self.entries if name in n]
        if len(matches) != 1:
            raise ExecutorError(
                f"{name!r} names {len(matches)} of the kernels {', '.join(self.entries)}"
            )
        if matches[0] not in self._kernels:
            self._kernels[matches[0]] = Kernel(self, matches[0])
        return self._kernels[matches[0]]

    def launch(self, name: str, grid: Dim, block: Dim, args: Any, **kwargs: Any) -> Result:
        """Launch a kernel: see Kernel.launch."""
        return self.kernel(name).launch(grid, block, args, **kwargs)

    def variable(self, name: str) -> Buffer:
        """Return the memory of a module's __device__ or __constant__ variable."""
        return self._allocate(self.tree.variables[name])

    def _allocate(self, v: Variable) -> Buffer:
        if v.name not in self._variables:
            self._variables[v.name] = Buffer((v.initial or b"").ljust(v.num_bytes, b"\0"))
        return self._variables[v.name]

    def address_of(self, v: Variable) -> int:
        """Address of a module variable."""
        return self._allocate(v).address


class Kernel:
    """One encoded kernel."""

    def __init__(self, module: Module, name: str) -> None:
        """Encode and load."""
        self.name, self.module = name, module
        encoder = Encoder(module.tree, module.tree.functions[name], op_index, module.address_of)
        self.code: EncodedKernel = encoder.encode(_HANDLERS)
        self._program = self._load()
        weakref.finalize(self, runtime().ptx_free_program, self._program)

    def _load(self) -> int:
        k = self.code
        arrays = (k.ops, k.block_rows, k.args, k.imms, k.constants, k.slot_of)
        image = ProgramImage(
            *(a.ctypes.data for a in arrays),
            len(k.ops),
            len(k.block_rows),
            len(k.args),
            len(k.imms),
            len(k.constants),
            len(k.instructions),
            len(k.slots),
            k.register_bytes,
            k.local_bytes,
            0,
        )
        return int(runtime().ptx_load_program(C.byref(image)))

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Argument] | bytes,
        shared_bytes: int = 0,
        outputs: Sequence[Output | Buffer] = (),
        options: Options | None = None,
    ) -> Result:
        """Run the kernel in a child process and wait for it.

        args: one value per parameter, or the bytes of the whole argument block.
        shared_bytes: dynamic shared memory. outputs: buffers to be stored exactly once.
        """
        options = options or Options()
        params = self._argument_block(args)
        checked = [o if isinstance(o, Output) else Output(o) for o in outputs]
        shape = LaunchShape(
            (C.c_uint32 * 3)(*_three(grid)),
            (C.c_uint32 * 3)(*_three(block)),
            self.code.static_shared_bytes + shared_bytes,
            len(checked),
            params,
            len(params),
        )
        self._check_block(_three(block))
        return self._run(shape, checked, options)

    def _check_block(self, block: tuple[int, int, int]) -> None:
        threads, limit = int(np.prod(block)), self.code.entry.max_threads or MAX_THREADS
        if not 0 < threads <= limit:
            raise ExecutorError(f"{self.name}: {threads} threads in a block; the limit is {limit}")

    def _argument_block(self, args: Sequence[Argument] | bytes) -> bytes:
        size = self.code.param_bytes
        if size > MAX_PARAM_BYTES:
            raise ExecutorError(
                f"{self.name}: {size} bytes of parameters; the limit is {MAX_PARAM_BYTES}"
            )
        if isinstance(args, bytes | bytearray):
            if len(args) != size:
                raise ExecutorError(
                    f"{self.name}: argument block must have {size} bytes, got {len(args)}"
                )
            return bytes(args)
        if len(args) != len(self.code.params):
            raise ExecutorError(
                f"{self.name}: {len(args)} arguments for {len(self.code.params)} parameters"
            )
        data = bytearray(size)
        for (name, (offset, width)), value in zip(self.code.params.items(), args, strict=True):
            raw = _argument_bytes(value, width)
            if len(raw) != width:
                raise ExecutorError(
                    f"{self.name}: parameter {name} has {width} bytes, its argument {len(raw)}"
                )
            data[offset : offset + width] = raw
        return bytes(data)

    def _run(self, shape: LaunchShape, outputs: list[Output], options: Options) -> Result:
        k = self.code
        names = [f[0] for f in OptionsLayout._fields_ if f[0] != "time_limit_ms"]
        layout = OptionsLayout(
            *(int(getattr(options, n)) for n in names), int(options.time_limit * 1000)
        )
        masks = [None if o.expected is None else _expected_bytes(o) for o in outputs]
        output_rows = (OutputLayout * max(1, len(outputs)))(
            *(
                OutputLayout(o.buffer.address, None if m is None else m.ctypes.data)
                for o, m in zip(outputs, masks, strict=True)
            )
        )
        runs, lanes = np.zeros((2, len(k.block_rows)), np.uint64)
        counts = np.zeros(len(k.instructions) + 1, INSTRUCTION_COUNT)
        findings = np.zeros(findings_capacity(options.max_findings), FINDING)
        by_slot, by_kind = np.zeros(len(k.slots) + 1, np.uint64), np.zeros(4, np.uint64)
        kinds = np.array([kind for _, kind in k.slots] + [0], np.uint32)
        arrays = (runs, lanes, counts, findings, by_slot, by_kind)
        results = ResultsLayout(*(a.ctypes.data for a in arrays), 0, 0, 0)
        start = time.perf_counter()
        outcome = runtime().ptx_launch(
            self._program,
            C.byref(layout),
            C.byref(shape),
            output_rows,
            kinds.ctypes.data,
            C.byref(results),
        )
        seconds = time.perf_counter() - start
        found = decode_findings(findings[: results.num_findings], k.instructions)
        if outcome:
            found.append(_process_finding(outcome, options))
        found += _bank_conflicts(k.instructions, counts, options)
        found += [f for o in outputs if (f := _wrong_result(o))]
        return Result(
            found,
            not outcome and not results.fatal,
            seconds,
            collect(k, counts, runs, lanes, by_slot, by_kind),
        )


def _process_finding(outcome: int, options: Options) -> Finding:
    kind, message = {
        1: (Kind.WATCHDOG, f"killed after {2 * options.time_limit + 2:.0f} s"),
        2: (Kind.CRASH, "the child process ended by a signal"),
    }.get(outcome, (Kind.CRASH, "the child process could not be started"))
    return finding_at(kind, message)


def _bank_conflicts(
    instructions: list[Instruction], counts: np.ndarray, options: Options
) -> list[Finding]:
    """Instructions with more wavefronts than allowed."""
    limit = options.max_conflict_factor
    if limit is None:
        return []
    found = []
    for i, row in zip(instructions, counts, strict=False):
        wavefronts, ideal = int(row["wavefronts"]), int(row["ideal_wavefronts"])
        if wavefronts > limit * ideal:
            message = f"{wavefronts} wavefronts, {wavefronts / ideal:.2f} times the ideal {ideal}"
            found.append(finding_at(Kind.BANK_CONFLICT, message, i))
    return found


def _wrong_result(output: Output) -> Finding | None:
    """Compare a buffer with its exact contents; NaN is wrong."""
    if output.exact is None:
        return None
    values = output.buffer.read()
    if hasattr(values, "untyped_storage"):
        values = values.double().numpy()
    exact = np.asarray(output.exact, np.float64)
    error = np.nan_to_num(np.abs(values.astype(np.float64) - exact), nan=np.inf)
    allowed = output.max_error * np.abs(exact).max(initial=0)
    if not (error > allowed).any():
        return None
    worst = np.unravel_index(int(error.argmax()), error.shape)
    where = ", ".join(str(int(w)) for w in worst)
    message = f"element ({where}) is {values[worst]}, exact {exact[worst]}; "
    message += f"{int((error > allowed).sum())} of {error.size} are off by more than {allowed:.3g}"
    return finding_at(Kind.WRONG_RESULT, message)


def _expected_bytes(output: Output) -> np.ndarray:
    """One byte per byte of the buffer from a mask per element."""
    assert output.expected is not None
    mask = np.ascontiguousarray(output.expected, bool).reshape(-1)
    return np.repeat(mask.view(np.uint8), output.buffer.num_bytes // max(1, mask.size))


def _three(dim: Dim) -> tuple[int, int, int]:
    values = (dim,) if isinstance(dim, int) else tuple(dim)
    x, y, z = (*values, 1, 1, 1)[:3]
    return x, y, z


def _argument_bytes(value: Argument, width: int) -> bytes:
    if isinstance(value, Buffer):
        value = value.address
    if isinstance(value, int):  # bool is an int
        return (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    if isinstance(value, float):
        return np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[width]).tobytes()
    return to_bytes(value)
