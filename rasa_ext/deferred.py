"""Gradients of shared pools summed over many layers in one launch, at the user's wish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rasa_ext.injection import adapted_layers
from rasa_ext.layer_ops import rasa_pool_gradients_
from rasa_ext.module import RaSALinear, SharedPool

_ops = torch.ops.rasa_ext


class Contribution(NamedTuple):
    """What one layer adds to its pool's gradients: d ∘rows gᵀ·x̃ and d ∘rows sᵀ·dy."""

    x: Tensor
    dy: Tensor
    g: Tensor
    s: Tensor
    d: Tensor
    p: float
    seed: Tensor | None


class DeferredPoolGradients:
    """Collects what layers contribute to their pools' gradients, and adds it to `.grad`.

    Held by the pools it serves while deferred_pool_gradients() is active.
    """

    def __init__(self, window: int) -> None:
        """Hold at most `window` layers of each pool."""
        self.window = window
        # By backward pass, as the engine numbers them: a pass that fails never adds what it left,
        # and a pass inside another one (as reentrant checkpointing runs) or in another thread has
        # its own.
        self._pending: dict[int, dict[SharedPool, list[Contribution]]] = {}

    def compute(self, layer: RaSALinear, x: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """Return the output for x as a matrix; backward leaves the pool's share to add()."""
        pool = layer.pool
        assert pool is not None, "who has no pool has nobody to defer to"
        fused = layer.fused_base()
        base = None if fused is not None else layer.base_layer(x).reshape(-1, layer.out_features)
        x = x.reshape(-1, layer.in_features)
        weight, bias = (None, None) if fused is None else fused
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if layer.A.dtype not in (torch.float32, dtype):
                raise TypeError(
                    f"deferred_pool_gradients: adapters must have autocast's {dtype} or "
                    f"torch.float32, got {layer.A.dtype}"
                )
            x = x.to(dtype)
            weight = None if weight is None else weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            base = None if base is None else base.to(dtype)
        y: Tensor = _DeferredLinear.apply(  # type: ignore[no-untyped-call]
            self, pool, p, seed, weight, bias, x, base, layer.A, layer.Bt, layer.d,
            pool.A_shared, pool.Bt_shared,
        )  # fmt: skip
        return y

    def add(self, pool: SharedPool, contribution: Contribution) -> None:
        """Keep a contribution until the window is full or backward ends. Called in backward."""
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass not in self._pending:
            self._pending[backward_pass] = {}
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._flush(self._pending.pop(backward_pass)))
        pending = self._pending[backward_pass]
        pending.setdefault(pool, []).append(contribution)
        if len(pending[pool]) >= self.window:
            self._flush({pool: pending.pop(pool)})

    def discard(self) -> None:
        """Forget what a backward pass that failed has left."""
        self._pending.clear()

    @torch.no_grad()
    def _flush(self, pending: dict[SharedPool, list[Contribution]]) -> None:
        """Add contributions to their pools' .grad: one launch for each device and dtype."""
        kinds: dict[object, list[tuple[SharedPool, Contribution]]] = {}
        for pool, contributions in pending.items():
            for c in contributions:
                kinds.setdefault((c.x.device, c.x.dtype, c.d.dtype), []).append((pool, c))
        for members in kinds.values():
            pools = list(dict.fromkeys(pool for pool, _ in members))
            dA_shared = [_gradient(pool.A_shared) for pool in pools]
            dBt_shared = [_gradient(pool.Bt_shared) for pool in pools]
            index = {pool: i for i, pool in enumerate(pools)}
            rasa_pool_gradients_(
                dA_shared,
                dBt_shared,
                [c.x for _, c in members],
                [c.dy for _, c in members],
                [c.g for _, c in members],
                [c.s for _, c in members],
                [c.d for _, c in members],
                [index[pool] for pool, _ in members],
                [c.p for _, c in members],
                [c.seed for _, c in members],
            )
            for pool, dA, dBt in zip(pools, dA_shared, dBt_shared, strict=True):
                for parameter, grad in ((pool.A_shared, dA), (pool.Bt_shared, dBt)):
                    if parameter.requires_grad:
                        parameter.grad = grad


