"""Routers decide which experts each token goes to, and with which weight. They compute in fp32.

To add a router, subclass ``Router`` and return a ``RouterOutput``. Pass the class to ``use_custom_moe(router=...)`` or
``MoE(config, router=...)``, or name it in a training run: ``--moe.router my_routers.MyRouter``. Everything below the
router (dispatch, experts, balance losses, statistics, LoRA) takes a flat list of assignments, so a token may have any
number of experts, also none.

Shape suffixes: see ``custom_moe``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from litgpt import Config
from torch import Tensor, nn

ScoreFunction = Literal["softmax", "sigmoid"]


class RouterOutput(NamedTuple):
    """The assignments of ``N`` tokens to experts, in any order, and the logits behind them.

    The number of assignments ``S`` should depend on ``N`` alone, not on values: data-dependent shapes wait for the GPU
    and recompile under ``torch.compile``. A router that drops assignments gives them the weight 0.

    Attributes:
        logits: ``(N, E)`` fp32, differentiable; the balance losses and the statistics use them.
        weights: ``(S,)`` fp32, differentiable; factor of each assignment's expert output.
        experts: ``(S,)`` int64, the expert of each assignment.
        tokens: ``(S,)`` int64, the token of each assignment.
        per_token: ``K`` if the list has ``K`` assignments of token 0, then ``K`` of token 1, and so on. None: the
            dispatch finds the assignments of a token by one more sort.
        score_function: how the logits become probabilities.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor
    tokens: Tensor
    per_token: int | None = None
    score_function: ScoreFunction = "softmax"

    @property
    def indices(self) -> Tensor:
        """``experts`` under its name in 0.1.0."""
        return self.experts


class Router(nn.Module):
    """Base class of routers, the ``gate`` of a ``MoE``.

    A subclass takes LitGPT's config, implements ``forward`` and ``reset_parameters``, and may override
    ``update_balance``. Its parameters get no weight decay.
    """

    def forward(self, x_NC: Tensor) -> RouterOutput:
        """Assign ``N`` tokens to experts."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialize the parameters; LitGPT's pretraining calls this for each module."""
        raise NotImplementedError

    def update_balance(self, counts_E: Tensor, rate: float | Tensor) -> None:
        """React to the assignments of one optimizer step, summed over micro batches and devices.

        The training loop calls this after each step. By default nothing happens.

        Args:
            counts_E: ``(E,)``, how many assignments each expert got.
            rate: step size, ``moe.bias_update_rate`` of the run.
        """


class TopKRouter(Router):
    """Softmax over the ``n_expert_per_token`` largest logits, as in LitGPT's ``LLaMAMoE`` (Mixtral).

    The only parameter is ``weight (E, C)``, so the state-dict key is LitGPT's ``gate.weight``.
    """

    score_function: ScoreFunction = "softmax"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from N(0, sqrt(2 / 5 / n_embd)), as LitGPT's pretraining does for linear layers (arXiv 2204.06745)."""
        nn.init.normal_(self.weight, mean=0.0, std=(2.0 / 5 / self.config.n_embd) ** 0.5)

    def forward(self, x_NC: Tensor) -> RouterOutput:
        """Assign each token to ``K`` experts."""
        logits_NE = linear_fp32(x_NC, self.full_weight())
        experts_NK, weights_NK = self.choose(logits_NE)
        if self.config.routed_scaling_factor != 1.0:
            weights_NK = weights_NK * self.config.routed_scaling_factor
        # A flat list, token by token. The dispatch below the router does not know K.
        N, K = experts_NK.shape
        tokens_S = torch.arange(N * K, device=experts_NK.device) // K
        return RouterOutput(logits_NE, weights_NK.flatten(), experts_NK.flatten(), tokens_S, K, self.score_function)

    def full_weight(self) -> Tensor:
        """Return the weight ``(E, C)`` that the tokens are multiplied with; LoRA adds its update here."""
        return self.weight

    def choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's experts ``(N, K)`` int64, all different, and their weights ``(N, K)`` fp32."""
        # (N, E) -> (N, K), the largest logit first
        top_logits_NK, experts_NK = largest(logits_NE, self.config.n_expert_per_token)
        # The softmax over the chosen logits is Mixtral's softmax over all, renormalized over the chosen ones.
        return experts_NK, top_logits_NK.softmax(dim=1)


