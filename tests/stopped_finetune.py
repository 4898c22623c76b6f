"""examples/finetune.py under torchrun, stopped from inside at a step that is known.

    torchrun --nproc-per-node=2 tests/stopped_finetune.py EVENT [arguments of finetune.py]

EVENT: SIGKILL, by which rank 1 ends itself before step 5; SIGINT or SIGTERM, which rank 1 sends to
torchrun before step 3; SIGINT@evaluation, sent by rank 0 while the others wait for its evaluation.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import finetune  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gsm_symbolic import GsmSymbolic  # noqa: E402
from interruption import Interruption  # noqa: E402

arrived: list[int] = []
draw, handle = GsmSymbolic.training_batches, Interruption._handle


def stop_torchrun(number: int) -> None:
    """Do what Ctrl-C or kill does to the launcher, and wait until it has told this process."""
    os.kill(os.getppid(), number)
    while not arrived:
        time.sleep(0.01)


def noted(interruption: Interruption, number: int, frame: Any) -> None:
    arrived.append(number)
    handle(interruption, number, frame)


def draw_or_stop(data: GsmSymbolic, step: int, parts: int) -> list:
    if event == "SIGKILL" and step == 5 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if event in ("SIGINT", "SIGTERM") and step == 3 and dist.get_rank() == 1:
        stop_torchrun(signal.Signals[event])
    return draw(data, step, parts)


def never_evaluated(*_: Any) -> None:
    stop_torchrun(signal.SIGINT)


if __name__ == "__main__":
    event = sys.argv.pop(1)
    Interruption._handle = noted
    GsmSymbolic.training_batches = draw_or_stop
    if event == "SIGINT@evaluation":
        finetune.evaluate = never_evaluated
    finetune.main()
