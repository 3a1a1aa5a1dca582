"""The same weights under LitGPT's names and under transformers'.

LitGPT has a function per family and direction, some with gaps (biases, Glm4Moe, Olmo2's norms). All families like Llama
share one table here instead; tests hold its result against LitGPT's functions. GPT-NeoX goes through LitGPT's own.
"""

import re

import torch
from litgpt import GPT, Config
from litgpt.scripts import convert_hf_checkpoint, convert_lit_checkpoint
from torch import Tensor

from litmoe.hf_config import model_type_of

# What to replace in LitGPT's names, in this order, to have Llama's.
_LLAMA = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."),
    (".norm_1.", ".input_layernorm."),
    (".norm_2.", ".post_attention_layernorm."),
    (".post_attention_norm.", ".post_attention_layernorm."),
    (".post_mlp_norm.", ".post_feedforward_layernorm."),
    (".attn.proj.", ".self_attn.o_proj."),
    (".attn.norm_q.", ".self_attn.q_norm."),
    (".attn.norm_k.", ".self_attn.k_norm."),
    (".attn.qkv.", ".self_attn.{}_proj."),
    (".fc_1.", ".gate_proj."),
    (".fc_2.", ".up_proj."),
    (".proj.", ".down_proj."),
)
# What to replace in those names to have the files of Mixtral.
_MIXTRAL = (
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)


def to_huggingface(weights: dict[str, Tensor], config: Config, *, tied: bool) -> dict[str, Tensor]:
    """LitGPT's state dict as the files of the model's family in transformers hold it.

    Args:
        config: one that has a counterpart (`litmoe.hf_config.without_counterpart` finds nothing).
        tied: leave the output matrix out, which is the embedding.
    """
    model_type = model_type_of(config)
    result: dict[str, Tensor] = {}
    weights = {name: tensor for name, tensor in weights.items() if not (tied and name == "lm_head.weight")}
    if model_type == "gpt_neox":
        convert_lit_checkpoint.copy_weights_gpt_neox(config, result, weights)
        return result
    for name, tensor in weights.items():
        names = _names(name)
        # Copies: safetensors wants a storage for each.
        parts = [part.clone() for part in tensor.split(_qkv_rows(config))] if len(names) > 1 else [tensor]
        result |= dict(zip(names, parts, strict=True))
    if model_type == "mixtral":
        result = {_replaced(name, _MIXTRAL): tensor for name, tensor in result.items()}
    if model_type == "glm4_moe" and not config.n_shared_expert:
        # The family always has a shared expert; one of width 0 adds nothing.
        nothing = weights["transformer.wte.weight"].new_empty(0, config.n_embd)
        for gate in [name for name in result if name.endswith(".mlp.gate.weight")]:
            for part, tensor in (("gate", nothing), ("up", nothing.clone()), ("down", nothing.clone().T)):
                result[gate.replace(".gate.", f".shared_experts.{part}_proj.")] = tensor
    return result


def from_huggingface(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The state dict of a loaded transformers model under LitGPT's names, without copying where possible.

    Raises:
        KeyError: a weight of ``config`` is missing.
    """
    result: dict[str, Tensor] = {}
    if model_type_of(config) == "gpt_neox":
        convert_hf_checkpoint.copy_weights_gpt_neox(config, result, state_dict)
        return result
    found = _one_per_expert(state_dict)
    with torch.device("meta"):
        names = list(GPT(config).state_dict())
    for name in names:
        parts = [found[theirs] for theirs in _names(name)]
        result[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return result


def _names(name: str) -> list[str]:
    """Llama's names of what LitGPT has under ``name``: three for queries, keys and values, else one."""
    theirs = _replaced(name, _LLAMA)
    return [theirs.format(part) for part in "qkv"] if "{}" in theirs else [theirs]


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name


def _qkv_rows(config: Config) -> tuple[int, int, int]:
    of_keys = config.n_query_groups * config.head_size
    return config.n_head * config.head_size, of_keys, of_keys


def _one_per_expert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes stacked experts, ``gate_up_proj`` (E, 2I, C) and ``down_proj`` (E, C, I), apart."""
    result = {}
    for name, tensor in state_dict.items():
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if stacked is None:
            result[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if stacked[2] == "gate_up_proj" else ("down_proj",)
        for part, of_all in zip(parts, tensor.chunk(len(parts), dim=1), strict=True):
            result |= {f"{stacked[1]}.{expert}.{part}.weight": of_one for expert, of_one in enumerate(of_all)}
    return result
