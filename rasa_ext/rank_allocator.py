"""L1RA: rank moves during training to the layers that use theirs (Singh et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rasa_ext.injection import adapted_layers, clean_name, group_names, unwrapped
from rasa_ext.module import RaSALinear, SharedPool
from rasa_ext.rank_decisions import Decision, LayerGates, decide
from rasa_ext.rank_edits import (
    apply_edits,
    check_optimizer,
    check_plain,
    layer_edits,
    pool_edits,
    resize,
)
from rasa_ext.replicas import synchronize_gates

_STATE_VERSION = 1


class RankAllocator:
    """Shrinks the gates c of gated layers, prunes ranks at c = 0, and gives them to other layers.

        rasa_ext.apply(model, r=8, k=0, gates=True)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        allocator = rasa_ext.RankAllocator(model, optimizer, total_steps=steps)
        for ...:
            loss.backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()

    The optimizer trains c like any parameter, but in a parameter group of its own with
    lr = gate_lr and no weight decay; build learning-rate schedules after the allocator. Each
    step() then does, with that group's current lr::

        c = (c - lr * l1).clamp(0, 1)

    Every `every` steps (an integer), or share of total_steps (a float), but not at the last step,
    ranks with c < threshold are pruned: a layer's own ones one by one, a pool's when no layer uses
    them. With reassign, what the budget then leaves is given to the layers, one rank at a time in
    turn, first to the one whose smallest gate is largest; not to layers that were just pruned,
    with exclude_pruned, nor beyond min(N, K) ranks. New ranks have c = 1, Bt = 0 and A normal with
    standard deviation 1 / r (r: the one of apply()), so the function does not jump. At least
    min_rank ranks stay in each layer that had as many, and in each pool.

    budget: what stays the same, the number of "ranks" or of "parameters" (what a rank weighs is
    then N + K + 1, and N + K + layers in a pool); what cannot be given away is kept for later.

    Parameters stay the same objects; gradients and optimizer state of surviving ranks are kept to
    the bit, and those of new ranks are zero. Under DistributedDataParallel all processes decide
    the same, from the gates of the group's first process; wrap the model again whenever step()
    returns True, since DDP keeps buffers of the old sizes.

    `layers` may also be given by name, whole pools at a time. seed: of new ranks.

    Raises ValueError for arguments out of range, for a model without gated layers, for gates of 16
    bits or that the optimizer does not train, and for a learning-rate schedule made before;
    TypeError for an optimizer whose state is not kept by rank, by its name, and for sharded
    adapters: FSDP must leave them out (ignored_params of fully_shard).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, RaSALinear],
        optimizer: Optimizer,
        l1: float = 1e-3,
        gate_lr: float = 2e-2,
        every: float | int = 0.1,
        threshold: float = 1e-10,
        budget: str = "ranks",
        reassign: bool = True,
        exclude_pruned: bool = True,
        min_rank: int = 1,
        total_steps: int | None = None,
        *,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Check everything, then give the gates a parameter group of their own."""
        # accelerate and others wrap the optimizer.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        check_optimizer(optimizer)
        self.layers = _gated_layers(model)
        self.pools = _pools(self.layers)
        for layer in self.layers.values():
            check_plain(layer.c)
        self.optimizer = optimizer
        self.settings: dict[str, Any] = {
            "l1": l1,
            "gate_lr": gate_lr,
            "interval": _interval(every, total_steps),
            "threshold": threshold,
            "budget": budget,
            "reassign": reassign,
            "exclude_pruned": exclude_pruned,
            "min_rank": min_rank,
            "total_steps": total_steps,
            "seed": seed,
        }
        _check_settings(self.settings)
        self.process_group = process_group
        _separate_gates(optimizer, [layer.c for layer in self.layers.values()], gate_lr)
        self.steps = 0
        self.budget = self._spent()
        self.history: list[dict[str, Any]] = []
        self._record()

    @torch.no_grad()
    def step(self) -> bool:
        """Shrink the gates and, when it is time, update(). Call it after optimizer.step().

        Returns whether the number of ranks has changed anywhere.
        """
        ids = {id(layer.c) for layer in self.layers.values()}
        for group in self.optimizer.param_groups:
            if group["params"] and id(group["params"][0]) in ids:
                shrinkage = float(group["lr"]) * self.settings["l1"]
                for c in group["params"]:
                    c.sub_(shrinkage).clamp_(0.0, 1.0)
        self.steps += 1
        if self.steps % self.settings["interval"] or self.steps == self.settings["total_steps"]:
            return False
        return self.update()

    @torch.no_grad()
    def update(self) -> bool:
        """Prune and regrow now; see the class. Returns whether anything has changed.

        Raises RuntimeError for gates that are NaN, for a merged layer, and for processes that have
        drifted apart, ValueError or TypeError for optimizer state that is not kept by rank; nothing
        has changed then.
        """
        synchronize_gates([layer.c for layer in self.layers.values()], self.process_group)
        layers = self._gates()
        sizes = {name: pool.Rs for name, pool in self.pools.items()}
        settings = self.settings
        decision = decide(
            layers,
            {name: self._pool_cost(pool) for name, pool in self.pools.items()},
            self.budget,
            threshold=settings["threshold"],
            min_rank=settings["min_rank"],
            reassign=settings["reassign"],
            exclude_pruned=settings["exclude_pruned"],
        )
        if not decision.changes(layers, sizes):
            return False
        self._carry_out(decision)
        self._record()
        return True

    def rank_pattern(self) -> dict[str, int]:
        """Return the number of ranks of its own that each layer has now, by name."""
        return {name: layer.Rp for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what load_state_dict() needs, beside the states of model and optimizer."""
        return {
            "version": _STATE_VERSION,
            "settings": dict(self.settings),
            "steps": self.steps,
            "budget": self.budget,
            "private": self.rank_pattern(),
            "shared": {name: pool.Rs for name, pool in self.pools.items()},
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where state_dict() was taken; call it before loading model and optimizer.

        Gives every layer and pool the ranks of then, with values that loading the model replaces.

        Raises ValueError if the state is of other settings, layers or a later version; nothing has
        changed then.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"RankAllocator.load_state_dict: version must be {_STATE_VERSION}, got "
                f"{state.get('version')}"
            )
        for name, mine in self.settings.items():
            if state["settings"].get(name) != mine:
                raise ValueError(
                    f"RankAllocator.load_state_dict: {name} must be {mine} as in this allocator, "
                    f"got {state['settings'].get(name)}"
                )
        if list(state["private"]) != list(self.layers) or list(state["shared"]) != list(self.pools):
            raise ValueError(
                "RankAllocator.load_state_dict: the state is of other layers: "
                f"{len(state['private'])} layers and pools {list(state['shared'])}, must be "
                f"{len(self.layers)} and {list(self.pools)}"
            )
        for name, pool in self.pools.items():
            if state["shared"][name] > pool.Rs:
                raise ValueError(
                    f"RankAllocator.load_state_dict: pool {name} must have at least "
                    f"{state['shared'][name]} ranks, got {pool.Rs}. Pools do not grow"
                )
        Rs = {pool: state["shared"][name] for name, pool in self.pools.items()}
        Rp = [state["private"][name] for name in self.layers]
        resize(list(self.layers.values()), Rp, Rs, self.optimizer)
        self.steps, self.budget = state["steps"], state["budget"]
        self.history = [dict(entry) for entry in state["history"]]

    def _gates(self) -> dict[str, LayerGates]:
        """Return the gates and sizes of all layers."""
        gates = {}
        for name, layer in self.layers.items():
            if layer.merged:
                raise RuntimeError(f"RankAllocator: {name} is merged. Call unmerge(model) first")
            c = layer.c.detach().tolist()
            if any(value != value for value in c):
                raise RuntimeError(f"RankAllocator: gates must be numbers, got NaN in {name}")
            Rs = len(c) - layer.Rp
            limit = min(layer.in_features, layer.out_features)
            pool = None if layer.pool is None else self._name_of(layer.pool)
            gates[name] = LayerGates(c[Rs:], c[:Rs], pool, self._cost(layer), limit)
        return gates

    def _name_of(self, pool: SharedPool) -> str:
        return next(name for name, other in self.pools.items() if other is pool)

    def _cost(self, layer: RaSALinear) -> int:
        """Return what a rank of the layer's own takes of the budget."""
        by_rank = self.settings["budget"] == "ranks"
        return 1 if by_rank else layer.in_features + layer.out_features + 1

    def _pool_cost(self, pool: SharedPool) -> int:
        by_rank = self.settings["budget"] == "ranks"
        return 1 if by_rank else pool.in_features + pool.out_features + pool.num_layers

    def _spent(self) -> int:
        own = sum(self._cost(layer) * layer.Rp for layer in self.layers.values())
        return own + sum(self._pool_cost(pool) * pool.Rs for pool in self.pools.values())

    def _carry_out(self, decision: Decision) -> None:
        """Edit all layers and pools at once."""
        # Not torch's generator: the same numbers on all processes, and after resuming.
        generator = torch.Generator().manual_seed(self.settings["seed"] * 2**32 + self.steps)
        edits = []
        for name, layer in self.layers.items():
            keep_shared: list[int] = []
            if layer.pool is not None:
                keep_shared = decision.keep_shared[self._name_of(layer.pool)]
            A_new = torch.randn(decision.grow[name], layer.in_features, generator=generator)
            keep_private = decision.keep_private[name]
            edits += layer_edits(layer, keep_shared, keep_private, A_new / layer.r)
        for name, pool in self.pools.items():
            edits += pool_edits(pool, decision.keep_shared[name])
        apply_edits(edits, self.optimizer)
        for name, pool in self.pools.items():
            pool.Rs = len(decision.keep_shared[name])
        for name, layer in self.layers.items():
            layer.Rp = len(decision.keep_private[name]) + decision.grow[name]

    def _record(self) -> None:
        """Add the ranks of now to the history, with the shared ranks that each layer uses."""
        threshold = self.settings["threshold"]
        used = [
            int((layer.c[: layer.c.numel() - layer.Rp] >= threshold).sum())
            for layer in self.layers.values()
        ]
        self.history.append(
            {
                "step": self.steps,
                "private": [layer.Rp for layer in self.layers.values()],
                "shared": used,
                "pools": [pool.Rs for pool in self.pools.values()],
            }
        )


