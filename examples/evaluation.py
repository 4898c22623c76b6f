"""How well a model does on problems it was not trained on."""

from __future__ import annotations

import sys

import torch
from gsm_symbolic import IGNORED, Batch, GsmSymbolic
from torch import Tensor, nn
from torch.nn import functional as F

# What a reply may have beyond the longest worked answer; it is scored as it stands at that length.
SPARE_TOKENS = 32
# Problems answered at once: writing a token reads all weights, however many there are.
ANSWER_BATCH = 48


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the answer tokens, and their number."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    labels = batch.labels[:, 1:].flatten()
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
    )
    return loss, batch.answers


@torch.inference_mode()
def held_out_loss(model: nn.Module, data: GsmSymbolic, device: torch.device) -> float:
    """Return the mean cross-entropy per answer token."""
    from tqdm import tqdm

    model.eval()
    total, tokens = 0.0, 0
    batches = list(data.held_out_batches())
    for batch in tqdm(batches, desc="Held-out loss", unit="batch", leave=False, file=sys.stdout):
        loss, count = answer_loss(model, batch.to(device))
        total, tokens = total + loss.item(), tokens + count
    return total / tokens


@torch.inference_mode()
def exact_match(
    model: nn.Module, data: GsmSymbolic, device: torch.device, problems: int
) -> tuple[float, str]:
    """Return the share of right final numbers, greedily decoded, and the first reply."""
    model.eval()
    tokenizer = data.tokenizer
    right, first_reply = 0, ""
    examples = data.held_out[:problems]
    longest = max(len(example.answer) for example in data.held_out)
    for start in range(0, len(examples), ANSWER_BATCH):
        chunk = examples[start : start + ANSWER_BATCH]
        input_ids, attention_mask = (t.to(device) for t in data.prompts(chunk))
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=longest + SPARE_TOKENS,
            do_sample=False,
            pad_token_id=data.pad_token,
            eos_token_id=tokenizer.eos_token_id,
        )
        replies = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        first_reply = first_reply or replies[0]
        right += sum(data.is_correct(e, reply) for e, reply in zip(chunk, replies, strict=True))
    return right / max(len(examples), 1), first_reply
