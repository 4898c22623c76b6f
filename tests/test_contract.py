"""What PyTorch expects of an op: opcheck, compile, autocast, checkpointing, no waste."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from conftest import BACKENDS
from layers import DTYPES, add_inputs, dtypes_id, linear_inputs, new_seed, sibling_inputs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from rasa_ext import RaSALinear, SharedPool, rasa_add, rasa_linear

pytestmark = pytest.mark.usefixtures("device")


OPS = torch.ops.rasa_ext
CASE = Case("contract", 12, 16, 24, 3, 6)
SIBLINGS = [CASE, Case("more", 12, 16, 10, 0, 5), Case("base", 12, 16, 9, 0, 0)]


def arguments(op: str, dtypes: tuple[torch.dtype, torch.dtype], p: float) -> list:
    if op == "rasa_linear":
        return [*linear_inputs(CASE, *dtypes), p, new_seed()]
    if op == "rasa_linears":
        return [*sibling_inputs(SIBLINGS, *dtypes), p, new_seed()]
    x, base, *adapter = add_inputs(CASE, *dtypes)
    if op == "rasa_add":
        return [x, base, *adapter, p, new_seed()]
    if op == "rasa_backward":
        _, s = OPS.rasa_add(x, base, *adapter, p, new_seed())
        lists = [[t] for t in adapter]
        wanted = [True, False, True, True, False, True]
        return [[base], x, [None], *lists, s, p, new_seed(), wanted]
    if op == "dropout_mask":
        return [new_seed(), 20, 18, p]
    scales = [torch.randn(CASE.M, dtype=dtypes[0])]
    return ["NN", [x], [x.T.contiguous()], [1], [None], scales, [], dtypes[1]]


def with_grad(args: list) -> list:
    def leaf(a):
        if isinstance(a, list):
            return [leaf(item) for item in a]
        is_real = isinstance(a, Tensor) and a.is_floating_point()
        return a.detach().requires_grad_() if is_real else a

    return [leaf(a) for a in args]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize(
    "op",
    ["rasa_linear", "rasa_linears", "rasa_add", "rasa_backward", "grouped_gemm", "dropout_mask"],
)
def test_opcheck(op, dtypes, p):
    torch.use_deterministic_algorithms(False)  # opcheck compares views that NaN filling would write
    args = arguments(op, dtypes, p)
    torch.library.opcheck(getattr(OPS, op).default, args)
    if op in ("rasa_linear", "rasa_linears", "rasa_add"):
        torch.library.opcheck(getattr(OPS, op).default, with_grad(args))


@pytest.mark.cpu
def test_every_op_has_every_kernel():
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "rasa_ext::" in n]
    assert sorted(names) == [
        "dropout_mask", "grouped_gemm", "rasa_add", "rasa_backward", "rasa_delta_weights",
        "rasa_grouped_backward", "rasa_grouped_linear", "rasa_linear", "rasa_linears",
        "rasa_merge_", "rasa_pool_gradients_",
    ]  # fmt: skip
    names.remove("rasa_linear")  # one layer of rasa_linears, on any device
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    for name in names:
        for key in [keys[backend] for backend in BACKENDS] + ["Meta"]:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rasa_ext::{name}", key), name
    for name in ("rasa_linears", "rasa_add", "rasa_grouped_linear"):
        for key in ("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(
                f"rasa_ext::{name}", key
            ), name


@pytest.mark.parametrize("op", [rasa_linear, rasa_add])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compile_in_one_graph_for_any_number_of_tokens(op, p):
    """Forward and backward, dynamic shapes: as the op itself computes."""
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (12, 7, 33):
        case = Case("compile", M, 16, 24, 3, 6)
        make = linear_inputs if op is rasa_linear else add_inputs
        inputs = make(case, torch.float32, torch.float32)
        results = []
        for fn in (op, compiled):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = fn(*leaves, p=p, seed=new_seed())
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def make_layer(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> RaSALinear:
    pool = SharedPool(16, 24, 2, 3, dtype=torch.float32)
    layer = RaSALinear(torch.nn.Linear(16, 24, dtype=dtype), pool, 5, 2, 16, dropout)
    torch.nn.init.normal_(layer.Bt)
    torch.nn.init.normal_(pool.Bt_shared)
    return layer


def test_a_compiled_layer_trains_in_one_graph():
    """With inductor, dropout and all: torch.randint is part of the graph."""
    torch.use_deterministic_algorithms(False)
    layer = make_layer(dropout=0.1).train()
    compiled = torch.compile(layer, fullgraph=True)
    compiled(torch.randn(2, 6, 16)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (layer.A, layer.Bt, layer.d))
    layer.eval()
    x = torch.randn(2, 6, 16)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype_and_returns_float32_gradients(dtype, device):
    layer = make_layer()
    x = torch.randn(7, 16, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        y = layer(x)
        cast = [layer.base_layer.weight.to(dtype), layer.base_layer.bias.to(dtype)]
        adapter = (layer.A, layer.pool.A_shared, layer.Bt, layer.pool.Bt_shared, layer.d)
        assert torch.equal(y, rasa_linear(x.to(dtype), *cast, *adapter))
    y.float().sum().backward()
    assert y.dtype == dtype
    for t in (x, layer.A, layer.Bt, layer.d, layer.pool.A_shared, layer.pool.Bt_shared):
        assert t.grad.dtype == torch.float32 and t.grad.any()


def test_checkpointing_draws_the_same_mask_again():
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        layer = make_layer(dropout=0.4).train()
        x = torch.randn(9, 16, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, layer.A.grad, layer.d.grad, layer.pool.Bt_shared.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_manual_seed_repeats_the_mask_and_the_next_call_draws_another():
    layer = make_layer(dropout=0.5).train()
    x = torch.randn(9, 16)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def saved_for_backward(fn, *args) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn(*args)
    return saved


def test_only_x_and_s_are_saved_beside_the_weights():
    case = Case("saved", 64, 40, 56, 7, 30)
    inputs = [t.requires_grad_() for t in linear_inputs(case, torch.float32, torch.float32)]
    saved = saved_for_backward(lambda *t: rasa_linear(*t, p=0.1, seed=new_seed()), *inputs)
    own = {t.data_ptr() for t in inputs}
    fresh = [t for t in saved if t.data_ptr() not in own and t.numel() > 1]
    assert [tuple(t.shape) for t in fresh] == [(64, 40)], "s, its 37 ranks padded to 40"


def allocated(fn) -> int:
    """Bytes that fn allocates in all, freed or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    events = prof.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


