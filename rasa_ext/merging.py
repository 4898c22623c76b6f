"""Adding updates to base weights: all layers in one launch, what the dtype lost, all or nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rasa_ext.base_layer import base_weight, is_transposed
from rasa_ext.layer_ops import Adapters, adapters_of, rasa_delta_weights, rasa_merge_

if TYPE_CHECKING:
    from rasa_ext.module import RaSALinear

# Relative error of an applied update above which merging warns. An update of 1/700 of the weights'
# size, usual after fine-tuning, has 0.7 in bfloat16; the output of the update is as wrong as the
# update itself (by 0.7) on inputs that the weights were not made for.
WARN_ABOVE = 0.5

# Updates of so many elements are held at once while their errors are measured (256 MiB in float32);
# a larger layer is held alone.
_ELEMENTS_HELD = 1 << 26

_ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class LayerMerge:
    """What merging did to one layer.

    error = ||W_merged - W - delta|| / ||delta|| (Frobenius), 0 for an update of zeros: what
    rounding to dtype took from the update or added to it. 0 is exact; near 1, next to nothing
    arrived.
    """

    name: str
    dtype: torch.dtype
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What merge() did: the relative error of each layer's update as its stored dtype holds it."""

    layers: tuple[LayerMerge, ...]

    @property
    def worst(self) -> LayerMerge:
        """The layer whose update lost most."""
        return max(self.layers, key=lambda layer: layer.error)

    def __str__(self) -> str:
        """Return a table, one line per layer."""
        width = max(len(layer.name) for layer in self.layers)
        return "\n".join(
            f"{layer.name.ljust(width)}  {str(layer.dtype).removeprefix('torch.')}  "
            f"{layer.error:.1e}"
            for layer in self.layers
        )


@torch.no_grad()
def merge_layers(
    op: str,
    layers: Mapping[str, RaSALinear],
    rounding: str,
    generator: torch.Generator | None,
) -> MergeReport:
    """Add the layers' updates to their weights, keep the originals, and say what was lost.

    All layers are merged or, whatever is raised, none. See rasa_ext.merge for the arguments.
    """
    weights = {name: _weight_of(op, name, layer) for name, layer in layers.items()}
    _check_untied(op, weights)
    _check_rounding(op, weights, rounding, generator)
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    norms: dict[str, Tensor] = {}
    try:
        if rounding == "nearest":
            for names in _groups(layers, elements=None):
                rasa_merge_([weights[name] for name in names], _adapters(layers, names))
        for names in _groups(layers, elements=_ELEMENTS_HELD):
            for name, delta in zip(names, _deltas(layers, names), strict=True):
                if rounding == "stochastic":
                    _add_stochastically(weights[name], delta, generator)
                norms[name] = _norms(weights[name], originals[name], delta)
        report = _report(op, weights, norms)
        _warn_of_losses(op, report)  # here, so that a warning made an error merges nothing
    except BaseException:
        for name, weight in weights.items():
            weight.copy_(originals[name])
        raise
    for name, layer in layers.items():
        layer.original_weight = originals[name]
        layer.merged = True
    return report


def _weight_of(op: str, name: str, layer: RaSALinear) -> Tensor:
    weight = base_weight(layer.base_layer)
    if weight is None:
        raise TypeError(
            f"{_where(op, name)}{type(layer.base_layer).__name__} has no floating-point weight of "
            f"shape (N, K) = [{layer.out_features}, {layer.in_features}] to add to"
        )
    return weight


def _check_untied(op: str, weights: Mapping[str, Tensor]) -> None:
    owners: dict[int, str] = {}
    for name, weight in weights.items():
        owner = owners.setdefault(weight.data_ptr(), name)
        if owner != name:
            raise ValueError(
                f"{op}: {name} and {owner} have one weight, which would get both their updates. "
                "Untie them"
            )


def _where(op: str, name: str) -> str:
    """Return the start of a message: the layer's own operation, and whose layer it is."""
    return f"{op}: {name}: RaSALinear.merge: " if name else f"{op}: "


def _check_rounding(
    op: str, weights: Mapping[str, Tensor], rounding: str, generator: torch.Generator | None
) -> None:
    if rounding not in _ROUNDINGS:
        raise ValueError(f"{op}: rounding must be one of {', '.join(_ROUNDINGS)}, got {rounding!r}")
    if rounding == "nearest":
        if generator is not None:
            raise ValueError(f'{op}: generator must be None unless rounding = "stochastic"')
        return
    for name, weight in weights.items():
        if weight.element_size() != 2:
            raise ValueError(
                f"{_where(op, name)}stochastic rounding is for torch.bfloat16 and torch.float16, "
                f"got {weight.dtype}, which loses nothing worth it"
            )
        if generator is not None and generator.device.type != weight.device.type:
            raise ValueError(
                f"{_where(op, name)}generator must be on the weight's device {weight.device}, got "
                f"{generator.device}"
            )


