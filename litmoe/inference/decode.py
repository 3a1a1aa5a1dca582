"""A batch of texts and their KV caches, and the model's next step on them.

The prompts go through LitGPT's forward. A step of one token for each text is then so little work that on a CPU most of
its time would be Python's and on a GPU that of launching kernels. So for the usual kind of model it is written anew
here, with fewer operations, and a GPU replays it as one CUDA graph. `torch.compile` is left out, as one would have to
wait for it before the first token.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from litgpt.model import LLaMAMoE, RMSNorm
from torch import Tensor, nn

from custom_moe.experts import Experts
from custom_moe.few import FewTokens
from litmoe.forward import logits_of

_WORTH_A_GRAPH = 16
"""Steps, as recording a graph takes the time of a few"""
_READ_TOGETHER = 4096
"""Tokens of prompts, because LitGPT computes the logits of all of them, though only those of the last are used"""


class Decoder:
    """Texts that grow together, one token at a time.

    Between two steps nothing of it lies in the model, so several texts of one model may be written in turn, from
    several threads too, one that is never finished is in nobody's way, and the model may be the one in training.
    """

    def __init__(self, gpt: GPT, prompts: Sequence[Tensor], copies: int, size: int) -> None:
        """Reads the prompts: each once, several together where all are of one length, else one by one.

        Args:
            gpt: plain, not what `torch.compile` or Fabric made of it.
            prompts: token ids, ``(T,)`` each, on the model's device.
            copies: rows for each prompt, side by side.
            size: how many tokens of a row are read at most, those of the prompt counted.
        """
        self.gpt, self.size = gpt, size
        self.even = len({len(prompt) for prompt in prompts}) == 1
        lengths = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(copies)
        self.seen = int(lengths.max())
        """How many places of the cache the longest row has filled"""
        rows, device = len(lengths), prompts[0].device
        # (B,), of each row's next token; where there is no room for one, it is written over the last.
        self.positions = lengths.clamp(max=size - 1).to(device)
        logits: list[Tensor] = []
        with _as_it_was(gpt):
            gpt.mask_cache = None
            gpt.set_kv_cache(batch_size=rows, max_seq_length=size, device=device)
            caches = [block.attn.kv_cache for block in gpt.transformer.h]
            together = max(1, _READ_TOGETHER // self.seen) if self.even else 1
            end = rows
            # LitGPT writes into the first rows, so what belongs there comes last.
            for first in reversed(range(0, len(prompts), together)):
                ids = torch.stack(list(prompts[first : first + together]))  # (N, T)
                places = torch.arange(ids.size(1), device=device)
                logits.insert(0, gpt(ids, places, input_pos_maxp1=ids.size(1))[:, -1].clone())  # lets go of the rest
                start = end - len(ids) * copies
                for buffer in (buffer for cache in caches for buffer in cache.buffers()):
                    if (start, end) != (0, len(ids)):
                        buffer[start:end] = buffer[: len(ids)].repeat_interleave(copies, dim=0)
                end = start
            self.mask_cache, self.kv_caches = gpt.mask_cache, caches
            self.logits = torch.cat(logits).repeat_interleave(copies, dim=0)
            """``(B, V)``, of each prompt's last token"""
            # LoRA has dropout, which a step of its own, outside of `_as_it_was`, would apply to a model in training.
            dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in gpt.modules())
            self._step = _PlainStep(gpt, self.kv_caches) if is_plain(gpt.config) and not dropout else None
            self._graph: _Graph | None = None
            if self._step is not None and size - self.seen >= _WORTH_A_GRAPH and _can_be_recorded(gpt):
                self._graph = _Graph(self._step, self.positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Reads each row's next token, ``(B,)``, and returns the logits after it, ``(B, V)``, until the next step.

        In a row whose cache is full they mean nothing.
        """
        self.seen = min(self.seen + 1, self.size)
        if self._graph is not None:
            logits = self._graph(tokens, self.positions)
        elif self._step is not None:
            logits = self._step(tokens, self.positions, self.seen, masked=not self.even)
        else:
            places = self.positions[:1] if self.even else self.positions.unsqueeze(1)
            with _as_it_was(self.gpt):
                self.gpt.mask_cache = self.mask_cache
                _set_kv_caches(self.gpt, self.kv_caches)
                logits = self.gpt(tokens.unsqueeze(1), places, input_pos_maxp1=self.seen)[:, -1]
        self.positions += 1
        if not self.even:
            self.positions.clamp_(max=self.size - 1)
        return logits


# --------------------------------------------------------------------------------------------------------- plain models


def is_plain(config: Config) -> bool:
    """Whether `_PlainStep` computes this kind of model; all of this repository's are."""
    unusual = (
        config.latent_attention,
        config.sliding_window_size is not None and config.sliding_window_indices is not None,
        config.rope_indices is not None,
        config.rope_interleave,
        config.rope_n_elem == 0 or config.rope_n_elem % 2,
        config.attention_logit_softcapping is not None,
        config.norm_qk and config.norm_qk_type != "default",
        config.parallel_residual,
        not (config.norm_1 and config.norm_2),
        config.post_attention_norm or config.post_mlp_norm,
        config.scale_embeddings,
    )
    return not any(unusual)


class _PlainStep:
    """`GPT.forward` for one token of each row, with a position of its own."""

    def __init__(self, gpt: GPT, kv_caches: Sequence[nn.Module]) -> None:
        config, device = gpt.config, gpt.cos.device
        self.embed, self.logits_of = gpt.transformer.wte, partial(logits_of, gpt)
        self.layers = [_Layer(block, cache) for block, cache in zip(gpt.transformer.h, kv_caches, strict=True)]
        rows, groups, self.size, self.head_size = self.layers[0].k_cache.shape
        self.heads = (config.n_head, groups)
        self.first_places = torch.arange(rows * groups, device=device).view(rows, groups) * self.size
        self.places = torch.arange(self.size, device=device)
        # x*cos + rotated(x)*sin, where rotated(x) is x with its halves exchanged and the minus moved into sin; what is
        # not rotated has cos 1 and sin 0.
        half, rest = config.rope_n_elem // 2, config.head_size - config.rope_n_elem
        self.exchanged = torch.arange(config.head_size, device=device)
        self.exchanged[: 2 * half] = self.exchanged[: 2 * half].roll(half)
        sign = torch.ones(2 * half, device=device)
        sign[:half] = -1
        cos, sin = F.pad(gpt.cos[: self.size], (0, rest), value=1.0), F.pad(gpt.sin[: self.size] * sign, (0, rest))
        self.rotations = torch.stack((cos, sin), dim=1).unsqueeze(2)  # (size, 2, 1, head_size)

    def __call__(self, tokens: Tensor, positions: Tensor, seen: int, masked: bool) -> Tensor:
        """Logits ``(B, V)``; writes the tokens' keys and values into the caches.

        Args:
            tokens: ``(B,)``.
            positions: ``(B,)``.
            seen: how many places of the cache are looked at.
            masked: whether some of these come after a row's own position.
        """
        (n_head, groups), head_size, rows = self.heads, self.head_size, len(tokens)
        mask = (self.places[:seen] <= positions.unsqueeze(1)).view(rows, 1, 1, seen) if masked else None
        cos, sin = self.rotations.index_select(0, positions).unbind(1)  # (B, 1, head_size)
        written = (self.first_places + positions.unsqueeze(1)).flatten()  # (B * groups,)
        x = self.embed(tokens)  # (B, C)
        for layer in self.layers:
            qkv = layer.qkv(layer.norm_1(x)).view(rows, n_head + 2 * groups, head_size)
            qk, v = qkv.split_with_sizes((n_head + groups, groups), dim=1)
            if layer.norm_q is not None and layer.norm_k is not None:
                q, k = qk.split_with_sizes(self.heads, dim=1)
                qk = torch.cat((layer.norm_q(q), layer.norm_k(k)), dim=1)
            qk = (qk * cos + qk.index_select(2, self.exchanged) * sin).to(v.dtype)
            q, k = qk.split_with_sizes(self.heads, dim=1)
            layer.k_places.index_copy_(0, written, k.reshape(-1, head_size))
            layer.v_places.index_copy_(0, written, v.reshape(-1, head_size))
            y = F.scaled_dot_product_attention(
                q.reshape(rows, groups, n_head // groups, head_size),  # the heads of a group see the same keys
                layer.k_cache.narrow(2, 0, seen),
                layer.v_cache.narrow(2, 0, seen),
                attn_mask=mask,
                scale=layer.scale,
            )
            x = x + layer.proj(y.reshape(rows, -1))
            x = x + layer.mlp(layer.norm_2(x))
        return self.logits_of(x)


class _Layer:
    """What a step needs of a block and its cache, within reach: attributes of modules are slow to look up."""

    def __init__(self, block: Any, cache: Any) -> None:
        attn, config = block.attn, block.config
        self.norm_1, self.norm_2, self.mlp = _norm(block.norm_1), _norm(block.norm_2), _mlp(block.mlp, len(cache.k))
        self.qkv, self.proj = _linear(attn.qkv), _linear(attn.proj)
        self.norm_q = _norm(attn.norm_q) if config.norm_qk else None
        self.norm_k = _norm(attn.norm_k) if config.norm_qk else None
        self.scale = attn.mscale**2 * (config.attention_scores_scalar or config.head_size) ** -0.5
        self.k_cache, self.v_cache = cache.k, cache.v  # (B, groups, size, head_size)
        self.k_places, self.v_places = cache.k.view(-1, config.head_size), cache.v.view(-1, config.head_size)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """LitGPT's RMSNorm as one operation, any other norm as it is."""
    if not isinstance(norm, RMSNorm) or norm.add_unit_offset or norm.dim != -1:
        return norm
    shape, weight, eps = norm.weight.shape, norm.weight, norm.eps
    if norm.weight.is_cpu and norm.weight.dtype == torch.float32:
        # rms_norm is several operations on a CPU. The root of the mean square plus eps is a hypotenuse.
        width = weight.size(0)
        scaled, leg = weight * width**0.5, torch.tensor((width * eps) ** 0.5)
        return lambda x: x * (scaled / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), leg))
    return lambda x: F.rms_norm(x, shape, weight.to(x.dtype), eps)


