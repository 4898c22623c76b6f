"""Loads adapter files that were damaged at random.

    python tests/robustness/mutate_adapters.py --trials 5000 --seed 1

A damaged file is either refused with one of the errors that load_adapter documents, and the model
is as it was to the bit, or only numbers were damaged: they are finite, and the model holds them.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import rasa_ext

REFUSALS = (ValueError, RuntimeError, TypeError, FileNotFoundError, IsADirectoryError)


def model() -> nn.Module:
    """Three layers, adapted."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(24, 16)}) for i in range(3)})
    root = nn.ModuleDict({"layers": layers})
    rasa_ext.apply(root, r=4, k=1, target_modules=["q"])
    for parameter in root.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return root


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the file with one thing wrong."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.choice(("bits", "header bits", "truncate", "extend", "length", "header", "shuffle"))
    if kind in ("bits", "header bits"):
        start, end = (8 + length, len(data)) if kind == "bits" else (0, 8 + length)
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "truncate":
        return data[: rng.randrange(len(data))]
    if kind == "extend":
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind == "length":
        return (
            struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1)))
            + data[8:]
        )
    fields = json.loads(header)
    names = [name for name in fields if name != "__metadata__"]
    name = rng.choice(names)
    if kind == "shuffle":
        other = rng.choice(names)
        fields[name], fields[other] = fields[other], fields[name]
    else:
        edits = (
            lambda: fields.pop(name),
            lambda: fields.pop("__metadata__"),
            lambda: fields[name].update(dtype=rng.choice(("F64", "BF16", "I8", "Q4"))),
            lambda: fields[name]["shape"].append(rng.choice((1, 0, -1, 2**40))),
            lambda: fields[name].update(data_offsets=[0, rng.randrange(10**6)]),
            lambda: fields["__metadata__"].update(rasa_ext=rng.choice(("2", "", "x" * 1000))),
            lambda: fields["__metadata__"].update(config=rng.choice(("", "{}", "[]", "null"))),
            lambda: fields.update({name + "x": fields.pop(name)}),
        )
        rng.choice(edits)()
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + body


def bits(root: nn.Module) -> list[torch.Tensor]:
    """Every number of the model, copied."""
    return [t.detach().clone().view(torch.int32) for t in root.state_dict().values()]


def run(trials: int, seed: int) -> Counter[str]:
    """Mutate and load; WRONG are failures."""
    root = model()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        rasa_ext.save_adapter(root, path)
        good = path.read_bytes()
        for seed_of_trial in range(seed, seed + trials):
            path.write_bytes(mutate(good, random.Random(seed_of_trial)))
            before = bits(root)
            try:
                rasa_ext.load_adapter(root, path)
                finite = all(t.isfinite().all() for t in root.state_dict().values())
                outcomes["loaded" if finite else "WRONG"] += 1
            except REFUSALS as error:
                same = all(map(torch.equal, before, bits(root)))
                outcomes["refused" if same else "WRONG"] += 1
                if not same:
                    print(f"seed {seed_of_trial}: a refused file changed the model: {error}")
            except Exception as error:  # noqa: BLE001
                outcomes["WRONG"] += 1
                print(f"seed {seed_of_trial}: {type(error).__name__}: {error}")
    return outcomes


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes = run(args.trials, args.seed)
    print(f"{sum(outcomes.values())} files: {dict(outcomes)}")
    return int(outcomes["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
