"""The config of a model in LitGPT and in transformers, converted in both directions.

A model family of transformers is a counterpart only if it computes exactly the same. A table lists for each family the
LitGPT fields in which it may differ from Llama; all other fields must be as in Llama.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt import Config
    from transformers import PreTrainedConfig

# An object of its own, because None and False are values of fields.
_ANY = object()

# Llama in the fields of LitGPT: those that change what is computed, not only a size.
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
    """Without ``ForCausalLM``"""
    differs: dict[str, Any] = field(default_factory=dict)
    """Fields that differ from Llama: a tuple of all supported values, or ``_ANY``"""
    free_head_size: bool = True
    """Whether all heads together may be wider or narrower than the embedding"""


_OLMO2_NORMS = {"norm_1": (False,), "norm_2": (False,), "post_attention_norm": (True,), "post_mlp_norm": (True,)}
_FAMILIES = {
    # Also for biases of queries, keys and values only, as in Qwen2: the output projection gets a zero bias. Not Qwen2,
    # because newer versions of transformers use its own rules for the tokenizer, whatever tokenizer.json says.
    "llama": _Family("Llama", {"bias": (False, True), "attn_bias": (False, True), "rope_adjustments": _ANY}),
    "qwen3": _Family("Qwen3", {"norm_qk": (True,), "rope_adjustments": _ANY}),
    "olmo2": _Family("Olmo2", {"norm_qk": (True,), **_OLMO2_NORMS}, free_head_size=False),
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
"""Model types that can be imported"""

_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}

# Rules that depend on more than one field: the field to name, the families (None: all), and when the config is fine.
_RULES: tuple[tuple[str, tuple[str, ...] | None, "Callable[[Config], bool]"], ...] = (
    (
        "rope_adjustments",
        ("llama", "qwen3", "mixtral"),
        lambda config: not config.rope_adjustments or set(config.rope_adjustments) == _LLAMA3_ROPE,
    ),
    ("attention_scores_scalar", None, lambda config: config.attention_scores_scalar in (None, config.head_size)),
    # Rotary embeddings rotate pairs.
    ("head_size", None, lambda config: config.head_size % 2 == 0),
    ("rope_indices", None, lambda config: config.rope_indices is None),
    (
        "head_size",
        tuple(name for name, family in _FAMILIES.items() if not family.free_head_size),
        lambda config: config.head_size * config.n_head == config.n_embd,
    ),
    ("n_query_groups", ("gpt_neox",), lambda config: config.n_query_groups == config.n_head),
    ("norm_qk_type", ("glm4_moe",), lambda config: not config.norm_qk or config.norm_qk_type == "default"),
    (
        "n_topk_scores_per_group",  # Glm4Moe scores a group by its best two experts
        ("glm4_moe",),
        lambda config: config.n_topk_groups == config.n_expert_groups or config.n_topk_scores_per_group == 2,
    ),
    # LitGPT decides by the name of the model: the RMSNorm of Gemma adds one to its weights.
    ("name", None, lambda config: "Gemma" not in config.name),
    # The LayerNorm of OLMo has no weights.
    ("name", None, lambda config: "OLMo" not in config.name or config.norm_class_name != "LayerNorm"),
)

# Fields of transformers configs that do not change what a trained model computes.
_WITHOUT_EFFECT = {
    *("architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "pretraining_tp", "max_window_layers", "id2label", "label2id", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "is_decoder", "head_dim", "partial_rotary_factor"),
    *("chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states"),
}


# -------------------------------------------------------------------------------------------------------------- family

# Families by feed-forward and norm of queries and keys: none, one for each head, or (olmo2) one for their full width.
_BY_QK_NORM = {
    ("LLaMAMLP", None): "llama",
    ("LLaMAMLP", "default"): "qwen3",
    ("LLaMAMLP", "olmo2"): "olmo2",
    ("LLaMAMoE", None): "mixtral",
    ("LLaMAMoE", "default"): "qwen3_moe",
    ("LLaMAMoE", "olmo2"): "olmoe",
}


def model_type_of(config: "Config") -> str | None:
    """Return the closest model family of transformers, by the name in its ``config.json``."""
    if config.mlp_class_name == "GptNeoxMLP":
        return "gpt_neox"
    if config.mlp_class_name == "LLaMAMoE" and config.n_expert_groups:
        return "glm4_moe"
    qk_norm = config.norm_qk_type if config.norm_qk else None
    return _BY_QK_NORM.get((config.mlp_class_name, qk_norm))


def without_counterpart(config: "Config") -> list[str]:
    """Return the fields, as ``name: value``, because of which transformers can't compute the same; empty if it can."""
    model_type = model_type_of(config)
    if model_type is None:
        return [f"mlp_class_name: {config.mlp_class_name}"]
    differs = _FAMILIES[model_type].differs
    # Fields of the table, then the rules for combinations of fields.
    names = [name for name, value in _LLAMA.items() if not _is_supported(config, name, differs.get(name, (value,)))]
    for name, families, is_fine in _RULES:
        if (families is None or model_type in families) and not is_fine(config):
            names.append(name)
    return [f"{name}: {getattr(config, name)}" for name in names]


