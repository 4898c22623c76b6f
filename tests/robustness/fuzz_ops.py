"""Feeds the ops arguments at random, right and wrong ones, and checks what comes back.

    python tests/robustness/fuzz_ops.py --trials 20000 --seed 1

A right call of rasa_linear, rasa_add, grouped_gemm or rasa_merge_ equals its formula in plain
torch, and so do its gradients. A wrong call raises one error. Nothing else may happen: no crash, no
internal assertion, no change of what is not written, no NaN from finite numbers, no finite number
where the formula has NaN. Each batch of trials is a process of its own; a crash is reported with
the seed that repeats it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gemm_trials import GemmTrial, MergeTrial  # noqa: E402
from reference import assert_accurate, dense  # noqa: E402
from trials import Arguments, LayerTrial, Trial  # noqa: E402

BATCH = 500
TRIALS: tuple[type[Trial], ...] = (LayerTrial, LayerTrial, GemmTrial, MergeTrial)


def _bits(t: Tensor | None) -> bytes:
    if t is None or t.device.type == "meta":
        return b""
    flat = t.detach().flatten().clone()
    return flat.view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _run(trial: Trial, is_ours: bool, dtype: torch.dtype | None) -> list[Tensor]:
    """The results and, of finite numbers, all gradients."""
    leaves: Arguments = {}
    for name, t in trial.arguments.items():
        leaf = t if t is None or dtype is None else t.to(dtype)
        if leaf is not None and not is_ours:
            (leaf,) = dense([leaf])
        wants_grad = trial.has_gradients and not (trial.wrong or trial.special)
        if leaf is not None and wants_grad:
            leaf = leaf.detach().requires_grad_()
        leaves[name] = leaf
    results = trial.call(leaves) if is_ours else trial.formula(leaves)
    if trial.wrong or trial.special or not trial.has_gradients:
        return results
    (y,) = results
    wrt = [t for t in leaves.values() if t is not None]
    # Random: of ones, all rows of a gradient would be alike, and one lucky rounding would be all.
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    dy = dy.to(trial.dtypes[0]).to(y.dtype)
    grads = torch.autograd.grad(y, wrt, dy, allow_unused=True)
    zipped = zip(wrt, grads, strict=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zipped)]


def _check(trial: Trial) -> str:
    """Make the call; return the kind of outcome, raise AssertionError for what may not happen."""
    before = {name: _bits(t) for name, t in trial.arguments.items()}
    if not trial.wrong:  # first: some ops write their arguments
        plain, exact = _run(trial, False, None), _run(trial, False, torch.float64)
    is_refused = False
    try:
        ours = _run(trial, True, None)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        is_refused, text = True, str(error)
        assert trial.wrong, f"a right call was refused: {text}"
        assert "INTERNAL ASSERT" not in text, text
        return "refused"
    finally:
        for name, t in trial.arguments.items():
            may_change = name in trial.written and not is_refused
            assert may_change or before[name] == _bits(t), f"{name} was changed"
    assert not trial.wrong, "a wrong call was accepted"
    names = [f"result {i}" for i in range(len(ours))]
    if trial.special:
        for y, y_plain, y_exact in zip(ours, plain, exact, strict=True):
            # Where float64 overflows as well, inf - inf is a matter of the order of additions.
            depends_on_order = trial.overflows and y_plain.dtype == torch.float64
            lost = y.isfinite() & y_exact.isnan()
            assert depends_on_order or not lost.any(), "a NaN was lost"
            agree = y.isfinite() | ~y_exact.isfinite() | ~y_plain.isfinite()
            assert trial.overflows or agree.all(), "an infinity from a finite result"
        return "special values"
    if trial.has_gradients:
        names = ["y", *(f"d{name}" for name, t in trial.arguments.items() if t is not None)]
    for what, out, p, e in zip(names, ours, plain, exact, strict=True):
        # The rule's yardstick is itself random: among thousands of small results some are lucky.
        assert_accurate(out, p, e, what, dtype=trial.dtypes[0], slack=4)
    return "right"


def run_batch(first: int, count: int) -> Counter[str]:
    """Run trials first … first + count - 1 in this process."""
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
    torch.set_num_threads(2)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        print(seed, file=sys.stderr, flush=True)
        trial = TRIALS[seed % len(TRIALS)](seed)
        trial.relayout()
        kind = trial.rng.random()
        if kind < 0.25:
            trial.make_wrong()
        elif kind < 0.4:
            trial.spoil_values()
        try:
            outcomes[f"{trial.op} {_check(trial)}"] += 1
        except AssertionError as error:
            print(f"seed {seed}: {trial.describe()}\n  {error}", flush=True)
            outcomes["WRONG"] += 1
    return outcomes


def run(trials: int, seed: int) -> Counter[str]:
    """Run batches in processes of their own and add up; WRONG and CRASH are failures."""
    total: Counter[str] = Counter()
    for first in range(seed, seed + trials, BATCH):
        count = min(BATCH, seed + trials - first)
        command = [sys.executable, __file__, "--batch", f"--seed={first}", f"--trials={count}"]
        done = subprocess.run(command, capture_output=True, text=True)
        *reports, last = done.stdout.splitlines() or [""]
        for line in reports:
            print(line)
        if done.returncode != 0:
            seeds = [line for line in done.stderr.splitlines() if line.lstrip("-").isdecimal()]
            where = f"trial {seeds[-1] if seeds else first}"
            print(f"{where}: the process ended with {done.returncode}\n{done.stderr[-2000:]}")
            total["CRASH"] += 1
        else:
            total.update(json.loads(last))
    return total


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--batch", action="store_true", help="run the trials in this process")
    args = parser.parse_args()
    if args.batch:
        print(json.dumps(run_batch(args.seed, args.trials)))
        return 0
    total = run(args.trials, args.seed)
    print(f"{sum(total.values())} calls: {dict(total)}")
    return int(total["WRONG"] + total["CRASH"] > 0)


if __name__ == "__main__":
    sys.exit(main())
