"""Parameters and FLOPs of a LitGPT model by formula, from its config alone: nothing is built, nothing is traced.

LitGPT's own ways don't fit a mixture of experts: ``measure_flops`` fails on meta tensors (``nonzero``), and
``estimate_flops`` counts every expert for every token.
"""

from typing import NamedTuple

from litgpt import Config


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: all of them, as ``sum(p.numel() for p in model.parameters())``; buffers are not parameters.
        active: those that one token uses: all but the experts that it is not sent to.
        embedding: the token embedding's share of both.
    """

    total: int
    active: int
    embedding: int


def count_parameters(config: Config, tie_embeddings: bool = False) -> ParameterCounts:
    """The parameters of ``litgpt.GPT(config)``.

    Args:
        config: any LitGPT config without latent attention.
        tie_embeddings: the output layer shares the token embedding's weight (LitGPT's ``train.tie_embeddings``).

    Raises:
        ValueError: for what the formula does not cover.
    """
    _check(config)
    embedding = config.padded_vocab_size * config.n_embd
    norm = _norm_parameters(config, config.n_embd)

    attention = _linear(config.n_embd, _qkv_width(config), config.bias or config.attn_bias)
    attention += _linear(config.head_size * config.n_head, config.n_embd, config.bias)
    if config.norm_qk:
        heads = (config.n_head, config.n_query_groups) if config.norm_qk_type == "olmo2" else (1, 1)
        attention += sum(_norm_parameters(config, n * config.head_size) for n in heads)
    has_norm_2 = config.norm_2 and not config.shared_attention_norm
    norms = norm * (config.norm_1 + has_norm_2 + config.post_attention_norm + config.post_mlp_norm)

    total = active = embedding + norm + config.n_layer * (attention + norms)
    total += 0 if tie_embeddings else embedding
    active += 0 if tie_embeddings else embedding
    if config.lm_head_bias:
        total, active = total + config.padded_vocab_size, active + config.padded_vocab_size
    for layer in range(config.n_layer):
        mlp_total, mlp_active = _mlp_parameters(config, layer)
        total, active = total + mlp_total, active + mlp_active
    return ParameterCounts(total=total, active=active, embedding=embedding)


def training_flops_per_token(config: Config, seq_length: int, causal: bool = True) -> int:
    """Floating-point operations of one training step per token: forward once, backward twice as much (recomputation,
    as of activation checkpointing or of flash attention's backward, is not counted).

    Counted are the matrix products, two operations per multiply-add: every linear layer that the token passes through
    (in a mixture of experts the router, the chosen experts and the shared ones), the output layer, and attention's two
    products. Not counted are the embedding lookup, norms, biases, rotary embedding, softmax, activations and the loss.

    Args:
        config: any LitGPT config without latent attention.
        seq_length: tokens per sequence; attention grows with it.
        causal: True counts half of attention's T x T square, which is what a causal kernel computes (in a layer with
            sliding-window attention only the window); False counts all of it, as the PaLM paper (arXiv 2204.02311,
            appendix B) and most published MFU figures do.

    Raises:
        ValueError: for what the formula does not cover.
    """
    _check(config)
    matrices = config.padded_vocab_size * config.n_embd
    attention = 0.0
    for layer in range(config.n_layer):
        matrices += config.n_embd * _qkv_width(config) + config.head_size * config.n_head * config.n_embd
        matrices += _mlp_matrices(config, layer)
        # Queries times keys and weights times values: a multiply-add per head dimension and position looked at.
        attention += 2 * config.n_head * config.head_size * _positions_seen(config, layer, seq_length, causal)
    flops: int = round(3 * 2 * (matrices + attention))
    return flops


def _check(config: Config) -> None:
    if config.latent_attention is not None:
        raise ValueError(
            f"config {config.name!r} has latent_attention (DeepSeek's), whose parameters and FLOPs are not covered; "
            "choose a model with ordinary or grouped-query attention."
        )
    known = ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE")
    if config.mlp_class_name not in known:
        raise ValueError(f"mlp_class_name is {config.mlp_class_name!r}; covered are {', '.join(known)}.")
    if config.norm_class_name not in ("LayerNorm", "RMSNorm"):
        raise ValueError(f"norm_class_name is {config.norm_class_name!r}; covered are LayerNorm, RMSNorm.")


def _linear(fan_in: int, fan_out: int, bias: bool) -> int:
    return fan_in * fan_out + (fan_out if bias else 0)


def _qkv_width(config: Config) -> int:
    width: int = (config.n_head + 2 * config.n_query_groups) * config.head_size
    return width


def _norm_parameters(config: Config, width: int) -> int:
    if config.norm_class_name == "RMSNorm":
        return width
    return 0 if "OLMo" in config.name else 2 * width  # LitGPT makes OLMo's LayerNorm without weight and bias


def _is_moe(config: Config, layer: int) -> bool:
    return config.mlp_class_name == "LLaMAMoE" and layer >= (config.first_k_dense_replace or 0)


def _mlp_parameters(config: Config, layer: int) -> tuple[int, int]:
    """(total, active) of one layer's feed-forward."""
    always: int = config.n_embd * config.n_expert
    if not _is_moe(config, layer):
        parameters = _feed_forward(config, config.intermediate_size)
        return parameters, parameters
    expert = _feed_forward(config, config.moe_intermediate_size or config.intermediate_size)
    if config.n_shared_expert:
        always += _feed_forward(config, config.moe_intermediate_size * config.n_shared_expert)
    return always + config.n_expert * expert, always + config.n_expert_per_token * expert


def _feed_forward(config: Config, width: int) -> int:
    n_in = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
    return n_in * _linear(config.n_embd, width, config.bias) + _linear(width, config.n_embd, config.bias)


def _mlp_matrices(config: Config, layer: int) -> int:
    """Entries of the matrices that a token is multiplied with in one layer's feed-forward."""
    entries: int = config.n_embd * (2 if config.mlp_class_name == "GptNeoxMLP" else 3)
    if not _is_moe(config, layer):
        return entries * config.intermediate_size
    n_expert = config.n_expert_per_token + (config.n_shared_expert or 0)
    entries *= (config.moe_intermediate_size or config.intermediate_size) * n_expert
    return entries + config.n_embd * config.n_expert


def _positions_seen(config: Config, layer: int, seq_length: int, causal: bool) -> float:
    """How many positions a token attends to, on average over the sequence (half of it, not half and a half)."""
    if not causal:
        return seq_length
    window = seq_length
    if config.sliding_window_size is not None and config.sliding_window_indices[layer]:
        window = min(config.sliding_window_size, seq_length)
    return window - window**2 / (2 * seq_length)
