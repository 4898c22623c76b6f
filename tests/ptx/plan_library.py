"""csrc/cuda's plan and tile shapes as a shared library, through plan_shim.cpp."""

from __future__ import annotations

import ctypes as C
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ptx.executor.cache import cached_file, digest

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "ptx" / "plan_shim.cpp"
CSRC = ROOT / "csrc"
LAYOUTS = {"NN": 0, "NT": 1, "TN": 2}


@cache
def plan_library() -> C.CDLL:
    """Build the library, once for each content of its sources."""
    sources = [SHIM, *sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").glob("*.h"))]

    def build(path: Path) -> None:
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}"]
        subprocess.run(["g++", *flags, str(SHIM), "-o", str(path)], check=True)

    library = C.CDLL(str(cached_file(f"plan.{digest(*map(Path.read_bytes, sources))}.so", build)))
    library.plan_error.restype = C.c_char_p
    library.launch_args.restype = C.c_void_p
    library.workspace_bytes.restype = C.c_int64
    return library


@dataclass(frozen=True)
class Config:
    """A row of gemm_config.h."""

    id: int
    name: str
    layout: str
    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    stages: int
    walks: bool
    scales_segments: bool
    smem_bytes: int
    has_kernel: tuple[bool, bool]
    """Without dropout, and with it."""
    element_bytes: int
    splits_operands: bool

    @property
    def threads(self) -> int:
        """In a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def mma(self) -> int:
        """Of a warp in a k block: mma.m16n8k16 of 16 bits, mma.m16n8k8 of TF32."""
        m, n = self.block_m // self.warps_m // 16, self.block_n // self.warps_n // 8
        products = 3 if self.splits_operands else 1
        return m * n * products * self.block_k // (32 // self.element_bytes)

    @property
    def ldmatrix(self) -> int:
        """ldmatrix of a warp in a k block: 16 rows of A, or two n8 tiles of B, at once.

        fp32 fragments are loaded without it.
        """
        if self.element_bytes == 4:
            return 0
        m, n = self.block_m // self.warps_m // 16, self.block_n // self.warps_n // 8
        return (m + (n + 1) // 2) * self.block_k // 16

    def __str__(self) -> str:
        """As in `shrink 128×40×64, 4×1 warps, 4 stages`."""
        block = f"{self.block_m}×{self.block_n}×{self.block_k}"
        return f"{self.name} {block}, {self.warps_m}×{self.warps_n} warps, {self.stages} stages"


@cache
def configs() -> tuple[Config, ...]:
    """All tile shapes, in the order of ConfigId."""
    header = (CSRC / "cuda" / "gemm_config.h").read_text()
    enum = re.search(r"enum class ConfigId[^{]*\{(.*?)\};", header, re.DOTALL)
    assert enum is not None
    names = re.findall(r"^\s*k(\w+),", enum[1], re.MULTILINE)
    layouts = {number: name for name, number in LAYOUTS.items()}
    found = []
    for number in range(plan_library().num_configs()):
        shape = (C.c_int * 14)()
        plan_library().config_shape(number, shape)
        layout, *blocks, walks, scales, smem, plain, dropout, element_bytes, splits = shape
        flags = (bool(walks), bool(scales), smem, (bool(plain), bool(dropout)))
        types = (element_bytes, bool(splits))
        found.append(Config(number, names[number], layouts[layout], *blocks, *flags, *types))
    return tuple(found)
