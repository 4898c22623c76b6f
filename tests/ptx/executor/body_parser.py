"""The body of a PTX function to instructions and labels, with names unique in the function."""

from __future__ import annotations

from dataclasses import replace

from .lexer import Tokens, parse_number
from .syntax import (
    WIDTH,
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Negated,
    Operand,
    PtxError,
    Register,
    SourceLine,
    Symbol,
    Variable,
    Vector,
)


class _Scope:
    """Names declared between two braces; `number` makes them unique in the function."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.names: dict[str, str] = {}
        self.labels: set[str] = set()


class _BodyParser:
    """Parses one function body."""

    def __init__(self, tokens: Tokens, files: dict[int, str], function: Function) -> None:
        """`files` is the module's .file table."""
        self.tokens, self.files, self.function = tokens, files, function
        self.scopes = [_Scope(0)]
        self.num_scopes = 1
        self.source: SourceLine | None = None
        self.branch_scopes: dict[int, list[_Scope]] = {}

    def parse(self) -> None:
        """Fill the function's registers, variables and body."""
        t = self.tokens
        t.expect("{")
        while self.scopes:
            word = t.peek()
            if t.accept("}"):
                self.scopes.pop()
            elif t.accept("{"):
                self.scopes.append(_Scope(self.num_scopes))
                self.num_scopes += 1
            elif word == ".reg":
                self.registers()
            elif word in (".local", ".shared", ".param"):
                self.variable()
            elif word == ".loc":
                self.location()
            elif word in (".pragma", ".branchtargets", ".callprototype", ".calltargets"):
                t.skip_past(";")
            elif t.kind == "word" and t.peek(1) == ":":
                self.label()
            elif not t.accept(";"):
                self.function.body.append(self.instruction())
        self.resolve_branches()

    def declare(self, name: str) -> str:
        scope = self.scopes[-1]
        scope.names[name] = name if scope.number == 0 else f"{name}@{scope.number}"
        return scope.names[name]

    def registers(self) -> None:
        t = self.tokens
        t.expect(".reg")
        width = WIDTH[t.next()[1:]]
        while True:
            name = t.next()
            names = [name]
            if t.accept("<"):
                names = [f"{name}{i}" for i in range(t.integer())]
                t.expect(">")
            for n in names:
                self.function.registers[self.declare(n)] = width
            if not t.accept(","):
                break
        t.expect(";")

    def variable(self) -> None:
        v = parse_variable(self.tokens)
        v = replace(v, name=self.declare(v.name))
        self.function.variables[v.name] = v

    def label(self) -> None:
        name = self.tokens.next()
        self.tokens.expect(":")
        if self.tokens.peek().startswith(".call"):  # a prototype of an indirect call
            return
        self.scopes[-1].labels.add(name)
        self.function.body.append(Label(f"{name}@{self.scopes[-1].number}"))

    def location(self) -> None:
        t = self.tokens
        line = t.line
        t.expect(".loc")
        self.source = SourceLine(self.files.get(t.integer(), "?"), t.integer())
        while t.line == line and t.kind != "end":  # column and inlining history
            t.next()

    def instruction(self) -> Instruction:
        t = self.tokens
        line, guard, negated = t.line, None, False
        if t.accept("@"):
            negated = t.accept("!")
            guard = Register(self.lookup(t.peek()) or t.peek())
            t.next()
        op, operands = t.next(), []
        if not t.accept(";"):
            operands.append(self.operand())
            while True:
                if t.accept(","):
                    operands.append(self.operand())
                elif t.accept("|"):
                    operands[-1] = Vector((operands[-1], self.operand()))
                else:
                    break
            t.expect(";")
        instruction = Instruction(op, tuple(operands), line, guard, negated, self.source)
        if instruction.opcode in ("bra", "brx"):
            self.branch_scopes[len(self.function.body)] = list(self.scopes)
        return instruction

    def resolve_branches(self) -> None:
        """Point branches at the label of the innermost scope that declares it."""
        for index, scopes in self.branch_scopes.items():
            branch = self.function.body[index]
            assert isinstance(branch, Instruction)
            target = branch.operands[0]
            if not isinstance(target, Symbol):
                continue
            scope = next((s for s in reversed(scopes) if target.name in s.labels), None)
            if scope is None:
                raise PtxError(f"PTX line {branch.line}: no label {target.name}")
            name = Symbol(f"{target.name}@{scope.number}")
            self.function.body[index] = replace(branch, operands=(name, *branch.operands[1:]))

    def lookup(self, name: str) -> str | None:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return None

    def operand(self) -> Operand | None:
        t = self.tokens
        if t.accept("{"):
            return self.vector("}")
        if t.accept("("):
            return self.vector(")")
        if t.accept("["):
            return self.address()
        if t.accept("!"):
            item = self.operand()
            assert item is not None
            return Negated(item)
        if t.accept("-"):
            return Immediate(-t.integer())
        kind, word = t.kind, t.next()
        if kind == "number":
            return parse_number(word)
        if word == "_":
            return None
        if word == "WARP_SZ":
            return Immediate(32)
        name = self.lookup(word)
        if name in self.function.registers:
            return Register(name)
        if word.startswith("%"):
            return Register(word)
        return Symbol(name or word)

    def vector(self, end: str) -> Vector:
        items = []
        while not self.tokens.accept(end):
            items.append(self.operand())
            self.tokens.accept(",")
        return Vector(tuple(items))

    def address(self) -> Address:
        t = self.tokens
        base, offset, extra = self.operand(), 0, []
        while not t.accept("]"):
            if t.accept("+"):
                offset += -t.integer() if t.accept("-") else t.integer()
            elif t.accept("-"):
                offset -= t.integer()
            else:
                t.expect(",")
                extra.append(self.operand())
        assert base is not None
        return Address(base, offset, tuple(e for e in extra if e is not None))


def parse_body(text: str, line: int, files: dict[int, str], function: Function) -> None:
    """Fill the function's registers, variables and body; `files` is the module's .file table."""
    _BodyParser(Tokens(text, line), files, function).parse()


def parse_variable(t: Tokens, end: str = ";") -> Variable:
    """Parse a declaration; a parameter ends before , or ) instead of at a semicolon."""
    space, align, type_, pointer = t.next()[1:], 1, "b8", False
    while t.peek().startswith("."):
        word = t.next()
        if word == ".align":
            value = t.integer()
            align = align if pointer else value  # after .ptr it is the pointee's
        elif word == ".ptr":
            pointer = True
        elif word[1:] in WIDTH:
            type_ = word[1:]
    name, count = t.next(), 1
    while t.accept("["):
        count = 0 if t.peek() == "]" else count * t.integer()
        t.expect("]")
    initial = None
    if t.accept("="):
        width = WIDTH[type_]
        values = _initialiser(t)
        initial = b"".join((v & ((1 << 8 * width) - 1)).to_bytes(width, "little") for v in values)
        count = count or len(values)
    if end:
        t.expect(end)
    return Variable(name, space, type_, max(align, WIDTH[type_]), count, initial)


def _initialiser(t: Tokens) -> list[int]:
    if t.accept("{"):
        values = _initialiser(t)
        while t.accept(","):
            values += _initialiser(t)
        t.expect("}")
        return values
    return [-t.integer() if t.accept("-") else t.integer()]
