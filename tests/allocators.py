"""Gated models with an optimizer and an allocator, for the tests of L1RA."""

from __future__ import annotations

from typing import Any

import torch
from models import PROJECTIONS, plain, randomize_adapters
from torch import Tensor, nn
from torch.optim import Optimizer

import rasa_ext
from rasa_ext import RankAllocator

FIRST = "layers.0.attn.q_proj"
SECOND = "layers.0.attn.v_proj"
NAMES = [f"layers.{i}.{p}" for i in range(3) for p in ("attn.q_proj", "attn.v_proj", "down_proj")]


class SignMomentum(Optimizer):
    """Lion-like: the sign of a momentum, one state tensor and no step count."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.sub_(state["exp_avg"].sign(), alpha=group["lr"])


OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "lion-like": lambda params: SignMomentum(params),
}


def gated(r: int = 4, k: int = 0, **kwargs: Any) -> nn.Module:
    """A tiny model with random adapters whose gates are 1."""
    model = plain()
    rasa_ext.apply(model, r=r, k=k, target_modules=PROJECTIONS, gates=True, **kwargs)
    randomize_adapters(model)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.c.fill_(1.0)
    return model


def layers_of(model: nn.Module) -> dict[str, rasa_ext.RaSALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, rasa_ext.RaSALinear)}


def trained_parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def allocation(
    r: int = 4, k: int = 0, optimizer: str = "adamw", **kwargs: Any
) -> tuple[nn.Module, Optimizer, RankAllocator]:
    """A gated model, its optimizer and its allocator, which updates every step by default."""
    model = gated(r, k)
    made = OPTIMIZERS[optimizer](trained_parameters(model))
    return model, made, RankAllocator(model, made, **{"every": 1} | kwargs)


def train_step(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
    """One step on a batch that depends on the number of the step only."""
    x = torch.randn(5, model.head.in_features, generator=torch.Generator().manual_seed(step))
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@torch.no_grad()
def set_gates(model: nn.Module, gates: dict[str, list[float]]) -> None:
    for name, values in gates.items():
        layers_of(model)[name].c.copy_(torch.tensor(values))
