"""Trains a small model for many steps, in which ranks move without end, and watches its memory.

    python tests/robustness/soak.py --steps 10000

Each step is forward, backward, AdamW and RankAllocator.step(), with dropout, siblings (q/k/v and
gate/up in one op each), a checkpointed block, and batches of three lengths. After a tenth of the
steps there must be no live tensor more. The library compiles a micro-kernel for every shape that
it meets, and keeps it: some 14 KiB for each form, length and number of ranks. So the second half
of the steps repeats the first, from the same seed, and meets no new shape: in it at most
ALLOCATED_BOUND more bytes may be allocated by malloc than in the first half, and at most
MAPPED_BOUND more be mapped, which includes the compiled micro-kernels. A leak of half a KiB a step
is found. Resident memory is not the measure: it grows until every page of malloc's free memory has
been touched once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rasa_ext

ALLOCATED_BOUND = 2 * 2**20
MAPPED_BOUND = 8 * 2**20  # malloc's free memory comes and goes
SAMPLES = 100
WIDTH = 32
LENGTHS = (4, 8, 16)


class Block(nn.Module):
    """The seven linears of a decoder layer, without the softmax between them."""

    def __init__(self) -> None:
        """Make the linears."""
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the features of each token."""
        x = x + self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x))
        return x + self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    """Two blocks, of which the second is checkpointed."""

    def __init__(self) -> None:
        """Make the blocks."""
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks."""
        y: Tensor = checkpoint(self.layers[1], self.layers[0](x), use_reentrant=False)
        return y


def mapped() -> int:
    """Bytes of this process's address space, touched or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns, in bytes; of all threads' arenas together."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that malloc has given out and that are not freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def live_tensors() -> int:
    """Tensors that Python holds, after a collection."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


class Counting(rasa_ext.RankAllocator):
    """Counts the ranks that it prunes and grows."""

    pruned = grown = 0

    def _carry_out(self, decision: Any) -> None:
        for name, layer in self.layers.items():
            self.pruned += layer.Rp - len(decision.keep_private[name])
        for name, pool in self.pools.items():
            self.pruned += pool.Rs - len(decision.keep_shared[name])
        self.grown += sum(decision.grow.values())
        super()._carry_out(decision)


def train(steps: int, warm: int, every: int) -> tuple[Counting, float, list[tuple[int, int]]]:
    """Train from the seed; return allocator, loss, and live tensors and bytes by sample."""
    torch.manual_seed(0)
    model = Model()
    rasa_ext.apply(model, r=4, k=1, alpha=4, dropout=0.1, gates=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # A step takes 0.08 from a gate, more than AdamW gives back: no rank lives for long.
    allocator = Counting(model, optimizer, l1=4.0, gate_lr=0.02, every=10)
    teacher = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    samples: list[tuple[int, int]] = []
    for step in range(steps):
        x = torch.randn(2, LENGTHS[step % len(LENGTHS)], WIDTH)
        loss = (model(x) - x @ teacher).square().mean()
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        if step >= warm and (step + 1) % every == 0:
            samples.append((live_tensors(), allocated()))
    return allocator, loss.item(), samples


def run(steps: int) -> dict[str, Any]:
    """Train and return what was counted; `verdict` is "flat" or says what was not."""
    half, every = steps // 2, max(1, steps // SAMPLES)
    warm = steps // 10
    allocator, _, first = train(half, warm, every)
    pruned, grown, mapped_first = allocator.pruned, allocator.grown, mapped()
    del allocator
    allocator, loss, second = train(half, warm, every)
    pruned, grown = pruned + allocator.pruned, grown + allocator.grown
    groups = {layer.siblings for layer in allocator.layers.values() if layer.siblings is not None}
    more_tensors = max(n for n, _ in first + second) - first[0][0]
    more_allocated = max(size for _, size in second) - max(size for _, size in first)
    more_mapped = mapped() - mapped_first
    faults = {
        f"{more_tensors} live tensors more": more_tensors > 0,
        f"{more_allocated / 2**20:.1f} MiB more in the second half": more_allocated
        > ALLOCATED_BOUND,
        f"{more_mapped / 2**20:.1f} MiB more mapped": more_mapped > MAPPED_BOUND,
        f"{pruned} ranks pruned and {grown} grown are too few": min(pruned, grown) < steps // 10,
        "siblings were not computed together": not all(group.fuses for group in groups),
        f"the loss is {loss}": not math.isfinite(loss),
    }
    return {
        "steps": steps,
        "ranks_pruned": pruned,
        "ranks_grown": grown,
        "live_tensors": second[-1][0],
        "live_tensors_more": more_tensors,
        "allocated_MiB": round(second[-1][1] / 2**20, 1),
        "allocated_MiB_more_in_second_half": round(more_allocated / 2**20, 2),
        "allocated_MiB_bound": ALLOCATED_BOUND // 2**20,
        "mapped_MiB_more_in_second_half": round(more_mapped / 2**20, 2),
        "verdict": "; ".join(text for text, is_true in faults.items() if is_true) or "flat",
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    found = run(parser.parse_args().steps)
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return int(found["verdict"] != "flat")


if __name__ == "__main__":
    sys.exit(main())
