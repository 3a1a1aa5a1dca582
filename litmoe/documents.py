"""Attention within documents: windows of text hold the end of one document and the beginning of the next, and rows of
packed conversations hold several.

Each token then attends only to earlier tokens of its own document. Rotary positions need not restart: attention depends
on the distance between two positions alone. What computes it depends on the device, see ``document_mask``.

Shape suffixes: see ``layers.py``; N documents (parts of one that are in different rows count separately).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class DocumentLengths(NamedTuple):
    """Documents one after the other, row by row, to be computed one by one."""

    lengths: list[int]
    """``(N,)``, which add up to ``B * T``"""
    documents: Tensor
    """``(B, T)``, the numbers that they were found from"""


DocumentMask = Tensor | BlockMask | DocumentLengths
"""A mask ``(B, 1, T, T)``, True where a token sees another; or what needs no such memory"""


def number_documents(input_ids: Tensor, document_end: int) -> Tensor:
    """Return the number of each token's document in its row, from 0: ``(B, T) -> (B, T)``.

    Args:
        input_ids: token ids.
        document_end: the token that ends a document and belongs to it.
    """
    is_end = (input_ids == document_end).int()
    return is_end.cumsum(1, dtype=torch.int32) - is_end


def document_mask(
    documents: Tensor, *, compiled: bool, needs_tensor: bool = False, is_added: bool = False
) -> DocumentMask:
    """Return the fastest mask for a device.

    Not compiled on a CPU, training masks the scores of each block (``attention.py``). The documents of longer rows, and
    of rows without gradients, are computed one by one, which needs fewer products. Compiled on CUDA, FlexAttention
    leaves out blocks between documents. Elsewhere it is a mask for scaled dot-product attention.

    Args:
        documents: ``(B, T)``, a number of its own for each document of a row.
        compiled: whether the attention is compiled.
        needs_tensor: whether LitGPT's own attention gets the mask.
        is_added: whether that attention adds the mask to the scores, as it does for capped ones. The mask is then 0 and
            -inf. Otherwise it is boolean, because kernels for bf16 do not take an fp32 mask.
    """
    if not needs_tensor and not compiled and documents.device.type == "cpu":
        return DocumentLengths(_lengths(documents), documents)
    if not needs_tensor and compiled and documents.device.type == "cuda":
        return _block_mask(documents)
    B, T = documents.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    # (B, 1, T, 1) == (B, 1, 1, T)
    mask = causal & (documents[:, None, :, None] == documents[:, None, None, :])
    if not is_added:
        return mask
    return torch.zeros(B, 1, T, T, device=documents.device).masked_fill_(~mask, float("-inf"))


def _lengths(documents: Tensor) -> list[int]:
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], documents.numel()], strict=True)]


def _block_mask(documents: Tensor) -> BlockMask:
    def same_document(b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (documents[b, q] == documents[b, kv])

    B, T = documents.shape
    return create_block_mask(same_document, B, None, T, T, device=documents.device)


def attend_within_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Compute FlexAttention: queries ``(B, H, T, D)``, keys and values ``(B, G, T, D)``, result ``(B, T, H, D)``."""
    y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def attend_document_by_document(heads: Tensor, n_query: int, n_key: int, mask: DocumentLengths, scale: float) -> Tensor:
    """Compute causal attention of each document by itself.

    Args:
        heads: queries, keys and values, ``(B, T, H + 2G, D)``.
        n_query, n_key: H and G.
        mask: the documents.
        scale: of the scores.

    Returns:
        ``(B, T, H, D)``
    """
    results = []
    # Splitting all tokens once has one cheap backward; slices of rows would each have a gradient as large as all.
    for document in heads.flatten(0, 1).split(mask.lengths):
        # (n, H + 2G, D) -> (1, heads, n, D)
        q, k, v = document.transpose(0, 1).unsqueeze(0).split((n_query, n_key, n_key), dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=n_query != n_key)
        results.append(y.squeeze(0).transpose(0, 1))
    return torch.cat(results).view(*heads.shape[:2], n_query, heads.size(3))
