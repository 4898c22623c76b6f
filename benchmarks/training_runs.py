"""Training runs that the quality benchmarks share: a model, its problems, a run, the file of all.

The model is SmolLM2-135M-Instruct, cut to its first layers where --layers says so: a shortened
model has lost what its later layers did, so most of what a run learns is to do without them. Runs
with one seed see the same problems in the same order, whatever the method; the held-out problems
are the same for all seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import REPOSITORY, write_json
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(REPOSITORY / "examples"))

from code_problems import code_examples, epochs  # noqa: E402
from evaluation import exact_match  # noqa: E402
from gsm_symbolic import IGNORED, Batch, Example, GsmSymbolic, collate, pad_token  # noqa: E402
from language_model import DTYPES, load_model, load_tokenizer  # noqa: E402
from smollm2 import model_folder  # noqa: E402
from training import learning_rate  # noqa: E402

DATASETS = ("gsm_symbolic", "code")
EVALUATION_BATCH = 8
# What every run depends on; a benchmark adds its own.
SETTINGS = (
    *("layers", "dtype", "steps", "batch_size", "gsm_tokens", "code_tokens"),
    *("r", "alpha", "dropout", "validation_problems", "test_problems"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the runs of all quality benchmarks depend on."""
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: SmolLM2-135M of the package)")
    add("--layers", type=int, default=8, help="keep the first N layers only")
    add("--dtype", choices=DTYPES, default="bf16", help="of the frozen model")
    add("--steps", type=int, default=150)
    add("--batch-size", type=int, default=4)
    add("--gsm-tokens", type=int, default=160, help="leave out longer gsm_symbolic problems")
    add("--code-tokens", type=int, default=256, help="leave out longer HumanEval problems")
    add("--r", type=int, default=8)
    add("--alpha", type=float, default=16)
    add("--dropout", type=float, default=0.05)
    add("--seeds", type=int, default=3)
    add("--validation-problems", type=int, default=24, help="choose the learning rate")
    add("--test-problems", type=int, default=48, help="held out from every choice")
    add("--threads", type=int, default=None, help="torch's threads")
    add("--json", type=Path, help="default: a file in results/; plot beside it")
    parser.set_defaults(device="cpu")


