"""Routing: LitGPT's choice to the bit, in fp32 whatever the model's precision."""

import pytest
import torch
import torch.nn.functional as F
from litgpt import Config
from litgpt.model import GroupedTopkRouter

from custom_moe import MoE, score_function, weights_are_constant
from custom_moe.router import linear_fp32, route

SIGMOID = dict(n_expert_groups=3, n_topk_groups=2, n_topk_scores_per_group=2)


def config_of(**fields: object) -> Config:
    sizes = dict(n_layer=1, n_embd=32, n_head=2, moe_intermediate_size=16, n_expert=12, n_expert_per_token=3)
    return Config(**{**sizes, "mlp_class_name": "LLaMAMoE", "bias": False, **fields})


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_softmax_routing_is_litgpts_to_the_bit(scale: float) -> None:
    config = config_of(routed_scaling_factor=scale)
    logits = torch.randn(50, 12)
    router = route(logits, config)
    top, indices = torch.topk(logits, 3)  # the lines of litgpt.model.LLaMAMoE.forward
    weights = top.softmax(dim=1, dtype=torch.float)
    assert torch.equal(router.indices, indices)
    assert torch.equal(router.weights, weights * scale)
    assert router.logits is logits
    assert router.indices.dtype == torch.int64
    assert score_function(config) == "softmax"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", ["none", "small", "negative"])
def test_sigmoid_routing_is_litgpts_to_the_bit(norm: bool, bias: str) -> None:
    """With biases that make scores negative too, where LitGPT's zero for a masked expert beats an allowed one."""
    config = config_of(**SIGMOID, norm_topk_prob=norm)
    stock = GroupedTopkRouter(config)
    torch.nn.init.normal_(stock.weight)
    stock.e_score_correction_bias += {"none": 0.0, "small": 0.1, "negative": 0.0}[bias] * torch.randn(12)
    stock.e_score_correction_bias -= 0.9 if bias == "negative" else 0.0
    x = torch.randn(200, 32)

    router = route(linear_fp32(x, stock.weight), config, stock.e_score_correction_bias)
    weights, indices = stock(x)
    assert torch.equal(router.indices, indices)
    assert torch.equal(router.weights, weights)
    assert score_function(config) == "sigmoid"


def test_the_correction_bias_moves_the_choice_but_not_the_weights() -> None:
    config = config_of(**SIGMOID, n_expert_per_token=1)
    logits = torch.zeros(4, 12)
    bias = torch.zeros(12).index_fill(0, torch.tensor([7]), 5.0)
    router = route(logits, config, bias)
    assert router.indices.eq(7).all()
    torch.testing.assert_close(router.weights, torch.full((4, 1), 0.5))


def test_logits_are_fp32_under_autocast_and_in_a_bf16_model() -> None:
    """With bf16 inputs the products must still be summed in fp32: a bf16 matrix product errs by 1e-2 here."""
    moe = MoE(config_of()).to(torch.bfloat16)
    x = torch.randn(1, 64, 32).bfloat16() * 4
    exact = F.linear(x.double(), moe.gate.weight.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, mixed = moe.forward_with_router(x)
    _, true = moe.forward_with_router(x)
    for router in (mixed, true):
        assert router.logits.dtype == router.weights.dtype == torch.float32
        torch.testing.assert_close(router.logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert (F.linear(x, moe.gate.weight)[0] - exact).abs().max() > 1e-3


def test_gradients_reach_the_gate_through_the_weights() -> None:
    for fields in ({}, SIGMOID):
        moe = MoE(config_of(**fields))
        moe(torch.randn(1, 8, 32)).square().sum().backward()
        assert moe.gate.weight.grad is not None and moe.gate.weight.grad.abs().sum() > 0


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
    config = config_of(**fields)
    moe = MoE(config)
    moe(torch.randn(1, 64, 32)).square().sum().backward()
    assert moe.gate.weight.grad is not None
    assert weights_are_constant(config) == constant == (moe.gate.weight.grad.abs().max().item() < 1e-6)
