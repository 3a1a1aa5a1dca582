"""Weights under the names of LitGPT and of transformers.

LitGPT has one function per family and direction, some incomplete (biases, Glm4Moe, the norms of Olmo2). Here, all
families similar to Llama share one table, which tests compare with LitGPT's functions. GPT-NeoX uses LitGPT's own.
"""

import re

import torch
from litgpt import GPT, Config
from litgpt.scripts import convert_hf_checkpoint, convert_lit_checkpoint
from torch import Tensor

from litmoe.hf_config import model_type_of

# Replacements in the names of LitGPT, in this order, that give the names of Llama.
_LLAMA = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."),
    (".norm_1.", ".input_layernorm."),
    (".norm_2.", ".post_attention_layernorm."),
    (".post_attention_norm.", ".post_attention_layernorm."),
    (".post_mlp_norm.", ".post_feedforward_layernorm."),
    # Before `.proj.` at the end of the table, which would match it too.
    (".attn.proj.", ".self_attn.o_proj."),
    (".attn.norm_q.", ".self_attn.q_norm."),
    (".attn.norm_k.", ".self_attn.k_norm."),
    # {} becomes q, k and v: three weights of Llama.
    (".attn.qkv.", ".self_attn.{}_proj."),
    (".fc_1.", ".gate_proj."),
    (".fc_2.", ".up_proj."),
    (".proj.", ".down_proj."),
)
# Replacements in the names of Llama that give the names in the files of Mixtral.
_MIXTRAL = (
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)


def to_huggingface(weights: dict[str, Tensor], config: Config, *, tied: bool) -> dict[str, Tensor]:
    """Convert a LitGPT state dict to what the files of the model family in transformers contain.

    Args:
        weights: LitGPT state dict.
        config: one for which `litmoe.hf_config.without_counterpart` is empty.
        tied: leave out the output matrix, which equals the embedding.
    """
    model_type = model_type_of(config)
    result: dict[str, Tensor] = {}
    # A copy, because the caller compares both models with these weights later.
    weights = dict(weights)
    if tied:
        # transformers shares the embedding with the output matrix when it loads the model.
        weights.pop("lm_head.weight")
    if model_type == "gpt_neox":
        convert_lit_checkpoint.copy_weights_gpt_neox(config, result, weights)
        return result
    for name, tensor in weights.items():
        names, parts = _llama_names(name), [tensor]
        if len(names) > 1:
            # Copies, because safetensors needs one storage per tensor.
            parts = [part.clone() for part in tensor.split(_qkv_rows(config))]
        result.update(zip(names, parts, strict=True))
    if model_type == "llama" and config.attn_bias and not config.bias:
        result |= _zero_output_biases(result)
    if model_type == "mixtral":
        result = {_replace(name, _MIXTRAL): tensor for name, tensor in result.items()}
    if model_type == "glm4_moe" and not config.n_shared_expert:
        result |= _empty_shared_experts(result, config.n_embd)
    return result


def _zero_output_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return zero biases of the output projections, which Llama has if queries, keys and values have biases."""
    return {
        name.replace(".o_proj.weight", ".o_proj.bias"): weight.new_zeros(weight.size(0))
        for name, weight in weights.items()
        if name.endswith(".o_proj.weight")
    }


def _empty_shared_experts(weights: dict[str, Tensor], n_embd: int) -> dict[str, Tensor]:
    """Return shared experts of width 0, which add nothing: Glm4Moe always has one."""
    empty = weights["model.embed_tokens.weight"].new_empty(0, n_embd)
    result = {}
    for name in weights:
        if name.endswith(".mlp.gate.weight"):
            prefix = name.removesuffix("gate.weight") + "shared_experts"
            result[f"{prefix}.gate_proj.weight"] = empty.clone()
            result[f"{prefix}.up_proj.weight"] = empty.clone()
            result[f"{prefix}.down_proj.weight"] = empty.clone().T
    return result


def from_huggingface(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Convert the state dict of a loaded transformers model to the names of LitGPT, without copies where possible.

    Raises:
        KeyError: a weight of ``config`` is missing.
    """
    result: dict[str, Tensor] = {}
    if model_type_of(config) == "gpt_neox":
        convert_hf_checkpoint.copy_weights_gpt_neox(config, result, state_dict)
        return result
    theirs = _split_stacked_experts(state_dict)
    # The names of all weights that the model needs, without memory for them.
    with torch.device("meta"):
        names = list(GPT(config).state_dict())
    for name in names:
        parts = [theirs[their_name] for their_name in _llama_names(name)]
        result[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return result


def _llama_names(name: str) -> list[str]:
    """Return Llama's names for a weight of LitGPT: three for queries, keys and values, otherwise one."""
    theirs = _replace(name, _LLAMA)
    return [theirs.format(part) for part in "qkv"] if "{}" in theirs else [theirs]


def _replace(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name


def _qkv_rows(config: Config) -> tuple[int, int, int]:
    key_rows = config.n_query_groups * config.head_size
    return config.n_head * config.head_size, key_rows, key_rows


def _split_stacked_experts(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split stacked experts, ``gate_up_proj`` (E, 2I, C) and ``down_proj`` (E, C, I), into one tensor per expert."""
    result = {}
    for name, tensor in state_dict.items():
        # transformers stacks experts in memory, but not in the files of a model.
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if stacked is None:
            result[name] = tensor
            continue
        prefix, kind = stacked.groups()
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for part, all_experts in zip(parts, tensor.chunk(len(parts), dim=1), strict=True):
            result |= {f"{prefix}.{expert}.{part}.weight": weight for expert, weight in enumerate(all_experts)}
    return result
