"""Initial values: LitGPT's distribution in every parameter, from uninitialized memory."""

import math

import lightning as L
import pytest
import torch
from litgpt import GPT, Config
from litgpt.model import LLaMAMoE
from litgpt.pretrain import initialize_weights

from custom_moe import MoE, use_custom_moe

SIZES = dict(
    n_layer=3,
    n_embd=64,
    n_head=4,
    block_size=16,
    padded_vocab_size=64,
    mlp_class_name="LLaMAMoE",
    moe_intermediate_size=96,
    n_expert=16,
    n_expert_per_token=2,
    norm_class_name="RMSNorm",
    bias=True,
    n_shared_expert=1,
)
SIGMOID = dict(n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)


def check_distribution(state: dict[str, torch.Tensor], prefix: str) -> None:
    wide, narrow = math.sqrt(2 / 5 / 64), 1 / math.sqrt(64) / 3
    layer = {key: value for key, value in state.items() if key.startswith(prefix)}
    assert len(layer) >= 1 + 6 * (16 + 1)  # the gate, and 3 weights and 3 biases of each expert and the shared one
    for key, value in layer.items():
        if "bias" in key:
            assert not value.any(), key
            continue
        std = narrow if key.endswith("proj.weight") else wide
        # 1,024 values or more: three standard errors of the standard deviation are within 7%, of the mean within 10%.
        assert value.numel() >= 1024
        assert value.std().item() == pytest.approx(std, rel=0.08), key
        assert abs(value.mean().item()) < 0.12 * std, key
        assert value.abs().max() > 2.5 * std, key  # normal, not uniform


@pytest.mark.parametrize("fields", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_pretraining_initializes_every_parameter(fields: dict) -> None:
    """``initialize_weights`` knows linear layers only: a stacked parameter, or the sigmoid router's weight, would stay
    uninitialized memory under ``init_module(empty_init=True)``."""
    torch.manual_seed(0)
    config = Config(**SIZES, **fields)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True), use_custom_moe():
        gpt = GPT(config)
    with torch.no_grad():
        for name, value in gpt.state_dict().items():
            if ".mlp." in name:
                value.fill_(math.nan)
    initialize_weights(fabric, gpt, n_layer=config.n_layer, n_embd=config.n_embd)
    for layer in range(config.n_layer):
        check_distribution(gpt.state_dict(), f"transformer.h.{layer}.mlp.")


@pytest.mark.parametrize("fields", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_constructor_and_reset_initialize(fields: dict) -> None:
    torch.manual_seed(0)
    moe = MoE(Config(**SIZES, **fields))
    check_distribution(moe.state_dict(), "")
    with torch.no_grad():
        for value in moe.state_dict().values():
            value.fill_(math.nan)
    moe.reset_parameters()
    check_distribution(moe.state_dict(), "")


def test_reset_initializes_a_layer_from_meta() -> None:
    with torch.device("meta"):
        moe = MoE(Config(**SIZES, **SIGMOID))
    moe.to_empty(device="cpu").reset_parameters()
    check_distribution(moe.state_dict(), "")


def test_correction_bias_is_fp32_in_a_bf16_model() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module(), use_custom_moe():
        gpt = GPT(Config(**SIZES, **SIGMOID))
    gate = gpt.transformer.h[0].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gpt(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "convert",
    [
        lambda moe: moe.to(torch.bfloat16),
        lambda moe: moe.half(),
        lambda moe: moe.double(),
        lambda moe: moe.to("meta", torch.bfloat16).to_empty(device="cpu"),
        lambda moe: moe.to("meta").bfloat16().to_empty(device="cpu"),
        lambda moe: L.Fabric(accelerator="cpu", devices=1, precision="bf16-true").setup(moe).module,
    ],
    ids=["bf16", "fp16", "fp64", "to meta", "on meta", "fabric"],
)
def test_conversion_keeps_correction_bias_fp32(convert) -> None:
    """A bias near 1 moves by 0.001, which bf16 does not have."""
    moe = MoE(Config(**SIZES, **SIGMOID))
    values = 1 + 0.001 * torch.arange(16)
    moe.gate.e_score_correction_bias.copy_(values)
    moe = convert(moe)
    assert moe.gate.weight.dtype != torch.float32 and moe.experts.fc_weight.dtype == moe.gate.weight.dtype
    bias = moe.gate.e_score_correction_bias
    assert (bias.dtype, bias.device.type) == (torch.float32, "cpu")
    assert list(dict(moe.named_buffers())) == ["gate.e_score_correction_bias"]
    moe.gate.e_score_correction_bias.copy_(values)
    state = moe.state_dict()
    assert torch.equal(state["gate.e_score_correction_bias"], values)
    stock = LLaMAMoE(Config(**SIZES, **SIGMOID))
    stock.load_state_dict(state)
    assert torch.equal(stock.gate.e_score_correction_bias, values), "LitGPT's layer reads all of it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_keeps_correction_bias_values(dtype: torch.dtype) -> None:
    moe = MoE(Config(**SIZES, **SIGMOID))
    values = 1 + 0.001 * torch.arange(16)
    moe.gate.e_score_correction_bias.copy_(values)
    moe.to(dtype).to("cpu")
    assert torch.equal(moe.gate.e_score_correction_bias, values)
    moe.to("meta")
    assert moe.gate.e_score_correction_bias.is_meta
