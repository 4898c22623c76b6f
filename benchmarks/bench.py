"""Benchmarks of rasa_ext against the frozen model, PEFT LoRA and the RaSA authors' formula, as they
published it and under torch.compile.

    python benchmarks/bench.py step --quick                     # a whole training step, 5 minutes
    python benchmarks/bench.py step --full                      # all 30 layers, more rounds
    python benchmarks/bench.py layer --suite                    # layers of three models, 15 minutes
    python benchmarks/bench.py layer                            # single linears, for kernel tuning
    python benchmarks/bench.py layer --shape 512,576,1536 --dtype bf16 --dropout 0
    python benchmarks/bench.py merge                            # all updates into the weights
    python benchmarks/bench.py parts                            # what dropout, siblings … cost

Peers run interleaved; ratios are medians (min-max) of per-round quotients.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import layer
import merge
import parts
import peak_memory
import step
import torch
from peers import PEERS, Adapter
from report import heading, timing_path, write_json
from tables import figures_table, layer_table, merge_table, parts_table, step_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The four distinct linears of SmolLM2-135M at 4x128 tokens: q and o, k and v, gate and up, down.
SMOLLM2_SHAPES = [(512, 576, 576), (512, 576, 192), (512, 576, 1536), (512, 1536, 576)]
# Linears of SmolLM2-135M, TinyLlama-1.1B and Llama-8B: K, N.
SUITE_LINEARS = [
    *((576, 576), (576, 1536), (1536, 576)),
    *((2048, 2048), (2048, 5632)),
    *((4096, 4096), (4096, 14336)),
]
SUITE_TOKENS = (128, 512, 2048)
SUITE_SECONDS = 5.0  # for one row, where that gives 5 rounds
SUITE_COMPILED_TOKENS = 512  # compiling takes seconds for each row

# Pools stay those of 30 layers (R = 37), and the vocabulary shrinks with the depth.
QUICK_LAYERS = 8


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read M,K,N."""
    try:
        M, K, N = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected M,K,N as in 512,576,1536, got {text}") from None
    return M, K, N


def parse_peers(text: str) -> list[str]:
    """Read a list of peers; frozen, which every ratio needs, is always the first."""
    names = text.split(",")
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name}, choose from {','.join(PEERS)}")
    return ["frozen", *(name for name in names if name != "frozen")]


def adapter_dtype(args: argparse.Namespace, dtype: str) -> torch.dtype:
    """Return the dtype of the trained tensors, the same in every peer."""
    return torch.float32 if args.fp32_adapters else DTYPES[dtype]


