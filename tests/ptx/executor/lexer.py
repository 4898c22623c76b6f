"""PTX text to tokens."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from .syntax import Immediate, PtxError

_TOKEN = re.compile(
    r"""[ \t\r]*(?:
    (?P<newline>\n)
  | (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<string>"[^"]*")
  | (?P<number>0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}|0[xX][0-9A-Fa-f]+U?|\d+\.\d+|\d+U?)
  | (?P<word>[A-Za-z_$%.](?:[\w$.%]|::)*)
  | (?P<mark>[{}()\[\];,:@!<>=|+\-])
  )""",
    re.X | re.S,
)


class Token(NamedTuple):
    """One token and its line, counted from 1."""

    kind: str
    text: str
    line: int


def tokenize(text: str, line: int) -> list[Token]:
    """Split the text; the last token has kind "end"."""
    text = text.rstrip()
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PtxError(f"PTX line {line}: cannot read {text[position : position + 20]!r}")
        kind = match.lastgroup or ""
        position = match.end()
        if kind == "newline":
            line += 1
        elif kind == "comment":
            line += match[kind].count("\n")
        else:
            tokens.append(Token(kind, match[kind], line))
    tokens.append(Token("end", "", line))
    return tokens


def parse_number(text: str) -> Immediate:
    """Read an integer, a decimal float (64-bit) or the bits of a float (0f, 0d)."""
    text = text.rstrip("U")
    prefix = text[:2].lower()
    if prefix == "0f":
        return Immediate(int(text[2:], 16), 4)
    if prefix == "0d":
        return Immediate(int(text[2:], 16), 8)
    if prefix == "0x":
        return Immediate(int(text, 16))
    if "." in text:
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    return Immediate(int(text, 8) if len(text) > 1 and text[0] == "0" else int(text))


class Tokens:
    """A cursor over the tokens of a text whose first line is `line` of the module."""

    def __init__(self, text: str, line: int = 1) -> None:
        """Tokenize."""
        self._tokens = tokenize(text, line)
        self._at = 0

    @property
    def kind(self) -> str:
        """Kind of the next token."""
        return self._tokens[self._at].kind

    @property
    def line(self) -> int:
        """Line of the next token."""
        return self._tokens[self._at].line

    def peek(self, ahead: int = 0) -> str:
        """Text of the next token, or of one further ahead."""
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)].text

    def next(self) -> str:
        """Take the next token."""
        token = self._tokens[self._at]
        if token.kind == "end":
            raise PtxError(f"PTX line {token.line}: the text ends too early")
        self._at += 1
        return token.text

    def accept(self, text: str) -> bool:
        """Take the next token if it is `text`."""
        if self.peek() != text or self.kind == "string":
            return False
        self._at += 1
        return True

    def expect(self, text: str) -> None:
        """Take the next token, which must be `text`."""
        if not self.accept(text):
            raise PtxError(f"PTX line {self.line}: expected {text!r}, found {self.peek()!r}")

    def skip_past(self, text: str) -> None:
        """Take tokens up to and including `text`."""
        while self.next() != text:
            pass

    def integer(self) -> int:
        """Take an integer."""
        return parse_number(self.next()).bits
