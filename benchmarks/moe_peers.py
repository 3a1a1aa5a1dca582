"""The mixture-of-experts layers that benchmarks/moe_layer.py compares, all built from LitGPT's weights.

Shape suffixes: S assignments of tokens to experts, sorted by expert.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from litgpt import Config
from litgpt.model import LLaMAMLP, LLaMAMoE
from torch import Tensor, nn

from custom_moe import MoE

Size = tuple[int, int, int, int]  # n_embd, expert width, experts, experts per token
Builder = Callable[[dict[str, Tensor]], nn.Module]  # from LitGPT's state dict

GPU_ONLY = ("ours: triton", "Liger-Kernel")


def litgpt_config(size: Size) -> Config:
    n_embd, width, n_expert, n_expert_per_token = size
    return Config(
        mlp_class_name="LLaMAMoE",
        norm_class_name="RMSNorm",
        bias=False,
        n_layer=1,
        n_head=1,
        n_embd=n_embd,
        moe_intermediate_size=width,
        n_expert=n_expert,
        n_expert_per_token=n_expert_per_token,
    )


def layer_builders(size: Size) -> dict[str, Builder]:
    """Return the layers by name. The parameters of each layer are in the order gate, fc, proj.

    To add a layer: write a function like ``plain_grouped`` below and a line here.
    """
    config = litgpt_config(size)

    def ours(**kwargs: Any) -> Builder:
        return lambda weights: load(MoE(config, **kwargs), weights)

    def peer(compute: Callable[..., Tensor]) -> Builder:
        return lambda weights: Peer(compute, weights, config)

    return {
        # The first one is the reference of all ratios.
        "LitGPT": lambda weights: load(LLaMAMoE(config), weights),
        "LitGPT compiled": lambda weights: torch.compile(load(LLaMAMoE(config), weights)),
        # The layer chooses its backend by the hardware; the others say what the choice is worth.
        "ours": ours(),
        "ours: grouped_mm": ours(backend="grouped_mm"),
        "ours: triton": ours(backend="triton"),
        "ours: loop": ours(backend="loop"),
        "ours compiled": lambda weights: torch.compile(ours()(weights)),
        "Hugging Face eager": lambda weights: hugging_face("eager", weights, config),
        "Hugging Face grouped_mm": lambda weights: hugging_face("grouped_mm", weights, config),
        "plain grouped_mm": peer(plain_grouped),
        "Liger-Kernel": peer(liger),
        # As many operations per token and nothing to route: the limit.
        "dense": lambda weights: LLaMAMLP(config, intermediate_size=size[1] * size[3]),
    }


def load(layer: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    layer.load_state_dict(weights)
    return layer


def stacked_weights(weights: dict[str, Tensor], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Stack tensors with LitGPT's names: gate ``(E, C)``, gate above up ``(E, 2I, C)``, down ``(E, C, I)``."""
    fc, proj = [], []
    # One product for gate and up: this is the layout of Hugging Face, Liger-Kernel and our own layer.
    for expert in range(config.n_expert):
        gate_and_up = [weights[f"experts.{expert}.{name}.weight"] for name in ("fc_1", "fc_2")]
        fc.append(torch.cat(gate_and_up))
        proj.append(weights[f"experts.{expert}.proj.weight"])
    return weights["gate.weight"], torch.stack(fc), torch.stack(proj)


def hugging_face(implementation: str, weights: dict[str, Tensor], config: Config) -> nn.Module:
    """Return the Mixtral block of transformers."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    mixtral_config = MixtralConfig(
        hidden_size=config.n_embd,
        intermediate_size=config.moe_intermediate_size,
        num_local_experts=config.n_expert,
        num_experts_per_tok=config.n_expert_per_token,
        experts_implementation=implementation,
    )
    names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    return load(MixtralSparseMoeBlock(mixtral_config), dict(zip(names, stacked_weights(weights, config), strict=True)))


class Peer(nn.Module):
    """A function of another library with stacked weights."""

    def __init__(self, compute: Callable[..., Tensor], weights: dict[str, Tensor], config: Config) -> None:
        super().__init__()
        # Copies, because all layers of a case are built from the same tensors.
        self.gate, self.fc, self.proj = (nn.Parameter(tensor.clone()) for tensor in stacked_weights(weights, config))
        self.compute, self.k = compute, config.n_expert_per_token

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.flatten(0, 1), self.gate, self.fc, self.proj, self.k).view_as(x)


def route(x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """LitGPT's router. Return weights and experts, both ``(N, K)``."""
    logits, indices = F.linear(x, gate).topk(k)
    return logits.softmax(dim=1, dtype=torch.float).to(x.dtype), indices


def plain_grouped(x: Tensor, gate: Tensor, fc: Tensor, proj: Tensor, k: int) -> Tensor:
    """The shortest grouped layer, with plain autograd: the reference for our activation memory."""
    weights, indices = route(x, gate, k)
    # Sort the assignments by expert, so that each expert's rows are adjacent.
    expert_S, order_S = indices.flatten().sort(stable=True)
    experts = torch.arange(len(gate), device=x.device)
    ends = torch.searchsorted(expert_S, experts, right=True, out_int32=True)
    gates, up = F.grouped_mm(x[order_S // k], fc.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y_S = F.grouped_mm(F.silu(gates) * up, proj.transpose(1, 2), offs=ends)
    # Back into the order of the tokens, then the weighted sum over the K experts of each.
    return (y_S[order_S.argsort()].view(-1, k, x.size(1)) * weights.unsqueeze(-1)).sum(dim=1)


def liger(x: Tensor, gate: Tensor, fc: Tensor, proj: Tensor, k: int) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    weights, indices = route(x, gate, k)
    return LigerFusedMoEFunction.apply(x, fc, proj, indices.int(), weights)
