"""apply(): which layers it takes, how it groups them, what it makes and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from models import PROJECTIONS, Conv1D, Int8Linear, TinyModel, randomize_adapters, trainable
from torch import Tensor, nn

from rasa_ext.injection import TARGET_MODULES, apply
from rasa_ext.module import RaSALinear


def pools(model: nn.Module) -> dict[str, int]:
    """Pool name -> ranks in it."""
    return {name: pool.A_shared.shape[0] for name, pool in model.rasa_pools.items()}


@pytest.mark.parametrize("naming", ["layers", "model.layers", "transformer.h", "encoder.layer"])
def test_pools_have_the_same_names_under_any_layer_naming(naming: str) -> None:
    model = TinyModel(naming, num_layers=3)

    apply(model, r=4, k=2, target_modules=PROJECTIONS)

    assert pools(model) == {
        "attn__q_proj__8x8": 6,
        "attn__v_proj__8x8": 6,
        "down_proj__8x16": 6,
    }
    for block in model.blocks:
        assert block.attn.q_proj.pool is model.rasa_pools["attn__q_proj__8x8"]
        assert block.down_proj.pool is model.rasa_pools["down_proj__8x16"]
        assert type(block.up) is nn.Linear


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_new_adapter_changes_nothing(k: int) -> None:
    model = TinyModel()
    x = torch.randn(2, 5, 8)
    before = model(x)

    apply(model, r=4, k=k, target_modules=PROJECTIONS)

    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("k", "leaves"), [(0, {"A", "Bt"}), (1, {"A", "Bt", "d"})])
def test_only_adapters_train(k: int, leaves: set[str]) -> None:
    model = TinyModel()
    apply(model, r=4, k=k, target_modules="q_proj")

    model(torch.randn(3, 8)).sum().backward()

    names = {f"layers.{i}.attn.q_proj.{leaf}" for i in range(3) for leaf in leaves}
    if k > 0:
        names |= {f"rasa_pools.attn__q_proj__8x8.{leaf}" for leaf in ("A_shared", "Bt_shared")}
    assert trainable(model).keys() == names
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names


def test_a_frozen_and_adapted_model_learns() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    x, target = torch.randn(32, 8), torch.randn(32, 8)
    apply(model, r=4, k=1, target_modules=PROJECTIONS)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.8 * losses[0]


def test_shapes_of_one_name_are_groups_of_their_own() -> None:
    model = TinyModel(num_layers=4)
    for block in list(model.layers)[2:]:
        block.attn.q_proj = nn.Linear(8, 6)

    apply(model, r=2, k=1, target_modules="q_proj")

    assert pools(model) == {"attn__q_proj__8x8": 2, "attn__q_proj__6x8": 2}


def mixture() -> nn.Module:
    """layers.N.experts.M.w1, as mixtures of experts name their linears."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(3))
    for layer in model.layers:
        layer.experts = nn.ModuleList(nn.Module() for _ in range(2))
        for expert in layer.experts:
            expert.w1 = nn.Linear(8, 8)
    return model


def test_experts_share_with_their_namesakes_in_other_layers() -> None:
    model = mixture()

    apply(model, r=2, k=1, target_modules="w1")

    assert pools(model) == {"experts__0__w1__8x8": 3, "experts__1__w1__8x8": 3}


def test_a_number_that_every_target_has_is_no_layer_index() -> None:
    model = nn.Sequential(TinyModel(num_layers=3), nn.Linear(8, 8))

    apply(model, r=2, k=1, target_modules="q_proj")

    assert pools(model) == {"attn__q_proj__8x8": 3}
    assert isinstance(model[0].layers[1].attn.q_proj, RaSALinear)


def test_linears_that_are_the_layers_are_named_after_their_list() -> None:
    model = nn.Module()
    model.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    apply(model, r=2, k=1, target_modules=["linears.0", "linears.1"])

    assert pools(model) == {"linears__8x8": 2}


def test_a_layer_without_index_is_a_group() -> None:
    model = TinyModel()

    summary = apply(model, r=2, k=1, target_modules="head")

    assert pools(model) == {"head__8x8": 1}
    assert summary.groups[0].R == 2


def test_a_target_may_be_the_end_of_a_longer_name() -> None:
    model = TinyModel()

    apply(model, r=2, k=1, target_modules=["1.attn.q_proj", "attn.v_proj"])

    adapted = [n for n, m in model.named_modules() if isinstance(m, RaSALinear)]
    assert adapted == [
        "layers.0.attn.v_proj",
        "layers.1.attn.q_proj",
        "layers.1.attn.v_proj",
        "layers.2.attn.v_proj",
    ]


def test_a_target_is_no_part_of_a_word() -> None:
    with pytest.raises(ValueError, match="no module is named '_proj'"):
        apply(TinyModel(), target_modules="_proj")


