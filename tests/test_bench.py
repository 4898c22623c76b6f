"""The benchmarks: peers compute the same thing, ratios are paired, reports say what was run."""

import functools
import json
import math
import platform
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
import layer  # noqa: E402
import merge  # noqa: E402
import parts  # noqa: E402
import peak_memory  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import step  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402

ADAPTER = peers.Adapter(("proj",), r=4, k=2, dropout=0.0, dtype=torch.float64)
STEP_ADAPTER = peers.Adapter(step.TARGETS)
# A peer's memory as peak_memory gives it.
MEMORY = {"resident": 100 * 2**20, "allocated": 50 * 2**20}


@pytest.fixture
def small_step(monkeypatch):
    """The step benchmark on a model of two layers, of which it keeps one."""
    monkeypatch.setattr(step, "MODEL_LAYERS", 2)
    monkeypatch.setattr(step, "MODEL_VOCABULARY", 512)
    monkeypatch.setattr(step, "BATCH", (1, 8))


@pytest.fixture(autouse=True)
def unchanged_recompile_limit():
    """Put back what the compiled peer raises."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


@pytest.fixture
def quick_compile(monkeypatch):
    """Compile all but machine code: what is compiled when does not depend on the backend."""
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)


def compiled_calls(run):
    """How many calls of compiled code a run makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    return sum(event.name.startswith("Torch-Compiled Region") for event in profiler.events())


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, words)])
    bench.main()


@pytest.mark.parametrize("name", ["lora", "authors", "compiled", "rasa"])
def test_peer_equals_its_dense_update_in_float64(name):
    base = layer.Projections(3, 24, 16).double()
    wanted = dict.fromkeys(["frozen", "authors", "rasa", name])
    models = {peer: peers.convert(peer, base, ADAPTER) for peer in wanted}
    peers.copy_rasa_to_authors(models["rasa"], models["authors"], ADAPTER)
    x = torch.randn(5, 24, dtype=torch.float64)
    exact = peers.exact_model(name, models, ADAPTER).layers[1].proj(x)
    y = peers.unwrap(models[name]).layers[1].proj(x)
    assert peers.relative_error(y, exact) < 1e-14
    assert peers.relative_error(models["frozen"].layers[1].proj(x), exact) > 1e-3


def test_peers_share_the_weight_memory_of_the_base():
    base = layer.Projections(2, 24, 16).double()
    addresses = {p.data_ptr() for p in base.parameters()}
    for name in peers.PEERS:
        model = peers.convert(name, base, ADAPTER)
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        assert frozen == addresses
    assert type(base.layers[0].proj) is torch.nn.Linear


def test_wrong_peer_is_not_timed():
    good = {"frozen": 1e-7, "rasa": 2e-7}
    peers.require_accurate(good, torch.float32)
    for error in (1e-3, math.nan):
        with pytest.raises(SystemExit, match="peer 'rasa' is wrong: error .* against float64, all"):
            peers.require_accurate(good | {"rasa": error}, torch.float32)


@pytest.mark.parametrize(
    ("package", "name", "command"),
    [("peft", "lora", "pip install peft"), ("rasa_ext", "rasa", "pip install .")],
)
def test_missing_peer_stops_the_run(package, name, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"peer '{name}' needs .*: {command}"):
        peers.convert(name, layer.Projections(2, 24, 16), ADAPTER)


def test_rounds_run_every_peer_and_rotate_the_order():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.interleave(runs, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(times) == 3 for times in seconds.values())


def test_slow_runs_get_fewer_rounds_but_not_less_than_the_fewest():
    runs = {"a": lambda: None}
    assert len(timing.interleave(runs, 9, most_seconds=0)["a"]) == timing.FEWEST_ROUNDS
    assert len(timing.interleave(runs, 3, most_seconds=0)["a"]) == 3


def test_a_round_that_compiles_is_not_timed():
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    sizes = iter((3, 3, 4))
    with pytest.raises(RuntimeError, match="expected 3, actual 4"):
        timing.interleave({"double": lambda: double(torch.randn(next(sizes)))}, rounds=2)
    assert next(sizes, None) is None


