"""Builds rasa_ext._C with CMake and Ninja against the torch that is installed.

Metadata is in pyproject.toml, sources and flags are in CMakeLists.txt, and what is found on the
machine is in toolchain.py. MAX_JOBS bounds the number of compilers that run at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not put the source folder on the path

import toolchain  # noqa: E402


def find_program(name: str) -> str:
    """Return the full path of a build tool, or exit."""
    program = shutil.which(name)
    if program is None:
        raise SystemExit(f"rasa_ext is built with {name}, which is not on PATH: pip install {name}")
    return program


def installed_torch() -> toolchain.Torch:
    """Return the supported torch that is installed, or exit with what to install."""
    return toolchain.require_torch(toolchain.find_torch(dict(os.environ)))


class CheckedDistInfo(dist_info):
    """Metadata comes first in an install: fails here, before pip downloads the dependencies."""

    def run(self) -> None:
        """Write the metadata if the build can succeed."""
        installed_torch()
        super().run()


class FreshBuildPy(build_py):
    """Copies the Python files."""

    def run(self) -> None:
        """Start from an empty folder: a module deleted since the last build is not shipped."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "rasa_ext", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Compiles rasa_ext._C and writes _build_config.py beside it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build in a folder that belongs to this torch and this Python."""
        torch = installed_torch()
        toolkit = toolchain.find_cuda(dict(os.environ))
        backends, notice = toolchain.decide_backends(torch, toolkit)
        if notice is not None:
            print(f"rasa_ext: {notice}.", flush=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"torch-{torch.version}-{sys.implementation.cache_tag}"
        cmake, ninja = find_program("cmake"), find_program("ninja")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "RASA_LIBRARY_SUFFIX": library.name.removeprefix("_C"),
            "RASA_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "RASA_TORCH_DIR": torch.root,
            "RASA_CUDA": "ON" if "cuda" in backends else "OFF",
        }
        architectures: tuple[str, ...] = ()
        if toolkit is not None and "cuda" in backends:
            arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
            architectures = toolchain.cuda_architectures(arch_list, toolkit.version)
            options |= {
                "CMAKE_CUDA_COMPILER": toolkit.root / "bin" / "nvcc",
                "RASA_CUDA_GENCODE": ";".join(toolchain.gencode_flags(architectures)),
                "RASA_CUDART": toolchain.find_cudart(torch, toolkit),
                # One file holds most of the kernels: its architectures compile side by side.
                "RASA_NVCC_THREADS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1),
            }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        # The last build's cache names a ninja in a build environment that pip has deleted, and
        # options that may be gone. The objects stay: a second install compiles what has changed.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir)]
        subprocess.run([*configure, *defines], check=True)
        subprocess.run([cmake, "--build", str(build_dir), *jobs], check=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build_dir / library.name, library)
        config = {
            "version": self.distribution.get_version(),
            "git_revision": toolchain.git_revision(ROOT, dict(os.environ)),
            "torch_version": torch.version,
            "backends": backends,
            "cuda_architectures": architectures,
            "notice": notice,
        }
        lines = ['"""What this build was made of; written by setup.py."""', ""]
        lines += [f"{name} = {value!r}" for name, value in config.items()]
        (library.parent / "_build_config.py").write_text("\n".join(lines) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Put the build's configuration beside the library in an editable install too."""
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / "rasa_ext" / "_build_config.py", ROOT / "rasa_ext")


setup(
    ext_modules=[Extension("rasa_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy, "dist_info": CheckedDistInfo},
)
