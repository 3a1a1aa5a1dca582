"""The layer for so few tokens that hardly two of them share an expert, on a CPU and without gradients: a step of
generation. There sorting them, and looking up what the layer is made of, takes longer than the products.

Shape suffixes: N tokens, C n_embd, E n_expert, K n_expert_per_token, I an expert's hidden width, J = 2*I gate and up
together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_moe.experts import Experts
from custom_moe.layer import MoE
from custom_moe.router import SigmoidGate, route


class FewTokens:
    """``MoE`` as a function of a few rows, ``(N, C) -> (N, C)``, with its weights at hand.

    Made anew for each text: it may hold copies of what is small, so that a later step of training does not reach it.
    """

    @staticmethod
    def can_take(layer: nn.Module, rows: int) -> bool:
        """Whether this computes what ``layer`` does, and is the faster way for so many rows."""
        return (
            isinstance(layer, MoE)
            and type(layer.experts) is Experts
            and type(layer.gate) in (nn.Linear, SigmoidGate)
            and layer.experts.fc_bias is None
            and layer.experts.backend in (None, "loop")
            and layer.experts.fc_weight.is_cpu
            and not torch.is_autocast_enabled("cpu")
            and rows * layer.config.n_expert_per_token <= layer.config.n_expert
        )

    def __init__(self, layer: MoE) -> None:
        self.config, self.shared_experts = layer.config, layer.shared_experts
        self.gate_EC = layer.gate.weight.detach().float()
        self.correction_bias_E = getattr(layer.gate, "e_score_correction_bias", None)
        self.fc_CJ = layer.experts.fc_weight.detach().transpose(1, 2).unbind(0)  # of each expert
        self.proj_IC = layer.experts.proj_weight.detach().transpose(1, 2).unbind(0)

    def __call__(self, x_NC: Tensor) -> Tensor:
        """``MoE.forward`` of these rows."""
        _, weights_NK, indices_NK = route(F.linear(x_NC.float(), self.gate_EC), self.config, self.correction_bias_E)
        rows = []
        weights_NK1 = weights_NK.to(x_NC.dtype).unsqueeze(2)
        for x_1C, weights_K1, experts in zip(x_NC.unsqueeze(1), weights_NK1, indices_NK.tolist(), strict=True):
            gate_KI, up_KI = torch.cat([torch.mm(x_1C, self.fc_CJ[expert]) for expert in experts]).chunk(2, dim=1)
            a_KI = F.silu(gate_KI).mul_(up_KI).mul_(weights_K1)
            a_K1I = a_KI.unsqueeze(1)
            y = [torch.mm(a_1I, self.proj_IC[expert]) for a_1I, expert in zip(a_K1I, experts, strict=True)]
            rows.append(torch.cat(y).sum(dim=0, keepdim=True))
        y_NC = rows[0] if len(rows) == 1 else torch.cat(rows)
        return y_NC if self.shared_experts is None else y_NC + self.shared_experts(x_NC)
