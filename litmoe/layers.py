"""LitGPT's attention and norm as training needs them: fewer passes over memory, and less kept for the backward.

Shape suffixes: B batch, T time, H query heads, G key and value heads (n_query_groups), D head_size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import litgpt.model
import torch
import torch.nn.functional as F
from litgpt import Config
from torch import Tensor

from custom_moe.backends import hardware_of


class CausalSelfAttention(litgpt.model.CausalSelfAttention):
    """The same parameters and the same result; what it does not know (a KV cache, masks, partial or interleaved
    rotation, sliding windows, capped scores) goes LitGPT's way."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.rotates_all = (
            config.rope_n_elem == config.head_size and config.head_size % 2 == 0 and not config.rope_interleave
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """``(B, T, n_embd) -> (B, T, n_embd)``"""
        config = self.config
        if (
            not (self.rotates_all and mask is None and input_pos is None)
            or self.apply_sliding_window_attention
            or config.attention_logit_softcapping is not None
        ):
            result: Tensor = super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
            return result

        (B, T, _), H, G, D = x.shape, config.n_head, config.n_query_groups, config.head_size
        qkv = self.qkv(x)
        if config.norm_qk and config.norm_qk_type == "olmo2":
            q, k, v = qkv.split((H * D, G * D, G * D), dim=-1)
            qkv = torch.cat((self.norm_q(q), self.norm_k(k), v), dim=-1)
        heads = qkv.view(B, T, H + 2 * G, D)
        if config.norm_qk and config.norm_qk_type == "default":
            q, k, v = heads.split((H, G, G), dim=2)
            heads = torch.cat((self.norm_q(q), self.norm_k(k), v), dim=2)
        q, k, v = _Rotate.apply(heads, cos, sin, H + G).transpose(1, 2).split((H, G, G), dim=1)
        scale = self.mscale**2 / math.sqrt(config.attention_scores_scalar or D)
        grouped = H != G and _flash_attention(q.device, q.dtype)
        if H != G and not grouped:
            k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)  # (B, H, T, D)
        result = self.proj(y.transpose(1, 2).reshape(B, T, H * D))
        return result


@torch.compiler.assume_constant_result  # torch 2.11 can't trace comparing capabilities
def _flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel takes fewer key heads than query heads: a CPU's, and flash attention. The memory-efficient one,
    for fp32 and cards without flash attention, does not, and torch would fall back to scores of T x T."""
    capability = hardware_of(device).capability or (0, 0)
    return device.type != "cuda" or (dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0))


class _Rotate(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864) of the first heads of ``(B, T, heads, D)``, as ``litgpt.model.apply_rope``;
    the other heads, the values, pass. The backward is the rotation back."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotated = rotated
        return _rotate(heads, cos, sin, rotated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.rotated), None, None, None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # ([B or 1], T, 1, D), both halves alike
    half = heads.size(-1) // 2
    x = heads[:, :, :rotated]
    y = x * cos  # in fp32 as cos is, also where x is bf16
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return torch.cat((y.to(heads.dtype), heads[:, :, rotated:]), dim=2)


class RMSNorm(litgpt.model.RMSNorm):
    """The same parameter and the same result (arXiv 1910.07467), computed in fp32 whatever the type of ``x``. Keeps
    ``x`` and a number for each token, where plain operators keep tensors of ``x``'s size in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., size) -> (..., size)``"""
        assert self.dim == -1
        weight = 1 + self.weight if self.add_unit_offset else self.weight
        result: Tensor = _RMSNorm.apply(x, weight, self.eps)
        return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        # Neither in place nor by a `to` that changes nothing: compiled by torch 2.11, the gradient of a result that is
        # one of its intermediate tensors under another name is lost.
        y = wide * rstd * weight.float()
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_wide, normed = grad.float(), x.float() * rstd
        product = grad_wide * normed
        dweight = product.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = product.mul_(weight.float()).mean(dim=-1, keepdim=True)
        dx = (grad_wide * weight.float()).sub_(normed.mul_(mean)).mul_(rstd)
        return dx.to(x.dtype), dweight, None


@contextmanager
def use_fast_layers() -> Iterator[None]:
    """While open, ``litgpt.GPT(config)`` builds with the layers above; its checkpoints are the same. May be nested."""
    names = {"CausalSelfAttention": CausalSelfAttention, "RMSNorm": RMSNorm}
    before = {name: getattr(litgpt.model, name) for name in names}
    try:
        for name, layer in names.items():
            setattr(litgpt.model, name, layer)
        yield
    finally:
        for name, layer in before.items():
            setattr(litgpt.model, name, layer)
