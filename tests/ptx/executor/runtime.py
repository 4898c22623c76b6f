"""The C++ runtime: built with g++ on first use, loaded with ctypes."""

from __future__ import annotations

import ctypes as C
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from .cache import cached_file, digest
from .layouts import LaunchShape, OptionsLayout, OutputLayout, ProgramImage, ResultsLayout

_SOURCES = Path(__file__).resolve().parent / "csrc"
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
]
_FILE_FLAGS = {"rounding.cpp": ["-frounding-math"]}


class ExecutorError(Exception):
    """The executor cannot do what was asked, whatever the kernel is."""


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ExecutorError(f"{command[0]} failed:\n{result.stderr[:4000]}")


def _build(library: Path) -> None:
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [library.parent / f"{s.stem}.o" for s in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run(
            [
                "g++",
                *_FLAGS,
                *_FILE_FLAGS.get(source.name, []),
                "-c",
                str(source),
                "-o",
                str(target),
            ]
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    _run(["g++", "-shared", "-o", str(library), *map(str, objects)])


def _processor() -> str:
    """-march=native: a library belongs to one kind of processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


@cache
def runtime() -> C.CDLL:
    """Build and load the runtime."""
    texts = [s.read_bytes() for s in sorted(_SOURCES.iterdir())]
    path = cached_file(f"runtime_{digest(_processor(), ' '.join(_FLAGS), *texts)}.so", _build)
    library = C.CDLL(str(path))
    library.ptx_op_index.argtypes = [C.c_char_p]
    library.ptx_allocate.argtypes, library.ptx_allocate.restype = [C.c_uint64], C.c_uint64
    library.ptx_free.argtypes, library.ptx_free.restype = [C.c_uint64], None
    library.ptx_load_program.argtypes = [C.POINTER(ProgramImage)]
    library.ptx_load_program.restype = C.c_void_p
    library.ptx_free_program.argtypes, library.ptx_free_program.restype = [C.c_void_p], None
    library.ptx_launch.argtypes = [
        C.c_void_p,
        C.POINTER(OptionsLayout),
        C.POINTER(LaunchShape),
        C.POINTER(OutputLayout),
        C.c_void_p,
        C.POINTER(ResultsLayout),
    ]
    return library


@cache
def op_index(name: str) -> int:
    """Number of an op of the runtime, or -1."""
    return int(runtime().ptx_op_index(name.encode()))
