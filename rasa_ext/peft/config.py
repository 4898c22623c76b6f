"""RaSAConfig: what PEFT knows of a RaSA adapter, and writes to adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from rasa_ext.base_layer import check_config
from rasa_ext.peft.registry import peft_type

_BIASES = ("none", "all", "rasa_only")


@dataclass
class RaSAConfig(PeftConfig):
    """The configuration of a RaSA adapter for PEFT.

    Its own fields:
        r: ranks that each layer pays for. k: how many of them it gives to the pool of its group
            (layers of one kind and shape), so that its update has rank (r - k) + k * layers.
            k = 0 is plain LoRA with scaling alpha / r, k = r shares all.
        alpha: the gates d start at 0.5 * alpha / ranks, for shared and private ranks each.
        dropout: rate of the dropout on the layer's input, a multiple of 2**-15.
        rank_pattern: another r for the layers whose name ends with a key (a regular expression);
            at least k, since each layer gives k ranks.
        alpha_pattern: another alpha, likewise.
        init_weights: True starts at the base model's function; False gives B random values too,
            for tests.

    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save and bias
    ("none", "all" or "rasa_only") mean what they mean in PEFT's LoraConfig.

    Raises ValueError for values out of range.
    """

    r: int = 8
    k: int = 1
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "rasa_only"] = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_weights: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.peft_type = peft_type()
        # PEFT looks names up in sets, and takes a string for a regular expression.
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        check_config("RaSAConfig", self.r, self.k, self.alpha, self.dropout)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        for key, r in self.rank_pattern.items():
            if not isinstance(r, int) or r < max(self.k, 1):
                raise ValueError(
                    f"RaSAConfig: rank_pattern[{key!r}] must be an integer of at least max(k, 1) = "
                    f"{max(self.k, 1)}, got {r}. Each layer gives k of its ranks to the pool"
                )
        for key, alpha in self.alpha_pattern.items():
            check_config(f"RaSAConfig: alpha_pattern[{key!r}]", self.r, self.k, alpha, 0.0)
        if self.bias not in _BIASES:
            raise ValueError(f"RaSAConfig: bias must be one of {_BIASES}, got {self.bias!r}")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"RaSAConfig: {name} must be None when target_modules is a regular "
                        f"expression, got {getattr(self, name)!r}. Name the layers in the "
                        "expression, or give a list of names"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "RaSAConfig: layers_to_transform must be given with layers_pattern, got None"
            )


def _as_set(names: list[str] | str | None) -> list[str] | str | None:
    return set(names) if isinstance(names, list) else names  # type: ignore[return-value]
