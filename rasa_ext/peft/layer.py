"""Linear: one layer with the RaSA adapters that PEFT has put on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from rasa_ext.base_layer import (
    adapter_dtype,
    base_weight,
    device_of,
    features,
    fusible,
    is_transposed,
    must_be_called,
)
from rasa_ext.module import Operands
from rasa_ext.ops import rasa_add, rasa_linear
from rasa_ext.peft.pool import Pool, Pools, Settings
from rasa_ext.update import delta_weight, init_gates, init_rank_weights, tensor_of

if TYPE_CHECKING:
    from rasa_ext.siblings import SiblingGroup

_MAX_SEED = 2**63 - 1


class Linear(nn.Module, BaseTunerLayer):
    """A linear layer and its RaSA adapters by name; the active ones add up.

    Semantics, over the active adapters, with the tensors of :class:`rasa_ext.RaSALinear`::

        return base_layer(x) + sum(((dropout(x) @ A_all.T) * d) @ Bt_all)

    One adapter on an nn.Linear is one fused op; any other base layer is called, and every adapter
    (or every further one) added to its output. Layers that RaSAModel linked as siblings are one op
    for all, and share a dropout mask, as long as each has one active adapter.
    """

    # PEFT freezes, lists and deletes adapters by these. The pools are in the first list so that
    # they follow their layers.
    adapter_layer_names = ("rasa_A", "rasa_Bt", "rasa_d", "rasa_pools")
    other_param_names = ("rasa_settings",)
    rasa_original_weight: Tensor | None
    # The layers that are fed the same tensor (rasa_ext/siblings.py).
    siblings: SiblingGroup | None = None
    gates = False
    # Of BaseTunerLayer, whose types are not known everywhere.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]
    set_requires_grad: Callable[[str, bool], None]

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap base_layer, with no adapter yet."""
        super().__init__()
        sizes = features(base_layer)
        assert sizes is not None
        self.in_features, self.out_features = sizes
        self.base_layer = base_layer
        self.rasa_A = nn.ParameterDict()
        self.rasa_Bt = nn.ParameterDict()
        self.rasa_d = nn.ParameterDict()
        self.rasa_pools = Pools()
        self.rasa_settings: dict[str, Settings] = {}
        self.merged_adapters: list[str] = []
        # A buffer, so that .to() moves it with the weight; set while merged only.
        self.register_buffer("rasa_original_weight", None, persistent=False)
        # Exactly nn.Linear: subclasses may store another weight or compute something else.
        self._is_plain_linear = type(base_layer) is nn.Linear
        self.train(base_layer.training)

    def update_layer(
        self,
        adapter_name: str,
        settings: Settings,
        pool: Pool | None,
        init_weights: bool = True,
        **options: Any,
    ) -> None:
        """Add an adapter, or replace it; options are the dtype and device of its tensors."""
        K, N, Rp = self.in_features, self.out_features, settings.Rp
        self.forget(adapter_name)
        if Rp > 0:  # an empty tensor in a checkpoint is always an error, so none is ever made
            A = nn.Parameter(torch.empty(Rp, K, **options))
            Bt = nn.Parameter(torch.empty(Rp, N, **options))
            init_rank_weights(A, Bt)
            if not init_weights:
                init_rank_weights(Bt, Bt.new_empty(0))
            self.rasa_A[adapter_name], self.rasa_Bt[adapter_name] = A, Bt
        if pool is not None:
            d = nn.Parameter(torch.empty(settings.Rs + Rp, **options))
            init_gates(d, Rp, settings.alpha)
            self.rasa_d[adapter_name] = d
            self.rasa_pools[adapter_name] = pool
        self.rasa_settings[adapter_name] = settings

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter that may not be there, and nothing else."""
        for name in self.adapter_layer_names + self.other_param_names:
            adapters = getattr(self, name)
            if adapter_name in adapters:
                del adapters[adapter_name]

    def adapter(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return A, A_shared, Bt, Bt_shared and d, as the ops take them."""
        settings, pool = self.rasa_settings[adapter_name], self.rasa_pools.get(adapter_name)
        K, N = self.in_features, self.out_features
        if pool is None:
            A, Bt = tensor_of(self.rasa_A, adapter_name), tensor_of(self.rasa_Bt, adapter_name)
            d = A.new_full((settings.r,), settings.alpha / settings.r)
            return A, A.new_empty(0, K), Bt, Bt.new_empty(0, N), d
        A_shared, Bt_shared = pool.A_shared, pool.Bt_shared
        d = tensor_of(self.rasa_d, adapter_name)
        if A_shared.device != d.device:  # a model over several devices: the pool lies on one
            A_shared, Bt_shared = A_shared.to(d.device), Bt_shared.to(d.device)
        if settings.Rp == 0:
            return A_shared.new_empty(0, K), A_shared, Bt_shared.new_empty(0, N), Bt_shared, d
        A, Bt = tensor_of(self.rasa_A, adapter_name), tensor_of(self.rasa_Bt, adapter_name)
        return A, A_shared, Bt, Bt_shared, d

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus every active adapter's update."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._adapters()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"rasa.Linear: x must be (..., in_features) = [..., {self.in_features}], got "
                f"{list(x.shape)}"
            )
        group = None if len(adapters) > 1 or args or kwargs else self.siblings
        if group is not None and not torch.compiler.is_compiling():
            y = group.forward(self, x)
        else:
            seeds = [self.draw_seed(x, self._drop_rate(name)) for name in adapters]
            y = self._sum(x, adapters, seeds, *args, **kwargs)
        return y.reshape(x.shape[:-1] + (self.out_features,))

    def _adapters(self) -> list[str]:
        """Return the adapters whose updates forward adds."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.rasa_settings]

    def _sum(
        self, x: Tensor, adapters: list[str], seeds: list[Tensor | None], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the output for x as a matrix, with the masks of these seeds."""
        x2d = x.reshape(-1, self.in_features)
        updates = [
            (self.adapter(name), self._drop_rate(name), seed)
            for name, seed in zip(adapters, seeds, strict=True)
        ]
        callable_only = args or kwargs or not self._is_plain_linear
        fused = None if callable_only else fusible(self.base_layer)
        if fused is not None:
            (adapter, p, seed), *updates = updates
            y = rasa_linear(x2d, *fused, *adapter, p, seed)
        else:
            y = self.base_layer(x, *args, **kwargs).reshape(-1, self.out_features)
        if x2d.dtype != y.dtype:  # a quantised layer computes in a dtype of its own
            x2d = x2d.to(y.dtype)
        for adapter, p, seed in updates:
            y = rasa_add(x2d, y, *adapter, p, seed)
        return y

    def _drop_rate(self, adapter_name: str) -> float:
        return self.rasa_settings[adapter_name].dropout if self.training else 0.0

    # What a group of siblings asks, of a layer with one active adapter.

    @property
    def drop_rate(self) -> float:
        """The active adapter's dropout that acts now."""
        adapters = self._adapters()
        return self._drop_rate(adapters[0]) if adapters else 0.0

    def draw_seed(self, x: Tensor, p: float) -> Tensor | None:
        """Return a seed from torch's generator, so that manual_seed and checkpointing repeat it."""
        return torch.randint(_MAX_SEED, (), device=x.device) if p > 0.0 else None

    def compute(self, x: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """Return the output for x as a matrix, with the active adapter and the mask of this seed.

        p: drop_rate.
        """
        return self._sum(x, self._adapters(), [seed])

    def operands(self, *, stored: bool = False) -> Operands | None:
        """Return the tensors with which an op can compute this layer in its caller's place.

        The stored ones, each call the same objects. None if it cannot: not one active adapter, one
        whose empty half (Rp = 0, k = 0) or pool (on another device) is made at each call, merged,
        a base that must be called, or hooks, which only a call runs.
        """
        adapters = self._adapters()
        if len(adapters) != 1 or not self._is_plain_linear or must_be_called(self):
            return None
        (name,) = adapters
        pool, fused = self.rasa_pools.get(name), fusible(self.base_layer)
        if fused is None or pool is None or self.rasa_settings[name].Rp == 0:
            return None
        adapter = self.adapter(name)
        return Operands(*fused, *adapter) if adapter[1] is pool.A_shared else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer, which joins the copy of its siblings' group."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.siblings is not None:
            self.siblings.join(self)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the update as one matrix in the base weight's layout, accumulated in float32.

        Zero if the layer has no such adapter: PEFT asks every layer.
        """
        if adapter_name not in self.rasa_settings:
            K, N = self.in_features, self.out_features
            size = (K, N) if is_transposed(self.get_base_layer()) else (N, K)
            return torch.zeros(size, device=device_of(self.base_layer))
        delta = delta_weight(*self.adapter(adapter_name))
        return delta.T if is_transposed(self.get_base_layer()) else delta

    def merged_weight(self, adapter_names: list[str]) -> tuple[Tensor, Tensor]:
        """Return the base weight, and what it is with these adapters and those merged already.

        Summed in float32 and rounded once, however often adapters are merged one after another.
        Raises TypeError if the base has no floating-point weight to add to, ValueError if the sum
        would not be finite.
        """
        base = self.get_base_layer()
        weight = base_weight(base)
        if weight is None:
            raise TypeError(
                f"RaSA merge: {type(base).__name__} has no floating-point weight of shape (N, K) = "
                f"[{self.out_features}, {self.in_features}] to add to"
            )
        original = self.rasa_original_weight
        total = weight if original is None else original
        for name in (*self.merged_adapters, *adapter_names):
            total = total + self.get_delta_weight(name)
        merged = total.to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} "
                f"seems to be broken: the merged weight would hold NaN or inf in {weight.dtype}"
            )
        return weight, merged

    def mergeable(self, adapter_names: list[str] | None) -> list[str]:
        """Return which of these adapters (of the active ones) the layer has and could merge."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self.rasa_settings and n not in self.merged_adapters]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters (by default the active ones) to the base weight.

        The original weight is kept, for unmerge(). safe_merge changes nothing: a sum that is not
        finite is refused in any case. Raises what merged_weight() does; the layer is then as it
        was.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.rasa_settings]
        if not names:
            return
        weight, merged = self.merged_weight(names)
        if self.rasa_original_weight is None:
            self.rasa_original_weight = weight.detach().clone()
        weight.copy_(merged)
        self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight of before merge(), bit by bit."""
        weight, original = base_weight(self.get_base_layer()), self.rasa_original_weight
        if weight is None or original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight.copy_(original)
        self.rasa_original_weight, self.merged_adapters = None, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the update is a matrix."""
        return True

    def expected(self, adapter_name: str) -> dict[str, tuple[str, list[int]]]:
        """Return what the layer holds of an adapter: by attribute, the shape in symbols and sizes.

        From the configuration, since a sharded parameter has another shape than its checkpoint.
        """
        settings, K, N = self.rasa_settings[adapter_name], self.in_features, self.out_features
        expected = {}
        if settings.Rp > 0:
            expected["rasa_A"] = ("(Rp, K)", [settings.Rp, K])
            expected["rasa_Bt"] = ("(Rp, N)", [settings.Rp, N])
        if settings.k > 0:
            expected["rasa_d"] = ("(Rs + Rp)", [settings.Rs + settings.Rp])
        return expected

    def cast_adapter(
        self, adapter_name: str, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Give an adapter another dtype and device, its pool included."""
        for tensors in (self.rasa_A, self.rasa_Bt, self.rasa_d):
            if adapter_name in tensors:
                _cast(tensors, adapter_name, dtype, device)
        if adapter_name in self.rasa_pools:
            pool = self.rasa_pools[adapter_name]
            for tensors in pool.owners:
                _cast(tensors, pool.group, dtype, device)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move a loaded adapter to its base layer's device, with the values it was loaded with.

        PEFT's own casts to the base layer's dtype, and back later: in bfloat16 that would round
        them. Here only a dtype that the ops do not take beside the base layer's is changed.
        """
        base = self.get_base_layer()
        if adapter_name not in self.rasa_settings:
            return
        dtype = self.adapter(adapter_name)[-1].dtype
        weight = base_weight(base)
        if weight is not None and dtype not in (weight.dtype, adapter_dtype("RaSA", base, None)):
            dtype = adapter_dtype("RaSA", base, None)
        self.cast_adapter(adapter_name, dtype, device or device_of(base))

    def __repr__(self) -> str:
        """Return the module's representation, named as PEFT names its layers."""
        return f"rasa.{super().__repr__()}"


def _cast(
    tensors: nn.ParameterDict, name: str, dtype: torch.dtype, device: torch.device | None
) -> None:
    """Replace a parameter of another dtype or device; who holds the old one keeps the old one."""
    old = tensor_of(tensors, name)
    new = old.detach().to(device or old.device, dtype)
    if new.dtype != old.dtype or new.device != old.device:
        tensors[name] = nn.Parameter(new, requires_grad=old.requires_grad)
