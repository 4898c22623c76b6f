"""What RaSALinear and SharedPool refuse, and what they say."""

from __future__ import annotations

import math

import pytest
import torch
from models import K, L, N, make_layer
from torch import nn

from rasa_ext.module import RaSALinear, SharedPool


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


def test_a_dtype_other_than_the_pools_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        RaSALinear(
            nn.Linear(K, N).bfloat16(), SharedPool(K, N, 1, L), 4, 1, 16, dtype=torch.bfloat16
        )
    assert str(error.value) == (
        "RaSALinear: dtype must be the pool's torch.float32, got torch.bfloat16"
    )


@pytest.mark.parametrize("name", ["in_features", "out_features", "k", "num_layers"])
def test_a_pool_without_size_is_refused(name: str) -> None:
    sizes = {"in_features": K, "out_features": N, "k": 1, "num_layers": L} | {name: 0}

    with pytest.raises(ValueError) as error:
        SharedPool(**sizes)

    assert str(error.value) == f"SharedPool: {name} must be an integer of at least 1, got 0"
