"""Non-inlined calls: every call is replaced by the callee's body, with names of its own.

Parameters become variables of the caller in local memory, as .param variables of a call are.
"""

from __future__ import annotations

from dataclasses import replace

from .syntax import (
    Address,
    Function,
    Instruction,
    Label,
    Negated,
    Operand,
    PtxError,
    Register,
    Symbol,
    SyntaxTree,
    Variable,
    Vector,
)


def inline_calls(tree: SyntaxTree, entry: Function) -> Function:
    """Return the entry with all direct calls expanded."""
    return _Inliner(tree).expand(entry, ())


class _Inliner:
    def __init__(self, tree: SyntaxTree) -> None:
        self.tree = tree
        self.num_calls = 0

    def expand(self, function: Function, callers: tuple[str, ...]) -> Function:
        if function.name in callers:
            raise PtxError(f"PTX line {function.line}: {function.name} is recursive")
        function = function.parsed()
        out = replace(function, registers=dict(function.registers), body=[])
        out.variables = dict(function.variables)
        for item in function.body:
            if isinstance(item, Instruction) and item.opcode == "call":
                self.call(out, item, (*callers, function.name))
            else:
                out.body.append(item)
        return out

    def call(self, caller: Function, call: Instruction, callers: tuple[str, ...]) -> None:
        target, arguments, results = _call_parts(call)
        callee = self.tree.functions.get(target.name) if isinstance(target, Symbol) else None
        if callee is None:
            raise PtxError(f"PTX line {call.line}: {call.op}: indirect calls are not modelled")
        if not callee.is_defined:  # __assertfail stops the kernel; others are refused when encoded
            op = "trap" if callee.name == "__assertfail" else f"call.extern.{callee.name}"
            caller.body.append(replace(call, op=op, operands=()))
            return
        self.num_calls += 1
        callee = self.expand(callee, callers)
        suffix = f"#{self.num_calls}"
        names: dict[str, str] = {}
        formal = zip(callee.params + callee.results, arguments + results, strict=True)
        for parameter, actual in formal:
            if parameter.space != "param" or not isinstance(actual, Symbol):
                raise PtxError(
                    f"PTX line {call.line}: {call.op}: arguments in registers are not modelled"
                )
            names[parameter.name] = actual.name
        for name, width in callee.registers.items():
            names[name] = name + suffix
            caller.registers[name + suffix] = width
        for name, variable in callee.variables.items():
            if name not in names:
                names[name] = name + suffix
                caller.variables[name + suffix] = replace(variable, name=name + suffix)
        self.append_body(caller, call, callee, names, suffix)

    def append_body(
        self,
        caller: Function,
        call: Instruction,
        callee: Function,
        names: dict[str, str],
        suffix: str,
    ) -> None:
        end = f"return{suffix}"
        if call.guard is not None:
            skip = Instruction(
                "bra", (Symbol(end),), call.line, call.guard, not call.guard_negated, call.source
            )
            caller.body.append(skip)
        for item in callee.body:
            if isinstance(item, Label):
                caller.body.append(Label(item.name + suffix))
                continue
            operands = tuple(_rename(o, names) for o in item.operands)
            if item.opcode == "bra" and isinstance(item.operands[0], Symbol):
                operands = (Symbol(item.operands[0].name + suffix), *operands[1:])
            guard = Register(names.get(item.guard.name, item.guard.name)) if item.guard else None
            item = replace(item, operands=operands, guard=guard)
            caller.body.append(
                replace(item, op="bra", operands=(Symbol(end),)) if item.opcode == "ret" else item
            )
        caller.body.append(Label(end))


def _call_parts(
    call: Instruction,
) -> tuple[Operand | None, list[Operand | None], list[Operand | None]]:
    """(target, arguments, results) of `call (results), target, (arguments);`."""
    operands = list(call.operands)
    results: list[Operand | None] = []
    if isinstance(operands[0], Vector):
        results = list(operands.pop(0).items)  # type: ignore[union-attr]
    target = operands[0]
    arguments = (
        list(operands[1].items) if len(operands) > 1 and isinstance(operands[1], Vector) else []
    )
    return target, arguments, results


def _rename(operand: Operand | None, names: dict[str, str]) -> Operand | None:
    match operand:
        case Register(name):
            return Register(names.get(name, name))
        case Symbol(name):
            return Symbol(names.get(name, name))
        case Negated(item):
            renamed = _rename(item, names)
            assert renamed is not None
            return Negated(renamed)
        case Vector(items):
            return Vector(tuple(_rename(i, names) for i in items))
        case Address(base, offset, extra):
            new_base = _rename(base, names)
            assert new_base is not None
            return Address(
                new_base,
                offset,
                tuple(e for e in (_rename(x, names) for x in extra) if e is not None),
            )
    return operand


def call_variables(function: Function) -> list[Variable]:
    """The .param variables that calls pass, which live in local memory."""
    own = {v.name for v in function.params}
    return [v for v in function.variables.values() if v.space == "param" and v.name not in own]
