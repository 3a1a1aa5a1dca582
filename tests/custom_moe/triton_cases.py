# ruff: noqa: E741 (the letters of the kernels' legend)
"""The Triton kernels against plain arithmetic in fp64, on a GPU or in Triton's interpreter.

``test_triton.py`` runs this file in processes of its own: the interpreter must be chosen before Triton is imported,
and the other tests must not run in it.
"""

import os

import pytest
import torch
import triton.language as tl
from litgpt import Config
from litgpt.model import LLaMAMoE
from torch import Tensor

import custom_moe.triton_kernels as kernels
from custom_moe import MoE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTINGS = {
    "even": [9, 10, 9, 9],
    "empty experts": [0, 20, 0, 0, 17, 0],
    "one expert": [37],
    "all to the first": [37, 0, 0, 0],
    "all to the last": [0, 0, 0, 37],
    "several tiles": [70, 3, 0, 129, 64],
    "no rows": [0, 0, 0],
}
# The interpreter takes seconds for wide tiles of many rows.
WIDE_CASES = [
    *((torch.float32, "several tiles", widths) for widths in [(17, 5), (33, 131), (64, 160)]),
    *((dtype, "empty experts", (64, 144)) for dtype in (torch.bfloat16, torch.float16)),
    *((dtype, "several tiles", (33, 70)) for dtype in (torch.bfloat16, torch.float16)),
]
CASES = [
    *((torch.float32, name, (24, 40)) for name in ROUTINGS),
    *((dtype, "empty experts", (17, 40)) for dtype in (torch.bfloat16, torch.float16)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE_CASES),
]


if INTERPRETED:
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _dot_in_bf16(self, a, b, *rest):
        """The interpreter keeps bf16 as integers, and its dot would multiply those (triton issue 11584)."""
        for operand in (a, b):
            if operand.dtype.scalar == tl.bfloat16:
                operand.data = (operand.data.astype("uint32") << 16).view("float32")
                operand.dtype = tl.float32
        return _create_dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = _dot_in_bf16


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def expert_of(sizes: list[int]) -> list[int]:
    return [expert for expert, size in enumerate(sizes) for _ in range(size)]


def check(result: Tensor, exact: Tensor, scale: Tensor, terms: int, dtype: torch.dtype) -> None:
    """``result`` is ``exact`` rounded to ``dtype``, after an fp32 sum of ``terms`` with absolute values that add up to
    ``scale``. The interpreter does not round to bf16, it truncates."""
    assert result.dtype == dtype and result.shape == exact.shape and result.is_contiguous()
    rounding = torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)
    allowed = rounding * exact.abs() + 2 * (terms + 4) * 2.0**-24 * scale + torch.finfo(dtype).tiny
    assert ((result.double() - exact).abs() <= allowed * 1.01).all()


