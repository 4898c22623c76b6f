"""Layers that are fed the same tensor, q, k and v say: one dropout mask, and one op for all.

Two things are kept apart. *The mask*: members that are called in turn with the same x share one
seed, whether one op computes them or several. *Fusion*: the first member to be called computes all
and keeps the others' outputs until they ask. Fusion changes no output, so it can be given up at any
call without a trace: backward may compute a checkpointed part of the model again in another way.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rasa_ext.module import Operands, RaSALinear
from rasa_ext.ops import rasa_linears

# Names that one parent gives to linear layers which it feeds the same tensor.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_logger = logging.getLogger(__name__)


class _Torch(NamedTuple):
    """What is asked of torch beside its public functions; its own modules use these as well."""

    saved_tensors_hooks: Callable[[bool], object]
    graph_task_id: Callable[[], int]
    queue_callback: Callable[[Callable[[], None]], None]

    @classmethod
    def find(cls) -> _Torch | None:
        """Return the functions; None if this torch lacks one, so that nothing can be shared."""
        owners = (
            (getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks"),
            (torch._C, "_current_graph_task_id"),
            (getattr(torch.autograd.Variable, "_execution_engine", None), "queue_callback"),
        )
        found = [getattr(owner, name, None) for owner, name in owners]
        return None if None in found else cls(*found)  # type: ignore[arg-type]


_torch = _Torch.find()


class Sibling(Protocol):
    """What a group asks of a member: a RaSALinear, or a layer of rasa_ext.peft."""

    in_features: int
    gates: bool
    siblings: SiblingGroup | None
    _buffers: dict[str, Tensor | None]

    @property
    def drop_rate(self) -> float:
        """The dropout that acts now."""

    def draw_seed(self, x: Tensor, p: float) -> Tensor | None:
        """Return a seed of its own."""

    def compute(self, x: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """Return the output for x as a matrix, computed alone."""

    def operands(self, *, stored: bool = False) -> Operands | None:
        """Return the tensors from which an op may compute it; None if it must be called."""


class _Output(NamedTuple):
    """A member's output, and what it was computed from."""

    y: Tensor
    operands: Operands
    state: tuple[object, ...]

    def is_of(self, member: Sibling, x: Tensor) -> bool:
        """Whether the member would compute it from the same tensors now."""
        now = member.operands(stored=True)
        return (
            now is not None
            and all(a is b for a, b in zip(now, self.operands, strict=True))
            and ((x._version, x.requires_grad), _state(member, now)) == self.state
        )


class _Turn:
    """One x on its way through the members of a group."""

    __slots__ = ("context", "outputs", "place", "seed", "waiting", "x")

    def __init__(
        self, x: Tensor, context: _Context, seed: Tensor | None, waiting: set[Sibling]
    ) -> None:
        """Begin; waiting are the members that have not been called since."""
        # Weak: a freed x matches nothing, also not a tensor that takes its place in memory.
        self.x = weakref.ref(x)
        self.place = _place(x)
        self.context, self.seed, self.waiting = context, seed, waiting
        self.outputs: dict[Sibling, _Output] = {}

    def has_values_of(self, x: Tensor) -> bool:
        """Whether x is the turn's x, or other views of it: reentrant checkpointing passes those."""
        return self.x() is not None and self.place == _place(x)


class _Context(NamedTuple):
    """What members must have in common to take one turn."""

    p: float
    grad: bool
    autocast: torch.dtype | None
    # Inside and outside a checkpointed part are two: backward repeats one without the other.
    saved_tensors_hooks: object


def _place(x: Tensor) -> tuple[object, ...]:
    """Return where a tensor's values are, and how often they were written."""
    if type(x) is not Tensor:  # it may not have its values in memory
        return (id(x), x._version)
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)


def _computed(member: Sibling, stored: Operands) -> Operands:
    """Return what an op takes: the d of a gated layer is computed from the c that it stores."""
    computed = member.operands() if member.gates else stored
    assert computed is not None
    return computed


def _state(member: Sibling, operands: Operands) -> tuple[object, ...] | None:
    """Return what changes when a tensor of a member is written; None if writes leave no trace."""
    tensors = (*operands, member._buffers.get("gate_scale"))
    if any(t is not None and t.is_inference() for t in tensors):
        return None
    return tuple(None if t is None else (t._version, t.requires_grad) for t in tensors)


def _context(x: Tensor, p: float, of_torch: _Torch) -> _Context:
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return _Context(
        p,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(device) if has_autocast else None,
        of_torch.saved_tensors_hooks(True),
    )


