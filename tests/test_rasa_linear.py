"""rasa_linear and rasa_add: right values, right gradients, and properties that need no oracle."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, case_id
from layers import (
    ADD_NAMES,
    DTYPES,
    LINEAR_NAMES,
    add_inputs,
    dtypes_id,
    linear_inputs,
    new_seed,
    randn,
)
from reference import authors_add, authors_linear, compare_with_float64
from torch import Tensor

import rasa_ext
from rasa_ext import rasa_add, rasa_linear

pytestmark = pytest.mark.usefixtures("device")


CASE = Case("train", 130, 96, 80, 7, 30)
SMALL = Case("small", 5, 6, 4, 2, 3)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_linear_and_its_gradients_equal_the_authors_formula(case, dtypes, p, device):
    seed = new_seed(device=device)
    inputs = linear_inputs(case, *dtypes, device=device)
    compare_with_float64(
        lambda *t: rasa_linear(*t, p=p, seed=seed),
        lambda *t: authors_linear(*t, p=p, seed=seed),
        inputs,
        LINEAR_NAMES,
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_add_and_its_gradients_equal_the_authors_formula(case, dtypes, p, device):
    seed = new_seed(device=device)
    compare_with_float64(
        lambda *t: rasa_add(*t, p=p, seed=seed),
        lambda *t: authors_add(*t, p=p, seed=seed),
        add_inputs(case, *dtypes, device=device),
        ADD_NAMES,
    )


@pytest.mark.cpu
@pytest.mark.parametrize("micro_kernels", ["library", "none"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_cpu_with_fewer_micro_kernels_computes_the_same_formula(case, dtypes, micro_kernels):
    rasa_ext._C.set_micro_kernels(micro_kernels)
    try:
        compare_with_float64(
            lambda *t: rasa_linear(*t, p=0.3, seed=new_seed()),
            lambda *t: authors_linear(*t, p=0.3, seed=new_seed()),
            linear_inputs(case, *dtypes),
            LINEAR_NAMES,
        )
    finally:
        rasa_ext._C.set_micro_kernels("own")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_linear(bias, p):
    inputs = linear_inputs(SMALL, torch.float64, torch.float64, bias=bias)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: rasa_linear(*t, p=p, seed=new_seed()), leaves)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_add(p):
    leaves = [t.requires_grad_() for t in add_inputs(SMALL, torch.float64, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: rasa_add(*t, p=p, seed=new_seed()), leaves)


@pytest.mark.parametrize("frozen", range(len(LINEAR_NAMES)), ids=LINEAR_NAMES)
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[3]], ids=dtypes_id)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(frozen, dtypes):
    inputs = linear_inputs(CASE, *dtypes)

    def gradients(wanted: list[int]) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        rasa_linear(*leaves, p=0.1, seed=new_seed()).float().square().sum().backward()
        return [t.grad for t in leaves]

    everything = gradients(list(range(len(inputs))))
    all_but_one = gradients([i for i in range(len(inputs)) if i != frozen])
    only_one = gradients([frozen])
    assert all_but_one[frozen] is None
    assert [g is not None for g in only_one] == [i == frozen for i in range(len(inputs))]
    for i, name in enumerate(LINEAR_NAMES):
        alone = only_one[i] if i == frozen else all_but_one[i]
        assert torch.equal(alone, everything[i]), name


def test_backward_computes_only_what_its_mask_asks_for():
    x, base, *adapter = add_inputs(CASE, torch.float32, torch.float32)
    y, s = torch.ops.rasa_ext.rasa_add(x, base, *adapter, 0.0, None)
    lists = [[t] for t in adapter]

    def call(wanted: list[bool]) -> list[Tensor]:
        return torch.ops.rasa_ext.rasa_backward([base], x, [None], *lists, s, 0.0, None, wanted)

    full = call([True] * 6)
    for which in range(6):
        grads = call([i == which for i in range(6)])
        for i, (grad, expected) in enumerate(zip(grads, full, strict=True)):
            assert grad.shape == (expected.shape if i == which else (0,))


def test_no_gradient_is_recorded_when_nothing_asks_for_one():
    assert not rasa_linear(*linear_inputs(CASE, torch.float32, torch.float32)).requires_grad


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_rows_do_not_depend_on_their_neighbours(dtypes, micro_kernel):
    x, base, *adapter = add_inputs(CASE, *dtypes)
    order = torch.randperm(CASE.M)
    y = rasa_add(x, base, *adapter)
    assert torch.equal(rasa_add(x[order], base[order], *adapter), y[order])


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_rank_may_move_from_private_to_shared(dtypes):
    x, base, A, A_shared, Bt, Bt_shared, d = add_inputs(CASE, *dtypes)
    y = rasa_add(x, base, A, A_shared, Bt, Bt_shared, d)
    moved = [A[1:], torch.cat([A_shared, A[:1]]), Bt[1:], torch.cat([Bt_shared, Bt[:1]]), d]
    assert torch.equal(rasa_add(x, base, *moved), y)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_d_zero_returns_the_base_output_bitwise(dtypes):
    x, weight, bias, *adapter, d = linear_inputs(CASE, *dtypes)
    for b in (bias, None):
        y = rasa_linear(x, weight, b, *adapter, torch.zeros_like(d))
        assert torch.equal(y, torch.nn.functional.linear(x, weight, b))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("layout", ["column-major", "broadcast", "every second row"])
def test_strides_of_x_do_not_change_the_result(layout, dtypes):
    x, base, *adapter = add_inputs(CASE, *dtypes)
    if layout == "column-major":
        strided = x.t().contiguous().t()
    elif layout == "broadcast":
        strided = x[:1].expand(CASE.M, CASE.K)
    else:
        strided = x.repeat_interleave(2, dim=0)[::2]
    dense = strided.contiguous()
    assert torch.equal(rasa_add(strided, base, *adapter), rasa_add(dense, base, *adapter))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_the_stride_of_the_bias_does_not_change_the_result(dtypes):
    x, weight, bias, *adapter = linear_inputs(CASE, *dtypes)
    for strided in (bias.repeat_interleave(2)[::2], bias[:1].expand(CASE.N)):
        y = rasa_linear(x, weight, strided, *adapter)
        assert torch.equal(y, rasa_linear(x, weight, strided.contiguous(), *adapter))


@pytest.mark.parametrize("width", [34, 68, 100, 103])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_nothing_beside_a_slice_is_read(width, dtypes, device):
    case = Case("slice", 65, width, width, 7, 9, strided=True)
    inputs = [t.requires_grad_() for t in linear_inputs(case, *dtypes, device=device)]
    dy = randn(case.M, case.N, dtype=dtypes[0], strided=True, device=device)
    y = rasa_linear(*inputs)
    results = [y, *torch.autograd.grad(y, inputs, dy)]
    assert all(t.isfinite().all() for t in results)


def test_a_broadcast_output_gradient_is_accepted():
    """y.sum().backward() hands down a gradient with strides 0, 0."""
    inputs = [t.requires_grad_() for t in add_inputs(CASE, torch.float32, torch.float32)]
    summed = torch.autograd.grad(rasa_add(*inputs).sum(), inputs)
    dense = torch.autograd.grad(rasa_add(*inputs), inputs, torch.ones(CASE.M, CASE.N))
    assert all(torch.equal(a, b) for a, b in zip(summed, dense, strict=True))


def test_base_is_not_written():
    x, base, *adapter = add_inputs(CASE, torch.float32, torch.float32)
    before = base.clone()
    rasa_add(x, base, *adapter)
    assert torch.equal(base, before)


def test_nan_in_a_row_stays_in_that_row(micro_kernel):
    x, base, *adapter = add_inputs(CASE, torch.bfloat16, torch.float32)
    x[3, 5] = float("nan")
    rows = rasa_add(x, base, *adapter).isnan().any(dim=1).nonzero().flatten()
    assert rows.tolist() == [3]


def test_an_infinite_row_stays_infinite_and_in_its_row(micro_kernel):
    """Its product with the padding of s must not become NaN."""
    x, base = torch.ones(3, 4), torch.zeros(3, 5)
    x[1, 0] = float("inf")
    ones = torch.ones(1, 4), torch.ones(0, 4), torch.ones(1, 5), torch.ones(0, 5), torch.ones(1)
    for dtype in (torch.float32, torch.bfloat16):
        y = rasa_add(x.to(dtype), base.to(dtype), *(t.to(dtype) for t in ones))
        assert y.isinf().all(dim=1).tolist() == [False, True, False]
        assert not y.isnan().any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_tiny_weights_do_not_underflow(dtypes):
    """Bt starts at zero: early in training d * Bt is far below float16's smallest normal number."""
    inputs = add_inputs(CASE, *dtypes)
    inputs[1] = torch.zeros_like(inputs[1])  # base
    for i, scale in ((4, 1e-4), (5, 1e-4), (6, 0.1)):  # Bt, Bt_shared, d
        inputs[i] = inputs[i] * scale
    compare_with_float64(rasa_add, lambda *t: authors_add(*t, p=0.0, seed=None), inputs, ADD_NAMES)


