"""Balance losses and statistics: values computed by hand, and gradients that reach every router of a model."""

import math

import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor

from custom_moe import (
    RouterOutput,
    expert_counts,
    expert_load,
    load_balancing_loss,
    load_statistics,
    router_confidence,
    router_z_loss,
    updated_bias,
    use_custom_moe,
)

SIGMOID = dict(n_expert_groups=2, n_topk_groups=2, n_topk_scores_per_group=1)


def routers_of(gpt: GPT, ids: Tensor) -> list[RouterOutput]:
    x, routers = gpt.transformer.wte(ids), []
    cos, sin = gpt.cos[: ids.size(1)].unsqueeze(0), gpt.sin[: ids.size(1)].unsqueeze(0)
    for block in gpt.transformer.h:
        x, router = block(x, cos, sin, return_router_output=True)
        routers.append(router)
    return routers


def test_expert_counts_and_load() -> None:
    indices = torch.tensor([[0, 1], [0, 3], [0, 1]])
    counts = expert_counts(indices, 5)
    assert counts.dtype == torch.int64, "sums over any number of tokens and devices are exact"
    assert counts.tolist() == [3, 2, 0, 1, 0]
    assert expert_counts(indices, 5, torch.tensor([True, False, True])).tolist() == [2, 2, 0, 0, 0]
    torch.testing.assert_close(expert_load(counts), torch.tensor([3, 2, 0, 1, 0]) / 6)
    two_layers = expert_load(torch.tensor([[1, 3], [2, 2]]))
    torch.testing.assert_close(two_layers, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_load_is_fp32_with_bf16_default_type() -> None:
    """Under bf16-true, Fabric sets the default type in the forward, and integers divide in the default type."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert expert_load(torch.tensor([1, 2])).tolist() == pytest.approx([1 / 3, 2 / 3], rel=1e-7)
    finally:
        torch.set_default_dtype(default)


def test_load_balancing_loss_by_hand() -> None:
    # Two tokens, two experts, top-1, both to expert 0 with probabilities 3/4 and 1/2 of the full softmax.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    indices = torch.tensor([[0], [0]])
    torch.testing.assert_close(load_balancing_loss(logits, indices), torch.tensor(2 * 1.0 * (0.75 + 0.5) / 2))
    # Sigmoid scores 3/4 and 1/2, 1/2 and 1/2, normalised: 3/5 and 1/2 for expert 0.
    loss = load_balancing_loss(logits, indices, "sigmoid")
    torch.testing.assert_close(loss, torch.tensor(2 * (0.6 + 0.5) / 2))


def test_probabilities_cover_all_experts() -> None:
    """A softmax over the chosen experts would not see the others."""
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    f, p = torch.tensor([0.5, 0.5, 0.0]), logits[0].softmax(0)
    torch.testing.assert_close(load_balancing_loss(logits, torch.tensor([[0, 1]])), 3 * (f * p).sum())


def test_load_balancing_loss_with_given_load() -> None:
    """The chosen experts do not matter then, and the gradient follows the given load."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], requires_grad=True)
    load = torch.tensor([0.1, 0.9])
    losses = [load_balancing_loss(logits, torch.tensor(chosen), load_E=load) for chosen in ([[0], [0]], [[1], [0]])]
    for loss in losses:
        torch.testing.assert_close(loss, torch.tensor(2 * (0.1 * (0.75 + 0.5) / 2 + 0.9 * (0.25 + 0.5) / 2)))
    (gradient,) = torch.autograd.grad(losses[0], logits)
    # d(softmax_0)/d(logit_0) is p(1 - p): 3/16 and 1/4; expert 1 gets the opposite. Times 2 * (0.1 - 0.9) / 2 tokens.
    expected = torch.tensor([[3 / 16, -3 / 16], [1 / 4, -1 / 4]]) * 2 * (0.1 - 0.9) / 2
    torch.testing.assert_close(gradient, expected)
    own = expert_load(expert_counts(torch.tensor([[0], [0]]), 2))
    given, default = (load_balancing_loss(logits, torch.tensor([[0], [0]]), load_E=load) for load in (own, None))
    assert given == default


def test_updated_bias_by_hand() -> None:
    """One step towards the mean, whatever the distance; none at the mean."""
    bias = torch.tensor([0.5, 0.5, -0.25, 0.0])
    updated = updated_bias(bias, torch.tensor([9, 4, 3, 0]), 0.001)
    torch.testing.assert_close(updated, torch.tensor([0.499, 0.5, -0.249, 0.001]), rtol=0, atol=1e-7)
    assert updated.dtype == torch.float32
    # Rounded to fp32 all of these are equal.
    counts = torch.tensor([2**25 + 1, 2**25, 2**25 - 1])
    assert updated_bias(torch.zeros(3), counts, 1.0).tolist() == [-1, 0, 1]


def test_load_statistics_by_hand() -> None:
    """An even layer, one with a dead expert, and one that uses two experts only."""
    counts = torch.tensor([[250, 250, 250, 250], [400, 350, 248, 2], [500, 500, 0, 0]])
    found = load_statistics(counts)
    torch.testing.assert_close(found.max_over_mean, torch.tensor([1.0, 1.6, 2.0]))
    torch.testing.assert_close(found.min_over_mean, torch.tensor([1.0, 0.008, 0.0]))
    by_hand = -sum(share * math.log(share) for share in (0.4, 0.35, 0.248, 0.002)) / math.log(4)
    torch.testing.assert_close(found.entropy, torch.tensor([1.0, by_hand, 0.5]))
    assert found.dead.tolist() == [0, 1, 2], "less than 1% of an even share"
    for of_counts, of_means in zip(found, load_statistics(counts / 6), strict=True):
        torch.testing.assert_close(of_counts, of_means)
    alone = load_statistics(torch.tensor([[7]]))
    assert [float(value) for value in alone] == [1, 1, 1, 0]


def test_router_confidence_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [0.0, 9.0]])
    seen = torch.tensor([True, True, False])
    torch.testing.assert_close(router_confidence(logits, mask_N=seen), torch.tensor((0.75 + 0.5) / 2))
    torch.testing.assert_close(router_confidence(logits[:2], "sigmoid"), torch.tensor((0.6 + 0.5) / 2))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loss_is_1_if_even_and_E_if_collapsed(score: str) -> None:
    even = torch.stack([torch.arange(8).roll(shift)[:2] for shift in range(8)])
    torch.testing.assert_close(load_balancing_loss(torch.zeros(8, 8), even, score), torch.tensor(1.0))
    collapsed = torch.full((8, 8), -30.0).index_fill(1, torch.tensor([5]), 30.0)
    chosen = torch.full((8, 1), 5)
    torch.testing.assert_close(load_balancing_loss(collapsed, chosen, score), torch.tensor(8.0))


