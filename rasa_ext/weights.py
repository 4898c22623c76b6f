"""Adapters on disk, and merged into the base weights."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rasa_ext.base_layer import adapter_dtype, check_config, features
from rasa_ext.injection import (
    Config,
    Group,
    Summary,
    adapted_layers,
    clean_name,
    group_names,
    inject,
    plan,
    summarize,
    unwrapped,
)
from rasa_ext.module import RaSALinear, SharedPool

FORMAT_VERSION = "1"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by their names in state_dict(), each pool once.

    Detached views of the parameters: A, Bt and (gates) c or else (k > 0) d of each layer, A_shared
    and Bt_shared of each pool. Raises ValueError if the model has no adapters, if a layer's pool
    belongs to no module of the model, or if a tensor has not its full shape.
    """
    root = unwrapped(model)
    layers = _layers("adapter_state_dict", root)
    parameters = _parameters(root)
    pools = set(root.modules())
    for name, layer in layers.items():
        if layer.pool is not None and layer.pool not in pools:
            raise ValueError(
                f"adapter_state_dict: the pool of {name} belongs to no module of the model, so "
                "state_dict() and optimizers miss it. Register it on the root once"
            )
    for key, (symbols, shape, _) in _expected_of_layers(root).items():
        got = list(parameters[key].shape)
        if got != shape:
            raise ValueError(
                f"adapter_state_dict: {key} must be {symbols} = {shape}, got {got}. Gather sharded "
                "parameters first"
            )
    return {key: parameter.detach() for key, parameter in parameters.items()}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write adapter_state_dict(model) and apply()'s arguments to one safetensors file.

    The file is written under another name in the same folder, flushed to disk and then renamed:
    whatever interrupts it, `path` holds either the previous adapter or the new one, whole.

    Raises ValueError for NaN or inf (load_adapter would refuse the file) and for layers that differ
    in k, alpha, dropout or gates, OSError if it cannot be written.
    """
    root = unwrapped(model)
    tensors = adapter_state_dict(root)
    for key, tensor in tensors.items():
        _check_finite("save_adapter", key, tensor)
    # "format" is what other readers of safetensors files look for.
    metadata = {"format": "pt", "rasa_ext": FORMAT_VERSION, "config": _config_json(root)}
    # A link's target is replaced, not the link.
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"save_adapter: {path} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save_adapter: the folder of {path} does not exist")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Copies: safetensors refuses views of one storage, which flattened parameters are.
        copies = {key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()}
        with open(temporary, "xb") as file:
            file.write(save(copies, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_adapter: {path} could not be written and is as it was: {error}"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    _flush_names(target.parent)


def _flush_names(folder: Path) -> None:
    """Return when the folder's list of names is on disk, where the file system can do that."""
    # Where it cannot (some network mounts), the rename has happened all the same: no failed save.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Summary:
    """Load what save_adapter wrote, into the model's adapters or into a plain model.

    A plain model gets the adapters of the file by apply() first. Everything is checked before the
    first write: format, every name, shape, dtype and value. A refused file leaves the model as it
    was, to the bit. The dropout of adapters that exist already stays.

    Raises FileNotFoundError or IsADirectoryError if there is no file, RuntimeError if a layer is
    merged, and ValueError, naming the tensor with its expected and actual shape, if the file is
    damaged, is none of ours, or does not fit the model. A plain model may also be refused by
    apply(), whose errors these are then.
    """
    root = unwrapped(model)
    config, tensors = _read(path)
    layers = adapted_layers(root)
    groups: list[Group] = []
    if layers:
        expected = _expected_of_layers(root)
        _check_layers(layers, config)
    else:
        groups = plan(root, config)
        expected = _expected_of_plan(groups, config)
    _check_tensors(path, tensors, expected)
    if not layers:
        inject(root, groups, config)
    with torch.no_grad():
        for key, parameter in _parameters(root).items():
            parameter.copy_(tensors[key])
    for layer in layers.values():
        layer.alpha = config.alpha
    return summarize(root)