@pytest.mark.cpu
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[2], DTYPES[5]], ids=dtypes_id)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_temporary_grows_with_the_tokens_but_the_results_and_the_ranks(dtypes, p):
    """Per token: y and s forward; dx, g and packed g and s backward. Nothing K- or N-wide else."""
    K, N, R8 = 512, 768, 40
    grown = []
    for M in (256, 768):
        x, weight, _, *adapter = linear_inputs(Case("memory", M, K, N, 7, 30), *dtypes)
        y, s = OPS.rasa_linear(x, weight, None, *adapter, p, new_seed())

        def forward(x=x, weight=weight, adapter=adapter):
            OPS.rasa_linear(x, weight, None, *adapter, p, new_seed())

        def backward(x=x, weight=weight, adapter=adapter, s=s, y=y):
            lists = [[t] for t in adapter]
            OPS.rasa_backward([y], x, [weight], *lists, s, p, new_seed(), [True] * 6)

        def base_forward(x=x, weight=weight):
            torch.nn.functional.linear(x, weight)

        def base_backward(y=y, weight=weight):
            torch.mm(y, weight)

        forward(), backward()  # first use compiles micro-kernels
        calls = (forward, backward, base_forward, base_backward)
        grown.append([allocated(call) for call in calls])
    size = dtypes[0].itemsize
    per_token = [(b - a) / 512 / size for a, b in zip(*grown, strict=True)]
    of_forward, of_backward, of_base_forward, of_base_backward = per_token
    # The library may convert in buffers of its own, whose size is not in proportion to the tokens:
    # an eighth of a K-wide row is the margin.
    margin = K / 8
    assert min(of_base_forward - N, of_base_backward - K) > -margin
    assert -margin < of_forward - of_base_forward - R8 < margin
    assert -margin < of_backward - of_base_backward - R8 < 2 * 4 * R8 / size + margin