@pytest.mark.parametrize(("dtype", "routing", "widths"), CASES, ids=str)
def test_multiply(dtype: torch.dtype, routing: str, widths: tuple[int, int]) -> None:
    (C, O), sizes = widths, ROUTINGS[routing]
    E, S = len(sizes), sum(sizes)
    x, weight = randn(S, C, dtype=dtype), randn(E, O, C, dtype=dtype, seed=1)
    exact, scale = torch.zeros(S, O, dtype=torch.float64), torch.zeros(S, O, dtype=torch.float64)
    for s, e in enumerate(expert_of(sizes)):
        exact[s] = weight[e].double().cpu() @ x[s].double().cpu()
        scale[s] = weight[e].double().cpu().abs() @ x[s].double().cpu().abs()

    y = kernels.multiply(x, weight, ends_of(sizes))
    check(y.cpu(), exact, scale, C, dtype)
    for strided in (weight.transpose(1, 2).contiguous().transpose(1, 2), weight.repeat_interleave(2, dim=2)[..., ::2]):
        assert not strided.is_contiguous() or strided.numel() == 0
        check(kernels.multiply(x, strided, ends_of(sizes)).cpu(), exact, scale, C, dtype)

    rows = torch.randperm(S, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert torch.equal(
        kernels.multiply(x, weight, ends_of(sizes), rows), kernels.multiply(x[rows], weight, ends_of(sizes))
    )


@pytest.mark.parametrize(("dtype", "routing", "widths"), CASES, ids=str)
def test_weight_gradient(dtype: torch.dtype, routing: str, widths: tuple[int, int]) -> None:
    (C, O), sizes = widths, ROUTINGS[routing]
    E, S = len(sizes), sum(sizes)
    grad, x = randn(S, O, dtype=dtype), randn(S, C, dtype=dtype, seed=1)
    exact, scale = torch.zeros(E, O, C, dtype=torch.float64), torch.zeros(E, O, C, dtype=torch.float64)
    for s, e in enumerate(expert_of(sizes)):
        outer = torch.outer(grad[s].double().cpu(), x[s].double().cpu())
        exact[e] += outer
        scale[e] += outer.abs()

    ends = ends_of(sizes)
    result = kernels.weight_gradient(grad, x, ends)
    check(result.cpu(), exact, scale, max(sizes), dtype)
    assert all(not result[e].any() for e, size in enumerate(sizes) if size == 0)

    rows, other = (torch.randperm(S, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (2, 3))
    assert torch.equal(kernels.weight_gradient(grad, x, ends, rows), kernels.weight_gradient(grad[rows], x, ends))
    gathered = kernels.weight_gradient(grad, x, ends, rows, other)
    assert torch.equal(gathered, kernels.weight_gradient(grad[rows], x[other], ends))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows_may_repeat(dtype: torch.dtype) -> None:
    """As with several experts per token: more assignments than rows."""
    x, weight, sizes = randn(11, 32, dtype=dtype), randn(4, 48, 32, dtype=dtype, seed=1), [20, 0, 2, 11]
    rows = torch.arange(33, device=DEVICE) // 3
    y = kernels.multiply(x, weight, ends_of(sizes), rows)
    assert torch.equal(y, kernels.multiply(x[rows], weight, ends_of(sizes)))
    dweight = kernels.weight_gradient(y, x, ends_of(sizes), None, rows)
    assert torch.equal(dweight, kernels.weight_gradient(y, x[rows], ends_of(sizes)))
    assert torch.equal(kernels.multiply(x, weight, ends_of(sizes), rows.int()), y)


def test_infinities_stay_in_their_expert() -> None:
    """Tiles reach past an expert's last row: the rows there must not be multiplied, not even by zero."""
    sizes = [5, 7, 4]
    grad, x, weight = randn(16, 32), randn(16, 32, seed=1), randn(3, 32, 32, seed=2)
    grad[5:12] = x[5:12] = torch.inf
    gradient = kernels.weight_gradient(grad, x, ends_of(sizes))
    assert gradient[[0, 2]].isfinite().all() and not gradient[1].isfinite().any()
    y = kernels.multiply(x, weight, ends_of(sizes))
    assert y[:5].isfinite().all() and y[12:].isfinite().all() and not y[5:12].isfinite().any()


def test_gradient_with_stride_zero() -> None:
    """As ``y.sum().backward()`` sends it."""
    x, weight, ends = randn(37, 16), randn(4, 24, 16, seed=1), ends_of(ROUTINGS["even"])
    ones = torch.ones((), device=DEVICE).expand(37, 24)
    assert torch.equal(kernels.weight_gradient(ones, x, ends), kernels.weight_gradient(ones.contiguous(), x, ends))
    back = weight.transpose(1, 2)
    assert torch.equal(kernels.multiply(ones, back, ends), kernels.multiply(ones.contiguous(), back, ends))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("S", "I"), [(37, 40), (5, 17), (3, 1500), (0, 16), (1, 1)])
def test_swiglu_and_its_backward(S: int, I: int, dtype: torch.dtype) -> None:
    h, weights, da = 3 * randn(S, 2 * I, dtype=dtype), randn(S, seed=1).abs(), randn(S, I, dtype=dtype, seed=2)
    exact_h, exact_w = h.double().cpu().requires_grad_(), weights.double().cpu().requires_grad_()
    gate, up = exact_h.chunk(2, dim=1)
    exact = exact_w[:, None] * torch.nn.functional.silu(gate) * up
    exact.backward(da.double().cpu())
    assert exact_h.grad is not None and exact_w.grad is not None

    a = kernels.swiglu(h, weights)
    check(a.cpu(), exact.detach(), exact.detach().abs(), 8, dtype)
    dh, again, dweights = kernels.swiglu_backward(h, weights, da)
    assert torch.equal(a, again)
    size = (exact_w[:, None] * da.double().cpu()).abs().detach()
    scale = torch.cat([size * (up.abs() * (1 + gate.abs())).detach(), size * gate.abs().detach()], dim=1)
    check(dh.cpu(), exact_h.grad, scale, 8, dtype)
    terms = (da.double().cpu() * torch.nn.functional.silu(gate) * up).detach().abs()
    check(dweights.cpu(), exact_w.grad, terms.sum(dim=1), I, torch.float32)
    assert torch.equal(kernels.swiglu(h, weights.bfloat16()), kernels.swiglu(h, weights.bfloat16().float()))


ARGUMENTS = {
    "multiply": lambda: (randn(37, 24), randn(4, 40, 24).transpose(1, 2).contiguous().transpose(1, 2)),
    "weight_gradient": lambda: (randn(37, 24), randn(37, 40)),
    "swiglu": lambda: (randn(37, 48), randn(37)),
    "swiglu_backward": lambda: (randn(37, 48), randn(37), randn(37, 24)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_pass_opcheck(name: str) -> None:
    """torch's own check: schema, no changed input, fake tensors of the real shapes, types and strides."""
    arguments = ARGUMENTS[name]()
    if "swiglu" not in name:
        arguments = (*arguments, ends_of(ROUTINGS["even"]))
    torch.library.opcheck(getattr(torch.ops.custom_moe, name).default, arguments)


def test_shapes_on_the_meta_device() -> None:
    x, weight = torch.empty(11, 24, device="meta", dtype=torch.bfloat16), torch.empty(4, 40, 24, device="meta")
    ends, rows = torch.empty(4, device="meta", dtype=torch.int32), torch.empty(33, device="meta", dtype=torch.int64)
    y = kernels.multiply(x, weight, ends, rows)
    assert y.is_meta and y.shape == (33, 40) and y.dtype == torch.bfloat16
    gradient = kernels.weight_gradient(y, x, ends, None, rows)
    assert gradient.is_meta and gradient.shape == (4, 40, 24) and gradient.dtype == torch.bfloat16


def test_compiles_to_one_graph_for_any_routing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(x: Tensor, weight: Tensor, ends: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        h = kernels.multiply(x, weight, ends, rows)
        dh, a, dweights = kernels.swiglu_backward(h, weights, kernels.swiglu(h, weights))
        return a, kernels.weight_gradient(dh, x, ends, None, rows), dweights

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    x, weight, rows = randn(20, 16), randn(4, 48, 16, seed=1), torch.arange(40, device=DEVICE) // 2
    for seed, sizes in enumerate(([10, 10, 10, 10], [0, 40, 0, 0], [1, 2, 0, 37])):
        arguments = x, weight, ends_of(sizes), rows, randn(40, seed=seed)
        for result, expected in zip(compiled(*arguments), layer(*arguments), strict=True):
            assert torch.equal(result, expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True},
        {"n_embd": 26, "moe_intermediate_size": 17, "n_expert": 5, "n_expert_per_token": 3},
        {"n_expert": 1, "n_expert_per_token": 1},
        {"n_expert": 8, "n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2},
    ],
    ids=["plain", "biases", "odd sizes", "one expert", "sigmoid"],
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_layer_equals_litgpt(fields: dict, compiled: bool) -> None:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=32, n_head=2, moe_intermediate_size=48, n_expert=4, n_expert_per_token=2, bias=False)
    config = Config(**{**sizes, **fields}, mlp_class_name="LLaMAMoE")
    ours, stock = MoE(config, backend="triton").to(DEVICE), LLaMAMoE(config).to(DEVICE)
    values = {key: torch.randn_like(value) / value.shape[-1] ** 0.5 for key, value in stock.state_dict().items()}
    ours.load_state_dict(values)
    stock.load_state_dict(values)
    results = []
    for layer in (torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours, stock):
        x = randn(2, 9, config.n_embd, seed=1).requires_grad_()
        y = layer(x)
        y.backward(randn(*y.shape, seed=2))
        results.append((y, x.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(ours.gate.weight.grad, stock.gate.weight.grad)
    for expert, stock_expert in enumerate(stock.experts):
        gate, up = ours.experts.fc_weight.grad[expert].chunk(2)
        torch.testing.assert_close(gate, stock_expert.fc_1.weight.grad)
        torch.testing.assert_close(up, stock_expert.fc_2.weight.grad)
        torch.testing.assert_close(ours.experts.proj_weight.grad[expert], stock_expert.proj.weight.grad)


if not INTERPRETED:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_never_synchronizes_and_repeats_bits(dtype: torch.dtype) -> None:
        sizes = [3000, 0, 1, 5191]
        x, weight, ends = randn(8192, 256, dtype=dtype), randn(4, 512, 256, dtype=dtype), ends_of(sizes)
        weights, rows = randn(8192), torch.randperm(8192).cuda()
        results: list[tuple[Tensor, ...]] = []
        kernels.multiply(x, weight, ends)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                h = kernels.multiply(x, weight, ends, rows)
                a = kernels.swiglu(h, weights)
                backward = kernels.swiglu_backward(h, weights, a)
                results.append((h, a, *backward, kernels.weight_gradient(h, x, ends, None, rows)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for again in results[1:]:
            assert all(torch.equal(first, second) for first, second in zip(results[0], again, strict=True))
