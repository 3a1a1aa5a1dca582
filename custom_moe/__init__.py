"""A mixture-of-experts layer for LitGPT models.

``MoE`` has the config, the results and the state dict of ``litgpt.model.LLaMAMoE``. It computes all experts as a few
grouped matrix products and returns the router's output for balance losses and statistics.

>>> from litgpt import Config, GPT
>>> with use_custom_moe():
...     gpt = GPT(Config.from_name("Mixtral-8x7B-v0.1", n_layer=2, n_embd=64, n_head=8, intermediate_size=96))

The package imports torch and litgpt only. Reading order:

================== ====================================================================================
``router``         routers: tokens to experts. A new router is one subclass of ``Router``
``experts``        the experts' parameters, the dispatch of tokens to rows, forward and backward
``backends``       SwiGLU of all experts: torch's grouped_mm, or one expert after the other, and which is used where
``triton_kernels`` the same as Triton kernels
``balance``        balance losses, bias update, load statistics
``litgpt``         ``MoE``, the transformer block, LoRA, and the context manager that builds models with them
================== ====================================================================================

Shape suffixes (``x_NC`` has the shape ``(N, C)``), in all files:

===== ==============================================================================
``N`` tokens: ``B * T``, batch size times sequence length
``C`` width of the layer's input and output, ``n_embd``; in kernels any input width
``E`` experts, ``n_expert``
``K`` experts per token, ``n_expert_per_token`` (only inside top-k routers)
``S`` assignments of a token to an expert; sorted by expert unless it says otherwise
``R`` rows that the experts compute: the assignments, and padding where a backend needs it
``I`` hidden width of an expert
``J`` ``2 * I``: the gate projection above the up projection
``O`` any output width
``L`` layers
===== ==============================================================================
"""

from custom_moe.backends import Backend
from custom_moe.balance import (
    LoadStatistics,
    assignment_counts,
    expert_counts,
    expert_load,
    load_balancing_loss,
    load_statistics,
    router_confidence,
    router_z_loss,
)
from custom_moe.litgpt import MoE, MoEBlock, set_backend, use_custom_moe
from custom_moe.router import Router, RouterOutput, ScoreFunction, score_function, updated_bias, weights_are_constant

__all__ = [
    "Backend",
    "LoadStatistics",
    "MoE",
    "MoEBlock",
    "Router",
    "RouterOutput",
    "ScoreFunction",
    "assignment_counts",
    "expert_counts",
    "expert_load",
    "load_balancing_loss",
    "load_statistics",
    "router_confidence",
    "router_z_loss",
    "score_function",
    "set_backend",
    "updated_bias",
    "use_custom_moe",
    "weights_are_constant",
]
