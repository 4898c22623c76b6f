"""Machine code of chosen kernels, compiled afresh."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ptx.executor import ExecutorError, find_nvcc
from ptx.executor.cache import cached_file, digest
from ptx.executor.nvcc import nvcc_version
from ptx.plan_library import CSRC, Config

_STRICT = "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"


def _source(kernels: list[tuple[Config, bool]]) -> str:
    lines = ['#include "cuda/gemm_kernel_sm80.cuh"', "namespace rasa::cuda {"]
    for config, has_dropout in kernels:
        element = "float" if config.element_bytes == 4 else "__nv_bfloat16"
        arguments = f"ConfigId::k{config.name}, {element}, {str(has_dropout).lower()}"
        lines.append(f"template __global__ void grouped_gemm_sm80<{arguments}>(")
        size = f"arg_bytes(ConfigId::k{config.name})"
        lines.append(f"    const __grid_constant__ ArgsBlock<{size}>);")
    return "\n".join([*lines, "}", ""])


def compile_kernels(kernels: list[tuple[Config, bool]], *archs: str) -> Path:
    """Compile bf16 or fp32 kernels: configs, and whether they have dropout; a spill is an error."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ExecutorError("nvcc is not on PATH")
    source = _source(kernels)
    headers = [path.read_bytes() for path in sorted(CSRC.rglob("*.*h"))]

    def build(path: Path) -> None:
        file = path.with_suffix(".cu")
        file.write_text(source)
        code = [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in archs]
        flags = ["-fatbin", "-std=c++17", "-O3", *code, f"-I{CSRC}", _STRICT]
        subprocess.run([nvcc, *flags, str(file), "-o", str(path)], check=True)

    key = digest(nvcc_version(), *archs, source, *headers)
    return cached_file(f"kernels.{key}.fatbin", build)
