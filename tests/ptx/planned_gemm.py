"""Problems of csrc/gemm_problem.h, planned by csrc/cuda/plan.h and run by the executor."""

from __future__ import annotations

import ctypes as C
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from reference import DRAWS, assert_accurate
from torch import Tensor

from ptx import formats
from ptx.executor import Buffer, Module, Options, Output, Result
from ptx.plan_library import CSRC, LAYOUTS, configs, plan_library
from rasa_ext import dropout_mask

KERNELS = CSRC / "cuda" / "grouped_gemm.cu"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
NUM_SMS = 3
SMALL_SMEM, LARGE_SMEM = 99 * 1024, 163 * 1024  # of sm_86, 89, 120; of sm_80


class Block(C.Structure):
    """rasa::Block."""

    _fields_ = [("ptr", C.c_void_p), ("rows", C.c_int32), ("ld", C.c_int32)]


class Matrix(C.Structure):
    """rasa::Matrix."""

    _fields_ = [("first_block", C.c_int32), ("num_blocks", C.c_int32), ("dtype", C.c_int8)]


class Segment(C.Structure):
    """rasa::Segment."""

    _fields_ = [
        ("A", Matrix),
        ("B", Matrix),
        ("K", C.c_int32),
        ("scale_k", C.c_void_p),
        ("scale_m", C.c_void_p),
        ("seed", C.c_void_p),
    ]


class Problem(C.Structure):
    """rasa::Problem."""

    _fields_ = [
        ("M", C.c_int32),
        ("N", C.c_int32),
        ("first_segment", C.c_int32),
        ("num_segments", C.c_int32),
        ("C_in", Matrix),
        ("C", Matrix),
        ("is_diagonal", C.c_bool),
        ("drop_threshold", C.c_uint32),
    ]


@dataclass
class SegmentCase:
    """One segment; A and B are stacks."""

    A: list[Tensor]
    B: list[Tensor]
    K: int
    scale_k: Tensor | None = None
    scale_m: Tensor | None = None
    seed: Tensor | None = None


@dataclass
class ProblemCase:
    """One problem. A C block that is an int is a number of rows that are not written."""

    M: int
    N: int
    segments: list[SegmentCase]
    C: list[Tensor | int]
    C_in: list[Tensor] = field(default_factory=list)
    p: float = 0.0
    is_diagonal: bool = False

    @property
    def threshold(self) -> int:
        """Draws below it are dropped."""
        return round(self.p * DRAWS)


@dataclass(frozen=True)
class Device:
    """rasa::cuda::DeviceInfo. A launch that costs nothing makes plans split short reductions."""

    num_sms: int = NUM_SMS
    smem_bytes: int = LARGE_SMEM
    reduce_launch: float = 8.0


@dataclass(frozen=True)
class Launch:
    """What csrc/cuda/plan.h decided."""

    config: int
    has_dropout: bool
    grid: int
    threads: int
    smem_bytes: int
    num_problems: int
    args: bytes


