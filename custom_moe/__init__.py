"""A mixture-of-experts layer for LitGPT models: the results and the checkpoint of ``litgpt.model.LLaMAMoE``, computed
as a few grouped matrix products, with the router's output at hand for balance losses and statistics.

>>> from litgpt import Config, GPT
>>> with use_custom_moe():
...     gpt = GPT(Config.from_name("Mixtral-8x7B-v0.1", n_layer=2, n_embd=64, n_head=8, intermediate_size=96))

This package imports torch and litgpt alone and knows nothing of training.
"""

from custom_moe.backends import Backend
from custom_moe.balance import (
    LoadStatistics,
    expert_counts,
    expert_load,
    load_balancing_loss,
    load_statistics,
    router_confidence,
    router_z_loss,
    updated_bias,
)
from custom_moe.block import MoEBlock
from custom_moe.layer import MoE, set_backend
from custom_moe.patch import use_custom_moe
from custom_moe.router import RouterOutput, ScoreFunction, score_function, weights_are_constant

__all__ = [
    "Backend",
    "LoadStatistics",
    "MoE",
    "MoEBlock",
    "RouterOutput",
    "ScoreFunction",
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
