"""One line for each fact that a check script establishes."""

from __future__ import annotations

import sys


def check(fact: str, holds: bool) -> None:
    """Print a fact, or stop with 1."""
    print(f"{'ok    ' if holds else 'FAILED'} {fact}", flush=True)
    if not holds:
        sys.exit(1)
