"""Parameters and FLOPs of a LitGPT model, computed from its config alone.

The functions of LitGPT do not support a mixture of experts: ``measure_flops`` fails on meta tensors (``nonzero``), and
``estimate_flops`` counts every expert for every token.
"""

from typing import NamedTuple

from litgpt import Config


class ParameterCounts(NamedTuple):
    """Numbers of parameters."""

    total: int  # sum(p.numel() for p in model.parameters()), which does not include buffers
    active: int  # those that one token uses: without the experts that are not selected
    embedding: int  # of the token embedding, part of both


def count_parameters(config: Config, tie_embeddings: bool = False) -> ParameterCounts:
    """Count the parameters of ``litgpt.GPT(config)``.

    Args:
        config: any LitGPT config without latent attention.
        tie_embeddings: output layer and token embedding share their weight (``train.tie_embeddings`` of LitGPT).

    Raises:
        ValueError: the formula does not support the config.
    """
    _check(config)
    embedding = config.padded_vocab_size * config.n_embd
    norm = _norm_parameters(config, config.n_embd)
    # A shared attention norm is norm_1 used twice.
    has_norm_2 = config.norm_2 and not config.shared_attention_norm
    norms = norm * (config.norm_1 + has_norm_2 + config.post_attention_norm + config.post_mlp_norm)

    # Every token uses all parameters outside of the feed-forwards. `norm` here is the one after the last layer.
    used_by_all = embedding + norm + config.n_layer * (_attention_parameters(config) + norms)
    if not tie_embeddings:
        used_by_all += embedding
    if config.lm_head_bias:
        used_by_all += config.padded_vocab_size
    total = active = used_by_all
    for layer in range(config.n_layer):
        mlp_total, mlp_active = _mlp_parameters(config, layer)
        total, active = total + mlp_total, active + mlp_active
    return ParameterCounts(total=total, active=active, embedding=embedding)


def _attention_parameters(config: Config) -> int:
    # LitGPT computes queries, keys and values with one matrix.
    parameters = _linear(config.n_embd, _qkv_width(config), config.bias or config.attn_bias)
    parameters += _linear(config.head_size * config.n_head, config.n_embd, config.bias)
    if config.norm_qk:
        # olmo2 normalizes the full width of queries and of keys. The default normalizes each head, with shared weights.
        heads = (config.n_head, config.n_query_groups) if config.norm_qk_type == "olmo2" else (1, 1)
        parameters += sum(_norm_parameters(config, n * config.head_size) for n in heads)
    return parameters


def training_flops_per_token(config: Config, seq_length: int, causal: bool = True) -> int:
    """Return the floating-point operations of one training step per token: forward pass, and twice as much backward.

    Recomputation, for example by activation checkpointing, is not counted. Counted are matrix products, with two
    operations per multiply-add: all linear layers that the token passes (of the experts only the selected and shared
    ones), the output layer, and the two products of attention. Not counted are embedding lookup, norms, biases, rotary
    embedding, softmax, activations and loss.

    Args:
        config: any LitGPT config without latent attention.
        seq_length: tokens per sequence, on which attention depends.
        causal: True counts half of the T x T products of attention, as a causal kernel computes (with a sliding window
            only the window). False counts all, as the PaLM paper (arXiv 2204.02311, appendix B) and most published MFU
            numbers do.

    Raises:
        ValueError: the formula does not support the config.
    """
    _check(config)
    matrices = config.padded_vocab_size * config.n_embd
    attention = 0.0
    for layer in range(config.n_layer):
        matrices += config.n_embd * _qkv_width(config) + config.head_size * config.n_head * config.n_embd
        matrices += _mlp_matrices(config, layer)
        # Queries times keys, and weights times values: a multiply-add per head dimension and visible position.
        attention += 2 * config.n_head * config.head_size * _positions_seen(config, layer, seq_length, causal)
    # The backward pass has two products for each one forward: for the inputs and for the weights.
    flops: int = round(3 * 2 * (matrices + attention))
    return flops


