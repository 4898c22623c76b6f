"""What apply() refuses. Each refusal leaves the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from models import TinyModel
from torch import nn

from rasa_ext.injection import apply


def tied_head() -> nn.Module:
    model = TinyModel()
    model.embed_tokens = nn.Embedding(8, 8)
    model.lm_head = nn.Linear(8, 8, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    return model


def two_names() -> nn.Module:
    model = TinyModel()
    model.layers[2].attn.q_proj = model.layers[0].attn.q_proj
    return model


def adapted() -> nn.Module:
    model = TinyModel()
    apply(model, r=4, k=1, target_modules="v_proj")
    return model


def two_dtypes() -> nn.Module:
    model = TinyModel()
    model.layers[1].double()
    return model


def two_devices() -> nn.Module:
    model = TinyModel()
    model.layers[1].to("meta")
    return model


LINEARS = "Linear layers of this model: down_proj, head, q_proj, up, v_proj"
REFUSALS = [
    (
        TinyModel,
        {"target_modules": ["q_porj", "q_proj", "w7"]},
        ValueError,
        f"no module is named 'q_porj', 'w7'. {LINEARS}",
    ),
    (TinyModel, {"target_modules": []}, ValueError, f"target_modules names nothing. {LINEARS}"),
    (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        {"target_modules": "q_proj"},
        ValueError,
        "no module is named 'q_proj'. Linear layers of this model: 0",
    ),
    (
        lambda: nn.ReLU(),
        {"target_modules": "q_proj"},
        ValueError,
        "no module is named 'q_proj'. Linear layers of this model: none",
    ),
    (
        TinyModel,
        {"target_modules": ["attn"]},
        TypeError,
        "target 'attn' names layers.0.attn, a Module, which is not a linear layer: it has no "
        "in_features and out_features",
    ),
    (
        tied_head,
        {"target_modules": ["lm_head"]},
        ValueError,
        "lm_head.weight is tied to embed_tokens.weight; an update of one would not reach the "
        "other, and merging would change both. Untie them, or leave 'lm_head' out of "
        "target_modules",
    ),
    (
        two_names,
        {"target_modules": ["q_proj"]},
        ValueError,
        "layers.0.attn.q_proj and layers.2.attn.q_proj are one module under two names; with k = 1 "
        "it would join its pool once and be counted twice. Give each layer its own module, or use "
        "k = 0",
    ),
    (
        adapted,
        {"target_modules": ["q_proj"]},
        ValueError,
        "the model has adapters already: layers.0.attn.v_proj is a RaSALinear",
    ),
    (
        two_dtypes,
        {"target_modules": ["q_proj"]},
        ValueError,
        "the layers of group attn__q_proj__8x8 share one pool and must have one adapter dtype and "
        "device, got torch.float32 on cpu, torch.float64 on cpu",
    ),
    (
        two_devices,
        {"target_modules": ["q_proj"]},
        ValueError,
        "the layers of group attn__q_proj__8x8 share one pool and must have one adapter dtype and "
        "device, got torch.float32 on cpu, torch.float32 on meta",
    ),
    (
        TinyModel,
        {"target_modules": ["q_proj"], "dtype": torch.float16},
        ValueError,
        "dtype must be the base weight's torch.float32, got torch.float16",
    ),
    (TinyModel, {"r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
    (
        TinyModel,
        {"r": 2, "k": 3},
        ValueError,
        "k must be an integer in 0 .. r = 2, got 3. Each layer gives k of its r ranks to the pool; "
        "k = 0 is plain LoRA, k = r shares all",
    ),
    (TinyModel, {"alpha": -1}, ValueError, "alpha must be a finite number above 0, got -1"),
    (
        TinyModel,
        {"alpha": math.inf},
        ValueError,
        "alpha must be a finite number above 0, got inf",
    ),
    (TinyModel, {"dropout": 1}, ValueError, "dropout must be in [0, 1), got 1"),
]


@pytest.mark.parametrize(("make", "arguments", "kind", "message"), REFUSALS)
def test_refuses_and_leaves_the_model_as_it_was(make, arguments, kind, message: str) -> None:
    model = make()
    before = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}

    with pytest.raises(kind) as error:
        apply(model, **arguments)

    assert str(error.value) == f"apply: {message}"
    assert [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)] == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen
