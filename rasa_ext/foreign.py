"""Adapters that other code wrote, as RaSA: PEFT's LoRA and the checkpoints of RaSA's authors."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rasa_ext.base_layer import check_config, features
from rasa_ext.contents import Expected, check_tensors
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

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of LoraConfig that leave the function of the saved tensors as it is. Any other field that
# is set names a variant of LoRA, known or not yet.
_PLAIN_FIELDS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "megatron_core"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}
# Other ways to initialise (PiSSA, OLoRA, LoftQ, ...) subtract something from the base weights.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def import_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    k: int = 1,
    *,
    dtype: torch.dtype | None = None,
) -> Summary:
    """Put a LoRA that PEFT saved into a plain model as private ranks, beside a pool to train.

    Semantics, for each layer, with PEFT's scaling (alpha / r, or alpha / sqrt(r) for rsLoRA)::

        A, Bt = lora_A, lora_B.T                     # private ranks: Rp = LoRA's r, so r = Rp + k
        d[:Rs], d[Rs:] = 0.5 * lora_alpha / Rs, scaling
        # the pool: A_shared Kaiming-uniform, Bt_shared zero, as apply() makes it

    so the model computes what it computes under PEFT, and training goes on with k * L more ranks
    for each layer. k = 0 imports it as LoRA. Layers of lower rank (rank_pattern) get ranks whose Bt
    is zero. dtype: as in apply(); a narrower one than the file's rounds.

    `path` is a folder with adapter_config.json and adapter_model.safetensors. Returns apply()'s
    summary. Raises FileNotFoundError if a file is missing, ValueError if a file is damaged, is no
    plain LoRA (DoRA, PiSSA, trained biases, ...) or holds a tensor that does not fit, by name and
    shape, and what apply() raises. The model is then as it was, to the bit.
    """
    root = unwrapped(model)
    fields, tensors = _read("import_lora", path, "LORA")
    _refuse_variants(path, fields)
    names = _layer_names(root, path, tensors, "lora_A")
    ranks, scalings = _ranks_and_scalings(path, fields, names)
    Rp, first = max(ranks.values()), scalings[names[0]]
    # With k = 0, d = alpha / r is a constant; a layer whose scaling differs has it in Bt.
    alpha = first * Rp if k == 0 else float(fields["lora_alpha"])
    config = Config(Rp + k, k, alpha, tuple(names), float(fields.get("lora_dropout", 0)), dtype)
    groups = plan(root, config)
    expected: Expected = {}
    for group in groups:
        K, N = features(group.modules[0]) or (0, 0)
        for name in _names(group):
            r = ranks.get(name, Rp)
            expected[_key(name, "lora_A")] = ("(r, K)", [r, K], torch.float32)
            expected[_key(name, "lora_B")] = ("(N, r)", [N, r], torch.float32)
    check_tensors("import_lora", path, tensors, expected, any_dtype=True)
    inject(root, groups, config)
    with torch.no_grad():
        for name, layer in adapted_layers(root).items():
            A, Bt = tensors[_key(name, "lora_A")], tensors[_key(name, "lora_B")].T
            layer.A[: len(A)] = A
            layer.Bt[: len(Bt)] = Bt if k > 0 else Bt * (scalings[name] / first)
            if k > 0:
                layer.d[-Rp:] = scalings[name]
    return summarize(root)


def import_rasa(
    model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> Summary:
    """Put an adapter that the code of RaSA's authors saved into a plain model.

    Semantics, for each layer and its group's pool::

        A, Bt = rasa_A, rasa_B.T
        A_shared, Bt_shared = rasa_shared_A, rasa_shared_B.T
        d = torch.cat([rasa_mixing[Rp:], rasa_mixing[:Rp]])   # they keep the private ranks first

    dtype: as in apply(); a narrower one than the file's rounds. `path` is a folder with
    adapter_config.json and adapter_model.safetensors. Returns apply()'s summary, and raises what
    import_lora raises. Source: github.com/zwhe99/RaSA.
    """
    root = unwrapped(model)
    fields, tensors = _read("import_rasa", path, "RASA")
    try:
        r, k, alpha = fields["r"], fields["rasa_k"], float(fields["rasa_alpha"])
        dropout = float(fields["rasa_dropout"])
        check_config("config", r, k, alpha, dropout)
        if k == 0:
            raise ValueError("rasa_k must be at least 1, got 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"import_rasa: {path} has no usable {_CONFIG}: {error!r}") from error
    names = _layer_names(root, path, tensors, "rasa_mixing")
    config = Config(r, k, alpha, tuple(names), dropout, dtype)
    groups, Rp = plan(root, config), r - k
    expected: Expected = {}
    for group in groups:
        (K, N), Rs = features(group.modules[0]) or (0, 0), k * len(group.modules)
        A_shared, B_shared = _authors_pool(group)
        expected[A_shared] = ("(Rs, K)", [Rs, K], torch.float32)
        expected[B_shared] = ("(N, Rs)", [N, Rs], torch.float32)
        for name in _names(group):
            expected[_key(name, "rasa_A")] = ("(Rp, K)", [Rp, K], torch.float32)
            expected[_key(name, "rasa_B")] = ("(N, Rp)", [N, Rp], torch.float32)
            expected[_key(name, "rasa_mixing")] = ("(Rp + Rs)", [Rp + Rs], torch.float32)
    check_tensors("import_rasa", path, tensors, expected, any_dtype=True)
    inject(root, groups, config)
    layers = adapted_layers(root)
    with torch.no_grad():
        for group in groups:
            A_shared, B_shared = _authors_pool(group)
            pool = layers[_names(group)[0]].pool
            assert pool is not None  # k >= 1
            pool.A_shared.copy_(tensors[A_shared])
            pool.Bt_shared.copy_(tensors[B_shared].T)
        for name, layer in layers.items():
            layer.A.copy_(tensors[_key(name, "rasa_A")])
            layer.Bt.copy_(tensors[_key(name, "rasa_B")].T)
            mixing = tensors[_key(name, "rasa_mixing")]
            layer.d.copy_(torch.cat([mixing[Rp:], mixing[:Rp]]))
    return summarize(root)


def _names(group: Group) -> list[str]:
    return [clean_name(names[0]) for names in group.names]


def _key(name: str, leaf: str) -> str:
    """Return the name in a PEFT file of a layer's tensor."""
    return f"{_PREFIX}{name}.{leaf}.weight"


