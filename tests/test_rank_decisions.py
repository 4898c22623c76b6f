"""Which ranks L1RA prunes and where it grows, computed by hand."""

from __future__ import annotations

import pytest

from rasa_ext.rank_decisions import LayerGates, decide, surviving

SETTINGS = {"threshold": 0.1, "min_rank": 1, "reassign": True, "exclude_pruned": True}


def layer(*private: float, shared=(), pool=None, cost: int = 1, limit: int = 8) -> LayerGates:
    return LayerGates(private, shared, pool, cost, limit)


def test_gates_below_the_threshold_die_and_the_threshold_itself_lives() -> None:
    assert surviving([0.5, 0.0999, 0.1, 0.0], 0.1, 1) == [0, 2]


def test_of_equal_dead_gates_the_first_stays() -> None:
    assert surviving([0.0, 0.0, 0.0], 0.1, 1) == [0]
    assert surviving([0.0, 0.05, 0.05], 0.1, 1) == [1]
    assert surviving([0.0, 0.05, 0.05], 0.1, 2) == [1, 2]


def test_min_rank_adds_no_rank() -> None:
    assert surviving([0.0], 0.1, 3) == [0]
    assert surviving([], 0.1, 1) == []


def test_freed_ranks_go_in_turn_to_the_largest_smallest_gate() -> None:
    layers = {
        "a": layer(0.9, 0.0, 0.0, 0.0),
        "b": layer(0.5, 0.6),
        "c": layer(0.7, 0.8),
        "d": layer(0.3, 1.0),
    }

    decision = decide(layers, {}, 10, **SETTINGS)

    assert decision.keep_private == {"a": [0], "b": [0, 1], "c": [0, 1], "d": [0, 1]}
    assert decision.grow == {"a": 0, "b": 1, "c": 1, "d": 1}  # three freed: c, b, d
    assert decision.changes(layers, {})


def test_the_second_turn_begins_again_at_the_largest() -> None:
    layers = {"a": layer(0.9, 0.0, 0.0, 0.0), "b": layer(0.5), "c": layer(0.7)}

    assert decide(layers, {}, 6, **SETTINGS).grow == {"a": 0, "b": 1, "c": 2}


def test_ties_go_to_the_first_layer() -> None:
    layers = {"a": layer(1.0, 0.0), "b": layer(0.4), "c": layer(0.4), "d": layer(0.4)}

    assert decide(layers, {}, 5, **SETTINGS).grow == {"a": 0, "b": 1, "c": 0, "d": 0}


def test_nothing_to_prune_changes_nothing() -> None:
    layers = {"a": layer(1.0, 0.2), "b": layer(0.4)}

    decision = decide(layers, {}, 3, **SETTINGS)

    assert not decision.changes(layers, {})
    assert decision.grow == {"a": 0, "b": 0}


def test_when_all_layers_lose_a_rank_the_budget_waits() -> None:
    layers = {"a": layer(0.0, 0.0), "b": layer(0.0, 0.0, 0.0)}

    decision = decide(layers, {}, 5, **SETTINGS)

    assert decision.keep_private == {"a": [0], "b": [0]}
    assert decision.grow == {"a": 0, "b": 0}
    survivors = {"a": layer(0.5), "b": layer(0.9)}
    assert decide(survivors, {}, 5, **SETTINGS).grow == {"a": 1, "b": 2}


def test_pruned_layers_may_get_ranks_where_they_are_not_excluded_but_come_last() -> None:
    layers = {"a": layer(1.0, 0.0, 0.0), "b": layer(0.2)}

    grow = decide(layers, {}, 4, **SETTINGS | {"exclude_pruned": False}).grow

    assert grow == {"a": 1, "b": 1}


def test_without_reassignment_ranks_are_only_freed() -> None:
    layers = {"a": layer(1.0, 0.0), "b": layer(0.2)}

    decision = decide(layers, {}, 3, **SETTINGS | {"reassign": False})

    assert (decision.keep_private["a"], decision.grow) == ([0], {"a": 0, "b": 0})


def test_a_layer_at_its_limit_is_passed_over() -> None:
    layers = {"a": layer(1.0, 0.0, 0.0), "b": layer(0.9, 0.9, limit=2), "c": layer(0.5, limit=2)}

    decision = decide(layers, {}, 6, **SETTINGS)

    assert decision.grow == {"a": 0, "b": 0, "c": 1}  # one of the two is kept for later


@pytest.mark.parametrize(
    ("budget", "grow"),
    [
        (3 * 10 + 30, {"small": 0, "wide": 0, "middle": 1}),  # 20 left: 30 is too much, 20 is not
        (3 * 10 + 29, {"small": 0, "wide": 0, "middle": 0}),  # 19 left: exhausted
        (3 * 10 + 80, {"small": 0, "wide": 1, "middle": 2}),  # 70: 30, 20, then 20 only
    ],
)
def test_what_a_rank_weighs_decides_where_it_still_fits(budget: int, grow: dict) -> None:
    layers = {
        "small": layer(1.0, 0.0, cost=10),
        "wide": layer(cost=30, shared=[0.9], pool="p"),
        "middle": layer(cost=20, shared=[0.5], pool="p"),
    }

    decision = decide(layers, {"p": 30}, budget, **SETTINGS)

    assert decision.keep_shared == {"p": [0]}
    assert decision.grow == grow


def test_a_shared_rank_dies_when_no_layer_uses_it() -> None:
    layers = {
        "a": layer(1.0, shared=[0.0, 0.05, 0.2], pool="p"),
        "b": layer(0.9, shared=[0.3, 0.00, 0.0], pool="p"),
        "c": layer(0.8),
    }

    decision = decide(layers, {"p": 1}, 6, **SETTINGS)

    assert decision.keep_shared == {"p": [0, 2]}
    assert decision.changes(layers, {"p": 3})
    assert decision.grow == {"a": 1, "b": 0, "c": 0}  # its place goes to a layer's own rank


def test_a_pool_keeps_its_most_used_rank() -> None:
    layers = {
        "a": layer(1.0, shared=[0.0, 0.01, 0.02], pool="p"),
        "b": layer(1.0, shared=[0.0, 0.03, 0.00], pool="p"),
    }

    assert decide(layers, {"p": 1}, 5, **SETTINGS).keep_shared == {"p": [1]}
