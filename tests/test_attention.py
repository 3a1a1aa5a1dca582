"""litmoe/attention.py computes what torch's attention computes, in output and gradients."""

import pytest
import torch
import torch.nn.functional as F

from litmoe.attention import MAX_LENGTH, causal_attention_in_blocks
from litmoe.layers import _in_blocks

B, D, SCALE = 2, 8, 0.3
# Within one block; exactly two in fp32; several, the last one incomplete
LENGTHS = (5, 128, 300)
HEADS = ((3, 1), (4, 2), (2, 2))


def random_heads(T, H, G):
    torch.manual_seed(0)
    return torch.randn(B, T, H + 2 * G, D, dtype=torch.float64)


def by_torch(heads, H, G, scale):
    q, k, v = heads.transpose(1, 2).split((H, G, G), dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != G)
    return y.transpose(1, 2)


def with_gradient(function, heads, H, G):
    heads = heads.clone().requires_grad_()
    y = function(heads, H, G, SCALE)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).sin()
    (gradient,) = torch.autograd.grad((y * weights).sum(), heads)
    return y.detach(), gradient


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_torch(T, H, G):
    heads = random_heads(T, H, G)
    ours, expected = (with_gradient(function, heads, H, G) for function in (causal_attention_in_blocks, by_torch))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torch(dtype, T, H, G):
    heads = random_heads(T, H, G)
    exact = with_gradient(by_torch, heads, H, G)

    def errors(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            values = with_gradient(function, heads.to(dtype), H, G)
        assert all(value.dtype == dtype for value in values)
        return [float((value - right).norm() / right.norm()) for value, right in zip(values, exact, strict=True)]

    # bf16: torch's kernel keeps the scores in fp32, we round them
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert all(ours < max(1.5 * torchs, bound) for ours, torchs in zip(*map(errors, FUNCTIONS), strict=True))


FUNCTIONS = (causal_attention_in_blocks, by_torch)


def test_only_training_on_a_cpu_takes_it():
    heads = torch.zeros(1, 4, 3, D, requires_grad=True)
    assert _in_blocks(heads)
    assert not _in_blocks(heads.detach())
    assert not _in_blocks(heads.to("meta"))
    assert not _in_blocks(heads.expand(1, 4, 3, D)[:, :1])
    assert not _in_blocks(torch.zeros(1, 1, 1, 1, requires_grad=True).expand(1, MAX_LENGTH + 1, 3, D))
