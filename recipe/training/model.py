"""GPT with its losses: the module whose forward the training loop calls."""

from typing import NamedTuple

import torch
from litgpt import GPT
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from custom_moe import expert_load, load_balancing_loss, router_z_loss, score_function
from recipe.data.instruction_module import IGNORED
from recipe.forward import hidden_states, logits_of


class Batch(NamedTuple):
    """What one micro batch is trained on."""

    input_ids: Tensor
    """``(B, T)`` token ids"""
    targets: Tensor
    """``(B, T)``: the ids one position ahead, or ``IGNORED``"""
    lengths: Tensor | None = None
    """``(B,)``: how many inputs of each row are no padding; None for rows without any"""


class Losses(NamedTuple):
    """What one micro batch gives. Scalars in fp32; 0 and empty for a model without experts."""

    cross_entropy: Tensor
    """Mean over target tokens, nats"""
    load_balancing: Tensor
    """Mean over MoE layers, without its coefficient; 1 when even"""
    z_loss: Tensor
    """Mean over MoE layers, without its coefficient"""
    expert_load: Tensor
    """``(MoE layers, n_expert)``: each expert's share of its layer's assignments"""


class PretrainingModel(nn.Module):
    """Wraps a GPT whose blocks are ``custom_moe.MoEBlock`` so that the forward returns the losses.

    The balance losses travel with the result: one compiled graph, right under DDP and activation checkpointing, nothing
    stored on the side. Drives LitGPT's modules as ``GPT.forward`` does without a KV cache (held against it by a test).
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Losses:
        """The parts of a ``Batch``. Padding stands after a row's tokens, so that none of them attends to it."""
        config = self.gpt.config
        real_N = None  # which of the B * T tokens are no padding: it is computed too, but does not count as load
        if lengths is not None:
            places = torch.arange(input_ids.size(1), device=lengths.device)
            real_N = (places < lengths.unsqueeze(1)).flatten()
        x, routers = hidden_states(self.gpt, input_ids)  # (B, T, C)
        score = score_function(config) if config.mlp_class_name == "LLaMAMoE" else "softmax"
        balancing, z_losses, loads = [], [], []
        for router in routers:
            if router is not None:
                balancing.append(load_balancing_loss(router.logits, router.indices, score, real_N))
                z_losses.append(router_z_loss(router.logits, real_N))
                loads.append(expert_load(router.indices, config.n_expert, real_N))

        logits = logits_of(self.gpt, x)  # (B, T, padded_vocab_size)
        if self.gpt.transformer.wte.weight.dtype != torch.float32:
            logits = logits.float()  # in bf16-true the loss itself would be rounded to 8 bits
        nothing = torch.zeros((), device=x.device)
        return Losses(
            cross_entropy=chunked_cross_entropy(logits, targets, ignore_index=IGNORED),
            load_balancing=torch.stack(balancing).mean() if balancing else nothing,
            z_loss=torch.stack(z_losses).mean() if z_losses else nothing,
            expert_load=torch.stack(loads) if loads else torch.zeros(0, 0, device=x.device),
        )
