"""Ctrl-C as an exception that arrives between training steps, never inside one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. No Exception, so that no library's handler swallows it."""

    def __init__(self, signal_number: int) -> None:
        """Keep the shell's exit status for this signal."""
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class Interruption:
    """While installed, SIGINT and SIGTERM raise Interrupted, at the end of any held() block."""

    def __init__(self) -> None:
        """Take over both signals; the main thread only."""
        self._held = False
        self._pending: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            raise Interrupted(number)
        self._pending = number

    def ignore(self) -> None:
        """Let no further signal arrive: the process is saving its work and about to end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def take_effect(self, agree: Callable[[int], int] = int) -> None:
        """Raise Interrupted inside a held() block if a signal arrived.

        agree: maps the signal's number, or 0, to what all processes that call this shall raise.
        """
        number, self._pending = agree(self._pending or 0), None
        if number > 0:
            raise Interrupted(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish the block before a signal that arrives inside it takes effect.

        Of a block that fails none does: it stopped half-way, and that is nothing to save. torchrun
        signals the others when one process has died, while their own errors take them down.
        """
        self._held = True
        yield
        self._held = False
        self.take_effect()
