"""Fixtures every test has: NaN-filled allocations, fixed seeds, and the devices to run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import rasa_ext

BACKENDS = rasa_ext.build_info()["backends"]
DEVICES = ["cpu"] + (["cuda"] if "cuda" in BACKENDS and torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def nan_filled_allocations() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN: an element nobody wrote fails."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["library", "portable"])
def micro_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The library's micro-kernels, and the loops that serve where a CPU lacks them."""
    rasa_ext._C.set_portable(request.param == "portable")
    yield request.param
    rasa_ext._C.set_portable(False)


@pytest.fixture
def cpu_launcher() -> Iterator[Callable[[str], None]]:
    """Sets what runs the CPU's programs (csrc/cpu/launch.h) for one test."""
    yield rasa_ext._C.set_cpu_launcher
    rasa_ext._C.set_cpu_launcher("tiles")


@pytest.fixture(params=["tiles", "portable", "library"])
def launcher(request: pytest.FixtureRequest, cpu_launcher: Callable[[str], None]) -> Iterator[str]:
    """The CPU backend, the same without micro-kernels, and torch's own ops in its place."""
    rasa_ext._C.set_portable(request.param == "portable")
    cpu_launcher("library" if request.param == "library" else "tiles")
    yield request.param
    rasa_ext._C.set_portable(False)
