"""The layer against LitGPT's own: output, every gradient, every precision."""

import copy
import itertools
from collections.abc import Iterator

import litgpt.config
import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from litgpt import Config
from litgpt.model import LLaMAMLP
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from custom_moe import Backend, MoE, RouterOutput, backends
from custom_moe.experts import add_bias
from tests.helpers import SIGMOID_FIELDS, layer_gradients, moe_config, moe_pair, run_layer

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
    "sigmoid": {**SIGMOID_FIELDS, "n_expert": 8},
    "sigmoid, normalised, scaled": {
        **SIGMOID_FIELDS,
        "n_expert": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "sigmoid, odd sizes, shared": {
        **SIGMOID_FIELDS,
        "n_embd": 26,
        "moe_intermediate_size": 17,
        "n_expert": 6,
        "n_shared_expert": 1,
    },
}


# Triton's own tests are in test_triton.py.
ON_ANY_DEVICE = [name for name in backends.BACKENDS if name != "triton"]
every_backend = pytest.mark.parametrize("backend", ON_ANY_DEVICE)


@every_backend
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_litgpt(fields: dict, backend: Backend) -> None:
    config = moe_config(fields)
    if backend == "grouped_mm" and config.n_embd % 4:
        config = moe_config({**fields, "n_embd": 28, "moe_intermediate_size": 20})
    ours, stock = moe_pair(config, backend=backend)
    x = torch.randn(3, 7, config.n_embd)

    y, x_grad, grads = run_layer(ours, x)
    y_stock, x_grad_stock, grads_stock = run_layer(stock, x)

    torch.testing.assert_close(y, y_stock)
    torch.testing.assert_close(x_grad, x_grad_stock)
    assert list(grads) == list(grads_stock) == [name for name, _ in stock.named_parameters()]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_stock[name], msg=lambda text, name=name: f"{name}: {text}")
    assert any(grad.any() for grad in grads.values())


OWN_CONFIGS = [config["name"] for config in litgpt.config.configs if config.get("mlp_class_name") == "LLaMAMoE"]


@every_backend
@pytest.mark.parametrize("name", OWN_CONFIGS)
def test_equals_litgpt_on_each_of_its_models(name: str, backend: Backend) -> None:
    """Only the widths are shrunk: experts, routing and everything else are the model's."""
    widths = Config.from_name(name).moe_intermediate_size and {"moe_intermediate_size": 48}
    config = Config.from_name(name, n_layer=2, n_embd=32, head_size=8, intermediate_size=48, **(widths or {}))
    ours, stock = moe_pair(config, backend=backend)
    x = torch.randn(2, 17, 32)
    for value, value_stock in zip(run_layer(ours, x)[:2], run_layer(stock, x)[:2], strict=True):
        torch.testing.assert_close(value, value_stock)
    grads, grads_stock = layer_gradients(ours), layer_gradients(stock)
    assert len(grads) == 1 + 3 * config.n_expert
    for expert, grad in grads.items():
        torch.testing.assert_close(grad, grads_stock[expert], msg=lambda text, name=expert: f"{name}: {text}")


def test_one_expert_equals_a_dense_feed_forward() -> None:
    config = moe_config({"n_expert": 1, "n_expert_per_token": 1, "bias": True})
    moe, dense = MoE(config), LLaMAMLP(config, intermediate_size=48)
    weights = {f"experts.0.{key}": value for key, value in dense.state_dict().items()}
    moe.load_state_dict({"gate.weight": torch.randn(1, 32), **weights})
    x = torch.randn(2, 9, 32)

    y, x_grad, grads = run_layer(moe, x)
    y_dense, x_grad_dense, grads_dense = run_layer(dense, x)

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
def test_low_precision_is_as_exact_as_litgpt(dtype: torch.dtype, fields: dict, backend: Backend) -> None:
    config = moe_config(fields)
    ours, stock = moe_pair(config, dtype, backend)
    exact = copy.deepcopy(stock).float()
    x = torch.randn(4, 16, config.n_embd).to(dtype)
    # With rounded logits LitGPT routes near ties differently: leave such tokens out.
    logits = stock.gate(x).float().sort(dim=-1, descending=True).values
    x = x[logits[..., 1] - logits[..., 2] > 0.1].unsqueeze(0)
    assert x.size(1) > 30

    y, x_grad, grads = run_layer(ours, x)
    y_stock, x_grad_stock, grads_stock = run_layer(stock, x)
    y_exact, x_grad_exact, grads_exact = run_layer(exact, x.float())

    assert y.dtype == x_grad.dtype == dtype
    outputs = {"y": (y, y_stock, y_exact), "x": (x_grad, x_grad_stock, x_grad_exact)}
    outputs |= {name: (grads[name], grads_stock[name], grads_exact[name]) for name in grads}
    for name, (value, value_stock, value_exact) in outputs.items():
        error, error_stock = (value - value_exact).norm(), (value_stock - value_exact).norm()
        assert error <= 1.2 * error_stock + torch.finfo(dtype).eps * value_exact.norm(), name


