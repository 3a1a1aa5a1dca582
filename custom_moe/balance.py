"""Losses and statistics that keep the experts evenly used. They work with any router.

(The third means, moving a selection bias, is part of the router: ``router.updated_bias``.)

Shape suffixes: see ``custom_moe``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from custom_moe.router import RouterOutput, ScoreFunction

DEAD = 0.01
"""An expert with less than this part of an even share of the assignments is counted as dead."""


def expert_counts(indices: Tensor, n_expert: int, mask: Tensor | None = None) -> Tensor:
    """Count the assignments of each expert.

    Args:
        indices: int64 expert numbers of any shape, such as ``(S,)`` or ``(N, K)``.
        n_expert: number of experts.
        mask: False for assignments that do not count; has the first dimensions of ``indices``.

    Returns:
        ``(E,)`` int64, so that sums over batches and devices are exact.
    """
    counted = torch.ones_like(indices)
    if mask is not None:
        # A mask over tokens (N,) counts for all K assignments (N, K) of a token.
        trailing = [1] * (indices.ndim - mask.ndim)  # (N,) -> (N, 1) -> (N, K)
        counted = mask.to(counted.dtype).view(*mask.shape, *trailing).expand_as(indices)
    counts_E = torch.zeros(n_expert, device=indices.device, dtype=torch.int64)
    return counts_E.scatter_add(0, indices.flatten(), counted.flatten())


def assignment_counts(router: RouterOutput, mask_N: Tensor | None = None) -> Tensor:
    """Count a router's assignments of each expert.

    Args:
        router: output of a router.
        mask_N: False for tokens that do not count (padding).

    Returns:
        ``(E,)`` int64.
    """
    mask_S = None if mask_N is None else mask_N.index_select(0, router.tokens)
    return expert_counts(router.experts, router.logits.size(1), mask_S)


def expert_load(counts: Tensor) -> Tensor:
    """Return each expert's part of the assignments, ``(..., E)`` fp32 with sum 1; ``1/E`` each if even."""
    # .float() on both sides: the quotient of integers would have the default type, bf16 under bf16-true.
    return counts.float() / counts.sum(dim=-1, keepdim=True)


def router_probabilities(logits_NE: Tensor, score_function: ScoreFunction = "softmax") -> Tensor:
    """Return each token's probabilities of all experts, ``(N, E)`` fp32.

    For a sigmoid router these are the scores divided by their sum.
    """
    if score_function == "softmax":
        return logits_NE.float().softmax(dim=-1)
    scores_NE = logits_NE.float().sigmoid()
    return scores_NE / scores_NE.sum(dim=-1, keepdim=True)


def router_confidence(
    logits_NE: Tensor, score_function: ScoreFunction = "softmax", mask_N: Tensor | None = None
) -> Tensor:
    """Return the probability of the most probable expert, averaged over tokens: a scalar from ``1/E`` to 1."""
    return _mean_over_tokens(router_probabilities(logits_NE.detach(), score_function).amax(dim=-1), mask_N)


def load_balancing_loss(
    logits_NE: Tensor,
    indices: Tensor | None = None,
    score_function: ScoreFunction = "softmax",
    mask_N: Tensor | None = None,
    load_E: Tensor | None = None,
) -> Tensor:
    """Return ``E * sum_e f_e * P_e``: 1 if even, up to ``E`` if every token prefers and gets one expert.

    ``f_e`` is expert ``e``'s part of the assignments and ``P_e`` its probability among all experts, averaged over the
    tokens (Switch Transformers, arXiv 2101.03961, eq. 4 to 6). Only ``P`` has a gradient. For a sigmoid router the
    probabilities are the scores divided by their sum (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20), averaged here over
    all given tokens and not per sequence.

    Args:
        logits_NE: logits of the router.
        indices: experts of the assignments, ``(S,)`` or ``(N, K)``; needed without ``load_E``.
        score_function: ``RouterOutput.score_function``.
        mask_N: False for tokens that do not count. Without ``load_E`` it needs ``indices`` of the shape ``(N, K)``.
        load_E: ``f``, for example of a larger batch: the load of a small batch is noise, and would force each batch to
            be even (arXiv 2501.11873). None: the load of ``indices``.

    Returns:
        A scalar, fp32, without its coefficient (0.01 is usual).

    Raises:
        ValueError: neither ``indices`` nor ``load_E`` is given.
    """
    n_expert = logits_NE.size(-1)
    if load_E is None:
        if indices is None:
            raise ValueError("load_balancing_loss got neither indices nor load_E; pass one of them.")
        load_E = expert_load(expert_counts(indices, n_expert, mask_N))
    probs_E = _mean_over_tokens(router_probabilities(logits_NE, score_function), mask_N)
    return n_expert * (load_E * probs_E).sum()


def router_z_loss(logits_NE: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """Return ``mean(logsumexp(logits)^2)``, which keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        A scalar, fp32, without its coefficient (0.001 is usual).
    """
    return _mean_over_tokens(logits_NE.float().logsumexp(dim=-1).square(), mask_N)


class LoadStatistics(NamedTuple):
    """How evenly each layer uses its experts; each ``(L,)`` fp32."""

    max_over_mean: Tensor
    """Assignments of the most used expert over an even share: 1 is even, ``E/K`` the largest possible value"""
    min_over_mean: Tensor
    """Assignments of the least used expert over an even share: 1 is even, 0 is never chosen"""
    entropy: Tensor
    """Entropy of the load, see ``normalized_entropy``"""
    dead: Tensor
    """Number of experts with less than ``DEAD`` of an even share"""


def load_statistics(counts_LE: Tensor) -> LoadStatistics:
    """Return the statistics of summed ``expert_counts``; their scale does not matter."""
    # An even share is 1/E, so the load times E is 1 if even.
    load_LE = expert_load(counts_LE)
    over_mean_LE = load_LE * load_LE.size(-1)
    return LoadStatistics(
        max_over_mean=over_mean_LE.amax(dim=-1),
        min_over_mean=over_mean_LE.amin(dim=-1),
        entropy=normalized_entropy(load_LE),
        dead=(over_mean_LE < DEAD).sum(dim=-1).float(),
    )


def normalized_entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy over the last dimension, divided by its maximum: 1 is even, 0 is all in one place."""
    size = probabilities.size(-1)
    if size == 1:  # log(1) is 0
        return torch.ones_like(probabilities[..., 0])
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1) / math.log(size)
    return entropy


def _mean_over_tokens(values: Tensor, mask_N: Tensor | None) -> Tensor:
    """Average ``(N, ...)`` over the tokens that count: ``(...)``."""
    if mask_N is None:
        return values.mean(dim=0)
    counted_N = mask_N.to(values.dtype)
    # Not a matrix product: autocast would round it to 16 bits.
    total = (values * counted_N.view(-1, *[1] * (values.ndim - 1))).sum(dim=0)
    return total / counted_N.sum()