def describe(settings: dict[str, object]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def run_layer(args: argparse.Namespace) -> None:
    """Time single linears and print one row for each dtype, dropout and shape."""
    results = []
    shapes, seconds, path = args.shape or SMOLLM2_SHAPES, math.inf, args.json
    if args.suite:
        shapes = [(M, K, N) for K, N in SUITE_LINEARS for M in SUITE_TOKENS]
        seconds, path = SUITE_SECONDS, args.json or timing_path("linears")
    for dtype, dropout in itertools.product(args.dtype, args.dropout):
        adapter = Adapter(
            ("proj",), args.r, args.k, args.alpha, dropout, adapter_dtype(args, dtype)
        )
        for shape in shapes:
            skipped = "compiled" if args.suite and shape[0] != SUITE_COMPILED_TOKENS else None
            peers = [name for name in args.peers if name != skipped]
            results.append(
                layer.measure(
                    shape, DTYPES[dtype], adapter, args.layers, peers, args.rounds, seconds
                )
            )
    settings = {name: getattr(args, name) for name in ("r", "k", "layers", "rounds")}
    settings["adapter_dtype"] = "float32" if args.fp32_adapters else "as the weights"
    print(heading())
    print("forward + backward of one linear; median (min-max);", describe(settings))
    print("MiB: allocated by torch at most")
    print(layer_table(results, settings))
    if path:
        write_json(path, {"subject": "layer", **settings}, {"results": results})


def run_step(args: argparse.Namespace) -> None:
    """Time whole training steps; print times, and the quotients beside the figures to reach."""
    layers = args.layers or (step.MODEL_LAYERS if args.full else QUICK_LAYERS)
    results = {}
    for dtype in args.dtype:
        adapters = [
            Adapter(step.TARGETS, args.r, args.k, args.alpha, p, adapter_dtype(args, dtype))
            for p in args.dropout
        ]
        results[dtype] = step.measure(DTYPES[dtype], adapters, args.peers, layers, args.rounds)
        results[dtype]["memory"] = {
            name: peak_memory.measure(name, DTYPES[dtype], adapters[0], layers)
            for name in args.peers
        }
    settings = {name: getattr(args, name) for name in ("r", "k", "rounds")} | {
        "layers": layers,
        "vocabulary": step.vocabulary(layers),
        "batch": list(step.BATCH),
        "adapter_dtype": "float32" if args.fp32_adapters else "as the weights",
        "memory_dropout": args.dropout[0],
    }
    print(heading())
    print("training step with optimizer; median (min-max);", describe(settings))
    print("MiB at most: resident in the process, and allocated by torch")
    print(step_table(results, args.dropout[0]))
    print("\nPer-round quotients beside the figures to reach (r=8, k=1):")
    print(figures_table(results))
    path = args.json or timing_path(f"step_{layers}_layers")
    write_json(path, {"subject": "step", **settings}, {"results": results})


def run_merge(args: argparse.Namespace) -> None:
    """Time merging a whole model, and print one row for each dtype and peer."""
    results = [
        merge.measure(DTYPES[dtype], args.layers, args.r, args.k, args.rounds)
        for dtype in args.dtype
    ]
    settings = {name: getattr(args, name) for name in ("r", "k", "layers", "rounds")}
    print(heading())
    print("merging seven linears of each layer; median (min-max);", describe(settings))
    print(merge_table(results))
    path = args.json or timing_path("merge")
    write_json(path, {"subject": "merge", **settings}, {"results": results})


def run_parts(args: argparse.Namespace) -> None:
    """Time two siblings with parts of rasa_ext left out, and print one row for each variant."""
    results = [parts.measure(DTYPES[dtype], args.dropout, args.rounds) for dtype in args.dtype]
    shape = {name: getattr(parts, name) for name in ("M", "K", "N", "LAYERS", "RP", "RS")}
    settings = {"dropout": args.dropout, "rounds": args.rounds, **shape}
    print(heading())
    print("forward + backward of siblings; median (min-max);", describe(settings))
    print(parts_table(results))
    path = args.json or timing_path("parts")
    write_json(path, {"subject": "parts", **settings}, {"results": results})


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every subcommand."""
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.05, 0.0])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument(
        "--peers",
        type=parse_peers,
        help=f"comma-separated, from {','.join(PEERS)}; frozen always runs. Default: all, but of "
        "single linears compiled, which takes seconds to compile for each row, only with --suite",
    )
    parser.add_argument(
        "--fp32-adapters",
        action="store_true",
        help="train the adapters in float32 under bf16 weights, in every peer",
    )
    parser.add_argument("--threads", type=int, default=None, help="torch's threads")


def main() -> None:
    """Read the command line and run the subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    single = commands.add_parser("layer", help="time single linears")
    add_common(single)
    which = single.add_mutually_exclusive_group()
    which.add_argument("--suite", action="store_true", help="the layers of three models")
    which.add_argument(
        "--shape",
        nargs="+",
        type=parse_shape,
        metavar="M,K,N",
        default=None,
        help="default: the four linears of SmolLM2-135M at 512 tokens",
    )
    single.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    single.add_argument("--layers", type=int, default=30, help="layers that share the pool")
    single.add_argument("--rounds", type=int, default=15)
    single.add_argument("--json", type=Path, default=None)
    single.set_defaults(run=run_layer)

    whole = commands.add_parser("step", help="time a whole training step")
    add_common(whole)
    size = whole.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{QUICK_LAYERS} layers (the default)")
    size.add_argument("--full", action="store_true", help=f"all {step.MODEL_LAYERS} layers")
    whole.add_argument("--layers", type=int, help="another number of layers")
    whole.add_argument("--rounds", type=int, default=9)
    whole.add_argument("--json", type=Path, help="default: a file of this machine in results/")
    whole.set_defaults(run=run_step, device="cpu")

    whole_model = commands.add_parser("merge", help="time merging a whole model")
    whole_model.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    whole_model.add_argument("--r", type=int, default=8)
    whole_model.add_argument("--k", type=int, default=1)
    whole_model.add_argument("--layers", type=int, default=step.MODEL_LAYERS)
    whole_model.add_argument("--rounds", type=int, default=9)
    whole_model.add_argument("--threads", type=int, default=None, help="torch's threads")
    whole_model.add_argument(
        "--json", type=Path, help="default: a file of this machine in results/"
    )
    whole_model.set_defaults(run=run_merge, device="cpu")

    siblings = commands.add_parser("parts", help="time siblings with parts of rasa_ext left out")
    siblings.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    siblings.add_argument("--dropout", type=float, default=0.05)
    siblings.add_argument("--rounds", type=int, default=25)
    siblings.add_argument("--threads", type=int, default=None, help="torch's threads")
    siblings.add_argument("--json", type=Path, help="default: a file of this machine in results/")
    siblings.set_defaults(run=run_parts, device="cpu")

    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if vars(args).get("peers", ()) is None:
        compiles = args.command == "step" or args.suite
        args.peers = [name for name in PEERS if compiles or name != "compiled"]
    with torch.device(args.device):
        args.run(args)


if __name__ == "__main__":
    main()
