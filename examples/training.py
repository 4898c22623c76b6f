"""The training loop."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from evaluation import answer_loss
from gsm_symbolic import GsmSymbolic
from interruption import Interruption
from torch import nn
from training_state import TrainingState
from workers import Workers


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of --lr."""
    warmup = max(1, args.steps // 10)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def add_gradients(
    engine: nn.Module, data: GsmSymbolic, step: int, workers: Workers, accumulate: int
) -> tuple[float, int]:
    """Add the gradient of the step's loss per answer token; return that loss and all tokens.

    The step's problems are cut into `accumulate` batches for each process.
    """
    batches = data.training_batches(step, workers.size * accumulate)
    answers = sum(batch.answers for batch in batches)
    mine = batches[workers.rank :: workers.size]
    total = torch.zeros((), device=workers.device)
    for i, batch in enumerate(mine):
        with workers.apart(engine, i + 1 < len(mine)):
            loss, _ = answer_loss(engine, batch.to(workers.device))
            # The engine takes the mean over processes of what are parts of one sum.
            (loss * (workers.size / answers)).backward()
        total += loss.detach()
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return workers.sum(total).item() / answers, tokens


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: GsmSymbolic,
    run: TrainingState,
    state_path: Path,
    interruption: Interruption,
    workers: Workers,
    args: argparse.Namespace,
) -> None:
    """Train up to --steps; a signal takes effect between two steps, in all processes at once."""
    from tqdm import tqdm

    engine = workers.wrapped(model).train()
    bar = tqdm(total=args.steps, initial=run.step, desc="Training", unit="step", file=sys.stdout)
    with bar, interruption.held():
        while run.step < args.steps:
            start = time.perf_counter()
            # The second group, if any, are L1RA's gates: their rate is constant.
            optimizer.param_groups[0]["lr"] = learning_rate(run.step, args)
            # Dropout depends on seed, step and process alone: a resumed run repeats it.
            torch.manual_seed((args.seed << 32) + run.step * workers.size + workers.rank)
            loss, tokens = add_gradients(engine, data, run.step, workers, args.accumulate)
            optimizer.step()
            ranks_moved = run.allocator is not None and run.allocator.step()
            optimizer.zero_grad(set_to_none=True)
            if ranks_moved:  # an engine keeps buffers of the old sizes
                engine = workers.wrapped(model).train()
            run.losses.append(loss)
            run.step += 1
            if run.step % args.save_every == 0 and workers.is_first:
                run.save(state_path, model, optimizer)
            bar.set_postfix_str(
                f"loss {loss:.3f}, {tokens / (time.perf_counter() - start):.0f} tokens/s"
            )
            bar.update()
            interruption.take_effect(workers.largest)
