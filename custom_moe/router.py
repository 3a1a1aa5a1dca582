"""From a token to the experts that it goes to, and their weights. Everything here is computed in fp32.

Shape suffixes: N tokens, C n_embd, E n_expert, K n_expert_per_token, G n_expert_groups.
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
    """What a router decided for ``N`` tokens.

    Attributes:
        logits: ``(N, E)`` fp32, differentiable.
        weights: ``(N, K)`` fp32, what each chosen expert's output is multiplied with, differentiable.
        indices: ``(N, K)`` int64, the chosen experts, all different within a row.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


def score_function(config: Config) -> ScoreFunction:
    """How a LitGPT config turns router logits into scores: sigmoid with expert groups (DeepSeek-V3), else softmax."""
    return "sigmoid" if config.n_expert_groups else "softmax"


def weights_are_constant(config: Config) -> bool:
    """Whether the weight of a token's one expert is 1 whatever the router computes, so that the loss gives the router
    no gradient: the softmax over one logit is 1, and so is a score divided by itself."""
    normalized = score_function(config) == "softmax" or config.norm_topk_prob
    return bool(config.n_expert > 1 and config.n_expert_per_token == 1 and normalized)


def route(logits_NE: Tensor, config: Config, correction_bias_E: Tensor | None = None) -> RouterOutput:
    """Chooses ``n_expert_per_token`` experts for each token, as LitGPT's ``LLaMAMoE`` and ``GroupedTopkRouter`` do.

    Args:
        logits_NE: ``(N, E)`` fp32.
        config: says which of the two ways, and its numbers.
        correction_bias_E: ``(E,)``, added to the sigmoid scores for the choice alone, not to the weights (DeepSeek-V3,
            arXiv 2412.19437, eq. 16). Needed where ``config.n_expert_groups`` is set.
    """
    if score_function(config) == "softmax":
        # Softmax over the chosen logits is Mixtral's softmax over all, renormalised over the chosen.
        top_logits_NK, indices_NK = torch.topk(logits_NE, config.n_expert_per_token)
        weights_NK = top_logits_NK.softmax(dim=1)
    else:
        assert correction_bias_E is not None
        scores_NE = logits_NE.sigmoid()
        indices_NK = _choose_in_groups(scores_NE.detach() + correction_bias_E, config)
        weights_NK = scores_NE.gather(1, indices_NK)
        if config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
    if config.routed_scaling_factor != 1.0:
        weights_NK = weights_NK * config.routed_scaling_factor
    return RouterOutput(logits_NE, weights_NK, indices_NK)


def linear_fp32(x_NC: Tensor, weight_EC: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32 whatever the inputs' types and whatever autocast says: routing is a hard choice, and
    bf16's 8 bits flip it (Switch Transformers, arXiv 2101.03961, section 2.4)."""
    with without_autocast(x_NC.device.type):
        return F.linear(x_NC.float(), weight_EC.float())


class SigmoidGate(nn.Module):
    """The parameters of LitGPT's ``GroupedTopkRouter``, in its state-dict keys: ``weight (E, C)`` and the buffer
    ``e_score_correction_bias (E,)``. Unlike LitGPT's, it initialises itself, and the bias is fp32 whatever the model
    is converted to: bf16 would round the small steps of its updates away (``custom_moe.updated_bias``)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The distribution of LitGPT's pretraining for linear layers, and a zero bias."""
        nn.init.normal_(self.weight, mean=0.0, std=(2.0 / 5 / self.config.n_embd) ** 0.5)
        nn.init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmoidGate":
        # All of `.to()`, `.half()`, `.to_empty()` come by here.
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device, torch.float32)
        return self


@torch.no_grad()
def _choose_in_groups(scores_NE: Tensor, config: Config) -> Tensor:
    """Top-k experts among those of the ``n_topk_groups`` groups whose best scores sum highest, ``(N, K)``."""
    scores_NGe = scores_NE.view(len(scores_NE), config.n_expert_groups, -1)
    group_scores_NG = scores_NGe.topk(config.n_topk_scores_per_group, dim=-1)[0].sum(dim=-1)
    groups = torch.topk(group_scores_NG, k=config.n_topk_groups, dim=-1, sorted=False)[1]
    allowed_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter_(1, groups, True)
    # 0.0 and not -inf: where the correction bias makes allowed scores negative, this lets others in. It is what LitGPT
    # (and transformers) do, and a model must choose alike in training and in their inference.
    scores_NE = scores_NGe.masked_fill(~allowed_NG.unsqueeze(-1), 0.0).flatten(1)
    return torch.topk(scores_NE, k=config.n_expert_per_token, dim=-1, sorted=False)[1]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    # torch.autocast does not know the meta device, and torch 2.10 cannot compile the question whether it does.
    off = device_type == "meta" or not torch.is_autocast_enabled(device_type)
    return nullcontext() if off else torch.autocast(device_type, enabled=False)
