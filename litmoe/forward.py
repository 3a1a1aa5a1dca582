"""``GPT.forward`` without a KV cache, in two halves: whoever measures a model needs what lies between them.

Held against LitGPT's forward by the tests of those who call it (tests/train/test_model.py, tests/evaluation).
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
"""What activation checkpointing keeps nothing of but the input, and computes again in the backward pass"""


def run_block(
    block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, recomputed: Recomputed
) -> tuple[Tensor, RouterOutput | None]:
    """One transformer block, as ``hidden_states`` has it: ``(B, T, C) -> (B, T, C)``, and what its router decided."""
    if recomputed == "block":
        assert isinstance(block, MoEBlock)
        return checkpoint(block, x, cos, sin, mask, return_router_output=True, use_reentrant=False)
    if isinstance(block, MoEBlock):
        return block(x, cos, sin, mask, return_router_output=True, recompute_mlp=recomputed == "moe")
    return block(x, cos, sin, mask), None


def hidden_states(
    gpt: GPT,
    input_ids: Tensor,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    recomputed: Recomputed = "none",
    run: Callable[..., tuple[Tensor, RouterOutput | None]] = run_block,
) -> tuple[Tensor, list[RouterOutput | None]]:
    """Everything up to the last norm.

    Args:
        input_ids: ``(B, T)``.
        positions: ``(B, T)``; from 0 to T - 1 when None.
        mask: ``(B, 1, T, T)``, True where a token sees another; causal when None.
        recomputed: nothing, each block, or each block's feed-forward, be it a mixture of experts or dense. The blocks
            must be ``MoEBlock``s then.
        run: ``run_block``, maybe compiled.

    Returns:
        ``(B, T, C)``, and for each block what its router decided; None where it is dense or LitGPT's own block.
    """
    config = gpt.config
    if positions is None:
        seq_length = input_ids.size(1)
        cos, sin = gpt.cos[:seq_length].unsqueeze(0), gpt.sin[:seq_length].unsqueeze(0)
    else:
        cos, sin = gpt.cos[positions], gpt.sin[positions]
    x = _embedded(gpt.transformer.wte, input_ids)  # (B, T, C)
    if config.scale_embeddings:
        x = x * torch.tensor(config.n_embd**0.5, dtype=x.dtype)
    routers: list[RouterOutput | None] = []
    for index, block in enumerate(gpt.transformer.h):
        # Models with local and global attention keep two rotations side by side in the last dimension.
        pick = (Ellipsis,) if config.rope_indices is None else (Ellipsis, config.rope_indices[index])
        x, router = run(block, x, cos[pick], sin[pick], mask, recomputed)
        routers.append(router)
    return x, routers


def _embedded(wte: nn.Module, input_ids: Tensor) -> Tensor:
    """The tokens' embeddings. The gradient of a token's row is the sum over all its places, and torch adds them up in
    the weight's type: in 16 bits (bf16-true) the row of a frequent token would lose most of it, so it is fp32 here."""
    weight = cast(Tensor, wte.weight)
    if weight.dtype.itemsize == 2 and weight.requires_grad and torch.is_grad_enabled():
        return F.embedding(input_ids, weight.float()).to(weight.dtype)
    x: Tensor = wte(input_ids)
    return x


def logits_of(gpt: GPT, x: Tensor) -> Tensor:
    """The last norm and the output layer: ``(..., C) -> (..., padded_vocab_size)``."""
    logits: Tensor = gpt.lm_head(gpt.transformer.ln_f(x))
    if gpt.config.final_logit_softcapping is not None:
        logits = do_softcapping(logits, thresh=gpt.config.final_logit_softcapping)
    return logits
