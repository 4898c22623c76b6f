"""Each defect planted in a correct kernel is caught under the name of its finding."""

from __future__ import annotations

import pytest

from ptx.conftest import ModuleLoader
from ptx.executor import Kind, Options
from ptx.gemm_cases import Run, run_gemm, run_split

SHAPE = (65, 72, 160)  # ragged rows and columns; five K steps through three stages
SCHEDULES = [Options(), Options(adversarial=True, seed=1), Options(adversarial=True, seed=2)]
SCHEDULE_IDS = ["plain", "seed1", "seed2"]

GEMM_SEEDS = {
    "SEED_NO_WAIT": {Kind.UNFINISHED_COPY},
    "SEED_WAIT_OFF_BY_ONE": {Kind.UNFINISHED_COPY},
    "SEED_NO_BARRIER": {Kind.SHARED_READ_AFTER_WRITE, Kind.SHARED_WRITE_AFTER_READ},
    "SEED_EARLY_REUSE": {Kind.UNFINISHED_COPY, Kind.SHARED_WRITE_AFTER_READ},
    "SEED_LOST_ROW_PREDICATE": {Kind.OUT_OF_BOUNDS},
    "SEED_STORE_PAST_LAST_ROW": {Kind.OUT_OF_BOUNDS},
}


@pytest.mark.parametrize("options", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("seed", GEMM_SEEDS)
def test_defect_of_the_gemm_is_named(ptx_module: ModuleLoader, seed: str, options: Options) -> None:
    result = run_gemm(ptx_module("gemm_sm80.cu", "sm_80", seed), SHAPE, options).result
    assert result.kinds & GEMM_SEEDS[seed], result.report()
    named = next(f for f in result.findings if f.kind in GEMM_SEEDS[seed])
    assert named.line and named.source and named.source.file.endswith("gemm_sm80.cu")


def test_unfinished_copies_show_in_the_numbers_too(ptx_module: ModuleLoader) -> None:
    """With race checks off, the poison of copies under way still spoils the result."""
    for seed in ("SEED_NO_WAIT", "SEED_WAIT_OFF_BY_ONE", "SEED_NO_BARRIER"):
        run = run_gemm(ptx_module("gemm_sm80.cu", "sm_80", seed), SHAPE, Options(check_races=False))
        assert not run.error < 1


def test_swapped_operands_are_a_wrong_result(ptx_module: ModuleLoader) -> None:
    """No access is wrong: the comparison with the exact result must name it."""
    module = ptx_module("gemm_sm80.cu", "sm_80", "SEED_SWAPPED_OPERANDS")
    result = run_gemm(module, SHAPE, check_values=True).result
    assert result.kinds == {Kind.WRONG_RESULT}, result.report()
    assert run_gemm(ptx_module("gemm_sm80.cu"), SHAPE, check_values=True).result.ok


def test_missing_swizzle_is_a_bank_conflict(ptx_module: ModuleLoader) -> None:
    options = Options(max_conflict_factor=1.0)
    good = run_gemm(ptx_module("gemm_sm80.cu"), (128, 128, 128), options)
    module = ptx_module("gemm_sm80.cu", "sm_80", "SEED_NO_SWIZZLE")
    bad = run_gemm(module, (128, 128, 128), options)
    assert good.result.ok, good.result.report()
    assert bad.result.kinds == {Kind.BANK_CONFLICT} and bad.error == good.error
    assert bad.result.counters.shared["ldmatrix"].conflict_factor == 4.0
    assert {f.op.split(".")[0] for f in bad.result.findings} == {"ldmatrix"}


@pytest.mark.parametrize("options", SCHEDULES, ids=SCHEDULE_IDS)
def test_plus_equals_instead_of_an_atomic_is_named(
    ptx_module: ModuleLoader, options: Options
) -> None:
    module = ptx_module("gemm_sm80.cu", "sm_80", "SEED_PLUS_EQUALS")
    result = run_split(module, "gemm_split_atomic", (64, 64, 128), 32, options).result
    assert Kind.BLOCK_ORDER in result.kinds, result.report()


SPLIT_SEEDS = ["SEED_NO_RELEASE", "SEED_NO_ACQUIRE", "SEED_NO_BARRIER_BEFORE_RELEASE"]


@pytest.mark.parametrize("options", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("seed", SPLIT_SEEDS)
def test_split_without_release_or_acquire_is_named(
    ptx_module: ModuleLoader, seed: str, options: Options
) -> None:
    run: Run = run_split(
        ptx_module("gemm_sm80.cu", "sm_80", seed), "gemm_split_ordered", SHAPE, 32, options
    )
    assert Kind.BLOCK_ORDER in run.result.kinds, run.result.report()
    finding = next(f for f in run.result.findings if f.kind is Kind.BLOCK_ORDER)
    assert finding.op.startswith("ld.global") and finding.other_op.startswith("st.global")
    assert finding.block != finding.other_block
