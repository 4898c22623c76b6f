"""Grade-school mathematics without a download: reasoning-gym's gsm_symbolic writes the problems.

Each problem has a worked answer, which ends in `#### number`. Training problem n depends on the
seed and n alone, so training can stop anywhere and go on with the very next problem.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# reasoning-gym draws problem i of a dataset from seed + i: datasets this far apart share no draw.
SEED_DISTANCE = 10**9
# cross_entropy leaves these labels out.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One problem as token ids; `entry` is reasoning-gym's record of it."""

    prompt: list[int]
    answer: list[int]
    entry: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Padded to the longest example; labels are IGNORED on prompt and padding."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def answers(self) -> int:
        """How many tokens have a label; none predicts the first."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        tensors = (self.input_ids, self.attention_mask, self.labels)
        return Batch(*(tensor.to(device) for tensor in tensors))


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Return the question in the model's chat format, or plainly if it has none."""
    if tokenizer.chat_template is None:
        return tokenizer(f"Question: {question}\nAnswer:\n").input_ids
    message = {"role": "user", "content": question}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def collate(examples: list[Example], pad_token: int) -> Batch:
    """Pad examples on the right into one batch."""
    length = max(len(e.prompt) + len(e.answer) for e in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_token)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, e in enumerate(examples):
        used = len(e.prompt) + len(e.answer)
        input_ids[row, :used] = torch.tensor(e.prompt + e.answer)
        labels[row, len(e.prompt) : used] = torch.tensor(e.answer)
        attention_mask[row, :used] = 1
    return Batch(input_ids, attention_mask, labels)


def pad_token(tokenizer: Any) -> int:
    """Return what fills the places that attention_mask and labels hide."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def final_answer(reply: str) -> str | None:
    """Return the number after the first `####`, else the last number of the reply."""
    marked = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", reply)
    numbers = [marked[1]] if marked else re.findall(r"-?\d[\d,]*(?:\.\d+)?", reply)
    return numbers[-1].replace(",", "") if numbers else None


class GsmSymbolic:
    """Training batches by step, and held-out problems that no training batch contains.

    Problems longer than `max_tokens` are left out, never cut: a cut answer would teach nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seed: int,
        max_tokens: int,
        batch_size: int,
        held_out: int,
        held_out_seed: int | None = None,
    ) -> None:
        """Draw the held-out problems; training problems are drawn as they are needed.

        held_out_seed: of the held-out problems, where several seeds shall have the same ones.
        """
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.held_out: list[Example] = []
        questions: set[str] = set()
        first = seed if held_out_seed is None else held_out_seed
        for example in self._examples(first + SEED_DISTANCE):
            if len(self.held_out) == held_out:
                break
            if example.entry["question"] not in questions:
                questions.add(example.entry["question"])
                self.held_out.append(example)
        self._held_out_questions = frozenset(questions)
        self._stream = self._training_examples(seed)
        self._training: list[Example] = []

    def training_batches(self, step: int, parts: int) -> list[Batch]:
        """Return the problems of this step in `parts` batches: the same whenever asked for."""
        end = (step + 1) * self.batch_size
        self._training.extend(itertools.islice(self._stream, end - len(self._training)))
        examples = self._training[end - self.batch_size : end]
        return [self.collate(examples[part::parts]) for part in range(parts)]

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield the held-out problems with their answers."""
        for start in range(0, len(self.held_out), self.batch_size):
            yield self.collate(self.held_out[start : start + self.batch_size])

    def collate(self, examples: list[Example]) -> Batch:
        """Pad examples on the right into one batch."""
        return collate(examples, self.pad_token)

    @property
    def pad_token(self) -> int:
        """Fills what attention_mask and labels hide."""
        return pad_token(self.tokenizer)

    def prompts(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Return (input_ids, attention_mask) of the questions alone, padded on the left."""
        length = max(len(e.prompt) for e in examples)
        input_ids = torch.full((len(examples), length), self.pad_token)
        attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
        for row, e in enumerate(examples):
            input_ids[row, length - len(e.prompt) :] = torch.tensor(e.prompt)
            attention_mask[row, length - len(e.prompt) :] = 1
        return input_ids, attention_mask

    def is_correct(self, example: Example, reply: str) -> bool:
        """Return whether reasoning-gym's scorer finds the reply's final number exactly right."""
        return self._scorer.score_answer(final_answer(reply), example.entry) == 1.0

    def _examples(self, seed: int) -> Iterator[Example]:
        """Yield the problems of one seed that fit, without end."""
        import reasoning_gym

        chunk = 1000
        for start in itertools.count(0, chunk):
            dataset = reasoning_gym.create_dataset("gsm_symbolic", seed=seed + start, size=chunk)
            self._scorer = dataset
            for entry in dataset:
                answer = entry["metadata"]["answer_cot"]
                example = Example(
                    prompt_ids(self.tokenizer, entry["question"]),
                    [
                        *self.tokenizer(answer, add_special_tokens=False).input_ids,
                        self.tokenizer.eos_token_id,
                    ],
                    entry,
                )
                if len(example.prompt) + len(example.answer) <= self.max_tokens:
                    yield example

    def _training_examples(self, seed: int) -> Iterator[Example]:
        for example in self._examples(seed):
            if example.entry["question"] not in self._held_out_questions:
                yield example
