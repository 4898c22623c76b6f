"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Make `path` hold `data`; whatever interrupts it, the file is the previous or the new one.

    Written under another name in the same folder, flushed to disk, then renamed. Raises OSError;
    the previous file is then as it was.
    """
    # A link's target is replaced, not the link.
    target = path.resolve()
    temporary = _temporary(target)
    try:
        _write(temporary, data)
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    _flush_names(target.parent)


def create_folder(path: Path, files: dict[str, bytes]) -> None:
    """Make a folder of these files; whatever interrupts it, all of them are there or no folder.

    Raises OSError if it cannot be written, or if there is something at `path` other than an empty
    folder: a folder cannot be replaced in one step.
    """
    target = path.resolve()
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        for name, data in files.items():
            _write(temporary / name, data)
        _flush_names(temporary)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush_names(target.parent)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _write(path: Path, data: bytes) -> None:
    """Write a new file and return when it is on disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Return when the folder's list of names is on disk, where the file system can do that."""
    # Where it cannot (some network mounts), the rename has happened all the same: no failed save.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
