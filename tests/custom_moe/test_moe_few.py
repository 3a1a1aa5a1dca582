"""A few tokens by the shortest way: what the layer itself computes."""

import pytest
import torch
from litgpt import Config

from custom_moe import MoE
from custom_moe.few import FewTokens

SIGMOID = dict(n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
SIZES = dict(n_layer=2, n_embd=32, n_head=2, moe_intermediate_size=48, n_expert=8, n_expert_per_token=2, bias=False)


def layer_of(fields: dict, dtype: torch.dtype = torch.float32) -> MoE:
    torch.manual_seed(0)
    layer = MoE(Config(**{**SIZES, "mlp_class_name": "LLaMAMoE", "norm_class_name": "RMSNorm", **fields}))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if layer.config.n_expert_groups:
        layer.gate.e_score_correction_bias.normal_(std=0.1)
    return layer.to(dtype)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_expert_per_token": 1},
        {"n_expert": 1, "n_expert_per_token": 1},
        {"n_embd": 26, "moe_intermediate_size": 17, "n_expert": 13, "n_expert_per_token": 3},
        {"n_shared_expert": 2, "routed_scaling_factor": 2.5},
        SIGMOID,
        {**SIGMOID, "norm_topk_prob": True, "n_shared_expert": 1, "routed_scaling_factor": 2.5},
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_it_is_the_layer(fields: dict, rows: int) -> None:
    layer = layer_of(fields)
    x = torch.randn(rows, layer.config.n_embd)
    torch.testing.assert_close(FewTokens(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_in_bf16() -> None:
    layer = layer_of({"n_shared_expert": 1}, torch.bfloat16)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    y = FewTokens(layer)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x), atol=2e-2, rtol=2e-2)


def test_when_it_is_not_the_way() -> None:
    layer = layer_of({})
    assert FewTokens.can_take(layer, 4) and not FewTokens.can_take(layer, 5), "more rows than experts share experts"
    assert not FewTokens.can_take(layer_of({"bias": True}), 1)
    assert not FewTokens.can_take(torch.nn.Linear(2, 2), 1)
    assert not FewTokens.can_take(layer.to("meta"), 1)
    layer = layer_of({})
    with torch.autocast("cpu", torch.bfloat16):
        assert not FewTokens.can_take(layer, 1)
    layer.experts.backend = "grouped_mm"
    assert not FewTokens.can_take(layer, 1), "another way was asked for"