def test_other_linear_layers_are_adapted_and_keep_their_place() -> None:
    model = nn.Sequential(Conv1D(6, 8), nn.ReLU(), Int8Linear(nn.Linear(6, 8)))
    x = torch.randn(3, 8)
    before = model(x)

    apply(model, r=2, k=0, target_modules=["0", "2"])

    assert [type(m) for m in model] == [RaSALinear, nn.ReLU, RaSALinear]
    assert torch.equal(model(x), before)


def test_mode_dtype_and_device_are_those_of_each_base() -> None:
    model = TinyModel().to("meta", torch.bfloat16).eval()
    apply(model, r=4, k=1, target_modules=PROJECTIONS)

    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.device.type for p in trainable(model).values()} == {"meta"}
    assert not any(m.training for m in model.modules() if isinstance(m, RaSALinear))

    model = TinyModel().bfloat16()
    apply(model, r=4, k=1, target_modules=PROJECTIONS, dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.bfloat16}


def test_arguments_reach_the_layers() -> None:
    model = TinyModel()
    apply(model, 6, 2, 12, ["q_proj"], 0.1)

    layer = model.layers[0].attn.q_proj
    assert (layer.r, layer.k, layer.alpha, layer.dropout) == (6, 2, 12.0, 0.1)


def test_the_same_seed_gives_the_same_adapters() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        model = TinyModel()
        apply(model, r=4, k=1, target_modules=PROJECTIONS)
        states.append(model.state_dict())

    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_summary_counts_and_prints() -> None:
    model = TinyModel(num_layers=3)

    summary = apply(model, r=4, k=1, target_modules=["q_proj", "down_proj"])

    assert summary.trainable == sum(p.numel() for p in trainable(model).values())
    assert summary.total == sum(p.numel() for p in model.parameters())
    assert [(g.name, g.num_layers, g.Rs, g.Rp, g.R) for g in summary.groups] == [
        ("attn__q_proj__8x8", 3, 3, 3, 6),
        ("down_proj__8x16", 3, 3, 3, 6),
    ]
    assert sum(g.trainable for g in summary.groups) == summary.trainable
    assert str(summary) == (
        "group              layers  shape (N, K)  rank R = Rs + Rp  trainable\n"
        "attn__q_proj__8x8  3       (8, 8)        6 = 3 + 3         210\n"
        "down_proj__8x16    3       (8, 16)       6 = 3 + 3         306\n"
        "516 trainable of 1,836 parameters (28.10 %)"
    )


def test_parameter_count_of_rasa_is_that_of_lora_and_d() -> None:
    counts = [
        apply(TinyModel(num_layers=3), r=4, k=k, target_modules="q_proj").trainable
        for k in (0, 1, 4)
    ]

    assert counts == [3 * 4 * 16, 3 * 4 * 16 + 3 * 6, 3 * 4 * 16 + 3 * 12]


def test_a_compiled_model_gets_plain_names() -> None:
    model = TinyModel()
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    compiled = torch.compile(model, backend="eager")

    apply(compiled, r=4, k=1, target_modules=PROJECTIONS)

    assert pools(model).keys() == {"attn__q_proj__8x8", "attn__v_proj__8x8", "down_proj__8x16"}
    x = torch.randn(2, 8)
    assert torch.equal(compiled(x), model(x))


def test_copies_of_an_adapted_model_share_their_own_pools() -> None:
    model = TinyModel()
    apply(model, r=4, k=1, target_modules=PROJECTIONS)
    randomize_adapters(model)

    twin = copy.deepcopy(model)

    x = torch.randn(2, 8)
    assert torch.equal(twin(x), model(x))
    for layer in twin.layers:
        assert layer.attn.q_proj.pool is twin.rasa_pools["attn__q_proj__8x8"]


def test_a_module_under_two_names_may_be_plain_lora() -> None:
    model = nn.Module()
    model.first, model.second = nn.Module(), nn.Module()
    model.first.q_proj = model.second.q_proj = nn.Linear(8, 8)

    apply(model, r=2, k=0, target_modules="q_proj")

    assert isinstance(model.first.q_proj, RaSALinear)
    assert model.first.q_proj is model.second.q_proj


def test_all_seven_projections_of_a_llama() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=11,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(10).reshape(2, 5)
    before = model(ids).logits

    summary = apply(model)

    assert torch.equal(model(ids).logits, before)
    assert tuple(g.name.split("__")[1] for g in summary.groups) == TARGET_MODULES
    assert {(g.num_layers, g.Rs, g.Rp) for g in summary.groups} == {(3, 3, 7)}
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_layers_of_different_dtype_need_no_pool_for_plain_lora() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model = nn.Sequential(nn.Linear(4, 4), Cast(), nn.Linear(4, 4).double())

    apply(model, r=2, k=0, target_modules=["0", "2"])

    assert [model[i].A.dtype for i in (0, 2)] == [torch.float32, torch.float64]
    model(torch.randn(3, 4)).sum().backward()
