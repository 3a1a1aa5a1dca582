"""LoRA (arXiv 2106.09685) for the experts, with the keys of ``litgpt.lora`` in the state dict.

Shape suffixes: S assignments sorted by expert, E n_expert, C n_embd, I an expert's hidden width, R the rank.
"""

from typing import Any

import litgpt.lora
import torch
from torch import Tensor, nn

from custom_moe.backends import Backend, choose_backend, grouped_linear
from custom_moe.block import MoEBlock
from custom_moe.dispatch import ExpertOrder
from custom_moe.experts import Experts
from custom_moe.layer import MoE
from custom_moe.router import without_autocast


class LoRAExperts(Experts):
    """``Experts`` whose weights are frozen, each with a low-rank update ``scaling * B @ A`` beside it.

    Parameters besides those of ``Experts``: ``fc_lora_A (E, 2R, C)`` and ``fc_lora_B (E, 2I, R)``, gate above up, and
    ``proj_lora_A (E, R, I)`` and ``proj_lora_B (E, C, R)``.
    """

    _KINDS = (*Experts._KINDS, "lora_A", "lora_B")

    def __init__(self, config: litgpt.lora.Config, **sizes: Any) -> None:
        super().__init__(**sizes)
        (E, J, C), I, R = self.fc_weight.shape, self.proj_weight.size(2), config.lora_r  # noqa: E741
        self.fc_lora_A = nn.Parameter(torch.empty(E, 2 * R, C))
        self.fc_lora_B = nn.Parameter(torch.empty(E, J, R))
        self.proj_lora_A = nn.Parameter(torch.empty(E, R, I))
        self.proj_lora_B = nn.Parameter(torch.empty(E, C, R))
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.lora_alpha / R
        self.reset_lora()

    def reset_lora(self) -> None:
        """As ``litgpt.lora.LoRALinear``: no update at the start."""
        for A, B in ((self.fc_lora_A, self.fc_lora_B), (self.proj_lora_A, self.proj_lora_B)):
            nn.init.uniform_(A, -(A.size(2) ** -0.5), A.size(2) ** -0.5)
            nn.init.zeros_(B)

    def _feed_forward(self, x_NC: Tensor, weights_NK: Tensor, indices_NK: Tensor, backend: Backend) -> Tensor:
        return self._feed_forward_by_layers(x_NC, weights_NK, indices_NK, backend)

    def _linear(self, name: str, x_S: Tensor, order: ExpertOrder, backend: Backend) -> Tensor:
        A, B = (getattr(self, f"{name}_lora_{which}").to(x_S.dtype) for which in "AB")
        rank = B.size(2)
        widths = (self.fc_weight.size(2), self.proj_weight.size(2), rank)
        wanted = None if self.backend == "grouped_mm" else self.backend  # grouped_mm asked for is for the wide products
        lora_backend = choose_backend(wanted, x_S.dtype, x_S.device, x_S.size(0), widths)
        low_S = grouped_linear(self.lora_dropout(x_S), A, order.ends_E, lora_backend)  # (S, 2R) or (S, R)
        parts = zip(low_S.chunk(low_S.size(1) // rank, dim=1), B.chunk(low_S.size(1) // rank, dim=1), strict=True)
        updates = [grouped_linear(x.contiguous(), weight, order.ends_E, lora_backend) for x, weight in parts]
        y_S: Tensor = super()._linear(name, x_S, order, backend) + self.scaling * torch.cat(updates, dim=1)
        return y_S


class LoRAGate(nn.Linear):
    """A router with a low-rank update. It adds up to one small matrix, which the fp32 product takes as it is."""

    def __init__(self, config: litgpt.lora.Config) -> None:
        super().__init__(config.n_embd, config.n_expert, bias=False)
        self.lora_A = nn.Parameter(torch.empty(config.lora_r, config.n_embd))
        self.lora_B = nn.Parameter(torch.empty(config.n_expert, config.lora_r))
        self.scaling = config.lora_alpha / config.lora_r
        self.reset_lora()

    def reset_lora(self) -> None:
        """As ``litgpt.lora.LoRALinear``: no update at the start."""
        nn.init.uniform_(self.lora_A, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.zeros_(self.lora_B)


class LoRAMoE(MoE):
    """Drop-in for ``litgpt.lora.LLaMAMoE``: plain ``MoE``, or with ``lora_mlp`` low-rank updates of router and experts.

    ``lora_dropout`` is for the experts alone; shared experts and sigmoid routers, which LitGPT's does not have, stay
    as they are.
    """

    def __init__(self, config: litgpt.lora.Config) -> None:
        super().__init__(config)
        if not (config.lora_mlp and config.lora_r):
            return
        if isinstance(self.gate, nn.Linear):
            self.gate = LoRAGate(config)
        self.experts = LoRAExperts(config, **self._expert_sizes())
        self.reset_parameters()

    def _gate_weight(self) -> Tensor:
        weight = super()._gate_weight()
        if isinstance(self.gate, LoRAGate):
            with without_autocast(weight.device.type):
                update = self.gate.lora_B.float() @ self.gate.lora_A.float()
            weight = weight.float() + self.gate.scaling * update
        return weight


class LoRAMoEBlock(MoEBlock):
    """Drop-in for ``litgpt.lora.Block``, able to hand out the router's output."""

    def __init__(self, config: litgpt.lora.Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.attn = litgpt.lora.CausalSelfAttention(config, block_idx)
