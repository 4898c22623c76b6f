"""Compiling: once per architecture, again when a source changes, a skip only without nvcc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptx.conftest import SKIP_REASON, ModuleLoader
from ptx.executor import ExecutorError, Module, cache, compile_ptx
from ptx.executor.runtime import runtime

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture
def sources(ptx_module: ModuleLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that includes a header, and a cache of its own."""
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    (tmp_path / "value.h").write_text("constexpr int kValue = 1;\n")
    text = '#include "value.h"\nextern "C" __global__ void f(int* y) { *y = kValue; }\n'
    (tmp_path / "f.cu").write_text(text)
    return tmp_path


def test_a_source_is_compiled_once_per_architecture(sources: Path) -> None:
    first = compile_ptx(sources / "f.cu", "sm_80")
    times = {p: p.stat().st_mtime_ns for p in (sources / "cache").iterdir()}
    assert compile_ptx(sources / "f.cu", "sm_80") == first
    assert {p: p.stat().st_mtime_ns for p in (sources / "cache").iterdir()} == times
    assert Module(compile_ptx(sources / "f.cu", "sm_90")).tree.target == "sm_90"


def test_a_changed_header_is_compiled_again(sources: Path) -> None:
    first = compile_ptx(sources / "f.cu")
    (sources / "value.h").write_text("constexpr int kValue = 77;\n")
    assert compile_ptx(sources / "f.cu") != first


def test_a_change_below_a_folder_named_cuda_is_noticed(sources: Path) -> None:
    folder = sources.rename(sources.with_name("cuda"))
    first = compile_ptx(folder / "f.cu")
    (folder / "value.h").write_text("constexpr int kValue = 77;\n")
    assert compile_ptx(folder / "f.cu") != first


def test_a_compiler_error_is_shown(sources: Path) -> None:
    (sources / "f.cu").write_text("no C++\n")
    with pytest.raises(ExecutorError, match=r"(?s)nvcc failed on f\.cu.*error"):
        compile_ptx(sources / "f.cu")


def test_without_nvcc_kernel_tests_are_skipped_and_the_summary_says_so(tmp_path: Path) -> None:
    runtime()  # built with g++, which is not on that PATH either
    environment = {**os.environ, "PATH": str(tmp_path)}
    selection = [str(TESTS / "ptx" / "test_counters.py"), str(TESTS / "ptx" / "test_warp.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "sectors or movmatrix",
        *selection,
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed, 7 skipped" in result.stdout
    assert f"PTX executor: 7 kernel tests SKIPPED because {SKIP_REASON}" in result.stdout
