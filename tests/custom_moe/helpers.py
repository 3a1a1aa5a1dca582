"""What the tests of ``custom_moe`` share: configs, and pairs of layers with the same random weights."""

import copy

import torch
from litgpt import Config
from litgpt.model import LLaMAMoE
from torch import Tensor, nn

from custom_moe import MoE

SIGMOID = dict(n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
SIZES = dict(n_layer=2, n_embd=32, n_head=2, moe_intermediate_size=48, n_expert=4, n_expert_per_token=2, bias=False)


def config_of(fields: dict) -> Config:
    return Config(**{**SIZES, "mlp_class_name": "LLaMAMoE", "norm_class_name": "RMSNorm", **fields})


def pair(config: Config, dtype: torch.dtype = torch.float32, backend: str | None = None) -> tuple[MoE, LLaMAMoE]:
    """Return our layer and LitGPT's with the same random values in every parameter and buffer, biases too."""
    torch.manual_seed(0)
    ours, stock = MoE(config, backend), LLaMAMoE(config)
    values = {key: torch.randn(value.shape) / value.shape[-1] ** 0.5 for key, value in stock.state_dict().items()}
    ours.load_state_dict(values)
    stock.load_state_dict(values)
    return ours.to(dtype), stock.to(dtype)


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's gradient under LitGPT's name: the state dict of a copy with gradients as its values."""
    holder = copy.deepcopy(layer)
    for parameter, source in zip(holder.parameters(), layer.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    state = holder.state_dict()
    return {name: state[name] for name in state if "e_score_correction_bias" not in name}


def run(layer: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return output, input gradient and parameter gradients for a fixed random gradient of the output."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad, gradients(layer)
