"""Tiny random transformers models with RaSA through PEFT, and the same through apply()."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from hf_models import TARGETS, language_model, tokens
from models import randomize_adapters
from torch import Tensor, nn

import rasa_ext
from rasa_ext.peft import RaSAConfig
from rasa_ext.peft.layer import Linear

KINDS = tuple(TARGETS)
# PEFT asks the tuner what to save, and looks before it deletes, since this release.
since_peft_0_21 = pytest.mark.skipif(
    not hasattr(peft.tuners.tuners_utils.BaseTuner, "_get_adapter_state_dict"),
    reason="needs PEFT 0.21",
)
# Groups, and so pools, of the targets.
GROUPS = {"llama": 7, "gpt2": 4, "bert": 3}


def base_model(kind: str = "llama") -> nn.Module:
    """The model of this kind; the same weights at each call."""
    return language_model(kind)


def config(kind: str = "llama", **kwargs) -> RaSAConfig:
    return RaSAConfig(**({"r": 4, "k": 1, "target_modules": list(TARGETS[kind])} | kwargs))


def adapted(kind: str = "llama", dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """A PEFT model with random adapters, as training would leave it, in evaluation mode."""
    model = peft.get_peft_model(base_model(kind).to(dtype), config(kind, **kwargs))
    return randomize_adapters(model).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The logits of a few tokens, as rows."""
    return model(input_ids=tokens()).logits.flatten(0, 1)


def layers(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names with the same bits; NaN counts as itself."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].nan_to_num(7), tensor.nan_to_num(7)), name


def pools_of(model: nn.Module, adapter: str) -> set[int]:
    """The distinct tensors that the layers of an adapter take their shared ranks from."""
    pools = [layer.rasa_pools[adapter] for layer in layers(model) if adapter in layer.rasa_pools]
    return {id(tensor) for pool in pools for tensor in pool.parameters()}


def apply_model(model: nn.Module, kind: str, r: int = 4, k: int = 1) -> nn.Module:
    """The base model with apply() and the weights of a PEFT model's default adapter."""
    plain = base_model(kind)
    rasa_ext.apply(plain, r=r, k=k, target_modules=TARGETS[kind])
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if not parameter.requires_grad:
                continue
            place, _, leaf = name.rpartition(".")
            if leaf.endswith("_shared"):
                group = place.removeprefix("rasa_pools.")
                source = state[f"base_model.rasa_{leaf}.default.{group}"]
            elif parameter.numel() == 0:  # k = r: here empty, there absent
                continue
            else:
                source = state[f"base_model.model.{place}.rasa_{leaf}.default"]
            parameter.copy_(source)
    return plain


def authors_layer(layer: Linear, x: Tensor) -> Tensor:
    """The authors' formula for every active adapter, added up."""
    y = layer.base_layer(x)
    for name in layer.active_adapters:
        y = y + authors_adapter(layer, name, x)
    return y


def authors_adapter(layer: Linear, name: str, x: Tensor) -> Tensor:
    # A cast copy of a layer still finds its pool in the tuner, which was not cast.
    A, A_shared, Bt, Bt_shared, d = (t.to(x.dtype) for t in layer.adapter(name))
    return ((x @ torch.cat([A_shared, A]).T) * d) @ torch.cat([Bt_shared, Bt])


def reload(folder: Path, kind: str = "llama", **kwargs) -> nn.Module:
    """What PeftModel.from_pretrained makes of a folder; a warning fails."""
    dtype = kwargs.pop("dtype", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base_model(kind).to(dtype), folder, **kwargs)


def two_adapters(**other) -> nn.Module:
    """Adapters "default" (k = 1) and "other" (k = 2), both random; "default" is active."""
    model = adapted()
    model.add_adapter("other", config(k=2, **other))
    model.base_model.set_adapter(["default", "other"])
    randomize_adapters(model, seed=5)
    model.set_adapter("default")
    return model.eval()
