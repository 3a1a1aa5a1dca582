"""What keeps the experts evenly used: losses, the update of a selection bias, and the statistics that are logged.

Shape suffixes: N tokens, E n_expert, K n_expert_per_token, L MoE layers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from custom_moe.router import ScoreFunction

DEAD = 0.01
"""An expert is dead that gets less than this of an even share."""


def expert_counts(indices_NK: Tensor, n_expert: int, mask_N: Tensor | None = None) -> Tensor:
    """How many assignments each expert got: ``(E,)`` int64, so that sums over batches and devices are exact.

    ``mask_N`` is False for tokens that do not count (padding), here and in the losses.
    """
    assigned = indices_NK.flatten()
    ones = torch.ones_like(indices_NK) if mask_N is None else mask_N.long().unsqueeze(1).expand_as(indices_NK)
    counts_E = torch.zeros(n_expert, device=assigned.device, dtype=torch.int64)
    return counts_E.scatter_add(0, assigned, ones.flatten())


def expert_load(counts: Tensor) -> Tensor:
    """Each expert's share of the assignments, ``(..., E)`` fp32: sums to 1; ``1/E`` each when even."""
    return counts.float() / counts.sum(dim=-1, keepdim=True)


def router_probabilities(logits_NE: Tensor, score_function: ScoreFunction = "softmax") -> Tensor:
    """A token's probabilities among all experts, ``(N, E)`` fp32; for a sigmoid router its scores over their sum."""
    if score_function == "softmax":
        return logits_NE.float().softmax(dim=-1)
    scores_NE = logits_NE.float().sigmoid()
    return scores_NE / scores_NE.sum(dim=-1, keepdim=True)


def router_confidence(
    logits_NE: Tensor, score_function: ScoreFunction = "softmax", mask_N: Tensor | None = None
) -> Tensor:
    """The mean over tokens of the probability of the likeliest expert: a scalar from ``1/E`` to 1."""
    return _mean_over_tokens(router_probabilities(logits_NE.detach(), score_function).amax(dim=-1), mask_N)


def load_balancing_loss(
    logits_NE: Tensor,
    indices_NK: Tensor,
    score_function: ScoreFunction = "softmax",
    mask_N: Tensor | None = None,
    load_E: Tensor | None = None,
) -> Tensor:
    """``E * sum_e f_e * P_e``: 1 when even, up to ``E`` when every token prefers and gets one expert.

    ``f_e`` is the share of the assignments that expert ``e`` got and ``P_e`` the mean over tokens of its probability
    among *all* experts, not among the chosen ones (Switch Transformers, arXiv 2101.03961, eq. 4 to 6). Only ``P`` has a
    gradient. For a sigmoid router pass ``score_function="sigmoid"``: the probabilities are then the sigmoid scores
    divided by their sum (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20), taken here over all given tokens and not per
    sequence.

    Args:
        logits_NE: the router's logits.
        indices_NK: the chosen experts.
        score_function: ``custom_moe.score_function(config)`` of the model.
        mask_N: False for tokens that do not count.
        load_E: ``f``, as of a batch larger than the tokens given (arXiv 2501.11873: the load of a small batch is noise
            that forces each of them to be even); None takes that of ``indices_NK``.

    Returns:
        A scalar, fp32, without its coefficient (0.01 is usual).
    """
    n_expert = logits_NE.size(-1)
    if load_E is None:
        load_E = expert_load(expert_counts(indices_NK, n_expert, mask_N))
    probs_E = _mean_over_tokens(router_probabilities(logits_NE, score_function), mask_N)
    return n_expert * (load_E * probs_E).sum()


def router_z_loss(logits_NE: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """``mean(logsumexp(logits)^2)``, which keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        A scalar, fp32, without its coefficient (0.001 is usual).
    """
    return _mean_over_tokens(logits_NE.float().logsumexp(dim=-1).square(), mask_N)


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float | Tensor) -> Tensor:
    """``bias + rate * sign(mean(counts) - counts)``: balance without a loss (arXiv 2408.15664, algorithm 1).

    Once per optimizer step, from all of the step's tokens on all devices. An expert that got less than the mean is
    chosen a little more easily from then on; weights and gradients stay as they are.

    Args:
        bias_E: the selection bias of a sigmoid router (``gate.e_score_correction_bias``), fp32.
        counts_E: ``expert_counts``, summed.
        rate: 0.001 in DeepSeek-V3.
    """
    return bias_E + rate * (counts_E.sum() - counts_E * counts_E.numel()).sign().to(bias_E.dtype)


class LoadStatistics(NamedTuple):
    """How evenly each layer uses its experts; each ``(L,)`` fp32."""

    max_over_mean: Tensor
    """The busiest expert's assignments over an even share: 1 is even, ``E/K`` the most there can be"""
    min_over_mean: Tensor
    """The idlest expert's: 1 is even, 0 never chosen"""
    entropy: Tensor
    """Of the load, see ``normalized_entropy``"""
    dead: Tensor
    """How many experts get less than ``DEAD`` of an even share"""


def load_statistics(counts_LE: Tensor) -> LoadStatistics:
    """The statistics of summed ``expert_counts``; their scale does not matter."""
    load_LE = expert_load(counts_LE)
    over_mean_LE = load_LE * load_LE.size(-1)
    return LoadStatistics(
        max_over_mean=over_mean_LE.amax(dim=-1),
        min_over_mean=over_mean_LE.amin(dim=-1),
        entropy=normalized_entropy(load_LE),
        dead=(over_mean_LE < DEAD).sum(dim=-1).float(),
    )


def normalized_entropy(probabilities: Tensor) -> Tensor:
    """Over the last dimension, of its greatest value (the log of the size): 1 is even, 0 all in one place."""
    size = probabilities.size(-1)
    if size == 1:
        return torch.ones_like(probabilities[..., 0])
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1) / math.log(size)
    return entropy


def _mean_over_tokens(values: Tensor, mask_N: Tensor | None) -> Tensor:
    """``(N, ...) -> (...)``, over the tokens that count."""
    if mask_N is None:
        return values.mean(dim=0)
    counted_N = mask_N.to(values.dtype)
    total = (values * counted_N.view(-1, *[1] * (values.ndim - 1))).sum(dim=0)  # autocast would round a product
    return total / counted_N.sum()
