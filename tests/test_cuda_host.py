"""The host side of the CUDA backend, as far as a machine without a GPU can tell."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from test_build import toolchain

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cuda_include() -> Path:
    toolkit = toolchain.find_cuda(dict(os.environ))
    if toolkit is None:
        pytest.skip("nvcc is not on PATH")
    return toolkit.root / "include"


def test_launches_hand_the_plans_block_to_the_runtime(tmp_path, cuda_include):
    program = tmp_path / "launch_test"
    sources = [ROOT / "tests/cpp/launch_test.cpp", ROOT / "csrc/cuda/launch.cpp"]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    command = ["g++", *flags, "-isystem", cuda_include, *sources, "-o", program]
    subprocess.run(command, check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.stdout == "launches: passed\n"


def test_the_registration_compiles_against_the_headers_of_any_torch(cuda_include):
    """A CPU build of torch has c10's CUDA headers, but not the one that says how it was built."""
    include = Path(torch.__file__).parent / "include"
    has_header = (include / "c10/cuda/impl/cuda_cmake_macros.h").exists()
    macros = ["C10_BUILD_SHARED_LIBS", "C10_CUDA_BUILD_SHARED_LIBS"]
    flags = (
        [] if has_header else ["-DC10_USING_CUSTOM_GENERATED_MACROS", *(f"-D{m}" for m in macros)]
    )
    system = [
        include,
        include / "torch/csrc/api/include",
        sysconfig.get_path("include"),
        cuda_include,
    ]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags]
    for folder in (ROOT / "csrc", *system):
        command += ["-I" if folder == ROOT / "csrc" else "-isystem", str(folder)]
    subprocess.run([*command, ROOT / "csrc/cuda/register_cuda.cpp"], check=True)
