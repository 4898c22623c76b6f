"""Random inputs of the ops for a case: normal, rounded before the oracle sees them."""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor

LINEAR_NAMES = ("x", "weight", "bias", "A", "A_shared", "Bt", "Bt_shared", "d")
ADD_NAMES = ("x", "base", "A", "A_shared", "Bt", "Bt_shared", "d")

# (activations, adapter): what the ops take.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def dtypes_id(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def randn(
    *size: int, dtype: torch.dtype, strided: bool = False, device: str | None = None
) -> Tensor:
    """A normal matrix; strided: a slice of a wider one that holds NaN beside it."""
    device = device or str(torch.get_default_device())
    # Drawn on the CPU: the same numbers for every device.
    values = torch.randn(*size, dtype=torch.float64, device="cpu").to(dtype).to(device)
    if not strided or len(size) < 2:
        return values
    wide = torch.full((size[0], size[1] + 5), float("nan"), dtype=dtype, device=device)
    wide[:, 2 : 2 + size[1]] = values
    return wide[:, 2 : 2 + size[1]]


def adapter_of(case: Case, dtype: torch.dtype, device: str | None = None) -> list[Tensor]:
    """A, A_shared, Bt, Bt_shared, d."""
    Rp, Rs, K, N = case.Rp, case.Rs, case.K, case.N

    def scaled(rows: int, cols: int, scale: float) -> Tensor:
        return (randn(rows, cols, dtype=torch.float64, device=device) * scale).to(dtype)

    d = torch.full((case.R + 8,), float("nan"), dtype=dtype, device=device)[: case.R]
    d[:] = randn(case.R, dtype=dtype, device=device)  # nothing may read past it
    return [
        scaled(Rp, K, K**-0.5),
        scaled(Rs, K, K**-0.5),
        scaled(Rp, N, max(case.R, 1) ** -0.5),
        scaled(Rs, N, max(case.R, 1) ** -0.5),
        d,
    ]


def linear_inputs(
    case: Case,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    bias: bool = True,
    device: str | None = None,
) -> list[Tensor | None]:
    """The tensors of LINEAR_NAMES."""
    x = randn(case.M, case.K, dtype=dtype, strided=case.strided, device=device)
    weight = (randn(case.N, case.K, dtype=torch.float64, device=device) * case.K**-0.5).to(dtype)
    b = randn(case.N, dtype=dtype, device=device) if bias else None
    return [x, weight, b, *adapter_of(case, adapter_dtype, device)]


def sibling_inputs(
    cases: list[Case], dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu"
) -> list:
    """The arguments of rasa_linears: x, then a list for each of LINEAR_NAMES; every second bias."""
    inputs = [
        linear_inputs(case, dtype, adapter_dtype, bias=i % 2 == 0, device=device)
        for i, case in enumerate(cases)
    ]
    x, *columns = zip(*inputs, strict=True)
    return [x[0], *map(list, columns)]


def add_inputs(
    case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str | None = None
) -> list[Tensor]:
    """The tensors of ADD_NAMES."""
    x = randn(case.M, case.K, dtype=dtype, strided=case.strided, device=device)
    base = randn(case.M, case.N, dtype=dtype, strided=case.strided, device=device)
    return [x, base, *adapter_of(case, adapter_dtype, device)]


def new_seed(value: int = 0x1234_5678_9ABC_DEF0, device: str | None = None) -> Tensor:
    return torch.tensor(value, device=device)