def describe_size(config: Config, seq_length: int | None, tie_embeddings: bool = False) -> str:
    """Return a line with the number of parameters and the operations per token.

    Args:
        config: as for ``count_parameters``.
        seq_length: tokens per sequence; None leaves out the operations, for finetuning: conversations have different
            lengths, and frozen weights have no gradient, so no formula is right.
    """
    sizes = count_parameters(config, tie_embeddings)
    size = f"{config.name}: {sizes.total / 1e6:,.1f} M parameters, {sizes.active / 1e6:,.1f} M active for each token."
    if seq_length is None:
        return size
    causal = format_flops(training_flops_per_token(config, seq_length, causal=True))
    full = format_flops(training_flops_per_token(config, seq_length, causal=False))
    return f"{size} Training takes {causal} per token ({full} if attention is counted in full)."


def format_flops(flops: float) -> str:
    """Return a number of operations with its unit, such as ``1.23 GFLOP``."""
    for name, unit in {"P": 1e15, "T": 1e12, "G": 1e9}.items():
        if flops >= unit:
            return f"{flops / unit:,.2f} {name}FLOP"
    return f"{flops / 1e6:,.2f} MFLOP"


def _check(config: Config) -> None:
    if config.latent_attention is not None:
        raise ValueError(
            f"config {config.name!r} has latent_attention (of DeepSeek), which this formula does not support;"
            " expected multi-head or grouped-query attention."
        )
    supported = ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE")
    if config.mlp_class_name not in supported:
        raise ValueError(f"mlp_class_name is {config.mlp_class_name!r}; supported are {', '.join(supported)}.")
    if config.norm_class_name not in ("LayerNorm", "RMSNorm"):
        raise ValueError(f"norm_class_name is {config.norm_class_name!r}; supported are LayerNorm, RMSNorm.")


def _linear(fan_in: int, fan_out: int, bias: bool) -> int:
    return fan_in * fan_out + (fan_out if bias else 0)


def _qkv_width(config: Config) -> int:
    width: int = (config.n_head + 2 * config.n_query_groups) * config.head_size
    return width


def _norm_parameters(config: Config, width: int) -> int:
    if config.norm_class_name == "RMSNorm":
        return width
    return 0 if "OLMo" in config.name else 2 * width  # the LayerNorm of OLMo has no weights


def _is_moe(config: Config, layer: int) -> bool:
    return config.mlp_class_name == "LLaMAMoE" and layer >= (config.first_k_dense_replace or 0)


def _mlp_parameters(config: Config, layer: int) -> tuple[int, int]:
    """Return (total, active) of the feed-forward of one layer."""
    if not _is_moe(config, layer):
        parameters = _feed_forward(config, config.intermediate_size)
        return parameters, parameters
    # Router and shared experts are used by every token.
    always: int = config.n_embd * config.n_expert
    expert = _feed_forward(config, config.moe_intermediate_size or config.intermediate_size)
    if config.n_shared_expert:
        always += _feed_forward(config, config.moe_intermediate_size * config.n_shared_expert)
    return always + config.n_expert * expert, always + config.n_expert_per_token * expert


def _feed_forward(config: Config, width: int) -> int:
    # GELU without a gate has one matrix in front of the activation, a gated unit two.
    n_in = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
    return n_in * _linear(config.n_embd, width, config.bias) + _linear(width, config.n_embd, config.bias)


def _mlp_matrices(config: Config, layer: int) -> int:
    """Return the entries of the matrices that a token is multiplied with in the feed-forward of one layer."""
    entries: int = config.n_embd * (2 if config.mlp_class_name == "GptNeoxMLP" else 3)
    if not _is_moe(config, layer):
        return entries * config.intermediate_size
    n_expert = config.n_expert_per_token + (config.n_shared_expert or 0)
    entries *= (config.moe_intermediate_size or config.intermediate_size) * n_expert
    return entries + config.n_embd * config.n_expert


def _positions_seen(config: Config, layer: int, seq_length: int, causal: bool) -> float:
    """Return the mean number of positions that a token attends to: T / 2, without the 1 / 2 of the diagonal."""
    if not causal:
        return seq_length
    # The triangle of T, minus the triangle outside the window.
    window = seq_length
    if config.sliding_window_size is not None and config.sliding_window_indices[layer]:
        window = min(config.sliding_window_size, seq_length)
    return window - window**2 / (2 * seq_length)
