"""The RaSA layer and the pool of ranks that layers of one shape share (He et al. 2025, RaSA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext.base_layer import (
    adapter_dtype,
    base_weight,
    check_config,
    device_of,
    features,
    fusible,
    is_transposed,
    must_be_called,
)
from rasa_ext.layer_ops import adapters_of, rasa_delta_weights
from rasa_ext.merging import LayerMerge, merge_layers
from rasa_ext.ops import rasa_add, rasa_linear
from rasa_ext.update import init_gates, init_rank_weights, tensor_of

if TYPE_CHECKING:
    from rasa_ext.deferred import DeferredPoolGradients
    from rasa_ext.siblings import SiblingGroup

_MAX_SEED = 2**63 - 1


class Operands(NamedTuple):
    """What the fused op takes of a layer."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    A_shared: Tensor
    Bt: Tensor
    Bt_shared: Tensor
    d: Tensor


class SharedPool(nn.Module):
    """The ranks that num_layers layers of one shape share: k from each (RaSA, section 3).

    Parameters: A_shared (k*num_layers, in_features), Kaiming-uniform; Bt_shared
    (k*num_layers, out_features), zero. Register it once, on the root of the model, so that it is
    saved, moved and optimised once; the layers refer to it without owning it.

    Raises ValueError for sizes below 1.
    """

    A_shared: Tensor
    Bt_shared: Tensor
    # Who sums the pool's gradients, while deferred_pool_gradients() is active.
    deferred: DeferredPoolGradients | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int,
        num_layers: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate and initialise k*num_layers ranks."""
        super().__init__()
        for name, size in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("k", k),
            ("num_layers", num_layers),
        ):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"SharedPool: {name} must be an integer of at least 1, got {size}")
        self.in_features, self.out_features = in_features, out_features
        self.k, self.num_layers = k, num_layers
        # What the pool holds now; a RankAllocator frees ranks that no layer uses.
        self.Rs = Rs = k * num_layers
        self.A_shared = nn.Parameter(torch.empty(Rs, in_features, dtype=dtype, device=device))
        self.Bt_shared = nn.Parameter(torch.empty(Rs, out_features, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A_shared anew and set Bt_shared to zero."""
        init_rank_weights(self.A_shared, self.Bt_shared)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"k={self.k}, num_layers={self.num_layers}"
            + (f", Rs={self.Rs}" if self.Rs != self.k * self.num_layers else "")
        )