class Planned:
    """Device memory of a group's tensors, and its launches."""

    def __init__(
        self,
        layout: str,
        dtype: torch.dtype,
        problems: list[ProblemCase],
        scale_dtype: torch.dtype,
        device: Device = Device(),
        is_full_precision: bool = False,
    ) -> None:
        """Copy the tensors and plan."""
        self.dtype, self.cases = dtype, problems
        self.is_full_precision = is_full_precision
        self._buffers: dict[int, tuple[Tensor, Buffer]] = {}
        self._blocks: list[Block] = []
        segments: list[Segment] = []
        rows: list[Problem] = []
        for case in problems:
            first = len(segments)
            for s in case.segments:
                scales = (self._vector(s.scale_k), self._vector(s.scale_m), self._vector(s.seed))
                segments.append(Segment(self._stack(s.A), self._stack(s.B), s.K, *scales))
            shape = (case.M, case.N, first, len(case.segments))
            stacks = (self._stack(case.C_in), self._stack(case.C))
            rows.append(Problem(*shape, *stacks, case.is_diagonal, case.threshold))
        lists = [(Problem * len(rows))(*rows), (Segment * len(segments))(*segments)]
        lists.append((Block * len(self._blocks))(*self._blocks))
        sized = [x for array in lists for x in (array, len(array))]
        count = plan_library().plan_group(
            LAYOUTS[layout],
            DTYPES[dtype],
            DTYPES[scale_dtype],
            *sized,
            device.num_sms,
            device.smem_bytes,
            C.c_double(device.reduce_launch),
            is_full_precision,
        )
        if count < 0:
            raise ValueError(plan_library().plan_error().decode())
        self.workspace_bytes = int(plan_library().workspace_bytes())
        self._workspace = Buffer(torch.full((max(self.workspace_bytes, 1),), 0xFF).byte())
        self.launches = [self._launch(i) for i in range(count)]

    def _launch(self, i: int) -> Launch:
        shape = (C.c_int * 6)()
        plan_library().launch_shape(i, shape)
        config, has_dropout, grid, threads, smem, num_problems = shape
        args = C.string_at(plan_library().launch_args(i), plan_library().args_size(i))
        args = self._workspace.at(0).to_bytes(8, "little") + args[8:]  # the pointer comes first
        return Launch(config, bool(has_dropout), grid, threads, smem, num_problems, args)

    def buffer(self, t: Tensor) -> Buffer:
        """The memory of a tensor's whole storage."""
        key = t.untyped_storage().data_ptr()
        if key not in self._buffers:
            storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            self._buffers[key] = (t, Buffer(storage))
        return self._buffers[key][1]

    def _address(self, t: Tensor) -> int:
        return self.buffer(t).at(t.storage_offset() * t.element_size()) if t.numel() else 0

    def _vector(self, t: Tensor | None) -> int | None:
        return None if t is None else self._address(t)

    def _stack(self, blocks: list[Tensor] | list[Tensor | int]) -> Matrix:
        first, dtype = len(self._blocks), torch.float32
        for t in blocks:
            if isinstance(t, int):
                self._blocks.append(Block(None, t, 0))
            else:
                dtype = t.dtype
                self._blocks.append(Block(self._address(t), t.shape[0], t.stride(0)))
        return Matrix(first, len(blocks), DTYPES[dtype])

    def _outputs(self) -> list[Output]:
        """Every element of every C is stored exactly once, and nothing else of its memory."""
        masks: dict[int, tuple[Buffer, Tensor]] = {}
        for t in (t for case in self.cases for t in case.C if isinstance(t, Tensor) and t.numel()):
            buffer = self.buffer(t)
            count = t.untyped_storage().nbytes() // t.element_size()
            _, mask = masks.setdefault(id(buffer), (buffer, torch.zeros(count, dtype=torch.bool)))
            mask.as_strided(t.shape, t.stride(), t.storage_offset())[:] = True
        return [Output(buffer, expected=mask.numpy()) for buffer, mask in masks.values()]

    def run(self, module: Module, options: Options | None = None) -> list[Result]:
        """Run all launches. Stores are counted where there is only one."""
        outputs = self._outputs() if len(self.launches) == 1 else []
        results = []
        for launch in self.launches:
            kernel = module.kernel(kernel_name(module, launch, self.dtype))
            results.append(
                kernel.launch(
                    launch.grid,
                    launch.threads,
                    launch.args,
                    launch.smem_bytes,
                    outputs=outputs,
                    options=options,
                )
            )
        return results

    def results(self) -> list[Tensor]:
        """Every C."""
        return [self.read(t) for case in self.cases for t in case.C if isinstance(t, Tensor)]

    def read(self, t: Tensor) -> Tensor:
        """What the device memory of a tensor holds now."""
        return self.buffer(t).read().as_strided(t.shape, t.stride(), t.storage_offset())


