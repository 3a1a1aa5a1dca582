"""The mixture-of-experts layer.

Shape suffixes: B batch, T time, N = B*T tokens, C n_embd, E n_expert, K n_expert_per_token.
"""

from typing import Any

import litgpt.model
from litgpt import Config
from torch import Tensor, nn

from custom_moe.backends import Backend
from custom_moe.experts import Experts
from custom_moe.router import RouterOutput, SigmoidGate, linear_fp32, route, score_function


class MoE(nn.Module):
    """Drop-in for ``litgpt.model.LLaMAMoE``: the same config, the same result, the same keys in the state dict.

    Unlike LitGPT's, it routes in fp32 whatever the precision of the model, computes all experts as one function, has no
    token-dependent control flow (one graph under ``torch.compile``), and initialises itself.

    Args:
        config: LitGPT's.
        backend: how the experts are computed (``custom_moe.backends``); None chooses by hardware.

    Raises:
        ValueError: for a config without experts, or with more experts per token than there are.
    """

    def __init__(self, config: Config, backend: Backend | None = None) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.gate = (
            nn.Linear(config.n_embd, config.n_expert, bias=False)
            if score_function(config) == "softmax"
            else SigmoidGate(config)
        )
        self.experts = Experts(**self._expert_sizes())
        self.experts.backend = backend
        self.shared_experts = (
            litgpt.model.LLaMAMLP(config, intermediate_size=config.moe_intermediate_size * config.n_shared_expert)
            if config.n_shared_expert
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The distribution of ``litgpt.pretrain.initialize_weights``, which does not know the stacked parameters:
        ``gate``, ``fc_1``, ``fc_2`` N(0, sqrt(2/5/n_embd)), ``proj`` N(0, 1/sqrt(n_embd)/n_layer), biases 0."""
        wide, narrow = (2.0 / 5 / self.config.n_embd) ** 0.5, 1 / self.config.n_embd**0.5 / self.config.n_layer
        if isinstance(self.gate, nn.Linear):
            nn.init.normal_(self.gate.weight, mean=0.0, std=wide)
        else:
            self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            for name, std in (("fc_1", wide), ("fc_2", wide), ("proj", narrow)):
                linear = getattr(self.shared_experts, name)
                nn.init.normal_(linear.weight, mean=0.0, std=std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C) -> (B, T, C)``."""
        return self.forward_with_router(x)[0]

    def forward_with_router(self, x: Tensor) -> tuple[Tensor, RouterOutput]:
        """The layer's output ``(B, T, C)`` and what the router decided for its ``N = B*T`` tokens."""
        x_NC = x.flatten(0, -2)
        logits_NE = linear_fp32(x_NC, self._gate_weight())
        router = route(logits_NE, self.config, getattr(self.gate, "e_score_correction_bias", None))
        y_BTC = self.experts(x_NC, router.weights, router.indices).view_as(x)
        if self.shared_experts is not None:
            y_BTC = y_BTC + self.shared_experts(x)
        return y_BTC, router

    def _expert_sizes(self) -> dict[str, Any]:
        config = self.config
        return {
            "n_expert": config.n_expert,
            "n_embd": config.n_embd,
            "intermediate_size": config.moe_intermediate_size or config.intermediate_size,
            "n_layer": config.n_layer,
            "bias": config.bias,
        }

    def _gate_weight(self) -> Tensor:
        """``(E, C)``"""
        weight: Tensor = self.gate.weight
        return weight


def set_backend(module: nn.Module, backend: Backend | None) -> None:
    """How all MoE layers within ``module`` compute their experts; None chooses by hardware.

    Whether it can be had is known when a layer computes: it depends on the type and the device of its input.
    """
    for layer in module.modules():
        if isinstance(layer, Experts):
            layer.backend = backend


def _check(config: Config) -> None:
    """LitGPT builds a model without a feed-forward from ``n_expert`` 0 and says nothing."""
    if config.n_expert < 1:
        raise ValueError(f"mlp_class_name is LLaMAMoE but n_expert is {config.n_expert}; set n_expert to 1 or more.")
    if not 1 <= config.n_expert_per_token <= config.n_expert:
        raise ValueError(
            f"n_expert_per_token is {config.n_expert_per_token}; with n_expert {config.n_expert} it must be "
            f"between 1 and {config.n_expert}."
        )
    if config.n_shared_expert and not config.moe_intermediate_size:
        raise ValueError("n_shared_expert needs moe_intermediate_size, which says how wide one shared expert is.")
