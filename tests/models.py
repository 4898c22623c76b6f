"""Small models and layers for the tests of the Python layer, and what is compared of them."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from rasa_ext.injection import apply
from rasa_ext.module import RaSALinear, SharedPool

K, N, L = 24, 16, 3
PROJECTIONS = ("q_proj", "v_proj", "down_proj")
# A pool and a layer of trained().
POOL = "rasa_pools.attn__q_proj__8x8"
LAYER = "layers.0.attn.q_proj"


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
        y = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return y.reshape(x.shape[:-1] + (self.nf,))


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


def make_layer(
    r: int = 4, k: int = 1, base: nn.Module | None = None, dropout: float = 0.0
) -> RaSALinear:
    torch.manual_seed(0)
    pool = SharedPool(K, N, k, L) if k > 0 else None
    layer = RaSALinear(base or nn.Linear(K, N), pool, r, k, alpha=16, dropout=dropout)
    if pool is not None:
        randomize_adapters(pool, seed=2)
    return randomize_adapters(layer)


def plain(naming: str = "layers", **kwargs) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(naming, **kwargs)


def trained(r: int = 4, k: int = 1, naming: str = "layers", **kwargs) -> TinyModel:
    model = plain(naming)
    apply(model, r=r, k=k, target_modules=kwargs.pop("target_modules", PROJECTIONS), **kwargs)
    return randomize_adapters(model)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> list:
    """All that must not change: modules, values to the bit, and who trains."""
    modules = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    tensors = [(n, p.detach().numpy().tobytes()) for n, p in model.named_parameters()]
    return [modules, tensors, [p.requires_grad for p in model.parameters()]]


def snapshot_bits(model: nn.Module) -> list[bytes]:
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in model.parameters()]


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def authors_update(layer: RaSALinear, x: Tensor) -> Tensor:
    """The authors' formula: two concatenations, two matmuls, and the mixing between them."""
    A, Bt = layer.A, layer.Bt
    if layer.pool is not None:
        A = torch.cat([layer.pool.A_shared, A])
        Bt = torch.cat([layer.pool.Bt_shared, Bt])
    return ((x @ A.to(x.dtype).T) * layer.d.to(x.dtype)) @ Bt.to(x.dtype)


def authors_layer(layer: RaSALinear, x: Tensor) -> Tensor:
    return layer.base_layer(x) + authors_update(layer, x)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; NaN if there is a NaN."""
    tiny = torch.finfo(torch.float64).tiny
    return ((out.double() - exact).norm() / exact.norm().clamp_min(tiny)).item()


def assert_as_accurate(fn, formula, module: nn.Module, x: Tensor) -> None:
    """fn(x) may be twice as wrong as formula(module, x) in plain torch, plus one rounding."""
    exact = formula(copy.deepcopy(module).double(), x.double())
    out, plain = fn(x), formula(module, x)
    assert out.shape == exact.shape and out.dtype == plain.dtype
    allowed = 2 * relative_error(plain, exact) + torch.finfo(out.dtype).eps
    assert relative_error(out, exact) <= allowed
