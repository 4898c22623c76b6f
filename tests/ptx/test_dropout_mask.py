"""The mask kernel of the CUDA backend draws, bit by bit, what the CPU op draws."""

from __future__ import annotations

import ctypes as C

import pytest
import torch

from ptx.conftest import ModuleLoader
from ptx.executor import Buffer, Options, Output
from ptx.planned_gemm import CSRC
from rasa_ext import dropout_mask


class MaskArgs(C.Structure):
    """rasa::MaskArgs."""

    _fields_ = [
        ("seed", C.c_void_p),
        ("threshold", C.c_uint32),
        ("M", C.c_int32),
        ("K", C.c_int32),
        ("kept", C.c_void_p),
    ]


@pytest.mark.parametrize("seed", [1, 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (16, 16), (33, 70), (130, 17)])
def test_the_mask_is_the_cpus(ptx_module: ModuleLoader, M: int, K: int, seed: int) -> None:
    p = 0.3
    module = ptx_module(CSRC / "cuda" / "dropout_mask.cu", "sm_80", include=(CSRC,))
    kernel = module.kernel(next(iter(module.entries)))
    seeds = torch.tensor([seed], dtype=torch.int64)
    seed_buffer, kept = Buffer(seeds), Buffer(torch.full((M, K), 2, dtype=torch.uint8))
    args = MaskArgs(seed_buffer.address, round(p * 2**15), M, K, kept.address)
    # Two blocks have many lanes each to draw: the loop over the grid runs more than once.
    result = kernel.launch(
        2, 64, bytes(args), outputs=[Output(kept)], options=Options(adversarial=True, seed=1)
    )
    assert result.ok, result.report()
    assert torch.equal(kept.read().bool(), dropout_mask(seeds, M, K, p))
    assert kept.read().max() <= 1
