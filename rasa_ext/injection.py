"""apply(): put RaSA adapters into any torch model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rasa_ext.base_layer import adapter_dtype, check_config, device_of, features
from rasa_ext.module import RaSALinear, SharedPool
from rasa_ext.rank_edits import resize
from rasa_ext.sharding import refuse_partitioned
from rasa_ext.siblings import link_all

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What torch.compile, FSDP1 and torch's checkpoint_wrapper put into the names of a module they wrap.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class GroupSummary:
    """One group of layers: the linears of one kind and shape, which share a pool when k > 0.

    Rp is the largest of the layers, Rp_min the smallest.
    """

    name: str
    num_layers: int
    in_features: int
    out_features: int
    Rp: int
    Rs: int
    trainable: int
    Rp_min: int

    @property
    def R(self) -> int:
        """Effective rank of the largest update: the layer's own ranks and the whole pool's."""
        return self.Rp + self.Rs

    @property
    def ranks(self) -> str:
        """R = Rs + Rp in numbers, from the smallest layer's to the largest one's."""
        if self.Rp_min == self.Rp:
            return f"{self.R} = {self.Rs} + {self.Rp}"
        return f"{self.Rs + self.Rp_min}..{self.R} = {self.Rs} + {self.Rp_min}..{self.Rp}"


@dataclass(frozen=True)
class Summary:
    """What apply() made: trainable and total parameters, and the effective rank per group."""

    trainable: int
    total: int
    groups: tuple[GroupSummary, ...]

    def __str__(self) -> str:
        """Return a table, one line per group."""
        rows = [("group", "layers", "shape (N, K)", "rank R = Rs + Rp", "trainable")]
        rows += [
            (
                g.name,
                str(g.num_layers),
                f"({g.out_features}, {g.in_features})",
                g.ranks,
                f"{g.trainable:,}",
            )
            for g in self.groups
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        share = 100 * self.trainable / max(self.total, 1)
        total = f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.2f} %)"
        return "\n".join(line.rstrip() for line in (*lines, total))


@dataclass(frozen=True)
class Config:
    """The arguments of apply(), and the ranks since."""

    r: int
    k: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float
    dtype: torch.dtype | None = None
    siblings: bool = True
    gates: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    # Where a RankAllocator has changed them: ranks by layer and by group.
    private_ranks: Mapping[str, int] = field(default_factory=dict)
    shared_ranks: Mapping[str, int] = field(default_factory=dict)

    def Rp_of(self, name: str) -> int:
        """Return the number of ranks of its own that a layer has."""
        return self.private_ranks.get(name, self.r_of(name) - self.k)

    def Rs_of(self, group: Group) -> int:
        """Return the number of ranks that a group's pool has."""
        return self.shared_ranks.get(group.name, self.k * len(group.modules))

    def r_of(self, name: str) -> int:
        """Return the r of a layer: of the longest pattern that its name ends with, else r."""
        fitting = [end for end in self.rank_pattern if f".{name}".endswith(f".{end}")]
        return self.rank_pattern[max(fitting, key=len)] if fitting else self.r


@dataclass(frozen=True)
class Group:
    """Layers to be adapted together: the modules, and every name that each of them has."""

    name: str
    modules: tuple[nn.Module, ...]
    names: tuple[tuple[str, ...], ...]


def clean_name(name: str) -> str:
    """Return a module or parameter name without what wrappers add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile or DDP wrapped, or the model itself."""
    while True:
        inner = getattr(model, "_orig_mod", model)
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
        if inner is model:
            return model
        model = inner


def adapted_layers(model: nn.Module) -> dict[str, RaSALinear]:
    """Return the model's RaSA layers by name."""
    named = model.named_modules()
    return {clean_name(name): module for name, module in named if isinstance(module, RaSALinear)}


def apply(
    model: nn.Module,
    r: int = 8,
    k: int = 1,
    alpha: float = 16.0,
    target_modules: str | Iterable[str] = TARGET_MODULES,
    dropout: float = 0.0,
    *,
    gates: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    siblings: bool = True,
) -> Summary:
    """Replace the named linear layers by RaSALinear, freeze all else, and say what was made.

    A target is a module name or the end of one ("q_proj", "self_attn.q_proj"); each must occur.
    Layers whose names agree after the layer index and whose shapes agree are one group and share
    one pool, registered once as model.rasa_pools.<group>: "layers.3.self_attn.q_proj" of shape
    (N, K) belongs to "self_attn__q_proj__NxK", from whichever root it is seen. The layer index is
    the first number in the name that tells same-shaped targets apart; a name without a number
    stands for its last part. k = 0 is plain LoRA (no pools, d = alpha / r), k = r shares all.
    Adapters are float32 under float16 and bfloat16 weights and take the weight's dtype otherwise,
    unless `dtype` says which; they lie on their base layer's device.
    q_proj, k_proj and v_proj of one parent, and gate_proj and up_proj, are linked as siblings:
    called in turn with the same tensor they are computed by one op and share one dropout mask (see
    link_siblings, which links others). siblings=False leaves every layer on its own.

    gates=True trains d as alpha / r (with pools, the values of RaSALinear) times gates c that start
    at 1, for a RankAllocator. rank_pattern gives layers another r, and so another alpha / r, by
    their names or ends of names; the longest end that fits counts, and each must fit a layer.

    Semantics: the model computes what it did before, since Bt and Bt_shared start at zero.

    Raises ValueError for r, k, alpha, dropout or dtype out of range, for a target that does not
    occur, for a weight tied to another module's, for a module that has two names while k > 0, for
    a group on several devices, for a model that has adapters, and for one that ZeRO-3 or FSDP2
    has taken apart already; TypeError for a target that is
    not linear-like. The model is then as it was.
    """
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    config = Config(r, k, alpha, targets, dropout, dtype, siblings, gates, dict(rank_pattern or {}))
    root = unwrapped(model)
    return inject(root, plan(root, config), config)


