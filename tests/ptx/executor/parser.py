"""PTX text to a syntax tree. A module may have many kernels: bodies are parsed when asked for."""

from __future__ import annotations

import re

from .body_parser import parse_body, parse_variable
from .lexer import Tokens
from .syntax import Function, PtxError, SyntaxTree, Variable

_BRACES = re.compile(r'//[^\n]*|/\*.*?\*/|"[^"]*"|[{};]', re.S)


def _parameters(t: Tokens) -> list[Variable]:
    variables = []
    if t.accept("("):
        while not t.accept(")"):
            variables.append(parse_variable(t, end=""))
            t.accept(",")
    return variables


def _function(t: Tokens, tree: SyntaxTree, is_extern: bool, bodies: list[_Body]) -> None:
    is_entry, line = t.next() == ".entry", t.line
    results = [] if is_entry else _parameters(t)
    function = Function(t.next(), line, is_entry, results=results, params=_parameters(t))
    for v in function.params + function.results:
        function.variables[v.name] = v
    while t.peek() not in ("{", ";"):
        if t.next() == ".maxntid":
            function.max_threads = t.integer()
            while t.accept(","):
                function.max_threads *= t.integer()
    if t.accept(";") or is_extern:  # a declaration
        tree.functions.setdefault(function.name, function)
        return
    t.skip_past("}")
    body = bodies.pop(0)
    function.parse_body = lambda: parse_body(*body, tree.files, function)
    tree.functions[function.name] = function


def parse(text: str) -> SyntaxTree:
    """Parse a module."""
    outline, bodies = _outline(text)
    t, tree = Tokens(outline), SyntaxTree()
    _read_files(text, tree)
    is_extern = False
    while t.kind != "end":
        word = t.peek()
        if word in (".entry", ".func"):
            _function(t, tree, is_extern, bodies)
            is_extern = False
        elif word in (".global", ".const", ".shared"):
            v = parse_variable(t)
            tree.variables[v.name] = v
        elif word in (".visible", ".weak", ".extern", ".common"):
            is_extern = t.next() == ".extern"
        elif word in (".version", ".target", ".address_size", ".file"):
            _directive(t, tree)
        elif word == ".section":
            t.skip_past("}")
        elif not t.accept(";"):
            raise PtxError(f"PTX line {t.line}: unexpected {word!r} at module level")
    return tree


_Body = tuple[str, int]
"""Text of a function body and the line it starts at."""


def _outline(text: str) -> tuple[str, list[_Body]]:
    """Take the bodies of functions out, leaving {} and line breaks: lines keep their numbers."""
    outline: list[str] = []
    bodies: list[_Body] = []
    depth = kept = start = statement = 0
    for match in _BRACES.finditer(text):
        mark = match.group()
        if mark == "{":
            if depth == 0:
                start = match.start()
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == 0 and re.search(r"\.(entry|func)\b", text[statement:start]):
                body = text[start : match.end()]
                bodies.append((body, text.count("\n", 0, start) + 1))
                outline += [text[kept:start], "{", "\n" * body.count("\n"), "}"]
                kept = match.end()
        if mark in "};" and depth == 0:
            statement = match.end()
    return "".join([*outline, text[kept:]]), bodies


def _directive(t: Tokens, tree: SyntaxTree) -> None:
    line, word = t.line, t.next()
    if word == ".version":
        tree.version = t.peek()
    elif word == ".target":
        tree.target = t.peek()
    while t.line == line and t.kind != "end":
        t.next()


def _read_files(text: str, tree: SyntaxTree) -> None:
    """Read the .file table first: nvcc writes it behind the code that refers to it."""
    for line in text.splitlines():
        words = line.split(None, 2)
        if words and words[0] == ".file":
            tree.files[int(words[1])] = words[2].split('"')[1]
