"""RankAllocator inside transformers' Trainer: steps, checkpoints, resuming, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from allocators import NAMES, gated, trained_parameters
from torch import Tensor, nn

from rasa_ext import RankAllocator

STEPS = 12


class WithLoss(nn.Module):
    """What Trainer wants of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.model(x) - x).square().mean()}


def trainer_of(folder: Path, total_steps: int = STEPS, **kwargs):
    from transformers import Trainer, TrainingArguments

    from rasa_ext.trainer_callback import RankAllocatorCallback

    model = WithLoss(gated())
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    allocator = RankAllocator(
        model, optimizer, l1=0.5, gate_lr=0.3, every=0.2, total_steps=total_steps
    )
    callback = RankAllocatorCallback(allocator)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="linear",
    )
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    data = [{"x": row} for row in x]
    options = {"optimizers": (optimizer, None), "callbacks": [callback]} | kwargs
    return Trainer(model, arguments, train_dataset=data, **options), callback


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(tmp_path) -> None:
    through, callback = trainer_of(tmp_path / "run")
    through.train()
    resumed, again = trainer_of(tmp_path / "again")
    checkpoint = tmp_path / "run" / "checkpoint-6"
    again.load(checkpoint)
    assert [entry["step"] for entry in again.allocator.history] != [0]

    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert again.allocator.state_dict() == callback.allocator.state_dict()
    assert callback.allocator.steps == STEPS
    assert len(set(callback.allocator.rank_pattern().values())) > 1
    pairs = zip(through.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert callback.allocator.rank_pattern().keys() == {f"model.{name}" for name in NAMES}


def test_the_schedule_moves_the_gates_rate_too(tmp_path) -> None:
    trainer, callback = trainer_of(tmp_path)

    trainer.train()

    rates = [group["lr"] for group in callback.allocator.optimizer.param_groups]
    assert rates == [0.0, 0.0]


def test_another_optimizer_number_of_steps_or_start_is_refused(tmp_path) -> None:
    own, _ = trainer_of(tmp_path, optimizers=(None, None))
    with pytest.raises(ValueError, match=r"Pass optimizers=\(optimizer, None\)"):
        own.train()
    longer, _ = trainer_of(tmp_path, total_steps=20)
    with pytest.raises(ValueError, match="total_steps must be the Trainer's 12, got 20"):
        longer.train()
    late, callback = trainer_of(tmp_path)
    callback.allocator.steps = 3
    with pytest.raises(ValueError, match="must be at step 0 as the Trainer is, got 3"):
        late.train()


def test_the_package_alone_imports_no_transformers() -> None:
    import subprocess

    code = "import sys, rasa_ext; sys.exit('transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0
