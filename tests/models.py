"""Small models for the tests of the Python layer: three layer namings, and odd base layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "v_proj", "down_proj")


class Block(nn.Module):
    """Two square linears and one narrow one, so that a model has two shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.q_proj = nn.Linear(width, width)
        self.attn.v_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.v_proj(torch.tanh(self.attn.q_proj(x)))
        return x + self.down_proj(torch.tanh(self.up(x)))


class TinyModel(nn.Module):
    """`num_layers` blocks under the attribute path `naming`, e.g. "encoder.layer"."""

    def __init__(self, naming: str = "layers", num_layers: int = 3, width: int = 8) -> None:
        super().__init__()
        holder: nn.Module = self
        *path, leaf = naming.split(".")
        for part in path:
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        self.blocks_path = naming
        holder.add_module(leaf, nn.ModuleList(Block(width) for _ in range(num_layers)))
        self.head = nn.Linear(width, width)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get_submodule(self.blocks_path)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Conv1D(nn.Module):
    """The linear layer of GPT-2: sizes are called nx and nf, the weight is (nx, nf)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * nx**-0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Int8Linear(nn.Module):
    """A quantised linear: an integer weight, which nobody may add to."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def randomize_adapters(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every trainable parameter random values, as training would, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / max(parameter.shape[-1], 1) ** 0.5)
    return model
