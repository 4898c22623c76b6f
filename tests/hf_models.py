"""Tiny random models of the transformers library: three ways of naming and storing linears."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
from models import authors_layer
from torch import Tensor, nn

from rasa_ext.injection import Summary, apply
from rasa_ext.module import RaSALinear

LAYERS, VOCABULARY = 3, 40
# c_proj names two shapes in GPT-2, whose linears are Conv1D; BERT has a "dense" in many places.
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "bert": ("query", "value", "intermediate.dense"),
}


def language_model(kind: str) -> nn.Module:
    """Return the model of this kind; the same weights at each call."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "llama":
        config = t.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return t.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_head": 2}
        special = {"bos_token_id": 0, "eos_token_id": 1}
        return t.GPT2LMHeadModel(t.GPT2Config(**sizes, **special, n_layer=LAYERS)).eval()
    assert kind == "bert"
    config = t.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
    )
    return t.BertForMaskedLM(config).eval()


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def adapt(model: nn.Module, kind: str, r: int = 4, k: int = 1, **kwargs) -> Summary:
    return apply(model, r=r, k=k, target_modules=TARGETS[kind], **kwargs)


def train(model: nn.Module, steps: int = 4) -> nn.Module:
    """Train the adapters for a few steps that move every one of their tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for step in range(steps):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def authors_model(model: nn.Module) -> nn.Module:
    """Return a copy whose adapted layers compute the authors' formula in plain torch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, RaSALinear):
            module.forward = partial(authors_layer, module)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits as rows."""
    return model(input_ids=ids).logits.flatten(0, 1)


def byte_llama(folder: Path) -> Path:
    """Save a tiny random Llama that reads bytes, with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
