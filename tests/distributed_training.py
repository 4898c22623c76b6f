"""Training steps of a tiny Llama in one process, and in two under each of torch's engines."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from hf_models import adapt, language_model, tokens
from process_group import leave_process_group
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from rasa_ext.export import export_to_lora
from rasa_ext.weights import load_adapter, save_adapter

ENGINES = ("ddp", "fsdp1", "fsdp2")
STEPS, ROWS, PROCESSES = 3, 4, 2
# Of the base model; the adapters are float64 and float32.
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def initial(dtype: torch.dtype, folder: Path) -> nn.Module:
    """Return the model of `folder`'s adapter, checkpointed (non-reentrantly)."""
    model = language_model("llama").to(dtype)
    load_adapter(model, folder / "initial.safetensors")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def write_initial(dtype: torch.dtype, folder: Path) -> None:
    """Write the adapter that training starts from."""
    from models import randomize_adapters

    model = language_model("llama").to(dtype)
    adapt(model, "llama", r=4, k=2)
    save_adapter(randomize_adapters(model), folder / "initial.safetensors")


def wrapped(model: nn.Module, engine: str) -> nn.Module:
    """Hand the model to an engine, as docs/distributed.md says."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "fsdp1":
        policy = ModuleWrapPolicy([type(model.model.layers[0])])
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module, rows: slice) -> list[float]:
    """Train on these rows of each step's batch; every row has as many tokens. Return the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        ids = tokens(ROWS, 8, seed=step)[rows]
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_parameters(model: nn.Module, engine: str):
    """FSDP1 gathers for a block; save_adapter gathers what FSDP2 sharded itself."""
    if engine != "fsdp1":
        return nullcontext()
    return FullyShardedDataParallel.summon_full_params(model, writeback=False)


def run(engine: str, folder: Path, dtype: torch.dtype) -> None:
    """Save as it was, train, save, load what was saved first, and save that again."""
    model = wrapped(initial(dtype, folder), engine)
    sharded = engine == "fsdp2"

    def save(name: str) -> None:
        with whole_parameters(model, engine):
            if sharded or dist.get_rank() == 0:
                save_adapter(model, folder / f"{engine}-{name}.safetensors")

    save("untrained")
    train(model, slice(dist.get_rank(), None, PROCESSES))
    save("trained")
    if sharded:
        export_to_lora(model, folder / f"{engine}-lora")
        load_adapter(model, folder / "initial.safetensors")
        save("reloaded")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, dtype in DTYPES.items():
        for engine in ENGINES:
            # One flat parameter of FSDP1 has one dtype.
            if (engine, name) != ("fsdp1", "bfloat16"):
                run(engine, Path(sys.argv[1]) / name, dtype)
    leave_process_group()
