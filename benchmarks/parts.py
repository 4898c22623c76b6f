"""`bench.py parts`: what dropout, siblings and the micro-kernels are each worth in one op.

Two linears that are fed one x, forward and backward with every gradient. Variants leave out what
rasa_ext does: the micro-kernels of its own; dropout; computing siblings together; and, with one op
for each layer again, its own dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peers import relative_error, require_accurate
from timing import calls_within, interleave, paired_ratio, summary
from torch import Tensor
from torch.nn import functional as F

# gate and up of SmolLM2-135M at 4x128 tokens, r = 8, k = 1 over 30 layers.
M, K, N, LAYERS = 512, 576, 1536, 2
RP, RS = 7, 30
SAMPLE_SECONDS = 0.04
LIBRARY = "the library's micro-kernels"

Forward = Callable[[Tensor, float], list[Tensor]]


class Siblings:
    """x and the tensors of the layers, and the ways to compute them."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Draw everything; gradients are asked for x and for every adapter tensor."""
        torch.manual_seed(0)

        def draw(*shape: int) -> list[Tensor]:
            scale = K**-0.5 if shape[-1] == K else 1.0  # products with x are about 1
            return [(scale * torch.randn(shape)).to(dtype) for _ in range(LAYERS)]

        self.x = torch.randn(M, K).to(dtype).requires_grad_()
        self.weight, self.dy = draw(N, K), draw(M, N)
        self.A, self.A_shared, self.Bt, self.Bt_shared, self.d = (
            [t.requires_grad_() for t in draw(*shape)]
            for shape in ((RP, K), (RS, K), (RP, N), (RS, N), (RP + RS,))
        )
        self.adapters = (self.A, self.A_shared, self.Bt, self.Bt_shared, self.d)
        self.leaves = [self.x, *(t for column in self.adapters for t in column)]

    def frozen(self, x: Tensor, p: float) -> list[Tensor]:
        """Return the base products alone."""
        return [F.linear(x, W) for W in self.weight]

    def together(self, x: Tensor, p: float) -> list[Tensor]:
        """Return what rasa_ext computes for linked siblings."""
        import rasa_ext

        biases = [None] * LAYERS
        return rasa_ext.rasa_linears(x, self.weight, biases, *self.adapters, p, seed_for(p))

    def one_by_one(self, x: Tensor, p: float) -> list[Tensor]:
        """Return the same from one op for each layer, each of which draws the mask."""
        import rasa_ext

        layers = zip(self.weight, *self.adapters, strict=True)
        return [rasa_ext.rasa_linear(x, W, None, *layer, p, seed_for(p)) for W, *layer in layers]

    def torch_dropout(self, x: Tensor, p: float) -> list[Tensor]:
        """Return the same with torch's dropout on x before the adapters."""
        import rasa_ext

        layers = zip(self.frozen(x, p), *self.adapters, strict=True)
        return [rasa_ext.rasa_add(F.dropout(x, p), y, *layer) for y, *layer in layers]

    @torch.no_grad()
    def errors(self, forwards: dict[str, Forward]) -> dict[str, float]:
        """Return the error of each way's y, without dropout, against float64."""
        x = self.x.double()
        base = [x @ W.double().T for W in self.weight]
        exact = []
        for y, A, A_shared, Bt, Bt_shared, d in zip(base, *self.adapters, strict=True):
            s = x @ torch.cat([A_shared, A]).double().T
            exact.append(y + (s * d.double()) @ torch.cat([Bt_shared, Bt]).double())
        return {
            name: relative_error(
                torch.cat(forward(self.x, 0.0)), torch.cat(base if name == "frozen" else exact)
            )
            for name, forward in forwards.items()
        }

    def step(self, forward: Forward, p: float) -> None:
        """Run forward and backward once, as a training step does."""
        y = forward(self.x, p)
        torch.autograd.backward(y, self.dy)
        for leaf in self.leaves:
            leaf.grad = None


def seed_for(p: float) -> Tensor | None:
    """Return a seed where the op draws a mask."""
    return torch.zeros(1, dtype=torch.int64) if p > 0 else None


@contextmanager
def micro_kernels(which: str) -> Iterator[None]:
    """Let rasa_ext multiply in its own, the library's or no micro-kernels."""
    from rasa_ext import _C

    _C.set_micro_kernels(which)
    try:
        yield
    finally:
        _C.set_micro_kernels("own")


def measure(dtype: torch.dtype, p: float, rounds: int) -> dict[str, Any]:
    """Time the variants interleaved; those that compute the layers are checked first."""
    siblings = Siblings(dtype)
    forwards = {
        "frozen": siblings.frozen,
        "rasa_ext": siblings.together,
        "one op for each layer": siblings.one_by_one,
        "the same, with torch's dropout": siblings.torch_dropout,
    }
    errors = siblings.errors(forwards)
    with micro_kernels("library"):
        errors[LIBRARY] = siblings.errors({LIBRARY: siblings.together})[LIBRARY]
    require_accurate(errors, dtype)
    repeats = calls_within(SAMPLE_SECONDS, lambda: siblings.step(siblings.frozen, p))

    def run(forward: Forward, p: float, which: str = "own") -> Callable[[], None]:
        def repeat() -> None:
            with micro_kernels(which):  # of backward too
                for _ in range(repeats):
                    siblings.step(forward, p)

        return repeat

    runs = {name: run(forward, p) for name, forward in forwards.items()}
    runs[LIBRARY] = run(siblings.together, p, "library")
    runs["without dropout"] = run(siblings.together, 0.0)
    seconds = interleave(runs, rounds)
    per_call = {name: [t / repeats for t in times] for name, times in seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": errors,
        "seconds": {name: summary(times) for name, times in per_call.items()},
        "over_frozen": {name: paired_ratio(seconds, name, "frozen") for name in seconds},
        "flops_over_frozen": 1 + 6 * (RP + RS) * (K + N) / (4 * K * N),
    }
