"""RaSALinear and SharedPool: the authors' formula, every base, and torch's own module rituals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import (
    Conv1D,
    Int8Linear,
    K,
    L,
    N,
    assert_as_accurate,
    authors_layer,
    authors_update,
    make_layer,
    randomize_adapters,
    saved,
)
from torch import Tensor, nn

from rasa_ext.module import RaSALinear, SharedPool
from rasa_ext.ops import dropout_mask

pytestmark = pytest.mark.usefixtures("device")


class Pair(nn.Module):
    """Two layers and the pool they share, as apply() leaves a model."""

    def __init__(
        self, r: int = 4, k: int = 2, dropout: float = 0.0, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.pool = SharedPool(K, N, k, 2, dtype=dtype)
        base = [nn.Linear(K, N, dtype=dtype) for _ in range(2)]
        self.layers = nn.ModuleList(RaSALinear(b, self.pool, r, k, 16, dropout) for b in base)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) + self.layers[1](x)


@pytest.mark.parametrize(("r", "k"), [(4, 1), (4, 0), (4, 4), (1, 1), (8, 2)])
@pytest.mark.parametrize("base", ["linear", "no_bias", "conv1d", "int8"])
def test_forward_is_the_authors_formula(r: int, k: int, base: str) -> None:
    linear = nn.Linear(K, N, bias=base == "linear")
    bases = {"conv1d": Conv1D(N, K), "int8": Int8Linear(linear)}
    layer = make_layer(r, k, bases.get(base, linear))

    assert_as_accurate(layer, authors_layer, layer, torch.randn(7, K))


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 5, K), (2, 1, 5, K), (0, K), (2, 0, K)])
@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
def test_x_may_have_one_to_four_dimensions(shape: tuple[int, ...], base: type) -> None:
    layer = make_layer(base=nn.Linear(K, N) if base is nn.Linear else Conv1D(N, K))
    x = torch.randn(shape)

    y = layer(x)

    assert y.shape == shape[:-1] + (N,)
    rows = x.reshape(-1, K)
    assert torch.equal(y.reshape(-1, N), layer(rows))


def test_strided_x_gives_what_its_copy_gives() -> None:
    layer = make_layer()

    for x in (
        torch.randn(4, 6, 2 * K)[:, ::2, :K],
        torch.randn(K, 5).T,
        torch.randn(K).expand(3, K),
    ):
        assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_are_those_of_the_authors_formula(k: int) -> None:
    model = randomize_adapters(Pair(k=k))
    count = 1 + sum(p.requires_grad for p in model.parameters())
    assert count == 9

    def gradient(i: int, forward):
        def of(model: Pair, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_(True)
            y = sum(forward(layer, x) for layer in model.layers)
            wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
            return torch.autograd.grad(y.square().sum(), wanted)[i]

        return of

    for i in range(count):
        ours, authors = gradient(i, RaSALinear.__call__), gradient(i, authors_layer)
        assert_as_accurate(lambda x, ours=ours: ours(model, x), authors, model, torch.randn(9, K))


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_new_layer_computes_its_base(k: int) -> None:
    base = nn.Linear(K, N)
    layer = RaSALinear(base, SharedPool(K, N, k, L) if k else None, r=4, k=k, alpha=16)
    x = torch.randn(5, K)

    assert torch.equal(layer(x), base(x))


def test_initial_values_are_the_authors() -> None:
    pool = SharedPool(K, N, k=2, num_layers=5)
    layer = RaSALinear(nn.Linear(K, N), pool, r=8, k=2, alpha=16)

    bound = math.sqrt(1 / K)  # Kaiming-uniform, a = sqrt(5)
    for A in (layer.A, pool.A_shared):
        assert 0.8 * bound < A.abs().max() <= bound
    assert not layer.Bt.any() and not pool.Bt_shared.any()
    assert torch.equal(layer.d[:10], torch.full((10,), 0.5 * 16 / 10))
    assert torch.equal(layer.d[10:], torch.full((6,), 0.5 * 16 / 6))
    assert [tuple(p.shape) for p in (pool.A_shared, pool.Bt_shared)] == [(10, K), (10, N)]
    assert [tuple(p.shape) for p in (layer.A, layer.Bt)] == [(6, K), (6, N)]


def test_plain_lora_has_a_constant_d_outside_the_state() -> None:
    layer = RaSALinear(nn.Linear(K, N), None, r=4, k=0, alpha=16)

    assert torch.equal(layer.d, torch.full((4,), 4.0))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "Bt"]
    assert set(layer.state_dict()) == {"A", "Bt", "base_layer.weight", "base_layer.bias"}


def test_all_shared_has_no_ranks_of_its_own() -> None:
    layer = RaSALinear(nn.Linear(K, N), SharedPool(K, N, 4, L), r=4, k=4, alpha=16)

    assert layer.A.shape == (0, K) and layer.Bt.shape == (0, N)
    assert torch.equal(layer.d, torch.full((4 * L,), 0.5 * 16 / (4 * L)))


@pytest.mark.parametrize(
    ("base_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_adapters_are_at_least_float32(base_dtype: torch.dtype, expected: torch.dtype) -> None:
    layer = RaSALinear(nn.Linear(K, N, dtype=base_dtype), None, r=4, k=0, alpha=16)

    assert {layer.A.dtype, layer.Bt.dtype, layer.d.dtype} == {expected}
    assert layer(torch.ones(2, K, dtype=base_dtype)).dtype == base_dtype


def test_dropout_is_off_in_eval_and_at_zero() -> None:
    with_dropout, without = make_layer(dropout=0.5), make_layer()
    x = torch.randn(5, K)
    state = torch.get_rng_state()

    assert torch.equal(with_dropout.eval()(x), without(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_one_seed_per_call_from_torch() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(50, K)

    torch.manual_seed(7)
    first, second = layer(x), layer(x)
    torch.manual_seed(7)

    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    torch.randint(2**63 - 1, ())
    assert torch.equal(layer(x), second)


def test_dropout_is_that_of_the_op_on_x_before_A() -> None:
    layer, p = make_layer(dropout=0.3), 0.3
    x = torch.randn(40, K)
    torch.manual_seed(7)
    mask = dropout_mask(torch.randint(2**63 - 1, ()), 40, K, p)
    kept = 1 - round(p * 2**15) / 2**15
    torch.manual_seed(7)

    def formula(layer: RaSALinear, x: Tensor) -> Tensor:
        return layer.base_layer(x) + authors_update(layer, x * mask / kept)

    assert_as_accurate(layer, formula, layer, x)


def test_checkpointing_draws_the_same_mask_again() -> None:
    model = randomize_adapters(Pair(dropout=0.5))
    x = torch.randn(6, K, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]

    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize(("k", "dropout"), [(0, 0.0), (1, 0.0), (4, 0.0), (1, 0.3)])
def test_compiles_to_one_graph_for_any_number_of_tokens(k: int, dropout: float) -> None:
    layer = make_layer(k=k, dropout=dropout)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    for M in (5, 3, 8):
        x = torch.randn(2, M, K, requires_grad=True)
        outputs = []
        for forward in (compiled, layer):
            torch.manual_seed(M)
            outputs.append(forward(x))
        assert torch.equal(*outputs)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs))


@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_autocast_gives_the_dtype_of_the_base(base: str, device: str) -> None:
    layer = make_layer(base=nn.Linear(K, N) if base == "linear" else Conv1D(N, K))

    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(torch.randn(5, K))
        assert y.dtype == layer.base_layer(torch.randn(5, K)).dtype
    y.sum().backward()

    assert layer.Bt.grad.dtype == torch.float32


def test_half_precision_x_takes_float32_adapters() -> None:
    layer = make_layer(base=nn.Linear(K, N).bfloat16())

    def formula(layer: RaSALinear, x: Tensor) -> Tensor:
        half = layer.base_layer(x)
        return half + authors_update(layer, x.to(layer.A.dtype)).to(half.dtype)

    assert_as_accurate(layer, formula, layer, torch.randn(7, K).bfloat16())


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_delta_weight_is_what_forward_adds(base: str, k: int) -> None:
    layer = make_layer(k=k, base=nn.Linear(K, N) if base == "linear" else Conv1D(N, K))

    assert layer.delta_weight().shape == (N, K)
    assert_as_accurate(
        lambda x: x @ layer.delta_weight().T, authors_update, layer, torch.randn(5, K)
    )
    in_layout = layer.delta_weight().T if base == "conv1d" else layer.delta_weight()
    assert torch.equal(layer.weight, layer.base_layer.weight + in_layout)


def test_delta_weight_is_float32_even_under_autocast(device: str) -> None:
    layer = make_layer()
    expected = layer.delta_weight()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(layer.delta_weight(), expected)

    assert layer.pool is not None
    layer.pool.bfloat16()
    assert layer.bfloat16().delta_weight().dtype == torch.float32


def test_code_that_reads_the_weight_sees_the_update() -> None:
    attention = nn.MultiheadAttention(K, 2)
    x = torch.randn(4, 1, K)
    plain = attention(x, x, x)[0]
    attention.out_proj = randomize_adapters(RaSALinear(attention.out_proj, None, 4, 0, 16))

    update = attention(x, x, x)[0] - plain
    update.sum().backward()

    assert update.abs().max() > 0.1
    assert attention.out_proj.A.grad.abs().max() > 0


def test_repr_names_the_configuration() -> None:
    layer = make_layer(r=8, k=2, dropout=0.1)

    assert "r=8, k=2, alpha=16, dropout=0.1, R=12, merged=False" in repr(layer)
    assert repr(layer.pool) == f"SharedPool(in_features={K}, out_features={N}, k=2, num_layers=3)"


def assert_shares_its_pool(model: Pair) -> None:
    assert all(layer.pool is model.pool for layer in model.layers)


def test_the_pool_is_in_the_state_once() -> None:
    model = Pair()

    assert [key for key in model.state_dict() if "shared" in key] == [
        "pool.A_shared",
        "pool.Bt_shared",
    ]
    assert sum("shared" in name for name, _ in model.named_parameters(remove_duplicate=False)) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: torch.load(saved(m), weights_only=False)]
)
def test_copies_share_their_own_pool(copied) -> None:
    model = randomize_adapters(Pair())
    x = torch.randn(3, K)

    twin = copied(model)

    assert_shares_its_pool(twin)
    assert twin.pool is not model.pool
    assert torch.equal(twin(x), model(x))
    twin.pool.A_shared.data.zero_()
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_goes_to_another_model(assign: bool) -> None:
    model, other = randomize_adapters(Pair()), Pair()
    x = torch.randn(3, K)

    other.load_state_dict(model.state_dict(), strict=True, assign=assign)

    assert_shares_its_pool(other)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("overwrite", [False, True])
def test_moving_the_model_moves_what_the_layers_use(overwrite: bool) -> None:
    model = randomize_adapters(Pair())
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)

    assert_shares_its_pool(model)
    assert model(torch.ones(3, K, dtype=torch.float64)).dtype == torch.float64
    assert model.to("meta")(torch.ones(3, K, dtype=torch.float64, device="meta")).is_meta


def test_functional_call_reaches_the_pool() -> None:
    model = randomize_adapters(Pair())
    x = torch.randn(3, K)
    pool = {f"pool.{n}": torch.zeros_like(p) for n, p in model.pool.named_parameters()}

    y = torch.func.functional_call(model, pool, x)

    assert not torch.equal(y, model(x))
    torch.nn.init.zeros_(model.pool.A_shared), torch.nn.init.zeros_(model.pool.Bt_shared)
    assert torch.equal(y, model(x))
