"""The state dict has LitGPT's keys in both directions, and its errors name the wrong keys."""

import copy
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from litgpt.model import LLaMAMoE

from custom_moe import MoE, use_custom_moe

VARIANTS = {
    "plain": {},
    "biases": {"bias": True},
    "shared, sigmoid": {
        "n_shared_expert": 1,
        "n_expert_groups": 2,
        "n_topk_groups": 1,
        "n_topk_scores_per_group": 2,
    },
    "first layer dense": {"first_k_dense_replace": 1, "intermediate_size": 40},
}


def custom_gpt(config: Config) -> GPT:
    with use_custom_moe():
        return GPT(config)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_keys_and_values_match_litgpt_both_ways(moe_fields: dict, fields: dict) -> None:
    config = Config(**{**moe_fields, **fields})
    ours, stock = custom_gpt(config), GPT(config)
    assert isinstance(ours.transformer.h[-1].mlp, MoE) and isinstance(stock.transformer.h[-1].mlp, LLaMAMoE)
    assert list(ours.state_dict()) == list(stock.state_dict())

    ids = torch.randint(0, 384, (2, 9))
    stock.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(ids), stock(ids))

    fresh = custom_gpt(config)
    fresh.load_state_dict(stock.state_dict(), strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key


def test_each_key_loads_into_its_own_part(moe_fields: dict) -> None:
    """Each tensor has its own number, so a swap of gate and up, or of experts, is noticed."""
    moe = MoE(Config(**{**moe_fields, "bias": True}))
    values = {key: torch.full_like(value, number) for number, (key, value) in enumerate(moe.state_dict().items(), 1)}
    moe.load_state_dict(values)
    for key, value in moe.state_dict().items():
        assert torch.equal(value, values[key]), key
    assert torch.equal(moe.experts.fc_weight[2, :48], values["experts.2.fc_1.weight"])
    assert torch.equal(moe.experts.fc_weight[2, 48:], values["experts.2.fc_2.weight"])
    assert torch.equal(moe.experts.proj_bias[3], values["experts.3.proj.bias"])


def test_file_is_as_small_as_litgpts_and_maps(moe_fields: dict, tmp_path: Path) -> None:
    config = Config(**moe_fields)
    ours, stock = custom_gpt(config), GPT(config)
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    assert (tmp_path / "ours.pth").stat().st_size <= 1.02 * (tmp_path / "stock.pth").stat().st_size

    for name, source in (("ours", ours), ("stock", stock)):
        mapped = torch.load(tmp_path / f"{name}.pth", mmap=True, weights_only=True)
        fresh = custom_gpt(config)
        fresh.load_state_dict(mapped, strict=True)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_errors_name_wrong_keys(moe_fields: dict) -> None:
    gpt = custom_gpt(Config(**moe_fields))
    state = gpt.state_dict()
    prefix = "transformer.h.1.mlp.experts."
    del state[prefix + "2.fc_2.weight"]
    state[prefix + "4.fc_1.weight"] = torch.zeros(48, 32)
    state[prefix + "0.proj.weight"] = torch.zeros(32, 47)
    before = gpt.transformer.h[1].mlp.experts.fc_weight[2, 48:].clone()

    with pytest.raises(RuntimeError) as error:
        gpt.load_state_dict(state)
    message = str(error.value)
    assert f'Missing key(s) in state_dict: "{prefix}2.fc_2.weight".' in message
    assert f'Unexpected key(s) in state_dict: "{prefix}4.fc_1.weight".' in message
    assert f"size mismatch for {prefix}0.proj.weight" in message and "[32, 47]" in message and "[32, 48]" in message

    state[prefix + "0.proj.weight"] = torch.ones(32, 48)
    result = gpt.load_state_dict(state, strict=False)
    stock_result = GPT(Config(**moe_fields)).load_state_dict(state, strict=False)
    assert result == stock_result
    assert torch.equal(gpt.transformer.h[1].mlp.experts.fc_weight[2, 48:], before)
    assert gpt.transformer.h[1].mlp.experts.proj_weight[0].eq(1).all()


def test_stacked_names_are_rejected(moe_fields: dict) -> None:
    moe = MoE(Config(**moe_fields))
    with pytest.raises(
        RuntimeError, match=r'Missing key.*"experts.0.fc_1.weight"[\s\S]*Unexpected.*"experts.fc_weight"'
    ):
        moe.load_state_dict({"gate.weight": moe.gate.weight, "experts.fc_weight": moe.experts.fc_weight})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_loading_converts_to_the_type_of_the_layer(moe_fields: dict, dtype: torch.dtype) -> None:
    moe = MoE(Config(**moe_fields))
    state = {key: torch.randn(value.shape, dtype=dtype) for key, value in moe.state_dict().items()}
    moe.load_state_dict(state)
    assert all(parameter.dtype == torch.float32 for parameter in moe.parameters())
    assert all(torch.equal(value, state[key].float()) for key, value in moe.state_dict().items())


def test_assign_fills_a_layer_on_meta(moe_fields: dict) -> None:
    config = Config(**{**moe_fields, "bias": True})
    source = custom_gpt(config).to(torch.bfloat16)
    with torch.device("meta"):
        gpt = custom_gpt(config)
    gpt.transformer.h[0].mlp.experts.requires_grad_(False)
    gpt.load_state_dict(source.state_dict(), strict=True, assign=True)
    for key, value in gpt.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, source.state_dict()[key]), key
    assert not any(parameter.requires_grad for parameter in gpt.transformer.h[0].mlp.experts.parameters())
    assert all(parameter.requires_grad for parameter in gpt.transformer.h[1].mlp.experts.parameters())
    gpt.transformer.h[1].mlp.experts.proj_weight.data.zero_()
    assert source.transformer.h[1].mlp.experts.proj_weight.any()


def test_state_dict_shares_memory_with_the_layer(moe_fields: dict) -> None:
    """As with stock modules: detached, not copied (a copy would double the memory of each save)."""
    moe = MoE(Config(**moe_fields))
    state = moe.state_dict()
    state["experts.1.fc_2.weight"].fill_(7)
    assert moe.experts.fc_weight[1, 48:].eq(7).all()
    assert not any(value.requires_grad for value in state.values())
    assert moe.state_dict(keep_vars=True)["experts.1.fc_2.weight"].requires_grad


def test_deepcopy_is_independent(moe_fields: dict) -> None:
    gpt = custom_gpt(Config(**moe_fields))
    twin = copy.deepcopy(gpt)
    state = {key: value.clone() for key, value in gpt.state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, state[key]) for key, value in gpt.state_dict().items())
    gpt.load_state_dict(twin.state_dict())
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in gpt.state_dict().items())


def test_parameter_names(moe_fields: dict) -> None:
    gpt = custom_gpt(Config(**{**moe_fields, "bias": True, "n_shared_expert": 1}))
    names = {name: parameter.dim() for name, parameter in gpt.named_parameters() if ".mlp." in name}
    assert sorted(name.split(".mlp.")[1] for name in names if ".h.0." in name) == [
        "experts.fc_bias",
        "experts.fc_weight",
        "experts.proj_bias",
        "experts.proj_weight",
        "gate.weight",
        "shared_experts.fc_1.bias",
        "shared_experts.fc_1.weight",
        "shared_experts.fc_2.bias",
        "shared_experts.fc_2.weight",
        "shared_experts.proj.bias",
        "shared_experts.proj.weight",
    ]
    # A stacked bias has two dimensions: sorting parameters by dimension would decay it.
    assert {names["transformer.h.0.mlp.experts.fc_bias"], names["transformer.h.0.mlp.gate.weight"]} == {2}
