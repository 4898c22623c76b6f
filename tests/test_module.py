"""RaSALinear and SharedPool: the authors' formula, every base, and torch's own module rituals."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from models import Conv1D, Int8Linear, randomize_adapters
from torch import Tensor, nn
from torch.nn.utils import prune

from rasa_ext.module import RaSALinear, SharedPool

K, N, L = 24, 16, 3


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


def make_layer(
    r: int = 4, k: int = 1, base: nn.Module | None = None, dropout: float = 0.0
) -> RaSALinear:
    torch.manual_seed(0)
    pool = SharedPool(K, N, k, L) if k > 0 else None
    layer = RaSALinear(base or nn.Linear(K, N), pool, r, k, alpha=16, dropout=dropout)
    if pool is not None:
        randomize_adapters(pool, seed=2)
    return randomize_adapters(layer)


def authors_update(layer: RaSALinear, x: Tensor) -> Tensor:
    """The authors' formula: two concatenations, two matmuls, and the mixing between them."""
    A, Bt = layer.A, layer.Bt
    if layer.pool is not None:
        A = torch.cat([layer.pool.A_shared, A])
        Bt = torch.cat([layer.pool.Bt_shared, Bt])
    return ((x @ A.T) * layer.d) @ Bt


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def assert_as_accurate(out: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`out` may be twice as wrong as plain torch, plus one rounding of the output."""
    allowed = 2 * relative_error(plain, exact) + torch.finfo(out.dtype).eps
    assert relative_error(out, exact) <= allowed


@pytest.mark.parametrize(("r", "k"), [(4, 1), (4, 0), (4, 4), (1, 1), (8, 2)])
@pytest.mark.parametrize("base", ["linear", "no_bias", "conv1d", "int8"])
def test_forward_is_the_authors_formula(r: int, k: int, base: str) -> None:
    linear = nn.Linear(K, N, bias=base == "linear")
    bases = {"conv1d": Conv1D(N, K), "int8": Int8Linear(linear)}
    layer = make_layer(r, k, bases.get(base, linear))
    x = torch.randn(7, K)
    exact_layer = copy.deepcopy(layer).double()

    exact = exact_layer.base_layer(x.double()) + authors_update(exact_layer, x.double())

    assert_as_accurate(layer(x), layer.base_layer(x) + authors_update(layer, x), exact)


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
    x = torch.randn(4, 6, 2 * K)[:, ::2, :K]

    assert torch.equal(layer(x), layer(x.contiguous()))


def test_gradients_are_those_of_the_authors_formula() -> None:
    model = randomize_adapters(Pair(dtype=torch.float64))
    x = torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 8

    ours = torch.autograd.grad(model(x).square().sum(), [x, *parameters])
    y = sum(layer.base_layer(x) + authors_update(layer, x) for layer in model.layers)
    theirs = torch.autograd.grad(y.square().sum(), [x, *parameters])

    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


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


def test_base_layer_is_frozen_and_keeps_its_mode() -> None:
    base = nn.Linear(K, N).eval()
    layer = RaSALinear(base, None, r=4, k=0, alpha=16)

    layer(torch.randn(2, K)).sum().backward()

    assert base.weight.grad is None and base.bias.grad is None
    assert layer.A.grad is not None and layer.Bt.grad is not None
    assert not layer.training


def test_a_base_that_trains_gets_its_gradient() -> None:
    layer = make_layer()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(5, K)

    layer(x).sum().backward()

    torch.testing.assert_close(layer.base_layer.weight.grad, x.sum(0).expand(N, K))
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((N,), 5.0))


def test_hooks_of_the_base_run_and_may_change_its_output() -> None:
    layer = make_layer()
    x = torch.randn(5, K)
    before = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)

    torch.testing.assert_close(layer(x), before + 1)
    handle.remove()
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], N)
    torch.testing.assert_close(layer(x), authors_update(layer, x))


def test_pruning_of_the_base_is_honoured() -> None:
    layer = make_layer()
    prune.random_unstructured(layer.base_layer, "weight", 0.5)
    x = torch.randn(5, K)

    torch.testing.assert_close(layer(x), layer.base_layer(x) + authors_update(layer, x))


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


def test_checkpointing_draws_the_same_mask_again() -> None:
    model = randomize_adapters(Pair(dropout=0.5))
    x = torch.randn(6, K, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]

    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_compiles_without_a_graph_break(k: int) -> None:
    layer = make_layer(k=k)
    x = torch.randn(2, 5, K, requires_grad=True)

    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)

    assert torch.equal(y, layer(x))
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, layer(x))))


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_delta_weight_is_what_forward_adds(base: str, k: int) -> None:
    layer = make_layer(k=k, base=nn.Linear(K, N) if base == "linear" else Conv1D(N, K)).double()
    x = torch.randn(5, K, dtype=torch.float64)

    delta = layer.delta_weight()

    assert delta.shape == (N, K)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)
    torch.testing.assert_close(
        layer.weight - layer.base_layer.weight, delta.T if base == "conv1d" else delta
    )


def test_delta_weight_is_float32_even_under_autocast() -> None:
    layer = make_layer()
    expected = layer.delta_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.delta_weight(), expected)

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


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_the_float32_sum_once_and_unmerge_is_exact(
    base: str, dtype: torch.dtype
) -> None:
    base_layer = (nn.Linear(K, N) if base == "linear" else Conv1D(N, K)).to(dtype)
    layer = make_layer(base=base_layer).eval()
    before = base_layer.weight.clone()
    delta = layer.delta_weight() if base == "linear" else layer.delta_weight().T

    layer.merge()

    assert layer.merged
    assert torch.equal(base_layer.weight, (before.float() + delta).to(dtype))
    assert torch.equal(
        layer(torch.ones(3, K, dtype=dtype)), base_layer(torch.ones(3, K, dtype=dtype))
    )
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(base_layer.weight, before)


def test_merged_layer_computes_what_it_did() -> None:
    layer = make_layer().eval()
    x = torch.randn(5, K)
    exact_layer = copy.deepcopy(layer).double()
    exact, plain = exact_layer(x.double()), layer.base_layer(x) + authors_update(layer, x)

    layer.merge()

    assert_as_accurate(layer(x), plain, exact)


def test_merged_layer_copies_and_moves_with_its_original_weight() -> None:
    layer = make_layer()
    before = layer.base_layer.weight.clone()
    layer.merge()

    for twin in (copy.deepcopy(layer), torch.load(saved(layer), weights_only=False)):
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, before)
    layer.double().unmerge()
    assert torch.equal(layer.base_layer.weight, before.double())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda layer: layer.merge(), "RaSALinear.merge: already merged. Call unmerge() first"),
        (
            lambda layer: layer.train()(torch.ones(1, K)),
            "RaSALinear: merged and in training mode, where its adapter would get no gradient. "
            "Call unmerge(), or eval() to run the merged layer",
        ),
        (
            lambda layer: layer.state_dict(),
            "RaSALinear.state_dict: merged; base weight and adapter would count the update twice. "
            "Call unmerge() first",
        ),
        (
            lambda layer: layer.load_state_dict({}),
            "RaSALinear.load_state_dict: merged; base weight and adapter would count the update "
            "twice. Call unmerge() first",
        ),
    ],
)
def test_a_merged_layer_refuses(act, message: str) -> None:
    layer = make_layer()
    layer.merge()

    with pytest.raises(RuntimeError) as error:
        act(layer)
    assert str(error.value) == message


def test_unmerge_needs_a_merged_layer() -> None:
    with pytest.raises(RuntimeError, match=r"^RaSALinear.unmerge: not merged$"):
        make_layer().unmerge()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merge_refuses_what_is_not_finite(value: float) -> None:
    layer = make_layer()
    layer.d.data[0] = value
    before = layer.base_layer.weight.clone()

    with pytest.raises(ValueError) as error:
        layer.merge()

    assert str(error.value) == (
        "RaSALinear.merge: the merged weight would hold NaN or inf in torch.float32. Check the "
        "adapter's weights and d"
    )
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)


def test_merge_refuses_overflow_of_float16() -> None:
    layer = make_layer(base=nn.Linear(K, N).half())
    layer.d.data.fill_(1e6)

    with pytest.raises(ValueError, match=r"would hold NaN or inf in torch\.float16"):
        layer.merge()


def test_merge_needs_a_weight_to_add_to() -> None:
    layer = make_layer(base=Int8Linear(nn.Linear(K, N)))

    with pytest.raises(TypeError) as error:
        layer.merge()

    assert str(error.value) == (
        "RaSALinear.merge: Int8Linear has no floating-point weight of shape (N, K) = [16, 24] to "
        "add to"
    )


# --- the pool is one, whatever torch does to the model -----------------------------------------


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


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


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.ones(2, K + 1), f"shape [2, {K + 1}]"),
        (torch.tensor(1.0), "shape []"),
        ([1.0] * K, "list"),
        (None, "NoneType"),
    ],
)
def test_an_x_that_does_not_fit_is_refused(x, got: str) -> None:
    with pytest.raises(ValueError) as error:
        make_layer()(x)
    assert str(error.value) == (
        f"RaSALinear: x must be a tensor (..., in_features) = [..., {K}], got {got}"
    )


CONFIG_ERRORS = [
    ({"r": 0}, "r must be an integer of at least 1, got 0"),
    ({"r": 2.5}, "r must be an integer of at least 1, got 2.5"),
    (
        {"k": 5},
        "k must be an integer in 0 .. r = 4, got 5. Each layer gives k of its r ranks to the pool; "
        "k = 0 is plain LoRA, k = r shares all",
    ),
    (
        {"k": -1},
        "k must be an integer in 0 .. r = 4, got -1. Each layer gives k of its r ranks to the "
        "pool; k = 0 is plain LoRA, k = r shares all",
    ),
    ({"alpha": 0}, "alpha must be a finite number above 0, got 0"),
    ({"alpha": math.nan}, "alpha must be a finite number above 0, got nan"),
    ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_ERRORS)
def test_a_wrong_configuration_is_refused(change: dict, message: str) -> None:
    arguments = {"r": 4, "k": 1, "alpha": 16} | change

    with pytest.raises(ValueError) as error:
        RaSALinear(nn.Linear(K, N), SharedPool(K, N, 1, L), **arguments)

    assert str(error.value) == f"RaSALinear: {message}"


@pytest.mark.parametrize(
    ("pool", "k", "message"),
    [
        (None, 1, "pool must be a SharedPool when k = 1, got None"),
        (SharedPool(K, N, 1, L), 0, "pool must be None when k = 0, got a pool"),
        (
            SharedPool(K, N + 1, 1, L),
            1,
            "pool must have (in_features, out_features, k) = (24, 16, 1), got (24, 17, 1)",
        ),
        (
            SharedPool(K, N, 2, L),
            1,
            "pool must have (in_features, out_features, k) = (24, 16, 1), got (24, 16, 2)",
        ),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(pool, k: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        RaSALinear(nn.Linear(K, N), pool, r=4, k=k, alpha=16)
    assert str(error.value) == f"RaSALinear: {message}"


@pytest.mark.parametrize("base", [nn.Embedding(4, 4), nn.LazyLinear(4), make_layer()])
def test_a_base_that_is_not_linear_is_refused(base: nn.Module) -> None:
    with pytest.raises(TypeError) as error:
        RaSALinear(base, None, r=4, k=0, alpha=16)
    assert str(error.value) == (
        "RaSALinear: base_layer must be a module with in_features and out_features (or the nx and "
        f"nf of Conv1D) and no adapter yet, got {type(base).__name__}"
    )


@pytest.mark.parametrize(
    ("base_dtype", "dtype", "message"),
    [
        (torch.float32, torch.int8, "dtype must be a floating-point dtype, got torch.int8"),
        (
            torch.float32,
            torch.bfloat16,
            "dtype must be the base weight's torch.float32, got torch.bfloat16",
        ),
        (
            torch.bfloat16,
            torch.float16,
            "dtype must be the base weight's torch.bfloat16 or torch.float32, got torch.float16",
        ),
    ],
)
def test_a_dtype_that_does_not_fit_is_refused(base_dtype, dtype, message: str) -> None:
    with pytest.raises(ValueError) as error:
        RaSALinear(nn.Linear(K, N, dtype=base_dtype), None, r=4, k=0, alpha=16, dtype=dtype)
    assert str(error.value) == f"RaSALinear: {message}"


@pytest.mark.parametrize("name", ["in_features", "out_features", "k", "num_layers"])
def test_a_pool_without_size_is_refused(name: str) -> None:
    sizes = {"in_features": K, "out_features": N, "k": 1, "num_layers": L} | {name: 0}

    with pytest.raises(ValueError) as error:
        SharedPool(**sizes)

    assert str(error.value) == f"SharedPool: {name} must be an integer of at least 1, got 0"
