"""CUDA source to PTX with nvcc, cached by the content of all files that go in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .cache import cached_file, digest
from .runtime import ExecutorError

# -lineinfo: findings and counters name source lines. Warnings: code that a defect leaves unused.
_FLAGS = ("-ptx", "-std=c++17", "-O3", "-lineinfo", "-diag-suppress=177,550")


@cache
def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


@cache
def nvcc_version() -> str:
    """Release and build of nvcc; "" without one."""
    nvcc = find_nvcc()
    if nvcc is None:
        return ""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V([\d.]+)", text)
    return match[1] if match else text.strip()


def compile_ptx(
    source: Path,
    arch: str = "sm_80",
    defines: Sequence[str] = (),
    include: Sequence[Path] = (),
) -> str:
    """Compile a .cu file; `arch` is an sm_ name, `defines` are NAME or NAME=VALUE."""
    flags = [*_FLAGS, f"-arch={arch}", *(f"-D{d}" for d in defines), *(f"-I{p}" for p in include)]
    key = digest(nvcc_version(), str(source.resolve()), *flags)
    manifest = cached_file(
        f"{source.stem}.{arch}.{key}.json", lambda path: _compile(source, flags, path)
    )
    record = json.loads(manifest.read_text())
    if any(_file_digest(Path(p)) != d for p, d in record["inputs"].items()):
        manifest.unlink()
        return compile_ptx(source, arch, defines, include)
    return str(record["ptx"])


def _file_digest(path: Path) -> str:
    return digest(path.read_bytes()) if path.exists() else ""


def _compile(source: Path, flags: list[str], manifest: Path) -> None:
    """Write PTX and the digests of the inputs outside of /usr, where toolkits lie."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ExecutorError("nvcc is not on PATH")
    ptx, depfile = manifest.parent / "out.ptx", manifest.parent / "out.d"
    command = [nvcc, *flags, "-MD", "-MF", str(depfile), str(source), "-o", str(ptx)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ExecutorError(f"nvcc failed on {source.name}:\n{result.stderr[:4000]}")
    names = re.sub(r"\\\n", " ", depfile.read_text().split(":", 1)[1]).split()
    inputs = {n: _file_digest(Path(n)) for n in names if not n.startswith("/usr/")}
    manifest.write_text(json.dumps({"inputs": inputs, "ptx": ptx.read_text()}))
