"""``GPT.forward`` in two halves, up to the last block and from there to the logits, for training and decoding.

Its results equal those of LitGPT's forward (tests/train/test_model.py, tests/evaluation, tests/inference).

Shape suffixes: B batch, T time, C n_embd, V padded vocabulary.
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from litgpt import GPT
from litgpt.model import do_softcapping
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from custom_moe import MoEBlock, RouterOutput

Recomputed = Literal["none", "block", "moe"]
"""The part that activation checkpointing computes again in the backward pass, keeping its input only"""


def run_block(
    block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, recomputed: Recomputed
) -> tuple[Tensor, RouterOutput | None]:
    """Run one transformer block of ``hidden_states``.

    Returns:
        ``(B, T, C)``, and the output of the block's router, None if there is none.
    """
    if recomputed == "block":
        assert isinstance(block, MoEBlock)
        return checkpoint(block, x, cos, sin, mask, return_router_output=True, use_reentrant=False)
    if isinstance(block, MoEBlock):
        return block(x, cos, sin, mask, return_router_output=True, recompute_mlp=recomputed == "moe")
    return block(x, cos, sin, mask), None


def run_cached_block(
    block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, positions: Tensor, end: int
) -> tuple[Tensor, None]:
    """Run one transformer block on tokens at ``positions`` of its KV cache, of which ``end`` positions are used."""
    return block(x, cos, sin, mask, positions, end), None


def hidden_states(
    gpt: GPT,
    input_ids: Tensor,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    recomputed: Recomputed = "none",
    run: Callable[..., tuple[Tensor, RouterOutput | None]] = run_block,
    cache_end: int | None = None,
) -> tuple[Tensor, list[RouterOutput | None]]:
    """Compute everything up to the last norm.

    Args:
        gpt: LitGPT's model.
        input_ids: ``(B, T)``.
        positions: ``(T,)`` or ``(B, T)``; 0 to T - 1 if None.
        mask: ``([B or 1], 1, T, S)``, True where a token sees another; causal if None.
        recomputed: what is computed again in the backward pass: nothing, each block, or each block's feed-forward.
            The blocks must be ``MoEBlock``s then.
        run: ``run_block``, possibly compiled.
        cache_end: decode with the KV caches of the blocks, using their first ``cache_end`` positions. ``positions`` and
            ``mask`` are required then.

    Returns:
        ``(B, T, C)``, and for each block its router's output; None if the block is dense or LitGPT's own.
    """
    config = gpt.config
    # Rotations of the positions: ([B or 1], T, D)
    if positions is None:
        T = input_ids.size(1)
        cos, sin = gpt.cos[:T], gpt.sin[:T]
    else:
        cos, sin = gpt.cos[positions], gpt.sin[positions]
    if positions is None or positions.dim() == 1:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)

    x = _embedded(gpt.transformer.wte, input_ids)  # (B, T, C)
    if config.scale_embeddings:
        x = x * torch.tensor(config.n_embd**0.5, dtype=x.dtype)
    # The routers' outputs travel with the result: nothing is stored on the modules, where checkpointing and DDP would
    # lose or mix them.
    routers: list[RouterOutput | None] = []
    for index, block in enumerate(gpt.transformer.h):
        block_cos, block_sin = cos, sin
        if config.rope_indices is not None:
            # Models with local and global attention keep two rotations in the last dimension.
            block_cos, block_sin = cos[..., config.rope_indices[index]], sin[..., config.rope_indices[index]]
        # Decoding does not need the router's output.
        if cache_end is None:
            x, router = run(block, x, block_cos, block_sin, mask, recomputed)
        else:
            assert positions is not None
            x, router = run_cached_block(block, x, block_cos, block_sin, mask, positions, cache_end)
        routers.append(router)
    return x, routers


def _embedded(wte: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the embeddings of the tokens, ``(B, T, C)``."""
    weight = cast(Tensor, wte.weight)
    if weight.dtype.itemsize == 2 and weight.requires_grad and torch.is_grad_enabled():
        # The gradient of a token's row is a sum over all its positions, which torch adds up in the type of the weight:
        # in 16 bits (bf16-true) the row of a frequent token would lose most of it.
        return F.embedding(input_ids, weight.float()).to(weight.dtype)
    x: Tensor = wte(input_ids)
    return x


def logits_of(gpt: GPT, x: Tensor) -> Tensor:
    """Apply the last norm and the output layer: ``(..., C) -> (..., V)``."""
    logits: Tensor = gpt.lm_head(gpt.transformer.ln_f(x))
    if gpt.config.final_logit_softcapping is not None:
        logits = do_softcapping(logits, thresh=gpt.config.final_logit_softcapping)
    return logits
