"""GPT with its losses: the module whose forward the training loop calls."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from litgpt import GPT
from torch import Tensor, nn

from custom_moe import (
    MoE,
    RouterOutput,
    assignment_counts,
    expert_load,
    load_balancing_loss,
    router_confidence,
    router_z_loss,
)
from custom_moe.experts import compute_dtype
from litmoe.data.sft_data import IGNORE_INDEX
from litmoe.forward import Recomputed, hidden_states, logits_of, run_block
from litmoe.train.cross_entropy import linear_cross_entropy, loss_of_rows
from litmoe.train.optimizers import parameter_groups


class Batch(NamedTuple):
    """What one micro batch is trained on."""

    input_ids: Tensor
    """``(B, T)`` token ids"""
    targets: Tensor
    """``(B, T)``: the ids one position ahead, or ``IGNORE_INDEX``"""
    lengths: Tensor | None = None
    """``(B,)``: how many inputs of each row are no padding; None for rows without any"""


def as_batch(batch: Tensor | tuple[Tensor, ...], seq_length: int) -> Batch:
    """Convert what a data module's loader yields: windows ``(B, T + 1)`` of text, or the fields of a ``Batch``."""
    if not isinstance(batch, Tensor):
        return Batch(*batch)
    tokens = batch[:, : seq_length + 1].long()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Losses(NamedTuple):
    """What one micro batch gives. Scalars in fp32 but for the last two; 0 and empty for a model without experts."""

    cross_entropy: Tensor
    """Mean over target tokens, nats"""
    load_balancing: Tensor
    """Mean over MoE layers, without its coefficient; 1 when even"""
    z_loss: Tensor
    """Mean over MoE layers, without its coefficient"""
    router_confidence: Tensor
    """``(MoE layers,)``: the mean over tokens of the likeliest expert's probability among all"""
    expert_counts: Tensor
    """``(MoE layers, n_expert)`` int64: how many assignments of tokens that are no padding each expert got"""