def _interval(every: float | int, total_steps: int | None) -> int:
    """Return the number of steps between updates."""
    if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
        raise ValueError(
            f"RankAllocator: total_steps must be an integer of at least 1, got {total_steps!r}"
        )
    if isinstance(every, int) and every >= 1:
        return every
    if not isinstance(every, float) or not 0 < every <= 1:
        raise ValueError(
            "RankAllocator: every must be a number of steps (an integer of at least 1) or a share "
            f"of total_steps (a float in (0, 1]), got {every!r}"
        )
    if total_steps is None:
        raise ValueError(
            f"RankAllocator: every = {every} is a share of total_steps, got total_steps = None"
        )
    return max(1, int(every * total_steps))


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting out of range."""
    for name, low in (("l1", 0.0), ("gate_lr", 0.0), ("threshold", 0.0)):
        if not settings[name] >= low:
            raise ValueError(
                f"RankAllocator: {name} must be at least {low:g}, got {settings[name]}"
            )
    if settings["budget"] not in ("ranks", "parameters"):
        raise ValueError(
            f"RankAllocator: budget must be 'ranks' or 'parameters', got {settings['budget']!r}"
        )
    if not isinstance(settings["min_rank"], int) or settings["min_rank"] < 1:
        raise ValueError(
            "RankAllocator: min_rank must be an integer of at least 1, got "
            f"{settings['min_rank']!r}"
        )


def _gated_layers(model: nn.Module | Mapping[str, RaSALinear]) -> dict[str, RaSALinear]:
    """Return the layers by name; raise ValueError unless all have gates."""
    if isinstance(model, nn.Module):
        root = model.module if isinstance(model, DistributedDataParallel) else model
        layers = adapted_layers(unwrapped(root))
    else:
        layers = {clean_name(name): layer for name, layer in model.items()}
    ungated = next((name for name, layer in layers.items() if not layer.gates), None)
    if not layers or ungated is not None:
        got = "no RaSA layers" if ungated is None else f"{ungated} without"
        raise ValueError(
            f"RankAllocator: the layers must have gates, got {got}. Call "
            "rasa_ext.apply(model, ..., gates=True) first"
        )
    for name, layer in layers.items():
        # 16 bits would round the proximal steps away: next to 1 they keep steps of 1/256 or 1/2048.
        if layer.c.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"RankAllocator: gates must be float32 or float64, got {layer.c.dtype} in {name}. "
                "Leave out apply()'s dtype"
            )
    return layers


def _pools(layers: Mapping[str, RaSALinear]) -> dict[str, SharedPool]:
    """Return the layers' pools by the names of their groups."""
    members: dict[SharedPool, list[str]] = {}
    for name, layer in layers.items():
        if layer.pool is not None:
            members.setdefault(layer.pool, []).append(name)
    groups = group_names(layers)
    pools = {}
    for pool, names in members.items():
        if len(names) != pool.num_layers:
            raise ValueError(
                f"RankAllocator: layers must be all {pool.num_layers} of the pool of {names[0]}, "
                f"got {len(names)}"
            )
        pools[groups[names[0]]] = pool
    return pools


