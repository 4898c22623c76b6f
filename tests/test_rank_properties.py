"""Any sequence of gates, training steps and updates keeps function, budget and optimizer."""

from __future__ import annotations

import torch
from allocators import OPTIMIZERS, layers_of, train_step, trained_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PROJECTIONS, TinyModel, randomize_adapters
from torch import Tensor, nn

from rasa_ext import RankAllocator, apply

WIDTH = 6
THRESHOLD = 0.25


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, list[Tensor]]:
    """Each parameter with all that is kept by rank beside it, by id."""
    kept = {}
    for p in trained_parameters(model):
        moments = [v for v in optimizer.state[p].values() if v.dim() > 0]
        kept[id(p)] = [p.detach().clone(), *(m.clone() for m in moments)]
    return kept


def randomize_adapters_but_gates(model: nn.Module, step: int) -> None:
    gates = [layer.c.detach().clone() for layer in layers_of(model).values()]
    randomize_adapters(model, seed=step)
    with torch.no_grad():
        for layer, c in zip(layers_of(model).values(), gates, strict=True):
            layer.c.copy_(c)


def delta(layer: nn.Module, threshold: float) -> Tensor:
    """The layer's update from the ranks whose gates reach the threshold, in float64."""
    A, Bt, d = layer.A.detach(), layer.Bt.detach(), layer.d.detach()
    if layer.pool is not None:
        A, Bt = torch.cat([layer.pool.A_shared, A]), torch.cat([layer.pool.Bt_shared, Bt])
    used = (layer.c.detach() >= threshold)[:, None]
    return (Bt.double() * d.double()[:, None] * used).T @ A.detach().double()


def assert_rows_survive(before: list[Tensor], after: list[Tensor], grown: int) -> None:
    """What is left is rows of before, in order, in all tensors alike; new moments are zero."""
    left = after[0].shape[0] - grown
    rows = []
    for row in after[0][:left]:
        start = rows[-1] + 1 if rows else 0
        rows.append(next(i for i in range(start, len(before[0])) if before[0][i].equal(row)))
    for old, new in zip(before[1:], after[1:], strict=True):
        assert torch.equal(new[:left], old[rows])
        assert not new[left:].any()


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    k=st.sampled_from([0, 0, 1, 3]),
    budget=st.sampled_from(["ranks", "parameters"]),
    exclude_pruned=st.booleans(),
    min_rank=st.integers(1, 3),
    name=st.sampled_from(sorted(OPTIMIZERS)),
)
def test_any_sequence_of_updates(data, k, budget, exclude_pruned, min_rank, name) -> None:
    torch.manual_seed(0)
    model = TinyModel(width=WIDTH, num_layers=2)
    apply(model, r=3, k=k, target_modules=PROJECTIONS, gates=True)
    randomize_adapters(model)
    optimizer = OPTIMIZERS[name](trained_parameters(model))
    allocator = RankAllocator(
        model,
        optimizer,
        every=1,
        threshold=THRESHOLD,
        budget=budget,
        exclude_pruned=exclude_pruned,
        min_rank=min_rank,
    )
    least = {n: min(min_rank, layer.Rp) for n, layer in layers_of(model).items()}
    for step in range(data.draw(st.integers(1, 4))):
        train_step(model, optimizer, step) if data.draw(st.booleans()) else None
        for layer in layers_of(model).values():
            gates = st.lists(
                st.sampled_from([0.0, 0.1, THRESHOLD, 0.5, 1.0]),
                min_size=layer.c.numel(),
                max_size=layer.c.numel(),
            )
            with torch.no_grad():
                layer.c.copy_(torch.tensor(data.draw(gates)))
        randomize_adapters_but_gates(model, step)  # so that no two rows are equal
        before = state_of(model, optimizer)
        updates = {n: delta(layer, THRESHOLD) for n, layer in layers_of(model).items()}
        kept = {
            n: max(int((x.c[x.c.numel() - x.Rp :] >= THRESHOLD).sum()), min(min_rank, x.Rp))
            for n, x in layers_of(model).items()
        }

        allocator.update()

        after = state_of(model, optimizer)
        for n, layer in layers_of(model).items():
            # Ranks that only min_rank kept have gates below the threshold, before and after.
            torch.testing.assert_close(delta(layer, THRESHOLD), updates[n], rtol=1e-12, atol=1e-12)
            grown = layer.Rp - kept[n]
            for parameter in (layer.A, layer.Bt):
                assert_rows_survive(before[id(parameter)], after[id(parameter)], grown)
            assert layer.A.shape == (layer.Rp, layer.in_features)
            assert layer.Bt.shape == (layer.Rp, layer.out_features)
            assert layer.c.shape == layer.gate_scale.shape
            assert layer.c.numel() == layer.Rp + (0 if layer.pool is None else layer.pool.Rs)
            assert least[n] <= layer.Rp <= min(layer.in_features, layer.out_features)
        assert before.keys() == after.keys()
        spent = sum(layer.Rp for layer in layers_of(model).values())
        spent += sum(pool.Rs for pool in allocator.pools.values())
        if budget == "parameters":
            spent = sum(p.numel() for p in trained_parameters(model))
        assert spent <= allocator.budget
        train_step(model, optimizer, 100 + step)
