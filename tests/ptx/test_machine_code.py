"""The parsers of cuobjdump's answers, and what ptxas makes of the main loops."""

from __future__ import annotations

import pytest

from ptx.conftest import SKIP_REASON
from ptx.executor import find_nvcc
from ptx.kernel_resources import LIMITS, blocks_per_sm, resource_table
from ptx.kernel_source import compile_kernels
from ptx.machine_code import KernelName, Loop, cuobjdump, parse_loops, parse_resources
from ptx.plan_library import Config, configs

KERNEL = "_ZN4rasa4cuda17grouped_gemm_sm80ILNS0_8ConfigIdE{}E{}Lb{}EEEvNS0_10KernelArgsE"
SHRINK, DROPS = KERNEL.format(0, "13__nv_bfloat16", 0), KERNEL.format(0, "6__half", 1)
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {SHRINK}:
  REG:134 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:39544 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {DROPS}:
  REG:255 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:39544 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Function {SHRINK}:
  REG:128 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:39544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
arch = sm_80
\t\tFunction : {SHRINK}
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
                                                             /* 0x000fc40000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128.ZFILL [R1], [R2.64], P0 ;
        /*0020*/                   LDGSTS.E [R1], [R2.64] ;
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/              @!P1 BRA 0x10 ;
        /*0090*/               @P2 BRA 0x0 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
\t\tFunction : reduce
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/               @P0 BRA 0x0 ;
"""


def test_resources_are_read_by_architecture() -> None:
    found = parse_resources(RESOURCES)
    assert [(r.arch, r.kernel, r.registers, r.spilled_bytes) for r in found] == [
        ("sm_80", SHRINK, 134, 0),
        ("sm_80", DROPS, 255, 32),
        ("sm_90", SHRINK, 128, 0),
    ]


def test_the_table_has_a_row_for_each_kernel_and_a_column_for_each_architecture() -> None:
    *_, plain, drops = resource_table(parse_resources(RESOURCES)).splitlines()
    assert str(configs()[0]) in plain
    assert "bf16 | no" in plain and "134 / 1 / 6%" in plain and "128 / 2 / 12%" in plain
    assert "f16 | yes" in drops and "255 / 1 / 6%" in drops


@pytest.mark.parametrize("limit", ["registers", "threads", "smem_bytes"])
def test_occupancy_is_that_of_the_scarcest_resource(limit: str) -> None:
    plenty = {"registers": 32, "threads": 128, "smem_bytes": 1024}
    scarce = {"registers": 255, "threads": 1024, "smem_bytes": 99 * 1024}[limit]
    expected = {"registers": 2, "threads": 2, "smem_bytes": 1}[limit]
    assert blocks_per_sm("sm_80", **{**plenty, limit: scarce}) == expected


def test_a_kernel_fits_every_sm_but_those_too_small_for_it() -> None:
    for c in configs():
        needs_large = c.smem_bytes > 99 * 1024
        for arch, limits in LIMITS.items():
            fits = blocks_per_sm(arch, 255, c.threads, c.smem_bytes) >= 1
            assert fits == (not needs_large or limits.smem_bytes > 100 * 1024), (c, arch)


def test_the_innermost_loop_with_mma_is_read() -> None:
    assert parse_loops(SASS) == [Loop("sm_80", SHRINK, 8, 3, 1, 1, 1, 2)]


def by_name(name: str) -> Config:
    return next(c for c in configs() if c.name == name)


@pytest.mark.skipif(find_nvcc() is None, reason=SKIP_REASON)
def test_main_loops_copy_16_bytes_at_once_and_multiply_no_more_than_the_config_says() -> None:
    names = ["Shrink40", "Shrink160Tall", "Expand48", "Wgrad160", "WgradScaled128", "Merge160Wide"]
    names += ["F32Shrink40", "F32Expand", "F32Wgrad160", "F32Merge"]
    kernels = [(by_name(name), False) for name in names]
    fatbin = compile_kernels(kernels, "sm_80")
    loops = parse_loops(cuobjdump("-sass", str(fatbin)))
    assert len(loops) == len(kernels)
    for loop in loops:
        name = KernelName.of(loop.kernel)
        assert name is not None
        c = name.config
        assert (loop.hmma, loop.ldsm) == (c.mma, c.ldmatrix), loop
        chunks = [rows * c.block_k * c.element_bytes // 16 for rows in (c.block_m, c.block_n)]
        copies = [-(-count // c.threads) for count in chunks]
        expected = 2 if c.walks else sum(copies)  # a walk's copies are loops
        assert (loop.ldgsts_128, loop.ldgsts_other) == (expected, 0), loop
    resources = parse_resources(cuobjdump("--dump-resource-usage", str(fatbin)))
    assert not any(r.spilled_bytes for r in resources)
