"""Which tensors an adapter holds, and whether a file holds them."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from rasa_ext.base_layer import adapter_dtype, features
from rasa_ext.injection import Config, Group, clean_name
from rasa_ext.module import RaSALinear, SharedPool

# By parameter name: the shape in symbols and in numbers, and the dtype.
Expected = dict[str, tuple[str, list[int], torch.dtype]]


def expected_of_layers(root: nn.Module) -> Expected:
    """Return what the adapters of a model hold, from their configuration."""
    expected: Expected = {}
    for name, module in root.named_modules():
        prefix = clean_name(f"{name}.").removeprefix(".")
        if isinstance(module, SharedPool):
            K, N = module.in_features, module.out_features
            expected |= _of_pool(prefix, K, N, module.Rs, module.A_shared.dtype)
        elif isinstance(module, RaSALinear):
            K, N, pool = module.in_features, module.out_features, module.pool
            Rs = 0 if pool is None else pool.Rs
            gate = _gate_name(module.gates, module.k)
            expected |= _of_layer(prefix, K, N, module.Rp, Rs, gate, module.A.dtype)
    return expected


def expected_of_plan(op: str, groups: list[Group], config: Config) -> Expected:
    """Return what the adapters of a plain model will hold after inject()."""
    expected: Expected = {}
    for group in groups:
        K, N = features(group.modules[0]) or (0, 0)
        Rs, gate = config.Rs_of(group), _gate_name(config.gates, config.k)
        for names, module in zip(group.names, group.modules, strict=True):
            dtype = adapter_dtype(op, module, config.dtype)
            name = clean_name(names[0])
            expected |= _of_layer(f"{name}.", K, N, config.Rp_of(name), Rs, gate, dtype)
        if config.k > 0:
            dtype = adapter_dtype(op, group.modules[0], config.dtype)
            expected |= _of_pool(f"rasa_pools.{group.name}.", K, N, Rs, dtype)
    return expected


def _of_pool(prefix: str, K: int, N: int, Rs: int, dtype: torch.dtype) -> Expected:
    return {
        f"{prefix}A_shared": ("(Rs, K)", [Rs, K], dtype),
        f"{prefix}Bt_shared": ("(Rs, N)", [Rs, N], dtype),
    }


def _gate_name(gates: bool, k: int) -> str | None:
    """Return which of c and d is trained; without gates, k = 0 has a constant d."""
    return "c" if gates else "d" if k > 0 else None


def _of_layer(
    prefix: str, K: int, N: int, Rp: int, Rs: int, gate: str | None, dtype: torch.dtype
) -> Expected:
    expected: Expected = {
        f"{prefix}A": ("(Rp, K)", [Rp, K], dtype),
        f"{prefix}Bt": ("(Rp, N)", [Rp, N], dtype),
    }
    if gate is not None:
        expected[f"{prefix}{gate}"] = ("(Rs + Rp)", [Rs + Rp], dtype)
    return expected


def check_tensors(
    op: str,
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    expected: Expected,
    *,
    any_dtype: bool = False,
) -> None:
    """Raise ValueError for the first tensor that does not fit, saying how many more do not."""
    problems = []
    for key in sorted(expected.keys() & tensors.keys()):
        symbols, shape, dtype = expected[key]
        got = list(tensors[key].shape)
        if got != shape:
            problems.append(f"{key} must be {symbols} = {shape}, got {got}")
        elif tensors[key].dtype != dtype and not any_dtype:
            problems.append(f"{key} must be {dtype}, got {tensors[key].dtype}")
        elif not tensors[key].is_floating_point():
            problems.append(f"{key} must be floating-point, got {tensors[key].dtype}")
    for key in sorted(expected.keys() - tensors.keys()):
        problems.append(
            f"{key} must be {expected[key][0]} = {expected[key][1]}, got no such tensor"
        )
    for key in sorted(tensors.keys() - expected.keys()):
        problems.append(f"{key} is unknown to the model, got shape {list(tensors[key].shape)}")
    if problems:
        more = f"; {len(problems) - 1} more do not fit" if len(problems) > 1 else ""
        raise ValueError(f"{op}: {path} does not fit the model: {problems[0]}{more}")
    for key, tensor in tensors.items():
        check_finite(op, key, tensor)


def check_finite(op: str, key: str, tensor: Tensor) -> None:
    """Raise ValueError if the tensor holds NaN or inf."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad > 0:
        raise ValueError(
            f"{op}: {key} must be finite, got {bad} of {tensor.numel()} values NaN or inf"
        )
