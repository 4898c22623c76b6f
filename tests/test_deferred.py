"""Deferred pool gradients: what plain autograd gives, summed in few launches, complete in time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import TinyModel, randomize_adapters, trainable, trained
from op_calls import Calls
from reference import assert_accurate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rasa_ext import deferred_pool_gradients, grouped_linear
from rasa_ext.injection import adapted_layers, apply
from rasa_ext.module import SharedPool

OPS = torch.ops.rasa_ext


def pools(model: nn.Module) -> list[SharedPool]:
    return [module for module in model.modules() if isinstance(module, SharedPool)]


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float64, **kwargs) -> TinyModel:
    return trained(dropout=dropout, **kwargs).to(dtype).train()


def gradients(model: nn.Module, context=None, backward=None, steps: int = 1) -> dict[str, Tensor]:
    """The gradients after `steps` accumulated backward passes, with the masks of one seed."""
    torch.manual_seed(3)
    dtype = next(model.parameters()).dtype
    xs = [torch.randn(4, 5, 8, dtype=torch.float64).to(dtype) for _ in range(steps)]
    model.zero_grad()
    with context or nullcontext():
        for x in xs:
            loss = model(x).square().sum()
            (backward or (lambda loss: loss.backward()))(loss)
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def assert_equal_gradients(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == exact.keys()
    for name, grad in ours.items():
        assert_accurate(grad, exact[name], exact[name], name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("k", [1, 4])
def test_gradients_equal_those_of_plain_autograd(k, window, dropout):
    """In float64; three layers of each of three pools, k = 4 without ranks of their own."""
    model = make_model(dropout, k=k)
    plain = gradients(model, steps=2)

    deferred = gradients(model, deferred_pool_gradients(model, window), steps=2)

    assert_equal_gradients(deferred, plain)
    assert all(pool.deferred is None for pool in pools(model))


@pytest.mark.parametrize(("window", "launches"), [(1, 9), (2, 3 + 1), (3, 3), (4, 1), (100, 1)])
def test_a_window_and_the_end_of_backward_are_one_launch_each(window, launches):
    model = make_model()

    with deferred_pool_gradients(model, window):
        loss = model(torch.randn(2, 8, dtype=torch.float64)).sum()
        with Calls() as calls:
            loss.backward()

    assert calls.count["rasa_pool_gradients_"] == launches


def test_gradients_are_complete_when_backward_returns():
    """An optimizer step inside the context sees all of them."""
    model = make_model()
    plain = gradients(model)
    with deferred_pool_gradients(model, window=100):
        assert_equal_gradients(gradients(model), plain)


def test_existing_gradients_are_added_to_in_place():
    model = make_model(dtype=torch.float32)
    gradients(model)
    before = {name: p.grad for name, p in trainable(model).items()}
    with deferred_pool_gradients(model, window=2):
        model(torch.randn(3, 8)).square().sum().backward()

    assert all(p.grad is before[name] for name, p in trainable(model).items())


def test_layers_of_one_pool_may_drop_at_different_rates():
    model = make_model(dropout=0.3)
    for layer, rate in zip(adapted_layers(model).values(), (0.5, 0.1, 0.0) * 3, strict=True):
        layer.dropout = rate
    model.layers[1].eval()
    plain = gradients(model)

    assert_equal_gradients(gradients(model, deferred_pool_gradients(model, 3)), plain)


@pytest.mark.parametrize("frozen", ["A_shared", "Bt_shared"])
def test_only_what_trains_gets_a_gradient(frozen):
    """Also where the pool alone trains: then nothing else asks a layer for a gradient."""
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("rasa_pools") and not name.endswith(frozen))
    plain = gradients(model)

    deferred = gradients(model, deferred_pool_gradients(model, 2))

    assert len(deferred) == 3
    assert_equal_gradients(deferred, plain)


def test_non_reentrant_checkpointing_draws_the_same_masks():
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model = make_model(dropout=0.3)
    plain = gradients(model)
    for i, block in enumerate(list(model.blocks)):
        model.blocks[i] = Checkpointed(block)

    deferred = gradients(model, deferred_pool_gradients(model, 2))

    renamed = {name.replace(".block", ""): grad for name, grad in deferred.items()}
    assert_equal_gradients(renamed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_gradients_of_the_parameters_dtype(dtype):
    model = make_model(dtype=torch.float32)
    results = []
    for context in (nullcontext(), deferred_pool_gradients(model, 2)):
        model.zero_grad()
        torch.manual_seed(0)
        with context, torch.autocast("cpu", dtype=dtype):
            model(torch.randn(40, 8)).float().square().sum().backward()
        results.append({name: p.grad for name, p in trainable(model).items()})
    exact_model = make_model(dtype=torch.float64)
    torch.manual_seed(0)
    exact_model(torch.randn(40, 8).double()).square().sum().backward()
    exact = {name: p.grad for name, p in trainable(exact_model).items()}
    for name, grad in results[1].items():
        assert grad.dtype == torch.float32
        assert_accurate(grad, results[0][name], exact[name], name, dtype=dtype)


def test_a_quantised_or_hooked_base_is_called():
    model = make_model()
    for block in model.blocks:
        block.attn.q_proj.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    plain = gradients(model)

    assert_equal_gradients(gradients(model, deferred_pool_gradients(model, 2)), plain)


class Fan(nn.Module):
    """Three linears that are fed the same x, which apply() makes siblings."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + torch.tanh(self.k_proj(x)) * self.v_proj(x)