def _linear(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    if type(linear) is not nn.Linear:
        return lambda x: linear(x.unsqueeze(1)).squeeze(1)  # LitGPT's LoRA takes three dimensions alone
    return partial(F.linear, weight=linear.weight, bias=linear.bias)


def _mlp(mlp: Any, rows: int) -> Callable[[Tensor], Tensor]:
    if FewTokens.can_take(mlp, rows):
        return FewTokens(mlp)
    return lambda x: mlp(x.unsqueeze(1)).squeeze(1)  # as does its own MoE


# ----------------------------------------------------------------------------------------------------------- CUDA graph


class _Graph:
    """A step, recorded once and replayed: the GPU goes through its kernels without Python between them."""

    def __init__(self, step: _PlainStep, positions: Tensor) -> None:
        self.tokens, self.positions = torch.zeros_like(positions), positions.clone()

        def once() -> Tensor:
            # The shapes in a graph are fixed: the whole cache is looked at, and what is not filled yet is masked.
            return step(self.tokens, self.positions, step.size, masked=True)

        # Streams and graphs belong to the current device, which need not be the model's.
        with torch.cuda.device(positions.device):
            # Before it is recorded, whatever is set up at first use must have been. What this writes into the caches
            # the first step writes over.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    once()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Without a stream, torch takes one on the device of the process's first graph. What other threads do
            # meanwhile, allocating for instance, is none of this recording's business.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = once()

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        with torch.cuda.device(positions.device):
            self.tokens.copy_(tokens)
            self.positions.copy_(positions)
            self.graph.replay()
        return self.logits


def _can_be_recorded(gpt: GPT) -> bool:
    """On CUDA, where nothing waits for the device; autocast casts the weights outside of what is recorded."""
    device = gpt.cos.device
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    if any(isinstance(module, LLaMAMoE) for module in gpt.modules()):  # it asks which rows an expert has
        return False
    return all(layer.backend_on(device) != "loop" for layer in gpt.modules() if isinstance(layer, Experts))


# ---------------------------------------------------------------------------------------------------- the model's state

_one_at_a_time = threading.Lock()


@contextmanager
def _as_it_was(gpt: GPT) -> Iterator[None]:
    """Sets the model to eval for a moment, then puts its KV caches, mask and training modes back."""
    with _one_at_a_time:
        training = [module for module in gpt.modules() if module.training]
        kv_caches = [block.attn.kv_cache for block in gpt.transformer.h]
        mask_cache = gpt.mask_cache
        try:
            for module in training:
                module.training = False
            yield
        finally:
            gpt.mask_cache = mask_cache
            _set_kv_caches(gpt, kv_caches)
            for module in training:
                module.training = True


def _set_kv_caches(gpt: GPT, kv_caches: Sequence[nn.Module | None]) -> None:
    for block, kv_cache in zip(gpt.transformer.h, kv_caches, strict=True):
        del block.attn.kv_cache  # a None set over a module would stay listed among the modules
        block.attn.kv_cache = kv_cache
