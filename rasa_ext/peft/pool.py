"""What a layer knows of an adapter beside its own tensors: its settings, and where its pool is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rasa_ext.update import tensor_of


@dataclass(frozen=True)
class Settings:
    """One adapter on one layer: private and shared ranks, and what its configuration says."""

    r: int
    k: int
    Rs: int
    alpha: float
    dropout: float

    @property
    def Rp(self) -> int:
        """The layer's own ranks."""
        return self.r - self.k


class Pool:
    """Where the layers of one group find the ranks they share.

    The tensors belong to the tuner, which registers them once; to a layer this is no module, so
    they are not in its state_dict() and no FSDP unit of a layer claims them.
    """

    def __init__(self, A_shared: nn.ParameterDict, Bt_shared: nn.ParameterDict, group: str) -> None:
        """Refer to one group in the dictionaries of one adapter."""
        self.owners, self.group = (A_shared, Bt_shared), group

    @property
    def A_shared(self) -> Tensor:
        """The pool's (Rs, K)."""
        return tensor_of(self.owners[0], self.group)

    @property
    def Bt_shared(self) -> Tensor:
        """The pool's (Rs, N)."""
        return tensor_of(self.owners[1], self.group)

    def parameters(self) -> Iterator[Tensor]:
        """Yield both, as PEFT asks for what it freezes and unfreezes with the layer."""
        yield self.A_shared
        yield self.Bt_shared

    def requires_grad_(self, requires_grad: bool = True) -> None:
        """Freeze or unfreeze both."""
        for tensor in self.parameters():
            tensor.requires_grad_(requires_grad)


class Pools(dict[str, Pool]):
    """The pools of a layer's adapters. PEFT 0.18 freezes through methods, later ones by tensor."""

    def requires_grad_(self, requires_grad: bool = True) -> None:
        """Freeze or unfreeze the pools of all adapters."""
        for pool in self.values():
            pool.requires_grad_(requires_grad)
