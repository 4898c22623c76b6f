"""The processes that train together: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# The others wait while rank 0 evaluates.
TIMEOUT = timedelta(hours=2)


class Workers:
    """This process among its like. `device` is this one's: cuda is one GPU for each process."""

    def __init__(self, device: str) -> None:
        """Meet the other processes; only rank 0 prints from now on."""
        self.rank, self.size, self.device = 0, 1, torch.device(device)
        if dist.is_torchelastic_launched():
            if self.device.type == "cuda":
                self.device = torch.device("cuda", dist.get_node_local_rank())
                torch.cuda.set_device(self.device)
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", timeout=TIMEOUT
            )
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, saves and evaluates."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Return what to call for training: gradients become the mean over all processes."""
        if self.size == 1:
            return model
        # Buffers are constants. torch 2.13 has a new word for leaving them alone.
        words = signature(DistributedDataParallel).parameters
        word = "forward_sync_buffers" if "forward_sync_buffers" in words else "broadcast_buffers"
        return DistributedDataParallel(model, **{word: False})

    def apart(self, engine: nn.Module, apart: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients stay here, to be exchanged by a later backward."""
        return engine.no_sync() if apart and self.size > 1 else nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, number: int) -> int:
        """Return the largest of what the processes pass."""
        numbers = torch.tensor(number, device=self.device)
        if self.size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 finish the block before the others begin it."""
        if self.size > 1 and not self.is_first:
            self._meet()
        yield
        if self.size > 1 and self.is_first:
            self._meet()

    def _meet(self) -> None:
        # Not inside torch, where a signal would have to wait as well.
        meeting = dist.barrier(async_op=True)
        while not meeting.is_completed():
            time.sleep(0.05)
        meeting.wait()  # which raises what went wrong

    def part(self) -> None:
        """Leave the others: nothing is exchanged any more."""
        if dist.is_initialized():
            dist.destroy_process_group()