def _gradient(parameter: Tensor) -> Tensor:
    """Return the tensor to add to: .grad, zeros if there is none yet, no rows if not wanted."""
    if not parameter.requires_grad:
        return parameter.new_empty(0, parameter.shape[1])
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class _DeferredLinear(torch.autograd.Function):
    """rasa_linear or rasa_add, whose backward leaves dA_shared and dBt_shared to be summed later.

    The pool's tensors are inputs so that the output requires a gradient when they do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        deferred: DeferredPoolGradients,
        pool: SharedPool,
        p: float,
        seed: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        x: Tensor,
        base: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        d: Tensor,
        A_shared: Tensor,
        Bt_shared: Tensor,
    ) -> Tensor:
        adapter = (A, A_shared, Bt, Bt_shared, d)
        y: Tensor
        if base is None:
            y, s = _ops.rasa_linear(x, weight, bias, *adapter, p, seed)
        else:
            y, s = _ops.rasa_add(x, base, *adapter, p, seed)
        ctx.save_for_backward(x, weight, *adapter, s, seed)
        ctx.deferred, ctx.pool, ctx.p = deferred, pool, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, A_shared, Bt, Bt_shared, d, s, seed = ctx.saved_tensors
        wants_x, wants_base, *wanted, wants_A_shared, wants_Bt_shared = ctx.needs_input_grad[6:]
        mask = [wants_x, *wanted, wants_A_shared, False, False]  # of x, A, Bt, d, g and the pool
        *grads, g, _, _ = _ops.rasa_grouped_backward(
            [dy], [x], [weight], [A], [Bt], [d], [A_shared], [Bt_shared], [0], [s], [ctx.p],
            [seed], mask,
        )  # fmt: skip
        if wants_A_shared or wants_Bt_shared:
            # g is empty where only Bt_shared trains, which does not read it.
            g_rows = g[0] if len(g[0]) == len(s) else torch.zeros_like(s)
            ctx.deferred.add(ctx.pool, Contribution(x, dy, g_rows, s, d, ctx.p, seed))
        dx, dA, dBt, dd = (
            some[0] if is_wanted else None for some, is_wanted in zip(grads, mask, strict=False)
        )
        dbase = dy if wants_base else None
        return None, None, None, None, None, None, dx, dbase, dA, dBt, dd, None, None


@contextmanager
def deferred_pool_gradients(model: nn.Module, window: int) -> Iterator[DeferredPoolGradients]:
    """Sum the gradients of shared pools over many layers at once, while the context is active.

    Plain autograd computes each layer's share of dA_shared and dBt_shared in that layer's backward
    and adds it up in memory. Here a layer keeps x, dy, s and g until `window` layers of its pool
    have run, and one launch adds all of them to `.grad`, in float32 accumulators and in place; what
    is left is added when backward ends. Gradients are complete when backward() returns, and equal
    those of plain autograd up to rounding::

        with rasa_ext.deferred_pool_gradients(model, window=8):
            model(x).loss.backward()
        optimizer.step()

    Memory: up to `window` layers of each pool are held, each with M*(K + N) + 2*M*R elements, where
    plain autograd frees them layer by layer; an x that several layers read is held once.

    Forward and backward must both run inside the context. Works with gradient accumulation,
    autocast and non-reentrant checkpointing. A backward pass that raises adds nothing later; what
    it added before stays in .grad, as with plain autograd. backward(inputs=...) and
    torch.autograd.grad do not see pools here. Siblings still share a mask, but each is computed on
    its own. Code under torch.compile and grouped_linear, which sums over its layers by itself, keep
    plain autograd. Hooks on a pool's parameters would not
    fire, so DDP, FSDP and parameters with hooks are refused; a model whose DDP wrapper is not part
    of `model` cannot be recognised: do not use it there.

    Raises ValueError if the model has no pools, window is below 1, or a pool is wrapped or has
    hooks; RuntimeError if the pools are deferred already.
    """
    pools = _pools(model)
    if not isinstance(window, int) or window < 1:
        raise ValueError(
            f"deferred_pool_gradients: window must be an integer of at least 1, got {window}"
        )
    deferred = DeferredPoolGradients(window)
    for pool in pools:
        pool.deferred = deferred
    try:
        yield deferred
    finally:
        for pool in pools:
            pool.deferred = None
        deferred.discard()


def _pools(model: nn.Module) -> list[SharedPool]:
    """Return the model's pools; raise for those whose gradients something waits for."""
    for name, module in model.named_modules():
        if isinstance(module, _wrappers()):
            raise ValueError(
                f"deferred_pool_gradients: {name or 'the model'} is a {type(module).__name__}, "
                "whose hooks on the pools' parameters would not fire. Use plain autograd there"
            )
    # Layers say what their pool is: it may be registered elsewhere.
    layers = adapted_layers(model).values()
    found = list(dict.fromkeys(layer.pool for layer in layers if layer.pool is not None))
    if not found:
        raise ValueError(
            "deferred_pool_gradients: the model has no shared pools. Call rasa_ext.apply(model) "
            "with k above 0 first"
        )
    for pool in found:
        for name, parameter in pool.named_parameters():
            if type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"deferred_pool_gradients: {name} must be a plain parameter, got "
                    f"{type(parameter).__name__}. Sharded pools need plain autograd"
                )
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError(
                    f"deferred_pool_gradients: {name} has gradient hooks, which would not fire. "
                    "Remove them, or use plain autograd"
                )
        if pool.deferred is not None:
            raise RuntimeError("deferred_pool_gradients: already active for this model")
    return found


def _wrappers() -> tuple[type[nn.Module], ...]:
    """Return the classes that reduce gradients by hooks."""
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return nn.parallel.DistributedDataParallel, FullyShardedDataParallel
