"""Counters against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.conftest import KERNELS, ModuleLoader
from ptx.executor import Buffer, counter_row, counter_table, line_table
from ptx.executor.counters import Counts


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(1, 0, 4), (1, 1, 5), (2, 0, 8), (8, 0, 32), (32, 0, 32), (0, 0, 1)],
)
def test_sectors_of_a_strided_load(
    ptx_module: ModuleLoader, stride: int, offset: int, sectors: int
) -> None:
    x, y = Buffer(np.arange(2048, dtype=np.float32)), Buffer(np.zeros(32, np.float32))
    result = ptx_module("access_patterns.cu").launch(
        "copy_strided", 1, 32, [x, y, stride, offset], outputs=[y]
    )
    assert result.ok and (y.read() == np.arange(32) * stride + offset).all()
    loads, stores = result.counters.loads, result.counters.stores
    assert (loads.requests, loads.bytes, loads.sectors, loads.unique_sectors) == (
        1,
        128,
        sectors,
        sectors,
    )
    assert (stores.requests, stores.bytes, stores.sectors, stores.unique_sectors) == (1, 128, 4, 4)
    assert result.counters.unique_sectors == sectors + 4


def test_a_vector_load_is_one_request(ptx_module: ModuleLoader) -> None:
    x, y = Buffer(np.zeros(128, np.float32)), Buffer(np.zeros(128, np.float32))
    loads = ptx_module("access_patterns.cu").launch("copy_vector", 1, 32, [x, y]).counters.loads
    assert (loads.requests, loads.bytes, loads.sectors, loads.efficiency) == (1, 512, 16, 1.0)


def test_unique_sectors_count_what_is_read_again_once(ptx_module: ModuleLoader) -> None:
    """Three blocks read the same 128 bytes, store 128 bytes each and add to the same 32 bytes."""
    x, y = Buffer(np.ones(32, np.float32)), Buffer(np.zeros(96 + 32, np.float32))
    result = ptx_module("access_patterns.cu").launch("read_twice", 2, 32, [x, y])
    assert result.ok, result.report()
    c = result.counters
    assert (c.loads.sectors, c.loads.unique_sectors) == (8, 4)
    assert (c.stores.sectors, c.stores.unique_sectors) == (8, 8)
    assert (c.atomics.sectors, c.atomics.unique_sectors, c.atomics.requests) == (2, 1, 2)
    assert c.unique_sectors == 4 + 8 + 1


def test_counters_per_source_line(ptx_module: ModuleLoader) -> None:
    x, y = Buffer(np.ones(32, np.float32)), Buffer(np.zeros(96, np.float32))
    c = ptx_module("access_patterns.cu").launch("read_twice", 2, 32, [x, y]).counters

    def line(text: str) -> Counts:
        source = (KERNELS / "access_patterns.cu").read_text().splitlines()
        number = next(n for n, words in enumerate(source, 1) if text in words)
        return next(v for k, v in c.by_line.items() if getattr(k, "line", 0) == number)

    load, store = line("line A"), line("= first;")
    assert (load.loads.sectors, load.loads.unique_sectors, load.stores.sectors) == (8, 4, 0)
    assert (store.stores.sectors, store.stores.unique_sectors, store.loads.sectors) == (8, 8, 0)
    assert (
        load.warp_instructions > 0
        and sum(v.warp_instructions for v in c.by_line.values()) == c.warp_instructions
    )
    assert "access_patterns.cu" in line_table(c)


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1), (0, 1)]
)
def test_bank_conflicts_of_words(ptx_module: ModuleLoader, stride: int, wavefronts: int) -> None:
    result = ptx_module("access_patterns.cu").launch(
        "shared_strided", 1, 32, [Buffer(np.zeros(32, np.float32)), stride]
    )
    loads = result.counters.shared["ld"]
    assert result.ok and (loads.requests, loads.wavefronts, loads.ideal_wavefronts) == (
        1,
        wavefronts,
        1,
    )


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8), (8, 32), (9, 4)])
def test_bank_conflicts_of_vectors(ptx_module: ModuleLoader, stride: int, wavefronts: int) -> None:
    y = Buffer(np.zeros((32, 4), np.float32))
    result = ptx_module("access_patterns.cu").launch("shared_vector", 1, 32, [y, stride])
    loads = result.counters.shared["ld"]
    assert result.ok and (loads.requests, loads.wavefronts, loads.ideal_wavefronts) == (
        1,
        wavefronts,
        4,
    )


def test_instructions_per_opcode(ptx_module: ModuleLoader) -> None:
    x, y = Buffer(np.zeros(32, np.float32)), Buffer(np.zeros(32, np.float32))
    c = ptx_module("access_patterns.cu").launch("copy_strided", 1, 32, [x, y, 1, 0]).counters
    assert c.opcodes["ld.global.f32"] + c.opcodes["ld.global.nc.f32"] == 1
    assert c.opcodes["st.global.f32"] == c.opcodes["ret"] == 1 and c.opcodes["ld.param.u64"] == 2
    assert (
        c.warp_instructions == sum(c.opcodes.values())
        and c.thread_instructions == 32 * c.warp_instructions
    )


def test_counter_table(ptx_module: ModuleLoader) -> None:
    x, y = Buffer(np.zeros(32, np.float32)), Buffer(np.zeros(32, np.float32))
    c = ptx_module("access_patterns.cu").launch("copy_strided", 1, 32, [x, y, 0, 0]).counters
    row = counter_row("copy", c, compulsory_bytes=160)
    assert (row.unique_bytes, row.unique_ratio, row.l2_bytes, row.l2_ratio) == (160, 1.0, 160, 1.0)
    header, rule, line = counter_table([row]).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|") and "| copy | 160 |" in line
