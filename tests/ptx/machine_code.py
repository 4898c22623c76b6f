"""What ptxas made of a kernel, read with cuobjdump: registers, spills, and the main loop's SASS."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptx.plan_library import Config, configs

_KERNEL = re.compile(r"ConfigIdE(\d+)E(13__nv_bfloat16|6__half|f)Lb([01])E")
_ELEMENTS = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}


@dataclass(frozen=True)
class KernelName:
    """An instantiation of grouped_gemm_sm80."""

    config: Config
    dtype: str
    has_dropout: bool

    @staticmethod
    def of(mangled: str) -> KernelName | None:
        """None for any other kernel."""
        match = _KERNEL.search(mangled)
        if match is None:
            return None
        return KernelName(configs()[int(match[1])], _ELEMENTS[match[2]], match[3] == "1")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    arch: str
    kernel: str
    registers: int
    spilled_bytes: int
    """The stack frame and local memory of a thread; ours have neither unless registers spill."""


@dataclass(frozen=True)
class Loop:
    """The innermost loop with mma instructions, as it lies in memory."""

    arch: str
    kernel: str
    instructions: int
    hmma: int
    ldsm: int
    ldgsts_128: int
    ldgsts_other: int
    longest_hmma_run: int


def cuobjdump(*arguments: str) -> str:
    """Run cuobjdump, of a toolkit on PATH or of the PyPI packages; it calls nvdisasm."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    tool = shutil.which("cuobjdump") or next(map(str, packages.glob("*/bin/cuobjdump")), None)
    if tool is None:
        raise RuntimeError("cuobjdump was not found: pip install nvidia-cuda-cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _by_arch(text: str) -> Iterator[tuple[str, str]]:
    """Each architecture's part of cuobjdump's answer."""
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def parse_resources(text: str) -> list[Resources]:
    """Parse cuobjdump --dump-resource-usage."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    return [
        Resources(arch, kernel, int(registers), int(stack) + int(local))
        for arch, part in _by_arch(text)
        for kernel, registers, stack, local in re.findall(pattern, part)
    ]


def parse_loops(text: str) -> list[Loop]:
    """Parse cuobjdump -sass."""
    loops = []
    for arch, part in _by_arch(text):
        _, *functions = re.split(r"^\s*Function : ", part, flags=re.MULTILINE)
        for function in functions:
            kernel, body = function.split("\n", 1)
            loops += _main_loop(arch, kernel.strip(), body)
    return loops


def _main_loop(arch: str, kernel: str, body: str) -> list[Loop]:
    """The shortest backward branch over an HMMA; none in a kernel without."""
    rows = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", body, re.MULTILINE)
    code = [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for address, text in rows]
    spans = []
    for address, text in code:
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < address:
            inside = [t for a, t in code if int(target[1], 16) <= a <= address]
            if any(t.startswith("HMMA") for t in inside):
                spans.append(inside)
    if not spans:
        return []
    loop = min(spans, key=len)
    runs = "".join("h" if t.startswith("HMMA") else " " for t in loop).split()
    copies = [t for t in loop if t.startswith("LDGSTS")]
    wide = sum(".128" in t.split()[0] for t in copies)
    return [
        Loop(
            arch,
            kernel,
            len(loop),
            sum(t.startswith("HMMA") for t in loop),
            sum(t.startswith("LDSM") for t in loop),
            wide,
            len(copies) - wide,
            max(map(len, runs)),
        )
    ]
