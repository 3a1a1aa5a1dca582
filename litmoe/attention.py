"""Causal attention for training on a CPU, as matrix products of whole blocks.

torch's own kernel works through small tiles, so that no scores are kept, and computes them again in the backward pass.
For rows of some hundred tokens the scores are small, and large products are faster: all query heads that share keys are
one product, and they are kept for the backward pass.

Shape suffixes: see ``layers.py``; R query heads that share a key head, M queries of one block, N = B * G. Rows of
queries are ordered by position, then by head.
"""

from typing import Any

import torch
from torch import Tensor

from custom_moe.router import without_autocast

MAX_LENGTH = 1024
"""Longer rows would keep too many scores: their memory grows with the square of the length"""


def causal_attention_in_blocks(heads: Tensor, n_query: int, n_key: int, scale: float) -> Tensor:
    """Compute causal attention like ``torch.nn.functional.scaled_dot_product_attention``; differentiable.

    Args:
        heads: queries, keys and values, ``(B, T, H + 2G, D)``.
        n_query: H.
        n_key: G.
        scale: of the scores.

    Returns:
        ``(B, T, H, D)``
    """
    y: Tensor = _CausalAttention.apply(heads, n_query, n_key, scale)
    return y


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, H: int, G: int, scale: float) -> Tensor:
        B, T = heads.shape[:2]
        R = H // G
        # (B, T, H, D) -> (N, T * R, D) and (B, T, G, D) -> (N, T, D)
        q, k, v = (_by_group(part, G) for part in heads.split((H, G, G), dim=2))
        q = q * scale
        # As in torch's kernel, the scores of 16-bit types are fp32, and their probabilities are rounded.
        score_type = _sum_type(heads)
        q_scores, k_scores = q.to(score_type), k.to(score_type)
        results, probabilities = [], []
        # Autocast would compute the scores in 16 bits.
        with without_autocast(heads.device.type):
            for start, end in _blocks(T, heads.dtype):
                rows = slice(start * R, end * R)
                scores = torch.bmm(q_scores[:, rows], k_scores[:, :end].mT)  # (N, M * R, end)
                # Keys before the block are visible to all of its queries.
                within = scores.view(B * G, end - start, R, end)[..., start:]
                within += _future(end - start, scores)
                P = torch.softmax(scores, dim=-1).to(v.dtype)
                results.append(torch.bmm(P, v[:, :end]))
                probabilities.append(P)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.groups, ctx.scale = G, scale
        return _by_token(torch.cat(results, dim=1), B, T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        B, T, H, D = dy.shape
        G, R = ctx.groups, H // ctx.groups
        dy = _by_group(dy, G)
        # Sums over blocks, 16-bit types in fp32
        dk, dv = (torch.zeros(k.shape, dtype=_sum_type(k)) for _ in range(2))
        dq = []
        for (start, end), P in zip(_blocks(T, q.dtype), probabilities, strict=True):
            rows = slice(start * R, end * R)
            dv[:, :end] += torch.bmm(P.mT, dy[:, rows])
            dP = torch.bmm(dy[:, rows], v[:, :end].mT)
            dscores = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            dq.append(torch.bmm(dscores, k[:, :end]))
            # The queries contain the scale already.
            dk[:, :end] += torch.bmm(dscores.mT, q[:, rows])
        dheads = dy.new_empty(B, T, H + 2 * G, D)
        torch.mul(_by_token(torch.cat(dq, dim=1), B, T), ctx.scale, out=dheads[:, :, :H])
        dheads[:, :, H : H + G] = _by_token(dk, B, T)
        dheads[:, :, H + G :] = _by_token(dv, B, T)
        return dheads, None, None, None


def _sum_type(x: Tensor) -> torch.dtype:
    """Return the type in which values of ``x`` are added up: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _by_group(heads: Tensor, G: int) -> Tensor:
    """Put the heads of a group next to each other: ``(B, T, G * R, D) -> (B * G, T * R, D)``."""
    B, T, _, D = heads.shape
    return heads.view(B, T, G, -1, D).transpose(1, 2).reshape(B * G, -1, D)


def _by_token(heads: Tensor, B: int, T: int) -> Tensor:
    """Undo ``_by_group``."""
    N, _, D = heads.shape
    return heads.view(B, N // B, T, -1, D).transpose(1, 2).reshape(B, T, -1, D)


def _blocks(T: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Divide the queries: smaller blocks compute fewer scores of the future, larger ones are faster per score."""
    size = 64 if dtype == torch.float32 else 128
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _future(M: int, like: Tensor) -> Tensor:
    """Return -inf where a key comes after a query, else 0: ``(M, 1, M)``."""
    return like.new_full((M, M), float("-inf")).triu_(1).unsqueeze(1)
