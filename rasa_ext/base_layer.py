"""What a base layer must be for an adapter, and what an adapter may be for a base layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear-like module, None of any other.

    Linear-like is whatever has in_features and out_features (nn.Linear and its quantised kin) or
    the nx and nf of transformers' Conv1D.
    """
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if sizes == (None, None):
        sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    K, N = sizes
    return (K, N) if isinstance(K, int) and isinstance(N, int) and K > 0 and N > 0 else None


def check_config(op: str, r: int, k: int, alpha: float, dropout: float) -> None:
    """Raise ValueError unless r >= 1, 0 <= k <= r, alpha > 0 and 0 <= dropout < 1."""
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"{op}: r must be an integer of at least 1, got {r}")
    if not isinstance(k, int) or not 0 <= k <= r:
        raise ValueError(
            f"{op}: k must be an integer in 0 .. r = {r}, got {k}. Each layer gives k of its r "
            "ranks to the pool; k = 0 is plain LoRA, k = r shares all"
        )
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"{op}: alpha must be a finite number above 0, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")


def base_weight(base_layer: nn.Module) -> Tensor | None:
    """Return the layer's weight if it is a floating-point matrix that one may add to, else None."""
    weight = getattr(base_layer, "weight", None)
    sizes = features(base_layer)
    if not isinstance(weight, Tensor) or sizes is None:
        return None
    K, N = sizes
    # Storage formats, in which sums are not computed: one byte per element (float8), and subclasses
    # of Tensor, which call themselves floating-point (torchao).
    is_plain = type(weight) in (Tensor, nn.Parameter)
    is_matrix = is_plain and weight.is_floating_point() and weight.element_size() >= 2
    expected = (K, N) if is_transposed(base_layer) else (N, K)
    return weight if is_matrix and tuple(weight.shape) == expected else None


def is_transposed(base_layer: nn.Module) -> bool:
    """Return whether the layer stores its weight (K, N), as transformers' Conv1D does."""
    return not hasattr(base_layer, "out_features") and hasattr(base_layer, "nf")


def adapter_dtype(op: str, base_layer: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the layer's adapter: `dtype` if it fits, by default at least float32.

    An adapter has the dtype of the activations, or float32 when those are bfloat16 or float16.
    """
    weight = base_weight(base_layer)
    if dtype is None:
        of_weight = torch.float32 if weight is None else weight.dtype
        return torch.promote_types(of_weight, torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype must be a floating-point dtype, got {dtype}")
    if weight is not None and dtype != weight.dtype:
        is_half = weight.dtype in (torch.bfloat16, torch.float16)
        if not (is_half and dtype == torch.float32):
            or_float32 = " or torch.float32" if is_half else ""
            raise ValueError(
                f"{op}: dtype must be the base weight's {weight.dtype}{or_float32}, got {dtype}"
            )
    return dtype


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer, the default one without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.get_default_device()


def must_be_called(module: nn.Module) -> bool:
    """Return whether the module's own call does more than its forward: it carries hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced on the instance, as accelerate's offloading does
    )


def fusible(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return (weight, bias) of an nn.Linear that an op may compute in its place, else None.

    Not of one that trains, or carries hooks, which only its own call runs.
    """
    # The dictionary first: nn.Module's attribute lookup costs as much as a small op. FSDP1 and
    # weight_norm keep tensors elsewhere.
    tensors = base._parameters
    weight: Any
    bias: Any
    if "weight" in tensors and "bias" in tensors:
        weight, bias = tensors["weight"], tensors["bias"]
    else:
        weight, bias = base.weight, base.bias
    plain = (Tensor, nn.Parameter)  # a subclass, as quantisers make, is its own linear's business
    is_own_business = (
        type(weight) not in plain
        or (bias is not None and type(bias) not in plain)
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or must_be_called(base)
    )
    return None if is_own_business else (weight, bias)