def test_mask_is_exact_under_autocast() -> None:
    """A matrix product over the tokens would be rounded to 16 bits."""
    logits, indices = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(200, 1).long()
    seen = torch.arange(200) < 150

    def values(logits: Tensor, indices: Tensor, seen: Tensor | None = None) -> tuple[Tensor, ...]:
        balance = load_balancing_loss(logits, indices, mask_N=seen)
        return balance, router_z_loss(logits, seen), router_confidence(logits, mask_N=seen)

    expected = values(logits[seen], indices[seen])
    torch.testing.assert_close(values(logits, indices, seen), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(values(logits, indices, seen), expected)


def test_router_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    torch.testing.assert_close(router_z_loss(logits), torch.tensor((math.log(2) ** 2 + math.log(4) ** 2) / 2))


@pytest.mark.parametrize(
    "fields", [{}, SIGMOID, {"bias": True, "n_shared_expert": 1}], ids=["softmax", "sigmoid", "shared"]
)
@pytest.mark.parametrize("which", ["balance", "z"])
def test_losses_reach_every_router_of_a_model(moe_fields: dict, fields: dict, which: str) -> None:
    config = Config(**{**moe_fields, **fields})
    with use_custom_moe():
        gpt = GPT(config)
    routers = routers_of(gpt, torch.randint(0, 384, (2, 16)))
    uneven = torch.arange(1, config.n_expert + 1) / sum(range(1, config.n_expert + 1))  # an even load has no gradient
    losses = [
        load_balancing_loss(router.logits, score_function=router.score_function, load_E=uneven)
        if which == "balance"
        else router_z_loss(router.logits)
        for router in routers
    ]
    torch.stack(losses).mean().backward()
    for block in gpt.transformer.h:
        assert block.mlp.gate.weight.grad.abs().max() > 1e-6
    assert gpt.transformer.wte.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_descending_the_loss_evens_the_load(moe_fields: dict, fields: dict) -> None:
    """Tests the sign, the scale and which factor has the gradient, all at once."""
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
        worst.append(expert_load(expert_counts(router.experts, 4)).max().item())
        loss = load_balancing_loss(router.logits, router.experts, router.score_function)
        (gradient,) = torch.autograd.grad(loss, gate)
        with torch.no_grad():
            gate -= 0.1 * gradient
    assert worst[0] > 0.4
    assert worst[-1] < 0.26
