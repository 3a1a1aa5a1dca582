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


def by_torch(heads, H, G, scale, documents=None):
    q, k, v = heads.transpose(1, 2).split((H, G, G), dim=1)
    mask = None
    if documents is not None:
        mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=H != G)
    return y.transpose(1, 2)


FUNCTIONS = (causal_attention_in_blocks, by_torch)


def with_gradient(function, heads, H, G, *documents):
    heads = heads.clone().requires_grad_()
    y = function(heads, H, G, SCALE, *documents)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).sin()
    (gradient,) = torch.autograd.grad((y * weights).sum(), heads)
    return y.detach(), gradient


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_torch(T, H, G):
    heads = random_heads(T, H, G)
    ours, expected = (with_gradient(function, heads, H, G) for function in FUNCTIONS)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ends", [([4], []), ([1, 2, 127], [128, 129]), ([140, 299], [150, 260])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents(dtype, ends):
    """Blocks of 64 or 128 queries begin within documents, at their first token, and after keys that none sees."""
    is_end = torch.zeros(B, 300, dtype=torch.int32)
    for row, positions in enumerate(ends):
        is_end[row, positions] = 1
    documents = is_end.cumsum(1) - is_end
    heads = random_heads(300, 4, 2).to(dtype)
    ours, expected = (with_gradient(function, heads, 4, 2, documents) for function in FUNCTIONS)
    error = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(ours, expected, rtol=error, atol=error)


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

    # The products of some processors add up the rows of a block one by one (torch's kernel has smaller tiles). A sum of
    # random numbers of both signs then has a relative error of about a third of this.
    rows = min(T, 64) * H // G
    one_by_one = rows**0.5 * 2**-24
    for ours, torchs in zip(*map(errors, FUNCTIONS), strict=True):
        assert ours < 1.3 * torchs + one_by_one / 2


def test_only_training_on_a_cpu_takes_it():
    heads = torch.zeros(1, 4, 3, D, requires_grad=True)
    assert _in_blocks(heads)
    assert not _in_blocks(heads.detach())
    assert not _in_blocks(heads.to("meta"))
    assert not _in_blocks(heads[:, :1])
    assert not _in_blocks(heads[:, :1].expand(1, MAX_LENGTH + 1, 3, D))
