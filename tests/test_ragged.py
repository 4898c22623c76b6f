"""Layers of different and changing ranks, where other parts of the package meet them."""

from __future__ import annotations

from functools import partial

import torch
from allocators import allocation, layers_of, train_step, trained_parameters
from models import plain, randomize_adapters
from safetensors.torch import load_file
from torch import nn

from rasa_ext import RankAllocator, apply, export_to_lora


def test_ragged_adapters_are_exported_to_lora_padded_to_one_rank(tmp_path) -> None:
    model, optimizer, allocator = allocation(k=1, every=4, l1=1.0, gate_lr=0.1, total_steps=40)
    for step in range(16):
        train_step(model, optimizer, step)
        allocator.step()

    export_to_lora(model, tmp_path / "lora")

    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layers = layers_of(model)
    assert len({layer.c.numel() for layer in layers.values()}) > 2
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {
        max(layer.c.numel() for layer in layers.values())
    }
    for name, layer in layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{m}.weight"] for m in "AB")
        torch.testing.assert_close(B @ A, layer.delta_weight().detach(), rtol=1e-5, atol=1e-6)


def test_gated_siblings_are_computed_by_one_op_before_and_after_ranks_move() -> None:
    trained = []
    for siblings in (True, False):
        model = plain()
        for block in model.layers:
            block.attn, block.forward = Attention(), partial(attend, block)
        targets = ["q_proj", "k_proj", "v_proj"]
        apply(model, r=4, k=1, target_modules=targets, gates=True, siblings=siblings)
        randomize_adapters(model)
        optimizer = torch.optim.SGD(trained_parameters(model), lr=1e-2)
        allocator = RankAllocator(model, optimizer, every=1)
        for step in range(3):
            layer = layers_of(model)[f"layers.{step}.attn.k_proj"]
            with torch.no_grad():
                layer.c.fill_(1.0)[-1] = 0.0
            train_step(model, optimizer, step)
            allocator.step()

        groups = [block.attn.q_proj.siblings for block in model.layers]
        assert all(group.fuses for group in groups) if siblings else groups == [None] * 3
        trained.append([p.detach() for p in trained_parameters(model)])

    # Not to the bit: the three gradients of x are summed in another order.
    for fused, alone in zip(*trained, strict=True):
        torch.testing.assert_close(fused, alone, rtol=1e-4, atol=1e-5)


def attend(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + block.attn(x)


class Attention(nn.Module):
    """Three layers that are fed one x, as q, k and v are."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        return torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x)