def inject(root: nn.Module, groups: list[Group], config: Config) -> Summary:
    """Build the adapters of a plan, then freeze the model and put them in."""
    k, alpha, dropout = config.k, config.alpha, config.dropout
    options: dict[str, Any] = {"gates": config.gates, "dtype": config.dtype}
    pools: dict[str, SharedPool] = {}
    layers: list[tuple[tuple[str, ...], RaSALinear]] = []
    for group in groups:
        pool = _pool_of(group, config) if config.k > 0 else None
        if pool is not None:
            pools[group.name] = pool
        for names, module in zip(group.names, group.modules, strict=True):
            r = config.r_of(clean_name(names[0]))
            layers.append((names, RaSALinear(module, pool, r, k, alpha, dropout, **options)))
    if config.private_ranks or config.shared_ranks:
        Rs = {pools[group.name]: config.Rs_of(group) for group in groups if group.name in pools}
        Rp = [config.Rp_of(clean_name(names[0])) for names, _ in layers]
        resize([layer for _, layer in layers], Rp, Rs)
    root.requires_grad_(False)
    for names, layer in layers:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, layer)
    if len(pools) > 0:
        root.rasa_pools = nn.ModuleDict(pools)
    if config.siblings:
        link_all(root)
    return summarize(root)


def _pool_of(group: Group, config: Config) -> SharedPool:
    first = group.modules[0]
    K, N = features(first) or (0, 0)
    dtype = adapter_dtype("apply", first, config.dtype)
    return SharedPool(K, N, config.k, len(group.modules), dtype=dtype, device=device_of(first))


def summarize(model: nn.Module) -> Summary:
    """Return the Summary of a model that has adapters."""
    root = unwrapped(model)
    layers = adapted_layers(root)
    # Layers of one group share a pool; without pools, a kind and shape.
    members: dict[object, list[tuple[str, RaSALinear]]] = {}
    for name, group_name in group_names(layers).items():
        layer = layers[name]
        members.setdefault(layer.pool or group_name, []).append((group_name, layer))
    groups = []
    for group in members.values():
        name, layer = group[0]
        own = [p for _, member in group for p in member.parameters(recurse=False)]
        tensors = {id(p): p for p in own}
        if layer.pool is not None:
            tensors |= {id(p): p for p in layer.pool.parameters()}
        groups.append(
            GroupSummary(
                name,
                len(group),
                layer.in_features,
                layer.out_features,
                max(member.Rp for _, member in group),
                0 if layer.pool is None else layer.pool.Rs,
                _count(tensors.values()),
                min(member.Rp for _, member in group),
            )
        )
    parameters = list(root.parameters())
    return Summary(_count(parameters), sum(p.numel() for p in parameters), tuple(groups))


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors if t.requires_grad)


def plan(root: nn.Module, config: Config) -> list[Group]:
    """Check everything apply() could fail on and return the groups. Changes nothing."""
    check_config("apply", config.r, config.k, config.alpha, config.dropout)
    refuse_partitioned("apply", root)
    for end, r in config.rank_pattern.items():
        check_config(f"apply: rank_pattern of {end!r}", r, config.k, config.alpha, config.dropout)
    adapted = next(iter(adapted_layers(root)), None)
    if adapted is not None or hasattr(root, "rasa_pools"):
        where = f"{adapted} is a RaSALinear" if adapted is not None else "it has rasa_pools"
        raise ValueError(f"apply: the model has adapters already: {where}")
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in match(root, config.target_modules).items():
        names_of.setdefault(module, []).append(name)
    refuse_tied("apply", root, names_of, config.k)
    group_of = group_names({names[0]: module for module, names in names_of.items()})
    members: dict[str, list[nn.Module]] = {}
    for module, names in names_of.items():
        members.setdefault(group_of[clean_name(names[0])], []).append(module)
    for group_name, modules in members.items():
        places = {
            f"{adapter_dtype('apply', module, config.dtype)} on {device_of(module)}"
            for module in modules
        }
        if config.k > 0 and len(places) > 1:
            raise ValueError(
                f"apply: the layers of group {group_name} share one pool and must have one adapter "
                f"dtype and device, got {', '.join(sorted(places))}"
            )
    adapted_names = [clean_name(names[0]) for names in names_of.values()]
    for end in config.rank_pattern:
        if not any(f".{name}".endswith(f".{end}") for name in adapted_names):
            raise ValueError(
                f"apply: rank_pattern must name adapted layers, or ends of their names, got {end!r}"
            )
    groups = [
        Group(name, tuple(modules), tuple(tuple(names_of[module]) for module in modules))
        for name, modules in members.items()
    ]
    for group in groups:
        if config.Rs_of(group) > config.k * len(group.modules):
            raise ValueError(
                f"apply: the pool of {group.name} must have at most k * layers = "
                f"{config.k * len(group.modules)} ranks, got {config.Rs_of(group)}"
            )
    return groups


