"""What only a GPU has: streams, graphs, a second device, no synchronisation. Not collected without.

The results themselves are tested by the other files, whose tests run on every device.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cases import Case
from layers import DTYPES, dtypes_id, linear_inputs, new_seed
from reference import assert_accurate, error
from torch import Tensor

from rasa_ext import dropout_mask, grouped_gemm, rasa_linear
from rasa_ext.layer_ops import Adapters, rasa_delta_weights

CASE = Case("cuda", 200, 256, 192, 7, 32)
P = 0.1
TF32_EPS = 2.0**-10


def leaves_of(dtypes, device="cuda") -> list[Tensor]:
    return [t.requires_grad_() for t in linear_inputs(CASE, *dtypes, device=device)]


def step(inputs: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    y = rasa_linear(*inputs, p=P, seed=seed)
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_captured_step_replays_what_the_eager_step_computes(dtypes):
    torch.use_deterministic_algorithms(False)  # NaN filling is no part of the step
    inputs, seed = leaves_of(dtypes), new_seed(device="cuda")
    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        step(inputs, seed)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, seed)

    for value in (1, 2):  # other numbers in the same memory, dropout's seed among them
        with torch.no_grad():
            torch.manual_seed(value)
            for t, other in zip(inputs, linear_inputs(CASE, *dtypes, device="cuda"), strict=True):
                t.copy_(other)
            seed.fill_(value)
        graph.replay()
        expected = step(inputs, seed)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_the_ops_run_on_the_current_stream(dtypes):
    torch.use_deterministic_algorithms(False)
    inputs, seed = leaves_of(dtypes), new_seed(device="cuda")
    later = [t.detach().clone() for t in linear_inputs(CASE, *dtypes, device="cuda")]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # what runs on another stream reads the old numbers
        for t, value in zip(inputs, later, strict=True):
            t.copy_(value)
    with torch.cuda.stream(side):
        results = step(inputs, seed)
        mask = dropout_mask(seed, 20, 30, P)
    side.synchronize()
    expected = step([t.requires_grad_() for t in later], seed)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert torch.equal(mask.cpu(), dropout_mask(seed.cpu(), 20, 30, P))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_step_waits_for_nothing(dtypes):
    torch.use_deterministic_algorithms(False)
    inputs, seed = leaves_of(dtypes), new_seed(device="cuda")
    step(inputs, seed)  # the check at first use does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_step_repeats_bit_by_bit(dtypes):
    inputs, seed = leaves_of(dtypes), new_seed(device="cuda")
    first, second = step(inputs, seed), step(inputs, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_tensors_of_a_second_device_are_computed_there(dtypes):
    expected = step(leaves_of(dtypes), new_seed(device="cuda:0"))
    with torch.cuda.device(0):
        results = step(leaves_of(dtypes, "cuda:1"), new_seed(device="cuda:1"))
    assert all(t.device == torch.device("cuda:1") for t in results)
    assert all(
        t.isfinite().all() and t.shape == e.shape for t, e in zip(results, expected, strict=True)
    )


def without_and_with_tf32(compute: Callable[[], Tensor]) -> list[Tensor]:
    before = torch.backends.cuda.matmul.allow_tf32
    results = []
    try:
        for allow in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allow
            results.append(compute())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return results


@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
def test_float32_multiplies_in_tf32_where_torch_is_told_to(layout):
    A, B = torch.randn(64, 512, device="cuda"), torch.randn(512, 64, device="cuda")
    exact = A.double() @ B.double()
    stored = [
        t.T.contiguous() if letter == "T" else t for t, letter in zip((A, B), layout, strict=True)
    ]
    products = without_and_with_tf32(lambda: grouped_gemm(layout, *([t] for t in stored))[0])
    errors = [error(C, exact) for C in products]
    assert 10 * errors[0] < errors[1] < TF32_EPS


def test_an_update_of_weights_is_float32s_even_where_tf32_is_allowed():
    Bt, A, d = (torch.randn(*shape, device="cuda") for shape in ((39, 300), (39, 200), (39,)))
    adapters = Adapters([A], [Bt], [d], [], [], [-1])
    exact = (Bt.double() * d.double()[:, None]).T @ A.double()
    plain = (Bt * d[:, None]).T @ A
    deltas = without_and_with_tf32(lambda: rasa_delta_weights(adapters)[0])
    assert torch.equal(*deltas)
    assert_accurate(deltas[0], plain, exact)


def test_a_first_use_during_capture_is_refused(tmp_path):
    script = (
        "import torch, rasa_ext\n"
        "x = torch.ones(16, 16, device='cuda', dtype=torch.bfloat16)\n"
        "torch.cuda.synchronize()\n"
        "with torch.cuda.graph(torch.cuda.CUDAGraph()):\n"
        "    rasa_ext.grouped_gemm('NN', [x], [x])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "checked at their first use on a device, which cannot be captured" in run.stderr
