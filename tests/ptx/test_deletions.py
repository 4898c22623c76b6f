"""Delete every synchronisation instruction of correct kernels in turn: how many are noticed?

An instruction that also does something else (ld.acquire, st.release, atom.acq_rel) is made relaxed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from ptx import gemm_cases, test_hopper
from ptx.conftest import KERNELS, SummaryLines
from ptx.executor import Buffer, Kind, Module, Options, Result, compile_ptx, find_nvcc

SCHEDULES = [
    Options(time_limit=5),
    Options(adversarial=True, seed=1, time_limit=5),
    Options(adversarial=True, seed=2, time_limit=5),
]
SYNCHRONISES = re.compile(
    r"(@!?%p\d+\s+)?(bar\.|barrier\.|membar|fence|mbarrier|wgmma\.(fence|commit|wait)|cp\.async\.(bulk\.)?(commit|wait))"
)
ORDER = re.compile(r"\.(acquire|release|acq_rel)\.")


def run_gemm(module: Module, options: Options) -> Result:
    """Five K steps through three stages."""
    return gemm_cases.run_gemm(module, (65, 72, 160), options).result


def run_split(module: Module, options: Options) -> Result:
    """Two splits of five K steps."""
    return gemm_cases.run_split(module, "gemm_split_ordered", (65, 72, 320), 160, options).result


def run_wgmma(module: Module, options: Options) -> Result:
    """Nine K steps through three stages."""
    timing = test_hopper.AT_RANDOM if options.adversarial else test_hopper.AS_LATE_AS_POSSIBLE
    options = Options(
        adversarial=options.adversarial, seed=options.seed, bulk_copy_timing=timing, time_limit=5
    )
    return test_hopper.run_gemm(module, 130, 72, 520, options)[0]


def run_turns(module: Module, options: Options) -> Result:
    """Four blocks in turn."""
    args = [Buffer(np.zeros(n, np.int32)) for n in (1, 100)]
    name = next(n for n in module.entries if n.startswith("take_turns"))
    return module.launch(name, 4, 64, [*args, 100], options=options)


def run_softmax(module: Module, options: Options) -> Result:
    """Five rows, four warps each."""
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    y = Buffer(np.zeros(x.shape, np.uint16))
    return module.launch("row_softmax", 5, 128, [Buffer(x), y, 300], outputs=[y], options=options)


@dataclass(frozen=True)
class Study:
    """A correct kernel, and its deletions that go unnoticed, by opcode."""

    file: str
    arch: str
    entry: str
    run: Callable[[Module, Options], Result]
    unnoticed: dict[str, int]


# Why the rest goes unnoticed:
#   cp.async.wait_group  The wait after the main loop: the last step's wait has left only empty
#                        groups, so nothing is in flight. The instruction is redundant.
#   wgmma.fence          Orders register writes before wgmma reads them. The executor always keeps
#                        registers in order: a limit.
#   fence.mbarrier_init  Shows the initialisation to the async proxy and the cluster. The executor
#                        initialises barriers at once: a limit. A block barrier orders the warps.
#   mbarrier.arrive      The arrival of the last K step hands back a stage that nobody waits for.
#                        The instruction is redundant.
STUDIES = [
    Study("gemm_sm80.cu", "sm_80", "gemm_bf16", run_gemm, {"cp.async.wait_group": 1}),
    Study("gemm_sm80.cu", "sm_80", "gemm_split_ordered", run_split, {"cp.async.wait_group": 1}),
    Study("synchronisation.cu", "sm_80", "take_turns", run_turns, {}),
    Study("synchronisation.cu", "sm_80", "take_turns_fenced", run_turns, {}),
    Study("reductions.cu", "sm_80", "row_softmax", run_softmax, {}),
    Study(
        "gemm_sm90.cu",
        "sm_90a",
        "gemm_wgmma",
        run_wgmma,
        {
            "wgmma.fence.sync.aligned": 3,
            "fence.mbarrier_init.release.cluster": 1,
            "mbarrier.arrive.shared::cta.b64": 1,
        },
    ),
]
FRACTION_NOTICED = 56 / 63


def one_kernel(ptx: str, entry: str) -> list[str]:
    """The module's lines without its other kernels and without line information."""
    lines = [line for line in ptx.splitlines() if not line.lstrip().startswith(".loc")]
    starts = [n for n, line in enumerate(lines) if ".visible .entry" in line] + [len(lines)]
    first = next(n for n in starts if f".entry {entry}(" in lines[n])
    return lines[: starts[0]] + lines[first : starts[starts.index(first) + 1]]


def deletions(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(opcode, module text) with one synchronisation instruction deleted or made relaxed."""
    for n, line in enumerate(lines):
        for statement in line.split(";")[:-1]:
            words = statement.strip().lstrip("{ ")
            if SYNCHRONISES.match(words):
                changed = line.replace(statement + ";", "", 1)
            elif ORDER.search(words) and not words.startswith("//"):
                changed = ORDER.sub(".relaxed.", line)
            else:
                continue
            opcode = re.sub(r"^@!?%p\d+\s+", "", words).split()[0]
            yield opcode, "\n".join([*lines[:n], changed, *lines[n + 1 :]])


def is_noticed(study: Study, ptx: str) -> set[Kind]:
    """Findings of the first schedule that has any."""
    module = Module(ptx)
    return next((kinds for o in SCHEDULES if (kinds := study.run(module, o).kinds)), set())


def test_deleted_synchronisation_is_noticed(summary_lines: SummaryLines) -> None:
    if find_nvcc() is None:
        pytest.skip("nvcc is not on PATH")
    num_deleted = num_noticed = 0
    for study in STUDIES:
        lines = one_kernel(compile_ptx(KERNELS / study.file, study.arch), study.entry)
        assert all(study.run(Module("\n".join(lines)), o).ok for o in SCHEDULES), study.entry
        unnoticed: Counter[str] = Counter()
        for opcode, ptx in deletions(lines):
            num_deleted += 1
            unnoticed[opcode] += not is_noticed(study, ptx)
        num_noticed += sum(1 for _ in deletions(lines)) - unnoticed.total()
        assert dict(+unnoticed) == study.unnoticed, study.entry
    text = f"{num_noticed} of {num_deleted} deleted synchronisation instructions noticed"
    summary_lines.append(text)
    print(text)
    assert num_noticed / num_deleted >= FRACTION_NOTICED
