"""Causal attention for training on a CPU, as matrix products of whole blocks.

torch's own kernel computes the scores in small tiles, keeps none of them, and computes them again in the backward pass.
In rows of a few hundred tokens there are few scores. Here they are kept, and the products are large and so faster: all
query heads that share keys are one product.

Shape suffixes: see ``layers.py``; R query heads that share a key head, M queries and K keys of one block, N = B * G.
Rows of queries are ordered by position, then by head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_moe.router import without_autocast

MAX_LENGTH = 1024
"""Longer rows would keep too many scores: their memory grows with the square of the length"""


def causal_attention_in_blocks(
    heads: Tensor, n_query: int, n_key: int, scale: float, documents: Tensor | None = None
) -> Tensor:
    """Compute causal attention like ``torch.nn.functional.scaled_dot_product_attention``; differentiable.

    Args:
        heads: queries, keys and values, ``(B, T, H + 2G, D)``.
        n_query: H.
        n_key: G.
        scale: of the scores.
        documents: ``(B, T)``, tokens attend only to those with the same number; None: to all before them.

    Returns:
        ``(B, T, H, D)``
    """
    y: Tensor = _CausalAttention.apply(heads, n_query, n_key, scale, documents)
    return y


class _Block(NamedTuple):
    start: int
    end: int
    """Of the queries, and of the keys"""
    first_key: int


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, H: int, G: int, scale: float, documents: Tensor | None) -> Tensor:
        B, T = heads.shape[:2]
        R = H // G
        # (B, T, H, D) -> (N, T * R, D) and (B, T, G, D) -> (N, T, D)
        q, k, v = (_by_group(part, G) for part in heads.split((H, G, G), dim=2))
        q = q * scale
        # As in torch's kernel, the scores of 16-bit types are fp32, and their probabilities are rounded.
        score_type = _sum_type(heads)
        q_scores, k_scores = q.to(score_type), k.to(score_type)
        blocks = _blocks(T, heads.dtype, documents)
        results, probabilities = [], []
        # Autocast would compute the scores in 16 bits.
        with without_autocast(heads.device.type):
            for start, end, first_key in blocks:
                rows = slice(start * R, end * R)
                scores = torch.bmm(q_scores[:, rows], k_scores[:, first_key:end].mT)  # (N, M * R, K)
                scores_BGMRK = scores.view(B, G, end - start, R, -1)
                # Keys before the block are visible to all of its queries.
                scores_BGMRK[..., start - first_key :] += _future(end - start, scores)
                if documents is not None:
                    hidden_BMK = documents[:, start:end, None] != documents[:, None, first_key:end]
                    scores_BGMRK.masked_fill_(hidden_BMK[:, None, :, None], -torch.inf)
                P = torch.softmax(scores, dim=-1).to(v.dtype)
                results.append(torch.bmm(P, v[:, first_key:end]))
                probabilities.append(P)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.blocks, ctx.groups, ctx.scale = blocks, G, scale
        return _by_token(torch.cat(results, dim=1), B, T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        B, T, H, D = dy.shape
        G, R = ctx.groups, H // ctx.groups
        dy = _by_group(dy, G)
        # Sums over blocks; those of 16-bit types are fp32
        dk, dv = (torch.zeros(k.shape, dtype=_sum_type(k)) for _ in range(2))
        dq = []
        for (start, end, first_key), P in zip(ctx.blocks, probabilities, strict=True):
            rows, keys = slice(start * R, end * R), slice(first_key, end)
            dv[:, keys] += torch.bmm(P.mT, dy[:, rows])
            dP = torch.bmm(dy[:, rows], v[:, keys].mT)
            dscores = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            dq.append(torch.bmm(dscores, k[:, keys]))
            # The queries contain the scale already.
            dk[:, keys] += torch.bmm(dscores.mT, q[:, rows])
        dheads = dy.new_empty(B, T, H + 2 * G, D)
        torch.mul(_by_token(torch.cat(dq, dim=1), B, T), ctx.scale, out=dheads[:, :, :H])
        dheads[:, :, H : H + G] = _by_token(dk, B, T)
        dheads[:, :, H + G :] = _by_token(dv, B, T)
        return dheads, None, None, None, None


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


def _blocks(T: int, dtype: torch.dtype, documents: Tensor | None) -> list[_Block]:
    """Divide the queries: smaller blocks compute fewer scores of the future, larger ones are faster per score."""
    size = 64 if dtype == torch.float32 else 128
    starts = range(0, T, size)
    first_keys = [0] * len(starts)
    if documents is not None:
        # Where the document of a block's first query begins, in the row where it begins first. Rounded down, because
        # oneDNN prepares a product in bf16 for each new number of keys.
        begins = ((documents == documents[:, start : start + 1]).int().argmax(dim=1).min() for start in starts)
        first_keys = [int(begin) // size * size for begin in begins]
    return [_Block(start, min(start + size, T), key) for start, key in zip(starts, first_keys, strict=True)]


def _future(M: int, like: Tensor) -> Tensor:
    """Return -inf where a key comes after a query, else 0: ``(M, 1, M)``."""
    return like.new_full((M, M), float("-inf")).triu_(1).unsqueeze(1)
