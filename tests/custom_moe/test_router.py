"""Routing: LitGPT's choice to the bit, in fp32 whatever the model's precision."""

import pytest
import torch
import torch.nn.functional as F
from litgpt import Config
from litgpt.model import GroupedTopkRouter

from custom_moe import MoE, score_function, weights_are_constant
from custom_moe.router import GroupedTopKRouter, TopKRouter
from tests.helpers import moe_config

SIGMOID = dict(n_expert_groups=3, n_topk_groups=2, n_topk_scores_per_group=2)


def config_12(**fields: object) -> Config:
    return moe_config({"n_layer": 1, "moe_intermediate_size": 16, "n_expert": 12, "n_expert_per_token": 3, **fields})


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_softmax_routing_equals_litgpt_exactly(scale: float) -> None:
    config = config_12(routed_scaling_factor=scale)
    router = TopKRouter(config)
    output = router(torch.randn(50, 32))
    top, indices = torch.topk(output.logits, 3)  # the lines of litgpt.model.LLaMAMoE.forward
    weights = top.softmax(dim=1, dtype=torch.float)
    assert torch.equal(output.experts.view(50, 3), indices)
    assert torch.equal(output.weights.view(50, 3), weights * scale)
    assert output.tokens.tolist() == [token for token in range(50) for _ in range(3)]
    assert output.experts.dtype == torch.int64
    assert output.score_function == score_function(config) == "softmax"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", ["none", "small", "negative"])
def test_sigmoid_routing_equals_litgpt_exactly(norm: bool, bias: str) -> None:
    """Also with biases that make scores negative: LitGPT's zero for a masked expert then beats an allowed one."""
    config = config_12(**SIGMOID, norm_topk_prob=norm)
    stock, router = GroupedTopkRouter(config), GroupedTopKRouter(config)
    torch.nn.init.normal_(stock.weight)
    stock.e_score_correction_bias += {"none": 0.0, "small": 0.1, "negative": 0.0}[bias] * torch.randn(12)
    stock.e_score_correction_bias -= 0.9 if bias == "negative" else 0.0
    router.load_state_dict(stock.state_dict())
    x = torch.randn(200, 32)

    output = router(x)
    weights, indices = stock(x)
    assert torch.equal(output.experts.view(200, 3), indices)
    assert torch.equal(output.weights.view(200, 3), weights)
    assert output.score_function == score_function(config) == "sigmoid"


def test_correction_bias_changes_the_choice_only() -> None:
    router = GroupedTopKRouter(config_12(**SIGMOID, n_expert_per_token=1))
    torch.nn.init.zeros_(router.weight)
    router.e_score_correction_bias[7] = 5.0
    output = router(torch.randn(4, 32))
    assert output.experts.eq(7).all()
    torch.testing.assert_close(output.weights, torch.full((4,), 0.5))


def test_logits_are_fp32_in_any_precision() -> None:
    """With bf16 inputs the products must still be summed in fp32: a bf16 matrix product errs by 1e-2 here."""
    moe = MoE(config_12()).to(torch.bfloat16)
    x = torch.randn(1, 64, 32).bfloat16() * 4
    exact = F.linear(x.double(), moe.gate.weight.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, mixed = moe.forward_with_router(x)
    _, true = moe.forward_with_router(x)
    for router in (mixed, true):
        assert router.logits.dtype == router.weights.dtype == torch.float32
        torch.testing.assert_close(router.logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert (F.linear(x, moe.gate.weight)[0] - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "constant"),
    [
        ({}, False),
        ({"n_expert_per_token": 1}, True),
        ({"n_expert_per_token": 1, "routed_scaling_factor": 2.5}, True),
        ({"n_expert_per_token": 12}, False),
        ({**SIGMOID, "n_expert_per_token": 1}, False),
        ({**SIGMOID, "n_expert_per_token": 1, "norm_topk_prob": True}, True),
        ({**SIGMOID, "norm_topk_prob": True}, False),
    ],
    ids=str,
)
def test_constant_weights_are_those_without_gradient(fields: dict, constant: bool) -> None:
    torch.manual_seed(0)
    config = config_12(**fields)
    moe = MoE(config)
    moe(torch.randn(1, 64, 32)).square().sum().backward()
    assert moe.gate.weight.grad is not None
    assert weights_are_constant(config) == constant == (moe.gate.weight.grad.abs().max().item() < 1e-6)
