"""Print what each kernel in an object file takes on each architecture; fail if one spills.

PYTHONPATH=tests python -m ptx.kernel_resources build/ci/kernels/.../grouped_gemm.cu.o
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ptx.machine_code import KernelName, Resources, cuobjdump, parse_resources

KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What an SM has. From the CUDA programming guide's table of compute capabilities."""

    warps: int
    smem_bytes: int
    """Of which each block takes 1 KiB beside its own."""


LIMITS = {
    "sm_80": Limits(64, 164 * KIB),
    "sm_86": Limits(48, 100 * KIB),
    "sm_89": Limits(48, 100 * KIB),
    "sm_90": Limits(64, 228 * KIB),
    "sm_100": Limits(64, 228 * KIB),
    "sm_120": Limits(48, 100 * KIB),
}
SM_REGISTERS = 65536


def blocks_per_sm(arch: str, registers: int, threads: int, smem_bytes: int) -> int:
    """How many blocks an SM holds at once."""
    limits, warps = LIMITS[arch], threads // 32
    warp_registers = -(-registers * 32 // 256) * 256  # handed out in units of 256
    return min(
        limits.warps // warps,
        SM_REGISTERS // warp_registers // warps,
        limits.smem_bytes // (smem_bytes + KIB),
    )


def resource_table(resources: list[Resources]) -> str:
    """Markdown: a row for each kernel; registers, blocks per SM and occupancy for each arch."""
    archs = [arch for arch in LIMITS if any(r.arch == arch for r in resources)]
    cells: dict[str, dict[str, str]] = {}
    heads: dict[str, tuple[int, str]] = {}
    for r in resources:
        name = KernelName.of(r.kernel)
        if name is None:
            continue
        c = name.config
        blocks = blocks_per_sm(r.arch, r.registers, c.threads, c.smem_bytes)
        warps = blocks * c.threads // 32
        occupancy = f"{warps / LIMITS[r.arch].warps:.0%}" if blocks else "not chosen"
        cells.setdefault(r.kernel, {})[r.arch] = f"{r.registers} / {blocks} / {occupancy}"
        smem = f"{c.smem_bytes / KIB:.1f}"
        dropout = "yes" if name.has_dropout else "no"
        heads[r.kernel] = (c.id, f"| {c} | {name.dtype} | {dropout} | {smem} |")
    lines = ["registers / blocks per SM / occupancy"]
    lines += ["| config | dtype | dropout | smem KiB | " + " | ".join(archs) + " |"]
    lines += ["|" + "---|" * (4 + len(archs))]
    for kernel in sorted(cells, key=lambda k: heads[k]):
        row = " | ".join(cells[kernel].get(arch, "") for arch in archs)
        lines.append(f"{heads[kernel][1]} {row} |")
    return "\n".join(lines)


def main(path: str) -> None:
    """Print the table and one line of summary."""
    resources = parse_resources(cuobjdump("--dump-resource-usage", path))
    if not resources:
        raise SystemExit(f"{path} holds no kernel")
    print(resource_table(resources))
    spills = [r for r in resources if r.spilled_bytes]
    for r in spills:
        print(f"{r.kernel} on {r.arch}: {r.spilled_bytes} bytes of stack or local memory")
    kernels, archs = {r.kernel for r in resources}, {r.arch for r in resources}
    summary = f"{len(kernels)} kernels on {len(archs)} architectures, {len(spills)} spill"
    print(f"{summary}, at most {max(r.registers for r in resources)} registers")
    if spills:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