def merge(model: nn.Module) -> None:
    """Add every layer's update to its base weight (RaSALinear.merge), all of them or none.

    Keeps the original weights for unmerge(): the adapted layers take twice their weight's memory.

    Raises ValueError if the model has no adapters or a sum would not be finite, RuntimeError if a
    layer is merged already, TypeError if a base has no weight to add to.
    """
    layers = _layers("merge", model)
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"merge: {name} is merged already. Call unmerge(model) first")
    done: list[RaSALinear] = []
    try:
        for name, layer in layers.items():
            try:
                layer.merge()
            except (TypeError, ValueError) as error:
                raise type(error)(f"merge: {name}: {error}") from error
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Restore every merged layer's base weight, bit by bit.

    Raises ValueError if the model has no adapters, RuntimeError if no layer is merged.
    """
    merged = [layer for layer in _layers("unmerge", model).values() if layer.merged]
    if not merged:
        raise RuntimeError("unmerge: no layer is merged")
    for layer in merged:
        layer.unmerge()


def _layers(op: str, model: nn.Module) -> dict[str, RaSALinear]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{op}: the model has no RaSA adapters. Call rasa_ext.apply(model) first")
    return layers


def _parameters(root: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's parameters by name."""
    return {
        clean_name(f"{prefix}.{leaf}").removeprefix("."): parameter
        for prefix, module in root.named_modules()
        if isinstance(module, (RaSALinear, SharedPool))
        for leaf, parameter in module.named_parameters(recurse=False)
    }


# By parameter name: the shape in symbols and in numbers, and the dtype.
Expected = dict[str, tuple[str, list[int], torch.dtype]]


def _expected_of_layers(root: nn.Module) -> Expected:
    """Return what the adapters of a model hold, from their configuration."""
    expected: Expected = {}
    for name, module in root.named_modules():
        prefix = clean_name(f"{name}.").removeprefix(".")
        if isinstance(module, SharedPool):
            K, N = module.in_features, module.out_features
            expected |= _expected_of_pool(prefix, K, N, module.Rs, module.A_shared.dtype)
        elif isinstance(module, RaSALinear):
            K, N, pool = module.in_features, module.out_features, module.pool
            Rs = 0 if pool is None else pool.Rs
            gate = "c" if module.gates else "d" if module.k > 0 else None
            expected |= _expected_of_layer(prefix, K, N, module.Rp, Rs, gate, module.A.dtype)
    return expected


def _expected_of_plan(groups: list[Group], config: Config) -> Expected:
    """Return what the adapters of a plain model will hold after inject()."""
    expected: Expected = {}
    for group in groups:
        K, N = features(group.modules[0]) or (0, 0)
        Rs = config.Rs_of(group)
        gate = "c" if config.gates else "d" if config.k > 0 else None
        for names, module in zip(group.names, group.modules, strict=True):
            dtype = adapter_dtype("load_adapter", module, config.dtype)
            name = clean_name(names[0])
            Rp = config.Rp_of(name)
            expected |= _expected_of_layer(f"{name}.", K, N, Rp, Rs, gate, dtype)
        if config.k > 0:
            dtype = adapter_dtype("load_adapter", group.modules[0], config.dtype)
            expected |= _expected_of_pool(f"rasa_pools.{group.name}.", K, N, Rs, dtype)
    return expected


def _expected_of_pool(prefix: str, K: int, N: int, Rs: int, dtype: torch.dtype) -> Expected:
    return {
        f"{prefix}A_shared": ("(Rs, K)", [Rs, K], dtype),
        f"{prefix}Bt_shared": ("(Rs, N)", [Rs, N], dtype),
    }


def _expected_of_layer(
    prefix: str, K: int, N: int, Rp: int, Rs: int, gate: str | None, dtype: torch.dtype
) -> Expected:
    expected: Expected = {
        f"{prefix}A": ("(Rp, K)", [Rp, K], dtype),
        f"{prefix}Bt": ("(Rp, N)", [Rp, N], dtype),
    }
    if gate is not None:
        expected[f"{prefix}{gate}"] = ("(Rs + Rp)", [Rs + Rp], dtype)
    return expected


def _check_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], expected: Expected
) -> None:
    """Raise ValueError for the first tensor that does not fit, saying how many more do not."""
    problems = []
    for key in sorted(expected.keys() & tensors.keys()):
        symbols, shape, dtype = expected[key]
        got = list(tensors[key].shape)
        if got != shape:
            problems.append(f"{key} must be {symbols} = {shape}, got {got}")
        elif tensors[key].dtype != dtype:
            problems.append(f"{key} must be {dtype}, got {tensors[key].dtype}")
    for key in sorted(expected.keys() - tensors.keys()):
        problems.append(
            f"{key} must be {expected[key][0]} = {expected[key][1]}, got no such tensor"
        )
    for key in sorted(tensors.keys() - expected.keys()):
        problems.append(f"{key} is unknown to the model, got shape {list(tensors[key].shape)}")
    if problems:
        more = f"; {len(problems) - 1} more do not fit" if len(problems) > 1 else ""
        raise ValueError(f"load_adapter: {path} does not fit the model: {problems[0]}{more}")
    for key, tensor in tensors.items():
        _check_finite("load_adapter", key, tensor)