def test_ratios_are_paired_by_round():
    seconds = {"a": [2.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert timing.paired_ratio(seconds, "a", "b") == {"median": 2.0, "min": 2.0, "max": 3.0}


def test_table_is_aligned_markdown():
    lines = report.table(["peer", "ms"], [["frozen", "12"], ["a", "3"]]).splitlines()
    assert lines == ["| peer   | ms |", "|--------|---:|", "| frozen | 12 |", "| a      |  3 |"]


def test_layer_command_writes_table_and_json(tmp_path, monkeypatch, capsys):
    path = tmp_path / "layer.json"
    shape = ["--shape", "8,16,24", "--layers", 2, "--rounds", 1]
    run(monkeypatch, "layer", *shape, "--dtype", "fp32", "bf16", "--dropout", 0.05, "--json", path)
    printed = capsys.readouterr().out
    assert "| rasa / frozen |" in " ".join(printed.split())
    results = json.loads(path.read_text())["results"]
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    for result, size in zip(results, (4, 2), strict=True):
        assert set(result["us"]) == set(peers.PEERS) - {"compiled"}
        assert result["allocated"].keys() == result["us"].keys()
        # Frozen: y, then dx.
        assert result["allocated"]["frozen"] == (8 * 24 + 8 * 16) * size


def test_suite_covers_models_and_tokens_with_the_compiled_formula(tmp_path, monkeypatch, capsys):
    path = tmp_path / "layers.json"
    monkeypatch.setattr(bench, "SUITE_LINEARS", [(16, 24)])
    monkeypatch.setattr(bench, "SUITE_TOKENS", (4, 8))
    monkeypatch.setattr(bench, "SUITE_COMPILED_TOKENS", 8)
    size = ["--layers", 2, "--rounds", 1, "--dtype", "fp32", "--dropout", 0]
    run(monkeypatch, "layer", "--suite", *size, "--json", path)
    results = json.loads(path.read_text())["results"]
    assert [result["shape"]["M"] for result in results] == [4, 8]
    assert set(results[0]["us"]) == set(peers.PEERS) - {"compiled"}
    assert set(results[1]["us"]) == set(peers.PEERS)


def test_layers_counted_for_the_pool_take_no_memory():
    model = layer.Projections(2, 24, 16).to(torch.bfloat16)
    model.count_also(5)
    storages = [linear.proj.weight.untyped_storage().nbytes() for linear in model.layers]
    assert storages == [768, 768, 2, 2, 2]
    assert all(linear.proj.weight.shape == (16, 24) for linear in model.layers)


def test_merge_command_writes_table_and_json(tmp_path, monkeypatch, capsys):
    path = tmp_path / "merge.json"
    monkeypatch.setattr(merge, "SHAPES", {"q_proj": (16, 24), "down_proj": (40, 16)})
    run(monkeypatch, "merge", "--layers", 3, "--rounds", 1, "--dtype", "bf16", "--json", path)
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"| {peer} | bfloat16 |" in printed for peer in merge.PEERS)
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["seconds"]) == set(merge.PEERS)


def test_a_merge_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(merge, "SHAPES", {"q_proj": (16, 24)})
    monkeypatch.setattr(merge, "merge_by_op", lambda layers: None)
    with pytest.raises(SystemExit, match="bench: op is wrong: error .* against float64"):
        merge.measure(torch.float32, 2, 2, 1, 1)


@pytest.fixture
def small_siblings(monkeypatch):
    for name, size in {"M": 12, "K": 16, "N": 24, "RP": 3, "RS": 4}.items():
        monkeypatch.setattr(parts, name, size)
    monkeypatch.setattr(parts, "SAMPLE_SECONDS", 1e-4)


def test_parts_command_writes_table_and_json(tmp_path, monkeypatch, capsys, small_siblings):
    path = tmp_path / "parts.json"
    run(monkeypatch, "parts", "--rounds", 1, "--json", path)
    printed = capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    for result in results:
        assert (
            len(result["seconds"]) == 6 and result["over_frozen"].keys() == result["seconds"].keys()
        )
        assert all(f"| {name} " in printed for name in result["seconds"])


def test_parts_multiply_in_the_named_micro_kernels_in_backward_too(monkeypatch, small_siblings):
    import rasa_ext

    now, seen = ["own"], set()
    monkeypatch.setattr(rasa_ext._C, "set_micro_kernels", lambda which: now.__setitem__(0, which))
    backward = torch.autograd.backward

    def watched(*args):
        seen.add(now[0])
        backward(*args)

    monkeypatch.setattr(torch.autograd, "backward", watched)
    parts.measure(torch.float32, 0.05, 1)
    assert seen == {"own", "library"} and now == ["own"]


