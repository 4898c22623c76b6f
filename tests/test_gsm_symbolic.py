"""The demo's problems: drawn alike by every run, cut into batches, and scored."""

import sys
from pathlib import Path

import pytest
import torch
from hf_models import byte_llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import gsm_symbolic  # noqa: E402
from gsm_symbolic import IGNORED, GsmSymbolic, final_answer  # noqa: E402
from language_model import load_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(byte_llama(tmp_path_factory.mktemp("tiny_llama")))


def problems(tokenizer, seed=0):
    return GsmSymbolic(tokenizer, seed=seed, max_tokens=500, batch_size=2, held_out=40)


def test_training_contains_no_held_out_problem(tokenizer, monkeypatch):
    # Held-out and training problems of one seed are as close as they can be: the same stream.
    monkeypatch.setattr(gsm_symbolic, "SEED_DISTANCE", 0)
    data = problems(tokenizer)
    held_out = {tuple(example.prompt) for example in data.held_out}
    data.training_batches(30, 1)
    assert len(held_out) == 40
    assert not held_out & {tuple(example.prompt) for example in data._training}


def test_batch_depends_on_seed_and_step_alone(tokenizer):
    first, second, other = problems(tokenizer), problems(tokenizer), problems(tokenizer, seed=7)
    first.training_batches(0, 1)
    (batch,), (again,), (of_seed_7,) = (
        data.training_batches(5, 1) for data in (first, second, other)
    )
    assert torch.equal(batch.input_ids, again.input_ids)
    assert of_seed_7.input_ids.shape != batch.input_ids.shape or not torch.equal(
        of_seed_7.input_ids, batch.input_ids
    )


def test_parts_of_a_batch_are_the_batch(tokenizer):
    data = problems(tokenizer)
    (whole,) = data.training_batches(3, 1)
    parts = data.training_batches(3, 2)
    assert [len(part.input_ids) for part in parts] == [1, 1]
    assert whole.answers == sum(part.answers for part in parts)
    assert (whole.labels != IGNORED).sum() == whole.answers
    for row, part in enumerate(parts):
        length = part.input_ids.shape[1]
        assert torch.equal(part.input_ids[0], whole.input_ids[row, :length])


def test_only_answers_have_labels(tokenizer):
    data = problems(tokenizer)
    example = data.held_out[0]
    batch = data.collate(data.held_out[:2])
    labels = batch.labels[0]
    assert labels[labels != IGNORED].tolist() == example.answer
    assert example.answer[-1] == tokenizer.eos_token_id
    assert (labels[: len(example.prompt)] == IGNORED).all()
    assert tokenizer.decode(example.prompt).endswith("Do not include units.\nAnswer:\n")


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("so 2 + 2 = 4\n#### 4", "4"),
        ("#### -1,234.5 apples, not 7", "-1234.5"),
        ("It costs 3 + 9 = 12 dollars.", "12"),
        ("#### $18", "18"),
        ("I do not know.", None),
    ],
)
def test_final_answer_is_the_marked_or_the_last_number(reply, number):
    assert final_answer(reply) == number


def test_scorer_takes_exact_numbers_only(tokenizer):
    data = problems(tokenizer)
    example = data.held_out[0]
    assert data.is_correct(example, example.entry["metadata"]["answer_cot"])
    assert not data.is_correct(example, f"#### {float(example.entry['answer']) + 1}")
    assert not data.is_correct(example, "I do not know.")