def _check_finite(op: str, key: str, tensor: Tensor) -> None:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad > 0:
        raise ValueError(
            f"{op}: {key} must be finite, got {bad} of {tensor.numel()} values NaN or inf"
        )


def _check_layers(layers: dict[str, RaSALinear], config: Config) -> None:
    """Raise for what the shapes cannot tell about adapters that exist already."""
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"load_adapter: {name} is merged. Call unmerge(model) first")
        if layer.k == 0 and config.k == 0 and layer.alpha != config.alpha:
            raise ValueError(
                f"load_adapter: alpha must be {layer.alpha:g} as in {name}, got {config.alpha:g}; "
                "with k = 0 it is no trained weight"
            )
        # Neither shape tells what a gate is multiplied with.
        mine = (layer.gates, layer.r, layer.alpha)
        files = (config.gates, config.r_of(name), config.alpha)
        if (layer.gates or config.gates) and mine != files:
            raise ValueError(
                f"load_adapter: (gates, r, alpha) must be {mine} as in {name}, got {files}"
            )


def _config_json(root: nn.Module) -> str:
    """Return the apply() arguments that put the model's adapters into a plain model."""
    layers = adapted_layers(root)
    configs = {(layer.k, layer.alpha, layer.dropout, layer.gates) for layer in layers.values()}
    if len(configs) > 1:
        raise ValueError(
            "save_adapter: the layers must have one (k, alpha, dropout, gates), got "
            f"{', '.join(map(str, sorted(configs)))}. Save adapter_state_dict(model) instead"
        )
    k, alpha, dropout, gates = configs.pop()
    dtypes = {layer.A.dtype for layer in layers.values()}
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    groups = group_names(layers)
    pools = {groups[n]: x.pool for n, x in layers.items() if x.pool is not None}
    config = Config(
        r,
        k,
        alpha,
        _target_modules(root, layers),
        dropout,
        gates=gates,
        rank_pattern={n: x.r for n, x in layers.items() if x.r != r},
        private_ranks={n: x.Rp for n, x in layers.items() if x.Rp != x.r - x.k},
        shared_ranks={n: x.Rs for n, x in pools.items() if x.Rs != x.k * x.num_layers},
    )
    # What is as in apply() by default is left out: versions that do not know it read the file.
    optional = ("gates", "rank_pattern", "private_ranks", "shared_ranks")
    content = {key: v for key, v in asdict(config).items() if v or key not in optional}
    return json.dumps(content | {"dtype": dtype})


def _target_modules(root: nn.Module, layers: dict[str, RaSALinear]) -> tuple[str, ...]:
    """Return the last parts of the layers' names, or, where others have them too, whole names."""
    leaves = {name.rpartition(".")[2] for name in layers}
    named = {clean_name(name) for name, _ in root.named_modules()}
    if {name for name in named if name.rpartition(".")[2] in leaves} == layers.keys():
        return tuple(sorted(leaves))
    return tuple(layers)


def _read(path: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the tensors of a file, on the CPU."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"load_adapter: {path} is a folder; name the file in it")
    if not Path(path).exists():
        raise FileNotFoundError(f"load_adapter: {path} does not exist")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_adapter: {path} is damaged, or is not a safetensors file: {error}"
        ) from error
    version = metadata.get("rasa_ext")
    if version != FORMAT_VERSION:
        was = "was not written by save_adapter" if version is None else f"has format {version}"
        raise ValueError(f"load_adapter: {path} {was}; this version reads format {FORMAT_VERSION}")
    return _parse_config(path, metadata.get("config", "")), tensors


def _parse_config(path: str | os.PathLike[str], text: str) -> Config:
    """Return the configuration in a file's metadata."""
    try:
        config = json.loads(text)
        dtype = None if config["dtype"] is None else getattr(torch, config["dtype"])
        targets = tuple(map(str, config["target_modules"]))
        alpha, dropout = float(config["alpha"]), float(config["dropout"])
        check_config("config", config["r"], config["k"], alpha, dropout)
        gates = bool(config.get("gates", False))
        ranks = [
            {str(name): int(rank) for name, rank in config.get(key, {}).items()}
            for key in ("rank_pattern", "private_ranks", "shared_ranks")
        ]
        if any(rank < 0 for pattern in ranks for rank in pattern.values()):
            raise ValueError(f"ranks must be at least 0, got {ranks}")
        if not gates and (ranks[1] or ranks[2]):
            raise ValueError("private_ranks and shared_ranks must come with gates")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a torch dtype, got {config['dtype']!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_adapter: {path} has no usable config in its metadata: {error!r}"
        ) from error
    return Config(config["r"], config["k"], alpha, targets, dropout, dtype, gates, *ranks)
