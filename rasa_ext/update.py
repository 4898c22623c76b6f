"""The update of one layer: how its tensors start, where they are found, what matrix they make."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rasa_ext.layer_ops import Adapters, rasa_delta_weights


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return module.name; past nn.Module's attribute lookup, which costs as much as a small op."""
    tensor = module._parameters.get(name)
    # Elsewhere: a constant d (a buffer), and what FSDP1 or a parametrisation put in its place.
    return getattr(module, name) if tensor is None else tensor


def init_rank_weights(A: Tensor, Bt: Tensor) -> None:
    """Initialise A Kaiming-uniform(a=sqrt 5) and Bt zero, as the authors (and LoRA) do."""
    if A.numel() > 0:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(Bt)


@torch.no_grad()
def init_gates(d: Tensor, Rp: int, alpha: float) -> None:
    """Set d to the authors' values: 0.5*alpha/Rs on the shared ranks, 0.5*alpha/Rp on the others.

    Half of alpha each; without shared ranks this is LoRA, whose d is alpha / r throughout.
    """
    Rs = d.numel() - Rp
    if Rs == 0:
        d.fill_(alpha / Rp)
        return
    d[:Rs] = 0.5 * alpha / Rs
    if Rp > 0:
        d[Rs:] = 0.5 * alpha / Rp


def delta_weight(A: Tensor, A_shared: Tensor, Bt: Tensor, Bt_shared: Tensor, d: Tensor) -> Tensor:
    """Return the update as one matrix (N, K), accumulated in float32 (float64 for float64).

    Semantics::

        A_all = torch.cat([A_shared, A]).float()
        Bt_all = torch.cat([Bt_shared, Bt]).float()
        return (Bt_all * d.float()[:, None]).T @ A_all
    """
    return rasa_delta_weights(Adapters([A], [Bt], [d], [A_shared], [Bt_shared], [0]))[0]


def lora_pair(
    A: Tensor, A_shared: Tensor, Bt: Tensor, Bt_shared: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the update as a LoRA of scaling 1: A (R, K) and B (N, R), at least float32.

    Semantics, exact but for one rounding of B::

        return torch.cat([A_shared, A]), (torch.cat([Bt_shared, Bt]) * d[:, None]).T
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    B = torch.cat([Bt_shared, Bt]).to(dtype) * d.to(dtype)[:, None]
    return torch.cat([A_shared, A]).to(dtype), B.T.contiguous()
