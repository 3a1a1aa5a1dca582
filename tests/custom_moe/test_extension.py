"""A new router is one class and a new backend one table entry: two that the package does not have."""

import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor

from custom_moe import MoE, Router, RouterOutput, backends, use_custom_moe
from custom_moe.router import linear_fp32
from litmoe.layers import use_fast_layers
from litmoe.train.model import PretrainingModel, moe_layers, update_selection_biases
from tests.helpers import layer_gradients, moe_config, moe_pair, run_layer


class ExpertChoice(Router):
    """Each expert chooses its tokens, so a token has any number of experts (arXiv 2202.09368)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.steps = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.2)

    def forward(self, x_NC: Tensor) -> RouterOutput:
        logits_NE = linear_fp32(x_NC, self.weight)
        N, E = logits_NE.shape
        capacity = N * self.config.n_expert_per_token // E
        weights_EM, tokens_EM = logits_NE.softmax(dim=1).t().topk(capacity, dim=1)
        experts_S = torch.arange(E, device=x_NC.device).repeat_interleave(capacity)
        return RouterOutput(logits_NE, weights_EM.flatten(), experts_S, tokens_EM.flatten())

    def update_balance(self, counts_E: Tensor, rate: float | Tensor) -> None:
        self.steps += 1


def expert_choice_by_hand(layer: MoE, x_NC: Tensor) -> Tensor:
    """Compute the layer one expert and one token at a time."""
    y_NC = torch.zeros_like(x_NC)
    scores_NE = (x_NC @ layer.gate.weight.t()).softmax(dim=1)
    capacity = len(x_NC) * layer.config.n_expert_per_token // layer.config.n_expert
    for expert in range(layer.config.n_expert):
        gate, up = layer.experts.fc_weight[expert].chunk(2)
        for token in scores_NE[:, expert].topk(capacity).indices.tolist():
            hidden = torch.nn.functional.silu(gate @ x_NC[token]) * (up @ x_NC[token])
            y_NC[token] += scores_NE[token, expert] * (layer.experts.proj_weight[expert] @ hidden)
    return y_NC


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("bias", [False, True])
def test_expert_choice_equals_a_loop_by_hand(backend: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = MoE(moe_config({"n_expert": 6, "bias": bias}), backend, router=ExpertChoice)
    x = torch.randn(1, 30, 32)
    assert layer.gate(x[0]).tokens.bincount(minlength=30).unique().numel() > 2, "tokens have 0, 1, 2 ... experts"
    by_hand = expert_choice_by_hand(layer, x[0])
    torch.testing.assert_close(layer(x)[0], by_hand, atol=1e-5, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(layer.for_inference()(x[:, :3]), layer(x[:, :3]), atol=1e-5, rtol=1e-4)
        assert not layer.for_inference()(x[:, :1]).any(), "with fewer tokens than experts, no expert takes one"

    weights = torch.randn_like(by_hand)
    (layer(x)[0] * weights).sum().backward()
    found = layer_gradients(layer)
    layer.zero_grad()
    (expert_choice_by_hand(layer, x[0]) * weights).sum().backward()
    for name, expected in layer_gradients(layer).items():
        if "bias" not in name:  # by hand there are none, and they start at 0
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4, msg=name)


def test_expert_choice_trains_a_model(moe_fields: dict) -> None:
    """Losses, masks, statistics, bias update and bf16 (padded rows) with a router that has no ``(N, K)``."""
    torch.manual_seed(0)
    with use_custom_moe(router=ExpertChoice), use_custom_moe(), use_fast_layers():
        gpt = GPT(Config(**moe_fields))
    assert all(isinstance(layer.gate, ExpertChoice) for layer in moe_layers(gpt))
    model = PretrainingModel(gpt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 384, (4, 33))
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            step = model(ids[:, :-1], ids[:, 1:], lengths=torch.tensor([32, 32, 20, 32]))
        (step.cross_entropy + 0.01 * step.load_balancing + 0.001 * step.z_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_selection_biases(gpt, step.expert_counts, 0.001)
        losses.append(step.cross_entropy.item())
    assert losses[-1] < losses[0] - 0.5
    assert step.expert_counts.shape == (2, 4)
    assert step.expert_counts.sum() < 2 * 4 * 64, "assignments of padding do not count"
    assert all(layer.gate.steps == 8 for layer in moe_layers(gpt))


class Naive(backends.ExpertBackend):
    """Each row on its own."""

    def multiply(self, x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_R: Tensor | None = None) -> Tensor:
        x_RC = x_NC if rows_R is None else x_NC[rows_R]
        experts_R = torch.searchsorted(ends_E, torch.arange(len(x_RC)), right=True)
        return torch.einsum("roc,rc->ro", weight_EOC[experts_R], x_RC)

    def weight_gradient(
        self,
        grad_NO: Tensor,
        x_NC: Tensor,
        ends_E: Tensor,
        grad_rows_R: Tensor | None = None,
        x_rows_R: Tensor | None = None,
    ) -> Tensor:
        grad_RO = grad_NO if grad_rows_R is None else grad_NO[grad_rows_R]
        x_RC = x_NC if x_rows_R is None else x_NC[x_rows_R]
        experts_R = torch.searchsorted(ends_E, torch.arange(len(x_RC)), right=True)
        one_hot_RE = torch.nn.functional.one_hot(experts_R, len(ends_E)).to(x_RC.dtype)
        return torch.einsum("re,ro,rc->eoc", one_hot_RE, grad_RO, x_RC)


@pytest.mark.parametrize("bias", [False, True])
def test_new_backend_equals_litgpt(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setitem(backends.BACKENDS, "naive", Naive())
    ours, stock = moe_pair(moe_config({"bias": bias}), backend="naive")
    x = torch.randn(2, 9, 32)
    y, x_grad, grads = run_layer(ours, x)
    y_stock, x_grad_stock, grads_stock = run_layer(stock, x)
    torch.testing.assert_close(y, y_stock)
    torch.testing.assert_close(x_grad, x_grad_stock)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_stock[name], msg=name)
