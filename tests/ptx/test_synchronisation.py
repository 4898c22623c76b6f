"""Barriers, races, hangs and the order between blocks: correct forms pass, each defect is named."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from ptx.conftest import ModuleLoader
from ptx.executor import Buffer, Kind, Options, Result

SCHEDULES = [Options(), Options(adversarial=True, seed=1), Options(adversarial=True, seed=2)]
each_schedule = pytest.mark.parametrize("options", SCHEDULES, ids=["plain", "seed1", "seed2"])


def ints(n: int, value: int = 0) -> Buffer:
    """A buffer of n equal integers."""
    return Buffer(np.full(n, value, np.int32))


@each_schedule
def test_barrier_in_a_divergent_branch_is_named(ptx_module: ModuleLoader, options: Options) -> None:
    kernel = ptx_module("synchronisation.cu").kernel("barrier_in_branch")
    assert kernel.launch(1, 64, [ints(64), 64], options=options).ok
    assert Kind.DIVERGENT in kernel.launch(1, 64, [ints(64), 16], options=options).kinds


def test_barrier_after_the_exit_of_some_lanes_is_named(ptx_module: ModuleLoader) -> None:
    kernel = ptx_module("synchronisation.cu").kernel("barrier_after_exit")
    assert kernel.launch(1, 64, [ints(64), 64]).ok
    assert kernel.launch(1, 64, [ints(64), 32]).ok  # a whole warp may leave
    assert Kind.DIVERGENT in kernel.launch(1, 64, [ints(64), 40]).kinds


@each_schedule
def test_crossed_barriers_are_a_deadlock(ptx_module: ModuleLoader, options: Options) -> None:
    result = ptx_module("synchronisation.cu").launch(
        "crossed_barriers", 1, 64, [ints(64)], options=options
    )
    assert result.kinds == {Kind.DEADLOCK} and not result.ended
    assert (
        "warp 0 of block 0" in result.findings[0].message
        and "PTX line" in result.findings[0].message
    )


def test_spinning_on_a_flag_that_nobody_sets_is_a_deadlock(ptx_module: ModuleLoader) -> None:
    kernel = ptx_module("synchronisation.cu").kernel("wait_for_flag")
    assert kernel.launch(1, 32, [ints(1, 1), ints(32)]).ok
    assert kernel.launch(1, 32, [ints(1, 0), ints(32)]).kinds == {Kind.DEADLOCK}


def test_the_watchdog_ends_a_kernel_that_runs_for_ever(ptx_module: ModuleLoader) -> None:
    result = ptx_module("synchronisation.cu").launch(
        "count_for_ever", 1, 32, [ints(32)], options=Options(time_limit=0.3)
    )
    assert result.kinds == {Kind.WATCHDOG} and not result.ended and result.seconds < 2
    assert result.findings[0].source and result.findings[0].source.file.endswith(
        "synchronisation.cu"
    )


def children() -> list[int]:
    """Process ids of this process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    ("signal_number", "kind"), [(signal.SIGSEGV, Kind.CRASH), (signal.SIGSTOP, Kind.WATCHDOG)]
)
def test_a_child_that_dies_or_hangs_is_a_finding(
    ptx_module: ModuleLoader, signal_number: signal.Signals, kind: Kind
) -> None:
    kernel = ptx_module("synchronisation.cu").kernel("count_for_ever")
    before = set(children())

    def strike() -> None:
        (child,) = set(children()) - before
        os.kill(child, signal_number)

    threading.Timer(0.2, strike).start()
    result = kernel.launch(1, 32, [ints(32)], options=Options(time_limit=0.5))
    assert result.kinds == {kind} and not result.ended and result.seconds < 5


@each_schedule
def test_missing_barrier_between_warps_is_a_race(
    ptx_module: ModuleLoader, options: Options
) -> None:
    x = Buffer(np.arange(64, dtype=np.int32))

    def run(*defines: str) -> Result:
        return ptx_module("synchronisation.cu", "sm_80", *defines).launch(
            "rotate", 1, 64, [x, ints(64)], options=options
        )

    assert run().ok
    races = {Kind.SHARED_READ_AFTER_WRITE, Kind.SHARED_WRITE_AFTER_READ, Kind.UNINITIALISED}
    assert run("SEED_NO_BARRIER").kinds & races


@each_schedule
def test_missing_syncwarp_is_a_race_within_the_warp(
    ptx_module: ModuleLoader, options: Options
) -> None:
    x = Buffer(np.arange(32, dtype=np.int32))

    def run(*defines: str) -> Result:
        module = ptx_module("synchronisation.cu", "sm_80", *defines)
        return module.launch("rotate_in_warp", 1, 32, [x, ints(32)], options=options)

    assert run().ok
    assert run("SEED_NO_SYNCWARP").kinds & {Kind.WARP_RACE, Kind.UNINITIALISED}


def test_reading_uninitialised_shared_memory_is_named(ptx_module: ModuleLoader) -> None:
    kernel = ptx_module("synchronisation.cu").kernel("read_uninitialised")
    assert kernel.launch(1, 64, [ints(64), 64]).ok
    result = kernel.launch(1, 64, [ints(64), 63])
    assert result.kinds == {Kind.UNINITIALISED} and result.findings[0].thread == 63


@each_schedule
def test_exchange_through_global_memory_needs_a_barrier(
    ptx_module: ModuleLoader, options: Options
) -> None:
    def run(*defines: str) -> Result:
        module = ptx_module("synchronisation.cu", "sm_80", *defines)
        return module.launch("exchange_in_global", 1, 64, [ints(64), ints(64)], options=options)

    assert run().ok
    assert run("SEED_NO_BARRIER").kinds == {Kind.GLOBAL_RACE}


@each_schedule
@pytest.mark.parametrize("resident", [1, 2])
def test_reading_what_another_block_stores_is_named(
    ptx_module: ModuleLoader, resident: int, options: Options
) -> None:
    """Whichever block runs first: a write after the unordered read is the same race."""
    options = Options(adversarial=options.adversarial, seed=options.seed, resident_blocks=resident)
    result = ptx_module("synchronisation.cu").launch(
        "read_neighbour", 2, 32, [ints(64), ints(64)], options=options
    )
    assert result.kinds == {Kind.BLOCK_ORDER}


@each_schedule
@pytest.mark.parametrize("kernel", ["take_turns", "take_turns_fenced"])
def test_blocks_in_turn_need_release_and_acquire(
    ptx_module: ModuleLoader, kernel: str, options: Options
) -> None:
    def run(*defines: str) -> tuple[Result, np.ndarray]:
        x = ints(100)
        module = ptx_module("synchronisation.cu", "sm_80", *defines)
        return module.launch(kernel, 4, 64, [ints(1), x, 100], options=options), x.read()

    result, x = run()
    assert result.ok, result.report()
    assert (x == 11).all()  # ((0·2 + 0)·2 + 1)·2 + 2)·2 + 3
    seeds = ["SEED_NO_RELEASE", "SEED_NO_ACQUIRE"] + (
        ["SEED_BLOCK_SCOPE"] if kernel == "take_turns" else []
    )
    for seed in seeds:
        assert run(seed)[0].kinds == {Kind.BLOCK_ORDER}, seed


def test_blocks_that_wait_for_one_that_is_not_resident_deadlock(ptx_module: ModuleLoader) -> None:
    result = ptx_module("synchronisation.cu").launch(
        "take_turns", 2, 64, [ints(1, 1), ints(8), 8], options=Options(resident_blocks=1)
    )
    assert result.kinds == {Kind.DEADLOCK}
