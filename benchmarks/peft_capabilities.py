"""What of PEFT works with RaSA: each function run on a tiny Llama, beside LoRA as the yardstick.

    python benchmarks/peft_capabilities.py

prints one line for each capability (yes, or no with the reason), and writes the table and a JSON
file to results/.
A probe checks what it did; that LoRA passes it shows that the probe itself is sound.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils.hotswap import hotswap_adapter
from report import RESULTS, heading, table, write_json
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rasa_ext.peft import RaSAConfig

LAYERS, PROJECTIONS = 3, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Method:
    """A method's configuration, and how to make its start random instead of an identity."""

    config_class: type[peft.PeftConfig]
    random: dict[str, Any]

    def config(self, **kwargs: Any) -> peft.PeftConfig:
        """A configuration of rank 4 for five kinds of layers."""
        return self.config_class(**{"r": 4, "target_modules": PROJECTIONS} | kwargs)

    def model(self, base: nn.Module | None = None, **kwargs: Any) -> Any:
        """A tiny Llama with one adapter that does something, in evaluation mode."""
        base = llama() if base is None else base
        torch.manual_seed(0)
        config = self.config(**self.random | kwargs)
        return peft.get_peft_model(base, config).eval()


METHODS = {
    "RaSA": Method(RaSAConfig, {"init_weights": False}),
    "LoRA": Method(peft.LoraConfig, {"init_lora_weights": False}),
}


def llama() -> nn.Module:
    """A tiny random model; the same weights at each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Its logits of two sequences."""
    return model(input_ids=IDS).logits


def loss(model: nn.Module) -> Tensor:
    """Its loss on them, for gradients."""
    return model(input_ids=IDS, labels=IDS).loss


def difference(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance."""
    return ((a - b).norm() / b.norm()).item()


def check(condition: bool, what: str) -> None:
    """Raise unless condition holds."""
    if not condition:
        raise AssertionError(what)


@contextmanager
def saved(model: Any) -> Iterator[Path]:
    """A folder that the model is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


# --- probes: each returns a note, or raises ------------------------------------------------------


def on_layer(layer: Callable[[], nn.Module]) -> Callable[[Method], str]:
    """Adapt one layer."""

    def probe(method: Method) -> str:
        model = method.model(nn.Sequential(layer()), target_modules=["0"])
        check(
            any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in model.modules()), ""
        )
        return ""

    return probe


def target_parameters(method: Method) -> str:
    """Adapt a parameter that belongs to no layer."""
    method.model(target_modules=[], target_parameters=["q_proj.weight"])
    return ""


def option(**kwargs: Any) -> Callable[[Method], str]:
    """Train with an option of the configuration."""

    def probe(method: Method) -> str:
        bias = {"bias": method.config_class.__name__[:4].lower() + "_only"}
        model = method.model(**bias if "bias" in kwargs else kwargs)
        loss(model).backward()
        return f"{len(model.base_model.targeted_module_names)} layers"

    return probe


def saves_what_it_trains(method: Method) -> str:
    """Save, and compare bytes."""
    model = method.model()
    with saved(model) as folder:
        data = (folder / "adapter_model.safetensors").read_bytes()
        check((folder / "adapter_config.json").exists(), "no adapter_config.json")
        check((folder / "README.md").exists(), "no model card")
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ratio = (len(data) - 8 - int.from_bytes(data[:8], "little")) / trained
    check(ratio == 1, f"{ratio:.2f} x the trained bytes")
    return f"{ratio:.2f} x the trained bytes"


def loads(**kwargs: Any) -> Callable[[Method], str]:
    """Save and load; the error must be 0."""

    def probe(method: Method) -> str:
        model = method.model()
        with saved(model) as folder:
            loaded = peft.PeftModel.from_pretrained(llama(), folder, **kwargs).eval()
        error = difference(logits(loaded), logits(model))
        check(error == 0, f"error {error:.1e}")
        return "error 0"

    return probe


def adapters(method: Method) -> str:
    """Add, switch, load and delete; the first adapter must stay what it was."""
    model = method.model()
    first = logits(model)
    model.add_adapter("other", method.config(**method.random))
    model.set_adapter("other")
    check(not torch.equal(logits(model), first), "set_adapter changed nothing")
    with saved(model) as folder:
        model.load_adapter(folder / "other", "third")
        other = logits(model)
        model.set_adapter("third")
        check(torch.equal(logits(model), other), "the loaded adapter differs")
    model.delete_adapter("other")
    model.delete_adapter("third")
    model.set_adapter("default")
    check(torch.equal(logits(model), first), "the first adapter changed")
    return ""


