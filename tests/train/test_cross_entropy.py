import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from litmoe.train.cross_entropy import (
    IGNORE_INDEX,
    computed_columns,
    linear_cross_entropy,
    loss_of_rows,
    rows_per_block,
)

N, C, V = 300, 24, 3000  # more than two blocks


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(V, C, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return x, weight, targets


def test_there_are_several_blocks():
    assert rows_per_block(N, V, "cpu") < N // 2


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_loss_and_gradients_equal_two_steps(factor):
    x, weight, targets = tensors()
    expected = F.cross_entropy(x @ weight.t(), targets)
    found = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(factor * expected, (x, weight))
    torch.testing.assert_close(torch.autograd.grad(factor * found, (x, weight)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_columns_change_nothing(dtype):
    x, weight, targets = tensors(dtype)
    assert (computed_columns(V, "cuda"), computed_columns(V, "cpu")) == (3072, V)
    results = []
    for device_type in ("cuda", "cpu"):
        loss = linear_cross_entropy(x, weight, targets, device_type)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_add_up_over_micro_batches():
    x, weight, targets = tensors()
    for rows in (slice(0, 100), slice(100, N)):
        (linear_cross_entropy(x[rows], weight, targets[rows]) / 2).backward()
    losses = [F.cross_entropy(x[rows] @ weight.t(), targets[rows]) / 2 for rows in (slice(0, 100), slice(100, N))]
    wanted = torch.autograd.grad(sum(losses), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), wanted)


def test_no_targets_give_zero_loss_and_gradient():
    x, weight, targets = tensors()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert float(loss) == 0 and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_no_gradient_where_none_is_needed(frozen):
    x, weight, targets = tensors()
    wanted = torch.autograd.grad(F.cross_entropy(x @ weight.t(), targets), (x, weight))
    (x if frozen == "x" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, targets).backward()
    assert (x if frozen == "x" else weight).grad is None
    torch.testing.assert_close(weight.grad if frozen == "x" else x.grad, wanted[1] if frozen == "x" else wanted[0])


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_only_the_products_are_rounded(autocast):
    """Under autocast, gradients of fp32 parameters stay fp32, and sums over blocks are fp32 too."""
    x, weight, targets = tensors(torch.float32 if autocast else torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), targets)
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = linear_cross_entropy(x, weight, targets)
    found.backward()
    assert found.dtype == torch.float32 and (x.grad.dtype, weight.grad.dtype) == (x.dtype, weight.dtype)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)
    for tensor, true in zip((x, weight), exact, strict=True):
        error = (tensor.grad.double() - true.grad).norm() / true.grad.norm()
        assert error < 0.01


def test_all_logits_never_exist_at_once():
    x, weight, targets = tensors()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Sizes():
        linear_cross_entropy(x, weight, targets).backward()
    assert max(sizes) <= rows_per_block(N, V, "cpu") * V < N * V


def test_output_layer_gradient_exists_once() -> None:
    """The backward used to make a scaled copy: 154 MB at MoE-200M's size, while all activations exist."""
    x, weight, targets = tensors()
    places = set()

    class Places(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(result)
            places.update(t.untyped_storage().data_ptr() for t in leaves if t is not None and t.numel() == V * C)
            return result

    with Places():
        linear_cross_entropy(x, weight, targets).backward()
    assert places - {weight.data_ptr()} == {weight.grad.data_ptr()}


def test_second_backward_is_refused() -> None:
    """It would scale the gradient twice."""
    loss = linear_cross_entropy(*tensors())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_flops_of_forward_and_backward():
    x, weight, targets = tensors()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, targets).backward()
    assert counter.get_total_flops() == 3 * 2 * N * C * V
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == 2 * N * C * V


def test_blocks_of_one_size_are_compiled_once():
    torch.compiler.reset()
    x, weight, targets = tensors()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of_rows, backend=graphs, fullgraph=True)
    found = torch.autograd.grad(linear_cross_entropy(x, weight, targets, loss_of_rows=compiled), (x, weight))
    torch.testing.assert_close(found, torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight)))
    assert (N // rows_per_block(N, V, "cpu"), graphs.frame_count) == (2, 2), (
        "of two complete blocks and of the last one"
    )


@pytest.mark.parametrize("tokens", [1, 512, 4096, 65536])
@pytest.mark.parametrize("words", [2048, 50257, 200_000])
def test_gpu_blocks_fill_tiles_evenly(tokens, words):
    rows = rows_per_block(tokens, words, "cuda")
    assert -(-tokens // rows) <= 16
    assert rows % 128 == 0
    assert tokens <= rows or tokens % rows == 0, "one kernel for all of them"
