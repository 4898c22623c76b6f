"""The peers that bench.py compares: a frozen model, PEFT LoRA, the formula of the RaSA authors, the
same under torch.compile, and rasa_ext.

`convert(name, model, adapter)` turns any model into one peer. Every peer starts from the same base
weights, and its adapter matrices are random, so that no product is a product with zeros.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

PEERS = ("frozen", "lora", "authors", "compiled", "rasa")
# Compiled code there may be at once: for each shape, token count, dropout, and mode of the layers.
MOST_COMPILED = 64


@dataclass(frozen=True)
class Adapter:
    """What every adapter peer is built with; `dtype` is that of the trained tensors."""

    target_modules: tuple[str, ...]
    r: int = 8
    k: int = 1
    alpha: float = 16
    dropout: float = 0.05
    dtype: torch.dtype = torch.float32


class AuthorsLinear(nn.Module):
    """RaSA as published: two concatenations at each call, two matmuls, a diagonal between them."""

    def __init__(
        self,
        base: nn.Linear,
        A_shared: nn.Parameter,
        B_shared: nn.Parameter,
        adapter: Adapter,
    ) -> None:
        """Allocate A (Rp, K), B (N, Rp) and the gates d, shared ranks first."""
        super().__init__()
        N, K = base.weight.shape
        Rp, Rs = adapter.r - adapter.k, len(A_shared)
        self.base, self.A_shared, self.B_shared = base, A_shared, B_shared
        self.A = nn.Parameter(torch.empty(Rp, K, dtype=adapter.dtype))
        self.B = nn.Parameter(torch.empty(N, Rp, dtype=adapter.dtype))
        gates = [torch.full((n,), 0.5 * adapter.alpha / max(n, 1)) for n in (Rs, Rp)]
        self.d = nn.Parameter(torch.cat(gates).to(adapter.dtype))
        self.dropout = adapter.dropout

    def concatenated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, K) and B (N, R), shared ranks first."""
        return torch.cat([self.A_shared, self.A]), torch.cat([self.B_shared, self.B], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return base(x) + B (d * (A dropout(x)))."""
        A, B = self.concatenated()
        s = F.linear(F.dropout(x.to(A.dtype), self.dropout, self.training), A)
        return self.base(x) + F.linear(s * self.d, B).to(x.dtype)

    def delta_weight(self) -> torch.Tensor:
        """Return B diag(d) A (N, K) in float64."""
        A, B = self.concatenated()
        return (B.double() * self.d.double()) @ A.double()


def targets(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules of `model` whose last name is one of `names`, in order."""
    return {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in names}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, so that module paths are the same in every peer."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def share_weights(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` over the same weights: no peer has them in a warmer cache."""
    memo = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def to_lora(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put PEFT's LoRA into `model`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SystemExit(f"bench: peer 'lora' needs PEFT: pip install peft ({error})") from error
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(adapter.dtype)
    return model


def to_authors(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put the authors' formula into `model`, one pool for each (name, shape)."""
    model.requires_grad_(False)
    groups: dict[tuple[str, torch.Size], list[str]] = {}
    for path, linear in targets(model, adapter.target_modules).items():
        groups.setdefault((path.rpartition(".")[2], linear.weight.shape), []).append(path)
    for (_, (N, K)), paths in groups.items():
        Rs = adapter.k * len(paths)
        A_shared = nn.Parameter(torch.empty(Rs, K, dtype=adapter.dtype))
        B_shared = nn.Parameter(torch.empty(N, Rs, dtype=adapter.dtype))
        for path in paths:
            layer = AuthorsLinear(model.get_submodule(path), A_shared, B_shared, adapter)
            model.set_submodule(path, layer)
    return model


def to_compiled(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put the authors' formula into `model`, and compile each of its layers in place.

    Alike layers share their code. With fullgraph, one that cannot be compiled, or not any more,
    raises: none runs as plain PyTorch.
    """
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    model = to_authors(model, adapter)
    for layer in targets(model, adapter.target_modules).values():
        layer.compile(fullgraph=True, dynamic=False)
    return model


def to_rasa(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put rasa_ext's layers into `model`."""
    try:
        import rasa_ext
    except ImportError as error:
        raise SystemExit(f"bench: peer 'rasa' needs rasa_ext: pip install . ({error})") from error
    rasa_ext.apply(
        model,
        r=adapter.r,
        k=adapter.k,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        dtype=adapter.dtype,
    )
    return model


def convert(name: str, model: nn.Module, adapter: Adapter) -> nn.Module:
    """A peer in training mode over the same weight memory as `model`, which stays as it is."""
    model = share_weights(model).train()
    if name == "frozen":
        return model.requires_grad_(False)
    adapted = {"lora": to_lora, "authors": to_authors, "compiled": to_compiled, "rasa": to_rasa}
    model = adapted[name](model, adapter)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        # Gates, the only vectors, keep their values.
        if p.requires_grad and p.dim() == 2:
            p.data.copy_(torch.randn(p.shape, generator=generator, device="cpu") * 0.02)
    return model.train()


def copy_rasa_to_authors(rasa: nn.Module, authors: nn.Module, adapter: Adapter) -> None:
    """Give both RaSA peers the same trained values, so that one float64 result checks both."""
    sources = targets(rasa, adapter.target_modules)
    with torch.no_grad():
        for path, layer in targets(authors, adapter.target_modules).items():
            source = sources[path]
            layer.A.copy_(source.A)
            layer.B.copy_(source.Bt.T)
            layer.d.copy_(source.d)
            layer.A_shared.copy_(source.pool.A_shared)
            layer.B_shared.copy_(source.pool.Bt_shared.T)


def lora_delta(layer: nn.Module) -> torch.Tensor:
    """alpha/r B A in float64; PEFT's own get_delta_weight rounds to the adapter's dtype."""
    A, B = (weights["default"].weight.double() for weights in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * (B @ A)


def exact_model(name: str, peers: dict[str, nn.Module], adapter: Adapter) -> nn.Module:
    """The peer in float64 with every update added to a dense base weight: what it should compute.

    The updates of 'rasa' are read from 'authors' where that peer exists: an independent formula.
    """
    source = peers["authors"] if name == "rasa" and "authors" in peers else unwrap(peers[name])
    exact = copy.deepcopy(unwrap(peers["frozen"])).double()
    if name == "frozen":
        return exact
    layers = targets(source, adapter.target_modules)
    with torch.no_grad():
        for path, linear in targets(exact, adapter.target_modules).items():
            layer = layers[path]
            linear.weight += lora_delta(layer) if name == "lora" else layer.delta_weight()
    return exact


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error; NaN if either holds a NaN."""
    error = (out.double() - exact).norm() / exact.norm()
    return error.item() if error.isfinite() else math.nan


def require_accurate(errors: dict[str, float], dtype: torch.dtype) -> None:
    """Stop the run unless every peer is nearly as exact as the frozen one: no time for wrong work.

    Allowed is twice the frozen peer's error plus one rounding of the result; NaN fails.
    """
    allowed = 2 * errors["frozen"] + torch.finfo(dtype).eps
    for name, error in errors.items():
        if not error <= allowed:
            raise SystemExit(
                f"bench: peer '{name}' is wrong: error {error:.2e} against float64, "
                f"allowed {allowed:.2e}"
            )