class PretrainingModel(nn.Module):
    """Wraps a GPT whose blocks are ``custom_moe.MoEBlock`` so that the forward returns the losses.

    The balance losses travel with the result: right under DDP and activation checkpointing, nothing stored on the side.
    Drives LitGPT's modules as ``GPT.forward`` does without a KV cache (held against it by a test).

    Args:
        compiler: ``torch.compile`` with its options; None: nothing is compiled. It gets what takes the time, in parts
            that are compiled once for all layers and all blocks of the loss: the model whole would be written out
            layer by layer, which takes a compiler far longer.
    """

    def __init__(
        self,
        gpt: GPT,
        recomputed: Recomputed = "none",
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.recomputed: Recomputed = recomputed
        self.loss_on: str | None = None
        """The type of device that the loss is computed as on; None: the one that it is on"""
        compiled = compiler or (lambda part: part)
        self._run_block = compiled(run_block)
        self._balance_of = compiled(balance_of)
        self._norm = compiled(_norm)
        self._loss_of_rows = compiled(loss_of_rows)
        self._cross_entropy_of_logits = compiled(_cross_entropy_of_logits)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        last_counts: Tensor | None = None,
    ) -> Losses:
        """The parts of a ``Batch``, and the experts' counts whose load the load-balancing loss goes by; None: its own.

        Padding stands after a row's tokens, so that none of them attends to it.
        """
        real_N = None  # which of the B * T tokens are no padding: it is computed too, but does not count as load
        if lengths is not None:
            places = torch.arange(input_ids.size(1), device=lengths.device)
            real_N = (places < lengths.unsqueeze(1)).flatten()
        x, routers = hidden_states(self.gpt, input_ids, recomputed=self.recomputed, run=self._run_block)  # (B, T, C)
        balances: list[Balance] = []
        for router in routers:
            if router is not None:
                last_counts_E = None if last_counts is None else last_counts[len(balances)]
                balances.append(self._balance_of(router, real_N, last_counts_E))

        cross_entropy = self._cross_entropy(x, targets)
        if not balances:
            nothing = torch.zeros((), device=x.device)
            no_counts = nothing.new_zeros(0, 0, dtype=torch.int64)
            return Losses(cross_entropy, nothing, nothing, nothing.new_zeros(0), no_counts)
        balancing, z_losses, confidences, counts = (torch.stack(column) for column in zip(*balances, strict=True))
        return Losses(cross_entropy, balancing.mean(), z_losses.mean(), confidences, counts)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Of hidden states ``(B, T, C)``; through all logits only where something other than a matrix makes them."""
        head = getattr(self.gpt.lm_head, "linear", self.gpt.lm_head)  # LoRA's layer has it within
        plain = isinstance(head, nn.Linear) and head.bias is None and not getattr(self.gpt.lm_head, "r", 0)
        if plain and self.gpt.config.final_logit_softcapping is None and compute_dtype(x) != torch.float16:
            x_NC = self._norm(self.gpt.transformer.ln_f, x).flatten(0, 1)
            return linear_cross_entropy(x_NC, head.weight, targets.flatten(), self.loss_on, self._loss_of_rows)
        loss: Tensor = self._cross_entropy_of_logits(self.gpt, x, targets)
        return loss


class Balance(NamedTuple):
    """What ``Losses`` has of one MoE layer."""

    load_balancing: Tensor
    z_loss: Tensor
    router_confidence: Tensor
    expert_counts: Tensor
    """``(n_expert,)``"""


def balance_of(router: RouterOutput, real_N: Tensor | None, last_counts_E: Tensor | None) -> Balance:
    """The losses and the statistics of one router.

    Args:
        real_N: which tokens are no padding; None: all.
        last_counts_E: whose load the load-balancing loss goes by; None: its own.
    """
    counts_E = assignment_counts(router, real_N)
    load_E = expert_load(counts_E if last_counts_E is None else last_counts_E)
    score = router.score_function
    return Balance(
        load_balancing_loss(router.logits, score_function=score, mask_N=real_N, load_E=load_E),
        router_z_loss(router.logits, real_N),
        router_confidence(router.logits, score, real_N),
        counts_E,
    )


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """In a function, for the compiler."""
    y: Tensor = norm(x)
    return y


def _cross_entropy_of_logits(gpt: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """From hidden states, through all logits."""
    logits_NV = logits_of(gpt, x).flatten(0, 1)
    total = F.cross_entropy(logits_NV.float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def matrices_to_cast(model: nn.Module, precision: str, recomputed: Recomputed) -> dict[str, nn.Parameter]:
    """Under mixed precision, the matrices that ``cast_matrices`` is for, by name.

    Empty where activations are recomputed: that happens when the forward is over, with the parameters themselves.

    Args:
        model: a module around ``PretrainingModel``, or it itself.
        precision: of Fabric, as ``bf16-mixed``.
    """
    if not precision.endswith("mixed") or recomputed != "none":
        return {}
    decayed = (group["params"] for group in parameter_groups(model) if "weight_decay" not in group)
    matrices = {id(parameter) for parameters in decayed for parameter in parameters}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in matrices}


def cast_matrices(matrices: dict[str, nn.Parameter], precision: str) -> dict[str, Tensor]:
    """The same in the type of the products, for ``functional_call``: cast once for all micro batches of a step, where
    autocast would cast at each of them, and the experts in each direction. Gradients go back through the cast."""
    dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
    weights = {name: parameter.to(dtype) for name, parameter in matrices.items()}
    for weight in weights.values():
        # Autograd goes backward by the order in which things were made, so that these would come after all blocks, and
        # DDP, which waits for the parameters' gradients, would send none before. The highest number comes first.
        assert weight.grad_fn is not None
        weight.grad_fn._set_sequence_nr(2**63 - 1)  # type: ignore[attr-defined]  # missing in torch's stubs
    return weights


def moe_layers(gpt: GPT) -> list[MoE]:
    """The mixtures of experts of a model, in order; its first layers may be dense."""
    return [block.mlp for block in gpt.transformer.h if isinstance(block.mlp, MoE)]


def even_counts(gpt: GPT, device: torch.device) -> Tensor:
    """``Losses.expert_counts`` with the same for each expert, for a first step that has none before it."""
    return torch.ones(len(moe_layers(gpt)), gpt.config.n_expert, dtype=torch.int64, device=device)


@torch.no_grad()
def update_selection_biases(gpt: GPT, counts: Tensor, rate: float | Tensor) -> None:
    """Give each router the counts of a complete step, ``(MoE layers, n_expert)``; a sigmoid router moves its bias."""
    for layer, counts_E in zip(moe_layers(gpt), counts, strict=True):
        layer.gate.update_balance(counts_E, rate)
