"""Every error message of the ops, by its text."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Case
from layers import ADD_NAMES, LINEAR_NAMES, add_inputs, linear_inputs, new_seed

from rasa_ext import dropout_mask, grouped_gemm, rasa_add, rasa_linear

CASE = Case("errors", 5, 7, 6, 3, 4)
OPS = torch.ops.rasa_ext


def raises(text: str):
    return pytest.raises((RuntimeError, ValueError), match=re.escape(text))


MUTATIONS = [
    # argument, what is done to it, the message
    ("x", lambda t: t[0], "x must be (M, K), got 1 dimensions [7]"),
    ("x", lambda t: t.int(), "x must be float32, float64, bfloat16 or float16, got Int"),
    ("weight", lambda t: t[:, :5], "weight must be (N, K) = [6, 7], got [6, 5]"),
    ("weight", lambda t: t.double(), "weight must have x's dtype Float, got Double"),
    ("weight", lambda t: t[0], "weight must be (N, K), got 1 dimensions [7]"),
    ("bias", lambda t: t[:4], "bias must be (N) = [6], got [4]"),
    ("bias", lambda t: t.half(), "bias must have x's dtype Float, got Half"),
    ("A", lambda t: t[0], "A must be (Rp, K), got 1 dimensions [7]"),
    ("A", lambda t: t[:, :6], "A must be (Rp, K) = [3, 7], got [3, 6]"),
    ("A", lambda t: t.half(), "A must have x's dtype Float, got Half"),
    ("A", lambda t: t.t().contiguous().t(), "A must be row-major with stride(-1) == 1, got strides [1, 3]. Call .contiguous()"),
    ("A_shared", lambda t: t[:, :6], "A_shared must be (Rs, K) = [4, 7], got [4, 6]"),
    ("A_shared", lambda t: t.double(), "A_shared must have A's dtype Float, got Double"),
    ("Bt", lambda t: t[:2], "Bt must be (Rp, N) = [3, 6], got [2, 6]"),
    ("Bt_shared", lambda t: t[:, :5], "Bt_shared must be (Rs, N) = [4, 6], got [4, 5]"),
    ("Bt", lambda t: t.t().contiguous().t(), "Bt must be row-major with stride(-1) == 1"),
    ("d", lambda t: t[:6], "d must be (Rs + Rp) = [7], got [6]"),
    ("d", lambda t: t.bfloat16(), "d must have A's dtype Float, got BFloat16"),
    ("d", lambda t: t.repeat_interleave(2)[::2], "d must be row-major with stride(-1) == 1, got strides [2]. Call .contiguous()"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutate", "message"), MUTATIONS)
def test_linear_names_the_argument_and_what_was_expected(name, mutate, message):
    inputs = linear_inputs(CASE, torch.float32, torch.float32)
    i = LINEAR_NAMES.index(name)
    inputs[i] = mutate(inputs[i])
    with raises(f"rasa_linear: {message}"):
        rasa_linear(*inputs)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda t: t[0], "base must be (M, N), got 1 dimensions [6]"),
        (lambda t: t[:3], "base must be (M, N) = [5, 6], got [3, 6]"),
        (lambda t: t.double(), "base must have x's dtype Float, got Double"),
    ],
)
def test_add_names_the_argument_and_what_was_expected(mutate, message):
    inputs = add_inputs(CASE, torch.float32, torch.float32)
    inputs[1] = mutate(inputs[1])
    with raises(f"rasa_add: {message}"):
        rasa_add(*inputs)


def test_a_double_adapter_under_bfloat16_says_what_is_taken():
    inputs = add_inputs(CASE, torch.bfloat16, torch.float64)
    with raises("rasa_add: A must have x's dtype BFloat16 or Float, got Double"):
        rasa_add(*inputs)


@pytest.mark.parametrize("argument", ADD_NAMES[1:])
def test_a_tensor_on_another_device_is_named(argument):
    inputs = add_inputs(CASE, torch.float32, torch.float32)
    i = ADD_NAMES.index(argument)
    inputs[i] = inputs[i].to("meta")
    # Called below the Meta key, as a mix of devices reaches the kernel of the first real one.
    with raises(f"rasa_add: {argument} must be on x's device cpu, got meta"):
        torch.ops.rasa_ext.rasa_add.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *inputs, 0.0, None
        )


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_p_outside_its_range(p):
    inputs = add_inputs(CASE, torch.float32, torch.float32)
    with raises("rasa_add: p must be in [0, 1), got "):
        rasa_add(*inputs, p=p, seed=new_seed())
    with raises("dropout_mask: p must be in [0, 1), got "):
        dropout_mask(new_seed(), 2, 2, p)


def test_dropout_without_a_usable_seed():
    inputs = add_inputs(CASE, torch.float32, torch.float32)
    with raises("rasa_add: seed must be given when p > 0, got None with p = 0.1"):
        rasa_add(*inputs, p=0.1)
    with raises("rasa_add: seed must be given when p > 0, got None with p = 1e-06"):
        rasa_add(*inputs, p=1e-6)
    with raises("rasa_add: seed must be one Long element, got Float [2]"):
        rasa_add(*inputs, p=0.1, seed=torch.ones(2))
    with raises("dropout_mask: M and K must not be negative, got -1 and 3"):
        dropout_mask(new_seed(), -1, 3, 0.1)


def test_backward_names_the_argument():
    x, base, *adapter = add_inputs(CASE, torch.float32, torch.float32)
    s = OPS.rasa_add(x, base, *adapter, 0.0, None)[1]
    wanted = [True] * 6

    def call(dy=base, x=x, weight=None, s=s):
        lists = [[t] for t in adapter]
        return OPS.rasa_backward([dy], x, [weight], *lists, s, 0.0, None, wanted)

    with raises("rasa_backward: dy must be (M, N) = [5, 6], got [4, 6]"):
        call(dy=base[:4])
    with raises("rasa_backward: dy must have x's dtype Float, got Double"):
        call(dy=base.double())
    with raises("rasa_backward: s must be (M, round_up(R, 8)) = [5, 8], got [5, 7]"):
        call(s=s[:, :7])
    with raises("rasa_backward: weight must be (N, K) = [6, 7], got [7, 6]"):
        call(weight=torch.ones(7, 6))


def test_there_is_no_second_derivative():
    inputs = [t.requires_grad_() for t in add_inputs(CASE, torch.float32, torch.float32)]
    y = rasa_add(*inputs).square().sum()
    with raises("rasa_backward: a gradient of the gradient is not implemented; call backward without create_graph"):  # noqa: E501  # fmt: skip
        torch.autograd.grad(y, inputs, create_graph=True)


def a(*size):
    return torch.ones(*size)


GROUPS = [
    (("XX", [a(2, 3)], [a(3, 4)]), 'layout must be "NN", "NT" or "TN", got "XX"'),
    (("NN", [a(2, 3)], []), "B must have as many tensors as A = 1, got 0"),
    (("NN", [a(2, 3)], [a(3, 4)], [2]), "segments must sum to the number of tensors in A = 1, got [2]"),
    (("NN", [a(2, 3)], [a(3, 4)], [2**63 - 1, 2**63 - 1, 3]), "segments must sum to the number of tensors in A = 1, got"),
    (("NN", [a(2, 3)], [a(3, 4)], [0, 1]), "segments must be at least 1 for each problem, got [0, 1]"),
    (("NN", [a(2, 3)], [a(4, 4)]), "B must be (K, N) = [3, 4], got [4, 4]"),
    (("NT", [a(2, 3)], [a(4, 5)]), "B must be (N, K) = [4, 3], got [4, 5]"),
    (("TN", [a(3, 2), a(3, 5)], [a(3, 4), a(3, 4)], [2]), "A must be (K, M) = [3, 2], got [3, 5]"),
    (("NN", [a(3)], [a(3, 4)]), "A must be a matrix, got 1 dimensions [3]"),
    (("NN", [a(2, 3).int()], [a(3, 4).int()]), "A must be float32, float64, bfloat16 or float16, got Int"),
    (("NN", [a(2, 3)], [a(3, 4).half()]), "B must have A's dtype Float, got Half"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [a(2, 5)]), "C_in must be (M, N) = [2, 4], got [2, 5]"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [a(2, 4).half()]), "C_in must have the result's dtype Float, got Half"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [None, None]), "C_in must have one entry for each problem = 1, got 2"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [], [a(3)]), "scale_m must be (M) = [2], got [3]"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [], [], [a(2)]), "scale_k must be (K) = [3], got [2]"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [], [a(2).double()]), "scales must have A's dtype Float or Float, got Double"),
    (("NN", [a(2, 3)], [a(3, 4)], None, [], [], [], torch.float16), "out_dtype must be A's dtype Float or Float, got Half"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), GROUPS)
def test_grouped_gemm_names_the_argument(arguments, message):
    with raises(f"grouped_gemm: {message}"):
        grouped_gemm(*arguments)


def test_grouped_gemm_refuses_to_be_differentiated():
    with raises("grouped_gemm: has no derivative; use rasa_linear or rasa_add, or call it under torch.no_grad()"):  # noqa: E501  # fmt: skip
        grouped_gemm("NN", [a(2, 3).requires_grad_()], [a(3, 4)])
    for lists in ([[a(2, 4)], [], []], [[], [a(2)], []], [[], [], [a(3)]]):
        lists = [[t.requires_grad_() for t in tensors] for tensors in lists]
        with raises("grouped_gemm: has no derivative"):
            grouped_gemm("NN", [a(2, 3)], [a(3, 4)], None, *lists)
    with torch.no_grad():
        grouped_gemm("NN", [a(2, 3).requires_grad_()], [a(3, 4)])


def test_meta_checks_what_it_indexes():
    with raises("grouped_gemm: segments must sum to the number of tensors in A = 1, got [1, 1]"):
        grouped_gemm("NN", [a(2, 3).to("meta")], [a(3, 4).to("meta")], [1, 1])


def test_a_row_stride_beyond_32_bits_is_refused():
    torch.use_deterministic_algorithms(False)  # do not fill the 4 GiB, which no page of is touched
    wide = torch.empty(2**31 + 7, dtype=torch.float16).as_strided((2, 7), (2**31, 1))
    with raises("grouped_gemm: a row stride must be below 2^31, got 2147483648"):
        grouped_gemm("NN", [wide], [torch.ones(7, 3, dtype=torch.float16)])


@pytest.mark.parametrize("name", ["weight", "bias", "A", "A_shared", "Bt", "Bt_shared", "d"])
def test_one_tensor_on_the_meta_device_is_named(name):
    inputs = linear_inputs(CASE, torch.float32, torch.float32)
    i = LINEAR_NAMES.index(name)
    inputs[i] = inputs[i].to("meta")
    with raises(f"rasa_linear: {name} must be on x's device cpu, got meta"):
        rasa_linear(*inputs)


@pytest.mark.parametrize("name", ["A", "B", "C_in", "scale_m", "scale_k"])
def test_one_tensor_of_a_group_on_the_meta_device_is_named(name):
    sizes = {"A": (2, 3), "B": (3, 4), "C_in": (2, 4), "scale_m": (2,), "scale_k": (3,)}
    lists = {key: [a(*size), a(*size)] for key, size in sizes.items()}
    lists[name][1] = lists[name][1].to("meta")
    with raises(f"grouped_gemm: {name} must be on the first A's device cpu, got meta"):
        grouped_gemm("NN", **lists)


@pytest.mark.parametrize("name", ["weight", "A", "Bt", "d"])
def test_one_tensor_of_a_merge_on_the_meta_device_is_named(name):
    sizes = {"weight": (4, 3), "A": (2, 3), "Bt": (2, 4), "d": (2,)}
    lists = {key: [a(*size), a(*size)] for key, size in sizes.items()}
    lists[name][1] = lists[name][1].to("meta")
    with raises(f"rasa_merge_: {name} must be on the first layer's device cpu, got meta"):
        OPS.rasa_merge_(*lists.values(), [], [], [-1, -1])
