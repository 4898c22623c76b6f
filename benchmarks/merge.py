"""`bench.py merge`: the updates of all layers of SmolLM2-135M's shape into the base weights.

formula  the authors' formula, layer by layer in plain torch, with float32 sums
op       rasa_merge_: all layers in one launch
merge()  rasa_ext.merge and unmerge: with kept originals, the check and the report of every layer
"""

from __future__ import annotations

from typing import Any

import torch
from peers import relative_error
from timing import interleave, paired_ratio, summary
from torch import nn

# K, N of the seven linears.
SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
PEERS = ("formula", "op", "merge()")


def build(dtype: torch.dtype, layers: int, r: int, k: int) -> nn.Module:
    """Return the linears of a model with random weights and random float32 adapters."""
    import rasa_ext

    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(K, N, bias=False) for name, (K, N) in SHAPES.items()})
        for _ in range(layers)
    ).to(dtype)
    rasa_ext.apply(model, r=r, k=k, target_modules=tuple(SHAPES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def adapted(model: nn.Module) -> list[Any]:
    """Return the model's adapted layers."""
    return [linear for block in model.layers for linear in block.values()]


@torch.no_grad()
def merge_by_formula(layers: list[Any]) -> None:
    """Add every update to its weight, in plain torch."""
    for layer in layers:
        A, Bt = layer.A, layer.Bt
        if layer.pool is not None:
            A = torch.cat([layer.pool.A_shared, A])
            Bt = torch.cat([layer.pool.Bt_shared, Bt])
        layer.base_layer.weight += (Bt * layer.d[:, None]).T @ A


@torch.no_grad()
def merge_by_op(layers: list[Any]) -> None:
    """Add every update to its weight, in one launch."""
    from rasa_ext.layer_ops import adapters_of, rasa_merge_

    rasa_merge_([layer.base_layer.weight for layer in layers], adapters_of(layers))


@torch.no_grad()
def error_of(merge: Any, layers: list[Any]) -> float:
    """Return the worst error of a merged weight against float64, and undo the merge."""
    before = [layer.base_layer.weight.clone() for layer in layers]
    merge()
    worst = 0.0
    for layer, original in zip(layers, before, strict=True):
        A, Bt = layer.A, layer.Bt
        if layer.pool is not None:
            A = torch.cat([layer.pool.A_shared, A])
            Bt = torch.cat([layer.pool.Bt_shared, Bt])
        exact = original.double() + (Bt.double() * layer.d.double()[:, None]).T @ A.double()
        worst = max(worst, relative_error(layer.base_layer.weight, exact))
        layer.base_layer.weight.copy_(original)
    return worst


def measure(dtype: torch.dtype, layers: int, r: int, k: int, rounds: int) -> dict[str, Any]:
    """Time the peers interleaved, each checked first."""
    import rasa_ext

    model = build(dtype, layers, r, k)
    linears = adapted(model)

    def merge_and_unmerge() -> None:
        rasa_ext.merge(model)
        rasa_ext.unmerge(model)

    runs = {
        "formula": lambda: merge_by_formula(linears),
        "op": lambda: merge_by_op(linears),
        "merge()": merge_and_unmerge,
    }
    errors = {name: error_of(runs[name], linears) for name in ("formula", "op")}
    report = rasa_ext.merge(model)
    rasa_ext.unmerge(model)
    for name, error in errors.items():
        # What rounding products and sum may lose; a layer without its update is wrong by far more.
        if not error <= 4 * torch.finfo(dtype).eps:
            raise SystemExit(f"bench: {name} is wrong: error {error:.1e} against float64")
    seconds = interleave(runs, rounds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": errors,
        "worst_applied_error": report.worst.error,
        "seconds": {name: summary(times) for name, times in seconds.items()},
        "ratios": {
            f"{name} / formula": paired_ratio(seconds, name, "formula") for name in PEERS[1:]
        },
    }
