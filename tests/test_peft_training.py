"""RaSA through PEFT in training: Trainer, checkpointing, autocast, torch.compile, accelerate."""

from __future__ import annotations

import warnings
from functools import partial

import peft
import pytest
import torch
from hf_models import tokens
from models import assert_as_accurate, randomize_adapters
from peft_models import (
    adapted,
    assert_same,
    authors_layer,
    base_model,
    config,
    layers,
    reload,
    trained,
)
from torch import nn


def gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The gradients of one step; the same dropout for the same seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_dropout(**kwargs) -> nn.Module:
    return adapted(dropout=0.3, **kwargs).train()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_changes_no_gradient(kind: str, use_reentrant: bool) -> None:
    expected = gradients(with_dropout(kind=kind))
    model = base_model(kind)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # get_peft_model makes the inputs require gradients, which reentrant checkpointing needs.
    model = randomize_adapters(peft.get_peft_model(model, config(kind, dropout=0.3))).train()
    assert model.is_gradient_checkpointing

    got = gradients(model)

    assert got.keys() == expected.keys() == trained(model).keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def under_autocast(forward, layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the layer's parameters as one vector."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = forward(x)
    grads = torch.autograd.grad(y.double().square().sum(), list(trained(layer).values()))
    return [y, torch.cat([gradient.flatten() for gradient in grads])]


@pytest.mark.parametrize("result", [0, 1], ids=["output", "gradients"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast_computes_as_accurately_as_plain_torch_under_autocast(kind, result) -> None:
    layer = layers(adapted(kind))[0]
    x = torch.randn(6, layer.in_features)

    out = under_autocast(layer, layer, x)[result]

    assert out.dtype == (torch.float32 if result else torch.bfloat16)
    assert_as_accurate(
        lambda x: under_autocast(layer, layer, x)[result],
        lambda layer, x: under_autocast(partial(authors_layer, layer), layer, x)[result],
        layer,
        x,
    )


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_layer_compiles_in_one_graph(k: int) -> None:
    layer = layers(adapted(k=k))[0]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    for rows in (3, 5):
        x = torch.randn(rows, 16)
        got = torch.autograd.grad(compiled(x).sum(), list(trained(layer).values()))
        expected = torch.autograd.grad(layer(x).sum(), list(trained(layer).values()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_compiled_model_trains_as_it_does_otherwise() -> None:
    expected = gradients(adapted())
    model = adapted()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()

    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])


class Repeated(torch.utils.data.Dataset):
    """A few fixed sequences, for Trainer."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = tokens(1, 8, seed=i % 4)[0]
        return {"input_ids": ids, "labels": ids}


def trainer(folder, model: nn.Module, max_steps: int, **kwargs):
    import transformers as t

    arguments = t.TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **kwargs,
    )
    return t.Trainer(model=model, args=arguments, train_dataset=Repeated())


def fresh(**kwargs) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(base_model(), config(dropout=0.05, **kwargs))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "bf16", "checkpointing"],
)
def test_trainer_lowers_the_loss_and_saves_what_it_trained(tmp_path, kwargs) -> None:
    run = trainer(tmp_path, fresh(), 8, save_steps=8, gradient_accumulation_steps=2, **kwargs)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}

    run.train()

    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])  # a frozen random model has little to lose
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    loaded = reload(tmp_path / "checkpoint-8")
    assert_same(loaded.state_dict(), run.model.state_dict())


def test_trainer_resumes_to_the_same_weights(tmp_path) -> None:
    whole = trainer(tmp_path, fresh(), 8, save_steps=4)
    whole.train()

    again = trainer(tmp_path, fresh(), 8, save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    assert again.state.global_step == 8
    assert_same(again.model.state_dict(), whole.model.state_dict())


def test_accelerate_prepares_saves_and_restores_it(tmp_path) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = fresh().train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(8):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator.save_state(str(tmp_path / "state"))
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()

    accelerator.load_state(str(tmp_path / "state"))

    assert_same(model.state_dict(), kept)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapter")
    assert_same(reload(tmp_path / "adapter").state_dict(), kept)