class MatrixProducts(TorchDispatchMode):
    """Record the types of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "custom_moe" or func.overloadpacket.__name__ in ("mm", "addmm", "_grouped_mm"):
            self.seen.append((func.overloadpacket.__name__, args[0].dtype))
        return func(*args, **(kwargs or {}))


@every_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_autocast_experts_16_bit_router_fp32(bias: bool, backend: Backend) -> None:
    """grouped_mm is not registered for autocast: mixed precision would silently compute everything in fp32."""
    ours, stock = moe_pair(moe_config({"bias": bias}), backend=backend)
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


@every_backend
def test_mixed_precision_gradients_are_fp32(backend: Backend) -> None:
    ours, stock = moe_pair(moe_config({}), backend=backend)
    x = torch.randn(2, 8, 32)
    _, x_grad, grads = run_layer(ours, x, autocast=torch.bfloat16)
    _, x_grad_stock, grads_stock = run_layer(stock, x, autocast=torch.bfloat16)
    torch.testing.assert_close(x_grad, x_grad_stock, atol=0.03, rtol=0.03)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, grads_stock[name], atol=0.03, rtol=0.03)


@every_backend
def test_fp16_with_scaler_gives_fp32_gradients(backend: Backend) -> None:
    """Gradients too small for fp16 (below 6e-8) arrive because the loss is scaled."""
    ours, _ = moe_pair(moe_config({}), backend=backend)
    x, small = torch.randn(2, 8, 32), 1e-7
    (ours(x).square().sum() * small).backward()
    exact = layer_gradients(ours)
    ours.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=torch.float16):
        y = ours(x)
    scaler.scale(y.float().square().sum() * small).backward()
    scaler.unscale_(optimizer)
    for name, grad in layer_gradients(ours).items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad / small, exact[name] / small, atol=0.05, rtol=0.02)
    before = ours.gate.weight.clone()
    scaler.step(optimizer)  # finite: nothing was skipped
    scaler.update()
    assert scaler.get_scale() == 2.0**16 and torch.equal(ours.gate.weight, before)


def plain_layers(layer: MoE, x_NC: torch.Tensor, router: RouterOutput) -> torch.Tensor:
    """Compute the experts with plain operators, of which autograd keeps what it needs."""
    expert_S, order_S = router.experts.sort(stable=True)
    ends_E = torch.bincount(expert_S, minlength=layer.config.n_expert).cumsum(0).to(torch.int32)
    x_SC = x_NC[router.tokens[order_S]]
    h_SJ = F.grouped_mm(x_SC, layer.experts.fc_weight.transpose(1, 2), offs=ends_E)
    gate_SI, up_SI = h_SJ.chunk(2, dim=1)
    y_SC = F.grouped_mm(F.silu(gate_SI) * up_SI, layer.experts.proj_weight.transpose(1, 2), offs=ends_E)
    y_NKC = y_SC[order_S.argsort()].view(len(x_NC), layer.config.n_expert_per_token, -1)
    return (y_NKC * router.weights.view(len(x_NC), -1, 1)).sum(dim=1)


@every_backend
@pytest.mark.parametrize("sizes", [(96, 256, 8, 2), (96, 64, 32, 8), (64, 64, 32, 4)], ids=str)
def test_saved_bytes_at_most_60_percent_of_plain(sizes: tuple[int, int, int, int], backend: Backend) -> None:
    """Bytes kept for the backward, without the weights, at an eighth of the widths of the benchmark's sizes."""
    n_embd, width, n_expert, top_k = sizes
    fields = {"n_expert": n_expert, "n_expert_per_token": top_k, "moe_intermediate_size": width, "n_embd": n_embd}
    ours, _ = moe_pair(moe_config(fields), backend=backend)
    x_NC = torch.randn(512, n_embd, requires_grad=True)
    with torch.no_grad():
        router = ours.gate(x_NC)
    router = router._replace(weights=router.weights.requires_grad_())

    def kept(function) -> tuple[int, torch.Tensor]:
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = function()
        weights = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
        return sum(size for address, size in storages.items() if address not in weights), y

    bytes_ours, y_ours = kept(lambda: ours.experts(x_NC, router))
    bytes_plain, y_plain = kept(lambda: plain_layers(ours, x_NC, router))
    torch.testing.assert_close(y_ours, y_plain)
    assert bytes_ours <= 0.6 * bytes_plain