def test_parts_that_are_wrong_are_not_timed(monkeypatch, small_siblings):
    monkeypatch.setattr(parts.Siblings, "together", parts.Siblings.frozen)
    with pytest.raises(SystemExit, match="peer 'rasa_ext' is wrong: error .* against float64"):
        parts.measure(torch.float32, 0.05, 1)


def test_shape_and_peers_are_checked(monkeypatch, capsys):
    for words, message in (
        (["--shape", "8,16"], "expected M,K,N as in 512,576,1536, got 8,16"),
        (["--peers", "dora"], "unknown peer dora, choose from frozen,lora,authors,compiled,rasa"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "layer", *words)
        assert message in capsys.readouterr().err


def test_step_command_prints_figures_beside_their_bounds(
    small_step, quick_compile, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "step.json"
    # One process a peer is the business of peak_memory; here one call stands for it.
    less = {"resident": 90 * 2**20, "allocated": 60 * 2**20}
    monkeypatch.setattr(peak_memory, "measure", lambda name, *_: less if name == "rasa" else MEMORY)
    size = ["--layers", 1, "--rounds", 1]
    run(monkeypatch, "step", "--quick", *size, "--dtype", "fp32", "--json", path)
    printed = " ".join(capsys.readouterr().out.split())
    for figure in tables.FIGURES:
        assert f"| {figure} | fp32 |" in printed
    assert "| peak resident memory, rasa / lora | fp32 | 0.90 | 1.00 | reached |" in printed
    assert "| peak allocated memory, rasa / lora | fp32 | 1.20 | 1.00 | missed |" in printed
    result = json.loads(path.read_text())["results"]["fp32"]
    assert {"rasa p=0.05 / frozen", "rasa p=0 / compiled p=0"} <= result["ratios"].keys()
    assert result["memory"]["compiled"] == MEMORY


def test_json_says_where_it_comes_from_but_names_no_host(tmp_path):
    path = tmp_path / "results" / "file.json"
    report.write_json(path, {"subject": "test"}, {"results": []})
    record = json.loads(path.read_text())
    assert {"date", "commit", "machine", "versions", "settings", "results"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    assert platform.node() not in path.read_text()
    assert str(tmp_path) not in path.read_text()


def test_every_layer_of_the_frozen_step_runs_backward(small_step):
    base = step.smollm2_shape(torch.float32, 2)
    model = step.build("frozen", base, STEP_ADAPTER, 2)
    seen = []
    for block in model.model.layers:
        block.register_full_backward_hook(lambda *args: seen.append(1))
    step.training_step(model, torch.randint(0, 512, (1, 8)))()
    assert len(seen) == 2


def test_shortened_step_keeps_the_pools_of_the_whole_model(small_step):
    model = step.build("rasa", step.smollm2_shape(torch.float32, 1), STEP_ADAPTER, 1)
    assert len(model.model.layers) == 1
    assert model.model.layers[0].mlp.up_proj.pool.num_layers == 2


@pytest.mark.parametrize("name", ["frozen", "compiled", "rasa"])
def test_peak_memory_of_a_step_is_at_least_its_logits(name, small_step, quick_compile):
    torch.compiler.reset()
    taken = peak_memory.probe(name, torch.float32, STEP_ADAPTER, 1, (1, 8))
    assert taken.keys() == {"resident", "allocated"}
    assert min(taken.values()) > 8 * step.vocabulary(1) * 4


def test_second_step_of_the_compiled_peer_compiles_nothing(small_step, quick_compile):
    torch.compiler.reset()
    base = step.smollm2_shape(torch.float32, 1)
    tokens = torch.randint(0, step.vocabulary(1), step.BATCH)
    steps = []
    for dropout in (0.1, 0.05, 0.0):
        adapter = peers.Adapter(step.TARGETS, dropout=dropout)
        models = {name: step.build(name, base, adapter, 1) for name in ("frozen", "compiled")}
        step.check(models, adapter, torch.float32)
        steps.append(step.training_step(models["compiled"], tokens))
    for run in steps:
        run()
    with torch.compiler.set_stance("fail_on_recompile"):
        for run in steps:
            assert compiled_calls(run) == len(step.TARGETS)


def test_a_layer_that_cannot_be_compiled_stops_the_run(quick_compile, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(peers, "MOST_COMPILED", 1)
    model = peers.convert("compiled", layer.Projections(1, 24, 16).double(), ADAPTER)
    linear = model.layers[0].proj
    linear(torch.randn(5, 24, dtype=torch.float64))
    with pytest.raises(Exception, match="fullgraph=True"):
        linear(torch.randn(6, 24, dtype=torch.float64))