def _authors_pool(group: Group) -> tuple[str, str]:
    """Return the names of a pool's tensors: the authors name it after what follows the index."""
    found = re.search(r"layers\.\d+\.(.+)", _names(group)[0])
    suffix = group.name.rpartition("__")[0] if found is None else found[1].replace(".", "__")
    return f"base_model.rasa_shared_A.{suffix}.weight", f"base_model.rasa_shared_B.{suffix}.weight"


def _layer_names(
    root: nn.Module, path: str | os.PathLike[str], tensors: dict[str, Tensor], leaf: str
) -> list[str]:
    """Return the model's linear layers that the file has tensors for."""
    linears = {clean_name(n) for n, m in root.named_modules() if features(m) is not None}
    names = [n for n in sorted(linears) if _key(n, leaf) in tensors]
    if not names:
        op = "import_lora" if leaf == "lora_A" else "import_rasa"
        first = f"; its first tensor is {min(tensors)}" if tensors else "; it holds no tensor"
        raise ValueError(f"{op}: {path} does not fit the model: no layer of it is there{first}")
    return names


def _ranks_and_scalings(
    path: str | os.PathLike[str], fields: dict[str, Any], names: list[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return each layer's rank and PEFT's scaling of it."""
    ranks, scalings = {}, {}
    try:
        for name in names:
            r = _of_layer(fields.get("rank_pattern"), name, fields["r"])
            alpha = _of_layer(fields.get("alpha_pattern"), name, fields["lora_alpha"])
            check_config("config", r, 0, alpha, fields.get("lora_dropout", 0.0))
            ranks[name] = r
            scalings[name] = alpha / (math.sqrt(r) if fields.get("use_rslora") else r)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"import_lora: {path} has no usable {_CONFIG}: {error!r}") from error
    return ranks, scalings


def _of_layer(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that is the layer's name or the end of it."""
    hits = (v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name))
    return next(hits, default)


def _refuse_variants(path: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Raise ValueError if the tensors mean more than lora_B @ lora_A * scaling."""
    odd = {name: value for name, value in fields.items() if name not in _PLAIN_FIELDS and value}
    if fields.get("bias", "none") != "none":
        odd["bias"] = fields["bias"]
    if fields.get("init_lora_weights", True) not in _PLAIN_INITS:
        odd["init_lora_weights"] = fields["init_lora_weights"]
    for name, value in odd.items():
        raise ValueError(
            f"import_lora: {path} must be a plain LoRA, got {name} = {value!r} in {_CONFIG}. "
            "Merge it into the base model with PEFT, or convert it to LoRA there"
        )


def _read(
    op: str, path: str | os.PathLike[str], peft_type: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of an adapter folder."""
    for file in (_CONFIG, _TENSORS):
        if not (Path(path) / file).is_file():
            raise FileNotFoundError(f"{op}: {Path(path) / file} does not exist")
    try:
        fields = json.loads((Path(path) / _CONFIG).read_text())
        got = fields["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{op}: {path} has no usable {_CONFIG}: {error!r}") from error
    if got != peft_type:
        raise ValueError(f"{op}: {path} must have peft_type {peft_type}, got {got}")
    try:
        return fields, load_file(Path(path) / _TENSORS)
    except SafetensorError as error:
        raise ValueError(
            f"{op}: {Path(path) / _TENSORS} is damaged, or is not a safetensors file: {error}"
        ) from error
