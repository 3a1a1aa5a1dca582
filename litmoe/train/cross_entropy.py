"""The output layer and the cross-entropy as one function, so that the logits of a whole batch never exist.

At 50,257 words and 4,096 tokens they would be 0.8 GB in fp32, and their gradient as much again. Here a block of rows is
multiplied, normalized and turned into gradients while it is still in fast memory, and the backward only scales what the
forward has found. The idea is that of Liger-Kernel (arXiv 2410.10989, section 3.2) and cut-cross-entropy (arXiv
2411.09009); in plain operators, so that it runs on any device and the compiler fuses what lies between the products.

Shape suffixes: N tokens, C n_embd, V padded_vocab_size, W words as they are computed, R rows of one block.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_moe.experts import compute_dtype
from litmoe.data.instruction_module import IGNORED

CPU_BLOCK = 2**18
"""Logits at once: they stay in a core's cache"""
GPU_BLOCK = 2**25
"""Logits at once: rows enough to keep a card busy"""
MAX_BLOCKS = 16
"""On a GPU: the weight's gradient, in fp32, goes through memory for each of them"""


def loss_of_rows(
    logits_RW: Tensor, target_R: Tensor, counted_R: Tensor, share: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """What lies between the products: one block's loss, summed up, and its gradient to the logits in their type.

    Args:
        logits_RW: -inf where there is no word.
        target_R: int64, a word also where it does not count.
        counted_R: 1 for a row that counts, else 0; fp32.
        share: each row's part of the mean.
        gradient: whether it is asked for.
    """
    at_target = torch.arange(len(logits_RW), device=logits_RW.device), target_R
    log_probs_RW = logits_RW.float().log_softmax(dim=1)
    loss = -(log_probs_RW[at_target] * counted_R).sum()
    if not gradient:
        return loss, None
    probs_RW, factor_R = log_probs_RW.exp_(), counted_R * share
    dtarget_R = (probs_RW[at_target] - 1) * factor_R
    dlogits_RW = probs_RW.mul_(factor_R.unsqueeze(1)).to(logits_RW.dtype)
    dlogits_RW[at_target] = dtarget_R.to(logits_RW.dtype)
    return loss, dlogits_RW


def linear_cross_entropy(
    x_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    device_type: str | None = None,
    loss_of_rows: Callable[..., tuple[Tensor, Tensor | None]] = loss_of_rows,
) -> Tensor:
    """``cross_entropy(x @ weight.T, targets)``: the mean over the tokens whose target is not ``IGNORED``, in nats.

    Products are computed in autocast's type where it is on, else in ``x``'s; all between them, and the sums over
    blocks, in fp32. (``torch.nn.functional.linear_cross_entropy``, new in torch 2.15, does not know autocast.)

    Args:
        x_NC: hidden states after the last norm. Not for fp16: its range is too narrow for gradients before a scaler
            has scaled them.
        weight_VC: the output layer's.
        targets_N: int64.
        device_type: as on which the blocks are to be; None: as they are where ``x`` is.
        loss_of_rows: the function of that name, maybe compiled.

    Returns:
        A scalar, fp32; 0 where all targets are ignored.
    """
    device_type = device_type or x_NC.device.type
    words = words_at_once(len(weight_VC), device_type)
    rows = rows_at_once(len(x_NC), words, device_type)
    loss: Tensor = _LinearCrossEntropy.apply(
        x_NC, weight_VC, targets_N, compute_dtype(x_NC), rows, words, torch.is_grad_enabled(), loss_of_rows
    )
    return loss


def words_at_once(V: int, device_type: str) -> int:
    """How many columns the logits have: on a GPU whole tiles. Rows of GPT-2's 50,257 words in 16 bits begin at odd
    places in memory, and its matrix products are several times as slow then."""
    return V if device_type == "cpu" else -(-V // 128) * 128


def rows_at_once(N: int, W: int, device_type: str) -> int:
    """How many tokens one block has."""
    if device_type == "cpu":
        return max(128, CPU_BLOCK // W)
    rows = 128  # whole tiles, and a power of two, as tokens mostly are: one kernel serves blocks that are alike
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
        need_x, need_weight = (gradients and need for need in ctx.needs_input_grad[:2])
        V = len(weight_VC)
        x, weight = x_NC.to(dtype), weight_VC.to(dtype)
        if W > V:
            weight = F.pad(weight, (0, 0, 0, W - V))
        target_N, counted_N = targets_N.clamp(min=0), (targets_N != IGNORED).float()
        share = 1 / counted_N.sum().clamp(min=1)
        loss = torch.zeros((), device=x.device)
        dx_NC = torch.empty_like(x) if need_x else None
        dweight_WC = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits_RW = x[rows] @ weight.t()
            if W > V:
                logits_RW[:, V:] = -torch.inf  # no words: nothing of the sum, and no gradient
            loss_of_block, dlogits_RW = loss_of_rows(
                logits_RW, target_N[rows], counted_N[rows], share, need_x or need_weight
            )
            loss = loss + loss_of_block
            if dx_NC is not None and dlogits_RW is not None:
                dx_NC[rows] = dlogits_RW @ weight
            if dweight_WC is not None and dlogits_RW is not None:
                _add_product(dweight_WC, dlogits_RW.t(), x[rows])
            del logits_RW, dlogits_RW  # the next block needs their room
        ctx.save_for_backward(dx_NC, None if dweight_WC is None else dweight_WC[:V].to(weight_VC.dtype))
        ctx.x_dtype = x_NC.dtype
        return loss * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_NC, dweight_VC = ctx.saved_tensors  # scaled in place: autograd refuses a second backward through them
        return (
            None if dx_NC is None else dx_NC.mul_(grad).to(ctx.x_dtype),
            None if dweight_VC is None else dweight_VC.mul_(grad.to(dweight_VC.dtype)),
            *[None] * 6,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, without a copy where the types are alike."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # FLOP counters do not know addmm_
    else:
        total += a @ b
