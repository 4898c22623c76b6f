"""GPUs without a GPU: a CUDA build of torch on the simulated runtime and the executor's kernels.

environment()   of a process to start, in which the simulated runtime comes before CUDA's
SimulatedGpu()  in that process, before torch touches CUDA
"""

from __future__ import annotations

import ctypes as C
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ptx.executor import ExecutorError, Kernel, Module, Options, compile_ptx, find_nvcc
from ptx.executor.cache import cached_file, digest
from ptx.executor.nvcc import nvcc_version
from ptx.executor.runtime import runtime

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = ("runtime.cpp", "streams.cpp", "blas.cpp", "runtime.h")
KERNELS = ("grouped_gemm.cu", "dropout_mask.cu")
ARCH = "sm_80"


def library() -> Path:
    """Build the simulated runtime."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ExecutorError("nvcc is not on PATH")
    sources = [HERE / name for name in SOURCES if name.endswith(".cpp")]

    def build(path: Path) -> None:
        # nvcc, because it knows where its headers are; all is host code.
        flags = ["-std=c++17", "-O2", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-Wall,-Werror"]
        subprocess.run([nvcc, *flags, *map(str, sources), "-o", str(path)], check=True)

    key = digest(nvcc_version(), *((HERE / name).read_bytes() for name in SOURCES))
    return cached_file(f"simulated_gpu_{key}.so", build)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process with simulated GPUs; folder is for a file of it."""
    driver = folder / "libcuda.so.1"
    driver.unlink(missing_ok=True)
    driver.symlink_to(library())
    return os.environ | {
        "LD_PRELOAD": str(library()),
        "LD_LIBRARY_PATH": str(folder),
    }


@dataclass(frozen=True)
class Call:
    """A line of the log: what was called, on which device and stream, and in a capture or not."""

    what: str
    device: int
    stream: int = 0
    captured: bool = False

    @staticmethod
    def read(line: str) -> Call:
        """Parse a line of the runtime's log."""
        words = line.split()
        values = {key: int(value) for key, value in (w.split("=") for w in words if "=" in w)}
        what = " ".join(w for w in words if "=" not in w)
        where = (values["device"], values.get("stream", 0), bool(values.get("captured", 0)))
        return Call(what, *where)

    @property
    def kernel(self) -> str:
        """The mangled name of the kernel that was launched; "" for another call."""
        return self.what.removeprefix("kernel ") if self.what.startswith("kernel ") else ""


class _Functions(C.Structure):
    """simulated::Executor of runtime.h."""

    ALLOCATE = C.CFUNCTYPE(C.c_uint64, C.c_uint64)
    RELEASE = C.CFUNCTYPE(None, C.c_uint64)
    PREPARE = C.CFUNCTYPE(
        C.c_int, C.c_char_p, C.POINTER(C.c_uint32), C.c_uint64, C.POINTER(C.c_void_p)
    )
    RUN = C.CFUNCTYPE(C.c_int, C.c_int)
    _fields_ = [("allocate", ALLOCATE), ("release", RELEASE), ("prepare", PREPARE), ("run", RUN)]


class SimulatedGpu:
    """The executor behind the simulated runtime of this process."""

    def __init__(self) -> None:
        """Compile the kernels and connect them; they stay connected."""
        self.findings: list[str] = []
        self._modules = [Module(compile_ptx(CSRC / "cuda" / name, ARCH)) for name in KERNELS]
        self._launches: list[tuple[Kernel, tuple[int, ...], int, bytes]] = []
        self._runtime = C.CDLL(str(library()))
        self._runtime.simulated_log.restype = C.c_char_p
        functions = _Functions
        self._functions = functions(
            C.cast(runtime().ptx_allocate, functions.ALLOCATE),
            C.cast(runtime().ptx_free, functions.RELEASE),
            functions.PREPARE(self._prepare),
            functions.RUN(self._run),
        )
        self._runtime.simulated_connect(C.byref(self._functions))

    def calls(self) -> list[Call]:
        """Return what was called since the last time."""
        return [Call.read(line) for line in self._runtime.simulated_log().decode().splitlines()]

    def fail_next_launch(self, error: int) -> None:
        """Let the next kernel not be launched."""
        self._runtime.simulated_fail_next_launch(error)

    def _prepare(self, name: bytes, shape: C.Array, smem_bytes: int, arguments: C.Array) -> int:
        """Keep a launch; its number, or -1 for a kernel of torch's."""
        module = next((m for m in self._modules if name.decode() in m.entries), None)
        if module is None:
            return -1
        kernel = module.kernel(name.decode())
        block = bytearray(kernel.code.param_bytes)
        for i, (offset, width) in enumerate(kernel.code.params.values()):
            block[offset : offset + width] = C.string_at(arguments[i], width)
        self._launches.append((kernel, tuple(shape[:6]), smem_bytes, bytes(block)))
        return len(self._launches) - 1

    def _run(self, number: int) -> int:
        """Run a launch; 0 if the executor has nothing against it."""
        kernel, shape, smem_bytes, arguments = self._launches[number]
        options = Options(seed=number, adversarial=number % 2 == 1, count=False)
        result = kernel.launch(shape[:3], shape[3:], arguments, smem_bytes, options=options)
        if not result.ok:
            self.findings.append(f"{kernel.name}: {result.report()}")
            print(self.findings[-1], file=sys.stderr)
        return 0 if result.ok else 1
