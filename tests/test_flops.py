"""The formulas compared with built models (on the meta device) and with the FLOP counter of torch."""

import pytest
import torch
from litgpt import GPT, Config
from litgpt.config import configs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litmoe.flops import count_parameters, training_flops_per_token
from tests.helpers import MOE_200M

TINY = dict(block_size=32, n_layer=3, n_embd=32, n_head=4, n_query_groups=2, padded_vocab_size=96, bias=False)
TINY_MOE = dict(mlp_class_name="LLaMAMoE", moe_intermediate_size=24, n_expert=6, n_expert_per_token=2)


def built(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def test_the_default_model() -> None:
    config = Config(**MOE_200M)
    counts = count_parameters(config)
    assert counts.total == built(config) == 549_146_880
    assert counts.active == 209_408_256
    assert counts.embedding == 50257 * 768
    assert training_flops_per_token(config, 2048) == 1_137_996_288
    assert training_flops_per_token(config, 2048, causal=False) == 1_251_242_496


def test_total_equals_each_family_of_litgpt() -> None:
    structures = {}
    for fields in configs:
        key = str(sorted((name, str(value)) for name, value in fields.items() if name not in ("name", "hf_config")))
        structures.setdefault(key, fields)
    assert len(structures) > 50
    for fields in structures.values():
        config = Config(**{**fields, "n_layer": 2})
        assert count_parameters(config).total == built(config), config.name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True, "lm_head_bias": True},
        {"n_shared_expert": 2, "bias": True},
        {"first_k_dense_replace": 1, "intermediate_size": 56},
        {"moe_intermediate_size": None, "intermediate_size": 40},
        {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2, "norm_topk_prob": True},
        {"norm_qk": True, "norm_qk_type": "olmo2", "post_attention_norm": True, "post_mlp_norm": True},
    ],
    ids=str,
)
def test_mixture_of_experts_parameters(fields: dict) -> None:
    """Active are the parameters without all but ``n_expert_per_token`` experts of each layer."""
    config = Config(**{**TINY, **TINY_MOE, "norm_class_name": "RMSNorm", **fields})
    counts = count_parameters(config)
    assert counts.total == built(config)
    with torch.device("meta"):
        gpt = GPT(config)
    unused = sum(
        parameter.numel()
        for block in gpt.transformer.h
        for expert in list(getattr(block.mlp, "experts", []))[config.n_expert_per_token :]
        for parameter in expert.parameters()
    )
    assert unused > 0
    assert counts.active == counts.total - unused


def test_tied_embeddings_count_once() -> None:
    config = Config(**TINY, lm_head_bias=True)
    with torch.device("meta"):
        gpt = GPT(config)
    gpt.transformer.wte.weight = gpt.lm_head.weight
    tied = count_parameters(config, tie_embeddings=True)
    assert tied.total == tied.active == sum(parameter.numel() for parameter in gpt.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True},
        {"mlp_class_name": "LLaMAMLP", "intermediate_size": 88, "norm_class_name": "RMSNorm"},
        {"mlp_class_name": "GemmaMLP", "intermediate_size": 88, "n_query_groups": 1, "head_size": 12},
        {"parallel_residual": False, "norm_qk": True, "attn_bias": True, "lm_head_bias": True},
        {"sliding_window_size": 4, "sliding_window_indices": [1, 0, 1]},
        {**TINY_MOE, "norm_class_name": "RMSNorm"},
        {**TINY_MOE, "n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2},
        {**TINY_MOE, "n_shared_expert": 2, "first_k_dense_replace": 1, "intermediate_size": 40, "bias": True},
    ],
    ids=str,
)
def test_flops_equal_torchs_counter(fields: dict) -> None:
    """Exactly, with complete attention, because LitGPT masks T x T products. With the plain (math) kernel, because the
    backward pass of fused kernels computes the scores again."""
    config = Config(**{**TINY, **fields})
    gpt = GPT(config)
    ids = torch.randint(0, 96, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = gpt(ids)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert counter.get_total_flops() == ids.numel() * training_flops_per_token(config, 16, causal=False)


@pytest.mark.parametrize(
    "fields", [{"bias": True}, {**TINY_MOE, "norm_class_name": "RMSNorm"}], ids=["dense", "naive MoE"]
)
def test_forward_pass_is_a_third(fields: dict) -> None:
    """Token by token, attention computes T (T + 1) / 2 positions; the formula has T * T / 2."""
    config = Config(**{**TINY, **fields})
    gpt = GPT(config)
    seq_length = 16
    gpt.set_kv_cache(batch_size=1)
    counted = 0
    for position in range(seq_length):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            seen = position + 1
            gpt(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([position]), input_pos_maxp1=seen)
        counted += counter.get_total_flops()
    halves = (
        seq_length * config.n_layer * 2 * config.n_head * config.head_size
    )  # half a position more for each token, in both products
    assert 3 * (counted - halves) == seq_length * training_flops_per_token(config, seq_length, causal=True)


def test_causal_attention_and_windows() -> None:
    def attention(causal: bool, seq_length: int = 16, **fields: object) -> int:
        config = Config(**{**TINY, **fields})
        return training_flops_per_token(config, seq_length, causal) - training_flops_per_token(config, 0, False)

    assert attention(causal=True) * 2 == attention(causal=False) == 3 * 3 * 4 * 16 * 32
    assert attention(causal=True, sliding_window_size=16) == attention(causal=True)
    # The area of the band below the diagonal: a triangle of T less a triangle of T - window.
    band = (16**2 - 12**2) / 2 / 16
    assert attention(causal=True, sliding_window_size=4) == 3 * 3 * 4 * band * 32


@pytest.mark.parametrize("count", [count_parameters, lambda config: training_flops_per_token(config, 16)])
def test_refuses_unsupported_configs(count) -> None:
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
    config = Config(**{**TINY, "n_query_groups": 4}, latent_attention=latent)
    with pytest.raises(ValueError, match="latent_attention"):
        count(config)