def several_active(method: Method) -> str:
    """Two adapters at once, both acting."""
    model = method.model()
    model.add_adapter("other", method.config(**method.random))
    alone = [logits(model), model.set_adapter("other") or logits(model)]
    model.base_model.set_adapter(["default", "other"])
    check(all(not torch.equal(logits(model), one) for one in alone), "one adapter does not act")
    return ""


def disabling(method: Method) -> str:
    """Disable in a context and return."""
    model = method.model()
    with model.disable_adapter():
        check(torch.equal(logits(model), logits(llama())), "not the base model")
    check(not torch.equal(logits(model), logits(llama())), "stays disabled")
    return ""


def merging(method: Method) -> str:
    """Merge and take back."""
    model = method.model()
    before = logits(model)
    model.merge_adapter()
    merged = difference(logits(model), before)
    model.unmerge_adapter()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    original = llama().model.layers[0].self_attn.q_proj.weight
    check(merged < 1e-5, f"merged differs by {merged:.1e}")
    exact = "exact" if torch.equal(weight, original) else f"{difference(weight, original):.0e}"
    return f"merge error {merged:.0e}, unmerged weight {exact}"


def merge_and_unload(method: Method) -> str:
    """Merge into a plain model."""
    model = method.model()
    before = logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    check(type(plain) is transformers.LlamaForCausalLM, "not the base model's class")
    check(difference(logits(plain), before) < 1e-5, "another function")
    return ""


def safe_merge(method: Method) -> str:
    """NaN must be refused."""
    model = method.model()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        return "NaN refused"
    raise AssertionError("NaN merged")


def unload(method: Method) -> str:
    """Take every adapter off."""
    check(torch.equal(logits(method.model().unload()), logits(llama())), "not the base model")
    return ""


def to_lora(method: Method) -> str:
    """Convert to a LoRA of the full rank."""
    model = method.model()
    with tempfile.TemporaryDirectory() as folder:
        peft.save_as_lora(folder, model, rank=LAYERS + 3)
        lora = peft.PeftModel.from_pretrained(llama(), folder)
    error = difference(logits(lora), logits(model))
    check(error < 1e-4, f"error {error:.0e}")
    return f"rank {LAYERS + 3}, error {error:.0e}"


def checkpointing(use_reentrant: bool) -> Callable[[Method], str]:
    """Compare gradients with and without."""

    def probe(method: Method) -> str:
        base = llama()
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        gradients = []
        for model in (method.model(), method.model(base)):
            torch.manual_seed(0)
            loss(model.train()).backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        worst = max(difference(a, b) for a, b in zip(*gradients, strict=True))
        check(worst < 1e-5, f"gradients differ by {worst:.0e}")
        return ""

    return probe


def autocast(method: Method) -> str:
    """A step in bfloat16."""
    model = method.model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(model)
    out.backward()
    check(all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad), "not finite")
    return ""


def half_model(method: Method) -> str:
    """A bfloat16 model."""
    model = method.model(llama().bfloat16())
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    check(logits(model).dtype == torch.bfloat16, "logits are not bfloat16")
    return f"bfloat16 base, {', '.join(dtypes)} adapter"


def compiled(method: Method) -> str:
    """One graph, same function."""
    model = method.model()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    check(difference(logits(fast), logits(model)) < 1e-5, "another function")
    return "one graph"


def copies(method: Method) -> str:
    """Same function, no more parameters."""
    model = method.model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(torch.equal(logits(twin), logits(model)), "another function")
        check(len(list(twin.parameters())) == len(list(model.parameters())), "more parameters")
    return ""


def status(method: Method) -> str:
    """Read the status."""
    model = method.model()
    layer = model.get_layer_status()[0].module_type
    return f"{model.get_model_status().num_adapter_layers} layers, {layer}"


def generation(method: Method) -> str:
    """Generate three tokens."""
    model = method.model(task_type="CAUSAL_LM")
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return ""