@every_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_repeated_runs_give_the_same_bits(bias: bool, backend: Backend) -> None:
    config = moe_config({"n_embd": 64, "moe_intermediate_size": 96, "bias": bias})
    ours, _ = moe_pair(config, backend=backend)
    x = torch.randn(2, 64, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = run_layer(ours, x)
        for _ in range(3):
            again = run_layer(ours, x)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
            assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])
    finally:
        torch.set_num_threads(threads)


@every_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_no_tokens_give_zero_gradients(bias: bool, backend: Backend) -> None:
    ours, _ = moe_pair(moe_config({"bias": bias}), backend=backend)
    y, x_grad, grads = run_layer(ours, torch.randn(1, 0, 32))
    assert y.shape == x_grad.shape == (1, 0, 32)
    assert not any(grad.any() for grad in grads.values())
    assert all(parameter.grad is not None for parameter in ours.parameters())  # DDP would wait for a missing one


@every_backend
def test_gradient_with_stride_zero(backend: Backend) -> None:
    """``y.sum()`` sends a gradient of stride 0, which the backward of grouped_mm rejects."""
    for fields in ({}, {"n_expert_per_token": 1}, {"bias": True}):
        ours, stock = moe_pair(moe_config(fields), backend=backend)
        x = torch.randn(2, 5, 32)
        ours(x).sum().backward()
        stock(x).sum().backward()
        for name, grad in layer_gradients(ours).items():
            torch.testing.assert_close(
                grad, layer_gradients(stock)[name], msg=lambda text, name=name: f"{name}: {text}"
            )


