"""What setup.py builds with: the installed torch, the CUDA toolkit, and the backends they allow.

Nothing here imports torch, so it works from inside pip's isolated build environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 9)

# Compute capabilities that get machine code. Those of 10.x and 12.x need a toolkit from 12.8 on.
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

# Prints where torch is and what it was built for. Reads version.py instead of importing torch:
# milliseconds instead of seconds, and it works for a torch that cannot be imported here.
_PROBE = """
import importlib.util, json, os
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin:
    root, version = os.path.dirname(spec.origin), {}
    exec(open(os.path.join(root, "version.py")).read(), version)
    found = {"root": root, "version": str(version["__version__"]), "cuda": version.get("cuda")}
    print("torch-probe:" + json.dumps(found))
"""

# What pip sets to hide the user's environment from a build. Without them a child of the user's
# interpreter sees the torch that rasa_ext will run with.
_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")


@dataclass(frozen=True)
class Torch:
    """An installed torch: its package folder, its version, and its CUDA version if it has one."""

    root: Path
    version: str
    cuda: str | None = None

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit: its root folder and its version, as in "13.0"."""

    root: Path
    version: str


def _probe(python: str, env: dict[str, str]) -> Torch | None:
    run = subprocess.run(
        [python, "-c", _PROBE], env=env, cwd=Path(python).parent, capture_output=True, text=True
    )
    found = re.search(r"^torch-probe:(.*)$", run.stdout, re.MULTILINE)
    if found is None:
        return None
    fields = json.loads(found[1])
    return Torch(Path(fields["root"]), fields["version"], fields["cuda"])


def find_torch(environ: dict[str, str], executable: str = sys.executable) -> Torch | None:
    """Find the torch that rasa_ext will run with, from inside an isolated build or outside one.

    Looks in this order: the interpreter named by RASA_EXT_PYTHON; this interpreter, which under pip
    is the user's own; interpreters of the same Python version on PATH, which under uv and
    `python -m build` is the activated environment; the build environment itself.
    """
    host_environ = {name: value for name, value in environ.items() if name not in _ISOLATION}
    lib = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    on_path = [
        str(Path(folder) / "python")
        for folder in environ.get("PATH", "").split(os.pathsep)
        if (Path(folder).parent / "lib" / lib).is_dir() and (Path(folder) / "python").exists()
    ]
    for python in (environ.get("RASA_EXT_PYTHON"), executable, *on_path):
        torch = _probe(python, host_environ) if python else None
        if torch is not None:
            return torch
    return _probe(executable, environ)


def require_torch(torch: Torch | None) -> Torch:
    """Return a torch that rasa_ext supports, or exit with what to install."""
    minimum = ".".join(map(str, MIN_TORCH))
    advice = (
        f'Install it first, where rasa_ext is to run: pip install "torch>={minimum}". If it is in '
        "another environment, activate that or set RASA_EXT_PYTHON to its interpreter."
    )
    if torch is None:
        raise SystemExit(f"rasa_ext is compiled against torch, and no torch is installed. {advice}")
    if torch.release < MIN_TORCH:
        raise SystemExit(
            f"rasa_ext needs torch >= {minimum}, got {torch.version} in {torch.root}. {advice}"
        )
    return torch


def find_cuda(environ: dict[str, str]) -> CudaToolkit | None:
    """Find the CUDA toolkit. CUDA_HOME or CUDA_PATH, if set, is the only place looked at."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    compilers = [f"{home}/bin/nvcc"] if home else [on_path, "/usr/local/cuda/bin/nvcc"]
    for nvcc in compilers:
        if nvcc is None or not Path(nvcc).exists():
            continue
        # nvcc may be a wrapper script in a folder of its own; only nvcc knows its toolkit's root.
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"TOP=(.+)", dryrun.stderr)
        root = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+\.\d+)", version)
        if release is not None:
            return CudaToolkit(root.resolve(), release[1])
    return None


def decide_backends(
    torch: Torch, toolkit: CudaToolkit | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the backends to build, and why CUDA is not among them where torch has it."""
    cpu_only = f"CPU backend only: torch {torch.version} is a CUDA {torch.cuda} build, but"
    if torch.cuda is None:
        return ("cpu",), None
    if toolkit is None:
        return ("cpu",), (
            f"{cpu_only} no CUDA toolkit was found. For the CUDA backend, install the CUDA "
            f"{torch.cuda} toolkit, put nvcc on PATH or set CUDA_HOME, and install rasa_ext again"
        )
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        return ("cpu",), (
            f"{cpu_only} the toolkit in {toolkit.root} is CUDA {toolkit.version}. The major "
            f"versions must agree: set CUDA_HOME to a CUDA {torch.cuda} toolkit and install "
            "rasa_ext again"
        )
    return ("cpu", "cuda"), None


def cuda_architectures(arch_list: str | None, toolkit_version: str) -> tuple[str, ...]:
    """Return the CUDA architectures to build, as "80", "90a", or "80+PTX".

    `arch_list` is TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a"). Without it: every default architecture the
    toolkit knows, and the PTX of the oldest one, which every architecture not listed can run.
    """
    if arch_list is None or not arch_list.strip():
        knows_blackwell = tuple(map(int, toolkit_version.split("."))) >= (12, 8)
        known = [a for a in DEFAULT_ARCHITECTURES if knows_blackwell or int(a) < 100]
        return (f"{known[0]}+PTX", *known[1:])
    architectures = []
    for item in re.split(r"[;,\s]+", arch_list.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if parts is None:
            raise SystemExit(
                "TORCH_CUDA_ARCH_LIST must be a list of compute capabilities such as "
                f'"8.0+PTX;9.0a", got "{item}" in "{arch_list}"'
            )
        architectures.append(f"{parts[1]}{parts[2]}{parts[3] or ''}")
    return tuple(architectures)


def gencode_flags(architectures: tuple[str, ...]) -> list[str]:
    """Return nvcc's -gencode flags for what `cuda_architectures` returned."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_cudart(torch: Torch, toolkit: CudaToolkit) -> Path:
    """Return the shared CUDA runtime that torch loads, or the toolkit's if torch brings none."""
    brought = sorted(torch.root.parent.glob("nvidia/*/lib/libcudart.so.*"))
    return brought[-1] if brought else toolkit.root / "lib64" / "libcudart.so"


def git_revision(root: Path, environ: dict[str, str]) -> str | None:
    """Return the commit of the source tree, with "-dirty" if files differ; None outside a clone."""
    git = shutil.which("git")
    if git is None:
        return None
    run = subprocess.run(
        [git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=root,
        # An unpacked source archive inside somebody else's clone has no revision.
        env={**environ, "GIT_CEILING_DIRECTORIES": str(root.parent)},
        capture_output=True,
        text=True,
    )
    return run.stdout.strip() or None if run.returncode == 0 else None
