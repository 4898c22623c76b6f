"""Weights in one piece of memory: side by side they are merged, overlapping they are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rasa_ext.layer_ops import Adapters, rasa_delta_weights, rasa_merge_

N, K, R = 6, 5, 3
pytestmark = pytest.mark.usefixtures("device")
Views = Callable[[Tensor], list[Tensor]]


def adapters(layers: int) -> Adapters:
    As, Bts = ([torch.randn(R, size) for _ in range(layers)] for size in (K, N))
    d = [torch.randn(R) for _ in range(layers)]
    return Adapters(As, Bts, d, [], [], [-1] * layers)


APART: dict[str, Views] = {
    "rows_of_a_matrix": lambda t: [t[:30].view(N, K), t[30:60].view(N, K)],
    "columns_of_a_matrix": lambda t: list(t[:60].view(N, 2 * K).split(K, dim=1)),
    "columns_with_a_gap": lambda t: [t[:72].view(N, 12)[:, :K], t[:72].view(N, 12)[:, 7:]],
    "columns_of_a_transposed": lambda t: [
        t[:60].view(2 * K, N)[i * K : (i + 1) * K].T for i in range(2)
    ],
    "every_second_row": lambda t: [t[:60].view(2 * N, K)[i::2] for i in range(2)],
}
OVERLAPPING: dict[str, Views] = {
    "one_element": lambda t: [t[:30].view(N, K), t[29:59].view(N, K)],
    "shifted_by_one": lambda t: [t[:30].view(N, K), t[1:31].view(N, K)],
    "the_same": lambda t: [t[:30].view(N, K)] * 2,
    "columns": lambda t: [t[:54].view(N, 9)[:, :K], t[:54].view(N, 9)[:, 4:]],
    "columns_around_the_edge": lambda t: [
        t[:54].view(N, 9)[:, :K],
        t.as_strided((N, K), (9, 1), 7),
    ],
    "a_transposed": lambda t: [t[:30].view(N, K), t[:30].view(K, N).T],
}
BY_ITSELF: dict[str, Views] = {
    "row": lambda t: [t[:K].expand(N, K)],
    "column": lambda t: [t[:N, None].expand(N, K)],
    "windows": lambda t: [t.as_strided((N, K), (1, 1))],
}


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_weights_side_by_side_in_one_matrix_are_merged(views: Views) -> None:
    weights, updates = views(torch.randn(200)), adapters(2)
    expected = [w + delta for w, delta in zip(weights, rasa_delta_weights(updates), strict=True)]

    rasa_merge_(weights, updates)

    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))


@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("order", [1, -1])
def test_overlapping_weights_are_refused(views: Views, order: int) -> None:
    memory = torch.randn(200)
    before = memory.clone()
    with pytest.raises(RuntimeError, match="rasa_merge_: weights must not share memory: a tied"):
        rasa_merge_(views(memory)[::order], adapters(2))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("views", BY_ITSELF.values(), ids=BY_ITSELF)
def test_a_weight_that_overlaps_itself_is_refused(views: Views) -> None:
    memory = torch.randn(200)
    before = memory.clone()
    with pytest.raises(RuntimeError, match="rasa_merge_: weights must not overlap themselves"):
        rasa_merge_(views(memory), adapters(1))
    assert torch.equal(memory, before)
