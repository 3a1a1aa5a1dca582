"""The attention and norm of litmoe/layers.py equal LitGPT's, in output and every gradient."""

import litgpt.lora
import litgpt.model
import pytest
import torch
from litgpt import GPT, Config

from custom_moe.backends import Hardware
from litmoe import layers
from litmoe.layers import CausalSelfAttention, LoRACausalSelfAttention, RMSNorm, use_fast_layers

B, T = 2, 13
USUAL = dict(block_size=32, n_layer=1, n_embd=48, n_head=6, padded_vocab_size=32, rotary_percentage=1.0, bias=False)
ATTENTIONS = {
    "no groups": dict(n_query_groups=6),
    "grouped queries": dict(n_query_groups=2),
    "one group": dict(n_query_groups=1),
    "biases": dict(n_query_groups=2, bias=True),
    "normed heads": dict(n_query_groups=2, norm_qk=True, norm_class_name="RMSNorm"),
    "normed as in OLMo 2": dict(n_query_groups=6, norm_qk=True, norm_qk_type="olmo2", norm_class_name="RMSNorm"),
    "another scale": dict(n_query_groups=6, attention_scores_scalar=20),
    # Computed by LitGPT's code
    "a quarter rotated": dict(n_query_groups=6, rotary_percentage=0.25),
    "interleaved": dict(n_query_groups=6, rope_interleave=True),
    "capped scores": dict(n_query_groups=6, attention_logit_softcapping=5.0),
    "windows": dict(n_query_groups=6, sliding_window_size=4, sliding_window_indices=[1]),
}


def both_attentions(name):
    torch.manual_seed(0)
    config = Config(**{**USUAL, **ATTENTIONS[name]})
    stock, ours = litgpt.model.CausalSelfAttention(config, 0), CausalSelfAttention(config, 0)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(stock.state_dict())
    gpt = GPT(config)
    return stock, ours, gpt.cos[:T].unsqueeze(0), gpt.sin[:T].unsqueeze(0)


def with_gradients(module, x, *args):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x, *args)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y.float() * weights).sum().backward()
    return y, x.grad, *(parameter.grad for parameter in module.parameters())


def assert_same(stock, ours, x, *args):
    """Compare in fp64: with six heads sharing keys, fp32 sums in another order exceed the tolerance on some CPUs."""
    results, expected = (with_gradients(module.double(), x.double(), *args) for module in (ours, stock))
    torch.testing.assert_close(results, expected, rtol=1.3e-6, atol=1e-5)  # fp32's: the norms compute in fp32


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_equals_litgpt(name):
    stock, ours, cos, sin = both_attentions(name)
    assert_same(stock, ours, torch.randn(B, T, 48), cos, sin)


@pytest.mark.parametrize("name", ["one group", "biases"])
def test_fp32_attention_is_as_exact_as_litgpt(name):
    stock, ours, cos, sin = both_attentions(name)
    x = torch.randn(B, T, 48)
    results = [with_gradients(module, x, cos, sin) for module in (ours, stock)]
    exact = with_gradients(stock.double(), x.double(), cos, sin)
    for value_ours, value_stock, expected in zip(*results, exact, strict=True):
        error, bound = (float((value - expected).norm() / expected.norm()) for value in (value_ours, value_stock))
        assert error < 1.3 * bound + 1e-7