class _AtomicAdds(TorchDispatchMode):
    """``index_add_`` of 16 bits as CUDA's atomic additions compute it: the sum is rounded after each row."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_add" not in func.__name__ or args[0].dtype.itemsize > 2:
            return func(*args, **(kwargs or {}))
        total, _, index, rows = args
        total = total if func.__name__.startswith("index_add_.") else total.clone()
        for row in range(len(rows)):
            total[index[row]] += rows[row]
        return total


@every_backend
def test_bias_gradients_are_summed_in_fp32(backend: Backend) -> None:
    generator, ends = torch.Generator().manual_seed(0), [2000, 2000, 2990, 3000]
    grad = (torch.randn(3000, 16, generator=generator) + 0.5).bfloat16()
    exact = torch.stack([part.double().sum(0) for part in grad.tensor_split(ends[:-1])])
    errors = []
    for adding in (
        lambda y, bias: y + bias.index_select(0, torch.arange(4).repeat_interleave(torch.tensor([2000, 0, 990, 10]))),
        lambda y, bias: add_bias(y, bias, torch.tensor(ends, dtype=torch.int32), backend),
    ):
        bias = torch.zeros(4, 16, dtype=torch.bfloat16, requires_grad=True)
        with _AtomicAdds():
            adding(torch.zeros_like(grad), bias).backward(grad)
        assert bias.grad is not None
        errors.append(float((bias.grad.double() - exact).norm() / exact.norm()))
    assert errors[0] > 0.1, "what index_select's gradient would be on a GPU"
    assert errors[1] < 2**-8, "one rounding to bf16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_is_summed_by_index(dtype: torch.dtype) -> None:
    """On a GPU such sums are atomic additions, in 16 bits and in another order on each run."""
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.__name__)
            return func(*args, **(kwargs or {}))

    for fields in CASES.values():
        layer = MoE(moe_config(fields)).to(dtype)
        x = torch.randn(2, 9, layer.config.n_embd, dtype=dtype, requires_grad=True)
        with Names():
            layer(x).sum().backward()
    by_index = {name for name in seen if any(kind in name for kind in ("index_add", "index_put", "embedding_dense"))}
    assert not by_index and seen


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_experts_get_no_gradient(dtype: torch.dtype, backend: Backend) -> None:
    """As with LoRA on the attention only: no product is computed for them, and no memory is allocated."""
    ours, stock = moe_pair(moe_config({}), dtype, backend)
    for layer in (ours, stock):
        layer.experts.requires_grad_(False)
    x = torch.randn(3, 30, 32).to(dtype)

    class Shapes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[torch.Size] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.namespace == "custom_moe" or func.overloadpacket.__name__ == "_grouped_mm":
                self.seen |= {r.shape for r in torch.utils._pytree.tree_leaves(result)}
            return result

    with Shapes() as shapes:
        _, x_grad, _ = run_layer(ours, x)
    assert shapes.seen and not shapes.seen & {ours.experts.fc_weight.shape, ours.experts.proj_weight.shape}
    assert all(parameter.grad is None for parameter in ours.experts.parameters())
    _, x_grad_stock, _ = run_layer(stock, x)
    tolerance = {} if dtype == torch.float32 else dict(atol=0.03, rtol=0.03)
    torch.testing.assert_close(x_grad, x_grad_stock, **tolerance)
    torch.testing.assert_close(ours.gate.weight.grad, stock.gate.weight.grad, **tolerance)


def test_blocks_and_padding_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that there are many; more than 64 tokens, so that bf16 is padded."""
    config = moe_config({"n_expert": 7, "n_expert_per_token": 3})
    x = torch.randn(2, 70, 32)
    for dtype, tolerance in ((torch.float32, {}), (torch.bfloat16, dict(atol=0.05, rtol=0.05))):
        results = []
        for size in (800, 2**20):
            monkeypatch.setattr(backends, "BLOCK_SIZE", size)
            results.append(run_layer(moe_pair(config, dtype)[0], x.to(dtype)))
        for first, second in zip(results[0][:2], results[1][:2], strict=True):
            assert torch.equal(first, second)
        assert all(torch.equal(results[0][2][name], grad) for name, grad in results[1][2].items())
        y, x_grad, grads = run_layer(moe_pair(config, dtype, "grouped_mm")[0], x.to(dtype))
        torch.testing.assert_close(results[0][:2], (y, x_grad), **tolerance)
        for name, grad in grads.items():
            scale = grad.float().abs().max()
            torch.testing.assert_close(results[0][2][name] / scale, grad / scale, **tolerance)


def test_transposed_input() -> None:
    ours, stock = moe_pair(moe_config({}))
    x = torch.randn(5, 2, 32).transpose(0, 1)
    torch.testing.assert_close(ours(x), stock(x.contiguous()))


@pytest.mark.parametrize("backend", [None, *ON_ANY_DEVICE])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_shapes_on_the_meta_device(fields: dict, backend: Backend | None) -> None:
    config = moe_config(fields)
    if backend == "grouped_mm" and config.n_embd % 4:
        config = moe_config({**fields, "n_embd": 28, "moe_intermediate_size": 20})
    with torch.device("meta"):
        layer, x = MoE(config, backend), torch.empty(2, 5, config.n_embd, requires_grad=True)
        y, router = layer.forward_with_router(x)
        y.backward(torch.empty_like(y))
    assert y.shape == x.grad.shape == (2, 5, config.n_embd)
    assert router.logits.shape == (10, config.n_expert)
    assert router.weights.shape == router.tokens.shape == (10 * config.n_expert_per_token,)
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


