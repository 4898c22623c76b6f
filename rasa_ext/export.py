"""Adapters as plain LoRA, which everything that loads or serves LoRA reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import pad

from rasa_ext.base_layer import is_transposed
from rasa_ext.contents import check_finite
from rasa_ext.injection import adapted_layers, clean_name, target_names, unwrapped
from rasa_ext.module import SharedPool
from rasa_ext.sharding import whole, writes_files
from rasa_ext.storage import create_folder
from rasa_ext.update import lora_pair
from rasa_ext.weights import adapter_state_dict

# A layer's base and its A, A_shared, Bt, Bt_shared and d.
Layer = tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]

# What vLLM takes as --max-lora-rank; other servers take any number.
_SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_to_lora(
    model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> int:
    """Write the adapters as a LoRA that PEFT and LoRA servers load; return their max_lora_rank.

    Semantics, for each layer, exact but for one rounding of B to `dtype`::

        lora_A = torch.cat([pool.A_shared, A])                          # (R, K)
        lora_B = (torch.cat([pool.Bt_shared, Bt]) * d[:, None]).T       # (N, R)

    with zeros up to the largest R of all layers and lora_alpha = r = R, so that LoRA's own scaling
    is 1. k = 0 gives the LoRA itself, with alpha / r inside lora_B.

    model: one that apply() adapted, or one of PEFT's with rasa_ext.peft, whose active adapter this
    exports. `path` becomes a folder of adapter_model.safetensors and adapter_config.json: a new or
    an empty one, since a folder cannot be replaced in one step. Both files are there afterwards, or
    neither. dtype: of the tensors; by default float32 (float64 for float64 adapters), which holds
    the products with d of 16-bit adapters exactly. Returns the smallest rank that vLLM offers for
    R, or R itself above 512, which vLLM refuses. Of a model that FSDP2 has sharded, every process
    must call this, and rank 0 writes.

    Raises ValueError if the model has no adapters, is itself an adapted layer, has several active
    adapters or holds NaN or inf (in `dtype`), FileExistsError if there is something at `path`,
    OSError if it cannot be written.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"export_to_lora: dtype must be a floating-point dtype, got {dtype}")
    root = unwrapped(model)
    inner: Any = getattr(root, "get_base_model", None)
    root = root if inner is None else inner()  # PEFT's wrapper is not part of the names
    layers = _peft_layers(root) or _plain_layers(root)
    R = max(tensors[-1].numel() for _, tensors in layers.values())
    stored: dict[str, Tensor] = {}
    for name, (_, tensors) in layers.items():
        A, B = (t.detach().to("cpu", dtype or t.dtype) for t in lora_pair(*tensors))
        missing = R - A.shape[0]
        stored[f"base_model.model.{name}.lora_A.weight"] = pad(A, (0, 0, 0, missing))
        stored[f"base_model.model.{name}.lora_B.weight"] = pad(B, (0, missing))
    for key, tensor in stored.items():
        check_finite("export_to_lora", key, tensor)
    config = json.dumps(_lora_config(root, layers, R), indent=2) + "\n"
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"export_to_lora: {path} exists. Name a new folder, or delete it first"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"export_to_lora: the folder of {path} does not exist")
    max_lora_rank = next((rank for rank in _SERVER_RANKS if rank >= R), R)
    if not writes_files(root):
        return max_lora_rank
    try:
        files = {"adapter_model.safetensors": save(stored, {"format": "pt"})}
        create_folder(target, files | {"adapter_config.json": config.encode()})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"export_to_lora: {path} could not be written, and nothing is there: {error}"
        ) from error
    return max_lora_rank


def _plain_layers(root: nn.Module) -> dict[str, Layer]:
    """Return the layers of a model that apply() adapted, with their tensors."""
    state = adapter_state_dict(root)
    pools = {m: clean_name(n) for n, m in root.named_modules() if isinstance(m, SharedPool)}
    layers = {}
    for name, layer in adapted_layers(root).items():
        if not name:
            raise ValueError(
                "export_to_lora: model must hold the adapted layers, got one of them. PEFT names "
                "layers by their place in a model"
            )
        A, Bt = state[f"{name}.A"], state[f"{name}.Bt"]
        d = state.get(f"{name}.d", layer.d)  # k = 0: a constant, not in the state
        A_shared, Bt_shared = A[:0], Bt[:0]
        if layer.pool is not None:
            pool = pools[layer.pool]
            A_shared, Bt_shared = state[f"{pool}.A_shared"], state[f"{pool}.Bt_shared"]
        layers[name] = layer.base_layer, (A, A_shared, Bt, Bt_shared, d)
    return layers


def _peft_layers(root: nn.Module) -> dict[str, Layer]:
    """Return the layers that rasa_ext.peft adapted, with the tensors of their active adapter."""
    layers: dict[str, Layer] = {}
    for name, module in root.named_modules():
        # By what they have: this module does not import PEFT.
        if hasattr(module, "adapter") and hasattr(module, "rasa_pools"):
            tuner: Any = module
            active = [a for a in tuner.active_adapters if a in tuner.rasa_settings]
            if len(active) != 1:
                raise ValueError(
                    f"export_to_lora: {name} must have one active adapter, got {active}. Call "
                    "set_adapter() first"
                )
            A, A_shared, Bt, Bt_shared, d = map(whole, tuner.adapter(active[0]))
            layers[name] = tuner.base_layer, (A, A_shared, Bt, Bt_shared, d)
    return layers


def _lora_config(root: nn.Module, layers: dict[str, Layer], R: int) -> dict[str, Any]:
    """Return PEFT's LoraConfig of rank R with scaling 1."""
    of_model = getattr(getattr(root, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": of_model or None,
        "task_type": None,
        "inference_mode": True,
        "r": R,
        "lora_alpha": R,
        "lora_dropout": 0.0,
        "bias": "none",
        # PEFT's word for a weight that is stored (K, N).
        "fan_in_fan_out": all(is_transposed(base) for base, _ in layers.values()),
        "target_modules": list(target_names(root, layers)),
    }