def kernel_name(module: Module, launch: Launch, dtype: torch.dtype) -> str:
    """The instantiation that a launch names."""
    element = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}.get(dtype, "f")
    pattern = rf"ConfigIdE{launch.config}E{element}Lb{int(launch.has_dropout)}E"
    if launch.config == len(configs()):
        pattern = rf"reduce_partialsI{element}E"
    (name,) = (n for n in module.entries if re.search(pattern, n))
    return name


def _axis(blocks: list[Tensor], length: int) -> Tensor:
    """The stack as one matrix of `length` rows."""
    whole = torch.cat(blocks)
    return torch.nn.functional.pad(whole, (0, 0, 0, max(0, length - len(whole))))[:length]


Rounding = Callable[[Tensor], Tensor]


def exactly(operand: Tensor) -> Tensor:
    """Round nothing."""
    return operand


def to_tf32(operand: Tensor) -> Tensor:
    """float32 as torch multiplies it where TF32 is allowed: to nearest, ties away from zero."""
    return torch.from_numpy(formats.to_tf32(operand.numpy()))


def formula(
    layout: str,
    case: ProblemCase,
    dtype: torch.dtype,
    C_dtype: torch.dtype,
    rounding: Rounding = exactly,
) -> Tensor:
    """The contract in plain torch, operands and products in `dtype`."""
    total = torch.zeros(case.M, case.N, dtype=C_dtype)
    if case.C_in:
        total += _axis(case.C_in, case.M).to(C_dtype)
    for s in (s for s in case.segments if s.K):
        product = _product(layout, case, s, dtype, rounding)
        if s.scale_m is not None:
            product = s.scale_m.to(dtype)[:, None] * product
        total = total + product.to(C_dtype)
    return total.diagonal()[None] if case.is_diagonal else total


def _product(
    layout: str,
    case: ProblemCase,
    s: SegmentCase,
    dtype: torch.dtype,
    rounding: Rounding = exactly,
) -> Tensor:
    """op(A) · op(B) with dropout and scale_k."""
    mask = None
    if case.threshold:
        assert s.seed is not None
        tokens = s.K if layout == "TN" else case.M
        features = s.K if layout == "NT" else case.N
        keep = dropout_mask(s.seed, tokens, features, case.p)
        mask = keep.to(dtype) * (DRAWS / (DRAWS - case.threshold))
    a = _axis(s.A, s.K if layout == "TN" else case.M).to(dtype)
    b = _axis(s.B, case.N if layout == "NT" else s.K).to(dtype)
    a = (a.T if layout == "TN" else a)[: case.M, : s.K]
    b = (b.T if layout == "NT" else b)[: s.K, : case.N]
    if mask is not None and layout != "NN":
        a, b = (a * mask, b) if layout == "NT" else (a, b * mask)
    if s.scale_k is not None:
        a = a * torch.nn.functional.pad(s.scale_k.to(dtype), (0, s.K - len(s.scale_k)))
    product = rounding(a) @ rounding(b)
    return product * mask if mask is not None and layout == "NN" else product


def check(planned: Planned, layout: str) -> None:
    """Compare every C with float64 by the rule of reference.py."""
    in_tf32 = planned.dtype is torch.float32 and not planned.is_full_precision
    rounding = to_tf32 if in_tf32 else exactly
    for i, case in enumerate(planned.cases):
        written = [t for t in case.C if isinstance(t, Tensor)]
        if not written or not case.M or not case.N:
            continue
        C_dtype = written[0].dtype
        exact = formula(layout, case, torch.float64, torch.float64)
        plain = formula(layout, case, planned.dtype, C_dtype, rounding)
        row = 0
        for t in case.C:
            if isinstance(t, int):
                row += t
                continue
            rows = slice(row, row + t.shape[0])
            row += t.shape[0]
            what = f"problem {i}, rows {rows.start} to {rows.stop}"
            out = planned.read(t)
            assert_accurate(out, plain[rows], exact[rows], what, dtype=planned.dtype)
