"""A self-check of a few seconds: every op on every device present, against float64.

It finds a broken build, and a CPU or GPU on which the kernels go wrong. It does not replace the
tests: the shapes are few, chosen so that every dimension ends inside a tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_ext import _build_config, ops

Function = Callable[..., Sequence[Tensor]]

M, K, N, RP, RS = 83, 90, 70, 7, 12  # tokens, in and out features, private and shared ranks
DROPOUT = 0.25  # a multiple of 2^-15, so that it is the p_eff of the mask
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """One run of an op: its error against float64, the error allowed, the exception it raised."""

    device: torch.device
    op: str
    case: str
    error: float
    allowed: float
    raised: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        """Return what went wrong, or by how much."""
        result = self.raised or f"error {self.error:.1e}, allowed {self.allowed:.1e}"
        return f"{self.device} {self.op} {self.case}: {result}"


def largest_error(out: Tensor, exact: Tensor) -> float:
    """Return the largest error of any element over the largest element. NaN in, NaN out.

    By elements, so that a wrong one cannot hide in a large matrix.
    """
    if out.shape != exact.shape:
        return float("nan")
    difference = out.detach().cpu().double() - exact
    return (difference.abs().max() / exact.abs().max()).item()


def compare(
    op_name: str, case: str, op: Function, formula: Function, inputs: Sequence[Tensor], device: str
) -> Iterator[Check]:
    """Compare an op with its formula, output by output.

    The formula computes in the dtype of its first argument. The op may be twice as wrong as the
    formula is in the op's own dtype, plus one rounding of the output, plus the rounding of the
    float64 reference.
    """
    exact = formula(*(t.double() for t in inputs))
    plain = formula(*inputs)
    where = torch.device(device)
    try:
        outputs = op(*(t.to(where) for t in inputs))
        for i, (out, its_plain, its_exact) in enumerate(zip(outputs, plain, exact, strict=True)):
            allowed = 2 * largest_error(its_plain, its_exact) + torch.finfo(inputs[0].dtype).eps
            allowed += 64 * torch.finfo(torch.float64).eps
            error = largest_error(out, its_exact)
            yield Check(where, op_name, f"{case} output {i}", error, allowed)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        yield Check(where, op_name, case, float("nan"), 0.0, raised)


def with_gradients(function: Callable[..., Tensor]) -> Function:
    """Return the function of (dy, *inputs) that returns y and the gradient of every input."""

    def forward_and_backward(dy: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy))

    return forward_and_backward


def rasa_formula(x: Tensor, base: Tensor, adapter: Sequence[Tensor], kept: Tensor | None) -> Tensor:
    """Return the base output with its update as the paper writes it, in x's dtype."""
    A, A_shared, Bt, Bt_shared, d = (t.to(x.dtype) for t in adapter)
    if kept is not None:
        x = x * kept / (1 - DROPOUT)
    s = x @ torch.cat([A_shared, A]).T
    return base + (s * d) @ torch.cat([Bt_shared, Bt])


def check_rasa(dtype: torch.dtype, adapter: torch.dtype, p: float, device: str) -> Iterator[Check]:
    """Check rasa_linear, rasa_linears and rasa_add, forward and backward."""
    draw = torch.Generator().manual_seed(0)

    def normal(dtype: torch.dtype, *shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(*shape, generator=draw) / math.sqrt(fan_in)).to(dtype)

    x, dy, base = normal(dtype, M, K), normal(dtype, M, N), normal(dtype, M, N)
    weight, bias = normal(dtype, N, K, fan_in=K), normal(dtype, N)
    weights = (
        normal(adapter, RP, K, fan_in=K),
        normal(adapter, RS, K, fan_in=K),
        normal(adapter, RP, N, fan_in=RP),
        normal(adapter, RS, N, fan_in=RS),
        normal(adapter, RP + RS),
    )
    seed = torch.tensor(2024, device=device) if p > 0 else None
    kept = None if seed is None else ops.dropout_mask(seed.cpu(), M, K, p)

    def linear(*inputs: Tensor) -> Tensor:
        x, A, A_shared, Bt, Bt_shared, d = inputs
        base = weight.to(x.device), bias.to(x.device)
        return ops.rasa_linear(x, *base, A, A_shared, Bt, Bt_shared, d, p, seed)

    def linear_formula(x: Tensor, *adapter: Tensor) -> Tensor:
        base = torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return rasa_formula(x, base, adapter, kept)

    def linears(*inputs: Tensor) -> Tensor:
        """Compute the layer and its twin without bias, side by side."""
        x, *adapter = inputs
        base = [weight.to(x.device)] * 2, [bias.to(x.device), None]
        A, A_shared, Bt, Bt_shared, d = ([t, t] for t in adapter)
        return torch.cat(ops.rasa_linears(x, *base, A, A_shared, Bt, Bt_shared, d, p, seed), dim=1)

    def linears_formula(x: Tensor, *adapter: Tensor) -> Tensor:
        base = torch.nn.functional.linear(x, weight.to(x.dtype))
        twin = rasa_formula(x, base, adapter, kept)
        return torch.cat([linear_formula(x, *adapter), twin], dim=1)

    def add(*inputs: Tensor) -> Tensor:
        x, base, A, A_shared, Bt, Bt_shared, d = inputs
        return ops.rasa_add(x, base, A, A_shared, Bt, Bt_shared, d, p, seed)

    def add_formula(x: Tensor, base: Tensor, *adapter: Tensor) -> Tensor:
        return rasa_formula(x, base, adapter, kept)

    case = f"{dtype}, adapters {adapter}, dropout {p}".replace("torch.", "")
    for name, op, formula, inputs in (
        ("rasa_linear", linear, linear_formula, (dy, x, *weights)),
        ("rasa_linears", linears, linears_formula, (torch.cat([dy, dy], dim=1), x, *weights)),
        ("rasa_add", add, add_formula, (dy, x, base, *weights)),
    ):
        both = with_gradients(op), with_gradients(formula)
        yield from compare(name, case, *both, inputs, device)


