"""A base layer keeps what it has: frozen or training, hooks, pruning, tensors held elsewhere."""

from __future__ import annotations

import torch
from models import K, N, assert_as_accurate, authors_layer, make_layer
from torch import nn
from torch.nn.utils import prune

from rasa_ext.module import RaSALinear


def test_base_layer_is_frozen_and_keeps_its_mode() -> None:
    base = nn.Linear(K, N).eval()
    layer = RaSALinear(base, None, r=4, k=0, alpha=16)

    layer(torch.randn(2, K)).sum().backward()

    assert base.weight.grad is None and base.bias.grad is None
    assert layer.A.grad is not None and layer.Bt.grad is not None
    assert not layer.training


def test_a_base_that_trains_gets_its_gradient() -> None:
    layer = make_layer()
    layer.base_layer.requires_grad_(True)

    layer(torch.ones(5, K)).sum().backward()

    assert torch.equal(layer.base_layer.weight.grad, torch.full((N, K), 5.0))
    assert torch.equal(layer.base_layer.bias.grad, torch.full((N,), 5.0))


def test_hooks_of_the_base_run_and_may_change_its_output() -> None:
    layer = make_layer()
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: y.sign())
    assert_as_accurate(layer, authors_layer, layer, torch.randn(5, K))
    handle.remove()
    layer.base_layer.forward = lambda x: x[..., :N].sign()
    assert_as_accurate(layer, authors_layer, layer, torch.randn(5, K))
    layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    assert_as_accurate(layer, authors_layer, layer, torch.randn(5, K))


def test_backward_hooks_of_the_base_run() -> None:
    layer, seen = make_layer(), []
    layer.base_layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))

    layer(torch.randn(5, K, requires_grad=True)).sum().backward()

    assert seen == [(5, N)]


def test_tensors_may_lie_outside_the_parameter_dictionary() -> None:
    # FSDP1 leaves them as plain attributes while a layer runs.
    layer = make_layer()
    for module in (layer, layer.pool, layer.base_layer):
        for name in list(module._parameters):
            module.__dict__[name] = module._parameters.pop(name).detach()

    y = layer(torch.ones(5, K))

    assert torch.equal(y, make_layer()(torch.ones(5, K)))


def test_pruning_of_the_base_is_honoured() -> None:
    layer = make_layer()
    prune.random_unstructured(layer.base_layer, "weight", 0.5)

    assert_as_accurate(layer, authors_layer, layer, torch.randn(5, K))
