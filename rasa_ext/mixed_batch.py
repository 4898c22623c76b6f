"""Inference of one batch whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext.ops import grouped_gemm

# A, A_shared, Bt, Bt_shared, d of one layer, in the order of rasa_add.
Adapter = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def mixed_add(x: Tensor, base: Tensor, adapters: Sequence[Adapter], index: Tensor) -> Tensor:
    """Add to each row of a base layer's output the update of that row's adapter.

    Semantics, in two grouped launches whatever the number of adapters::

        y = base.clone()
        for i, adapter in enumerate(adapters):
            y[index == i] = rasa_add(x[index == i], base[index == i], *adapter)
        return y

    Shapes: x (M,K), base (M,N), index (M) int64 with the number of each row's adapter, -1 for
    none; each adapter is (A (Rp,K), A_shared (Rs,K), Bt (Rp,N), Bt_shared (Rs,N), d (Rs+Rp)) with
    ranks of its own -> (M,N). LoRA is an adapter without shared ranks. Rows of a batch (B,T,K) are
    tokens: pass index.repeat_interleave(T).

    Dtypes: those of rasa_add; adapters that have not x's dtype are cast at each call. The update of
    a row does not depend on the other rows. Rows are sorted by adapter, which copies them, unless
    they lie so already. index is read by the host: a CPU tensor saves waiting for a GPU.
    No gradients are recorded.

    A server hangs it on each base layer of its frozen model, index being that of its tokens::

        def add(linear, args, y):
            x = args[0].flatten(0, -2)
            return mixed_add(x, y.flatten(0, -2), adapters_of[linear], index).view_as(y)
        linear.register_forward_hook(add)

    Raises ValueError if a shape or the index does not fit, by argument and adapter.
    """
    _check(x, base, adapters, index)
    sorted_index, order = index.sort(stable=True)
    is_sorted = bool(torch.equal(sorted_index, index))
    order = order.to(x.device)
    if not is_sorted:
        x, base = x[order], base[order]
    counts = torch.bincount(sorted_index + 1, minlength=len(adapters) + 1).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    # Problems of the adapters that have rows: shrink to each block of ranks, expand from them all.
    xs, As, Bts, ds, blocks, places = [], [], [], [], [], []
    for adapter, count, end in zip(adapters, counts[1:], ends[1:], strict=True):
        A, A_shared, Bt, Bt_shared, d = adapter
        Rs, used = len(A_shared), [len(A_shared) > 0, len(A) > 0]
        if count == 0 or not any(used):
            continue
        rows = slice(end - count, end)
        for block, block_A, block_Bt, block_d in (
            (used[0], A_shared, Bt_shared, d[:Rs]),
            (used[1], A, Bt, d[Rs:]),
        ):
            if block:
                xs.append(x[rows])
                As.append(block_A.to(x.dtype))
                Bts.append(block_Bt.to(x.dtype))
                ds.append(block_d)
        blocks.append(sum(used))
        places.append(rows)
    s = grouped_gemm("NT", xs, As)
    updated = grouped_gemm("NN", s, Bts, blocks, [base[rows] for rows in places], scale_k=ds)
    y = base.clone()
    for rows, update in zip(places, updated, strict=True):
        y[rows] = update
    return y if is_sorted else torch.empty_like(y).index_copy_(0, order, y)


def _check(x: Tensor, base: Tensor, adapters: Sequence[Adapter], index: Tensor) -> None:
    if x.dim() != 2 or base.dim() != 2 or len(x) != len(base):
        raise ValueError(
            f"mixed_add: x and base must be (M, K) and (M, N), got {list(x.shape)} and "
            f"{list(base.shape)}"
        )
    (M, K), N = x.shape, base.shape[1]
    if list(index.shape) != [M] or index.dtype != torch.int64:
        raise ValueError(
            f"mixed_add: index must be (M) = [{M}] of torch.int64, got {list(index.shape)} of "
            f"{index.dtype}"
        )
    if M > 0 and (int(index.min()) < -1 or int(index.max()) >= len(adapters)):
        raise ValueError(
            f"mixed_add: index must be in -1 .. {len(adapters) - 1}, the adapters, got "
            f"{int(index.min())} .. {int(index.max())}"
        )
    for i, (A, A_shared, Bt, Bt_shared, d) in enumerate(adapters):
        Rp, Rs = len(A), len(A_shared)
        for name, tensor, symbols, shape in (
            ("A", A, "(Rp, K)", [Rp, K]),
            ("A_shared", A_shared, "(Rs, K)", [Rs, K]),
            ("Bt", Bt, "(Rp, N)", [Rp, N]),
            ("Bt_shared", Bt_shared, "(Rs, N)", [Rs, N]),
            ("d", d, "(Rs + Rp)", [Rs + Rp]),
        ):
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"mixed_add: {name} of adapter {i} must be {symbols} = {shape}, got "
                    f"{list(tensor.shape)}"
                )
