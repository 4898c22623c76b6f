"""`bench.py step`: a whole training step of a language model of SmolLM2-135M's shape.

A step is forward with loss, backward, the optimizer (fused AdamW over the adapter; the frozen model
has none) and clearing the gradients. In every peer the embeddings' output requires grad, so that
backward runs through all layers, also in the frozen model. rasa computes q, k and v in one op, and
gate and up in another: apply() links them as siblings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from peers import (
    PEERS,
    Adapter,
    convert,
    copy_rasa_to_authors,
    exact_model,
    relative_error,
    require_accurate,
    unwrap,
)
from timing import interleave, paired_ratio, summary
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL_LAYERS = 30
MODEL_VOCABULARY = 49152
BATCH = (4, 128)  # sequences, tokens


def vocabulary(layers: int) -> int:
    """Shorten the vocabulary as the model, so that its share of a step stays what it is."""
    return MODEL_VOCABULARY * layers // MODEL_LAYERS


def smollm2_shape(dtype: torch.dtype, layers: int) -> nn.Module:
    """Build SmolLM2-135M with random weights (time does not depend on them) and all its layers.

    `layers` is how many build() keeps.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise SystemExit(
            f"bench: step needs transformers: pip install transformers ({error})"
        ) from error
    config = LlamaConfig(
        vocab_size=vocabulary(layers),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=MODEL_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def build(name: str, base: nn.Module, adapter: Adapter, layers: int) -> nn.Module:
    """Return the peer with its first `layers` layers; its pools are those of the whole model."""
    model = convert(name, base, adapter)
    decoder = unwrap(model).model
    decoder.layers = decoder.layers[:layers]
    decoder.embed_tokens.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Return a function that makes one step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def logits_and_gradient(
    model: nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the embeddings x, and what dy on them gives back on x."""
    logits = model(inputs_embeds=x).logits
    return logits, torch.autograd.grad(logits, x, dy)[0]


def check(models: dict[str, nn.Module], adapter: Adapter, dtype: torch.dtype) -> dict[str, float]:
    """Return the errors of logits and input gradient against float64; stop if one is too large."""
    x = torch.randn(1, 32, 576).to(dtype).requires_grad_()
    dy = torch.randn(1, 32, models["frozen"].config.vocab_size).to(dtype)
    errors = {}
    for name, model in models.items():
        outputs = logits_and_gradient(model.eval(), x, dy)
        exact = exact_model(name, models, adapter).eval()
        exact_x = x.detach().double().requires_grad_()
        expected = logits_and_gradient(exact, exact_x, dy.double())
        errors[name] = max(map(relative_error, outputs, expected))
        model.train()
    require_accurate(errors, dtype)
    return errors


def measure(
    dtype: torch.dtype,
    adapters: list[Adapter],
    peers: list[str],
    layers: int,
    rounds: int,
) -> dict[str, Any]:
    """Time every peer with every adapter setting, all of them interleaved.

    Keys of the result's times are "frozen" and "<peer> p=<dropout>".
    """
    if "compiled" in peers:
        torch.compiler.reset()  # once: it drops the code of all compiled peers
    base = smollm2_shape(dtype, layers)
    tokens = torch.randint(0, vocabulary(layers), BATCH)
    frozen = build("frozen", base, adapters[0], layers)
    runs = {"frozen": training_step(frozen, tokens)}
    errors: dict[str, float] = {}
    for adapter in adapters:
        models = {"frozen": frozen}
        models |= {name: build(name, base, adapter, layers) for name in PEERS[1:] if name in peers}
        if "rasa" in models and "authors" in models:
            copy_rasa_to_authors(models["rasa"], models["authors"], adapter)
        errors |= check(models, adapter, dtype)
        for name in list(models)[1:]:
            runs[f"{name} p={adapter.dropout:g}"] = training_step(models[name], tokens)
    seconds = interleave(runs, rounds)
    pairs = itertools.permutations(seconds, 2)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": errors,
        "seconds": {name: summary(times) for name, times in seconds.items()},
        "ratios": {f"{a} / {b}": paired_ratio(seconds, a, b) for a, b in pairs},
    }