def _separate_gates(optimizer: Optimizer, gates: list[Tensor], gate_lr: float) -> None:
    """Give the gates a parameter group of their own, with lr = gate_lr and no weight decay."""
    ids = {id(gate) for gate in gates}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = len(ids - trained)
    if missing > 0:
        raise ValueError(
            f"RankAllocator: the optimizer must train all {len(ids)} gates, got {missing} that it "
            "does not know. Make it after rasa_ext.apply(model, ..., gates=True)"
        )
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in ids]
        if not mine:
            continue
        # A schedule keeps one rate for each group that there was, under this name.
        if "initial_lr" in group and (
            len(mine) < len(group["params"]) or group["initial_lr"] != gate_lr
        ):
            raise ValueError(
                "RankAllocator: the gates need a parameter group of their own with lr = gate_lr = "
                f"{gate_lr}, and the optimizer has a learning-rate schedule already. Make the "
                "schedule after the allocator"
            )
        changes = {"lr": gate_lr} | ({"weight_decay": 0.0} if "weight_decay" in group else {})
        if len(mine) == len(group["params"]):
            if "initial_lr" not in group:
                group |= changes
            continue
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        options = {name: value for name, value in group.items() if name != "params"}
        optimizer.add_param_group({**options, **changes, "params": mine})
