"""GPT with its losses: the training loop calls the forward of ``PretrainingModel``. Also finds where a NaN began."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

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
from litmoe.config import Recomputed
from litmoe.documents import DocumentMask, number_documents
from litmoe.hardware import is_out_of_memory
from litmoe.layers import hidden_states, logits_of, mask_for, run_block
from litmoe.train.cross_entropy import IGNORE_INDEX, linear_cross_entropy, loss_of_rows
from litmoe.train.optimizers import parameter_uses


class Batch(NamedTuple):
    """One micro batch."""

    input_ids: Tensor
    """``(B, T)`` token ids"""
    targets: Tensor
    """``(B, T)``: the ids one position ahead, or ``IGNORE_INDEX``"""
    lengths: Tensor | None = None
    """``(B,)``: inputs of each row that are no padding; None for rows without padding"""
    documents: Tensor | None = None
    """``(B, T)``: tokens attend to those of their row with the same number; None: to all tokens before them"""


def as_batch(batch: Tensor | tuple[Tensor, ...], seq_length: int) -> Batch:
    """Convert what a data module's loader yields: windows ``(B, T + 1)`` of text, or the fields of a ``Batch``."""
    if not isinstance(batch, Tensor):
        return Batch(*batch)
    tokens = batch[:, : seq_length + 1].long()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Losses(NamedTuple):
    """Results of one micro batch. fp32 scalars except the last two; 0 and empty for a model without experts."""

    cross_entropy: Tensor
    """Mean over target tokens, nats"""
    load_balancing: Tensor
    """Mean over MoE layers, without its coefficient; 1 when even"""
    z_loss: Tensor
    """Mean over MoE layers, without its coefficient"""
    router_confidence: Tensor
    """``(MoE layers,)``: mean over tokens of the probability of the most likely expert"""
    expert_counts: Tensor
    """``(MoE layers, n_expert)`` int64: assignments to each expert, without padding"""


class PretrainingModel(nn.Module):
    """A GPT with ``custom_moe.MoEBlock`` blocks whose forward returns the losses.

    The balance losses are part of the result, not stored in modules, so they are right under DDP and activation
    checkpointing. The modules are called as in ``GPT.forward`` without a KV cache (tested).

    Args:
        gpt: the model.
        recomputed: what the backward computes again instead of keeping it.
        compiler: ``torch.compile`` with its options; None: nothing is compiled. It compiles the expensive functions,
            each once for all layers: compiling the complete model would unroll all layers, which takes far longer.
        document_end: the token that ends a document, for attention within documents; None: attention to all tokens of
            a row.
    """

    def __init__(
        self,
        gpt: GPT,
        recomputed: Recomputed = "none",
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        document_end: int | None = None,
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.recomputed: Recomputed = recomputed
        self.document_end = document_end
        self.loss_on: str | None = None
        """Choose block sizes of the loss for this type of device; None: for the device of the model"""
        self._is_compiled = compiler is not None
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
        documents: Tensor | None = None,
        last_counts: Tensor | None = None,
    ) -> Losses:
        """Return the losses of a ``Batch``, given by its fields.

        Args:
            input_ids, targets, lengths, documents: see ``Batch``. Padding follows the tokens of a row, which do not
                attend to it.
            last_counts: ``(MoE layers, n_expert)``, the load for the load-balancing loss; None: that of this batch.
        """
        # Padding is computed like other tokens, but does not count as load.
        mask_N = None
        if lengths is not None:
            positions = torch.arange(input_ids.size(1), device=lengths.device)
            mask_N = (positions < lengths.unsqueeze(1)).flatten()  # (B, T) -> (B * T,)
        mask = self._document_mask(input_ids, documents)
        x, routers = hidden_states(  # (B, T, C)
            self.gpt, input_ids, mask=mask, recomputed=self.recomputed, run=self._run_block
        )
        balances: list[Balance] = []
        for router in routers:
            if router is not None:
                # Dense blocks have no row in last_counts.
                last_counts_E = None if last_counts is None else last_counts[len(balances)]
                balances.append(self._balance_of(router, mask_N, last_counts_E))

        cross_entropy = self._cross_entropy(x, targets)
        if not balances:
            # A dense model has the same fields, so that the loop needs no second path.
            zero = torch.zeros((), device=x.device)
            no_counts = zero.new_zeros(0, 0, dtype=torch.int64)
            return Losses(cross_entropy, zero, zero, zero.new_zeros(0), no_counts)
        balancing, z_losses, confidences, counts = (torch.stack(column) for column in zip(*balances, strict=True))
        return Losses(cross_entropy, balancing.mean(), z_losses.mean(), confidences, counts)

    def _document_mask(self, input_ids: Tensor, documents: Tensor | None) -> DocumentMask | None:
        if documents is None and self.document_end is not None:
            documents = number_documents(input_ids, self.document_end)
        return None if documents is None else mask_for(self.gpt, documents, compiled=self._is_compiled)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of hidden states ``(B, T, C)``.

        The fused loss needs an output layer that is only a matrix. Otherwise all logits are computed at once.
        """
        # LoRA's layer has the output layer inside.
        head = getattr(self.gpt.lm_head, "linear", self.gpt.lm_head)
        # A trained LoRA head (r > 0) adds a second product, which the fused loss does not compute.
        is_matrix = head.bias is None and not getattr(self.gpt.lm_head, "r", 0)
        # In fp16 all logits are computed, because the fused loss makes gradients before a scaler has scaled the loss.
        if is_matrix and self.gpt.config.final_logit_softcapping is None and compute_dtype(x) != torch.float16:
            x_NC = self._norm(self.gpt.transformer.ln_f, x).flatten(0, 1)
            return linear_cross_entropy(x_NC, head.weight, targets.flatten(), self.loss_on, self._loss_of_rows)
        loss: Tensor = self._cross_entropy_of_logits(self.gpt, x, targets)
        return loss


class Balance(NamedTuple):
    """The part of ``Losses`` that belongs to one MoE layer."""

    load_balancing: Tensor
    z_loss: Tensor
    router_confidence: Tensor
    expert_counts: Tensor
    """``(n_expert,)``"""


def balance_of(router: RouterOutput, mask_N: Tensor | None, last_counts_E: Tensor | None) -> Balance:
    """Return the balance losses and statistics of one router.

    Args:
        mask_N: false for padding; None: no padding.
        last_counts_E: the load for the load-balancing loss; None: that of this batch.
    """
    counts_E = assignment_counts(router, mask_N)
    load_E = expert_load(counts_E if last_counts_E is None else last_counts_E)
    score = router.score_function
    return Balance(
        load_balancing_loss(router.logits, score_function=score, mask_N=mask_N, load_E=load_E),
        router_z_loss(router.logits, mask_N),
        router_confidence(router.logits, score, mask_N),
        counts_E,
    )


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm; a function of its own for the compiler."""
    y: Tensor = norm(x)
    return y


