"""The block equals LitGPT's, and the context manager replaces and restores LitGPT's names."""

import subprocess
import sys

import litgpt.model
import pytest
import torch
from litgpt import GPT, Config
from litgpt.model import Block, LLaMAMLP, LLaMAMoE

from custom_moe import MoE, MoEBlock, use_custom_moe
from litmoe.config import PROJECT
from tests.helpers import moe_config, moe_pair

BLOCKS = {
    "sequential": {},
    "parallel": {"parallel_residual": True},
    "parallel, shared norm": {"parallel_residual": True, "shared_attention_norm": True},
    "post norms": {"post_attention_norm": True, "post_mlp_norm": True},
    "no first norms": {"norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True},
    "dense first layer": {"first_k_dense_replace": 1, "intermediate_size": 40},
    "only dense layers": {"first_k_dense_replace": 2, "intermediate_size": 40, "n_expert": 0, "n_expert_per_token": 0},
    "dense model": {"mlp_class_name": "GptNeoxMLP", "n_expert": 0, "bias": True, "norm_class_name": "LayerNorm"},
}


@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS.keys())
def test_block_equals_litgpt(moe_fields: dict, fields: dict) -> None:
    config = Config(**{**moe_fields, **fields})
    torch.manual_seed(0)
    with use_custom_moe():
        gpt = GPT(config)
    stock = GPT(config)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gpt.load_state_dict(stock.state_dict())
    cos, sin = gpt.cos[:9].unsqueeze(0), gpt.sin[:9].unsqueeze(0)
    x = torch.randn(2, 9, 32)

    for index, (block, block_stock) in enumerate(zip(gpt.transformer.h, stock.transformer.h, strict=True)):
        leaves = [x.clone().requires_grad_() for _ in range(3)]
        y_stock = block_stock(leaves[0], cos, sin)
        y = block(leaves[1], cos, sin)
        y_with, router = block(leaves[2], cos, sin, return_router_output=True)
        torch.testing.assert_close(y, y_stock)
        torch.testing.assert_close(y_with, y_stock)
        assert (router is not None) == isinstance(block_stock.mlp, LLaMAMoE)
        if router is not None:
            assert router.logits.shape == (18, config.n_expert)
            assert router.weights.shape == router.tokens.shape == (18 * config.n_expert_per_token,)
        for out in (y_stock, y, y_with):
            out.square().sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
        torch.testing.assert_close(leaves[2].grad, leaves[0].grad)
        assert isinstance(block.mlp, LLaMAMLP) == (index < (config.first_k_dense_replace or 0))


def test_dense_block_of_a_config_without_experts(moe_fields: dict) -> None:
    """LitGPT's own block makes a MoE layer before it replaces it; a layer that stays is refused."""
    without_experts = {"n_layer": 3, "n_expert": 0, "n_expert_per_token": 0, "intermediate_size": 40}
    config = Config(**{**moe_fields, **without_experts, "first_k_dense_replace": 1})
    stock_block = litgpt.model.Block
    with use_custom_moe():
        assert isinstance(stock_block(config, 0).mlp, LLaMAMLP) and isinstance(MoEBlock(config, 0).mlp, LLaMAMLP)
        with pytest.raises(ValueError, match="layer 1 is a mixture of experts but n_expert is 0"):
            GPT(config)


def test_kv_cache_decoding_equals_litgpt(moe_fields: dict) -> None:
    config = Config(**moe_fields)
    with use_custom_moe():
        gpt = GPT(config)
    stock = GPT(config)
    stock.load_state_dict(gpt.state_dict())
    ids = torch.randint(0, 384, (1, 6))
    for model in (gpt, stock):
        model.set_kv_cache(batch_size=1)
    with torch.inference_mode():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            position = torch.arange(start, end)
            logits = gpt(ids[:, start:end], position, input_pos_maxp1=end)
            torch.testing.assert_close(logits, stock(ids[:, start:end], position, input_pos_maxp1=end))


def test_context_restores_litgpt(moe_fields: dict) -> None:
    config = Config(**moe_fields)
    with use_custom_moe():
        assert (litgpt.model.LLaMAMoE, litgpt.model.Block) == (MoE, MoEBlock)
        with use_custom_moe():
            inner = GPT(config)
        assert (litgpt.model.LLaMAMoE, litgpt.model.Block) == (MoE, MoEBlock)
    with pytest.raises(KeyError), use_custom_moe():
        raise KeyError
    assert (litgpt.model.LLaMAMoE, litgpt.model.Block) == (LLaMAMoE, Block)
    assert type(inner.transformer.h[0]) is MoEBlock and type(inner.transformer.h[0].mlp) is MoE
    after = GPT(config).transformer.h[0]
    assert type(after) is Block and type(after.mlp) is LLaMAMoE


def test_block_with_litgpts_layer_raises(moe_fields: dict) -> None:
    """It would have no router output, and the balance losses would silently be zero."""
    with pytest.raises(TypeError, match="use_custom_moe"):
        MoEBlock(Config(**moe_fields), 0)


def forward_with_other_arguments(self, hidden, cos, sin):
    raise AssertionError("never called")


def test_changed_litgpt_raises(monkeypatch: pytest.MonkeyPatch, moe_fields: dict) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(litgpt.model, "GroupedTopkRouter")
        with (
            pytest.raises(RuntimeError, match=r"litgpt 0\.\d+.*litgpt\.model\.GroupedTopkRouter is missing"),
            use_custom_moe(),
        ):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", forward_with_other_arguments)
        with (
            pytest.raises(RuntimeError, match=r"Block\.forward takes \(self, hidden, cos, sin\), expected \(self, x,"),
            use_custom_moe(),
        ):
            pass
        assert (litgpt.model.LLaMAMoE, litgpt.model.Block) == (LLaMAMoE, Block)
    with use_custom_moe():
        GPT(Config(**moe_fields))


def test_adapters_keep_litgpts_layer(moe_fields: dict) -> None:
    """In a fresh process, where nothing but this package has imported the adapters."""
    code = f"""
from custom_moe import use_custom_moe
with use_custom_moe():
    import litgpt.adapter_v2 as adapter
import torch, litgpt.model
assert adapter.LLaMAMoE.__mro__[1] is litgpt.model.LLaMAMoE
assert adapter.Block.__mro__[1] is litgpt.model.Block
gpt = adapter.GPT(adapter.Config(**{moe_fields!r}))
assert gpt(torch.arange(9)[None]).isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bias", [False, True])
def test_experts_are_a_list(bias: bool) -> None:
    """As LitGPT's ``ModuleList``, for code that looks at single experts."""
    config = moe_config({"bias": bias})
    ours, stock = moe_pair(config)
    x = torch.randn(5, 32)
    assert len(ours.experts) == len(stock.experts) == len(list(ours.experts)) == 4
    for expert, expected in zip(ours.experts, stock.experts, strict=True):
        assert expert.state_dict().keys() == expected.state_dict().keys()
        torch.testing.assert_close(expert(x), expected(x))
        assert repr(expert.fc_1) == repr(expected.fc_1)
    assert torch.equal(ours.experts[-1].proj.weight, ours.experts[3].proj.weight)
    with pytest.raises(IndexError):
        ours.experts[4]
    torch.nn.init.constant_(ours.experts[1].fc_2.weight, 0.5)
    assert (ours.state_dict()["experts.1.fc_2.weight"] == 0.5).all(), "a view, not a copy"
    assert list(ours.experts.parameters()) == [p for p in ours.experts._parameters.values() if p is not None]
