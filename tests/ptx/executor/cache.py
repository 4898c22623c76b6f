"""Files built once and found again by a hash of what they are made from."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def digest(*parts: str | bytes) -> str:
    """Hash the parts, boundaries included."""
    h = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:20]


def cached_file(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cached file, built under another name and renamed when complete."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            temporary = Path(folder) / name
            build(temporary)
            os.replace(temporary, path)
    return path
