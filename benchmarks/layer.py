"""`bench.py layer`: forward and backward of single linears, for tuning kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from peak_memory import peak_allocated
from peers import (
    PEERS,
    Adapter,
    convert,
    copy_rasa_to_authors,
    exact_model,
    relative_error,
    require_accurate,
    unwrap,
)
from timing import calls_within, interleave, paired_ratio, summary
from torch import nn

# x and weights of the layers in a pass exceed this, so none of them waits in a cache.
WORKING_SET_BYTES = 64 << 20
# Long against the clock's resolution and a scheduler's tick.
SAMPLE_SECONDS = 0.04
# float64 is slow, and rows are alike.
CHECKED_TOKENS = 128


class Projection(nn.Module):
    """One layer of a model that is nothing but a linear."""

    def __init__(self, K: int, N: int) -> None:
        """Allocate proj (N, K)."""
        super().__init__()
        self.proj = nn.Linear(K, N, bias=False)


class Projections(nn.Module):
    """`num_layers` linears of one shape, named as a transformer's: one group, one pool."""

    def __init__(self, num_layers: int, K: int, N: int) -> None:
        """Allocate the layers."""
        super().__init__()
        self.layers = nn.ModuleList(Projection(K, N) for _ in range(num_layers))

    def count_also(self, num_layers: int) -> None:
        """Add layers up to `num_layers`, for the pool's size: their weights take no memory."""
        like = self.layers[0].proj
        for _ in range(num_layers - len(self.layers)):
            with torch.device("meta"):
                layer = Projection(like.in_features, like.out_features)
            layer.proj.weight = nn.Parameter(like.weight.new_zeros(()).expand_as(like.weight))
            self.layers.append(layer)


def forward_backward(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Every gradient a training step asks of this layer; x's is returned."""
    y = layer(x)
    y.backward(dy)
    dx, x.grad = x.grad, None
    return dx


def one_pass(
    model: nn.Module, xs: list[torch.Tensor], dy: torch.Tensor, count: int, repeats: int
) -> Callable[[], None]:
    """`repeats` passes over the first `count` layers, each with its own x."""
    layers = [unwrap(model).layers[i].proj for i in range(count)]
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for _ in range(repeats):
            for layer, x in zip(layers, xs, strict=True):
                forward_backward(layer, x, dy)
            for p in trained:
                p.grad = None
        if dy.is_cuda:
            torch.cuda.synchronize()

    return run


def check(
    models: dict[str, nn.Module], adapter: Adapter, x: torch.Tensor, dy: torch.Tensor
) -> dict[str, float]:
    """Return the errors of (y, dx) against float64, with dropout off; stop if one is too large."""
    errors: dict[str, float] = {}
    x, dy = x[:CHECKED_TOKENS].detach().requires_grad_(), dy[:CHECKED_TOKENS]
    for name, model in models.items():
        layer = unwrap(model.eval()).layers[0].proj
        exact_layer = exact_model(name, models, adapter).layers[0].proj
        exact_x = x.detach().double().requires_grad_()
        exact_y = exact_layer(exact_x)
        exact_dx = forward_backward(exact_layer, exact_x, dy.double())
        errors[name] = max(
            relative_error(layer(x), exact_y),
            relative_error(forward_backward(layer, x, dy), exact_dx),
        )
        model.train()
        model.zero_grad()
    require_accurate(errors, x.dtype)
    return errors


def measure(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    adapter: Adapter,
    num_layers: int,
    peers: list[str],
    rounds: int,
    most_seconds: float = math.inf,
) -> dict[str, object]:
    """Time every peer on one (M, K, N); microseconds per layer and ratios to the frozen layer.

    `allocated` is the peak, in bytes, of one forward and backward of one layer. Large shapes get
    fewer rounds, but 5 at least, where `rounds` would take over `most_seconds`.
    """
    M, K, N = shape
    torch.manual_seed(0)
    if "compiled" in peers:
        torch.compiler.reset()  # the code of other shapes
    bytes_per_layer = (N * K + M * K) * dtype.itemsize
    count = min(num_layers, -(-WORKING_SET_BYTES // bytes_per_layer))
    base = Projections(count, K, N).to(dtype)
    base.count_also(num_layers)
    models = {name: convert(name, base, adapter) for name in PEERS if name in peers}
    for model in models.values():
        unwrap(model).layers = unwrap(model).layers[:count]
    if "rasa" in models and "authors" in models:
        copy_rasa_to_authors(models["rasa"], models["authors"], adapter)
    xs = [torch.randn(M, K).to(dtype).requires_grad_() for _ in range(count)]
    dy = torch.randn(M, N).to(dtype)
    errors = check(models, adapter, xs[0], dy)
    repeats = calls_within(SAMPLE_SECONDS, one_pass(models["frozen"], xs, dy, count, 1))
    runs = {name: one_pass(model, xs, dy, count, repeats) for name, model in models.items()}
    seconds = interleave(runs, rounds, most_seconds)
    single = {name: one_pass(model, xs[:1], dy, 1, 1) for name, model in models.items()}
    scale = 1e6 / (count * repeats)
    return {
        "shape": {"M": M, "K": K, "N": N},
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": adapter.dropout,
        "rounds": len(seconds["frozen"]),
        "error": errors,
        "us": {name: summary([scale * t for t in times]) for name, times in seconds.items()},
        "over_frozen": {name: paired_ratio(seconds, name, "frozen") for name in seconds},
        "allocated": {name: peak_allocated(run) for name, run in single.items()},
    }
