"""One batch whose rows use different adapters gives each row what it gets alone."""

from __future__ import annotations

import pytest
import torch
from hf_models import TARGETS, adapt, authors_model, language_model, tokens
from models import randomize_adapters
from reference import assert_accurate, authors_add
from torch import Tensor

from rasa_ext import mixed_batch
from rasa_ext.injection import adapted_layers
from rasa_ext.mixed_batch import Adapter, mixed_add

# (Rp, Rs) of each adapter: RaSA, LoRA, all shared, none, the published (32, 4) over 32 layers.
RANKS = [(7, 9), (4, 0), (0, 6), (0, 0), (28, 128)]
K, N = 40, 24


def make(M: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Adapter], Tensor]:
    """x and base as slices of larger tensors, an adapter for each of RANKS, and a random index."""
    torch.manual_seed(0)
    x, base = torch.randn(M, K + 3).to(dtype)[:, :K], torch.randn(M, N + 3).to(dtype)[:, :N]
    of = torch.float32 if dtype == torch.bfloat16 else dtype
    adapters = [
        (
            torch.randn(Rp, K, dtype=of) * K**-0.5,
            torch.randn(Rs, K, dtype=of) * K**-0.5,
            torch.randn(Rp, N, dtype=of),
            torch.randn(Rs, N, dtype=of),
            torch.randn(Rp + Rs, dtype=of),
        )
        for Rp, Rs in RANKS
    ]
    return x, base, adapters, torch.randint(-1, len(RANKS), (M,))


def by_formula(x: Tensor, base: Tensor, adapters: list[Adapter], index: Tensor) -> Tensor:
    """The authors' formula, one row after the other."""
    rows = [
        base[i : i + 1]
        if number < 0
        else authors_add(x[i : i + 1], base[i : i + 1], *adapters[number], p=0.0, seed=None)
        for i, number in enumerate(index.tolist())
    ]
    return torch.cat([base[:0], *rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("M", [0, 1, 3, 150])
def test_each_row_gets_its_own_adapter(M: int, dtype: torch.dtype) -> None:
    x, base, adapters, index = make(M, dtype)
    before = base.clone()

    y = mixed_add(x, base, adapters, index)

    doubles = [tuple(t.double() for t in adapter) for adapter in adapters]
    exact = by_formula(x.double(), base.double(), doubles, index)
    assert_accurate(y, by_formula(x, base, adapters, index), exact)
    assert torch.equal(base, before)
    assert torch.equal(y[index == -1], base[index == -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_a_mixed_batch_is_the_row_alone_bit_by_bit(dtype: torch.dtype) -> None:
    x, base, adapters, index = make(60, dtype)

    y = mixed_add(x, base, adapters, index)

    for i in range(60):
        row = slice(i, i + 1)
        assert torch.equal(y[row], mixed_add(x[row], base[row], adapters, index[row]))


def test_the_order_of_rows_does_not_matter() -> None:
    x, base, adapters, index = make(60, torch.float32)
    order = index.sort(stable=True)[1]

    y = mixed_add(x, base, adapters, index)

    sorted_rows = mixed_add(x[order], base[order], adapters, index[order])
    assert torch.equal(sorted_rows, y[order])


def test_any_number_of_adapters_takes_two_launches(monkeypatch) -> None:
    x, base, adapters, index = make(60, torch.float32)
    launches = []
    launch = mixed_batch.grouped_gemm

    def count(layout, *args, **kwargs):
        launches.append(layout)
        return launch(layout, *args, **kwargs)

    monkeypatch.setattr(mixed_batch, "grouped_gemm", count)
    mixed_add(x, base, adapters, index)

    assert launches == ["NT", "NN"]


def test_a_model_serves_several_adapters_in_one_batch() -> None:
    # Of other ranks and pools; the last row uses none.
    adapted = [language_model("llama").double() for _ in range(2)]
    for seed, (model, (r, k)) in enumerate(zip(adapted, [(4, 2), (3, 0)], strict=True)):
        adapt(model, "llama", r=r, k=k)
        randomize_adapters(model, seed=seed)
    served, T = language_model("llama").double(), 7
    ids, index = tokens(rows=4, length=T), torch.tensor([1, 0, 1, -1])
    layers = [adapted_layers(model) for model in adapted]
    for name, linear in served.named_modules():
        if name.endswith(TARGETS["llama"]):
            adapters = [tensors(of_model[name]) for of_model in layers]

            def add(linear, args, y, adapters=adapters):
                x, of_tokens = args[0].flatten(0, -2), index.repeat_interleave(T)
                return mixed_add(x, y.flatten(0, -2), adapters, of_tokens).view_as(y)

            linear.register_forward_hook(add)

    with torch.no_grad():
        out = served(input_ids=ids).logits

    for row, model in enumerate([adapted[1], adapted[0], adapted[1], language_model("llama")]):
        with torch.no_grad():
            exact = authors_model(model).double()(input_ids=ids[row : row + 1]).logits[0]
        assert_accurate(out[row], exact, exact, f"row {row}")


def tensors(layer) -> Adapter:
    if layer.pool is None:
        return layer.A, layer.A[:0], layer.Bt, layer.Bt[:0], layer.d
    return layer.A, layer.pool.A_shared, layer.Bt, layer.pool.Bt_shared, layer.d


def change(**changes):
    names = ("A", "A_shared", "Bt", "Bt_shared", "d")

    def changed(adapters: list[Adapter]) -> list[Adapter]:
        first = dict(zip(names, adapters[0], strict=True)) | changes
        return [tuple(first.values()), *adapters[1:]]

    return changed


@pytest.mark.parametrize(
    ("adapters_of", "index", "message"),
    [
        (list, torch.zeros(5), "index must be (M) = [5] of torch.int64, got [5] of torch.float32"),
        (
            list,
            torch.zeros(4, dtype=torch.int64),
            "index must be (M) = [5] of torch.int64, got [4] of torch.int64",
        ),
        (list, torch.arange(1, 6), "index must be in -1 .. 4, the adapters, got 1 .. 5"),
        (list, torch.arange(-2, 3), "index must be in -1 .. 4, the adapters, got -2 .. 2"),
        (
            change(Bt=torch.ones(7, N + 1)),
            torch.arange(5),
            "Bt of adapter 0 must be (Rp, N) = [7, 24], got [7, 25]",
        ),
        (
            change(d=torch.ones(7)),
            torch.arange(5),
            "d of adapter 0 must be (Rs + Rp) = [16], got [7]",
        ),
    ],
)
def test_what_does_not_fit_is_named(adapters_of, index: Tensor, message: str) -> None:
    x, base, adapters, _ = make(5, torch.float32)

    with pytest.raises(ValueError) as error:
        mixed_add(x, base, adapters_of(adapters), index)

    assert str(error.value) == f"mixed_add: {message}"


def test_x_and_base_must_be_rows() -> None:
    x, base, adapters, index = make(5, torch.float32)

    with pytest.raises(ValueError) as error:
        mixed_add(x[None], base, adapters, index)

    assert str(error.value) == (
        "mixed_add: x and base must be (M, K) and (M, N), got [1, 5, 40] and [5, 24]"
    )
