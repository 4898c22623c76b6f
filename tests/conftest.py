"""Fixtures every test has: NaN-filled allocations, fixed seeds, and the devices to run on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

import rasa_ext

BACKENDS = rasa_ext.build_info()["backends"]
HAS_GPU = "cuda" in BACKENDS and torch.cuda.is_available()
DEVICES = ["cpu"] + (["cuda"] if HAS_GPU else [])
# Streams, graphs and second devices exist on a GPU only: nothing to skip elsewhere.
collect_ignore = [] if HAS_GPU else ["test_cuda.py"]
# Without it, torch refuses cuBLAS in deterministic mode. Read when CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, on a GPU, what is a CPU's own: tests marked cpu, and its portable loops."""

    def runs(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        is_cpus_own = item.get_closest_marker("cpu") or params.get("micro_kernel", "own") != "own"
        return not (is_cpus_own and params.get("device", "cpu") != "cpu")

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


def pytest_report_header() -> str:
    """Name the loops that this CPU runs: without AVX512-BF16, our micro-kernels do not."""
    return f"rasa_ext: {rasa_ext._C.cpu_capability()} on this CPU"


@pytest.fixture(autouse=True)
def nan_filled_allocations() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN: an element nobody wrote fails."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tensors of a test are made, unless it says otherwise."""
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=["own", "library", "none"])
def micro_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Our micro-kernels, the library's, and the loops that serve where a CPU lacks both."""
    rasa_ext._C.set_micro_kernels(request.param)
    yield request.param
    rasa_ext._C.set_micro_kernels("own")


@pytest.fixture
def cpu_launcher() -> Iterator[Callable[[str], None]]:
    """Sets what runs the CPU's programs (csrc/cpu/launch.h) for one test."""
    yield rasa_ext._C.set_cpu_launcher
    rasa_ext._C.set_cpu_launcher("tiles")


@pytest.fixture(params=["own", "library", "none", "torch"])
def launcher(request: pytest.FixtureRequest, cpu_launcher: Callable[[str], None]) -> Iterator[str]:
    """The CPU backend with each kind of micro-kernels, and torch's own ops in its place."""
    rasa_ext._C.set_micro_kernels("own" if request.param == "torch" else request.param)
    cpu_launcher("library" if request.param == "torch" else "tiles")
    yield request.param
    rasa_ext._C.set_micro_kernels("own")
