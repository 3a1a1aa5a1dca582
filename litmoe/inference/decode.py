"""Decoding: a batch of texts with KV caches that grow together, one token per step.

A step is the same forward as in training (``litmoe.layers``) with the caches of the attention layers. On a CPU most of
its time is Python, and on a GPU the launching of kernels; there a CUDA graph replays it. ``torch.compile`` is not used,
because it would delay the first token.

Shape suffixes: B rows, T time, S positions of the cache, C n_embd, V padded vocabulary.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from litgpt import GPT
from litgpt.model import LLaMAMoE
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from custom_moe import MoE
from custom_moe.router import TopKRouter
from litmoe.layers import CausalSelfAttention, KVCache, LoRACausalSelfAttention, RMSNorm, hidden_states, logits_of

_MIN_GRAPH_STEPS = 16
"""Steps for which recording a CUDA graph is worth it: the recording takes as long as a few steps"""
_TOKENS_PER_PASS = 8192
"""Prompt tokens that are read in one forward pass, to limit the memory of its activations"""


class Decoder:
    """Texts of one model that grow together.

    The model is not changed, not even for the duration of a step: the caches belong to a copy of its modules that
    shares the parameters. So several decoders may use one model in turn, also from several threads, and the model may
    be the one in training.
    """

    def __init__(self, gpt: GPT, prompts: Sequence[Tensor], copies: int, size: int) -> None:
        """Read the prompts.

        Args:
            gpt: plain model, not what ``torch.compile`` or Fabric made of it.
            prompts: token ids, ``(T,)`` each, on the model's device.
            copies: rows for each prompt, next to each other.
            size: length of the caches: how many tokens of a row are read at most, including the prompt.
        """
        self.gpt = _inference_copy(gpt)
        self.size = size
        device = prompts[0].device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.same_length = len({len(prompt) for prompt in prompts}) == 1
        self.seen = max(len(prompt) for prompt in prompts)
        """Positions of the cache that the longest row has filled"""
        self.places = torch.arange(size, device=device)
        self.logits = self._read(pad_sequence(list(prompts), batch_first=True), lengths, copies)
        """``(B, V)``, after the last token of each prompt"""
        self.positions = lengths.repeat_interleave(copies).clamp(max=size - 1)
        """``(B,)``, where each row's next token goes. If a row is full, it overwrites the last token."""
        self.layers = _prepare(self.gpt) if _is_usual(self.gpt) else None
        """What a step runs; None: the modules"""
        self._graph: _CUDAGraph | None = None
        if size - self.seen >= _MIN_GRAPH_STEPS and _can_be_recorded(self.gpt):
            # The shapes in a graph are fixed, so a step looks at all of the cache, with a mask.
            self._graph = _CUDAGraph(lambda tokens, at: self._step(tokens, at.unsqueeze(1), size), self.positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each row.

        Args:
            tokens: ``(B,)``.

        Returns:
            The logits after it, ``(B, V)``, valid until the next step. In a row whose cache is full they are undefined.
        """
        self.seen = min(self.seen + 1, self.size)
        if self._graph is not None:
            logits = self._graph(tokens, self.positions)
        else:
            positions = self.positions[:1] if self.same_length else self.positions.unsqueeze(1)
            logits = self._step(tokens, positions, self.seen)
        # Full rows stay at the last position.
        self.positions = (self.positions + 1).clamp(max=self.size - 1)
        return logits

    def _step(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        """Compute the logits ``(B, V)`` after tokens ``(B,)`` at positions ``(1,)`` or ``(B, 1)``."""
        forward = self._forward if self.layers is None else self._forward_prepared
        return logits_of(self.gpt, forward(tokens.unsqueeze(1), positions, end)[:, -1])

    def _forward(self, ids_BT: Tensor, positions: Tensor, end: int) -> Tensor:
        """Return the hidden states ``(B, T, C)`` of tokens at positions ``(T,)`` or ``(B, T)``, up to position end."""
        mask = (self.places[:end] <= positions.unsqueeze(-1)).view(-1, 1, ids_BT.size(1), end)
        # Each token sees the cache up to its own position.
        x_BTC, _ = hidden_states(self.gpt, ids_BT, positions, mask, cache_end=end)
        return x_BTC

    def _forward_prepared(self, ids_B1: Tensor, positions: Tensor, end: int) -> Tensor:
        """Compute ``_forward`` of one token per row."""
        assert self.layers is not None
        # (1 or B, 1, D); index_select is faster than an index in brackets
        cos = self.gpt.cos.index_select(0, positions.flatten()).unsqueeze(1)
        sin = self.gpt.sin.index_select(0, positions.flatten()).unsqueeze(1)
        mask = None
        if positions.dim() == 2:
            mask = (self.places[:end] <= positions).view(-1, 1, 1, end)
        x_B1C = self.gpt.transformer.wte(ids_B1)
        for layer in self.layers:
            x_B1C = x_B1C + layer.attention(layer.norm_1(x_B1C), cos, sin, mask, positions, end)
            x_B1C = x_B1C + layer.feed_forward(layer.norm_2(x_B1C))
        return x_B1C

    def _read(self, ids_PT: Tensor, lengths_P: Tensor, copies: int) -> Tensor:
        """Read the prompts, padded at their ends, and return the logits after the last token of each row, ``(B, V)``.

        The padding does not matter: causal attention hides it, and a row's next tokens overwrite it in the cache.
        """
        # P prompts, in passes of as many as fit
        T = ids_PT.size(1)
        blocks = self.gpt.transformer.h
        passes = []
        logits = []
        rows_per_pass = max(1, _TOKENS_PER_PASS // T)
        for ids, lengths in zip(ids_PT.split(rows_per_pass), lengths_P.split(rows_per_pass), strict=True):
            for block in blocks:
                block.attn.kv_cache = block.attn.build_kv_cache(
                    len(ids), self.size, self.gpt.rope_cache_length(), ids.device
                )
            x_PTC = self._forward(ids, self.places[:T], T)
            # Only the last token of a prompt needs logits: they are the largest tensor.
            last_PC = x_PTC[torch.arange(len(ids), device=ids.device), lengths - 1]
            logits.append(logits_of(self.gpt, last_PC))
            passes.append([block.attn.kv_cache for block in blocks])
        # Each prompt was read once; its copies get copies of its keys and values.
        for block, *caches in zip(blocks, *passes, strict=True):
            block.attn.kv_cache.k = torch.cat([cache.k for cache in caches]).repeat_interleave(copies, dim=0)
            block.attn.kv_cache.v = torch.cat([cache.v for cache in caches]).repeat_interleave(copies, dim=0)
        return torch.cat(logits).repeat_interleave(copies, dim=0)


def _inference_copy(gpt: GPT) -> GPT:
    """Copy the modules of a model but not its tensors, and set the copy to eval mode."""
    return _copy_modules(gpt).eval()


def _copy_modules(module: nn.Module) -> Any:
    # Not deepcopy, which takes as long as reading a prompt.
    twin = copy.copy(module)
    twin._modules = {name: child and _copy_modules(child) for name, child in module._modules.items()}
    return twin


# -------------------------------------------------------------------------------------------------------------- layers


class _Layer(NamedTuple):
    """The functions of one transformer block."""

    norm_1: Callable[[Tensor], Tensor]
    attention: Callable[..., Tensor]
    norm_2: Callable[[Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]


def _is_usual(gpt: GPT) -> bool:
    """Return whether the model consists of the usual blocks, with this project's attention."""
    # The conditions of _forward_prepared, which is the block x + attention(norm(x)), x + feed_forward(norm(x)).
    config = gpt.config
    if config.parallel_residual or config.post_attention_norm or config.post_mlp_norm or config.scale_embeddings:
        return False
    fast = all(isinstance(block.attn, CausalSelfAttention) and block.attn.is_fast for block in gpt.transformer.h)
    return fast and config.norm_1 and config.norm_2 and config.rope_indices is None


def _prepare(gpt: GPT) -> list[_Layer]:
    """Return the layers of an inference copy as functions.

    The arithmetic is that of the modules. But to call a module, and to look up its parts, takes about as long as what
    it computes for one token.
    """
    layers = []
    for block in gpt.transformer.h:
        # nn.Module finds its parts by a search in Python; in __dict__ they are found at once.
        parts = {name: _function(part) for name, part in block.attn._modules.items() if name != "kv_cache"}
        block.attn.__dict__.update(parts, kv_cache=KVCache(block.attn.kv_cache.k, block.attn.kv_cache.v))
        layers.append(
            _Layer(_function(block.norm_1), block.attn.forward, _function(block.norm_2), _function(block.mlp))
        )
    return layers


def _function(module: nn.Module | None) -> Any:
    """Return a function that computes what a module does, without gradients."""
    # Exactly this class: not LoRA's layer, and not a quantized one.
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if isinstance(module, (MoE, RMSNorm)):
        return module.for_inference()
    return module


# ---------------------------------------------------------------------------------------------------------- CUDA graph

_recording = threading.Lock()


class _CUDAGraph:
    """A recorded step, which the GPU replays without Python between its kernels.

    Experimental: its speed has not been measured.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], positions: Tensor) -> None:
        """Record a step.

        Args:
            step: computes logits from tokens and positions, both ``(B,)``.
            positions: of the first step.
        """
        self.tokens, self.positions = torch.zeros_like(positions), positions.clone()
        # Streams and graphs belong to the current device, which need not be the model's. A process may record one graph
        # at a time.
        with _recording, torch.cuda.device(positions.device):
            # Run it before, because what is set up at first use can't be recorded. What this writes into the caches is
            # overwritten by the first step.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step(self.tokens, self.positions)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # An explicit stream: torch's own is on the device of the process's first graph. "thread_local": other
            # threads may allocate memory meanwhile.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = step(self.tokens, self.positions)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        with torch.cuda.device(positions.device):
            self.tokens.copy_(tokens)
            self.positions.copy_(positions)
            self.graph.replay()
        return self.logits


def _can_be_recorded(gpt: GPT) -> bool:
    """Return whether a step runs on CUDA without waiting for the device."""
    device = gpt.cos.device
    # Autocast casts weights outside of the graph. LitGPT's own attention asks the device for positions.
    if device.type != "cuda" or torch.is_autocast_enabled("cuda") or not _is_usual(gpt):
        return False
    for block in gpt.transformer.h:
        if isinstance(block.attn, LoRACausalSelfAttention):
            # LitGPT's LoRA layers copy indices to the device.
            return False
        if isinstance(block.mlp, LLaMAMoE):
            # LitGPT's own MoE asks the device for the rows of an expert.
            return False
        # A router of the user's own may wait for the device too.
        if isinstance(block.mlp, MoE) and (
            block.mlp.experts.waits_for_device(device) or not isinstance(block.mlp.gate, TopKRouter)
        ):
            return False
    return True