def compiled_cases() -> Iterator[ParameterSet]:
    """All combinations. Half of them are quick: each pair of options is among those."""
    routers = {"softmax": {"bias": True}, "sigmoid": {**SIGMOID_FIELDS, "n_shared_expert": 1}}
    for router, autocast, backend in itertools.product(routers, [False, True], ON_ANY_DEVICE):
        is_quick = (router == "sigmoid") ^ autocast ^ (backend == "grouped_mm")
        name = f"{router}-{'bf16-mixed' if autocast else 'fp32'}-{backend}"
        marks = [] if is_quick else [pytest.mark.slow]
        yield pytest.param(routers[router], autocast, backend, id=name, marks=marks)


@pytest.mark.parametrize(("fields", "autocast", "backend"), list(compiled_cases()))
def test_compiles_to_one_graph_for_any_routing(fields: dict, autocast: bool, backend: Backend) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    ours, _ = moe_pair(moe_config(fields), backend=backend)
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
            results.append((y.detach(), router, layer_gradients(ours)))
        (y, router, grads), (y_eager, router_eager, grads_eager) = results
        assert torch.equal(router.logits, router_eager.logits) and torch.equal(router.tokens, router_eager.tokens)
        torch.testing.assert_close(y, y_eager, **tolerance)
        for name, grad in grads.items():
            scale = grads_eager[name].abs().max().clamp(min=1e-3) if autocast else 1.0
            torch.testing.assert_close(grad / scale, grads_eager[name] / scale, **tolerance)
    assert graphs.frame_count == 1


@every_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_activation_checkpointing_keeps_gradients(bias: bool, backend: Backend) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, layer: MoE) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, router = checkpoint(self.layer.forward_with_router, x, use_reentrant=False)
            return y + router.logits.sum()

    ours, _ = moe_pair(moe_config({"bias": bias}), backend=backend)
    x = torch.randn(2, 6, 32)
    _, x_grad, grads = run_layer(Checkpointed(ours), x)

    ours.zero_grad()
    x = x.requires_grad_()
    y, router = ours.forward_with_router(x)
    (y + router.logits.sum()).backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(x_grad, x.grad)
    for name, grad in layer_gradients(ours).items():
        assert torch.equal(grads[f"layer.{name}"], grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_output(mode: type) -> None:
    ours, _ = moe_pair(moe_config({}))
    x = torch.randn(1, 1, 32)
    expected = ours(x).detach()
    with mode():
        y = ours(x)
    assert torch.equal(y, expected) and not y.requires_grad


@pytest.mark.parametrize("name", [name for name in CASES if "bias" not in name])
@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.inference_mode()
def test_for_inference_equals_the_layer(name: str, rows: int) -> None:
    ours, _ = moe_pair(moe_config({"n_expert": 8, **CASES[name]}))
    x = torch.randn(rows, 1, ours.config.n_embd)
    torch.testing.assert_close(ours.for_inference()(x), ours(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_for_inference_in_bf16_and_under_autocast() -> None:
    ours, _ = moe_pair(moe_config({"n_expert": 8, "n_shared_expert": 1}), torch.bfloat16)
    x = torch.randn(3, 1, 32).bfloat16()
    y = ours.for_inference()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, ours(x), atol=2e-2, rtol=2e-2)
    ours, _ = moe_pair(moe_config({"n_expert": 8}))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.for_inference()(x.float()), ours(x.float()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_expert": 0, "n_expert_per_token": 0}, "n_expert is 0"),
        ({"n_expert_per_token": 5}, "between 1 and 4"),
        ({"n_expert_per_token": 0}, "between 1 and 4"),
        ({"n_shared_expert": 1, "moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_impossible_config_raises(fields: dict, message: str) -> None:
    """LitGPT accepts ``n_expert`` 0 and builds a model without a feed-forward."""
    with pytest.raises(ValueError, match=message):
        MoE(moe_config(fields))