@pytest.mark.parametrize("name", ["no groups", "grouped queries", "normed heads"])
def test_bf16_attention_is_as_exact_as_litgpt(name):
    stock, ours, cos, sin = both_attentions(name)
    x = torch.randn(B, T, 48)
    exact = with_gradients(stock, x, cos, sin)

    def errors(module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = with_gradients(module, x, cos, sin)
        return [float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]

    assert all(a < 1.3 * b for a, b in zip(errors(ours), errors(stock), strict=True))


def test_attention_without_flash_attention(monkeypatch):
    """As on a GPU in fp32, where no kernel takes fewer key heads than query heads."""
    stock, ours, cos, sin = both_attentions("grouped queries")
    x = torch.randn(B, T, 48)
    monkeypatch.setattr(layers, "_flash_attention", lambda *_: False)
    assert_same(stock, ours, x, cos, sin)


def test_attention_with_mask_and_positions():
    stock, ours, cos, sin = both_attentions("grouped queries")
    x, mask = torch.randn(B, T, 48), torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(ours(x, cos, sin, mask), stock(x, cos, sin, mask))
    shifted = torch.stack([torch.arange(T), torch.arange(T) + 5])
    cos, sin = (table.expand(B, -1, -1).clone() for table in (cos, sin))
    cos[1], sin[1] = torch.cos(shifted[1, :, None] * 0.1), torch.sin(shifted[1, :, None] * 0.1)
    torch.testing.assert_close(ours(x, cos, sin), stock(x, cos, sin))


@pytest.mark.parametrize("add_unit_offset", [False, True])
def test_norm_equals_litgpt(add_unit_offset):
    torch.manual_seed(0)
    ours, stock = (kind(48, eps=1e-5, add_unit_offset=add_unit_offset) for kind in (RMSNorm, litgpt.model.RMSNorm))
    for norm in (ours, stock):
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = 3 * torch.randn(B, T, 48)
    torch.testing.assert_close(with_gradients(ours, x), with_gradients(stock, x))
    for norm in (ours, stock):
        norm.bfloat16()
    results, expected = (with_gradients(norm, x.bfloat16()) for norm in (ours, stock))
    assert [tensor.dtype for tensor in results] == [tensor.dtype for tensor in expected]
    torch.testing.assert_close(results, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours.for_inference()(x), ours(x))


@pytest.mark.parametrize("layer", ["attention", "norm"])
def test_layers_keep_less_for_the_backward(layer):
    if layer == "attention":
        stock, ours, *rotation = both_attentions("grouped queries")
    else:
        (stock, ours), rotation = (kind(48) for kind in (litgpt.model.RMSNorm, RMSNorm)), []

    def kept(module):
        tensors = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(B, T, 48, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x, *rotation)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    assert kept(ours) < kept(stock)


def test_use_fast_layers_builds_and_restores():
    originals = (litgpt.model.CausalSelfAttention, litgpt.model.RMSNorm)
    config = Config(**USUAL, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=64)
    with use_fast_layers():
        with use_fast_layers():
            pass
        ours = GPT(config)
    assert (litgpt.model.CausalSelfAttention, litgpt.model.RMSNorm) == originals
    block = ours.transformer.h[0]
    assert type(block.attn) is CausalSelfAttention and type(block.norm_1) is type(ours.transformer.ln_f) is RMSNorm
    stock = GPT(config)
    stock.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 32, (B, T))
    torch.testing.assert_close(ours(tokens), stock(tokens))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_lora_attention_equals_litgpt(name):
    parts = {"lora_query": True, "lora_key": True, "lora_projection": True}
    fields = {**USUAL, "mlp_class_name": "LLaMAMLP", "intermediate_size": 64, **ATTENTIONS[name], **parts}
    config = litgpt.lora.Config(**fields, lora_r=2, lora_dropout=0.0)
    with use_fast_layers():
        ours = litgpt.lora.GPT(config)
    stock = litgpt.lora.GPT(config)
    assert type(ours.transformer.h[0].attn) is LoRACausalSelfAttention
    assert type(stock.transformer.h[0].attn) is litgpt.lora.CausalSelfAttention
    torch.manual_seed(0)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(stock.state_dict())
    cos, sin = stock.cos[:T].unsqueeze(0), stock.sin[:T].unsqueeze(0)
    assert_same(stock.transformer.h[0].attn, ours.transformer.h[0].attn, torch.randn(B, T, 48), cos, sin)


@pytest.mark.parametrize("name", ["no groups", "grouped queries", "normed heads", "biases", "a quarter rotated"])
@torch.no_grad()
def test_kv_cache_equals_litgpt(name):
    """A prompt, a part of several tokens, and single tokens at common positions and at positions of their own."""
    config = Config(**{**USUAL, "norm_class_name": "RMSNorm", **ATTENTIONS[name]})
    with use_fast_layers():
        ours = GPT(config)
    stock = GPT(config)
    stock.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 32, (B, T))
    for gpt in (ours, stock):
        gpt.set_kv_cache(batch_size=B)
    for start, end, own_positions in ((0, 5, False), (5, 8, False), (8, 9, False), (9, 10, True), (10, 13, True)):
        positions = torch.arange(start, end)
        if own_positions:  # the second row is one token behind
            positions = torch.stack([positions, positions - 1])
        for maxp1 in (end, None):
            results = [gpt(tokens[:, start:end], positions, maxp1) for gpt in (ours, stock)]
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_flash_attention_as_torch_was_built(monkeypatch):
    monkeypatch.setattr(layers, "hardware_of", lambda device: Hardware((8, 6), triton=True))
    for is_built in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda built=is_built: built)
        assert layers._flash_attention(torch.device("cuda"), torch.bfloat16) is is_built
    assert layers._flash_attention(torch.device("cpu"), torch.float32)
