"""LitGPT's attention and norm with fewer passes over memory, and ``GPT.forward`` in two halves.

The same code serves training and decoding: with ``input_pos`` the attention reads and writes LitGPT's KV cache. The
halves of the forward are up to the last block, and from there to the logits. The results equal LitGPT's
(tests/test_layers.py, tests/train/test_model.py).

Shape suffixes: B batch, T time, H query heads, G key and value heads (n_query_groups), D head_size, S keys, C n_embd, V
padded vocabulary.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import litgpt.lora
import litgpt.model
import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from litgpt.model import do_softcapping
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from custom_moe import MoEBlock, Router, RouterOutput, use_custom_moe
from custom_moe.backends import hardware_of
from litmoe.attention import MAX_LENGTH, causal_attention_in_blocks
from litmoe.cli import UserError
from litmoe.documents import (
    DocumentLengths,
    DocumentMask,
    attend_document_by_document,
    attend_within_blocks,
    document_mask,
)


@dataclass
class KVCache:
    """Keys and values ``(B, G, S, D)``: what the attention uses of ``litgpt.model.KVCache``, without the module."""

    k: Tensor
    v: Tensor


class CausalSelfAttention(litgpt.model.CausalSelfAttention):
    """LitGPT's attention: the same parameters, arguments and results.

    Partial or interleaved rotation, sliding windows and capped scores are computed by LitGPT's own code.
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        rotates_all = config.rope_n_elem == config.head_size and config.head_size % 2 == 0
        self.is_fast = (
            rotates_all
            and not config.rope_interleave
            and not self.apply_sliding_window_attention
            and config.attention_logit_softcapping is None
        )
        """Whether this class computes the attention, and not LitGPT"""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: DocumentMask | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """Attend to the sequence, or with ``input_pos`` also to the cached keys and values.

        Args:
            x: ``(B, T, n_embd)``.
            cos: ``([B or 1], T, D)``.
            sin: as ``cos``.
            mask: ``([B or 1], 1, T, S)``, True where a query sees a key, or another ``DocumentMask``; None is causal.
            input_pos: positions of the tokens in the cache, ``(T,)`` or ``(B, T)``; needs ``self.kv_cache``.
            input_pos_maxp1: the largest position plus 1: how much of the cache is used; None for all of it.

        Returns:
            ``(B, T, n_embd)``
        """
        if not self.is_fast:
            result: Tensor = super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
            return result

        (B, T, _), H, G, D = x.shape, self.config.n_head, self.config.n_query_groups, self.config.head_size
        heads = rotate(self._heads(x), cos, sin, H + G)  # (B, T, H + 2G, D)
        # mscale: YaRN's correction for stretched contexts, else 1
        scale = self.mscale**2 / math.sqrt(self.config.attention_scores_scalar or D)
        if isinstance(mask, DocumentLengths):
            if _in_blocks(heads):
                y = causal_attention_in_blocks(heads, H, G, scale, mask.documents)
            else:
                y = attend_document_by_document(heads, H, G, mask, scale)
            return self._project(y, T)
        if mask is None and input_pos is None and _in_blocks(heads):
            return self._project(causal_attention_in_blocks(heads, H, G, scale), T)
        q, k, v = heads.transpose(1, 2).split_with_sizes((H, G, G), dim=1)  # (B, heads, T, D)
        if input_pos is not None:
            k, v = self._update_cache(input_pos, input_pos_maxp1, k, v)  # (B, G, S, D)
            if input_pos.dim() == 1 and input_pos_maxp1 is not None and T in (1, input_pos_maxp1):
                # The last position sees all keys, and a prompt in an empty cache is causal: both need no mask, and
                # attention without one is faster.
                mask = None

        if isinstance(mask, BlockMask):
            y = attend_within_blocks(q, k, v, mask, scale)
        elif T == 1:
            # The query heads of a group see the same keys, so they can take the place of the time.
            q = q.reshape(B, G, H // G, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            grouped = H != G and _flash_attention(q.device, q.dtype)
            if H != G and not grouped:
                k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
            y = y.transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)
        return self._project(y, T)

    def _project(self, y: Tensor, T: int) -> Tensor:
        """Apply the output projection to the results of the heads: ``(B, T, H, D)``; if T is 1, ``(B, G, -1, D)``."""
        result: Tensor = self.proj(y.reshape(y.size(0), T, -1))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        """Return queries, keys and values, normalized if the model does so: ``(B, T, H + 2G, D)``."""
        (B, T, _), H, G, D = x.shape, self.config.n_head, self.config.n_query_groups, self.config.head_size
        qkv = self.qkv(x)
        if not self.config.norm_qk:
            heads: Tensor = qkv.view(B, T, H + 2 * G, D)
            return heads
        if self.config.norm_qk_type == "olmo2":  # over all heads together
            q, k, v = qkv.split((H * D, G * D, G * D), dim=-1)
            return torch.cat((self.norm_q(q), self.norm_k(k), v), dim=-1).view(B, T, H + 2 * G, D)
        q, k, v = qkv.view(B, T, H + 2 * G, D).split((H, G, G), dim=2)
        return torch.cat((self.norm_q(q), self.norm_k(k), v), dim=2)

    def _update_cache(self, input_pos: Tensor, end: int | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values ``(B, G, T, D)`` into the cache, and return its first ``end`` positions."""
        cache = self.kv_cache
        if cache is None:
            raise TypeError("input_pos needs a KV cache; call `gpt.set_kv_cache()` first.")
        if cache.k.dtype != k.dtype:  # under autocast, or in a model that was converted
            cache.k, cache.v = cache.k.to(k.dtype), cache.v.to(v.dtype)
        B, _, T, _ = k.shape
        k_cache, v_cache = cache.k.narrow(0, 0, B), cache.v.narrow(0, 0, B)
        if input_pos.dim() == 1:
            k_cache.index_copy_(2, input_pos, k)
            v_cache.index_copy_(2, input_pos, v)
        else:
            # (B, 1, T, 1): LitGPT's cache would loop over the rows if each has positions of its own.
            position = input_pos.view(B, 1, T, 1).expand_as(k)
            k_cache.scatter_(2, position, k)
            v_cache.scatter_(2, position, v)
        if end is None:
            return k_cache, v_cache
        return k_cache.narrow(2, 0, end), v_cache.narrow(2, 0, end)


class LoRACausalSelfAttention(CausalSelfAttention, litgpt.lora.CausalSelfAttention):
    """``litgpt.lora.CausalSelfAttention`` with the computation above: the layers with updates are LitGPT's."""


def _in_blocks(heads: Tensor) -> bool:
    """Return whether attention in blocks is faster than torch's kernel: in training on a CPU.

    With the lengths of prompts, which all differ, oneDNN would prepare new products in bf16 each time. The compiler
    takes long for the blocks, and gains nothing there.
    """
    is_training = heads.requires_grad and not torch.compiler.is_compiling()
    return heads.device.type == "cpu" and is_training and 1 < heads.size(1) <= MAX_LENGTH


@torch.compiler.assume_constant_result  # torch 2.11 can't trace comparing capabilities
def _flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel takes fewer key heads than query heads: the CPU's and flash attention do.

    The memory-efficient kernel, for fp32, GPUs without flash attention, and builds of torch without it (Windows before
    2.15), does not: torch would fall back to scores of T x T.
    """
    if device.type != "cuda":
        return True
    capability = hardware_of(device).capability or (0, 0)
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_built and dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, n_rotated: int) -> Tensor:
    """Apply rotary embeddings (arXiv 2104.09864) to the first heads, as ``litgpt.model.apply_rope``.

    Args:
        heads: ``(B, T, heads, D)``.
        cos: ``([B or 1], T, D)``, both halves alike.
        sin: as ``cos``.
        n_rotated: number of heads to rotate; the rest, the values, are passed through.

    Returns:
        As ``heads``.
    """
    if not torch.is_grad_enabled():
        return _rotate(heads, cos, sin, n_rotated)
    rotated: Tensor = _Rotate.apply(heads, cos, sin, n_rotated)
    return rotated


class _Rotate(torch.autograd.Function):
    """The backward pass is the rotation back, and needs nothing but the angles."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, n_rotated: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.n_rotated = n_rotated
        return _rotate(heads, cos, sin, n_rotated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.n_rotated), None, None, None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, n_rotated: int) -> Tensor:
    # (x1, x2) -> (x1 * cos - x2 * sin, x2 * cos + x1 * sin), with as few passes over memory as possible
    x, passed = heads.split_with_sizes((n_rotated, heads.size(2) - n_rotated), dim=2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # ([B or 1], T, 1, D)
    y = x * cos  # in fp32 as cos is, also if x is bf16
    x_first, x_second = x.chunk(2, dim=-1)
    y_first, y_second = y.chunk(2, dim=-1)
    sin = sin.narrow(-1, 0, x_first.size(-1))
    y_first.addcmul_(x_second, sin, value=-1)
    y_second.addcmul_(x_first, sin)
    return torch.cat((y.to(heads.dtype), passed), dim=2)


class RMSNorm(litgpt.model.RMSNorm):
    """LitGPT's norm (arXiv 1910.07467): the same parameter and result, computed in fp32 whatever the type of ``x``.

    For the backward it keeps ``x`` and one number per token; plain operators keep tensors of the size of ``x`` in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension: ``(..., size) -> (..., size)``."""
        assert self.dim == -1
        weight = 1 + self.weight if self.add_unit_offset else self.weight
        if not torch.is_grad_enabled():
            return _rms_norm(x, weight.float(), self.eps)[0]
        y: Tensor = _RMSNorm.apply(x, weight, self.eps)
        return y

    def for_inference(self) -> Callable[[Tensor], Tensor]:
        """Return ``forward`` without gradients, as a function that has its parameters at hand."""
        weight = (1 + self.weight if self.add_unit_offset else self.weight).detach().float()
        eps, n = self.eps, self.weight.size(0)
        if not self.weight.is_cpu or self.weight.dtype != torch.float32:
            return lambda x: _rms_norm(x, weight, eps)[0]
        # With one token per row, the number of operations counts: root(|x|^2 + n * eps) is a hypotenuse.
        scaled, root = weight * n**0.5, torch.tensor((n * eps) ** 0.5)
        return lambda x: x * (scaled / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), root))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _rms_norm(x, weight.float(), eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_fp32, normed = grad.float(), x.float() * rstd
        # dx = rstd * (grad * weight - normed * mean(grad * weight * normed))
        product = grad_fp32 * normed
        dweight = product.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = product.mul_(weight.float()).mean(dim=-1, keepdim=True)
        dx = (grad_fp32 * weight.float()).sub_(normed.mul_(mean)).mul_(rstd)
        return dx.to(x.dtype), dweight, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalized ``x`` in its own type, and 1 / root mean square in fp32, ``(..., 1)``; weight is fp32."""
    x_fp32 = x.float()
    # The operations of LitGPT's norm, so that the results are the same to the last bit.
    rstd = torch.rsqrt((x_fp32 * x_fp32).mean(dim=-1, keepdim=True) + eps)
    # Neither in place nor with a `to` that changes nothing: torch 2.11 compiled loses the gradient of a result that is
    # one of the intermediate tensors under another name.
    y = x_fp32 * rstd * weight
    return (y if y.dtype == x.dtype else y.to(x.dtype)), rstd


# --- The forward pass


def run_block(
    block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: DocumentMask | None, recomputed: str
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
    mask: DocumentMask | None = None,
    recomputed: str = "none",
    run: Callable[..., tuple[Tensor, RouterOutput | None]] = run_block,
    cache_end: int | None = None,
) -> tuple[Tensor, list[RouterOutput | None]]:
    """Compute everything up to the last norm.

    Args:
        gpt: LitGPT's model.
        input_ids: ``(B, T)``.
        positions: ``(T,)`` or ``(B, T)``; 0 to T - 1 if None.
        mask: ``([B or 1], 1, T, S)``, True where a token sees another, or another ``DocumentMask``; causal if None.
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
            assert positions is not None and isinstance(mask, Tensor | None)
            x, router = run_cached_block(block, x, block_cos, block_sin, mask, positions, cache_end)
        routers.append(router)
    return x, routers


def mask_for(gpt: GPT, documents: Tensor, *, compiled: bool = False) -> DocumentMask:
    """Return the mask with which ``hidden_states`` computes attention within documents.

    Args:
        gpt: LitGPT's model.
        documents: ``(B, T)``, as ``document_mask`` takes them.
        compiled: whether the blocks are compiled.

    Raises:
        UserError: the model has sliding windows, whose attention ignores masks.
    """
    if gpt.config.sliding_window_size is not None:
        raise UserError(
            "attention within documents is not possible in a model with a sliding window (sliding_window_size): LitGPT"
            " computes its attention with a mask of its own. Use --document_masking false."
        )
    # LitGPT computes some kinds of attention itself.
    is_fast = all(getattr(block.attn, "is_fast", False) for block in gpt.transformer.h)
    is_added = gpt.config.attention_logit_softcapping is not None
    return document_mask(documents, compiled=compiled, needs_tensor=not is_fast, is_added=is_added)


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


# --- Build models with these layers


@contextmanager
def use_fast_layers() -> Iterator[None]:
    """Make ``litgpt.GPT(config)`` and ``litgpt.lora.GPT(config)`` build with the layers above.

    Checkpoints stay the same. The contexts may be nested.
    """
    replacements: list[tuple[Any, str, Any]] = [
        (litgpt.model, "CausalSelfAttention", CausalSelfAttention),
        (litgpt.model, "RMSNorm", RMSNorm),
        (litgpt.lora, "CausalSelfAttention", LoRACausalSelfAttention),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, layer in replacements:
            setattr(module, name, layer)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


@contextmanager
def use_our_layers(router: str | None = None) -> Iterator[None]:
    """Make ``litgpt.GPT(config)`` build with ``custom_moe`` and with the layers above.

    Args:
        router: class path of a router that the user named, ``moe.router``; None for the one that the config describes.

    Raises:
        UserError: there is no such router.
    """
    with use_custom_moe(router=None if router is None else import_router(router)), use_fast_layers():
        yield


def import_router(class_path: str) -> type[Router]:
    """Import a router by its class path.

    The module is executed, so the path must be the user's own words: a flag or a line of the run file, never what a
    checkpoint contains.

    Raises:
        UserError: there is no such class, or it is no ``Router``.
    """
    module, _, name = class_path.rpartition(".")
    expected = "expected the class path of a subclass of custom_moe.Router, such as my_routers.ExpertChoice"
    if not module:
        raise UserError(f"the router {class_path} can't be imported (it is only one name); {expected}.")
    try:
        router = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the router {class_path} can't be imported ({error}); {expected}.") from None
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise UserError(f"the router {class_path} is {router!r}; {expected}.")
    return router