def _is_supported(config: "Config", name: str, values: Any) -> bool:
    value = getattr(config, name)
    if values is _ANY or value in values:
        return True
    # None, 0 and False mean the same.
    return not value and not any(values)


def converted_by_litgpt(config: "Config") -> bool:
    """Return whether `litgpt convert_from_litgpt`, which `litgpt evaluate` uses, converts the weights correctly."""
    # LitGPT decides by the name of the model first.
    if "falcon" in config.name or config.name.lower().startswith(("phi", "qwen2.5", "qwq", "olmo-2-", "qwen3")):
        return False
    model_type = model_type_of(config)
    has_bias = config.bias or config.attn_bias
    return model_type in ("mixtral", "gpt_neox") or (model_type == "llama" and not has_bias)


# ---------------------------------------------------------------------------------------------- LitGPT -> transformers


def huggingface_config(
    config: "Config", *, tied: bool, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """Return the ``config.json`` of the transformers model that computes the same.

    Args:
        config: one for which `without_counterpart` is empty.
        tied: whether embedding and output matrix are shared.
        dtype: of the saved weights, as in torch.
        bos_id: of the tokenizer.
        eos_id: of the tokenizer.
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
        # Not the end-of-text token, whose embedding transformers would no longer train.
        "pad_token_id": None,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "intermediate_size": config.intermediate_size,
    }
    if model_type == "gpt_neox":
        return result | _gpt_neox_fields(config)
    result |= {
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads rope_parameters, version 4 reads rope_theta.
        "rope_theta": float(config.rope_base),
        "rope_parameters": _rope_parameters(config),
    }
    if model_type == "llama":
        result |= {"attention_bias": config.bias or config.attn_bias, "mlp_bias": config.bias}
    if config.mlp_class_name == "LLaMAMoE":
        result |= _moe_fields(config, model_type)
    return result


def _rope_parameters(config: "Config") -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_base)}
    if config.rope_adjustments:
        adjustments = dict(config.rope_adjustments)
        rope["rope_type"] = "llama3"
        rope["original_max_position_embeddings"] = adjustments.pop("original_max_seq_len")
        rope |= adjustments
    return rope


def _gpt_neox_fields(config: "Config") -> dict[str, Any]:
    return {
        "hidden_act": "gelu" if config.gelu_approximate == "none" else "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": True,
        # transformers 4 reads these two fields, version 5 reads rope_parameters.
        "rotary_pct": config.rotary_percentage,
        "rotary_emb_base": config.rope_base,
        "rope_parameters": _rope_parameters(config) | {"partial_rotary_factor": config.rotary_percentage},
    }


def _moe_fields(config: "Config", model_type: str) -> dict[str, Any]:
    """Return the fields of a family with experts; the families have different names for the same."""
    width = config.moe_intermediate_size or config.intermediate_size
    per_token = {"num_experts_per_tok": config.n_expert_per_token}
    if model_type == "mixtral":
        return {
            **per_token,
            "intermediate_size": width,
            "num_local_experts": config.n_expert,
            "sliding_window": None,
        }
    # Olmoe and Qwen3-MoE do not normalize the weights by default. LitGPT's softmax over the chosen experts always does.
    if model_type == "olmoe":
        return {**per_token, "intermediate_size": width, "num_experts": config.n_expert, "norm_topk_prob": True}
    if model_type == "qwen3_moe":
        return {
            **per_token,
            "moe_intermediate_size": width,
            "num_experts": config.n_expert,
            "norm_topk_prob": True,
            # Qwen3-MoE lists its dense layers, LitGPT counts them from the first.
            "mlp_only_layers": list(range(config.first_k_dense_replace or 0)),
        }
    # glm4_moe. If no group is excluded, a single group computes the same, whatever the score of a group is.
    groups, chosen_groups = config.n_expert_groups, config.n_topk_groups
    if chosen_groups == groups:
        groups = chosen_groups = 1
    return {
        **per_token,
        "moe_intermediate_size": width,
        "n_routed_experts": config.n_expert,
        "n_shared_experts": config.n_shared_expert or 0,
        "n_group": groups,
        "topk_group": chosen_groups,
        "first_k_dense_replace": config.first_k_dense_replace or 0,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "use_qk_norm": config.norm_qk,
        "attention_bias": config.attn_bias,
        "partial_rotary_factor": config.rotary_percentage,
        "rope_parameters": _rope_parameters(config) | {"partial_rotary_factor": config.rotary_percentage},
    }


# ---------------------------------------------------------------------------------------------- transformers -> LitGPT


def litgpt_config(theirs: "PreTrainedConfig", name: str, vocab_size: int) -> tuple["Config", list[str]]:
    """Return the LitGPT config of a transformers model, and the fields of transformers that it can't express.

    Args:
        theirs: config of a model type in ``IMPORTED``, as `transformers.AutoConfig` reads it, with all defaults.
        name: of the model; LitGPT chooses formats by it.
        vocab_size: of the tokenizer.
    """
    from litgpt import Config
    from transformers import AutoConfig

    rope = dict(theirs.rope_parameters)
    fields: dict[str, Any] = {
        "name": name,
        "vocab_size": vocab_size,
        # The rows of the embedding, of which a tokenizer may use fewer.
        "padded_vocab_size": theirs.vocab_size,
        "block_size": theirs.max_position_embeddings,
        "n_layer": theirs.num_hidden_layers,
        "n_embd": theirs.hidden_size,
        "n_head": theirs.num_attention_heads,
        "intermediate_size": theirs.intermediate_size,
        # LitGPT's field is an int. A theta with a fraction shows as a difference below.
        "rope_base": int(rope["rope_theta"]),
        "rotary_percentage": rope.get("partial_rotary_factor", 1.0),
    }
    if theirs.model_type == "gpt_neox":
        fields |= _from_gpt_neox(theirs)
    else:
        fields |= _from_llama_like(theirs, rope)
    if theirs.model_type in ("mixtral", "qwen3_moe", "olmoe", "glm4_moe"):
        # After the fields of Llama, because the class of the feed-forward is replaced.
        fields |= _from_moe(theirs)
    config = Config(**fields)
    problems = without_counterpart(config)
    if problems:
        return config, problems
    # Convert back and compare: a field that differs is one that the LitGPT config does not express.
    back = huggingface_config(config, tied=theirs.tie_word_embeddings, dtype="float32", bos_id=None, eos_id=None)
    if theirs.model_type == "qwen2":
        # It is exported as Llama. Qwen2 has its biases without fields for them.
        back = {name: value for name, value in back.items() if name not in ("attention_bias", "mlp_bias")}
        back["model_type"] = "qwen2"
    ours, given = AutoConfig.for_model(**back).to_dict(), theirs.to_dict()
    different = [key for key in sorted(ours) if key not in _WITHOUT_EFFECT and ours[key] != given.get(key)]
    return config, [f"{key}: {given.get(key)}" for key in different]


def _from_gpt_neox(theirs: "PreTrainedConfig") -> dict[str, Any]:
    return {
        "norm_class_name": "LayerNorm",
        "norm_eps": theirs.layer_norm_eps,
        "bias": True,
        "parallel_residual": theirs.use_parallel_residual,
        "mlp_class_name": "GptNeoxMLP",
        "gelu_approximate": "none" if theirs.hidden_act == "gelu" else "tanh",
    }


def _from_llama_like(theirs: "PreTrainedConfig", rope: dict[str, Any]) -> dict[str, Any]:
    kind, bias = theirs.model_type, getattr(theirs, "mlp_bias", False)
    # Without biases in the feed-forward, the one of the output projection must be zero; the import checks it.
    has_attn_bias = kind in ("llama", "glm4_moe") and theirs.attention_bias and not bias
    fields = {
        "norm_class_name": "RMSNorm",
        "norm_eps": theirs.rms_norm_eps,
        "bias": bias,
        # Qwen2 always has biases on queries, keys and values, without a field for it.
        "attn_bias": kind == "qwen2" or has_attn_bias,
        "parallel_residual": False,
        "n_query_groups": theirs.num_key_value_heads,
        "head_size": getattr(theirs, "head_dim", None),
        "mlp_class_name": "LLaMAMLP",
        "norm_qk": kind in ("qwen3", "qwen3_moe", "olmoe") or getattr(theirs, "use_qk_norm", False),
        "norm_qk_type": "olmo2" if kind == "olmoe" else "default",
    }
    if rope["rope_type"] == "llama3":
        adjustments = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        adjustments["original_max_seq_len"] = rope["original_max_position_embeddings"]
        fields["rope_adjustments"] = adjustments
    return fields


def _from_moe(theirs: "PreTrainedConfig") -> dict[str, Any]:
    # Only the number: dense layers elsewhere than at the beginning show in the comparison.
    dense_layers = len(getattr(theirs, "mlp_only_layers", [])) or getattr(theirs, "first_k_dense_replace", 0)
    fields = {
        "mlp_class_name": "LLaMAMoE",
        "n_expert": theirs.num_local_experts,  # transformers provides this name for all families
        "n_expert_per_token": theirs.num_experts_per_tok,
        "moe_intermediate_size": getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
        "first_k_dense_replace": dense_layers or None,
    }
    if theirs.model_type == "glm4_moe":
        groups, chosen_groups, scores = theirs.n_group, theirs.topk_group, 2
        # The sigmoid router of LitGPT needs at least two groups. If none is excluded, their number has no effect.
        if chosen_groups == groups:
            groups, chosen_groups, scores = 2, 2, 1
        fields |= {
            "n_shared_expert": theirs.n_shared_experts or None,
            "n_expert_groups": groups,
            "n_topk_groups": chosen_groups,
            "n_topk_scores_per_group": scores,
            "norm_topk_prob": theirs.norm_topk_prob,
            "routed_scaling_factor": theirs.routed_scaling_factor,
        }
    return fields
