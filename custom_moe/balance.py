"""Losses that keep the experts evenly used and the router's logits small, and the load that is logged.

Shape suffixes: N tokens, E n_expert, K n_expert_per_token.
"""

import torch
from torch import Tensor

from custom_moe.router import ScoreFunction


def expert_load(indices_NK: Tensor, n_expert: int, mask_N: Tensor | None = None) -> Tensor:
    """Each expert's fraction of the ``N*K`` assignments: ``(E,)`` fp32, sums to 1; ``1/E`` each when even.

    ``mask_N`` is False for tokens that do not count (padding), here and in the losses.
    """
    assigned = indices_NK.flatten()
    counts_E = torch.zeros(n_expert, device=assigned.device, dtype=torch.float32)
    if mask_N is None:
        counts_E = counts_E.scatter_add(0, assigned, torch.ones_like(assigned, dtype=torch.float32))
        return counts_E / assigned.numel()
    counted_NK = mask_N.float().unsqueeze(1).expand_as(indices_NK)
    return counts_E.scatter_add(0, assigned, counted_NK.flatten()) / counted_NK.sum()


def load_balancing_loss(
    logits_NE: Tensor,
    indices_NK: Tensor,
    score_function: ScoreFunction = "softmax",
    mask_N: Tensor | None = None,
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

    Returns:
        A scalar, fp32, without its coefficient (0.01 is usual).
    """
    n_expert = logits_NE.size(-1)
    logits_NE = logits_NE.float()
    if score_function == "sigmoid":
        scores_NE = logits_NE.sigmoid()
        probs_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
    else:
        probs_NE = logits_NE.softmax(dim=-1)
    return n_expert * (expert_load(indices_NK, n_expert, mask_N) * _mean_over_tokens(probs_NE, mask_N)).sum()


def router_z_loss(logits_NE: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """``mean(logsumexp(logits)^2)``, which keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        A scalar, fp32, without its coefficient (0.001 is usual).
    """
    return _mean_over_tokens(logits_NE.float().logsumexp(dim=-1).square(), mask_N)


def _mean_over_tokens(values: Tensor, mask_N: Tensor | None) -> Tensor:
    """``(N, ...) -> (...)``, over the tokens that count."""
    if mask_N is None:
        return values.mean(dim=0)
    counted = mask_N.to(values.dtype)
    total: Tensor = torch.tensordot(counted, values, dims=1)
    return total / counted.sum()
