"""RaSAModel: puts RaSA adapters into a model for PEFT, and owns their pools."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from rasa_ext.base_layer import adapter_dtype, base_weight, device_of, features
from rasa_ext.injection import clean_name, group_names, refuse_tied
from rasa_ext.module import RaSALinear
from rasa_ext.peft.config import RaSAConfig
from rasa_ext.peft.layer import Linear
from rasa_ext.peft.pool import Pool, Settings
from rasa_ext.peft.registry import PREFIX
from rasa_ext.siblings import link_all
from rasa_ext.update import init_rank_weights

# What FSDP1, checkpoint wrappers and torch.compile put into the names of what they wrap.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class RaSAModel(BaseTuner):
    """A model with RaSA adapters, made by get_peft_model().

    Layers of one kind and shape are a group, by the rule of :func:`rasa_ext.apply`, and share one
    pool for each adapter. The pools are parameters of this module and of nothing else, so each is
    saved, moved, optimised and sharded once::

        rasa_A_shared.<adapter>.<group>  (Rs, K)      rasa_Bt_shared.<adapter>.<group>  (Rs, N)

    and each layer holds rasa_A.<adapter> (Rp, K), rasa_Bt.<adapter> (Rp, N) and, for k > 0,
    rasa_d.<adapter> (Rs + Rp). What would be empty (Rp = 0) is left out.

    q_proj, k_proj and v_proj of one parent, and gate_proj and up_proj, are linked as siblings (see
    :func:`rasa_ext.link_siblings`): with one active adapter, one op and one dropout mask for all.

    Adapting a layer whose weight is tied to another's (a tied lm_head) raises ValueError, a module
    that is not linear-like TypeError; the model is then as it was. Loading a checkpoint that lacks
    a tensor of the adapter, or holds one of another size, raises ValueError before the first write.
    """

    # PEFT offers no inject_adapter_in_model() then: that returns the model without this module.
    uses_shared_state = True
    prefix = PREFIX
    tuner_layer_cls = Linear
    targeted_module_names: list[str]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: RaSAConfig, adapter_name: str) -> None:
        """Make room for pools, and take over those of adapters that are in the model already."""
        self.rasa_A_shared, self.rasa_Bt_shared = nn.ModuleDict(), nn.ModuleDict()
        owned = set(model.modules())
        for layer in _layers(model).values():
            for name, pool in layer.rasa_pools.items():
                if owned.isdisjoint(pool.owners):
                    self.rasa_A_shared[name], self.rasa_Bt_shared[name] = pool.owners

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Put an adapter into the model; after an error the model is as it was."""
        if any(adapter_name in layer.rasa_settings for layer in _layers(model).values()):
            raise ValueError(
                f"RaSAModel: adapter_name must be new to the model, got {adapter_name!r}. Name "
                "another, or unload() the model first"
            )
        bias = self.peft_config[adapter_name].bias
        if bias != "none" and not hasattr(BaseTuner, "_get_adapter_state_dict"):
            raise ValueError(
                f"RaSAModel: bias must be 'none' with PEFT before 0.21, which would not save what "
                f"trained, got {bias!r}"
            )
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        names: list[str] = list(self.targeted_module_names)
        # By name: the layer, its parent, and what it replaces there (None: a layer of ours).
        self._targets: dict[str, tuple[Linear, nn.Module, nn.Module | None]] = {}
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                **kwargs,
            )
            self._add_adapter(model, adapter_name, low_cpu_mem_usage)
            link_all(model, Linear, _family)
        except BaseException:
            for name, (_, parent, replaced) in self._targets.items():
                if replaced is not None:
                    setattr(parent, name.rpartition(".")[2], replaced)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            self.targeted_module_names = names
            raise
        finally:
            del self._targets

    def _create_and_replace(
        self,
        config: RaSAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        """Put a Linear around a target; its tensors wait until the whole group is known."""
        if isinstance(target, Linear):
            self._targets[current_key] = (target, parent, None)
            return
        _check_target(current_key, target)
        layer = Linear(target)
        self._targets[current_key] = (layer, parent, target)
        self._replace_module(parent, target_name, layer, target)

    def _add_adapter(self, model: nn.Module, adapter_name: str, on_meta: bool) -> None:
        """Make the pools and the layers' tensors of an adapter; checks first."""
        config: RaSAConfig = self.peft_config[adapter_name]
        layers = {clean_name(name): layer for name, (layer, _, _) in self._targets.items()}
        bases = {name: layer.base_layer for name, layer in layers.items()}
        group_of = group_names(bases)
        _refuse_shared(model, bases)
        dtypes = {name: adapter_dtype("RaSAModel", base, None) for name, base in bases.items()}
        of_group: dict[str, set[torch.dtype]] = defaultdict(set)
        for name, group in group_of.items():
            of_group[group].add(dtypes[name])
        for group, found in of_group.items():
            if config.k > 0 and len(found) > 1:
                raise ValueError(
                    f"RaSAModel: the layers of group {group} share one pool and must have one "
                    f"adapter dtype, got {', '.join(sorted(map(str, found)))}"
                )
        num_layers = Counter(group_of.values())
        settings = {}
        for name, group in group_of.items():
            r_key = get_pattern_key(config.rank_pattern, name)
            alpha_key = get_pattern_key(config.alpha_pattern, name)
            settings[name] = Settings(
                r=config.rank_pattern.get(r_key, config.r),
                k=config.k,
                Rs=config.k * num_layers[group],
                alpha=config.alpha_pattern.get(alpha_key, config.alpha),
                dropout=config.dropout,
            )

        A_shared, Bt_shared = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            group, Rs = group_of[name], settings[name].Rs
            device = torch.device("meta") if on_meta else device_of(bases[name])
            options: dict[str, Any] = {"dtype": dtypes[name], "device": device}
            if Rs > 0 and group not in A_shared:
                A = nn.Parameter(torch.empty(Rs, layer.in_features, **options))
                Bt = nn.Parameter(torch.empty(Rs, layer.out_features, **options))
                init_rank_weights(A, Bt)
                if not config.init_weights:
                    init_rank_weights(Bt, Bt.new_empty(0))
                A_shared[group], Bt_shared[group] = A, Bt
            pool = Pool(A_shared, Bt_shared, group) if Rs > 0 else None
            layer.update_layer(adapter_name, settings[name], pool, config.init_weights, **options)
        self._forget_pools(adapter_name)
        if config.k > 0:
            self.rasa_A_shared[adapter_name] = A_shared
            self.rasa_Bt_shared[adapter_name] = Bt_shared
        trains = adapter_name in self.active_adapters and not config.inference_mode
        for layer in layers.values():
            layer.set_requires_grad(adapter_name, trains)

    def _forget_pools(self, adapter_name: str) -> None:
        for shared in (self.rasa_A_shared, self.rasa_Bt_shared):
            if adapter_name in shared:
                del shared[adapter_name]

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse PEFT's argument for mixed batches, which would be ignored without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "RaSAModel: adapter_names is not supported: one batch goes through the active "
                f"adapters, got {kwargs['adapter_names']}. Call the model once for each adapter"
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its pools."""
        super().delete_adapter(adapter_name)
        self._forget_pools(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Give an adapter at least float32, or else the dtype of its layers."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in _layers(self).values():
            if adapter_name not in layer.rasa_settings:
                continue
            base = layer.get_base_layer()
            dtype = adapter_dtype("RaSAModel", base, None)
            weight = base_weight(base)
            if not autocast_adapter_dtype and weight is not None:
                dtype = weight.dtype
            layer.cast_adapter(adapter_name, dtype)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights, in all layers or, after an error, in none."""
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names)
        groups = {id(layer.siblings): layer.siblings for layer in _layers(self.model).values()}
        unloaded = super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
        )
        for group in groups.values():
            if group is not None:
                group.dissolve()
        return unloaded

    @torch.no_grad()
    def _check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise what a layer would raise, before the first layer is merged."""
        for name, layer in _layers(self.model).items():
            names = layer.mergeable(adapter_names)
            if not names:
                continue
            try:
                with onload_layer(layer):
                    layer.merged_weight(names)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse an adapter that is not all there; this module comes before its layers."""
        got = {_plain(key): tensor for key, tensor in state_dict.items()}
        for adapter_name in self.peft_config:
            expected = self._expected(adapter_name, _plain(prefix))
            if not got.keys().isdisjoint(expected):
                _check(f"RaSAModel.load_state_dict: {adapter_name}", got, expected)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RaSAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return what PEFT saves; refuse to save what could not be loaded."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        # Of a model sharded over processes, all but the first get an empty state_dict.
        for name, tuner in model.named_modules() if state_dict else ():
            if isinstance(tuner, cls):
                got = {_plain(key): tensor for key, tensor in tensors.items()}
                expected = tuner._expected(adapter_name, _plain(f"{name}.") if name else "")
                _check(f"save_pretrained: {adapter_name}", got, expected)
        return tensors

    def _expected(self, adapter_name: str, prefix: str) -> dict[str, tuple[str, list[int]]]:
        """Return every tensor of an adapter, with its shape in symbols and numbers."""
        expected: dict[str, tuple[str, list[int]]] = {}
        for name, layer in _layers(self).items():
            if adapter_name not in layer.rasa_settings:
                continue
            for attribute, shape in layer.expected(adapter_name).items():
                expected[f"{prefix}{name}.{attribute}.{adapter_name}"] = shape
            pool, Rs = layer.rasa_pools.get(adapter_name), layer.rasa_settings[adapter_name].Rs
            if pool is not None:
                key = f"{adapter_name}.{pool.group}"
                K, N = layer.in_features, layer.out_features
                expected[f"{prefix}rasa_A_shared.{key}"] = ("(Rs, K)", [Rs, K])
                expected[f"{prefix}rasa_Bt_shared.{key}"] = ("(Rs, N)", [Rs, N])
        return expected


