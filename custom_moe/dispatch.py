"""The order in which experts take their tokens, and sums over what they give back.

Shape suffixes: N tokens, C width, E n_expert, K n_expert_per_token, S rows sorted by expert: the N*K assignments, and
where asked for padding.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertOrder(NamedTuple):
    """Assignments of tokens to experts, sorted by expert: worked out once for forward and backward."""

    token_S: Tensor
    """Each row's token"""
    row_NK: Tensor
    """Each assignment's row"""
    ends_E: Tensor
    """int32, where each expert's rows end"""


def sort_by_expert(indices_NK: Tensor, n_expert: int, multiple_of: int = 1) -> ExpertOrder:
    """Tokens keep their order within an expert; no waiting for the device, and shapes that do not depend on values.

    Args:
        indices_NK: each token's experts.
        n_expert: how many there are.
        multiple_of: how many rows each expert gets a multiple of. Padding rows belong to token 0, but no assignment
            has them as its row; S is then the most that there could be, and rows past the last end are nobody's.
    """
    (N, K), device = indices_NK.shape, indices_NK.device
    expert_S, order_S = indices_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(n_expert, device=device), right=True, out_int32=True)
    row_S = torch.arange(N * K, device=device)
    token_S = order_S // K
    if multiple_of > 1:
        starts_E = F.pad(ends_E[:-1], (1, 0))
        counts_E = (ends_E - starts_E + multiple_of - 1) // multiple_of * multiple_of
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        row_S = row_S + (ends_E - counts_E - starts_E).index_select(0, expert_S)
        token_S = token_S.new_zeros(N * K + n_expert * (multiple_of - 1)).index_copy_(0, row_S, token_S)
    row_NK = torch.empty_like(order_S).index_copy_(0, order_S, row_S).view(N, K)
    return ExpertOrder(token_S, row_NK, ends_E)


def weights_of_rows(weights_NK: Tensor, order: ExpertOrder) -> Tensor:
    """The router's weight of each row, 0 for padding: ``(S,)``."""
    return weights_NK.new_zeros(len(order.token_S)).index_copy(0, order.row_NK.flatten(), weights_NK.flatten())


def sum_rows(y_SC: Tensor, row_NK: Tensor) -> Tensor:
    """Each token's rows added up, 16 bits in fp32: ``(N, C)`` in ``y``'s type. Not differentiable: see ``add_rows``."""
    if y_SC.device.type == "cpu":  # one pass, five times as fast there
        return F.embedding_bag(row_NK, y_SC, mode="sum")
    rows_NKC = y_SC.index_select(0, row_NK.flatten()).view(*row_NK.shape, y_SC.size(1))
    return rows_NKC.sum(dim=1, dtype=y_SC.dtype)  # said, for autocast would have sums of a GPU in fp32


def gather_rows(x_NC: Tensor, order: ExpertOrder) -> Tensor:
    """``x[token_S]``, for an order without padding. Its gradient is ``sum_rows``: faster than ``index_add_``, which
    autograd would take, and the same bits on each run."""
    x_SC: Tensor = _GatherRows.apply(x_NC, order.token_S, order.row_NK)
    return x_SC


def add_rows(y_SC: Tensor, order: ExpertOrder) -> Tensor:
    """``sum_rows`` with the gradient of its rows, for an order without padding: the other direction."""
    y_NC: Tensor = _AddRows.apply(y_SC, order.token_S, order.row_NK)
    return y_NC


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, token_S: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_NC.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grad_SC, *ctx.saved_tensors), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SC: Tensor, token_S: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        return sum_rows(y_SC, row_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None, None]:
        return grad_NC.index_select(0, *ctx.saved_tensors), None, None
