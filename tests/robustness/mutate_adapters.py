"""Loads adapter files that were damaged at random.

    python tests/robustness/mutate_adapters.py --trials 5000 --seed 1

A damaged file is either refused with one of the errors that load_adapter documents, and the model
is as it was to the bit, or only numbers were damaged: they are finite, and the model holds them.
Every fourth file is loaded into a plain model, which a refused one leaves without adapters.
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
from safetensors.torch import load_file
from torch import nn

import rasa_ext

REFUSALS = (ValueError, RuntimeError, TypeError, FileNotFoundError, IsADirectoryError)
KINDS = ("bits", "header bits", "truncate", "extend", "length", "header", "shuffle")


def plain_model() -> nn.Module:
    """Three layers."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(24, 16)}) for i in range(3)})
    return nn.ModuleDict({"layers": layers})


def adapted_model() -> nn.Module:
    """The same, adapted."""
    root = plain_model()
    rasa_ext.apply(root, r=4, k=1, target_modules=["q"])
    for parameter in root.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return root


def mutate(data: bytes, kind: str, rng: random.Random) -> bytes:
    """Return the file with one thing wrong."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
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
        other = rng.choice([n for n in names if n != name])
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


def bits(root: nn.Module) -> dict[str, torch.Tensor]:
    """Every number of the model, copied."""
    return {name: t.detach().clone().view(torch.int32) for name, t in root.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and, under each, the same tensor to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def try_to_load(root: nn.Module, path: Path) -> str:
    """Return "loaded" or "refused"; raise AssertionError for what may not happen."""
    before = bits(root)
    try:
        rasa_ext.load_adapter(root, path)
    except REFUSALS as error:
        assert same(before, bits(root)), f"a refused file changed the model: {error}"
        return "refused"
    assert all(t.isfinite().all() for t in root.state_dict().values()), "loaded what is not finite"
    again = path.with_name("again.safetensors")
    rasa_ext.save_adapter(root, again)
    assert same(load_file(path), load_file(again)), "the model does not hold the file's numbers"
    return "loaded"


def run(trials: int, seed: int) -> Counter[str]:
    """Mutate and load; WRONG are failures."""
    adapted, plain = adapted_model(), plain_model()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        rasa_ext.save_adapter(adapted, path)
        good = path.read_bytes()
        for seed_of_trial in range(seed, seed + trials):
            rng = random.Random(seed_of_trial)
            kind = rng.choice(KINDS)
            path.write_bytes(mutate(good, kind, rng))
            is_plain = seed_of_trial % 4 == 0
            try:
                outcome = try_to_load(plain if is_plain else adapted, path)
                outcomes[f"{kind} {outcome}"] += 1
                if is_plain and outcome == "loaded":
                    plain = plain_model()
            except Exception as error:  # noqa: BLE001
                outcomes["WRONG"] += 1
                print(f"seed {seed_of_trial}, {kind}: {type(error).__name__}: {error}")
                adapted, plain = adapted_model(), plain_model()
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