class SiblingGroup:
    """The members of a set of siblings, and their turns. Made by link_siblings() and apply().

    Holds its members weakly; copying or unpickling a model makes a new group, which the copies of
    the members join.
    """

    def __init__(self, name: str) -> None:
        """Make a group without members; the name is for messages."""
        self.name = name
        self._members: list[weakref.ref[Sibling]] = []
        self._hooks: list[RemovableHandle] = []
        # By thread: the turn, and whether the parent's forward is running.
        self._turns: dict[int, _Turn] = {}
        self._open: set[int] = set()
        self._was_open = False
        self._fuses, self._wastes = True, False
        self._to_be_repeated = 0  # turns that checkpointing saw and has not repeated yet

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without members and turns; see __setstate__ of the members."""
        return SiblingGroup, (self.name,)

    def join(self, member: Sibling) -> None:
        """Add a member."""
        self._members.append(weakref.ref(member))
        member.siblings = self

    def watch(self, parent: nn.Module) -> None:
        """Let turns end with parent's forward."""
        self._hooks.append(parent.register_forward_pre_hook(self.begin))
        self._hooks.append(parent.register_forward_hook(self.end, always_call=True))

    def dissolve(self) -> None:
        """Part the members, and leave no hook behind."""
        for hook in self._hooks:
            hook.remove()
        for member in self.members:
            member.siblings = None

    @property
    def members(self) -> list[Sibling]:
        """Return the members that exist, in the order in which they joined."""
        alive = (ref() for ref in self._members)
        return [member for member in alive if member is not None]

    @property
    def fuses(self) -> bool:
        """Whether one op computes the members; no more once that proved to be wasted work."""
        return self._fuses

    def forward(self, member: Sibling, x: Tensor) -> Tensor:
        """Return member's output for x as a matrix."""
        p = member.drop_rate
        if _torch is None or x.is_inference() or torch.is_inference_mode_enabled():
            # In inference mode writes to x leave no trace, so nothing can be kept for it.
            return member.compute(x, p, member.draw_seed(x, p))
        thread, context = threading.get_ident(), _context(x, p, _torch)
        turn = self._turns.get(thread)
        if turn is None or turn.context != context or member not in turn.waiting:
            self._end_turn(thread, counts=True)
            waiting = {m for m in self.members if m is not member}
            turn = _Turn(x, context, member.draw_seed(x, p), waiting)
            self._turns[thread] = turn
            self._compute_all(turn, member, x)
        else:
            turn.waiting.remove(member)
        output = turn.outputs.pop(member, None)
        if not turn.waiting:
            self._end_turn(thread, counts=True)
        if output is not None:
            if turn.x() is x and output.is_of(member, x):
                return output.y
            self._wastes = True
        if turn.has_values_of(x):
            return member.compute(x, p, turn.seed)
        return member.compute(x, p, member.draw_seed(x, p))

    def begin(self, parent: nn.Module, args: object) -> None:
        """Allow outputs to be kept: the hook before the parent's forward."""
        if not torch.compiler.is_compiling():
            self._was_open = True
            self._open.add(threading.get_ident())

    def end(self, parent: nn.Module, args: object, result: object) -> None:
        """Forget what no member asked for: the hook after the parent's forward, also if it fails.

        Without a result it failed, or checkpointing needed no more of it: nobody's fault.
        """
        if not torch.compiler.is_compiling():
            self._open.discard(threading.get_ident())
            self._end_turn(threading.get_ident(), counts=result is not None)

    def _may_keep_outputs(self) -> bool:
        """Whether something will end the turn that begins now."""
        thread = threading.get_ident()
        if thread in self._open:
            return True
        # Backward repeats what the parent checkpointed inside its forward.
        if _torch is None or not self._was_open or not self._in_backward():
            return False
        _torch.queue_callback(lambda: self._end_turn(thread, counts=False))
        return True

    def _in_backward(self) -> bool:
        return _torch is not None and _torch.graph_task_id() != -1

    def _compute_all(self, turn: _Turn, first: Sibling, x: Tensor) -> None:
        # Checkpointing wants backward to save the tensors that forward saved: as long as it will
        # repeat a turn, all are computed alike.
        if self._wastes and self._fuses and self._to_be_repeated <= 0 and not self._in_backward():
            self._fuses = False
            _logger.info(
                "rasa_ext: %s are fed different tensors; each is computed on its own from now on",
                self.name,
            )
        mine = first.operands(stored=True) if self._fuses and self._may_keep_outputs() else None
        if mine is None:
            return
        p = turn.context.p
        kind = [(t.dtype, t.device) for t in (mine.weight, mine.A)]
        family: dict[Sibling, tuple[Operands, tuple[object, ...]]] = {}
        for member in self.members:
            theirs = mine if member is first else member.operands(stored=True)
            if theirs is None or member.drop_rate != p:
                continue
            state = _state(member, theirs)
            if state and kind == [(t.dtype, t.device) for t in (theirs.weight, theirs.A)]:
                family[member] = theirs, state
        if first not in family or len(family) < 2:
            return
        operands = [_computed(member, stored) for member, (stored, _) in family.items()]
        weight, bias, A, A_shared, Bt, Bt_shared, d = map(list, zip(*operands, strict=True))
        rows = x if x.dim() == 2 else x.reshape(-1, first.in_features)
        y = rasa_linears(rows, weight, bias, A, A_shared, Bt, Bt_shared, d, p, turn.seed)
        of_x = (x._version, x.requires_grad)
        for (member, (stored, state)), output in zip(family.items(), y, strict=True):
            turn.outputs[member] = _Output(output, stored, (of_x, state))
        if turn.context.saved_tensors_hooks is not None:
            self._to_be_repeated += -1 if self._in_backward() else 1

    def _end_turn(self, thread: int, *, counts: bool) -> None:
        turn = self._turns.pop(thread, None)
        if turn is not None and turn.outputs and counts:
            self._wastes = True