def check_grouped_gemm(dtype: torch.dtype, layout: str, device: str) -> Iterator[Check]:
    """Check grouped_gemm: a problem of two segments with C_in and both scales, and a bare one."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    def op_A(t: Tensor) -> Tensor:
        return t.T if layout == "TN" else t

    def op_B(t: Tensor) -> Tensor:
        return t.T if layout == "NT" else t

    def formula(*inputs: Tensor) -> Sequence[Tensor]:
        A, B, (C_in, scale_m, scale_k) = inputs[:3], inputs[3:6], inputs[6:]
        products = [op_A(a) @ op_B(b) for a, b in zip(A[::2], B[::2], strict=True)]
        scaled = op_A(A[1]) @ (scale_k[:, None] * op_B(B[1]))
        return C_in + scale_m[:, None] * products[0] + scaled, products[1]

    def op(*inputs: Tensor) -> Sequence[Tensor]:
        A, B, (C_in, scale_m, scale_k) = inputs[:3], inputs[3:6], inputs[6:]
        return ops.grouped_gemm(
            layout,
            list(A),
            list(B),
            segments=[2, 1],
            C_in=[C_in, None],
            scale_m=[scale_m, None, None],
            scale_k=[None, scale_k, None],
        )

    sizes = ((M, N, K), (M, N, RP), (RS, K, M))
    A = [normal(k, m) if layout == "TN" else normal(m, k) for m, _, k in sizes]
    B = [normal(n, k) if layout == "NT" else normal(k, n) for _, n, k in sizes]
    inputs = (*A, *B, normal(M, N), normal(M), normal(RP))
    case = f"{layout} {dtype}".replace("torch.", "")
    yield from compare("grouped_gemm", case, op, formula, inputs, device)


def check_dropout_mask(device: str) -> Iterator[Check]:
    """Check that the mask keeps its share, and that every device draws the mask the CPU draws."""
    where, rows, columns = torch.device(device), 500, 700
    deviation = (DROPOUT * (1 - DROPOUT) / (rows * columns)) ** 0.5
    seed = torch.tensor(2024)
    try:
        mask = ops.dropout_mask(seed.to(where), rows, columns, DROPOUT).cpu()
        off_rate = abs(mask.double().mean().item() - (1 - DROPOUT))
        yield Check(where, "dropout_mask", "rate of kept elements", off_rate, 5 * deviation)
        wrong = (mask != ops.dropout_mask(seed, rows, columns, DROPOUT)).double().mean().item()
        yield Check(where, "dropout_mask", "elements unlike the CPU's", wrong, 0.0)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        yield Check(where, "dropout_mask", "", float("nan"), 0.0, raised)


def devices() -> list[str]:
    """Return the devices that this build computes on and this machine has."""
    has_cuda = "cuda" in _build_config.backends
    return ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count() if has_cuda else 0)]


def run_checks() -> Iterator[Check]:
    """Run every op on every device present, forward and backward, in every dtype."""
    for device in devices():
        yield from check_dropout_mask(device)
        for dtype, layout in itertools.product(DTYPES, ("NN", "NT", "TN")):
            yield from check_grouped_gemm(dtype, layout, device)
        for dtype, p in itertools.product(DTYPES, (0.0, DROPOUT)):
            for adapter in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
                yield from check_rasa(dtype, adapter, p, device)


def self_check() -> bool:
    """Print one line for each op on each device, the checks that failed, and the verdict."""
    if "cuda" in _build_config.backends and devices() == ["cpu"]:
        print("no CUDA device is present: the CUDA backend is built, and stays unchecked")
    checks = list(run_checks())
    for (device, op), group in itertools.groupby(
        sorted(checks, key=lambda c: (str(c.device), c.op)), key=lambda c: (c.device, c.op)
    ):
        results = [check.passed for check in group]
        print(f"{device} {op}: {sum(results)} of {len(results)} comparisons passed")
    failed = [check for check in checks if not check.passed]
    for check in failed:
        print(f"FAILED: {check}")
    verdict = f"{len(failed)} of {len(checks)} comparisons FAILED" if failed else "passed"
    print(f"rasa_ext self-check: {verdict}")
    return not failed
