"""grouped_linear(): many RaSA layers at once, for callers who hold all their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext.layer_ops import adapters_of, rasa_grouped_linear
from rasa_ext.module import RaSALinear


def grouped_linear(xs: Sequence[Tensor], layers: Sequence[RaSALinear]) -> list[Tensor]:
    """Return [layer(x) for x, layer in zip(xs, layers)], in a number of launches that is constant.

    For reconstruction, distillation, calibration, or pipelined micro-batches: wherever all inputs
    exist together. Layers may have different shapes, ranks and pools, and inputs different numbers
    of tokens; a layer may occur more than once. Dropout draws a seed for each layer in order, as
    calling them one by one would; siblings, which share a mask when they are called in turn, draw
    their own here.

    Forward takes two launches beside the base layers, backward three; a pool's gradient is summed
    over all its layers in one accumulator. Devices and pairs of dtypes (of activations and of
    adapters) are launched apart. Works with autograd, autocast, torch.compile. Hooks on the
    RaSALinear modules themselves do not run; those of base layers do.

    Raises ValueError for lists of unequal length or an input that does not fit its layer, TypeError
    for a layer that is no RaSALinear, RuntimeError for a layer that is merged and in training mode.
    """
    if len(xs) != len(layers):
        raise ValueError(
            f"grouped_linear: xs must have one entry for each layer = {len(layers)}, got {len(xs)}"
        )
    for i, layer in enumerate(layers):
        if not isinstance(layer, RaSALinear):
            raise TypeError(
                f"grouped_linear: layers[{i}] must be a RaSALinear, got {type(layer).__name__}"
            )
    ys: list[Tensor | None] = [None] * len(xs)
    kinds: dict[object, list[int]] = {}
    inputs = []
    for i, (x, layer) in enumerate(zip(xs, layers, strict=True)):
        layer.check_input(x)
        inputs.append(x.reshape(-1, layer.in_features))
        if layer.merged:
            ys[i] = layer(x)
        else:
            kinds.setdefault((x.device, _compute_dtype(x), layer.A.dtype), []).append(i)
    rates = [layer.drop_rate for layer in layers]
    seeds = [
        None if layer.merged else layer.draw_seed(x, p)
        for x, layer, p in zip(xs, layers, rates, strict=True)
    ]
    for members in kinds.values():
        weights: list[Tensor | None] = []
        biases: list[Tensor | None] = []
        bases: list[Tensor | None] = []
        for i in members:
            layer = layers[i]
            fused = layer.fused_base()
            weight, bias = (None, None) if fused is None else fused
            weights.append(weight)
            biases.append(bias)
            base = None if fused else layer.base_layer(xs[i]).reshape(-1, layer.out_features)
            bases.append(base)
        results = rasa_grouped_linear(
            [inputs[i] for i in members],
            weights,
            biases,
            bases,
            adapters_of([layers[i] for i in members]),
            [rates[i] for i in members],
            [seeds[i] for i in members],
        )
        for i, y in zip(members, results, strict=True):
            ys[i] = y.reshape(xs[i].shape[:-1] + (layers[i].out_features,))
    return [y for y in ys if y is not None]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which the ops take x, under autocast its dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