def settings_of(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Return the settings that all runs of a file must share."""
    model = "SmolLM2-135M-Instruct" if args.model is None else args.model.name
    return {"model": model} | {name: getattr(args, name) for name in (*SETTINGS, *more)}


def folder_of(args: argparse.Namespace) -> Path:
    """Return the model's folder, made from the package if need be."""
    return args.model or model_folder(REPOSITORY / "demo" / "SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Problems:
    """Batches of one data set: of training by step, and the two held-out parts.

    answerable: the test part as problems to answer, where a reply can be scored.
    """

    training: Callable[[int], Batch]
    validation: list[Batch]
    test: list[Batch]
    answerable: GsmSymbolic | None


def load_problems(dataset: str, folder: Path, seed: int, args: argparse.Namespace) -> Problems:
    """Return a data set's problems; `seed` draws those of training alone."""
    tokenizer = load_tokenizer(folder)
    held_out, cut = args.validation_problems + args.test_problems, args.validation_problems
    answerable = None
    if dataset == "gsm_symbolic":
        data = GsmSymbolic(
            tokenizer,
            seed=seed,
            max_tokens=args.gsm_tokens,
            batch_size=args.batch_size,
            held_out=held_out,
            held_out_seed=0,
        )
        examples, answerable = data.held_out, data
        data.held_out = examples[cut:]

        def training(step: int) -> Batch:
            return data.training_batches(step, 1)[0]

    else:
        examples = code_examples(tokenizer, args.code_tokens)
        examples, rest = examples[:held_out], examples[held_out:]
        if not rest:
            raise SystemExit(
                f"training_runs: --validation-problems + --test-problems must leave HumanEval "
                f"problems to train on, got {held_out} of {len(examples)}"
            )
        drawn = epochs(rest, args.steps * args.batch_size, seed)

        def training(step: int) -> Batch:
            start = step * args.batch_size
            return collate(drawn[start : start + args.batch_size], pad_token(tokenizer))

    def batches(part: list[Example]) -> list[Batch]:
        # Of like lengths, so that little is padded.
        part = sorted(part, key=lambda e: len(e.prompt) + len(e.answer))
        starts = range(0, len(part), EVALUATION_BATCH)
        return [collate(part[i : i + EVALUATION_BATCH], pad_token(tokenizer)) for i in starts]

    return Problems(training, batches(examples[:cut]), batches(examples[cut:]), answerable)


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the answer tokens, and their number.

    The vocabulary's product, half of a shortened model's work, is done for answer tokens alone.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    answers = labels != IGNORED
    logits = model.lm_head(hidden[answers]).float()
    return F.cross_entropy(logits, labels[answers], reduction="sum"), batch.answers


@torch.inference_mode()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean cross-entropy per answer token, without dropout."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        loss, count = answer_loss(model, batch)
        total, tokens = total + loss.item(), tokens + count
    return total / tokens


def exact_matches(model: nn.Module, problems: Problems) -> dict[str, int]:
    """Return how many test problems were answered, greedily, and rightly; {} without a score."""
    data = problems.answerable
    if data is None:
        return {}
    answered = len(data.held_out)
    share, _ = exact_match(model, data, torch.device("cpu"), answered)
    return {"answered": answered, "right": round(share * answered)}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    problems: Problems,
    args: argparse.Namespace,
    *,
    lr: float,
    seed: int,
    allocator: Any = None,
) -> dict[str, Any]:
    """Train for args.steps steps and return losses and times.

    train_loss is the mean over the last tenth of the steps, before each step's update and with
    dropout. allocator_share is the allocator's part of the steps' seconds.
    """
    schedule = argparse.Namespace(steps=args.steps, lr=lr)
    losses, seconds, in_allocator = [], 0.0, 0.0
    model.train()
    for step in range(args.steps):
        batch = problems.training(step)
        # Dropout depends on seed and step alone.
        torch.manual_seed((seed << 32) + step)
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(step, schedule)
        total, count = answer_loss(model, batch)
        loss = total / count
        loss.backward()
        optimizer.step()
        if allocator is not None:
            allocation = time.perf_counter()
            allocator.step()
            in_allocator += time.perf_counter() - allocation
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
    tail = losses[-max(1, args.steps // 10) :]
    return {
        "validation": mean_loss(model, problems.validation) if problems.validation else None,
        "test": mean_loss(model, problems.test),
        "train_loss": statistics.mean(tail),
        "losses": [round(loss, 5) for loss in losses],
        "step_seconds": seconds / args.steps,
        "allocator_share": in_allocator / seconds,
    }


def load(folder: Path, args: argparse.Namespace) -> nn.Module:
    """Load the model with args.layers layers in args.dtype."""
    return load_model(folder, args)


class RunFile:
    """The finished runs of a benchmark, in its JSON file from the moment each is done.

    A benchmark that was stopped goes on where it stopped.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read the runs of an earlier call; exit if they were made with other settings."""
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            content = json.loads(path.read_text())
            if content["settings"] != self.settings:
                raise SystemExit(
                    f"{path.name} holds runs with {content['settings']}, got {self.settings}. Name "
                    "another file with --json"
                )
            self.runs = content["runs"]

    def run(self, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """Return the run of this key: the stored one, or else a new one, which is stored."""
        for run in self.runs:
            if all(run[name] == value for name, value in key.items()):
                return run
        print(", ".join(f"{name} {value}" for name, value in key.items()), "...", flush=True)
        result = key | make()
        self.runs.append(result)
        write_json(self.path, self.settings, {"runs": self.runs})
        return result


def mean_and_deviation(values: list[float], digits: int = 4) -> str:
    """`mean ± standard deviation`; the mean alone of one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def smooth_mean(curves: list[list[float]], window: int) -> list[float]:
    """Return the mean of curves of equal length, averaged over the last `window` steps."""
    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
    return [statistics.mean(means[max(0, i - window + 1) : i + 1]) for i in range(len(means))]