def test_siblings_share_their_mask_and_are_computed_one_by_one():
    model = TinyModel()
    for block in model.blocks:
        block.attn = nn.Module()
        block.attn.q_proj, block.attn.v_proj = nn.Identity(), Fan()
    targets = ("v_proj.q_proj", "v_proj.k_proj", "v_proj.v_proj")
    apply(model, r=4, k=1, target_modules=targets, dropout=0.3)
    randomize_adapters(model).double().train()
    fan = model.blocks[0].attn.v_proj
    assert fan.q_proj.siblings is fan.v_proj.siblings is not None
    plain = gradients(model)

    with Calls() as calls:
        deferred = gradients(model, deferred_pool_gradients(model, 2))

    assert_equal_gradients(deferred, plain)
    assert calls.count["rasa_grouped_backward"] == 9


def test_grouped_linear_sums_its_pools_by_itself():
    model = make_model()
    layers = [block.attn.q_proj for block in model.blocks]
    xs = [torch.randn(M, 8, dtype=torch.float64) for M in (3, 4, 5)]
    pool = layers[0].pool
    sum(y.sum() for y in grouped_linear(xs, layers)).backward()
    plain, pool.A_shared.grad = pool.A_shared.grad, None
    with deferred_pool_gradients(model, 2):
        sum(y.sum() for y in grouped_linear(xs, layers)).backward()
    assert torch.equal(pool.A_shared.grad, plain)


class Fails(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        raise ValueError("no gradient today")


def failing_backward(model: TinyModel) -> None:
    """Run a backward pass that fails after the last block, whose layers have deferred by then."""
    x = torch.randn(4, 8, dtype=torch.float64)
    for i, block in enumerate(model.blocks):
        x = block(Fails.apply(x) if i == 2 else x)
    with pytest.raises(ValueError, match="no gradient today"):
        x.sum().backward()


def test_a_backward_pass_that_fails_leaves_nothing_to_be_added_later():
    model = make_model()
    plain = gradients(model)
    model.zero_grad()

    with deferred_pool_gradients(model, window=100):
        failing_backward(model)
        assert all(pool.A_shared.grad is None for pool in pools(model))
        after = gradients(model)
    assert_equal_gradients(after, plain)

    failing_backward(model)
    assert all(pool.deferred is None for pool in pools(model))


def test_an_error_inside_the_context_ends_it():
    model = make_model()
    with pytest.raises(KeyError), deferred_pool_gradients(model, window=100):
        failing_backward(model)
        raise KeyError
    assert all(pool.deferred is None and pool.A_shared.grad is None for pool in pools(model))


def test_retained_graphs_count_twice():
    model = make_model()

    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    plain = gradients(model, backward=twice)
    assert_equal_gradients(
        gradients(model, deferred_pool_gradients(model, 2), backward=twice), plain
    )


def test_memory_is_bounded_by_the_window():
    model = make_model()
    held = []

    with deferred_pool_gradients(model, window=2) as deferred:
        real_add = deferred.add

        def add(pool, contribution):
            real_add(pool, contribution)
            (pending,) = deferred._pending.values()
            held.append({id(p): len(waiting) for p, waiting in pending.items()})

        deferred.add = add
        model(torch.randn(3, 8, dtype=torch.float64)).sum().backward()

        assert not deferred._pending
    assert len(held) == 9 and max(max(h.values(), default=0) for h in held) == 1


def test_compiled_code_keeps_plain_autograd():
    model = make_model()
    plain = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with deferred_pool_gradients(model, 2):
        torch.manual_seed(3)
        model.zero_grad()
        compiled(torch.randn(4, 5, 8, dtype=torch.float64)).square().sum().backward()
    ours = {name: p.grad for name, p in trainable(model).items()}
    assert_equal_gradients(ours, plain)


def wrapped_by_hook(model: nn.Module) -> nn.Module:
    pools(model)[0].A_shared.register_post_accumulate_grad_hook(lambda p: None)
    return model


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda model: deferred_pool_gradients(model, 0),
            ValueError,
            "deferred_pool_gradients: window must be an integer of at least 1, got 0",
        ),
        (
            lambda model: deferred_pool_gradients(trained(k=0), 2),
            ValueError,
            "deferred_pool_gradients: the model has no shared pools. Call rasa_ext.apply(model) "
            "with k above 0 first",
        ),
        (
            lambda model: deferred_pool_gradients(wrapped_by_hook(model), 2),
            ValueError,
            "deferred_pool_gradients: A_shared has gradient hooks, which would not fire. Remove "
            "them, or use plain autograd",
        ),
    ],
)
def test_deferring_says_what_is_wrong(act, kind, message):
    with pytest.raises(kind) as error, act(make_model()):
        pass
    assert str(error.value) == message


def test_deferring_twice_is_refused():
    model = make_model()
    with deferred_pool_gradients(model, 2):
        with (
            pytest.raises(RuntimeError, match="already active for this model"),
            deferred_pool_gradients(model, 2),
        ):
            pass
        assert all(pool.deferred is not None for pool in pools(model))


def test_a_model_under_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(make_model())
        with (
            pytest.raises(ValueError, match="the model is a DistributedDataParallel"),
            deferred_pool_gradients(model, 2),
        ):
            pass
    finally:
        torch.distributed.destroy_process_group()
