"""Adapters on disk, and merged into the base weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rasa_ext.base_layer import check_config
from rasa_ext.contents import check_finite, check_tensors, expected_of_layers, expected_of_plan
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
    target_names,
    unwrapped,
)
from rasa_ext.merging import MergeReport, merge_layers
from rasa_ext.module import RaSALinear, SharedPool
from rasa_ext.sharding import assign, whole, writes_files
from rasa_ext.storage import replace_file

FORMAT_VERSION = "1"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by their names in state_dict(), each pool once.

    Detached views of the parameters: A, Bt and (gates) c or else (k > 0) d of each layer, A_shared
    and Bt_shared of each pool. Of a model that FSDP2 has sharded, whole copies: every process must
    call this.

    Raises ValueError if the model has no adapters, if a layer's pool belongs to no module of the
    model, or if a tensor has not its full shape.
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
    for key, (symbols, shape, _) in expected_of_layers(root).items():
        got = list(parameters[key].shape)
        if got != shape:
            raise ValueError(
                f"adapter_state_dict: {key} must be {symbols} = {shape}, got {got}. Gather sharded "
                "parameters first"
            )
    return {key: whole(parameter.detach()) for key, parameter in parameters.items()}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write adapter_state_dict(model) and apply()'s arguments to one safetensors file.

    The file is written under another name in the same folder, flushed to disk and then renamed:
    whatever interrupts it, `path` holds either the previous adapter or the new one, whole. Of a
    model that FSDP2 has sharded, every process must call this, and rank 0 writes.

    Raises ValueError for NaN or inf (load_adapter would refuse the file) and for layers that differ
    in k, alpha, dropout or gates, OSError if it cannot be written.
    """
    root = unwrapped(model)
    tensors = adapter_state_dict(root)
    for key, tensor in tensors.items():
        check_finite("save_adapter", key, tensor)
    # "format" is what other readers of safetensors files look for.
    metadata = {"format": "pt", "rasa_ext": FORMAT_VERSION, "config": _config_json(root)}
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"save_adapter: {path} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save_adapter: the folder of {path} does not exist")
    if not writes_files(root):
        return
    try:
        # Copies: safetensors refuses views of one storage, which flattened parameters are.
        copies = {key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()}
        replace_file(target, save(copies, metadata))
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_adapter: {path} could not be written and is as it was: {error}"
        ) from error


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Summary:
    """Load what save_adapter wrote, into the model's adapters or into a plain model.

    A plain model gets the adapters of the file by apply() first. Everything is checked before the
    first write: format, every name, shape, dtype and value. A refused file leaves the model as it
    was, to the bit. The dropout of adapters that exist already stays. Adapters that FSDP2 has
    sharded are loaded by every process together.

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
        expected = expected_of_layers(root)
        _check_layers(layers, config)
    else:
        groups = plan(root, config)
        expected = expected_of_plan("load_adapter", groups, config)
    check_tensors("load_adapter", path, tensors, expected)
    if not layers:
        inject(root, groups, config)
    with torch.no_grad():
        for key, parameter in _parameters(root).items():
            assign(parameter, tensors[key])
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
    and some 256 MiB of updates (or two of the largest layers') are held beside that.

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
        target_names(root, layers),
        dropout,
        gates=gates,
        rank_pattern={n: x.r for n, x in layers.items() if x.r != r},
        private_ranks={n: x.Rp for n, x in layers.items() if x.Rp != x.r - x.k},
        shared_ranks={n: x.Rs for n, x in pools.items() if x.Rs != x.k * x.num_layers},
    )
    # What is as in apply() by default is left out: versions that do not know it read the file.
    optional = ("gates", "rank_pattern", "private_ranks", "shared_ranks")
    content = {key: v for key, v in asdict(config).items() if v or key not in optional}
    del content["siblings"]  # how outputs are computed, not what they are
    return json.dumps(content | {"dtype": dtype})


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
    r, k = config["r"], config["k"]
    return Config(
        r,
        k,
        alpha,
        targets,
        dropout,
        dtype,
        gates=gates,
        rank_pattern=ranks[0],
        private_ranks=ranks[1],
        shared_ranks=ranks[2],
    )
