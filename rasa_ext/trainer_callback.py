"""RankAllocator inside transformers' Trainer. Import this module by name: it needs transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rasa_ext.rank_allocator import RankAllocator

STATE_FILE = "rank_allocator.pt"


class RankAllocatorCallback(TrainerCallback):
    """Calls allocator.step() after each optimizer step, and saves its state with each checkpoint.

        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        allocator = rasa_ext.RankAllocator(model, optimizer, total_steps=args.max_steps)
        callback = RankAllocatorCallback(allocator)
        trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[callback], ...)
        trainer.train()

    To resume, call callback.load(checkpoint) before trainer.train(resume_from_checkpoint=...): the
    Trainer can load weights into layers that have the checkpoint's ranks only.
    """

    def __init__(self, allocator: RankAllocator) -> None:
        """Remember the allocator of the Trainer's model and optimizer."""
        self.allocator = allocator

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Load the allocator's state of a checkpoint folder."""
        state = torch.load(Path(checkpoint) / STATE_FILE, weights_only=True)
        self.allocator.load_state_dict(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise unless the Trainer does what the allocator counts on."""
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "optimizer", optimizer) is not self.allocator.optimizer:
            raise ValueError(
                "RankAllocatorCallback: the Trainer must use the allocator's optimizer. Pass "
                "optimizers=(optimizer, None)"
            )
        if args.world_size > 1:
            raise ValueError(
                f"RankAllocatorCallback: the Trainer must run in one process, got "
                f"{args.world_size}: it cannot wrap its model anew when ranks change. Use "
                "DistributedDataParallel in a loop of your own"
            )
        total = self.allocator.settings["total_steps"]
        if total is not None and total != state.max_steps:
            raise ValueError(
                f"RankAllocatorCallback: total_steps must be the Trainer's {state.max_steps}, got "
                f"{total}"
            )
        if self.allocator.steps != state.global_step:
            raise ValueError(
                f"RankAllocatorCallback: the allocator must be at step {state.global_step} as the "
                f"Trainer is, got {self.allocator.steps}. Call load(checkpoint) before resuming"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink the gates, and now and then move ranks; gradients are not zeroed yet."""
        self.allocator.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the allocator's state into the checkpoint that was just made."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        torch.save(self.allocator.state_dict(), folder / STATE_FILE)
