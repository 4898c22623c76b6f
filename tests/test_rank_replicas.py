"""Two processes decide the same: DistributedDataParallel on gloo, and FSDP2 around the adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from allocators import FIRST, allocation, gated, layers_of, set_gates, trained_parameters
from process_group import leave_process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rasa_ext import RankAllocator

SETTINGS = {"every": 3, "l1": 1.0, "gate_lr": 0.1}
STEPS = 12


def in_two_processes(tmp_path: Path, *scenarios: Callable[[int], None]) -> None:
    """Run the scenarios, one after the other: starting processes costs more than they do."""
    mp.spawn(run_scenarios, (str(tmp_path / "rendezvous"), scenarios), nprocs=2)


def run_scenarios(rank: int, rendezvous: str, scenarios: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for scenario in scenarios:
        scenario(rank)
    leave_process_group()


def batch(step: int, rank: int) -> torch.Tensor:
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))
    return x[rank]


def assert_same_everywhere(values: object) -> None:
    gathered: list[object] = [None, None]
    dist.all_gather_object(gathered, values)
    assert gathered[0] == gathered[1]


def bytes_of(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trained_parameters(model)]


def train_with_ddp(rank: int, k: int) -> None:
    model, optimizer, allocator = allocation(k=k, **SETTINGS)
    torch.manual_seed(rank)  # the processes' generators differ, as dropout wants
    ddp = DistributedDataParallel(model)
    changes = 0
    for step in range(STEPS):
        x = batch(step, rank)
        (ddp(x) - x).square().mean().backward()
        optimizer.step()
        if allocator.step():
            changes += 1
            ddp = DistributedDataParallel(model)
        optimizer.zero_grad()
        assert_same_everywhere([allocator.rank_pattern(), bytes_of(model)])
    assert changes > 1
    assert len(set(allocator.rank_pattern().values())) > 1


def decide_from_the_first(rank: int) -> None:
    model, _, allocator = allocation(threshold=0.5)
    set_gates(model, {FIRST: [1.0, 0.4999 if rank == 0 else 0.5001, 1.0, 1.0]})
    allocator.update()
    assert_same_everywhere(allocator.rank_pattern())
    assert allocator.rank_pattern()[FIRST] == 3


def drift_apart(rank: int) -> None:
    model, _, allocator = allocation()
    set_gates(model, {FIRST: [1.0, 0.5 + 0.25 * rank, 0.0, 1.0]})
    try:
        allocator.update()
    except RuntimeError as error:
        assert "gates must be the same on all processes, got values 0.25 apart" in str(error)
        assert allocator.rank_pattern()[FIRST] == 4
    else:
        raise AssertionError("no error")


def train_with_fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = gated()
    adapters = trained_parameters(model)
    for block in model.layers:
        fully_shard(block, ignored_params=set(adapters))
    fully_shard(model, ignored_params=set(adapters))
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    allocator = RankAllocator(model, optimizer, **SETTINGS)
    changes = 0
    for step in range(STEPS):
        x = batch(step, rank)
        (model(x) - x).square().mean().backward()
        for parameter in adapters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
        changes += allocator.step()
        optimizer.zero_grad()
        assert_same_everywhere([allocator.rank_pattern(), bytes_of_adapters(model)])
    assert changes > 1


def bytes_of_adapters(model: nn.Module) -> list[bytes]:
    return [
        p.detach().numpy().tobytes()
        for layer in layers_of(model).values()
        for p in (layer.A, layer.Bt, layer.c)
    ]


def shard_the_adapters(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = gated()
    fully_shard(model)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    try:
        RankAllocator(model, optimizer, **SETTINGS)
    except TypeError as error:
        assert "ranks of a DTensor cannot be edited" in str(error)
    else:
        raise AssertionError("no error")


def test_ddp_processes_decide_the_same_and_stay_the_same_to_the_bit(tmp_path) -> None:
    in_two_processes(tmp_path, partial(train_with_ddp, k=0), partial(train_with_ddp, k=1))


def test_the_first_process_decides_unless_gradients_were_not_averaged(tmp_path) -> None:
    in_two_processes(tmp_path, decide_from_the_first, drift_apart)


def test_fsdp2_must_leave_the_adapters_out_and_then_processes_decide_the_same(tmp_path) -> None:
    in_two_processes(tmp_path, shard_the_adapters, train_with_fsdp2)
