"""examples/finetune.py, in which rank 1 kills itself before step 5."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import finetune  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gsm_symbolic import GsmSymbolic  # noqa: E402

draw = GsmSymbolic.training_batches


def draw_or_die(data: GsmSymbolic, step: int, parts: int) -> list:
    if step == 5 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(data, step, parts)


if __name__ == "__main__":
    GsmSymbolic.training_batches = draw_or_die
    finetune.main()