@pytest.mark.cpu
def test_many_numbers_of_tokens_do_not_grow_the_process():
    """The library keeps a kernel for every shape and stride it has seen."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def run(tokens: range) -> int:
        for M in tokens:
            inputs = add_inputs(Case("tokens", M, 64, 64, 7, 30), torch.float32, torch.float32)
            leaves = [t.requires_grad_() for t in inputs]
            rasa_add(*leaves, p=0.1, seed=new_seed()).sum().backward()
        return resident()

    before = run(range(1, 300, 3))
    assert run(range(2, 3000, 30)) - before < 24 * 2**20


@pytest.mark.cpu
def test_switching_onednn_off_and_on_again():
    inputs = add_inputs(CASE, torch.bfloat16, torch.bfloat16)
    y = rasa_add(*inputs)
    kernels = rasa_ext._C.micro_kernel_dtypes()
    with torch.backends.mkldnn.flags(enabled=False):
        own = ",bfloat16" if rasa_ext._C.cpu_capability() == "avx512_bf16" else ""
        assert rasa_ext._C.micro_kernel_dtypes() == "float32" + own
        assert rasa_add(*inputs).isfinite().all()
    assert rasa_ext._C.micro_kernel_dtypes() == kernels
    assert torch.equal(rasa_add(*inputs), y)


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_results_do_not_depend_on_the_number_of_threads(dtypes, threads, micro_kernel):
    case = Case("threads", 520, 576, 192, 7, 30)
    inputs = [t.requires_grad_() for t in add_inputs(case, *dtypes)]
    dy = torch.ones_like(inputs[1])

    def run() -> list[Tensor]:
        y = rasa_add(*inputs, p=0.1, seed=new_seed())
        return [y, *torch.autograd.grad(y, inputs, dy)]

    before = torch.get_num_threads()
    expected = run()
    try:
        torch.set_num_threads(threads)
        again = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_linear_layer_repeats_itself_at_any_number_of_threads(dtypes, threads):
    """Only y and dx hold the library's base product, which may depend on the number of threads."""
    case = Case("threads", 7, 576, 192, 7, 30)
    inputs = [t.requires_grad_() for t in linear_inputs(case, *dtypes)]
    dy = torch.ones(case.M, case.N, dtype=dtypes[0])

    def run() -> dict[str, Tensor]:
        y = rasa_linear(*inputs, p=0.1, seed=new_seed())
        return {"y": y} | dict(zip(LINEAR_NAMES, torch.autograd.grad(y, inputs, dy), strict=True))

    before = torch.get_num_threads()
    expected = run()
    try:
        torch.set_num_threads(threads)
        first, second = run(), run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    adapter = ("A", "A_shared", "Bt", "Bt_shared", "d")
    assert all(torch.equal(first[name], expected[name]) for name in adapter)
