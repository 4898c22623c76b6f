"""The self-check passes on a sound build and fails on every kind of broken op."""

import subprocess
import sys

import pytest
import torch

from rasa_ext import ops, self_check


def test_the_command_prints_the_build_and_a_verdict(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "rasa_ext"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "cpu_capability: " in run.stdout
    assert run.stdout.endswith("rasa_ext self-check: passed\n")


def test_the_command_exits_with_1_on_a_broken_op(tmp_path):
    script = (
        "import runpy, torch, rasa_ext.ops as ops\n"
        "add = ops.rasa_add\n"
        "ops.rasa_add = lambda x, base, *rest, **options: add(x, base * 1.01, *rest, **options)\n"
        "runpy.run_module('rasa_ext', run_name='__main__')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "FAILED: cpu rasa_add" in run.stdout
    assert "comparisons FAILED" in run.stdout.splitlines()[-1]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


def one_wrong_element(y):
    flat = y.detach().clone().reshape(-1)
    flat[-1] += 1
    return y + (flat.reshape(y.shape) - y.detach())


BREAKAGES = {
    "one wrong element": one_wrong_element,
    "nan": lambda y: y * float("nan"),
    "wrong shape": lambda y: y[:-1],
    "wrong gradient": WrongGradient.apply,
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("name", ["rasa_linear", "rasa_add"])
def test_a_broken_layer_op_fails(name, breakage, monkeypatch):
    sound, spoil = getattr(ops, name), BREAKAGES[breakage]
    monkeypatch.setattr(ops, name, lambda *args, **kwargs: spoil(sound(*args, **kwargs)))
    checks = list(self_check.check_rasa(torch.float32, torch.float32, 0.25, "cpu"))
    assert any(check.op == name and not check.passed for check in checks)
    assert all(check.passed for check in checks if check.op != name)


@pytest.mark.parametrize("breakage", ["one wrong element", "nan", "wrong shape"])
def test_a_broken_grouped_gemm_fails(breakage, monkeypatch):
    sound, spoil = ops.grouped_gemm, BREAKAGES[breakage]

    def broken(*args, **kwargs):
        first, second = sound(*args, **kwargs)
        return [first, spoil(second)]

    monkeypatch.setattr(ops, "grouped_gemm", broken)
    checks = list(self_check.check_grouped_gemm(torch.bfloat16, "TN", "cpu"))
    assert not all(check.passed for check in checks)


@pytest.mark.parametrize(
    "wrong_mask",
    [lambda mask: torch.ones_like(mask), lambda mask: ~mask, lambda mask: mask & mask.roll(1, 1)],
    ids=["keeps all", "inverted", "keeps too few"],
)
def test_a_broken_dropout_mask_fails(wrong_mask, monkeypatch):
    sound = ops.dropout_mask
    monkeypatch.setattr(ops, "dropout_mask", lambda *args: wrong_mask(sound(*args)))
    assert not all(check.passed for check in self_check.check_dropout_mask("cpu"))


def test_dropout_that_is_not_its_mask_fails(monkeypatch):
    sound = ops.dropout_mask
    monkeypatch.setattr(ops, "dropout_mask", lambda seed, *rest: sound(seed + 1, *rest))
    checks = list(self_check.check_rasa(torch.float32, torch.float32, 0.25, "cpu"))
    assert not all(check.passed for check in checks)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_one_broken_layer_of_several_fails(breakage, monkeypatch):
    sound, spoil = ops.rasa_linears, BREAKAGES[breakage]

    def broken(*args, **kwargs):
        first, second = sound(*args, **kwargs)
        return [first, spoil(second)]

    monkeypatch.setattr(ops, "rasa_linears", broken)
    checks = list(self_check.check_rasa(torch.float32, torch.float32, 0.25, "cpu"))
    assert any(check.op == "rasa_linears" and not check.passed for check in checks)
    assert all(check.passed for check in checks if check.op != "rasa_linears")


def test_an_op_that_raises_is_a_failed_check_with_its_message(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel for this CPU")

    monkeypatch.setattr(ops, "rasa_linear", broken)
    failed = [c for c in self_check.check_rasa(torch.float32, torch.float32, 0, "cpu") if c.raised]
    assert [str(check) for check in failed] == [
        "cpu rasa_linear float32, adapters float32, dropout 0: RuntimeError: no kernel for this CPU"
    ]


def test_every_op_is_checked():
    checked = {check.op for check in self_check.run_checks()}
    assert checked == set(ops.__all__)
