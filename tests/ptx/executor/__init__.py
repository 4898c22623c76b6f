"""Run the PTX of CUDA kernels on the CPU, with checks and counters. See tests/ptx/README.md.

Reading order: syntax, lexer, parser, body_parser (text to tree); calls, blocks, encoder and the
encode_ modules (tree to op table); module, buffers, findings, counters (launches); then csrc:
machine.h, grid.h, scheduler.cpp, and one file per family of instructions.
"""

from .buffers import Buffer
from .counters import CounterRow, Counters, counter_row, counter_table, line_table
from .findings import Finding, Kind
from .module import Kernel, Module, Options, Output, Result
from .nvcc import compile_ptx, find_nvcc
from .runtime import ExecutorError
from .syntax import PtxError, Unsupported
from .tensor_map import tensor_map

__all__ = [
    "Buffer",
    "CounterRow",
    "Counters",
    "ExecutorError",
    "Finding",
    "Kernel",
    "Kind",
    "Module",
    "Options",
    "Output",
    "PtxError",
    "Result",
    "Unsupported",
    "compile_ptx",
    "counter_row",
    "counter_table",
    "find_nvcc",
    "line_table",
    "tensor_map",
]
