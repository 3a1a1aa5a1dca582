"""The output layer and the cross-entropy as one function, so that the logits of a batch are never materialized at once.

With a vocabulary of 50,257 and 4,096 tokens they would take 0.8 GB in fp32, and their gradient as much again. Here a
block of rows is multiplied, normalized and turned into gradients while it is still in fast memory; the backward only
scales the gradients of the forward. The idea is that of Liger-Kernel (arXiv 2410.10989, section 3.2) and
cut-cross-entropy (arXiv 2411.09009), in plain operators, so that it runs on any device, and the compiler fuses the
operators between the products.

Shape suffixes: N tokens, C n_embd, V padded_vocab_size, W columns that are computed (V or a multiple of a tile), R rows
of one block.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_moe.experts import compute_dtype

IGNORE_INDEX = -100
"""A target without loss, as in PyTorch's cross-entropy"""
CPU_BLOCK = 2**18
"""Logits per block: they fit into the cache of a core"""
GPU_BLOCK = 2**25
"""Logits per block: enough rows to keep a GPU busy"""
MAX_BLOCKS = 16
"""On a GPU: the fp32 gradient of the weight is read and written once per block"""


def loss_of_rows(
    logits_RW: Tensor, target_R: Tensor, counted_R: Tensor, share: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of a block, and its gradient with respect to the logits.

    Args:
        logits_RW: -inf in padding columns.
        target_R: int64; a valid token also in rows that do not count.
        counted_R: 1 for a row that counts, else 0; fp32.
        share: weight of each row in the mean.
        gradient: whether to compute it.
    """
    # Two index tensors pick one element of each row.
    at_target = torch.arange(len(logits_RW), device=logits_RW.device), target_R
    # 16 bits would lose the difference of large logits.
    dtype, logits_RW = logits_RW.dtype, logits_RW.float()
    probs_RW = logits_RW.softmax(dim=1)
    # log(sum(exp(logits))) from the largest logit and its probability, at least 1 / W: without a second exp over all.
    log_sum_R = logits_RW.amax(dim=1) - probs_RW.amax(dim=1).log()
    loss = ((log_sum_R - logits_RW[at_target]) * counted_R).sum()
    if not gradient:
        return loss, None
    # The gradient of a logit is its probability, minus 1 at the target.
    factor_R = counted_R * share
    # Subtracted in fp32, before the next line overwrites the probabilities and rounds them.
    dtarget_R = (probs_RW[at_target] - 1) * factor_R
    dlogits_RW = probs_RW.mul_(factor_R.unsqueeze(1)).to(dtype)
    dlogits_RW[at_target] = dtarget_R.to(dtype)
    return loss, dlogits_RW


def linear_cross_entropy(
    x_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    device_type: str | None = None,
    loss_of_rows: Callable[..., tuple[Tensor, Tensor | None]] = loss_of_rows,
) -> Tensor:
    """Return ``cross_entropy(x @ weight.T, targets)``, the mean over targets other than ``IGNORE_INDEX``, in nats.

    Products use autocast's type if it is on, else the type of ``x``. Everything between them, and the sums over blocks,
    is fp32. (``torch.nn.functional.linear_cross_entropy``, new in torch 2.15, ignores autocast.)

    Args:
        x_NC: hidden states after the last norm. Not fp16: gradients would exceed its range before a scaler scales them.
        weight_VC: of the output layer.
        targets_N: int64.
        device_type: choose block sizes for this type of device; None: for the device of ``x``.
        loss_of_rows: the function of that name, possibly compiled.

    Returns:
        A scalar, fp32; 0 if all targets are ignored.
    """
    device_type = device_type or x_NC.device.type
    columns = computed_columns(len(weight_VC), device_type)
    rows = rows_per_block(len(x_NC), columns, device_type)
    loss: Tensor = _LinearCrossEntropy.apply(
        x_NC, weight_VC, targets_N, compute_dtype(x_NC), rows, columns, torch.is_grad_enabled(), loss_of_rows
    )
    return loss


def computed_columns(V: int, device_type: str) -> int:
    """Return the number of columns of the logits: on a GPU a multiple of a tile.

    Rows of GPT-2's 50,257 tokens in 16 bits start at unaligned addresses, which makes matrix products several times
    slower.
    """
    if device_type == "cpu":
        return V
    tile = 128
    return math.ceil(V / tile) * tile


def rows_per_block(N: int, W: int, device_type: str) -> int:
    """Return the number of tokens in one block."""
    if device_type == "cpu":
        return max(128, CPU_BLOCK // W)
    # A tile. Powers of two, as token counts mostly are: equal blocks share one compiled kernel.
    rows = 128
    while 2 * rows * W <= GPU_BLOCK or rows * MAX_BLOCKS < N:
        rows *= 2
    return rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        dtype: torch.dtype,
        size: int,
        W: int,
        gradients: bool,
        loss_of_rows: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        needs_x, needs_weight = (gradients and need for need in ctx.needs_input_grad[:2])
        V = len(weight_VC)
        x, weight = x_NC.to(dtype), weight_VC.to(dtype)
        if W > V:
            weight = F.pad(weight, (0, 0, 0, W - V))
        # Ignored targets become token 0, so that every row has a valid index; their weight in the loss is 0.
        target_N, counted_N = targets_N.clamp(min=0), (targets_N != IGNORE_INDEX).float()
        # clamp: if all targets are ignored, the loss is 0 instead of NaN.
        share = 1 / counted_N.sum().clamp(min=1)
        loss = torch.zeros((), device=x.device)
        # Each block writes its own rows of dx, but all blocks add to the gradient of the weight, in fp32.
        dx_NC = torch.empty_like(x) if needs_x else None
        dweight_WC = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits_RW = x[rows] @ weight.t()
            # Padding columns are no part of the sum and get no gradient.
            if W > V:
                logits_RW[:, V:] = -torch.inf
            loss_of_block, dlogits_RW = loss_of_rows(
                logits_RW, target_N[rows], counted_N[rows], share, needs_x or needs_weight
            )
            loss = loss + loss_of_block
            if dlogits_RW is not None:
                _add_gradients(dlogits_RW, x[rows], weight, None if dx_NC is None else dx_NC[rows], dweight_WC)
            # Free the memory for the next block.
            del logits_RW, dlogits_RW
        ctx.save_for_backward(dx_NC, None if dweight_WC is None else dweight_WC[:V].to(weight_VC.dtype))
        ctx.x_dtype = x_NC.dtype
        return loss * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, to save the memory of a second gradient of the output layer. Autograd rejects a second
        # backward through the changed tensors.
        dx_NC, dweight_VC = ctx.saved_tensors
        return (
            None if dx_NC is None else dx_NC.mul_(grad).to(ctx.x_dtype),
            None if dweight_VC is None else dweight_VC.mul_(grad.to(dweight_VC.dtype)),
            # The other arguments of forward have no gradient.
            *[None] * 6,
        )


def _add_gradients(
    dlogits_RW: Tensor, x_RC: Tensor, weight_WC: Tensor, dx_RC: Tensor | None, dweight_WC: Tensor | None
) -> None:
    """Write the gradient of a block's rows to ``dx_RC``, and add its part of the weight's to ``dweight_WC``."""
    if dx_RC is not None:
        torch.matmul(dlogits_RW, weight_WC, out=dx_RC)
    if dweight_WC is not None:
        _add_product(dweight_WC, dlogits_RW.t(), x_RC)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``total += a @ b``, without a copy if the types are equal."""
    if total.dtype == a.dtype:
        # Not addmm_, which FLOP counters do not know.
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b
