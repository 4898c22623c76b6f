"""The check at first use passes on a right launcher, and refuses a wrong one for good."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from cases import Case
from layers import DTYPES, add_inputs, dtypes_id

import rasa_ext
from rasa_ext import rasa_add
from rasa_ext.layer_ops import Adapters, rasa_delta_weights

CASE = Case("first_use", 5, 16, 8, 3, 4)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_right_launcher_passes_and_computes(dtypes, cpu_launcher):
    inputs = add_inputs(CASE, *dtypes)
    expected = rasa_add(*inputs)
    cpu_launcher("verified")
    assert torch.equal(rasa_add(*inputs), expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtypes_id)
def test_a_wrong_launcher_is_refused_at_every_call(dtypes, cpu_launcher):
    inputs = add_inputs(CASE, *dtypes)
    cpu_launcher("truncating")
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a kernel computes wrong numbers on cpu") as error:
            rasa_add(*inputs)
        messages.append(str(error.value).split("\n")[0])
    assert messages[0] == messages[1]
    numbers = re.search(r"has an error of (\S+), allowed are (\S+)\.", messages[0])
    assert float(numbers[1]) > float(numbers[2]) > 0
    assert "shrink (M 200, N 39, K 328) by a CPU launcher" in messages[0]
    assert "`python -m rasa_ext` runs every check" in messages[0]


def allowed_error(run) -> tuple[str, float]:
    with pytest.raises(RuntimeError, match="a kernel computes wrong numbers on cpu") as error:
        run()
    return str(error.value), float(re.search(r"allowed are (\S+)\.", str(error.value))[1])


def test_float32_in_tf32_may_be_as_wrong_as_tf32_and_an_update_of_weights_as_float32(cpu_launcher):
    x = torch.ones(2, 2)
    adapter = Adapters([x], [x], [torch.ones(2)], [], [], [-1])
    cpu_launcher("truncating_tf32")
    message, allowed = allowed_error(lambda: rasa_ext.grouped_gemm("NN", [x], [x]))
    assert "in TF32: shrink" in message and 2.0**-12 < allowed < 2.0**-9
    message, allowed = allowed_error(lambda: rasa_delta_weights(adapter))
    assert "in Float, of updates to weights: merge" in message and allowed < 2.0**-20


def test_the_check_leaves_the_random_numbers_of_torch_alone(tmp_path):
    """In a process of its own, in which the check has not run."""
    script = (
        "import torch, rasa_ext\n"
        "rasa_ext._C.set_cpu_launcher('verified')\n"
        "torch.manual_seed(3)\n"
        "state = torch.get_rng_state()\n"
        "rasa_ext.grouped_gemm('NN', [torch.ones(2, 2)], [torch.ones(2, 2)])\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


@pytest.mark.parametrize("smem_kib", [99, 163, 227])
@pytest.mark.parametrize("num_sms", [16, 108, 132])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_check_runs_every_cuda_kernel(dtype, num_sms, smem_kib):
    used, existing = rasa_ext._C.first_use_kernels(dtype, num_sms, smem_kib * 1024)
    assert len(set(existing)) == len(existing)
    assert set(used) == set(existing)
