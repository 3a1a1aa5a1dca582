"""The balance losses: values by hand, and gradients that truly reach every router of a model."""

import math

import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor

from custom_moe import RouterOutput, expert_load, load_balancing_loss, router_z_loss, score_function, use_custom_moe

SIGMOID = dict(n_expert_groups=2, n_topk_groups=2, n_topk_scores_per_group=1)


def routers_of(gpt: GPT, ids: Tensor) -> list[RouterOutput]:
    x, routers = gpt.transformer.wte(ids), []
    cos, sin = gpt.cos[: ids.size(1)].unsqueeze(0), gpt.sin[: ids.size(1)].unsqueeze(0)
    for block in gpt.transformer.h:
        x, router = block(x, cos, sin, return_router_output=True)
        routers.append(router)
    return routers


def test_expert_load() -> None:
    load = expert_load(torch.tensor([[0, 1], [0, 3], [0, 1]]), 5)
    torch.testing.assert_close(load, torch.tensor([3, 2, 0, 1, 0]) / 6)


def test_load_balancing_loss_by_hand() -> None:
    # Two tokens, two experts, top-1, both to expert 0 with probabilities 3/4 and 1/2 of the full softmax.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    indices = torch.tensor([[0], [0]])
    torch.testing.assert_close(load_balancing_loss(logits, indices), torch.tensor(2 * 1.0 * (0.75 + 0.5) / 2))
    # Sigmoid scores 3/4 and 1/2, 1/2 and 1/2, normalised: 3/5 and 1/2 for expert 0.
    loss = load_balancing_loss(logits, indices, "sigmoid")
    torch.testing.assert_close(loss, torch.tensor(2 * (0.6 + 0.5) / 2))


def test_probabilities_are_of_all_experts_not_of_the_chosen_ones() -> None:
    """The mean of a top-k softmax rises and falls with the choice itself and cannot see the other experts."""
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    f, p = torch.tensor([0.5, 0.5, 0.0]), logits[0].softmax(0)
    torch.testing.assert_close(load_balancing_loss(logits, torch.tensor([[0, 1]])), 3 * (f * p).sum())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_even_is_one_and_collapsed_is_the_number_of_experts(score: str) -> None:
    even = torch.stack([torch.arange(8).roll(shift)[:2] for shift in range(8)])
    torch.testing.assert_close(load_balancing_loss(torch.zeros(8, 8), even, score), torch.tensor(1.0))
    collapsed = torch.full((8, 8), -30.0).index_fill(1, torch.tensor([5]), 30.0)
    chosen = torch.full((8, 1), 5)
    torch.testing.assert_close(load_balancing_loss(collapsed, chosen, score), torch.tensor(8.0))


def test_router_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    torch.testing.assert_close(router_z_loss(logits), torch.tensor((math.log(2) ** 2 + math.log(4) ** 2) / 2))


@pytest.mark.parametrize(
    "fields", [{}, SIGMOID, {"bias": True, "n_shared_expert": 1}], ids=["softmax", "sigmoid", "shared"]
)
@pytest.mark.parametrize("which", ["balance", "z"])
def test_both_losses_reach_every_router_of_a_model(moe_fields: dict, fields: dict, which: str) -> None:
    config = Config(**{**moe_fields, **fields})
    with use_custom_moe():
        gpt = GPT(config)
    routers = routers_of(gpt, torch.randint(0, 384, (2, 16)))
    score = score_function(config)
    losses = [
        load_balancing_loss(router.logits, router.indices, score)
        if which == "balance"
        else router_z_loss(router.logits)
        for router in routers
    ]
    torch.stack(losses).mean().backward()
    for block in gpt.transformer.h:
        assert block.mlp.gate.weight.grad.abs().max() > 1e-6
    assert gpt.transformer.wte.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_descending_the_load_balancing_loss_evens_the_load(moe_fields: dict, fields: dict) -> None:
    """The sign, the scale and the side of the product that has the gradient, all at once."""
    torch.manual_seed(0)
    config = Config(**{**moe_fields, **fields, "n_layer": 1})
    with use_custom_moe():
        gpt = GPT(config)
    gate = gpt.transformer.h[0].mlp.gate.weight
    with torch.no_grad():
        gpt.transformer.wte.weight += 1.0  # what all tokens have in common prefers the same experts
    ids = torch.randint(0, 384, (4, 64))
    worst = []
    for _ in range(40):
        (router,) = routers_of(gpt, ids)
        worst.append(expert_load(router.indices, 4).max().item())
        loss = load_balancing_loss(router.logits, router.indices, score_function(config))
        (gradient,) = torch.autograd.grad(loss, gate)
        with torch.no_grad():
            gate -= 0.1 * gradient
    assert worst[0] > 0.4
    assert worst[-1] < 0.26
