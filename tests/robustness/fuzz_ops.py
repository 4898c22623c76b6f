"""Feeds the ops arguments at random, right and wrong ones, and checks what comes back.

    python tests/robustness/fuzz_ops.py --trials 20000 --seed 1

A right call equals the authors' formula (reference.py). A wrong call raises one error that names
the op, or the dispatcher's. Nothing else may happen: no crash, no internal assertion, no change of
an argument, no NaN from finite numbers, no finite number where the formula has NaN. Each batch of
trials is a process of its own; a crash is reported with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layers import DTYPES  # noqa: E402
from reference import assert_accurate, authors_add, authors_linear  # noqa: E402

from rasa_ext import rasa_add, rasa_linear  # noqa: E402

BATCH = 500
SIZES = (0, 1, 2, 7, 15, 16, 17, 31, 64, 65, 100, 130)
RANKS = (0, 1, 3, 7, 8, 14, 28, 39, 78)
ARGUMENTS = {
    "rasa_linear": ("x", "weight", "bias", "A", "A_shared", "Bt", "Bt_shared", "d"),
    "rasa_add": ("x", "base", "A", "A_shared", "Bt", "Bt_shared", "d"),
}
Arguments = dict[str, Tensor | None]


class Trial:
    """One random call."""

    def __init__(self, seed: int) -> None:
        """Draw sizes, dtypes and values."""
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.op = self.rng.choice(("rasa_linear", "rasa_add"))
        self.dtypes = self.rng.choice(DTYPES)
        self.M, self.K, self.N = (self.rng.choice(SIZES) for _ in range(3))
        self.Rp, self.Rs = self.rng.choice(RANKS), self.rng.choice(RANKS)
        self.p = self.rng.choice((0.0, 0.0, 0.05, 0.5, 0.999))
        self.seed: Tensor | None = torch.tensor(self.rng.randrange(-(2**63), 2**63))
        self.wrong: list[str] = []
        self.special = self.overflows = False
        self.arguments = self._right_arguments()

    def _values(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=self.generator, dtype=torch.float64) * scale
        return values.to(dtype)

    def _right_arguments(self) -> Arguments:
        M, K, N, Rp, Rs = self.M, self.K, self.N, self.Rp, self.Rs
        x_dtype, dtype = self.dtypes
        scale, rank_scale = max(K, 1) ** -0.5, max(Rp + Rs, 1) ** -0.5
        right: Arguments = {"x": self._values(M, K, dtype=x_dtype)}
        if self.op == "rasa_linear":
            right["weight"] = self._values(N, K, dtype=x_dtype, scale=scale)
            right["bias"] = self._values(N, dtype=x_dtype) if self.rng.random() < 0.5 else None
        else:
            right["base"] = self._values(M, N, dtype=x_dtype)
        right |= {
            "A": self._values(Rp, K, dtype=dtype, scale=scale),
            "A_shared": self._values(Rs, K, dtype=dtype, scale=scale),
            "Bt": self._values(Rp, N, dtype=dtype, scale=rank_scale),
            "Bt_shared": self._values(Rs, N, dtype=dtype, scale=rank_scale),
            "d": self._values(Rs + Rp, dtype=dtype),
        }
        return right

    def relayout(self) -> None:
        """Put arguments into other memory layouts that are allowed."""
        for name, t in self.arguments.items():
            if t is None or t.dim() != 2 or self.rng.random() < 0.5:
                continue
            wide = torch.full((t.shape[0], t.shape[1] + 5), torch.nan, dtype=t.dtype)
            first = self.rng.randrange(6)
            wide[:, first : first + t.shape[1]] = t
            self.arguments[name] = wide[:, first : first + t.shape[1]]
        for name in ("x", "base"):  # these may have any strides
            t = self.arguments.get(name)
            if t is None or self.rng.random() < 0.7:
                continue
            kind = self.rng.choice(("transposed", "broadcast", "overlapping"))
            if kind == "transposed":
                self.arguments[name] = t.t().contiguous().t()
            elif kind == "broadcast" and t.shape[0] > 0:
                self.arguments[name] = t[:1].expand(t.shape)
            elif t.numel() > 0:
                flat = self._values(t.shape[0] + t.shape[1], dtype=t.dtype)
                self.arguments[name] = flat.as_strided(t.shape, (1, 1))
        if self.rng.random() < 0.1 and self.Rp == self.Rs:  # one tensor in two places
            self.arguments["A_shared"] = self.arguments["A"]
            self.arguments["Bt_shared"] = self.arguments["Bt"]

    def spoil_values(self) -> None:
        """Write NaN, infinities or huge numbers somewhere."""
        name = self.rng.choice([n for n, t in self.arguments.items() if t is not None])
        t = self.arguments[name]
        assert t is not None
        if t.numel() == 0 or 0 in t.stride():
            return
        huge = torch.finfo(t.dtype).max
        value = self.rng.choice((torch.nan, torch.inf, -torch.inf, huge))
        self.overflows = value == huge  # or not: that depends on the order of multiplications
        t[tuple(self.rng.randrange(n) for n in t.shape)] = value
        self.special = True

    def make_wrong(self) -> None:
        """Make one argument wrong."""
        names = [n for n, t in self.arguments.items() if t is not None]
        name = self.rng.choice(names)
        t = self.arguments[name]
        assert t is not None
        mutations: dict[str, Callable[[], Tensor]] = {
            "a row more": lambda: torch.cat([t, t.new_zeros(1, *t.shape[1:])]),
            "a dimension more": lambda: t[None],
            "integers": lambda: t.int(),
            "another device": lambda: t.to("meta"),
            "complex": lambda: t.to(torch.complex64),
        }
        if t.dim() == 2:
            mutations["a column more"] = lambda: torch.cat([t, t.new_zeros(t.shape[0], 1)], 1)
        kind = self.rng.choice((*mutations, "p", "no seed", "seed of two"))
        if kind == "p":
            self.p = self.rng.choice((-0.1, 1.0, 1.5, float("nan"), float("inf")))
        elif kind in ("no seed", "seed of two"):
            self.p = 0.5
            self.seed = None if kind == "no seed" else torch.zeros(2, dtype=torch.int64)
        elif (name, kind) == ("x", "a row more") and self.op == "rasa_linear":
            return  # right: another M
        else:
            self.arguments[name] = mutations[kind]()
        self.wrong.append(f"{name}: {kind}")

    def describe(self) -> str:
        """What a report names."""
        shapes = {n: None if t is None else (*t.shape,) for n, t in self.arguments.items()}
        return f"{self.op} {self.dtypes} p={self.p} {shapes} wrong={self.wrong}"


def _bits(t: Tensor | None) -> bytes:
    if t is None or t.device.type == "meta":
        return b""
    flat = t.detach().flatten().clone()
    return flat.view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _run(op: Callable[..., Tensor], trial: Trial, dtype: torch.dtype | None) -> list[Tensor]:
    """The result and, of finite numbers, all gradients."""
    leaves = []
    for t in trial.arguments.values():
        leaf = t if t is None or dtype is None else t.to(dtype)
        wants_grad = leaf is not None and leaf.is_floating_point() and not trial.wrong
        leaves.append(leaf.detach().requires_grad_(wants_grad) if leaf is not None else None)
    y = op(*leaves, p=trial.p, seed=trial.seed)
    if trial.wrong or trial.special:
        return [y.detach()]
    dy = torch.ones(y.shape, dtype=y.dtype)
    wrt = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(y, wrt, dy, allow_unused=True)
    zipped = zip(wrt, grads, strict=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zipped)]


def _check(trial: Trial) -> str:
    """Make the call; return the kind of outcome, raise AssertionError for what may not happen."""
    op = rasa_linear if trial.op == "rasa_linear" else rasa_add
    formula = authors_linear if trial.op == "rasa_linear" else authors_add
    before = [_bits(t) for t in trial.arguments.values()]
    try:
        ours = _run(op, trial, None)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        text = str(error)
        assert trial.wrong, f"a right call was refused: {text}"
        assert "INTERNAL ASSERT" not in text, text
        return "refused"
    finally:
        assert before == [_bits(t) for t in trial.arguments.values()], "an argument was changed"
    assert not trial.wrong, "a wrong call was accepted"
    plain = _run(formula, trial, None)
    exact = _run(formula, trial, torch.float64)
    if trial.special:
        finite = exact[0].isfinite()
        y = ours[0]
        assert not (y.isfinite() & exact[0].isnan()).any(), "a NaN was lost"
        agree = y.isfinite() | ~finite | ~plain[0].isfinite()
        assert trial.overflows or agree.all(), "an infinity from a finite result"
        return "special values"
    given = [name for name, t in trial.arguments.items() if t is not None]
    for what, out, p, e in zip(("y", *given), ours, plain, exact, strict=True):
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
        trial = Trial(seed)
        trial.relayout()
        kind = trial.rng.random()
        if kind < 0.25:
            trial.make_wrong()
        elif kind < 0.4:
            trial.spoil_values()
        try:
            outcomes[_check(trial)] += 1
        except AssertionError as error:
            print(f"seed {seed}: {trial.describe()}\n  {error}", flush=True)
            outcomes["WRONG"] += 1
    return outcomes


def main() -> int:
    """Run batches in processes of their own and add up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--batch", action="store_true", help="run the trials in this process")
    args = parser.parse_args()
    if args.batch:
        print(json.dumps(run_batch(args.seed, args.trials)))
        return 0
    total: Counter[str] = Counter()
    for first in range(args.seed, args.seed + args.trials, BATCH):
        count = min(BATCH, args.seed + args.trials - first)
        command = [sys.executable, __file__, "--batch", f"--seed={first}", f"--trials={count}"]
        run = subprocess.run(command, capture_output=True, text=True)
        *reports, last = run.stdout.splitlines() or [""]
        for line in reports:
            print(line)
        if run.returncode != 0:
            seeds = [line for line in run.stderr.splitlines() if line.lstrip("-").isdecimal()]
            where = f"trial {seeds[-1] if seeds else first}"
            print(f"{where}: the process ended with {run.returncode}\n{run.stderr[-2000:]}")
            total["CRASH"] += 1
        else:
            total.update(json.loads(last))
    print(f"{sum(total.values())} calls: {dict(total)}")
    return int(total["WRONG"] + total["CRASH"] > 0)


if __name__ == "__main__":
    sys.exit(main())
