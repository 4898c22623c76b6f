"""The scaling benchmark: growth is told from a constant part, and every curve is measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peak_memory  # noqa: E402
import scaling  # noqa: E402
import step  # noqa: E402


@pytest.mark.parametrize(("power", "growth"), [(1, 1.0), (2, 2.4), (3, 16 / 3)])
def test_a_constant_part_does_not_hide_a_power(power, growth):
    sizes = [8, 16, 32, 64, 128]
    assert scaling.growth(sizes, [5 + 0.1 * s**power for s in sizes]) == pytest.approx(growth)


def test_what_does_not_grow_has_no_growth():
    assert scaling.growth([1, 2, 4], [3.0, 3.0, 2.5]) == 0.0


def test_command_measures_every_curve(tmp_path, monkeypatch, capsys):
    for name in ("LAYERS", "RANKS", "TOKENS", "ADAPTERS"):
        monkeypatch.setattr(scaling, name, (1, 2, 3))
    monkeypatch.setattr(scaling, "MIXED_ROWS", 8)
    monkeypatch.setattr(step, "MODEL_LAYERS", 3)
    monkeypatch.setattr(step, "MODEL_VOCABULARY", 96)
    monkeypatch.setattr(scaling.layer, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(peak_memory, "measure", lambda *args: {"resident": 2**20 * args[3]})
    paths = {name: tmp_path / name for name in ("scaling.json", "scaling.png")}
    words = ["scaling.py", "--rounds", "1", "--json", paths["scaling.json"]]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--plot", str(paths["scaling.png"])])
    scaling.main()
    results = json.loads(paths["scaling.json"].read_text())["results"]
    assert set(results) == {"layers", "effective rank", "tokens", "adapters in a batch"}
    assert results["layers"][1]["growth"] == pytest.approx(1.0)
    assert "peak memory of a step" in capsys.readouterr().out
    assert paths["scaling.png"].read_bytes().startswith(b"\x89PNG")
