"""A model in llama.cpp: which architecture computes the same, its metadata and its tensors.

llama.cpp computes what the architecture, named in the file, prescribes. Names of keys and tensors are those of the GGUF
specification and of `gguf.constants`; what each architecture computes was tried with llama.cpp itself
(tests/export/test_gguf.py).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from gguf import ExpertGatingFuncType, GGUFWriter
from litgpt import Config
from litgpt.model import build_rope_cache
from torch import Tensor

from litmoe.hf_config import model_type_of, without_counterpart

# Model families of transformers, as `litmoe.hf_config.model_type_of` returns them, and architectures of llama.cpp.
_ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "olmo2": "olmo2",
    "glm4_moe": "glm4moe",
    "gpt_neox": "gptneox",
}
# Replacements in the names of LitGPT within a block, in this order, that give the names of GGUF.
_BLOCK_NAMES = (
    ("norm_1.", "attn_norm."),
    ("norm_2.", "ffn_norm."),
    ("post_mlp_norm.", "post_ffw_norm."),
    ("attn.proj.", "attn_output."),
    ("attn.norm_q.", "attn_q_norm."),
    ("attn.norm_k.", "attn_k_norm."),
    ("attn.qkv.", "attn_qkv."),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.gate.", "ffn_gate_inp."),
    ("mlp.shared_experts.fc_1.", "ffn_gate_shexp."),
    ("mlp.shared_experts.fc_2.", "ffn_up_shexp."),
    ("mlp.shared_experts.proj.", "ffn_down_shexp."),
    ("mlp.fc_1.", "ffn_gate."),
    ("mlp.fc_2.", "ffn_up."),
    ("mlp.fc.", "ffn_up."),
    ("mlp.proj.", "ffn_down."),
)
_EXPERT_NAMES = {"fc_1": "ffn_gate_exps", "fc_2": "ffn_up_exps", "proj": "ffn_down_exps"}
_OTHER_NAMES = {"transformer.wte.": "token_embd.", "transformer.ln_f.": "output_norm.", "lm_head.": "output."}


class NamedTensor(NamedTuple):
    """A tensor under its name in the file. Its shape is that of torch; GGUF stores the dimensions in reverse."""

    name: str
    tensor: Tensor


def architecture_of(config: Config) -> str:
    """Return the architecture of llama.cpp for a config without ``problems_in_llama_cpp``."""
    model_type = model_type_of(config)
    assert model_type is not None
    return _ARCHITECTURES[model_type]


def problems_in_llama_cpp(config: Config) -> list[str]:
    """Return the fields, as ``name: value (reason)``, because of which llama.cpp can't compute the same."""
    problems = without_counterpart(config)
    if problems:
        return problems
    model_type = model_type_of(config)
    if model_type == "olmoe":
        problems.append("norm_qk_type: olmo2 (with experts; OLMoE there does not normalize the weights of the experts)")
    if model_type == "qwen3_moe" and config.first_k_dense_replace:
        problems.append(f"first_k_dense_replace: {config.first_k_dense_replace} (with norm_qk: experts in all layers)")
    if model_type == "qwen3" and config.rope_adjustments:
        problems.append("rope_adjustments (with norm_qk)")
    if model_type == "glm4_moe" and config.n_topk_groups != config.n_expert_groups:
        # llama.cpp excludes the experts of other groups. Here their score is 0, which may be above negative ones.
        problems.append(f"n_topk_groups: {config.n_topk_groups} (expected {config.n_expert_groups}: all groups)")
    return problems


def add_model_metadata(writer: GGUFWriter, config: Config) -> None:
    """Add the sizes of a model, under the architecture of ``writer``."""
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.rope_n_elem)
    writer.add_rope_freq_base(config.rope_base)
    if config.norm_class_name == "RMSNorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if writer.arch == "gptneox":
        writer.add_parallel_residual(config.parallel_residual)
    if config.mlp_class_name == "LLaMAMoE":
        _add_expert_metadata(writer, config)
    else:
        writer.add_feed_forward_length(config.intermediate_size)


def _add_expert_metadata(writer: GGUFWriter, config: Config) -> None:
    width = config.moe_intermediate_size or config.intermediate_size
    writer.add_expert_count(config.n_expert)
    writer.add_expert_used_count(config.n_expert_per_token)
    if writer.arch == "llama":
        writer.add_feed_forward_length(width)
        return
    # Of the dense layers; llama.cpp expects a value also without one.
    writer.add_feed_forward_length(config.intermediate_size or width)
    writer.add_expert_feed_forward_length(width)
    if writer.arch == "glm4moe":
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        # It always has a shared expert: see `_zero_shared_expert`.
        writer.add_expert_shared_count(config.n_shared_expert or 1)
        writer.add_leading_dense_block_count(config.first_k_dense_replace or 0)