def link_siblings(parent: nn.Module, names: Sequence[str]) -> None:
    """Declare that parent.forward feeds these RaSALinear modules the same tensor.

    The first of them to be called then computes all in one op, which reads x once; outputs are bit
    by bit what each layer alone computes. Members called in turn with the same x share one dropout
    mask: one seed is drawn for x, not one for each layer.

    x is the same when it is the same object, unchanged, under the same grad mode, autocast and
    saved-tensor hooks. A member that trains its base, carries hooks, is merged, or has another
    dtype or device is computed alone; so is every member outside a call of parent, in inference
    mode, and in a graph of torch.compile (there with a mask of its own). What no member asked for
    is forgotten when the call of parent ends, by a hook on parent. If members turn out to be fed
    other tensors, as in cross-attention, the group stops to compute them together, at once or,
    where checkpointing will repeat the call, after that. Writes that autograd's version counter
    does not see (through .data) are not seen here either.

    `names` are the modules' names in parent, as get_submodule takes them.

    Raises TypeError for a module that is not a RaSALinear, ValueError for fewer than two, one that
    has siblings already, or different in_features or dropout.
    """
    layers: list[RaSALinear] = []
    for name in names:
        layer = parent.get_submodule(name)
        if not isinstance(layer, RaSALinear):
            raise TypeError(
                f"link_siblings: {name} must be a RaSALinear, got {type(layer).__name__}"
            )
        if layer.siblings is not None or layer in layers:
            raise ValueError(f"link_siblings: {name} has siblings already")
        layers.append(layer)
    if len(layers) < 2:
        raise ValueError(f"link_siblings: names must be of two layers or more, got {list(names)}")
    kinds = [(layer.in_features, layer.dropout) for layer in layers]
    if len(set(kinds)) > 1:
        raise ValueError(
            "link_siblings: siblings must have one (in_features, dropout), got "
            + ", ".join(f"{name}: {kind}" for name, kind in zip(names, kinds, strict=True))
        )
    _link(parent, list(names), layers)


def _link(parent: nn.Module, names: list[str], layers: Sequence[Sibling]) -> None:
    group = SiblingGroup(f"{', '.join(names)} of {type(parent).__name__}")
    for layer in layers:
        group.join(layer)
    group.watch(parent)


def _family(layer: RaSALinear) -> object:
    operands = layer.operands()
    if operands is None:
        return None
    weight = operands.weight
    return (layer.in_features, layer.dropout, weight.dtype, weight.device)


def link_all(
    root: nn.Module, kind: Any = RaSALinear, family: Callable[[Any], object] = _family
) -> None:
    """Link what SIBLINGS names in every module of root, where one op can compute it.

    kind: of the layers. family: maps a layer to what siblings have in common, or to None.
    """
    for parent in root.modules():
        for names in SIBLINGS:
            families: dict[object, dict[str, Sibling]] = {}
            for name in names:
                layer = parent._modules.get(name)
                if isinstance(layer, kind) and layer.siblings is None:
                    families.setdefault(family(layer), {})[name] = layer
            for common, alike in families.items():
                if common is not None and len(alike) > 1:
                    _link(parent, list(alike), list(alike.values()))
