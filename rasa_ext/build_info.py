"""Loads the compiled extension, or says why it cannot be, and tells what the build was made of."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import TypedDict

import torch

_REINSTALL = (
    "Install rasa_ext again in this environment: pip install --force-reinstall --no-deps ., in its "
    "source folder"
)


class BuildInfo(TypedDict):
    """What `build_info` returns."""

    version: str
    git_revision: str | None
    python: str
    torch_built: str
    torch_running: str
    backends: tuple[str, ...]
    notice: str | None
    cuda_architectures: tuple[str, ...]
    cpu_capability: str
    micro_kernel_dtypes: str


def load_extension() -> None:
    """Load rasa_ext._C, after checking that it was built for the torch that is running."""
    folder = Path(__file__).parent
    try:
        config = importlib.import_module("rasa_ext._build_config")
    except ModuleNotFoundError:
        raise ImportError(
            f"rasa_ext was imported from {folder}, which is a source folder without a compiled "
            "extension. Install it with `pip install .` and run from another folder (pytest, not "
            "`python -m pytest`), or install it in place with `pip install -e .`"
        ) from None
    check_torch(config.torch_version, config.backends, torch.__version__, torch.version.cuda)
    try:
        importlib.import_module("rasa_ext._C")
    except ImportError as error:
        raise ImportError(
            f"rasa_ext in {folder} was built against torch {config.torch_version}, and its "
            f"extension cannot be loaded by Python {platform.python_version()} with torch "
            f"{torch.__version__}: {error}. {_REINSTALL}"
        ) from error


def check_torch(
    built: str, backends: tuple[str, ...], running: str, running_cuda: str | None
) -> None:
    """Raise ImportError if the running torch cannot load an extension built against `built`.

    C++ extensions are bound to the minor release of torch; loading one into another release
    crashes later and elsewhere.
    """
    if built.split(".")[:2] != running.split(".")[:2]:
        minor = ".".join(built.split(".")[:2])
        raise ImportError(
            f"rasa_ext was built against torch {built}, got torch {running}. {_REINSTALL}; "
            f"or install torch {minor}"
        )
    if "cuda" in backends and running_cuda is None:
        raise ImportError(
            f"rasa_ext was built with CUDA against torch {built}, got torch {running} without "
            f"CUDA. {_REINSTALL}"
        )


def build_info() -> BuildInfo:
    """Return what this build of rasa_ext was made of and which CPU code it runs."""
    from rasa_ext import _C, _build_config

    return {
        "version": _build_config.version,
        "git_revision": _build_config.git_revision,
        "python": platform.python_version(),
        "torch_built": _build_config.torch_version,
        "torch_running": torch.__version__,
        "backends": _build_config.backends,
        "notice": _build_config.notice,
        "cuda_architectures": _build_config.cuda_architectures,
        "cpu_capability": _C.cpu_capability(),
        "micro_kernel_dtypes": _C.micro_kernel_dtypes(),
    }
