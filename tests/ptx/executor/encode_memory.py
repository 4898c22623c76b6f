"""Handlers of loads, stores, atomics, fences and cp.async."""

from __future__ import annotations

from .encode_hopper import bulk_copy
from .encoder import Encoder, Handlers
from .layouts import NO_OPERAND
from .modifiers import Modifiers
from .syntax import WIDTH, Address, Immediate, Instruction, Operand, Symbol, Unsupported, Vector

# Mirrored by machine.h, memory_access.h and atomics.cpp.
SPACES = {
    "generic": 0,
    "global": 1,
    "shared": 2,
    "shared::cta": 2,
    "shared::cluster": 2,
    "local": 3,
    "param": 4,
    "const": 5,
}
ORDERS = {"weak": 0, "relaxed": 1, "acquire": 2, "release": 3, "acq_rel": 4}
ATOMICS = {
    "add": 0,
    "min": 1,
    "max": 2,
    "and": 3,
    "or": 4,
    "xor": 5,
    "exch": 6,
    "cas": 7,
    "inc": 8,
    "dec": 9,
}
_SCOPES = ("cta", "cluster", "gpu", "sys")
_PRIORITIES = ("evict_first", "evict_last", "evict_normal", "no_allocate", "evict_unchanged")


def _items(operand: Operand | None) -> tuple[Operand | None, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _order_and_scope(m: Modifiers) -> list[int]:
    """[order, whether other blocks see it]; volatile is a relaxed access of system scope."""
    if m.take("volatile"):
        return [ORDERS["relaxed"], 1]
    m.take("mmio")
    order = m.choose(ORDERS)
    scope = m.choose(_SCOPES)
    return [ORDERS[order] if order else 0, int(scope in ("gpu", "sys"))]


def _space(m: Modifiers) -> str:
    return m.choose(SPACES) or "generic"


def _take_access_hints(m: Modifiers) -> None:
    m.take("v2", "v4", "v8", "L2::cache_hint", *_PRIORITIES)


def load(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle ld, ldu: scalars and vectors of any state space."""
    type_, targets, source = m.types[-1], _items(i.operands[0]), i.operands[1]
    _take_access_hints(m)
    order = _order_and_scope(m)
    space = _space(m)
    register_bytes = max(e.width(t) or 0 for t in targets)
    is_signed = int(type_[0] == "s")
    assert isinstance(source, Address)
    if space == "param" and isinstance(source.base, Symbol):
        if source.base.name in e.params:
            _load_parameter(e, targets, source, WIDTH[type_], register_bytes, is_signed)
            return
        space = "local"  # a value that a call returned
    base, address = e.address(source)
    args = [base, *(e.target(t, type_, any_width=True) for t in targets)]
    imms = [SPACES[space], WIDTH[type_], len(targets), register_bytes, is_signed, *order, *address]
    e.emit("ld", args, imms)


def _load_parameter(
    e: Encoder,
    targets: tuple[Operand | None, ...],
    source: Address,
    width: int,
    register_bytes: int,
    is_signed: int,
) -> None:
    assert isinstance(source.base, Symbol)
    offset, size = e.params[source.base.name]
    if source.offset < 0 or source.offset + width * len(targets) > size:
        raise Unsupported(f"byte {source.offset} of a parameter of {size} bytes")
    for k, target in enumerate(targets):
        if target is not None:
            imms = [offset + source.offset + k * width, width, register_bytes, is_signed]
            e.emit("ld.param", [e.target(target, "b32", any_width=True)], imms)


def store(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle st."""
    type_, sources = m.types[-1], _items(i.operands[1])
    _take_access_hints(m)
    order = _order_and_scope(m)
    space = _space(m)
    if space == "param":
        space = "local"  # an argument of a call
    widths = [w for w in (e.width(s) for s in sources) if w]
    register_bytes = widths[0] if widths else WIDTH[type_]
    bits = f"b{8 * register_bytes}"
    base, address = e.address(i.operands[0])
    args = [
        base,
        *(
            e.source(s, type_ if isinstance(s, Immediate) and s.float_bytes else bits)
            for s in sources
        ),
    ]
    e.emit(
        "st", args, [SPACES[space], WIDTH[type_], len(sources), register_bytes, 0, *order, *address]
    )


def _atomic(e: Encoder, i: Instruction, m: Modifiers, returns: bool) -> None:
    type_ = m.types[-1]
    m.take("noftz", "v2", "v4", "v8", "L2::cache_hint")
    order = m.choose(ORDERS) or "relaxed"
    scope = m.choose(_SCOPES) or "gpu"
    space, action = _space(m), m.require(ATOMICS)
    if type_[0] == "b" and not type_.startswith("bf"):
        type_ = "u" + type_[1:]
    if type_[0] == "f" and action not in ("add", "min", "max"):
        raise Unsupported(f"atomic .{action} on .{type_}")
    operands = list(i.operands)
    targets = _items(operands.pop(0)) if returns else ()
    base, address = e.address(operands[0])
    sources = _items(operands[1])
    third = e.source(operands[2], type_) if action == "cas" else NO_OPERAND
    args = [
        base,
        third,
        *(e.source(s, type_, True) for s in sources),
        *(e.target(t, type_, True) for t in targets),
    ]
    imms = [
        SPACES[space],
        ATOMICS[action],
        len(sources),
        returns,
        ORDERS[order],
        scope in ("gpu", "sys"),
        *address,
    ]
    e.emit(f"atom.{type_}", args, imms)


def atomic(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle atom."""
    _atomic(e, i, m, returns=True)


def reduction(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle red."""
    _atomic(e, i, m, returns=False)


def fence(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle fence and membar; one of block scope orders nothing between blocks."""
    if m.take("proxy"):
        if m.take("async", "async::generic"):
            e.emit("fence.proxy.async", [])
        m.take(
            "alias", "tensormap::generic", "global", "shared::cta", "acquire", "release", *_SCOPES
        )
        return
    m.take("sc", "acq_rel", "acquire", "release", "mbarrier_init")
    if m.choose(("gl", "sys", "gpu", "cta", "cluster")) in ("gl", "sys", "gpu"):
        e.emit("fence", [])


def copy(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle cp.async; the bulk forms are in encode_hopper."""
    m.require(("async",))
    if m.take("bulk"):
        bulk_copy(e, i, m)
    elif m.take("commit_group"):
        e.emit("cp.async.commit_group", [])
    elif m.take("wait_all"):
        e.emit("cp.async.wait_group", [], [-1])
    elif m.take("wait_group"):
        assert isinstance(i.operands[0], Immediate)
        e.emit("cp.async.wait_group", [], [i.operands[0].bits])
    else:
        _copy_async(e, i, m)


def _copy_async(e: Encoder, i: Instruction, m: Modifiers) -> None:
    m.take("shared", "shared::cta", "global", "L2::cache_hint")
    size = i.operands[2]
    assert isinstance(size, Immediate)
    target, address = e.address(i.operands[0])
    source, source_address = e.address(i.operands[1])
    if source_address[1] != 8:
        raise Unsupported("source address of 4 bytes")
    source_bytes = ignored = NO_OPERAND
    if len(i.operands) > 3:
        last = i.operands[3]
        if e.width(last) == 0:
            ignored = e.predicate(last)
        elif e.width(last) != 8:  # a 64-bit last operand is a cache policy
            source_bytes = e.source(last, "u32")
    e.emit(
        "cp.async",
        [target, source, source_bytes, ignored],
        [size.bits, *address, source_address[0]],
    )


def no_effect(e: Encoder, i: Instruction, m: Modifiers) -> None:
    """Handle hints: they change neither results nor order."""
    m.take(*i.parts[1:])


HANDLERS: Handlers = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": reduction,
    "fence": fence,
    "membar": fence,
    "cp": copy,
    **dict.fromkeys(
        (
            "prefetch",
            "prefetchu",
            "nanosleep",
            "discard",
            "createpolicy",
            "applypriority",
            "griddepcontrol",
            "setmaxnreg",
        ),
        no_effect,
    ),
}
