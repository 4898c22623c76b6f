"""RaSA's factors of given matrices: monotone, the SVD at k = 0, and never worse than LoRA."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import reconstruction  # noqa: E402
from shared_factors import (  # noqa: E402
    at_random,
    from_lora,
    library_error,
    lora_optimum,
    residual_layers,
    squared,
    sweeps,
)

L, N, K, r = 4, 12, 9, 4


def matrices(shared_ranks=3):
    """Random matrices, plus ranks that all of them have in common."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    common = (normal(N, shared_ranks) * normal(L, 1, shared_ranks)) @ normal(shared_ranks, K)
    return normal(L, N, K) + 2 * common


def svd_error(M):
    """The sum of the squared singular values beyond the first r."""
    return float(torch.linalg.svdvals(M)[:, r:].square().sum())


@pytest.mark.parametrize("transpose", [False, True])
def test_lora_optimum_is_the_truncated_svd(transpose):
    M = matrices().mT.contiguous() if transpose else matrices()
    lora = lora_optimum(M, r)
    assert lora.A.shape[1] == lora.Bt.shape[1] == r
    torch.testing.assert_close(squared(M - lora.private()), svd_error(M))


def test_sweeps_without_a_pool_stay_at_or_reach_the_truncated_svd():
    M = matrices()
    assert list(sweeps(M, lora_optimum(M, r), 3)) == pytest.approx([svd_error(M)] * 3)
    assert list(sweeps(M, at_random(M, r, 0), 300))[-1] == pytest.approx(svd_error(M))


@pytest.mark.parametrize("k", range(1, r + 1))
def test_rasa_starts_as_lora_and_every_sweep_is_better(k):
    M = matrices()
    f = from_lora(lora_optimum(M, r), k)
    assert squared(M - f.private() - f.shared()) == pytest.approx(svd_error(M))
    errors = [svd_error(M), *sweeps(M, f, 30)]
    assert all(after < before for before, after in zip(errors[:-1], errors[1:], strict=True))
    assert errors[-1] < 0.99 * svd_error(M)
    assert f.A.shape[1] + len(f.A_shared) // L == r


@pytest.mark.parametrize("k", [1, r])
def test_error_falls_from_a_random_start_too(k):
    M = matrices()
    errors = list(sweeps(M, at_random(M, r, k), 30))
    slack = 1e-12 * errors[0]
    assert all(b <= a + slack for a, b in zip(errors[:-1], errors[1:], strict=True))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("k", [0, 1, r])
def test_layers_of_the_package_hold_the_factors(k):
    M = matrices()
    f = from_lora(lora_optimum(M, r), k) if k else lora_optimum(M, r)
    (error,) = sweeps(M, f, 1)
    deltas = torch.stack([layer.delta_weight() for layer in residual_layers(M, f)])
    torch.testing.assert_close(deltas, -f.private() - f.shared(), rtol=0, atol=1e-12)
    assert library_error(M, f) == pytest.approx(error)


def test_layers_with_another_error_stop_the_benchmark():
    M = matrices()
    lora = lora_optimum(M, r)
    with pytest.raises(SystemExit, match="the layers' error is .*, that of the factors"):
        reconstruction.checked_error(M, lora, 1.01 * svd_error(M))


def test_matrices_are_sorted_by_kind_and_layer():
    names = ("m.layers.{}.self_attn.q_proj.weight", "m.layers.{}.mlp.up_proj.weight")
    weights = {name.format(i): torch.full((2, 3), i) for name in names for i in (10, 2)}
    weights |= {"m.embed.weight": torch.ones(5, 3), "m.layers.2.norm.weight": torch.ones(3)}
    kinds = reconstruction.by_kind(weights)
    assert list(kinds) == ["self_attn.q_proj", "mlp.up_proj"]
    assert kinds["mlp.up_proj"][:, 0, 0].tolist() == [2, 10]


def test_command_writes_table_json_and_plot(tmp_path, monkeypatch, capsys):
    path = tmp_path / "reconstruction.json"
    monkeypatch.setitem(reconstruction.SOURCES, "minilm", lambda args: {"dense": matrices()})
    words = ["--sources", "minilm", "--r", r, "--k", 1, 2, "--sweeps", 2, "--json", path]
    monkeypatch.setattr(sys, "argv", ["reconstruction.py", *map(str, words)])
    reconstruction.main()
    (run,) = json.loads(path.read_text())["runs"]
    result = run["kinds"]["dense"]
    assert 0 < result["lora"]["2"]["ratio"] < 1
    assert len(result["random"]["1"]["by_sweep"]) == 2
    assert f"| minilm dense | {L} × {N} × {K} |" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 0