def gguf_tensors(weights: dict[str, Tensor], config: Config, *, tied: bool) -> Iterator[NamedTensor]:
    """Yield the tensors of the file, with the types of ``weights``.

    Args:
        weights: LitGPT state dict; on the meta device, if only names and shapes are needed.
        config: one without ``problems_in_llama_cpp``.
        tied: leave out the output matrix. llama.cpp then uses the embedding.
    """
    architecture = architecture_of(config)
    for name, tensor in weights.items():
        if tied and name == "lm_head.weight":
            continue
        expert = re.fullmatch(r"transformer\.h\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight", name)
        if expert is not None:
            block, number, part = expert.groups()
            # All experts are one tensor, at the place of the first.
            if number == "0":
                yield _stacked_experts(weights, config, int(block), part)
                if architecture == "glm4moe" and not config.n_shared_expert:
                    yield _zero_shared_expert(tensor, int(block), part)
            continue
        theirs = _name_of(name, architecture)
        if ".attn_qkv." in theirs and architecture != "gptneox":
            yield from _split_qkv(theirs, tensor, config, in_pairs=architecture == "llama")
        else:
            yield NamedTensor(theirs, tensor)
    if config.rope_adjustments:
        yield NamedTensor("rope_freqs.weight", _rope_factors(config).to(weights["lm_head.weight"].device))


def _name_of(name: str, architecture: str) -> str:
    block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    if block is None:
        for old, new in _OTHER_NAMES.items():
            name = name.replace(old, new)
        return name
    number, rest = block.groups()
    for old, new in _BLOCK_NAMES:
        if rest.startswith(old):
            rest = rest.replace(old, new, 1)
            break
    # The norm before the feed-forward has another name there.
    if architecture == "glm4moe":
        rest = rest.replace("ffn_norm.", "post_attention_norm.")
    return f"blk.{number}.{rest}"


def _stacked_experts(weights: dict[str, Tensor], config: Config, block: int, part: str) -> NamedTensor:
    """Stack the matrices of all experts: ``(E, I, C)``, or ``(E, C, I)`` of the last projection."""
    prefix = f"transformer.h.{block}.mlp.experts"
    stacked = torch.stack([weights[f"{prefix}.{expert}.{part}.weight"] for expert in range(config.n_expert)])
    return NamedTensor(f"blk.{block}.{_EXPERT_NAMES[part]}.weight", stacked)


def _zero_shared_expert(expert: Tensor, block: int, part: str) -> NamedTensor:
    """Return a shared expert that adds nothing. Its width must be a multiple of that of the other experts."""
    return NamedTensor(f"blk.{block}.{_EXPERT_NAMES[part].replace('exps', 'shexp')}.weight", torch.zeros_like(expert))


def _split_qkv(name: str, tensor: Tensor, config: Config, *, in_pairs: bool) -> Iterator[NamedTensor]:
    """Yield queries, keys and values of ``attn_qkv``: matrix ``(rows, C)`` or bias ``(rows,)``."""
    heads = {"q": config.n_head, "k": config.n_query_groups, "v": config.n_query_groups}
    parts = tensor.split([count * config.head_size for count in heads.values()])
    for (letter, count), part in zip(heads.items(), parts, strict=True):
        if in_pairs and letter != "v":
            part = _in_pairs(part, count)
        yield NamedTensor(name.replace("attn_qkv", f"attn_{letter}"), part)


def _in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: LitGPT rotates row i with row i + head_size / 2, "llama" row 2i with 2i + 1."""
    # (heads * head_size, ...) -> (heads, 2, head_size / 2, ...) -> (heads, head_size / 2, 2, ...)
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: Config) -> Tensor:
    """Return what llama.cpp divides the rotary frequencies by, ``(rope_n_elem / 2,)`` fp32."""
    size, base = config.rope_n_elem, config.rope_base
    # The angles at position 1 are the frequencies. All are at most 1, so that no full turn is lost.
    cos, sin = build_rope_cache(2, size, base=base, extra_config=config.rope_adjustments)
    frequencies = torch.atan2(sin[1], cos[1])[: size // 2]
    unadjusted = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    return unadjusted / frequencies
