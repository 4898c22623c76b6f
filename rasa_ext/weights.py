"""Adapters on disk, and merged into the base weights."""

from __future__ import annotations

import json
import os
import secrets
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
    inject,
    plan,
    summarize,
    unwrapped,
)
from rasa_ext.merging import MergeReport, merge_layers
from rasa_ext.module import RaSALinear, SharedPool

FORMAT_VERSION = "1"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by their names in state_dict(), each pool once.

    Detached views of the parameters: A, Bt and (k > 0) d of each layer, A_shared and Bt_shared of
    each pool. Raises ValueError if the model has no adapters, if a layer's pool belongs to no
    module of the model, or if a tensor has not its full shape.
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
    in r, k, alpha or dropout, OSError if it cannot be written.
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


def merge(
    model: nn.Module,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> MergeReport:
    """Add every layer's update to its base weight, all of them or none, in one grouped launch.

    Semantics, for each layer::

        W.copy_((W.float() + layer.delta_weight()).to(W.dtype))

    Returns, for each layer, the relative error of the update that its stored dtype really holds,
    ``(W_merged - W - delta).norm() / delta.norm()``, and warns once where that is above 0.5: a
    16-bit weight does not move by less than half the distance to its neighbour, and small updates
    are lost (of a typical one, 70 % of the weights do not move in bfloat16).

    rounding="stochastic" rounds 16-bit weights up or down at random instead, with the sum as the
    expected value: the update arrives on average, at the price of more noise in each weight. It
    repeats under a `generator` (of the weights' device) in the same state.

    Keeps the original weights for unmerge(): the adapted layers take twice their weight's memory,
    and no more than 256 MiB of updates (or the largest layer's) are held beside that.

    Raises ValueError if the model has no adapters, a sum would not be finite, two layers have one
    weight, or rounding and generator do not fit; RuntimeError if a layer is merged already;
    TypeError if a base has no weight to add to. The model is then as it was, to the bit.
    """
    layers = _layers("merge", model)
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"merge: {name} is merged already. Call unmerge(model) first")
    return merge_layers("merge", layers, rounding, generator)


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
            K, N, Rs = module.in_features, module.out_features, module.k * module.num_layers
            expected |= _expected_of_pool(prefix, K, N, Rs, module.A_shared.dtype)
        elif isinstance(module, RaSALinear):
            K, N, pool = module.in_features, module.out_features, module.pool
            Rs = 0 if pool is None else pool.k * pool.num_layers
            expected |= _expected_of_layer(prefix, K, N, module.r - module.k, Rs, module.A.dtype)
    return expected


def _expected_of_plan(groups: list[Group], config: Config) -> Expected:
    """Return what the adapters of a plain model will hold after inject()."""
    expected: Expected = {}
    for group in groups:
        K, N = features(group.modules[0]) or (0, 0)
        Rs = config.k * len(group.modules)
        for names, module in zip(group.names, group.modules, strict=True):
            dtype = adapter_dtype("load_adapter", module, config.dtype)
            prefix = f"{clean_name(names[0])}."
            expected |= _expected_of_layer(prefix, K, N, config.r - config.k, Rs, dtype)
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
    prefix: str, K: int, N: int, Rp: int, Rs: int, dtype: torch.dtype
) -> Expected:
    expected: Expected = {
        f"{prefix}A": ("(Rp, K)", [Rp, K], dtype),
        f"{prefix}Bt": ("(Rp, N)", [Rp, N], dtype),
    }
    if Rs > 0:
        expected[f"{prefix}d"] = ("(Rs + Rp)", [Rs + Rp], dtype)
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


def _config_json(root: nn.Module) -> str:
    """Return the apply() arguments that put the model's adapters into a plain model."""
    layers = adapted_layers(root)
    configs = {(layer.r, layer.k, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(configs) > 1:
        raise ValueError(
            "save_adapter: the layers must have one (r, k, alpha, dropout), got "
            f"{', '.join(map(str, sorted(configs)))}. Save adapter_state_dict(model) instead"
        )
    r, k, alpha, dropout = configs.pop()
    dtypes = {layer.A.dtype for layer in layers.values()}
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
    config = Config(r, k, alpha, _target_modules(root, layers), dropout)
    return json.dumps(asdict(config) | {"dtype": dtype})


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
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a torch dtype, got {config['dtype']!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_adapter: {path} has no usable config in its metadata: {error!r}"
        ) from error
    return Config(config["r"], config["k"], alpha, targets, dropout, dtype)
