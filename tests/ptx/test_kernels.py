"""The grouped GEMM kernels, launched as csrc/cuda/plan.h says, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ptx.conftest import ModuleLoader, SummaryLines
from ptx.executor import Counters, Module, Options, counter_row, counter_table
from ptx.executor.counters import CounterRow
from ptx.executor.syntax import SourceLine
from ptx.f32_programs import F32_GROUPS
from ptx.gemm_programs import (
    BF16,
    F32,
    GROUPS,
    Group,
    Maker,
    backward_of_siblings,
    diagonal,
    dropped,
    expand,
    merge,
    shrink,
    wgrad,
)
from ptx.plan_library import configs
from ptx.planned_gemm import (
    CSRC,
    KERNELS,
    Device,
    Planned,
    ProblemCase,
    SegmentCase,
    check,
    kernel_name,
)
from rasa_ext import dropout_mask

ALL_GROUPS = [*GROUPS, *F32_GROUPS]
ADVERSARIAL = [Options(adversarial=True, seed=s) for s in (1, 2, 3)]


@pytest.fixture(scope="module")
def module(ptx_module: ModuleLoader) -> Module:
    return ptx_module(KERNELS, "sm_80", include=(CSRC,))


def plan(group: Group) -> Planned:
    types = (group.dtype, group.make(), group.scale_dtype)
    return Planned(group.layout, *types, group.device, group.is_full_precision)


def run_and_check(module: Module, group: Group, options: Options) -> Planned:
    planned = plan(group)
    for result in planned.run(module, options):
        assert result.ok, result.report()
    check(planned, group.layout)
    return planned


@pytest.mark.parametrize("group", ALL_GROUPS, ids=lambda g: g.name)
def test_a_group_is_right_in_every_schedule(module: Module, group: Group) -> None:
    for options in ADVERSARIAL:
        run_and_check(module, group, options)


def test_every_kernel_is_run_by_some_group(module: Module) -> None:
    run = {
        kernel_name(module, launch, group.dtype)
        for group in ALL_GROUPS
        for launch in plan(group).launches
    }
    assert run == set(module.entries)


SPLITS = [group for group in ALL_GROUPS if "split" in group.name]


@pytest.mark.parametrize("group", SPLITS, ids=lambda g: g.name)
def test_a_long_reduction_of_few_tiles_is_split(group: Group) -> None:
    outputs = sum(t.numel() for case in group.make() for t in case.C if isinstance(t, torch.Tensor))
    assert plan(group).workspace_bytes >= 2 * 4 * outputs


@pytest.mark.parametrize("name", ["split-R39-bf16-drop", "split-R39-f32-drop"])
@pytest.mark.parametrize("layout", ["NT", "TN"])
def test_a_split_sum_repeats_bit_by_bit(module: Module, layout: str, name: str) -> None:
    (group,) = (g for g in SPLITS if g.layout == layout and g.name.endswith(name))
    runs = [run_and_check(module, group, options) for options in ADVERSARIAL[:2]]
    assert runs[0].workspace_bytes > 0
    for first, second in zip(*(run.results() for run in runs), strict=True):
        assert torch.equal(first, second)


def deltas(count: int, N: int, dtype: torch.dtype = BF16) -> list[ProblemCase]:
    """Merges of many layers, with a pool for each of 7 kinds."""
    m = Maker(dtype)
    pools = [[m.stack(14, N), m.stack(14, 16)] for _ in range(7)]
    return [merge(m, N, 16, 14, pools[i % 7]) for i in range(count)]


def full_precision(name: str, make: Callable[[], list[ProblemCase]]) -> Group:
    return Group(name, "TN", make, F32, F32, is_full_precision=True)


def test_224_merges_take_two_launches() -> None:
    for group in (
        Group("merges", "TN", lambda: deltas(224, 168)),
        full_precision("merges-f32", lambda: deltas(224, 168, F32)),
    ):
        assert [launch.num_problems for launch in plan(group).launches] == [154, 70]


def test_224_merges_in_full_precision_are_right(module: Module) -> None:
    run_and_check(
        module, full_precision("merges-f32", lambda: deltas(224, 24, F32)), ADVERSARIAL[1]
    )


def test_a_product_of_split_operands_is_nearly_that_of_float32(module: Module) -> None:
    """hi and lo miss one unit of the last place at most, and lo · lo is left out."""
    m = Maker(F32)
    a, b, C = m.matrix(1, 150), m.matrix(1, 70), m.empty(150, 70)
    case = ProblemCase(150, 70, [SegmentCase([a], [b], 1)], [C])
    planned = Planned("TN", F32, [case], F32, is_full_precision=True)
    for result in planned.run(module, ADVERSARIAL[0]):
        assert result.ok, result.report()
    exact = a.double().T * b.double()
    errors = (planned.read(C).double() - exact).abs() / exact.abs()
    assert errors.max() <= 5 * 2.0**-23
    assert errors.square().mean().sqrt() <= 2.0**-23


def test_problems_that_fill_one_launch_continue_in_the_next(module: Module) -> None:
    def make() -> list[ProblemCase]:
        m = Maker()
        return [wgrad(m, 40, 24, 14, (True, True)) for _ in range(40)]

    planned = run_and_check(module, Group("gradients", "TN", make), ADVERSARIAL[0])
    assert [launch.num_problems for launch in planned.launches] == [22, 18]


def test_problems_of_different_forms_share_a_group(module: Module) -> None:
    """Two wgrads and a merge: one launch for each kernel, and nothing for what is empty."""

    def make() -> list[ProblemCase]:
        m = Maker()
        small, large = wgrad(m, 40, 72, 39, (True, True)), merge(m, 168, 72, 14)
        return [small, large, wgrad(m, 72, 40, 39, (True, True)), merge(m, 0, 8, 14)]

    planned = run_and_check(module, Group("mixed", "TN", make), ADVERSARIAL[1])
    assert [launch.num_problems for launch in planned.launches] == [2, 1]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("features", [(40,), (72, 40), (72, 40, 40)])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("R", [37, 39, 74, 78, 148, 156])
def test_gradients_of_a_layer_and_of_siblings_take_one_launch(
    R: int, drops: bool, features: tuple[int, ...], dtype: torch.dtype
) -> None:
    """dA; dBt and dd of each layer, whose ranks are fewer. Where they are split, all are."""
    cases = backward_of_siblings(R, features, drops, dtype, tokens=1000)
    count = 1 + 2 * len(features)
    for device, sums in ((Device(reduce_launch=1e9), []), (Device(1000, reduce_launch=0), [count])):
        planned = plan(Group("", "TN", lambda: cases, dtype, dtype, device))
        assert [launch.num_problems for launch in planned.launches] == [count, *sums]
        assert planned.launches[0].has_dropout == drops
        assert (planned.workspace_bytes > 0) == bool(sums)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("R", [7, 39, 78, 156, 1024])
def test_a_diagonal_takes_few_tiles_of_the_kernel_of_the_others(R: int, dtype: torch.dtype) -> None:
    """Tiles that begin on it, not all R x R, and no kernel wider than its neighbours need."""
    m = Maker(dtype)
    alone = [wgrad(m, 40, 72, 39, (True, True))]
    beside = [*alone, diagonal(m, 40, R)]
    device = Device(num_sms=1000, reduce_launch=1e9)
    plans = [plan(Group("", "TN", lambda c=c: c, dtype, dtype, device)) for c in (alone, beside)]
    (without,), (together,) = (planned.launches for planned in plans)
    assert together.config == without.config
    assert together.grid == without.grid + -(-R // configs()[without.config].block_m)


def test_gradients_of_many_layers_keep_the_kernels_of_their_ranks() -> None:
    """They fill launches anyway."""

    def make() -> list[ProblemCase]:
        m = Maker()
        return [wgrad(m, 40, 72, (39, 156)[i % 2], (True, True)) for i in range(40)]

    planned = plan(Group("", "TN", make))
    names = [configs()[launch.config].name for launch in planned.launches]
    assert set(names) == {"Wgrad48", "Wgrad160"} and names == sorted(names, key=len)
    assert sum(launch.num_problems for launch in planned.launches) == 40


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("layout", ["NT", "NN"])
def test_problems_of_unlike_ranks_share_the_kernel_of_the_widest(
    module: Module, layout: str, dtype: torch.dtype
) -> None:
    """Siblings between which ranks moved."""

    def make() -> list[ProblemCase]:
        m, form = Maker(dtype), shrink if layout == "NT" else expand
        return [form(m, 70, 72, R) for R in (39, 156, 7)]

    planned = run_and_check(module, Group("", layout, make, dtype, dtype), ADVERSARIAL[2])
    assert [launch.num_problems for launch in planned.launches] == [3]


@pytest.mark.parametrize("layout", ["NT", "NN", "TN"])
@pytest.mark.parametrize("with_C_in", [False, True])
def test_without_a_reduction_C_is_C_in(module: Module, layout: str, with_C_in: bool) -> None:
    m = Maker()
    segments = [SegmentCase([], [], 0)] if with_C_in else []
    C_in = m.matrix(20, 24)
    case = ProblemCase(20, 24, segments, [m.empty(20, 24)], [C_in] if with_C_in else [])
    planned = Planned(layout, m.dtype, [case], m.dtype)
    for result in planned.run(module, ADVERSARIAL[0]):
        assert result.ok, result.report()
    expected = C_in if with_C_in else torch.zeros(20, 24, dtype=m.dtype)
    assert torch.equal(planned.read(case.C[0]), expected)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("layout", ["NT", "NN", "TN"])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_draws_the_bits_of_the_cpu(
    module: Module, layout: str, p: float, dtype: torch.dtype
) -> None:
    """A product with the identity shows the mask itself."""
    n = 40
    ones, eye = torch.ones(n, n, dtype=dtype), torch.eye(n, dtype=dtype)
    A, B = (eye, ones) if layout == "TN" else (ones, eye)
    if layout == "NN":
        A, B = A[:, :1].contiguous(), ones[:1].contiguous()
    case = ProblemCase(
        n, n, [SegmentCase([A], [B], B.shape[0])], [torch.full_like(ones, torch.nan)]
    )
    case = dropped(case, p)
    planned = Planned(layout, dtype, [case], dtype)
    for result in planned.run(module, ADVERSARIAL[2]):
        assert result.ok, result.report()
    (segment,) = case.segments
    assert segment.seed is not None
    assert torch.equal(planned.read(case.C[0]) != 0, dropout_mask(segment.seed, n, n, p))


def test_what_no_kernel_does_is_refused() -> None:
    case = shrink(Maker(torch.float64), 8, 8, 7)
    with pytest.raises(ValueError, match="compute in bfloat16, float16 or float32"):
        Planned("NT", torch.float64, [case], torch.float64)
    m = Maker()
    rows = [m.matrix(1, 8) for _ in range(2040)]
    many = ProblemCase(2040, 8, [SegmentCase(rows, [m.matrix(8, 8)], 8)], [m.empty(2040, 8)])
    with pytest.raises(ValueError, match="at most 2038 row blocks"):
        Planned("NN", m.dtype, [many], m.dtype)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


FORMS: dict[str, tuple[str, Callable[[Maker, int], ProblemCase]]] = {
    "shrink": ("NT", lambda m, R: shrink(m, 512, 576, R)),
    "expand": ("NN", lambda m, R: expand(m, 512, 576, R)),
    "wgrad": ("TN", lambda m, R: wgrad(m, 512, 576, R, (True, True))),
    "merge": ("TN", lambda m, R: merge(m, 576, 512, R)),
}


def count(module: Module, form: str, R: int, dtype: torch.dtype) -> tuple[CounterRow, Counters]:
    device = Device(num_sms=16, reduce_launch=1e9)  # unsplit, and several tiles to some blocks
    layout, make = FORMS[form]
    case = make(Maker(dtype), R)
    planned = Planned(layout, dtype, [case], dtype, device, form == "merge" and dtype is F32)
    (result,) = planned.run(module)
    assert result.ok, result.report()
    operands = [t for s in case.segments for t in (*s.A, *s.B)]
    outputs = [t for t in case.C if not isinstance(t, int)]
    compulsory = _bytes(*operands, *case.C_in, *outputs)
    name = f"{form} R={R}" + (" f32" if dtype is F32 else "")
    return counter_row(name, result.counters, compulsory), result.counters


def test_counters(module: Module, summary_lines: SummaryLines) -> None:
    """DRAM delivers each operand once, L2 little more, and the loop has no bank conflicts."""
    rows = []
    for R in (39, 78, 156):
        for form in FORMS:
            row, counters = count(module, form, R, BF16)
            rows.append(row)
            assert row.unique_ratio <= 1.10 and row.l2_ratio <= 1.6, row
            for kind in ("ldmatrix", "cp.async"):
                if kind in counters.shared:
                    assert counters.shared[kind].conflict_factor == 1.0, (row, kind)
    summary_lines.extend(counter_table(rows).splitlines())


@pytest.mark.parametrize("form", FORMS)
def test_counters_of_float32(module: Module, summary_lines: SummaryLines, form: str) -> None:
    """As of 16 bits, but that L2 delivers more where no panel stays (f32_kernels.h says why)."""
    for R in (39, 156):
        row, counters = count(module, form, R, F32)
        summary_lines.extend(counter_table([row]).splitlines()[2:])
        assert row.unique_ratio <= 1.10 and row.l2_ratio <= 1.9, row
        assert counters.shared["cp.async"].conflict_factor == 1.0, row
        fragments = [
            traffic
            for line, counts in counters.by_line.items()
            if isinstance(line, SourceLine) and line.file.endswith("ptx.cuh")
            for kind, traffic in counts.shared.items()
            if kind == "ld"
        ]
        assert fragments and all(t.conflict_factor == 1.0 for t in fragments), row
