"""One mapping between LitGPT's config of a model and transformers' config of the same model, in both directions.

A model family of transformers is a counterpart only where it computes exactly the same. What a family is able to do is
a table of the LitGPT fields in which it may differ from Llama; every other field must be as in Llama.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt import Config
    from transformers import PreTrainedConfig

_ANY = object()
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}  # LitGPT's rope_adjustments

# Llama's block in LitGPT's fields: those that change what is computed, and not only a size.
_LLAMA: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "norm_1": True,
    "norm_2": True,
    "norm_qk": False,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "shared_attention_norm": False,
    "parallel_residual": False,
    "bias": False,
    "attn_bias": False,
    "lm_head_bias": False,
    "rotary_percentage": 1.0,
    "rope_adjustments": None,
    "rope_condense_ratio": 1,
    "rope_interleave": False,
    "rope_local_base_freq": None,
    "sliding_window_size": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_embeddings": False,
    "latent_attention": None,
    "n_expert_groups": None,
    "n_shared_expert": None,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
}


@dataclass(frozen=True)
class _Family:
    """A model family of transformers."""

    architecture: str
    """Without ``ForCausalLM``."""
    differs: dict[str, Any] = field(default_factory=dict)
    """Fields that it has otherwise than Llama: a tuple of all values that it knows, or ``_ANY``."""
    free_head_size: bool = True
    """Whether heads together may be wider or narrower than the embedding."""


_FAMILIES = {
    "llama": _Family("Llama", {"bias": (False, True), "rope_adjustments": _ANY}),
    "qwen2": _Family("Qwen2", {"attn_bias": (True,), "rope_adjustments": _ANY}),
    "qwen3": _Family("Qwen3", {"norm_qk": (True,), "rope_adjustments": _ANY}),
    "olmo2": _Family(
        "Olmo2",
        {
            "norm_qk": (True,),
            "norm_1": (False,),
            "norm_2": (False,),
            "post_attention_norm": (True,),
            "post_mlp_norm": (True,),
        },
        free_head_size=False,
    ),
    "mixtral": _Family("Mixtral", {"rope_adjustments": _ANY}),
    "qwen3_moe": _Family("Qwen3Moe", {"norm_qk": (True,), "first_k_dense_replace": _ANY}),
    "olmoe": _Family("Olmoe", {"norm_qk": (True,)}, free_head_size=False),
    "glm4_moe": _Family(
        "Glm4Moe",
        {
            "n_expert_groups": _ANY,
            "n_shared_expert": _ANY,
            "first_k_dense_replace": _ANY,
            "routed_scaling_factor": _ANY,
            "rotary_percentage": _ANY,
            "attn_bias": (False, True),
            "norm_qk": (False, True),
        },
    ),
    "gpt_neox": _Family(
        "GPTNeoX",
        {
            "norm_class_name": ("LayerNorm",),
            "bias": (True,),
            "attn_bias": (False, True),
            "parallel_residual": (False, True),
            "rotary_percentage": _ANY,
        },
        free_head_size=False,
    ),
}
IMPORTED = ("llama", "mixtral", "gpt_neox", "qwen2", "qwen3", "qwen3_moe", "olmoe", "glm4_moe")
"""The model types that come in: the inverse of the mapping is written for them."""

# Fields of transformers' configs that change nothing of what a trained model computes.
_WITHOUT_EFFECT = {
    *("architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "pretraining_tp", "max_window_layers", "id2label", "label2id", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "is_decoder", "head_dim", "partial_rotary_factor"),
    *("chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states"),
}


# ---------------------------------------------------------------------------------------------- LitGPT -> transformers


def model_type_of(config: "Config") -> str | None:
    """The model family of transformers that is nearest, by the name that its ``config.json`` gives it."""
    if config.mlp_class_name == "GptNeoxMLP":
        return "gpt_neox"
    whole_width = config.norm_qk and config.norm_qk_type == "olmo2"
    if config.mlp_class_name == "LLaMAMLP":
        if whole_width:
            return "olmo2"
        return "qwen3" if config.norm_qk else "qwen2" if config.attn_bias and not config.bias else "llama"
    if config.mlp_class_name == "LLaMAMoE":
        if config.n_expert_groups:
            return "glm4_moe"
        return "olmoe" if whole_width else "qwen3_moe" if config.norm_qk else "mixtral"
    return None


def without_counterpart(config: "Config") -> list[str]:
    """The fields, each with its value, that keep transformers from computing the same; none where it does."""
    model_type = model_type_of(config)
    if model_type is None:
        return [f"mlp_class_name: {config.mlp_class_name}"]
    family = _FAMILIES[model_type]
    problems = []
    for name, of_llama in _LLAMA.items():
        known, value = family.differs.get(name, (of_llama,)), getattr(config, name)
        if known is not _ANY and value not in known and (value or any(known)):  # None, 0 and False are one
            problems.append(f"{name}: {value}")
    adjusted = config.rope_adjustments if "rope_adjustments" in family.differs else None
    if adjusted and set(adjusted) != _LLAMA3_ROPE:
        problems.append(f"rope_adjustments: {adjusted}")
    if config.attention_scores_scalar not in (None, config.head_size):
        problems.append(f"attention_scores_scalar: {config.attention_scores_scalar}")
    if config.head_size % 2:  # rotary positions turn pairs
        problems.append(f"head_size: {config.head_size}")
    if config.rope_indices is not None:
        problems.append("rope_indices")
    if not family.free_head_size and config.head_size * config.n_head != config.n_embd:
        problems.append(f"head_size: {config.head_size}")
    if model_type == "gpt_neox" and config.n_query_groups != config.n_head:
        problems.append(f"n_query_groups: {config.n_query_groups}")
    if model_type == "glm4_moe":
        if config.norm_qk and config.norm_qk_type != "default":
            problems.append(f"norm_qk_type: {config.norm_qk_type}")
        if config.n_topk_groups != config.n_expert_groups and config.n_topk_scores_per_group != 2:
            problems.append(f"n_topk_scores_per_group: {config.n_topk_scores_per_group}")
    # LitGPT goes by the name here: Gemma's RMSNorm adds one to its weights, OLMo's LayerNorm has none.
    if "Gemma" in config.name or ("OLMo" in config.name and config.norm_class_name == "LayerNorm"):
        problems.append(f"name: {config.name}")
    return problems


def converted_by_litgpt(config: "Config") -> bool:
    """Whether `litgpt convert_from_litgpt` (so `litgpt evaluate`) makes the counterpart's weights of this model."""
    # It goes by the name first.
    if "falcon" in config.name or config.name.lower().startswith(("phi", "qwen2.5", "qwq", "olmo-2-", "qwen3")):
        return False
    model_type = model_type_of(config)
    return model_type in ("mixtral", "gpt_neox") or (model_type == "llama" and not config.bias)


