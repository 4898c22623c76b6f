"""Quantised base layers: called as they are, their update added to what they return.

bitsandbytes and torchao are of the dev extra: where one is missing, its tests fail.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Int8Linear, plain, randomize_adapters
from reference import assert_accurate
from torch import Tensor, nn

from rasa_ext.injection import adapted_layers, apply
from rasa_ext.module import RaSALinear
from rasa_ext.weights import load_adapter, merge, save_adapter

WIDTH = 64  # 4-bit formats group 32 or 64 values
TARGETS = ("q_proj", "v_proj")


class ForwardOnly(nn.Module):
    """All that a base layer must have: sizes and a forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._linear = [linear]  # a list: the layer has no parameter and no weight

    def forward(self, x: Tensor) -> Tensor:
        return self._linear[0](x)


def bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes as bnb

    options = {"bias": linear.bias is not None}
    if bits == 8:
        options["has_fp16_weights"] = False
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.LinearNF4
    layer = kind(linear.in_features, linear.out_features, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def torchao(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from torchao import quantization

    config = quantization.IntxWeightOnlyConfig(weight_dtype=dtype)
    if dtype == torch.int8:
        config = quantization.Int8WeightOnlyConfig()
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, config)
    return holder[0]


QUANTIZE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "forward_only": ForwardOnly,
    "int8_stand_in": Int8Linear,
    "bitsandbytes_8bit": lambda linear: bitsandbytes(linear, 8),
    "bitsandbytes_4bit": lambda linear: bitsandbytes(linear, 4),
    "torchao_int8": lambda linear: torchao(linear, torch.int8),
    "torchao_int4": lambda linear: torchao(linear, torch.int4),
}


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of WIDTH whose targets are quantised."""
    model = plain(width=WIDTH).to(dtype).requires_grad_(False)
    for block in model.blocks:
        for name in TARGETS:
            setattr(block.attn, name, QUANTIZE[kind](getattr(block.attn, name)))
    return model


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = quantized(kind, dtype)
    apply(model, r=4, k=1, target_modules=TARGETS)
    return randomize_adapters(model)


def update(layer: RaSALinear, x: Tensor, tensors: list[Tensor]) -> Tensor:
    A, Bt, d, A_shared, Bt_shared = (t.to(x.dtype) for t in tensors)
    return ((x @ torch.cat([A_shared, A]).T) * d) @ torch.cat([Bt_shared, Bt])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTIZE)
def test_the_update_and_its_gradients_are_those_of_plain_torch(kind, dtype) -> None:
    layer = adapted(kind, dtype).blocks[1].attn.q_proj
    x = torch.randn(5, WIDTH).to(dtype).requires_grad_()
    dy = torch.randn(5, WIDTH).to(dtype)
    parameters = [layer.A, layer.Bt, layer.d, layer.pool.A_shared, layer.pool.Bt_shared]
    base = layer.base_layer(x)
    (dx_base,) = torch.autograd.grad(base, x, dy)

    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)

    runs = []
    for of in (torch.float64, dtype):
        leaves = [t.detach().to(of).requires_grad_() for t in (x, *parameters)]
        out = base.detach().to(of) + update(layer, leaves[0], leaves[1:])
        dx, *rest = torch.autograd.grad(out, leaves, dy.to(of))
        runs.append([out.detach(), dx + dx_base.to(of), *rest])
    for out, exact, plain_torch in zip([y.detach(), *gradients], *runs, strict=True):
        assert_accurate(out, plain_torch, exact, dtype=dtype)
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("kind", QUANTIZE)
def test_a_model_of_such_layers_trains_saves_and_loads(tmp_path, kind: str) -> None:
    model = adapted(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, x = torch.optim.AdamW(trained, lr=0.01), torch.randn(6, WIDTH)
    losses = []
    for _ in range(5):
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = quantized(kind)

    load_adapter(fresh, tmp_path / "adapter.safetensors")

    assert losses[-1] < losses[0]
    assert len(adapted_layers(fresh)) == 6
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", QUANTIZE)
def test_nothing_is_added_to_a_quantized_weight(kind: str) -> None:
    model, x = adapted(kind), torch.randn(3, WIDTH)
    y = model(x)

    with pytest.raises(TypeError) as error:
        merge(model)

    name = type(model.blocks[0].attn.q_proj.base_layer).__name__
    assert f"{name} has no floating-point weight of shape (N, K) = [64, 64] to add to" in str(
        error.value
    )
    assert not any(layer.merged for layer in adapted_layers(model).values())
    assert torch.equal(model(x), y)