class GroupedTopKRouter(TopKRouter):
    """Sigmoid scores and a choice within the best groups of experts, as in LitGPT's ``GroupedTopkRouter`` (DeepSeek-V3,
    arXiv 2412.19437, eq. 16).

    The buffer ``e_score_correction_bias (E,)`` is added to the scores for the choice only, not to the weights. It stays
    fp32 in a model of any type: bf16 would round its small updates away.
    """

    score_function: ScoreFunction = "sigmoid"
    e_score_correction_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Draw the weight as ``TopKRouter`` does, and set the bias to zero."""
        super().reset_parameters()
        if hasattr(self, "e_score_correction_bias"):  # not yet in the constructor of the base class
            nn.init.zeros_(self.e_score_correction_bias)

    def choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = logits_NE.sigmoid()
        # Detached: the choice has no gradient, only the weights have one.
        choice_NE = scores_NE.detach() + self.e_score_correction_bias
        if self.config.n_topk_groups < self.config.n_expert_groups:
            choice_NE = self._within_best_groups(choice_NE)
        # sorted=False as in LitGPT, so that a token's experts are added up in the same order.
        experts_NK = largest(choice_NE, self.config.n_expert_per_token, sorted=False)[1]
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.norm_topk_prob:
            # 1e-20 as in LitGPT, for scores that are all 0
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return experts_NK, weights_NK

    @torch.no_grad()
    def _within_best_groups(self, scores_NE: Tensor) -> Tensor:
        """Set the scores outside of the ``n_topk_groups`` groups with the largest sums of best scores to 0."""
        config = self.config
        # G: groups, e: experts of a group. A group is as good as the sum of its best scores.
        scores_NGe = scores_NE.view(len(scores_NE), config.n_expert_groups, -1)  # (N, E) -> (N, G, e)
        group_scores_NG = scores_NGe.topk(config.n_topk_scores_per_group, dim=-1)[0].sum(dim=-1)
        groups = torch.topk(group_scores_NG, k=config.n_topk_groups, dim=-1, sorted=False)[1]
        allowed_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter_(1, groups, True)
        # 0.0 and not -inf, as in LitGPT and transformers: a model must choose alike here and there. With a negative
        # correction bias this admits experts of other groups.
        return scores_NGe.masked_fill(~allowed_NG.unsqueeze(-1), 0.0).flatten(1)

    @torch.no_grad()
    def update_balance(self, counts_E: Tensor, rate: float | Tensor) -> None:
        """Move the selection bias towards an even load, see ``custom_moe.updated_bias``."""
        self.e_score_correction_bias.copy_(updated_bias(self.e_score_correction_bias, counts_E, rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupedTopKRouter":
        # `.to()`, `.half()` and `.to_empty()` all go through here.
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device, torch.float32)
        return self


def router_for(config: Config) -> Router:
    """Return the router that a LitGPT config describes."""
    if score_function(config) == "sigmoid":
        return GroupedTopKRouter(config)
    return TopKRouter(config)


def score_function(config: Config) -> ScoreFunction:
    """Return how a LitGPT config turns logits into scores: sigmoid with expert groups (DeepSeek-V3), else softmax."""
    # LitGPT has no field for it: groups of experts exist in models of the DeepSeek-V3 kind only.
    return "sigmoid" if config.n_expert_groups else "softmax"


def weights_are_constant(config: Config) -> bool:
    """Return whether the weight of a token's only expert is 1 whatever the router computes.

    The softmax over one logit is 1, and so is a score divided by itself. The loss then gives the router no gradient.
    """
    normalized = score_function(config) == "softmax" or config.norm_topk_prob
    return bool(config.n_expert > 1 and config.n_expert_per_token == 1 and normalized)


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float | Tensor) -> Tensor:
    """Return ``bias + rate * sign(mean(counts) - counts)``: balance without a loss (arXiv 2408.15664, algorithm 1).

    Call it once per optimizer step, with the counts of all tokens of the step on all devices. An expert with fewer
    assignments than the mean is chosen a little more easily afterwards; weights and gradients do not change.

    Args:
        bias_E: selection bias of a sigmoid router (``gate.e_score_correction_bias``), fp32.
        counts_E: summed ``expert_counts``.
        rate: 0.001 in DeepSeek-V3.
    """
    # Compared as counts * E with the total, in int64: a mean in fp32 would be rounded.
    return bias_E + rate * (counts_E.sum() - counts_E * counts_E.numel()).sign().to(bias_E.dtype)


def largest(scores_NE: Tensor, k: int, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """Return the values ``(N, K)`` and the indices ``(N, K)`` of each token's ``k`` largest scores, as ``torch.topk``.

    A single one is found by ``max``: on a CPU ``topk`` takes ten times as long for it.
    """
    values_NK, experts_NK = scores_NE.max(dim=1, keepdim=True) if k == 1 else scores_NE.topk(k, dim=1, sorted=sorted)
    return values_NK, experts_NK


def linear_fp32(x_NC: Tensor, weight_EC: Tensor) -> Tensor:
    """Return ``x @ weight.T`` in fp32, whatever the types of the inputs and whether autocast is on.

    Routing is a hard choice, and the 8 bits of bf16 flip it (Switch Transformers, arXiv 2101.03961, section 2.4).
    """
    with without_autocast(x_NC.device.type):
        return F.linear(x_NC.float(), weight_EC.float())


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for a type of device."""
    # torch.autocast rejects the meta device, and torch 2.10 cannot compile the question whether a type is known.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
