"""Which ranks L1RA prunes and which layers get new ones; numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGates:
    """One layer's gates and sizes.

    cost: what a private rank takes of the budget. limit: private ranks that make sense, min(N, K).
    """

    private: Sequence[float]
    shared: Sequence[float]
    pool: str | None
    cost: int
    limit: int

    @property
    def smallest(self) -> float:
        """How small the layer's least used rank is: its own ranks', of the pool's if it has none.

        0 for a layer without any rank.
        """
        return min(self.private or self.shared, default=0.0)


@dataclass(frozen=True)
class Decision:
    """Indices of the ranks that survive, by layer and by pool, and new ranks by layer."""

    keep_private: dict[str, list[int]]
    keep_shared: dict[str, list[int]]
    grow: dict[str, int]

    def changes(self, layers: Mapping[str, LayerGates], pools: Mapping[str, int]) -> bool:
        """Return whether anything is pruned or grown."""
        return (
            any(len(keep) < len(layers[name].private) for name, keep in self.keep_private.items())
            or any(len(keep) < pools[name] for name, keep in self.keep_shared.items())
            or any(self.grow.values())
        )


def surviving(gates: Sequence[float], threshold: float, min_rank: int) -> list[int]:
    """Return the indices of the gates to keep: all of at least threshold, and at least min_rank.

    If fewer are large enough, the largest stay, of equal ones the first. No rank is added: fewer
    gates than min_rank all stay.
    """
    alive = sum(gate >= threshold for gate in gates)
    largest = sorted(range(len(gates)), key=lambda i: (-gates[i], i))
    return sorted(largest[: max(alive, min_rank)])


def decide(
    layers: Mapping[str, LayerGates],
    pool_costs: Mapping[str, int],
    budget: int,
    *,
    threshold: float,
    min_rank: int,
    reassign: bool,
    exclude_pruned: bool,
) -> Decision:
    """Return what to prune and where to grow, as L1RA decides it.

    A layer's own rank is pruned when its gate is below threshold; a shared rank when its gate is
    below threshold in every layer of the pool. Then what the budget leaves goes to the layers one
    rank at a time, in turn: first the layer whose smallest gate was largest before pruning, of
    equal ones the first. With exclude_pruned, layers that lost a rank now get none. A layer that
    has reached its limit, or whose rank costs more than is left, is passed over.

    pool_costs: by pool, what a shared rank takes of the budget. Pools do not grow.
    """
    keep_shared = {}
    for pool in pool_costs:
        columns = zip(*(g.shared for g in layers.values() if g.pool == pool), strict=True)
        keep_shared[pool] = surviving([max(column) for column in columns], threshold, min_rank)
    keep = {name: surviving(g.private, threshold, min_rank) for name, g in layers.items()}
    grow = dict.fromkeys(layers, 0)
    if reassign:
        spent = sum(layers[name].cost * len(rows) for name, rows in keep.items())
        spent += sum(pool_costs[name] * len(rows) for name, rows in keep_shared.items())
        left = budget - spent
        takers = [
            name
            for name in sorted(layers, key=lambda name: -layers[name].smallest)
            if not (exclude_pruned and len(keep[name]) < len(layers[name].private))
        ]
        gave = True
        while gave:
            gave = False
            for name in takers:
                layer = layers[name]
                if len(keep[name]) + grow[name] < layer.limit and layer.cost <= left:
                    grow[name] += 1
                    left -= layer.cost
                    gave = True
    return Decision(keep, keep_shared, grow)