def trainer(method: Method) -> str:
    """Two steps and a checkpoint."""
    model = method.model(task_type="CAUSAL_LM").train()
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
        check(
            (Path(folder) / "checkpoint-2" / "adapter_model.safetensors").exists(), "no checkpoint"
        )
    return ""


def mixed_batch(method: Method) -> str:
    """Another adapter for each row."""
    model = method.model()
    model.add_adapter("other", method.config(**method.random))
    with torch.no_grad():
        both = model(input_ids=IDS, adapter_names=["default", "other"]).logits
    check(difference(both[0], logits(model)[0]) < 1e-5, "the first row differs")
    model.set_adapter("other")
    check(difference(both[1], logits(model)[1]) < 1e-5, "the second row differs")
    return ""


def mixed_model(method: Method) -> str:
    """Beside other methods."""
    peft.PeftMixedModel(llama(), method.config())
    return ""


def weighted(method: Method) -> str:
    """A sum of two adapters as a third."""
    model = method.model()
    model.add_adapter("other", method.config(**method.random))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    return ""


def hotswap(method: Method) -> str:
    """Load into the place of another."""
    model = method.model()
    with saved(model) as folder:
        hotswap_adapter(model, str(folder), "default")
    return ""


def injection(method: Method) -> str:
    """Inject without the tuner."""
    peft.inject_adapter_in_model(method.config(), llama())
    return ""


PROBES: dict[str, Callable[[Method], str]] = {
    "adapts nn.Linear": on_layer(lambda: nn.Linear(16, 16)),
    "adapts transformers Conv1D": on_layer(lambda: Conv1D(16, 16)),
    "adapts nn.Embedding": on_layer(lambda: nn.Embedding(16, 16)),
    "adapts nn.Conv2d": on_layer(lambda: nn.Conv2d(16, 16, 3)),
    "adapts nn.MultiheadAttention": on_layer(lambda: nn.MultiheadAttention(16, 2)),
    "target_parameters": target_parameters,
    "target_modules='all-linear'": option(target_modules="all-linear"),
    "layers_to_transform": option(layers_to_transform=[0, 2]),
    "exclude_modules": option(exclude_modules=["k_proj"]),
    "rank_pattern, alpha_pattern": option(rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 2}),
    "modules_to_save": option(modules_to_save=["lm_head"]),
    "trainable_token_indices": option(trainable_token_indices=[1, 2]),
    "bias='<method>_only'": option(bias=True),
    "save_pretrained": saves_what_it_trains,
    "from_pretrained": loads(),
    "from_pretrained(low_cpu_mem_usage)": loads(low_cpu_mem_usage=True),
    "add, load, set, delete_adapter": adapters,
    "several active adapters": several_active,
    "disable_adapter": disabling,
    "merge_adapter, unmerge_adapter": merging,
    "merge_and_unload": merge_and_unload,
    "safe_merge": safe_merge,
    "unload": unload,
    "save_as_lora": to_lora,
    "checkpointing, non-reentrant": checkpointing(False),
    "checkpointing, reentrant": checkpointing(True),
    "autocast": autocast,
    "16-bit model": half_model,
    "torch.compile(fullgraph)": compiled,
    "deepcopy, pickle": copies,
    "get_model_status": status,
    "generate": generation,
    "transformers Trainer": trainer,
    "adapter_names in a batch": mixed_batch,
    "PeftMixedModel": mixed_model,
    "add_weighted_adapter": weighted,
    "hotswap_adapter": hotswap,
    "inject_adapter_in_model": injection,
}


def run(probe: Callable[[Method], str], method: Method) -> dict[str, Any]:
    """The probe's answer; whatever it raises is a no, with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return {"works": True, "note": probe(method)}
        except Exception as error:
            first = str(error).partition("\n")[0]
            return {"works": False, "note": f"{type(error).__name__}: {first}"}


def main() -> None:
    """Run every probe on every method; print and write the answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "peft_capabilities.json")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    results = {
        name: {label: run(probe, method) for label, method in METHODS.items()}
        for name, probe in PROBES.items()
    }
    rows = [
        [name, *("yes" if of[label]["works"] else "no" for label in METHODS), of["RaSA"]["note"]]
        for name, of in results.items()
    ]
    text = f"{heading()}\n\n{table(['capability', *METHODS, 'note on RaSA'], rows)}\n"
    print(text)
    write_json(args.json, {"subject": "peft_capabilities"}, {"results": results})
    args.json.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