def match(root: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """Return every linear-like module, by every name it has, that a target names."""
    modules = {n: m for n, m in root.named_modules(remove_duplicate=False) if n}
    matched: dict[str, nn.Module] = {}
    missing = []
    for target in targets:
        hits = {n: m for n, m in modules.items() if f".{clean_name(n)}".endswith(f".{target}")}
        for name, module in hits.items():
            if features(module) is None:
                raise TypeError(
                    f"apply: target {target!r} names {clean_name(name)}, a "
                    f"{type(module).__name__}, which is not a linear layer: it has no in_features "
                    "and out_features"
                )
        if not hits:
            missing.append(target)
        matched |= hits
    if missing or not matched:
        linears = {_short_name(name) for name, module in modules.items() if features(module)}
        nothing = f"no module is named {', '.join(map(repr, missing))}"
        raise ValueError(
            f"apply: {nothing if missing else 'target_modules names nothing'}. "
            f"Linear layers of this model: {', '.join(sorted(linears)) or 'none'}"
        )
    return {name: module for name, module in modules.items() if name in matched}


def target_names(root: nn.Module, layers: Collection[str]) -> tuple[str, ...]:
    """Return the last parts of the layers' names, or, where others have them too, whole names."""
    leaves = {name.rpartition(".")[2] for name in layers}
    named = {clean_name(name) for name, _ in root.named_modules()}
    if {name for name in named if name.rpartition(".")[2] in leaves} == set(layers):
        return tuple(sorted(leaves))
    return tuple(layers)


def _short_name(name: str) -> str:
    """Return the last part of a module's name, with its list if that part is a number."""
    parts = clean_name(name).split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def refuse_tied(op: str, root: nn.Module, names_of: dict[nn.Module, list[str]], k: int) -> None:
    """Raise ValueError for a target that is also another layer, or whose weight is."""
    owners: dict[int, dict[nn.Module, str]] = {}
    for name, module in root.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), {})[module] = clean_name(f"{name}.{leaf}")
    for module, names in names_of.items():
        name = clean_name(names[0])
        if k > 0 and len(names) > 1:
            raise ValueError(
                f"{op}: {name} and {clean_name(names[1])} are one module under two names; with "
                f"k = {k} it would join its pool once and be counted twice. Give each layer its "
                "own module, or use k = 0"
            )
        for leaf, parameter in module.named_parameters(recurse=False):
            others = [n for m, n in owners[id(parameter)].items() if m is not module]
            if others:
                raise ValueError(
                    f"{op}: {name}.{leaf} is tied to {others[0]}; an update of one would not "
                    f"reach the other, and merging would change both. Untie them, or leave "
                    f"{name.rpartition('.')[2]!r} out of target_modules"
                )


def group_names(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return for each layer the name of its group, e.g. "self_attn__q_proj__576x576"."""
    shapes = {clean_name(name): features(module) for name, module in layers.items()}
    kinds = Counter(
        (pattern, shape) for name, shape in shapes.items() for pattern in _patterns(name).values()
    )
    groups = {}
    for name, shape in shapes.items():
        K, N = shape or (0, 0)
        parts = name.split(".")
        patterns = _patterns(name)
        # The first number that tells same-shaped layers apart is the layer index: experts.5 in
        # layers.3.experts.5 is not, nor is the 0 of a Sequential that holds the whole model.
        telling = (i for i, pattern in patterns.items() if kinds[pattern, shape] > 1)
        layer = next(telling, max(patterns, default=-1))
        suffix = parts[layer + 1 :] if patterns else parts[-1:]
        # layers.0, layers.1 as linears themselves: named after their list.
        suffix = suffix or parts[max(layer - 1, 0) : max(layer, 1)]
        groups[name] = f"{'__'.join(suffix)}__{N}x{K}"
    return groups


def _patterns(name: str) -> dict[int, str]:
    """Return, by the position of each number in a name, the name with that number left open."""
    parts = name.split(".")
    numbers = (i for i, part in enumerate(parts) if part.isdecimal())
    return {i: ".".join((*parts[:i], "*", *parts[i + 1 :])) for i in numbers}
