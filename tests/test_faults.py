"""What a save that fails or is killed leaves: the previous one, whole."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import saving
import torch
from saving import KINDS, load, save

CHILD = str(Path(saving.__file__).resolve())
# Where each kind's data is written but does not have its name yet.
RENAMES = {"adapter": "replace", "lora": "rename", "state": "replace"}


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def killed(words: list[str]) -> None:
    """Run a process up to the point where it says that it is, and kill it."""
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"reached\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["before the data is on disk", "before the rename"])
def test_a_killed_save_leaves_the_previous_one(tmp_path, kind: str, moment: str) -> None:
    save(kind, tmp_path, seed=1)
    before, tensors = contents(tmp_path), load(kind, tmp_path, seed=1)
    where = "fsync" if moment == "before the data is on disk" else RENAMES[kind]

    killed([sys.executable, CHILD, kind, str(tmp_path), "2", where])

    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    left = {Path(name).parts[0] for name in after.keys() - before.keys()}
    assert len(left) == 1 and left.pop().endswith(".tmp")
    save(kind, tmp_path, seed=2)  # what the killed one left is in nobody's way
    again = load(kind, tmp_path, seed=2)
    assert again.keys() == tensors.keys()
    assert any(not torch.equal(again[name], tensors[name]) for name in tensors)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes; the write that would fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_leaves_the_previous_one(tmp_path, kind: str, room: int) -> None:
    save(kind, tmp_path, seed=1)
    before = contents(tmp_path)

    with full_disk(room), pytest.raises((OSError, SystemExit), match="could not be written"):
        save(kind, tmp_path, seed=2)

    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == [Path(next(iter(before))).parts[0]]
