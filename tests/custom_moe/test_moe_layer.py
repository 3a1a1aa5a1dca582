"""The layer against LitGPT's own: output, every gradient, every precision."""

import copy

import pytest
import torch
from litgpt import Config
from litgpt.model import LLaMAMLP, LLaMAMoE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from custom_moe import Backend, MoE

SIGMOID = dict(n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)


def config_of(fields: dict) -> Config:
    sizes = dict(n_layer=2, n_embd=32, n_head=2, moe_intermediate_size=48, n_expert=4, n_expert_per_token=2, bias=False)
    return Config(**{**sizes, "mlp_class_name": "LLaMAMoE", "norm_class_name": "RMSNorm", **fields})


def pair(config: Config, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> tuple[MoE, LLaMAMoE]:
    """Our layer and LitGPT's with the same random values in every parameter and buffer, biases too."""
    torch.manual_seed(0)
    ours, stock = MoE(config, backend), LLaMAMoE(config)
    values = {key: torch.randn(value.shape) / value.shape[-1] ** 0.5 for key, value in stock.state_dict().items()}
    ours.load_state_dict(values)
    stock.load_state_dict(values)
    return ours.to(dtype), stock.to(dtype)


def gradients(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient under LitGPT's name: the state dict of a copy that holds gradients as its values."""
    holder = copy.deepcopy(layer)
    for parameter, source in zip(holder.parameters(), layer.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    state = holder.state_dict()
    return {name: state[name] for name in state if "e_score_correction_bias" not in name}


def run(layer: nn.Module, x: torch.Tensor, device_type: str = "cpu", autocast: torch.dtype | None = None):
    """Output, input gradient and parameter gradients for a fixed random gradient of the output."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(device_type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach(), x.grad, gradients(layer)


CASES = {
    "plain": {},
    "biases": {"bias": True},
    "one expert": {"n_expert": 1, "n_expert_per_token": 1},
    "one of four": {"n_expert_per_token": 1},
    "all experts": {"n_expert_per_token": 4},
    "width by intermediate_size": {"moe_intermediate_size": None, "intermediate_size": 40},
    "empty experts": {"n_expert": 32},
    "empty experts, biases": {"n_expert": 32, "bias": True},
    "odd sizes": {"n_embd": 26, "moe_intermediate_size": 17, "n_expert": 5, "n_expert_per_token": 3},
    "odd sizes, biases": {"n_embd": 26, "moe_intermediate_size": 17, "n_expert": 13, "bias": True},
    "shared expert": {"n_shared_expert": 2, "bias": True},
    "scaled": {"routed_scaling_factor": 2.5},
    "sigmoid": {**SIGMOID, "n_expert": 8},
    "sigmoid, normalised, scaled": {**SIGMOID, "n_expert": 8, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "sigmoid, odd sizes, shared": {
        **SIGMOID,
        "n_embd": 26,
        "moe_intermediate_size": 17,
        "n_expert": 6,
        "n_shared_expert": 1,
    },
}


both_backends = pytest.mark.parametrize("backend", ["loop", "grouped_mm"])  # triton: see test_moe_triton.py


@both_backends
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_equals_litgpts_layer_in_output_and_every_gradient(fields: dict, backend: Backend) -> None:
    config = config_of(fields)
    if backend == "grouped_mm" and config.n_embd % 4:
        config = config_of({**fields, "n_embd": 28, "moe_intermediate_size": 20})
    ours, stock = pair(config, backend=backend)
    x = torch.randn(3, 7, config.n_embd)

    y, x_grad, grads = run(ours, x)
    y_stock, x_grad_stock, grads_stock = run(stock, x)

    torch.testing.assert_close(y, y_stock)
    torch.testing.assert_close(x_grad, x_grad_stock)
    assert list(grads) == list(grads_stock) == [name for name, _ in stock.named_parameters()]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_stock[name], msg=lambda text, name=name: f"{name}: {text}")
    assert any(grad.any() for grad in grads.values())


def test_one_expert_equals_the_dense_feed_forward() -> None:
    config = config_of({"n_expert": 1, "n_expert_per_token": 1, "bias": True})
    moe, dense = MoE(config), LLaMAMLP(config, intermediate_size=48)
    weights = {f"experts.0.{key}": value for key, value in dense.state_dict().items()}
    moe.load_state_dict({"gate.weight": torch.randn(1, 32), **weights})
    x = torch.randn(2, 9, 32)

    y, x_grad, grads = run(moe, x)
    y_dense, x_grad_dense, grads_dense = run(dense, x)

    torch.testing.assert_close(y, y_dense)
    torch.testing.assert_close(x_grad, x_grad_dense)
    for name, grad in grads_dense.items():
        torch.testing.assert_close(grads[f"experts.0.{name}"], grad)


@pytest.mark.parametrize(
    ("fields", "backend"),
    [({}, "loop"), ({}, "grouped_mm"), ({"n_embd": 26, "moe_intermediate_size": 17, "bias": True}, "loop")],
    ids=["loop", "grouped_mm", "odd, biases"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_near_to_fp32_as_litgpts(dtype: torch.dtype, fields: dict, backend: Backend) -> None:
    config = config_of(fields)
    ours, stock = pair(config, dtype, backend)
    exact = copy.deepcopy(stock).float()
    x = torch.randn(4, 16, config.n_embd).to(dtype)
    # A near tie routes differently when LitGPT rounds the logits: leave such tokens out.
    logits = stock.gate(x).float().sort(dim=-1, descending=True).values
    x = x[logits[..., 1] - logits[..., 2] > 0.1].unsqueeze(0)
    assert x.size(1) > 30

    y, x_grad, grads = run(ours, x)
    y_stock, x_grad_stock, grads_stock = run(stock, x)
    y_exact, x_grad_exact, grads_exact = run(exact, x.float())

    assert y.dtype == x_grad.dtype == dtype
    outputs = {"y": (y, y_stock, y_exact), "x": (x_grad, x_grad_stock, x_grad_exact)}
    outputs |= {name: (grads[name], grads_stock[name], grads_exact[name]) for name in grads}
    for name, (value, value_stock, value_exact) in outputs.items():
        error, error_stock = (value - value_exact).norm(), (value_stock - value_exact).norm()
        assert error <= 1.2 * error_stock + torch.finfo(dtype).eps * value_exact.norm(), name


class MatrixProducts(TorchDispatchMode):
    """Notes the types that matrix products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "_grouped_mm", "loop_swiglu", "loop_multiply"):
            self.seen.append((func.overloadpacket.__name__, args[0].dtype))
        return func(*args, **(kwargs or {}))


@both_backends
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_autocast_computes_the_experts_in_its_type_and_the_router_in_fp32(bias: bool, backend: Backend) -> None:
    """grouped_mm is not registered for autocast: mixed precision would silently compute everything in fp32."""
    ours, stock = pair(config_of({"bias": bias}), backend=backend)
    x = torch.randn(2, 8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), MatrixProducts() as products:
        y, router = ours.forward_with_router(x)

    assert products.seen[0] in [("mm", torch.float32), ("addmm", torch.float32)]  # the router comes first
    assert {dtype for _, dtype in products.seen[1:]} == {torch.bfloat16}
    assert router.logits.dtype == router.weights.dtype == torch.float32
    assert torch.equal(router.logits, torch.nn.functional.linear(x.view(-1, 32), ours.gate.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_stock = stock(x)
    assert y.dtype == y_stock.dtype
    torch.testing.assert_close(y, y_stock, atol=0.02, rtol=0.02)


@both_backends
def test_mixed_precision_gradients_are_fp32_and_near_litgpts(backend: Backend) -> None:
    ours, stock = pair(config_of({}), backend=backend)
    x = torch.randn(2, 8, 32)
    _, x_grad, grads = run(ours, x, autocast=torch.bfloat16)
    _, x_grad_stock, grads_stock = run(stock, x, autocast=torch.bfloat16)
    torch.testing.assert_close(x_grad, x_grad_stock, atol=0.03, rtol=0.03)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, grads_stock[name], atol=0.03, rtol=0.03)


@both_backends
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_repeated_runs_give_the_same_bits(bias: bool, backend: Backend) -> None:
    config = config_of({"n_embd": 64, "moe_intermediate_size": 96, "bias": bias})
    ours, _ = pair(config, backend=backend)
    x = torch.randn(2, 64, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = run(ours, x)
        for _ in range(3):
            again = run(ours, x)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
            assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])
    finally:
        torch.set_num_threads(threads)


@both_backends
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_no_tokens_give_no_output_and_zero_gradients(bias: bool, backend: Backend) -> None:
    ours, _ = pair(config_of({"bias": bias}), backend=backend)
    y, x_grad, grads = run(ours, torch.randn(1, 0, 32))
    assert y.shape == x_grad.shape == (1, 0, 32)
    assert not any(grad.any() for grad in grads.values())


@both_backends
def test_the_gradient_of_a_sum_works(backend: Backend) -> None:
    """grouped_mm's own backward refuses the stride-0 gradient that ``y.sum()`` sends."""
    for fields in ({}, {"n_expert_per_token": 1}, {"bias": True}):
        ours, stock = pair(config_of(fields), backend=backend)
        x = torch.randn(2, 5, 32)
        ours(x).sum().backward()
        stock(x).sum().backward()
        torch.testing.assert_close(ours.gate.weight.grad, stock.gate.weight.grad)


def test_a_transposed_input_works() -> None:
    ours, stock = pair(config_of({}))
    x = torch.randn(5, 2, 32).transpose(0, 1)
    torch.testing.assert_close(ours(x), stock(x.contiguous()))


@pytest.mark.parametrize("backend", [None, "grouped_mm"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_shapes_on_the_meta_device(fields: dict, backend: Backend | None) -> None:
    config = config_of(fields)
    if backend == "grouped_mm" and config.n_embd % 4:
        config = config_of({**fields, "n_embd": 28, "moe_intermediate_size": 20})
    with torch.device("meta"):
        layer, x = MoE(config, backend), torch.empty(2, 5, config.n_embd, requires_grad=True)
        y, router = layer.forward_with_router(x)
        y.backward(torch.empty_like(y))
    assert y.shape == x.grad.shape == (2, 5, config.n_embd)
    assert router.logits.shape == (10, config.n_expert)
    assert router.weights.shape == router.indices.shape == (10, config.n_expert_per_token)
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


@both_backends
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("fields", [{"bias": True}, {**SIGMOID, "n_shared_expert": 1}], ids=["softmax", "sigmoid"])
def test_compiles_to_one_graph_whatever_the_routing(fields: dict, autocast: bool, backend: Backend) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    ours, _ = pair(config_of(fields), backend=backend)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.forward_with_router, backend=graphs, fullgraph=True)
    tolerance = dict(atol=0.03, rtol=0.03) if autocast else {}  # compiled bf16 rounds at other places
    for seed in range(3 if fields.get("bias") or autocast else 200):
        x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            x = x[:, :1].expand(-1, 6, -1).contiguous()  # everything to the same few experts
        results = []
        for forward in (compiled, ours.forward_with_router):
            ours.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y, router = forward(x)
            (y.square().sum() + router.logits.square().sum()).backward()
            results.append((y.detach(), router, gradients(ours)))
        (y, router, grads), (y_eager, router_eager, grads_eager) = results
        assert torch.equal(router.logits, router_eager.logits) and torch.equal(router.indices, router_eager.indices)
        torch.testing.assert_close(y, y_eager, **tolerance)
        for name, grad in grads.items():
            scale = grads_eager[name].abs().max().clamp(min=1e-3) if autocast else 1.0
            torch.testing.assert_close(grad / scale, grads_eager[name] / scale, **tolerance)
    assert graphs.frame_count == 1


@both_backends
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_activation_checkpointing_gives_the_same_gradients(bias: bool, backend: Backend) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, layer: MoE) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, router = checkpoint(self.layer.forward_with_router, x, use_reentrant=False)
            return y + router.logits.sum()

    ours, _ = pair(config_of({"bias": bias}), backend=backend)
    x = torch.randn(2, 6, 32)
    _, x_grad, grads = run(Checkpointed(ours), x)

    ours.zero_grad()
    x = x.requires_grad_()
    y, router = ours.forward_with_router(x)
    (y + router.logits.sum()).backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(x_grad, x.grad)
    for name, grad in gradients(ours).items():
        assert torch.equal(grads[f"layer.{name}"], grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_output(mode: type) -> None:
    ours, _ = pair(config_of({}))
    x = torch.randn(1, 1, 32)
    expected = ours(x).detach()
    with mode():
        y = ours(x)
    assert torch.equal(y, expected) and not y.requires_grad


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_expert": 0, "n_expert_per_token": 0}, "n_expert is 0"),
        ({"n_expert_per_token": 5}, "between 1 and 4"),
        ({"n_expert_per_token": 0}, "between 1 and 4"),
        ({"n_shared_expert": 1, "moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_an_impossible_config_is_refused(fields: dict, message: str) -> None:
    """LitGPT builds a model without a feed-forward from ``n_expert`` 0 and says nothing."""
    with pytest.raises(ValueError, match=message):
        MoE(config_of(fields))