class RaSALinear(nn.Module):
    """A frozen linear layer with r - k ranks of its own and every rank of a shared pool.

    Semantics (RaSA, equation 4; weights are stored (rank, features)):
        A_all = torch.cat([pool.A_shared, A])
        Bt_all = torch.cat([pool.Bt_shared, Bt])
        return base_layer(x) + ((dropout(x) @ A_all.T) * d) @ Bt_all

    Shapes: x (..., K) -> (..., N), 1-D to 4-D; A (Rp, K), Bt (Rp, N), d (Rs + Rp) with the shared
    ranks first, where Rp = r - k and Rs = k * pool.num_layers. k = 0 is plain LoRA: pool is None
    and d = alpha / r is a constant. k = r has no ranks of its own.
    gates=True trains c (Rs + Rp) instead, with d = gate_scale * c; c starts at 1. A RankAllocator
    keeps c in [0, 1] and moves ranks: Rp and pool.Rs are of now, r and k of the beginning.
    Saved for backward: x and the (M, R) product with A_all; the dropout mask is drawn again.
    Layers that link_siblings() or apply() linked share the op and the mask when they are called in
    turn with the same x.

    `base_layer` is any linear-like module and is frozen. An nn.Linear is computed by one fused op
    unless it trains or carries hooks; any other base is called, and the update added to its
    output. `pool` is a plain reference, not a sub-module: whoever owns the model registers it.
    `merged` says whether the update is inside the base weight; the original weight is kept then,
    so a merged layer takes one more copy of its weight, and unmerge() is exact to the bit.

    Raises ValueError for a configuration or pool that does not fit, TypeError for a base that is
    not linear-like.
    """

    A: Tensor
    Bt: Tensor
    d: Tensor
    c: Tensor
    gate_scale: Tensor
    pool: SharedPool | None
    _no_A_shared: Tensor
    _no_Bt_shared: Tensor
    base_layer: nn.Module
    original_weight: Tensor | None
    merged: bool
    # The layers that are fed the same tensor (siblings.py).
    siblings: SiblingGroup | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        pool: SharedPool | None,
        r: int,
        k: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        gates: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap base_layer; the adapter takes the pool's dtype and base_layer's device."""
        super().__init__()
        check_config("RaSALinear", r, k, alpha, dropout)
        sizes = features(base_layer)
        if sizes is None or isinstance(base_layer, RaSALinear):
            raise TypeError(
                "RaSALinear: base_layer must be a module with in_features and out_features (or the "
                f"nx and nf of Conv1D) and no adapter yet, got {type(base_layer).__name__}"
            )
        K, N = sizes
        self._check_pool(pool, K, N, k)
        if pool is not None:
            if dtype not in (None, pool.A_shared.dtype):
                raise ValueError(
                    f"RaSALinear: dtype must be the pool's {pool.A_shared.dtype}, got {dtype}"
                )
            dtype = pool.A_shared.dtype
        dtype = adapter_dtype("RaSALinear", base_layer, dtype)
        options: dict[str, Any] = {"dtype": dtype, "device": device_of(base_layer)}
        self.in_features, self.out_features = K, N
        self.r, self.k, self.alpha, self.dropout = r, k, float(alpha), float(dropout)
        self.Rp, self.gates = r - k, gates
        self.merged = False
        # Not registered: L aliases of the pool in state_dict() would be L copies on disk, and
        # FSDP could not shard it. A module, not its tensors, so that load_state_dict(assign=True)
        # and .to() on the owner are seen here.
        object.__setattr__(self, "pool", pool)
        self.base_layer = base_layer.requires_grad_(False)
        # Exactly nn.Linear: subclasses may store another weight or compute something else.
        self._is_plain_linear = type(base_layer) is nn.Linear

        Rp, Rs = r - k, 0 if pool is None else pool.Rs
        self.A = nn.Parameter(torch.empty(Rp, K, **options))
        self.Bt = nn.Parameter(torch.empty(Rp, N, **options))
        if pool is None:
            # Constants of plain LoRA: not trained, so not in state_dict() either.
            self.register_buffer("_no_A_shared", torch.empty(0, K, **options), persistent=False)
            self.register_buffer("_no_Bt_shared", torch.empty(0, N, **options), persistent=False)
        if gates:
            self.c = nn.Parameter(torch.empty(Rs + Rp, **options))
            self.register_buffer("gate_scale", torch.empty(Rs + Rp, **options), persistent=False)
            init_gates(self.gate_scale, Rp, self.alpha)
        elif pool is None:
            self.register_buffer("d", torch.empty(r, **options), persistent=False)
        else:
            self.d = nn.Parameter(torch.empty(Rs + Rp, **options))
        # A buffer, so that .to() moves it with the weight; set while merged only.
        self.register_buffer("original_weight", None, persistent=False)
        self.train(base_layer.training)
        self.reset_parameters()

    @staticmethod
    def _check_pool(pool: SharedPool | None, K: int, N: int, k: int) -> None:
        if (pool is None) != (k == 0):
            got = "None" if pool is None else "a pool"
            need = "None" if k == 0 else "a SharedPool"
            raise ValueError(f"RaSALinear: pool must be {need} when k = {k}, got {got}")
        if pool is not None and (pool.in_features, pool.out_features, pool.k) != (K, N, k):
            raise ValueError(
                f"RaSALinear: pool must have (in_features, out_features, k) = ({K}, {N}, {k}), got "
                f"({pool.in_features}, {pool.out_features}, {pool.k})"
            )

    def reset_parameters(self) -> None:
        """Draw A anew, set Bt to zero and d to the authors' values (k = 0: alpha / r), gates to 1.

        Half of alpha goes to the shared ranks, half to the layer's own: 0.5*alpha/Rs, 0.5*alpha/Rp.
        """
        init_rank_weights(self.A, self.Bt)
        if self.gates:
            nn.init.ones_(self.c)
        else:
            init_gates(self.d, self.r - self.k, self.alpha)

    @property
    def private_scale(self) -> float:
        """What d of a rank of the layer's own starts with."""
        Rp = self.r - self.k
        return self.alpha / self.r if self.pool is None else 0.5 * self.alpha / max(Rp, 1)

    def __getattr__(self, name: str) -> Any:
        """Compute d of a gated layer, so that whoever reads d (merge, export) reads the scaled."""
        if name == "d" and self.__dict__.get("gates", False):
            return self.gate_scale * tensor_of(self, "c")
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return base_layer(x) plus the update; see the class for the formula.

        Raises ValueError unless the last size of x is in_features, RuntimeError when called in
        training mode while merged or while the pool's tensors are not gathered.
        """
        self.check_input(x)
        base: Any = self._modules["base_layer"]
        if self.merged:
            if self.training:
                raise RuntimeError(
                    "RaSALinear: merged and in training mode, where its adapter would get no "
                    "gradient. Call unmerge(), or eval() to run the merged layer"
                )
            return base(x)  # type: ignore[no-any-return]
        if self.siblings is not None and not torch.compiler.is_compiling():
            y = self.siblings.forward(self, x)
        else:
            p = self.drop_rate
            y = self.compute(x, p, self.draw_seed(x, p))
        return y if x.dim() == 2 else y.reshape(x.shape[:-1] + (self.out_features,))

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is a tensor whose last size is in_features."""
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != self.in_features:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"RaSALinear: x must be a tensor (..., in_features) = [..., {self.in_features}], "
                f"got {got}"
            )

    @property
    def drop_rate(self) -> float:
        """The dropout that acts now."""
        return self.dropout if self.training else 0.0

    def draw_seed(self, x: Tensor, p: float) -> Tensor | None:
        """Return a seed from torch's generator, so that manual_seed and checkpointing repeat it."""
        return torch.randint(_MAX_SEED, (), device=x.device) if p > 0.0 else None

    def fused_base(self) -> tuple[Tensor, Tensor | None] | None:
        """Return weight and bias of a base layer that an op may compute in its place, else None."""
        base: Any = self._modules["base_layer"]
        return fusible(base) if self._is_plain_linear else None

    def _adapter(self, stored: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return A, A_shared, Bt, Bt_shared, and d, or (stored) the c that d is computed from."""
        d = tensor_of(self, "c" if stored and self.gates else "d")
        A, Bt = tensor_of(self, "A"), tensor_of(self, "Bt")
        pool = self.pool
        if pool is None:
            return A, self._no_A_shared, Bt, self._no_Bt_shared, d
        A_shared, Bt_shared = tensor_of(pool, "A_shared"), tensor_of(pool, "Bt_shared")
        if A_shared.dim() != 2:
            raise RuntimeError(
                "RaSALinear: the pool's A_shared must be (Rs, K) while a layer runs, got "
                f"{list(A_shared.shape)}. DeepSpeed ZeRO-3 gathers a module's own parameters "
                "only: use ZeRO-2, or FSDP with the pools in the root's unit"
            )
        return A, A_shared, Bt, Bt_shared, d

    def compute(self, x: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """Return the output for x as a matrix, with the mask of this seed."""
        deferred = self.deferred
        if deferred is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            return deferred.compute(self, x, p, seed)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        base: Any = self._modules["base_layer"]
        fused = self.fused_base()
        if fused is not None:
            return rasa_linear(rows, *fused, *self._adapter(), p, seed)
        y = base(x).reshape(-1, self.out_features)
        return rasa_add(rows, y, *self._adapter(), p, seed)

    @property
    def deferred(self) -> DeferredPoolGradients | None:
        """Who sums the pool's gradients, while deferred_pool_gradients() is active."""
        return None if self.pool is None else self.pool.deferred

    def operands(self, *, stored: bool = False) -> Operands | None:
        """Return the tensors with which an op can compute this layer in its caller's place.

        stored: with the c of a gated layer, which stays the same object, for the d made of it.
        None if it cannot: merged, a base that must be called, hooks, which only a call runs, or
        a pool whose gradient this layer leaves to be summed later.
        """
        if self.merged or not self._is_plain_linear or type(self) is not RaSALinear:
            return None
        if self.deferred is not None:
            return None
        base: Any = self._modules["base_layer"]
        fused = None if must_be_called(self) else fusible(base)
        return None if fused is None else Operands(*fused, *self._adapter(stored))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer, which joins the copy of its siblings' group."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.siblings is not None:
            self.siblings.join(self)

    @property
    def weight(self) -> Tensor:
        """The weight this layer applies, W + delta_weight(), in W's dtype and layout.

        For code that reads a layer's weight instead of calling it (nn.MultiheadAttention, T5): it
        must not miss the update. Built at each access; dropout does not apply to it. A quantised
        base's weight is returned as it is stored.
        """
        weight = base_weight(self.base_layer)
        if weight is None or self.merged:
            return self.base_layer.weight  # type: ignore[return-value]
        return (weight + self._stored_delta()).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def delta_weight(self) -> Tensor:
        """Return the update as one matrix, accumulated in float32 (float64 for float64 adapters).

        Semantics:
            return (Bt_all.float() * d.float()[:, None]).T @ A_all.float()

        Shape: (N, K), whatever the base layer's own layout. Differentiable.
        """
        delta = self._stored_delta()
        return delta.T if is_transposed(self.base_layer) else delta

    def _stored_delta(self) -> Tensor:
        """Return the update in the layout in which the base layer stores its weight."""
        return rasa_delta_weights(adapters_of([self], [is_transposed(self.base_layer)]))[0]

    def merge(
        self, rounding: str = "nearest", generator: torch.Generator | None = None
    ) -> LayerMerge:
        """Add the update to the base weight; forward is then the base layer alone.

        The sum is formed in float32 and rounded once, to the nearest or as rasa_ext.merge says of
        `rounding` and `generator`. The original weight is kept, for unmerge(). Returns the relative
        error of the update as the weight's dtype holds it.

        Raises RuntimeError if merged already, TypeError if the base has no floating-point weight
        to add to, ValueError if the sum would not be finite; the layer is then as it was.
        """
        if self.merged:
            raise RuntimeError("RaSALinear.merge: already merged. Call unmerge() first")
        return merge_layers("RaSALinear.merge", {"": self}, rounding, generator).layers[0]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight of before merge(), bit by bit.

        Raises RuntimeError if not merged.
        """
        weight, original = base_weight(self.base_layer), self.original_weight
        if not self.merged or weight is None or original is None:
            raise RuntimeError("RaSALinear.unmerge: not merged")
        weight.copy_(original)
        self.original_weight = None
        self.merged = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse_if_merged("state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_if_merged("load_state_dict")
        super()._load_from_state_dict(*args, **kwargs)

    def _refuse_if_merged(self, op: str) -> None:
        if self.merged:
            raise RuntimeError(
                f"RaSALinear.{op}: merged; base weight and adapter would count the update twice. "
                "Call unmerge() first"
            )

    def extra_repr(self) -> str:
        """Return the configuration."""
        return (
            f"r={self.r}, k={self.k}, alpha={self.alpha:g}, dropout={self.dropout:g}, "
            f"R={(0 if self.pool is None else self.pool.Rs) + self.Rp}, merged={self.merged}"
            + (", gates=True" if self.gates else "")
        )