def huggingface_config(
    config: "Config", *, tied: bool, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The ``config.json`` of the transformers model that computes the same.

    Args:
        config: one for which `without_counterpart` finds nothing.
        tied: whether embedding and output matrix are one.
        dtype: of the saved weights, as torch names it.
        bos_id, eos_id: the tokenizer's.
    """
    model_type = model_type_of(config)
    assert model_type is not None
    result: dict[str, Any] = {
        "architectures": [_FAMILIES[model_type].architecture + "ForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "pad_token_id": None,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "intermediate_size": config.intermediate_size,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_base)}
    if model_type == "gpt_neox":
        return result | {
            "hidden_act": "gelu" if config.gelu_approximate == "none" else "gelu_pytorch_tanh",
            "layer_norm_eps": config.norm_eps,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": True,
            "rotary_pct": config.rotary_percentage,
            "rotary_emb_base": config.rope_base,
            "rope_parameters": rope | {"partial_rotary_factor": config.rotary_percentage},
        }
    if config.rope_adjustments:
        rope |= {key: value for key, value in config.rope_adjustments.items() if key != "original_max_seq_len"}
        rope |= {
            "rope_type": "llama3",
            "original_max_position_embeddings": config.rope_adjustments["original_max_seq_len"],
        }
    result |= {
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_base),
        "rope_parameters": rope,
    }
    expert_width = config.moe_intermediate_size or config.intermediate_size
    if model_type == "llama":
        result |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    elif model_type == "mixtral":
        result |= {
            "intermediate_size": expert_width,
            "num_local_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_per_token,
            "sliding_window": None,
        }
    elif model_type == "olmoe":
        result |= {
            "intermediate_size": expert_width,
            "num_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_per_token,
            "norm_topk_prob": True,
        }
    elif model_type == "qwen3_moe":
        result |= {
            "moe_intermediate_size": expert_width,
            "num_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_per_token,
            "norm_topk_prob": True,
            "mlp_only_layers": list(range(config.first_k_dense_replace or 0)),
        }
    elif model_type == "glm4_moe":
        # Where no group is left out, one group is the same; Glm4Moe scores a group by its best two experts.
        grouped = config.n_topk_groups != config.n_expert_groups
        result |= {
            "moe_intermediate_size": expert_width,
            "n_routed_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_per_token,
            "n_shared_experts": config.n_shared_expert or 0,
            "n_group": config.n_expert_groups if grouped else 1,
            "topk_group": config.n_topk_groups if grouped else 1,
            "first_k_dense_replace": config.first_k_dense_replace or 0,
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.routed_scaling_factor,
            "use_qk_norm": config.norm_qk,
            "attention_bias": config.attn_bias,
            "partial_rotary_factor": config.rotary_percentage,
            "rope_parameters": rope | {"partial_rotary_factor": config.rotary_percentage},
        }
    return result


# ---------------------------------------------------------------------------------------------- transformers -> LitGPT


def litgpt_config(theirs: "PreTrainedConfig", name: str, vocab_size: int) -> tuple["Config", list[str]]:
    """LitGPT's config of a transformers model, and the fields of theirs that it can't express.

    Args:
        theirs: of a model type in ``IMPORTED``, as `transformers.AutoConfig` reads it, so that its defaults are there.
        name: of the model; LitGPT picks formats by it.
        vocab_size: the tokenizer's.
    """
    from litgpt import Config
    from transformers import AutoConfig

    kind, rope = theirs.model_type, dict(theirs.rope_parameters)
    fields: dict[str, Any] = {
        "name": name,
        "vocab_size": vocab_size,
        "padded_vocab_size": theirs.vocab_size,
        "block_size": theirs.max_position_embeddings,
        "n_layer": theirs.num_hidden_layers,
        "n_embd": theirs.hidden_size,
        "n_head": theirs.num_attention_heads,
        "intermediate_size": theirs.intermediate_size,
        "rope_base": int(rope["rope_theta"]),
        "rotary_percentage": rope.get("partial_rotary_factor", 1.0),
    }
    if kind == "gpt_neox":
        fields |= {
            "norm_class_name": "LayerNorm",
            "norm_eps": theirs.layer_norm_eps,
            "bias": True,
            "parallel_residual": theirs.use_parallel_residual,
            "mlp_class_name": "GptNeoxMLP",
            "gelu_approximate": "none" if theirs.hidden_act == "gelu" else "tanh",
        }
    else:
        fields |= {
            "norm_class_name": "RMSNorm",
            "norm_eps": theirs.rms_norm_eps,
            "bias": kind == "llama" and theirs.mlp_bias,
            "attn_bias": kind == "qwen2" or (kind == "glm4_moe" and theirs.attention_bias),
            "parallel_residual": False,
            "n_query_groups": theirs.num_key_value_heads,
            "head_size": getattr(theirs, "head_dim", None),
            "mlp_class_name": "LLaMAMLP" if kind in ("llama", "qwen2", "qwen3") else "LLaMAMoE",
            "norm_qk": kind in ("qwen3", "qwen3_moe", "olmoe") or getattr(theirs, "use_qk_norm", False),
            "norm_qk_type": "olmo2" if kind == "olmoe" else "default",
        }
        if rope["rope_type"] == "llama3":
            fields["rope_adjustments"] = {
                **{key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
                "original_max_seq_len": rope["original_max_position_embeddings"],
            }
    if fields["mlp_class_name"] == "LLaMAMoE":
        dense_layers = len(getattr(theirs, "mlp_only_layers", [])) or getattr(theirs, "first_k_dense_replace", 0)
        fields |= {
            "n_expert": theirs.num_local_experts,  # transformers has this name for all of them
            "n_expert_per_token": theirs.num_experts_per_tok,
            "moe_intermediate_size": getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
            "first_k_dense_replace": dense_layers or None,
        }
    if kind == "glm4_moe":
        grouped = theirs.topk_group != theirs.n_group
        fields |= {
            "n_shared_expert": theirs.n_shared_experts or None,
            "n_expert_groups": theirs.n_group if grouped else 2,  # LitGPT's sigmoid router wants two or more
            "n_topk_groups": theirs.topk_group if grouped else 2,
            "n_topk_scores_per_group": 2 if grouped else 1,
            "norm_topk_prob": theirs.norm_topk_prob,
            "routed_scaling_factor": theirs.routed_scaling_factor,
        }
    config = Config(**fields)
    problems = without_counterpart(config)
    if problems:
        return config, problems
    # There and back: a field that comes back otherwise is one that LitGPT's config did not take.
    back = huggingface_config(config, tied=theirs.tie_word_embeddings, dtype="float32", bos_id=None, eos_id=None)
    ours, given = AutoConfig.for_model(**back).to_dict(), theirs.to_dict()
    different = (key for key in ours if ours[key] != given.get(key) and key not in _WITHOUT_EFFECT)
    return config, [f"{key}: {given.get(key)}" for key in sorted(different)]
