"""Fixtures of kernel tests: compiled modules, or a skip that the summary names without nvcc."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptx.executor import Module, compile_ptx, find_nvcc
from ptx.executor.nvcc import nvcc_version

KERNELS = Path(__file__).resolve().parent / "kernels"
SKIP_REASON = "nvcc is not on PATH"

ModuleLoader = Callable[..., Module]
SummaryLines = list[str]
_SUMMARY = pytest.StashKey[SummaryLines]()


@pytest.fixture(scope="session")
def ptx_module() -> Iterator[ModuleLoader]:
    """Load a .cu file as a module: `ptx_module("gemm_sm80.cu", "sm_80", "SEED_NO_WAIT")`.

    A path without folders lies in tests/ptx/kernels. Each (file, architecture, defines) is compiled
    once and cached by the content of all its sources; each launch runs in a child process under
    `Options.time_limit`.
    """
    if find_nvcc() is None:
        pytest.skip(SKIP_REASON)
    modules: dict[tuple[object, ...], Module] = {}

    def load(
        source: str | Path, arch: str = "sm_80", *defines: str, include: tuple[Path, ...] = ()
    ) -> Module:
        path = KERNELS / source
        key = (path, arch, defines, include)
        if key not in modules:
            modules[key] = Module(compile_ptx(path, arch, defines, include))
        return modules[key]

    yield load


@pytest.fixture
def summary_lines(pytestconfig: pytest.Config) -> SummaryLines:
    """Lines that a test adds to the summary."""
    return pytestconfig.stash.setdefault(_SUMMARY, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say with which compiler kernels were run, or that they were not."""
    skipped = [
        r for r in terminalreporter.stats.get("skipped", []) if SKIP_REASON in str(r.longrepr)
    ]
    if skipped:
        text = f"PTX executor: {len(skipped)} kernel tests SKIPPED because {SKIP_REASON}"
        terminalreporter.write_line(text, yellow=True, bold=True)
    elif find_nvcc() is not None:
        terminalreporter.write_line(f"PTX executor: kernels compiled by nvcc {nvcc_version()}")
    for line in terminalreporter.config.stash.get(_SUMMARY, []):
        terminalreporter.write_line(f"PTX executor: {line}")