def _cross_entropy_of_logits(gpt: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of hidden states through all logits."""
    logits_NV = logits_of(gpt, x).flatten(0, 1)
    total = F.cross_entropy(logits_NV.float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    # Not reduction="mean", which is NaN if there is no target.
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def matrices_to_cast(model: nn.Module, precision: str, recomputed: Recomputed) -> dict[str, nn.Parameter]:
    """Return the parameters that ``cast_matrices`` casts in mixed precision, by name.

    None if activations are recomputed, because the backward then uses the parameters themselves.

    Args:
        model: ``PretrainingModel``, possibly wrapped.
        precision: in Fabric's names, such as ``bf16-mixed``.
    """
    if not precision.endswith("mixed") or recomputed != "none":
        return {}
    # The weights of matrix products are those that decay. Embeddings are only looked up, and routers compute in fp32.
    return {f"{use.path}.{use.name}": use.parameter for use in parameter_uses(model) if use.decays}


@dataclass
class Accumulation:
    """How gradients of cast matrices reach their parameters; may change from one micro batch to the next."""

    in_place: bool = True
    """Whether the backward adds to ``parameter.grad`` itself. DDP only exchanges what autograd adds"""


def cast_matrices(
    matrices: dict[str, nn.Parameter], precision: str, accumulation: Accumulation | None = None
) -> dict[str, Tensor]:
    """Cast matrices to 16 bits for ``functional_call``, once for all micro batches of a step.

    Autocast would cast them in each micro batch, and the experts' in forward and backward. Gradients flow through the
    cast.

    Args:
        matrices: parameters by name.
        precision: in Fabric's names, such as ``bf16-mixed``.
        accumulation: None: in place.
    """
    dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
    accumulation = accumulation or Accumulation()
    weights: dict[str, Tensor] = {
        name: _Cast.apply(parameter, dtype, accumulation) for name, parameter in matrices.items()
    }
    for weight in weights.values():
        # Autograd runs nodes in reverse order of their creation. The casts were created before all blocks, so they
        # would run last, and DDP would exchange no gradient before. The node with the highest number runs first.
        assert weight.grad_fn is not None
        weight.grad_fn._set_sequence_nr(2**63 - 1)  # type: ignore[attr-defined]  # missing in torch's stubs
    return weights


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, dtype: torch.dtype, accumulation: Accumulation) -> Tensor:
        ctx.parameter, ctx.accumulation = parameter, accumulation
        return parameter.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        total = ctx.parameter.grad
        if total is None or not ctx.accumulation.in_place:
            return grad.to(ctx.parameter.dtype), None, None
        # A GPU converts while it adds. Autograd would write the converted gradient and read it again: 8 of 20 bytes of
        # memory traffic per parameter and micro batch.
        total.add_(grad)
        return None, None, None


def moe_layers(gpt: GPT) -> list[MoE]:
    """Return the MoE layers of a model in order. The first layers of a model may be dense."""
    return [block.mlp for block in gpt.transformer.h if isinstance(block.mlp, MoE)]


def even_counts(gpt: GPT, device: torch.device) -> Tensor:
    """Return equal ``expert_counts``, for the first step, which has no step before it."""
    return torch.ones(len(moe_layers(gpt)), gpt.config.n_expert, dtype=torch.int64, device=device)


@torch.no_grad()
def update_selection_biases(gpt: GPT, counts: Tensor, rate: float | Tensor) -> None:
    """Give each router the counts of a complete step, ``(MoE layers, n_expert)``; a sigmoid router moves its bias."""
    for layer, counts_E in zip(moe_layers(gpt), counts, strict=True):
        layer.gate.update_balance(counts_E, rate)


# --- Find NaN

_NOT_FOUND = (
    "every micro batch, and their sum on each device, is finite when computed again; the sum over devices is not"
)


def find_nonfinite_weights(gpt: GPT) -> str | None:
    """Return the name of the first parameter that is not finite, or None. Only checks this rank's shards."""
    for name, parameter in gpt.named_parameters():
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not _is_finite(shard):
            return name
    return None


def find_first_nonfinite(
    fabric: L.Fabric,
    model: PretrainingModel,
    batches: Sequence[Batch],
    loss_of: Callable[[Losses], Tensor],
) -> str:
    """Compute the batches of a step again until something is not finite, and describe it for an error message.

    All ranks must call it. Each one checks its own batches, and all return the same text.

    Args:
        fabric: for autocast and communication.
        model: of the run, with zero gradients. Afterwards its gradients are undefined.
        batches: the micro batches of this rank.
        loss_of: combines the losses of a micro batch.
    """
    # A compiled model would hide the outputs of its layers.
    model = PretrainingModel(model.gpt, model.recomputed, document_end=model.document_end)
    try:
        result = _first_nonfinite_here(fabric, model, batches, loss_of)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result = "there was not enough memory to find out where"
    # All ranks raise the same error, whichever of them has the cause.
    if fabric.world_size > 1:
        results: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(results, result)
        result = next((f"{text} (process {rank})" for rank, text in enumerate(results) if text), None)
    return result or _NOT_FOUND


def _first_nonfinite_here(
    fabric: L.Fabric, model: PretrainingModel, batches: Sequence[Batch], loss_of: Callable[[Losses], Tensor]
) -> str | None:
    for number, batch in enumerate(batches, 1):
        place = f"in micro batch {number} of {len(batches)}"
        # Autocast by hand: this model is not inside of Fabric's wrapper.
        with _nonfinite_outputs(model.gpt) as layers, fabric.autocast():
            loss = loss_of(model(*batch))
        # Checked before the loss, because it names the layer.
        if layers:
            return f"the first non-finite output was that of {layers[0]}, {place}"
        if not _is_finite(loss):
            return f"the outputs of all layers are finite, but the loss is not, {place}"
        loss.backward()
        # The backward runs from the last layer to the first.
        for name, parameter in reversed(list(model.gpt.named_parameters())):
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return f"the first non-finite gradient was that of {name}, {place}"
    return None


@contextmanager
def _nonfinite_outputs(gpt: GPT) -> Iterator[list[str]]:
    """Collect the names of layers with an output that is not finite, in the order of their calls."""
    names: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not all(_is_finite(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            names.append(name)

    with ExitStack() as hooks:
        for name, module in gpt.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(check, name)))
        yield names


def _is_finite(tensor: Tensor) -> bool:
    # Routers also return integers, which are always finite.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
