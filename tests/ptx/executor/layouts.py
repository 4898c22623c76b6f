"""Structures that Python and the C++ runtime share: each mirrors one of its name in csrc."""

from __future__ import annotations

import ctypes as C

import numpy as np

NO_OPERAND = 0xFFFFFFFF
CONST_BIT, NEGATE_BIT = 1, 2

ENCODED_OP = np.dtype(
    [(n, np.uint32) for n in ("fn", "instruction", "guard", "first_arg", "first_imm")]
)
BASIC_BLOCK = np.dtype(
    [
        (n, np.uint32)
        for n in ("first_op", "num_ops", "collective", "member", "end", "target", "guard")
    ]
)
INSTRUCTION_COUNT = np.dtype(
    [
        (n, np.uint64)
        for n in (
            "global_requests",
            "global_bytes",
            "sectors",
            "shared_requests",
            "shared_bytes",
            "wavefronts",
            "ideal_wavefronts",
            "flops",
        )
    ]
)
FINDING = np.dtype(
    [
        ("kind", np.int32),
        ("instruction", np.int32),
        ("other_instruction", np.int32),
        ("block", np.uint32),
        ("thread", np.uint32),
        ("other_thread", np.uint32),
        ("other_block", np.uint32),
        ("pad", np.uint32),
        ("address", np.uint64),
        ("count", np.uint64),
        ("message", "S256"),
    ]
)


def findings_capacity(max_findings: int) -> int:
    """Records for every kind of finding of the runtime, and one more."""
    return 20 * max_findings + 1


class OptionsLayout(C.Structure):
    """Options of a launch."""

    _fields_ = [
        *(
            (n, C.c_uint32)
            for n in (
                "seed",
                "adversarial",
                "check_races",
                "poison",
                "count",
                "resident_blocks",
                "bulk_copy_timing",
                "max_findings",
            )
        ),
        ("time_limit_ms", C.c_uint64),
    ]


class LaunchShape(C.Structure):
    """Grid, block, shared memory and argument block."""

    _fields_ = [
        ("grid", C.c_uint32 * 3),
        ("block", C.c_uint32 * 3),
        ("shared_bytes", C.c_uint32),
        ("num_outputs", C.c_uint32),
        ("params", C.c_char_p),
        ("param_bytes", C.c_uint64),
    ]


class ProgramImage(C.Structure):
    """An encoded kernel."""

    _fields_ = [
        *((n, C.c_void_p) for n in ("ops", "blocks", "args", "imms", "constants", "line_slots")),
        *(
            (n, C.c_uint32)
            for n in (
                "num_ops",
                "num_blocks",
                "num_args",
                "num_imms",
                "num_constant_bytes",
                "num_instructions",
                "num_line_slots",
                "register_bytes",
                "local_bytes",
                "pad",
            )
        ),
    ]


class OutputLayout(C.Structure):
    """A buffer whose expected bytes must be stored exactly once."""

    _fields_ = [("address", C.c_uint64), ("expected", C.c_void_p)]


class ResultsLayout(C.Structure):
    """Where a launch leaves its results."""

    _fields_ = [
        *(
            (n, C.c_void_p)
            for n in (
                "block_runs",
                "block_lanes",
                "counts",
                "findings",
                "unique_by_slot",
                "unique_by_kind",
            )
        ),
        ("num_findings", C.c_uint32),
        ("fatal", C.c_uint32),
        ("steps", C.c_uint64),
    ]