def _groups(layers: Mapping[str, RaSALinear], elements: int | None) -> Iterator[list[str]]:
    """Yield names of layers that one launch may serve: of one device, and one adapter dtype.

    With a number of elements, runs of consecutive layers, each of so many at most.
    """
    kinds: dict[object, list[str]] = {}
    for name, layer in layers.items():
        kinds.setdefault((layer.A.device, layer.A.dtype), []).append(name)
    for names in kinds.values():
        run: list[str] = []
        held = 0
        for name in names:
            size = layers[name].in_features * layers[name].out_features
            if run and elements is not None and held + size > elements:
                yield run
                run, held = [], 0
            run.append(name)
            held += size
        yield run


def _adapters(layers: Mapping[str, RaSALinear], names: list[str]) -> Adapters:
    """Return the layers' adapters, with updates in the layout in which each weight is stored."""
    chosen = [layers[name] for name in names]
    return adapters_of(chosen, [is_transposed(layer.base_layer) for layer in chosen])


def _deltas(layers: Mapping[str, RaSALinear], names: list[str]) -> Iterator[Tensor]:
    """Yield the layers' updates, computed in one launch, and keep none that was used."""
    deltas = rasa_delta_weights(_adapters(layers, names))[::-1]
    while deltas:
        yield deltas.pop()


def _row_pieces(weight: Tensor) -> Iterator[slice]:
    """Yield rows of a matrix in pieces whose float64 copies are small."""
    # On a CPU a piece stays in cache; elsewhere a launch should have work to do.
    elements = 1 << 18 if weight.device.type == "cpu" else 1 << 24
    step = max(1, elements // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        yield slice(first, first + step)


def _add_stochastically(weight: Tensor, delta: Tensor, generator: torch.Generator | None) -> None:
    """Set weight to weight + delta, rounded up or down at random so that the mean is the sum."""
    for rows in _row_pieces(weight):
        total = weight[rows].double() + delta[rows].double()
        weight[rows] = round_stochastically(total, weight.dtype, generator)


def round_stochastically(
    total: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """Return float64 `total` in a 16-bit dtype: one of the two numbers around each element.

    The upper one is taken with the probability (total - lower) / (upper - lower), so the expected
    value is `total` exactly; a number that dtype holds stays. What is too large becomes inf.
    """
    info = torch.finfo(dtype)
    mantissa, _ = torch.frexp(total)
    # 2^e of total = mantissa * 2^e, a quotient without rounding; below the smallest normal number
    # the spacing no longer shrinks.
    power = torch.where(total == 0, 0.0, total / mantissa).abs()
    spacing = (power / 2).clamp_min(info.tiny) * info.eps
    steps = total / spacing
    low = steps.floor()
    draws = torch.rand(total.shape, dtype=torch.float64, device=total.device, generator=generator)
    return ((low + (draws < steps - low)) * spacing).to(dtype)


def _norms(weight: Tensor, original: Tensor, delta: Tensor) -> Tensor:
    """Return the squared norms of weight - original - delta, and of delta."""
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for rows in _row_pieces(weight):
        update = delta[rows].double()
        residual = weight[rows].double() - original[rows].double() - update
        sums += torch.stack([residual.square().sum(), update.square().sum()])
    return sums


def _report(op: str, weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> MergeReport:
    """Return the report; raise ValueError for the first layer with a value that is not finite."""
    merged = []
    for name, weight in weights.items():
        residual, update = norms[name].tolist()
        # A weight that is NaN or inf makes the residual so.
        if not math.isfinite(residual):
            raise ValueError(
                f"{_where(op, name)}the merged weight would hold NaN or inf in {weight.dtype}. "
                "Check the adapter's weights and d"
            )
        merged.append(LayerMerge(name, weight.dtype, math.sqrt(residual / update) if update else 0))
    return MergeReport(tuple(merged))


def _warn_of_losses(op: str, report: MergeReport) -> None:
    lossy = [layer for layer in report.layers if layer.error > WARN_ABOVE]
    if lossy:
        worst = report.worst
        warnings.warn(
            f"{op}: {worst.dtype} changed the update by more than {WARN_ABOVE:.0%} in "
            f"{len(lossy)} of {len(report.layers)} layers, by {worst.error:.0%} in "
            f"{worst.name or 'the worst'}: it is too small beside the weights. Merge into a "
            "float32 model, or serve the adapter unmerged",
            stacklevel=5,  # whoever called merge()
        )