def _layers(module: nn.Module) -> dict[str, Linear]:
    named = module.named_modules()
    return {_plain(name): layer for name, layer in named if isinstance(layer, Linear)}


def _family(layer: Linear) -> object:
    """Return what siblings have in common: it may be one op's, whatever adapter is active."""
    weight = base_weight(layer.base_layer) if layer._is_plain_linear else None
    return None if weight is None else (layer.in_features, weight.dtype, weight.device)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _check_target(name: str, target: nn.Module) -> None:
    """Raise TypeError for a module that an update can not be added to."""
    kind = type(target)
    if isinstance(target, RaSALinear):
        raise TypeError(
            f"RaSAModel: {name} has an adapter of rasa_ext.apply. Start from a plain model, or "
            "merge and rebuild it"
        )
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise TypeError(
            f"RaSAModel: {name} belongs to an nn.MultiheadAttention, which reads its weight "
            "instead of calling it and would miss the update"
        )
    if features(target) is None:
        raise TypeError(
            f"RaSAModel: Target module {name} is not supported: {kind.__name__} has no in_features "
            "and out_features (or the nx and nf of Conv1D)"
        )


def _refuse_shared(model: nn.Module, bases: dict[str, nn.Module]) -> None:
    """Raise ValueError for a base layer under two names, or with a tied weight."""
    names_of: dict[nn.Module, list[str]] = {base: [name] for name, base in bases.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        name = clean_name(name).removesuffix(".base_layer")
        if module in names_of and name not in names_of[module]:
            raise ValueError(
                f"RaSAModel: {names_of[module][0]} and {name} are one module under two names, of "
                "which PEFT would adapt one. Give each layer its own module"
            )
    refuse_tied("RaSAModel", model, names_of, 0)


def _check(op: str, got: dict[str, Tensor], expected: dict[str, tuple[str, list[int]]]) -> None:
    """Raise ValueError for the first tensor that is missing or has another shape."""
    problems = []
    for key, (symbols, shape) in expected.items():
        if key not in got:
            problems.append(f"{key} must be {symbols} = {shape}, got no such tensor")
        elif list(got[key].shape) != shape:
            problems.append(f"{key} must be {symbols} = {shape}, got {list(got[key].shape)}")
    if problems:
        more = f"; {len(problems) - 1} more do not fit" if len(problems) > 1 else ""
        raise ValueError(
            f"{op}: {problems[0]}{more}. Gather sharded parameters before saving, and load with "
            "the configuration that was saved"
        )
