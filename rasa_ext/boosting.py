"""Boosting with rank-1 adapters (XGBLoRA, Zhang et al. 2024): train one, fold it in, begin anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rasa_ext.base_layer import base_weight, is_transposed
from rasa_ext.injection import adapted_layers, unwrapped


class BoostedUpdate:
    """The sum of many small LoRA updates, kept in float32 beside the weights that apply it.

        rasa_ext.apply(model, r=1, k=0, alpha=1)
        boosted = BoostedUpdate(model)
        for _ in range(rounds):
            boosted.select(random.sample(list(boosted.layers), 8))  # which layers learn now
            optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
            ...  # a few steps
            boosted.fold()

    accumulated holds the sum of all folded updates, (N, K) in float32 (float64 for float64
    adapters), by layer. The base weight is always the original plus that sum, rounded once: folding
    a thousand updates into bfloat16 weights costs one rounding, not a thousand. Memory: beside each
    adapted weight, its original and its sum.

    Make a new optimizer for each round, and wrap the model in DistributedDataParallel anew, which
    gives all processes the same fresh adapters.

    Raises ValueError for a model without adapters or with pools (k > 0), RuntimeError for merged
    layers, TypeError for a base without a weight to add to; the model is then as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the original weights."""
        self.layers = adapted_layers(unwrapped(model))
        if not self.layers:
            raise ValueError(
                "BoostedUpdate: the model has no RaSA adapters. Call rasa_ext.apply(model, r=1, "
                "k=0) first"
            )
        self._weights: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            weight = base_weight(layer.base_layer)
            if layer.pool is not None:
                raise ValueError(
                    f"BoostedUpdate: k must be 0, got {layer.k} in {name}: what layers share "
                    "cannot be folded into one of them"
                )
            if layer.merged:
                raise RuntimeError(f"BoostedUpdate: {name} is merged. Call unmerge(model) first")
            if weight is None:
                raise TypeError(
                    f"BoostedUpdate: {name} must have a floating-point weight to add to, got "
                    f"{type(layer.base_layer).__name__}"
                )
            self._weights[name] = weight
        self._originals = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.accumulated = {
            name: torch.zeros_like(layer.delta_weight()) for name, layer in self.layers.items()
        }

    def select(self, names: Iterable[str]) -> None:
        """Let only these layers' adapters train; the others stay zero.

        Raises ValueError for a name that is no adapted layer.
        """
        chosen = set(names)
        unknown = chosen - self.layers.keys()
        if unknown:
            raise ValueError(
                f"BoostedUpdate.select: names must be adapted layers, got {sorted(unknown)[0]!r}"
            )
        for name, layer in self.layers.items():
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(name in chosen)

    @torch.no_grad()
    def fold(self) -> None:
        """Move every layer's update into accumulated and its base weight; start adapters anew.

        Raises RuntimeError if a layer is merged, ValueError if a weight would not be finite; the
        model is then as it was.
        """
        sums, weights = {}, {}
        for name, layer in self.layers.items():
            if layer.merged:
                raise RuntimeError(
                    f"BoostedUpdate.fold: {name} is merged. Call unmerge(model) first"
                )
            sums[name] = self.accumulated[name] + layer.delta_weight()
            update = sums[name].T if is_transposed(layer.base_layer) else sums[name]
            original = self._originals[name]
            weights[name] = (original + update).to(original.dtype)
            if not weights[name].isfinite().all():
                raise ValueError(
                    f"BoostedUpdate.fold: the weight of {name} must be finite, got NaN or inf"
                )
        for name, layer in self.layers.items():
            self.accumulated[name] = sums[name]
            self._weights[name].copy_(weights[name])
            layer.reset_parameters()

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the original weights, bit by bit, and forget what was folded."""
        for name, weight in self._weights.items():
            weight.copy_(self._originals[name])
            self.accumulated[name].zero_()
