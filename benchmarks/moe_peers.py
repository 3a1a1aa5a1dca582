"""One mixture-of-experts layer in the versions that benchmarks/moe_layer.py compares, all with LitGPT's weights.

Suffix S: assignments of tokens to experts, sorted by expert.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from litgpt import Config
from litgpt.model import LLaMAMLP, LLaMAMoE
from torch import Tensor, nn

from custom_moe import MoE

Size = tuple[int, int, int, int]
"""n_embd, an expert's width, experts, experts per token"""


def config_of(size: Size) -> Config:
    n_embd, width, n_expert, k = size
    names = dict(mlp_class_name="LLaMAMoE", norm_class_name="RMSNorm", bias=False, n_layer=1, n_head=1)
    return Config(**names, n_embd=n_embd, moe_intermediate_size=width, n_expert=n_expert, n_expert_per_token=k)


def layers(size: Size) -> dict[str, Callable[[dict[str, Tensor]], nn.Module]]:
    """Name -> what builds the layer from LitGPT's state dict; the parameters are in the order gate, fc, proj."""
    config = config_of(size)

    def ours(**kwargs: Any) -> Callable[[dict[str, Tensor]], nn.Module]:
        return lambda values: loaded(MoE(config, **kwargs), values)

    def peer(compute: Callable[..., Tensor]) -> Callable[[dict[str, Tensor]], nn.Module]:
        return lambda values: Peer(compute, values, config)

    return {
        "LitGPT": lambda values: loaded(LLaMAMoE(config), values),
        "LitGPT compiled": lambda values: torch.compile(loaded(LLaMAMoE(config), values)),
        "ours": ours(),
        "ours: grouped_mm": ours(backend="grouped_mm"),
        "ours: triton": ours(backend="triton"),
        "ours: loop": ours(backend="loop"),
        "ours compiled": lambda values: torch.compile(ours()(values)),
        "Hugging Face eager": lambda values: hugging_face("eager", values, config),
        "Hugging Face grouped_mm": lambda values: hugging_face("grouped_mm", values, config),
        "plain grouped_mm": peer(plain_grouped),
        "Liger-Kernel": peer(liger),
        "scattermoe": peer(scattermoe),
        "sonic-moe": peer(sonic),
        "dense": lambda values: LLaMAMLP(config, intermediate_size=size[1] * size[3]),
    }


GPU_ONLY = ("ours: triton", "Liger-Kernel", "scattermoe", "sonic-moe")


def loaded(layer: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    layer.load_state_dict(values)
    return layer


def stacked(values: dict[str, Tensor], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Gate ``(E, C)``, gate above up ``(E, 2I, C)`` and down ``(E, C, I)`` from tensors under LitGPT's names."""
    experts = [f"experts.{number}" for number in range(config.n_expert)]
    fc = torch.stack([torch.cat([values[f"{name}.fc_1.weight"], values[f"{name}.fc_2.weight"]]) for name in experts])
    return values["gate.weight"], fc, torch.stack([values[f"{name}.proj.weight"] for name in experts])


def hugging_face(implementation: str, values: dict[str, Tensor], config: Config) -> nn.Module:
    """transformers' Mixtral block."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    theirs = MixtralConfig(
        hidden_size=config.n_embd,
        intermediate_size=config.moe_intermediate_size,
        num_local_experts=config.n_expert,
        num_experts_per_tok=config.n_expert_per_token,
        experts_implementation=implementation,
    )
    names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    return loaded(MixtralSparseMoeBlock(theirs), dict(zip(names, stacked(values, config), strict=True)))


class Peer(nn.Module):
    """A function of others around stacked weights. Under autocast it gets what a linear layer would compute with."""

    def __init__(self, compute: Callable[..., Tensor], values: dict[str, Tensor], config: Config) -> None:
        super().__init__()
        self.gate, self.fc, self.proj = (nn.Parameter(weight.clone()) for weight in stacked(values, config))
        self.compute, self.k = compute, config.n_expert_per_token

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x.flatten(0, 1), self.gate, self.fc, self.proj)
        if torch.is_autocast_enabled(x.device.type):
            tensors = tuple(tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in tensors)
        return self.compute(*tensors, self.k).view_as(x).to(x.dtype)


def choose(x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """LitGPT's router: weights and experts, both ``(N, K)``."""
    logits, indices = F.linear(x, gate).topk(k)
    return logits.softmax(dim=1, dtype=torch.float).to(x.dtype), indices


def plain_grouped(x: Tensor, gate: Tensor, fc: Tensor, proj: Tensor, k: int) -> Tensor:
    """The shortest grouped layer, by plain autograd: what our activation memory is held against."""
    weights, indices = choose(x, gate, k)
    expert_S, order_S = indices.flatten().sort(stable=True)
    experts = torch.arange(len(gate), device=x.device)
    ends = torch.searchsorted(expert_S, experts, right=True, out_int32=True)
    gates, up = F.grouped_mm(x[order_S // k], fc.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y_S = F.grouped_mm(F.silu(gates) * up, proj.transpose(1, 2), offs=ends)
    return (y_S[order_S.argsort()].view(-1, k, x.size(1)) * weights.unsqueeze(-1)).sum(dim=1)


def liger(x: Tensor, gate: Tensor, fc: Tensor, proj: Tensor, k: int) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    weights, indices = choose(x, gate, k)
    return LigerFusedMoEFunction.apply(x, fc, proj, indices.int(), weights)


def scattermoe(x: Tensor, gate: Tensor, fc: Tensor, proj: Tensor, k: int) -> Tensor:
    from scattermoe import flatten_sort_count, parallel_linear

    weights, indices = choose(x, gate, k)
    places = flatten_sort_count(indices, num_experts=len(gate))
    gates, up = parallel_linear(x, fc.transpose(1, 2), k, *places, grouped_out=True).chunk(2, dim=-1)
    return parallel_linear(F.silu(gates) * up, proj.transpose(1, 2), 1, *places, grouped_in=True, gates=weights)


def sonic(x: Tensor, gate: Tensor, fc: Tensor, proj: Tensor, k: int) -> Tensor:
    from sonicmoe import moe_TC_softmax_topk_layer

    weights = (fc.permute(1, 2, 0), None, proj.permute(1, 2, 0), None)
    stream = torch.cuda.current_stream().cuda_stream
    return moe_TC_softmax_topk_layer(x, gate, *weights, k, stream, "swiglu", concat_layout=True)[0]
