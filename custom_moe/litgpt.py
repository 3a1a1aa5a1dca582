"""Everything that meets LitGPT: the layer, the transformer block, LoRA, and the context manager that builds models.

Shape suffixes: see ``custom_moe``. ``B`` batch size, ``T`` sequence length, ``R`` in LoRA the rank.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

# The adapters have subclasses of LitGPT's layer. Imported later, within `use_custom_moe`, these would be subclasses of
# the layer here for the rest of the process.
import litgpt.adapter
import litgpt.adapter_v2
import litgpt.lora
import litgpt.model
import torch
from litgpt import Config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from custom_moe.backends import choose_backend
from custom_moe.experts import Experts, grouped_linear
from custom_moe.router import Router, RouterOutput, TopKRouter, router_for, without_autocast

MakeRouter = Callable[[Config], Router]
"""A subclass of ``Router``, or a function that makes one"""


# ----------------------------------------------------------------------------------------------------------- the layer


class MoE(nn.Module):
    """Drop-in for ``litgpt.model.LLaMAMoE``: the same config, result and keys of the state dict.

    Unlike LitGPT's, it routes in fp32 whatever the precision of the model, computes all experts as one function, has no
    token-dependent control flow (one graph under ``torch.compile``), and initializes itself.

    Args:
        config: LitGPT's.
        backend: how the experts are computed (``custom_moe.backends``); None chooses by hardware.
        router: makes the router; by default the one that the config describes.

    Raises:
        ValueError: the config has no experts (if LitGPT's block would not replace the layer by a dense one), or more
            experts per token than experts.
    """

    def __init__(self, config: Config, backend: str | None = None, router: MakeRouter = router_for) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.gate = router(config)
        self.experts = Experts(**_expert_sizes(config))
        self.experts.backend = backend
        self.shared_experts: nn.Module | None = None
        if config.n_shared_expert:
            width = config.moe_intermediate_size * config.n_shared_expert
            self.shared_experts = litgpt.model.LLaMAMLP(config, intermediate_size=width)
        # LitGPT's pretraining initializes too, but a layer may be used without it.
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as ``litgpt.pretrain.initialize_weights``, which does not know the stacked parameters.

        ``gate``, ``fc_1``, ``fc_2`` are N(0, sqrt(2/5/n_embd)), ``proj`` is N(0, 1/sqrt(n_embd)/n_layer), biases are 0.
        """
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is None:
            return
        std_in = (2.0 / 5 / self.config.n_embd) ** 0.5
        std_out = 1 / self.config.n_embd**0.5 / self.config.n_layer
        for name, std in (("fc_1", std_in), ("fc_2", std_in), ("proj", std_out)):
            linear = getattr(self.shared_experts, name)
            nn.init.normal_(linear.weight, mean=0.0, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: ``(B, T, C) -> (B, T, C)``."""
        return self.forward_with_router(x)[0]

    def forward_with_router(self, x: Tensor) -> tuple[Tensor, RouterOutput]:
        """Return the layer's output ``(B, T, C)``, and the assignments of its ``N = B * T`` tokens."""
        x_NC = x.flatten(0, -2)  # (B, T, C) -> (N, C)
        router: RouterOutput = self.gate(x_NC)
        y = self.experts(x_NC, router).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, router

    def for_inference(self) -> Callable[[Tensor], Tensor]:
        """Return ``forward`` without gradients, as a function for steps of few tokens."""
        route, run_experts, shared_experts = self.gate.forward, self.experts.for_inference(), self.shared_experts

        def forward(x: Tensor) -> Tensor:
            x_NC = x.flatten(0, -2)  # (B, T, C) -> (N, C)
            y = run_experts(x_NC, route(x_NC)).view_as(x)
            return y if shared_experts is None else y + shared_experts(x)

        return forward


def set_backend(module: nn.Module, backend: str | None) -> None:
    """Set how all MoE layers within ``module`` compute their experts; None chooses by hardware.

    Whether the backend works is checked in ``forward``, because it depends on the type and the device of the input.
    """
    for layer in module.modules():
        if isinstance(layer, Experts):
            layer.backend = backend


def _expert_sizes(config: Config) -> dict[str, Any]:
    return {
        "n_expert": config.n_expert,
        "n_embd": config.n_embd,
        "intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "n_layer": config.n_layer,
        "bias": config.bias,
    }


def _check(config: Config) -> None:
    """Raise for a config that LitGPT accepts although it can't work, such as ``n_expert`` 0."""
    # LitGPT's block makes this layer first, and then replaces it by a dense one. MoEBlock checks those that stay.
    if config.first_k_dense_replace and config.n_expert == 0:
        return
    if config.n_expert < 1:
        raise ValueError(f"mlp_class_name is LLaMAMoE but n_expert is {config.n_expert}; set n_expert to 1 or more.")
    if not 1 <= config.n_expert_per_token <= config.n_expert:
        raise ValueError(
            f"n_expert_per_token is {config.n_expert_per_token}; with n_expert {config.n_expert} it must be "
            f"between 1 and {config.n_expert}."
        )
    if config.n_shared_expert and not config.moe_intermediate_size:
        raise ValueError("n_shared_expert needs moe_intermediate_size, the width of one shared expert; set it.")


# ----------------------------------------------------------------------------------------------------------- the block


_StockMoE = litgpt.model.LLaMAMoE


class MoEBlock(litgpt.model.Block):  # type: ignore[misc]  # litgpt is not typed
    """``litgpt.model.Block`` that can return the router's output. The first ``first_k_dense_replace`` are dense."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        if isinstance(self.mlp, _StockMoE):
            # It would return no router output, and the balance losses would silently be zero.
            raise TypeError("this block has LitGPT's own LLaMAMoE; build it within `with use_custom_moe():`.")
        if isinstance(self.mlp, MoE) and config.n_expert == 0:
            raise ValueError(f"layer {block_idx} is a mixture of experts but n_expert is 0; set n_expert to 1 or more.")

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
        return_router_output: bool = False,
        recompute_mlp: bool = False,
    ) -> Tensor | tuple[Tensor, RouterOutput | None]:
        """Compute ``litgpt.model.Block.forward``.

        Args:
            return_router_output: return the router's output too.
            recompute_mlp: keep nothing of the feed-forward for the backward pass, but compute it again.

        Returns:
            ``(B, T, C)``; with ``return_router_output`` the pair of it and the ``RouterOutput``, which is None if the
            feed-forward is dense.
        """
        # The same as LitGPT's, line by line, up to the call of the feed-forward.
        x_normed = self.norm_1(x)
        attention_output = self.attn(x_normed, cos, sin, mask, input_pos, input_pos_maxp1)
        attention_output = self.post_attention_norm(attention_output)
        if self.config.parallel_residual:
            if not self.config.shared_attention_norm:
                x_normed = self.norm_2(x)
            x = attention_output + x
        else:
            x = attention_output + x
            x_normed = self.norm_2(x)

        if recompute_mlp:
            mlp_output, router = checkpoint(self._feed_forward, x_normed, use_reentrant=False)
        else:
            mlp_output, router = self._feed_forward(x_normed)
        x = self.post_mlp_norm(mlp_output) + x
        return (x, router) if return_router_output else x

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, RouterOutput | None]:
        if isinstance(self.mlp, MoE):
            return self.mlp.forward_with_router(x)
        return self.mlp(x), None


# ---------------------------------------------------------------------------------------------------------------- LoRA


class LoRAExperts(Experts):
    """``Experts`` with frozen weights, each with a low-rank update ``scaling * B @ A`` (arXiv 2106.09685).

    Parameters in addition to those of ``Experts``: ``fc_lora_A (E, 2R, C)`` and ``fc_lora_B (E, 2I, R)``, gate above
    up, and ``proj_lora_A (E, R, I)`` and ``proj_lora_B (E, C, R)``. The state dict has the keys of ``litgpt.lora``.
    """

    _KINDS = (*Experts._KINDS, "lora_A", "lora_B")

    def __init__(self, config: litgpt.lora.Config, **sizes: Any) -> None:
        super().__init__(**sizes)
        (E, J, C), I, R = self.fc_weight.shape, self.proj_weight.size(2), config.lora_r  # noqa: E741
        # Gate and up have separate updates, as in LitGPT, where they are two layers.
        self.fc_lora_A = nn.Parameter(torch.empty(E, 2 * R, C))
        self.fc_lora_B = nn.Parameter(torch.empty(E, J, R))
        self.proj_lora_A = nn.Parameter(torch.empty(E, R, I))
        self.proj_lora_B = nn.Parameter(torch.empty(E, C, R))
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.lora_alpha / R
        self.reset_lora()

    def reset_lora(self) -> None:
        """Start without an update, as ``litgpt.lora.LoRALinear``."""
        for A, B in ((self.fc_lora_A, self.fc_lora_B), (self.proj_lora_A, self.proj_lora_B)):
            _reset_update(A, B)

    def _feed_forward(self, x_NC: Tensor, router: RouterOutput, backend: str) -> Tensor:
        # The update is added layer by layer.
        return self._feed_forward_by_layers(x_NC, router, backend)

    def _linear(self, name: str, x_S: Tensor, ends_E: Tensor, backend: str) -> Tensor:
        A, B = (getattr(self, f"{name}_lora_{factor}").to(x_S.dtype) for factor in "AB")
        rank = B.size(2)
        widths = (self.fc_weight.size(2), self.proj_weight.size(2), rank)
        # A request for grouped_mm is for the wide products; the rank may be too narrow for it.
        requested = None if self.backend == "grouped_mm" else self.backend
        lora_backend = choose_backend(requested, x_S.dtype, x_S.device, x_S.size(0), widths)
        low_S = grouped_linear(self.lora_dropout(x_S), A, ends_E, lora_backend)  # (S, 2R), gate next to up, or (S, R)
        # Each part of A's output goes through its own part of B: two for gate and up, one for proj.
        n_parts = low_S.size(1) // rank
        updates = [
            grouped_linear(low.contiguous(), weight, ends_E, lora_backend)
            for low, weight in zip(low_S.chunk(n_parts, dim=1), B.chunk(n_parts, dim=1), strict=True)
        ]
        y_S: Tensor = super()._linear(name, x_S, ends_E, backend) + self.scaling * torch.cat(updates, dim=1)
        return y_S


class LoRARouter(TopKRouter):
    """A softmax router with a low-rank update, which is added to the weight: both are small, and products are fp32."""

    def __init__(self, config: litgpt.lora.Config) -> None:
        super().__init__(config)
        self.lora_A = nn.Parameter(torch.empty(config.lora_r, config.n_embd))
        self.lora_B = nn.Parameter(torch.empty(config.n_expert, config.lora_r))
        self.scaling = config.lora_alpha / config.lora_r
        self.reset_lora()

    def reset_lora(self) -> None:
        """Start without an update, as ``litgpt.lora.LoRALinear``."""
        _reset_update(self.lora_A, self.lora_B)

    def full_weight(self) -> Tensor:
        with without_autocast(self.weight.device.type):
            weight_EC: Tensor = self.weight.float() + self.scaling * (self.lora_B.float() @ self.lora_A.float())
        return weight_EC


class LoRAMoE(MoE):
    """Drop-in for ``litgpt.lora.LLaMAMoE``: plain ``MoE``, or with ``lora_mlp`` low-rank updates of router and experts.

    ``lora_dropout`` applies to the experts only. Shared experts and other routers than the softmax one, which LitGPT's
    layer does not have, get no update.
    """

    def __init__(self, config: litgpt.lora.Config, backend: str | None = None, router: MakeRouter = router_for) -> None:
        super().__init__(config, backend, router)
        if not (config.lora_mlp and config.lora_r):
            return
        # Not isinstance: a subclass chooses in its own way.
        if type(self.gate) is TopKRouter:
            self.gate = LoRARouter(config)
        self.experts = LoRAExperts(config, **_expert_sizes(config))
        self.experts.backend = backend
        self.reset_parameters()


class LoRAMoEBlock(MoEBlock):
    """Drop-in for ``litgpt.lora.Block`` that can return the router's output."""

    def __init__(self, config: litgpt.lora.Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        # litgpt.lora.Block does the same: the rest of the block has no LoRA of its own.
        self.attn = litgpt.lora.CausalSelfAttention(config, block_idx)


def _reset_update(A: Tensor, B: Tensor) -> None:
    bound = A.size(-1) ** -0.5
    nn.init.uniform_(A, -bound, bound)
    nn.init.zeros_(B)  # so that B @ A is 0 at the start


# ------------------------------------------------------------------------------------------------------------- context


# What the replacements rely on: LitGPT's names and their parameters.
_EXPECTED = {
    "LLaMAMoE.__init__": ("self", "config"),
    "LLaMAMoE.forward": ("self", "x"),
    "LLaMAMLP.__init__": ("self", "config", "intermediate_size"),
    "GroupedTopkRouter.__init__": ("self", "config"),
    "Block.__init__": ("self", "config", "block_idx"),
    "Block.forward": ("self", "x", "cos", "sin", "mask", "input_pos", "input_pos_maxp1"),
}


@contextmanager
def use_custom_moe(router: MakeRouter | None = None) -> Iterator[None]:
    """Make ``litgpt.GPT(config)`` build with ``MoE`` and ``MoEBlock``, and ``litgpt.lora.GPT`` with their LoRA forms.

    LitGPT is restored at the end. ``litgpt.Config.mlp_class`` finds the layer by the name ``LLaMAMoE`` in
    ``litgpt.model``, so the config and the checkpoint's ``model_config.yaml`` keep this name, and stock LitGPT reads
    them. The contexts may be nested.

    Args:
        router: makes the routers; None for that of an enclosing context, or else the one that the config describes.

    Raises:
        RuntimeError: the installed LitGPT does not have the names and signatures that are replaced.
    """
    nested = litgpt.model.Block is MoEBlock
    if not nested:
        _check_litgpt()
    replacements: list[tuple[Any, str, Any]] = [
        (litgpt.model, "Block", MoEBlock),
        (litgpt.lora, "Block", LoRAMoEBlock),
    ]
    # An inner context without a router keeps the outer one's, so that a run can be started with any router.
    if router is not None:
        replacements.append((litgpt.model, "LLaMAMoE", functools.partial(MoE, router=router)))
        replacements.append((litgpt.lora, "LLaMAMoE", functools.partial(LoRAMoE, router=router)))
    elif not nested:
        replacements.append((litgpt.model, "LLaMAMoE", MoE))
        replacements.append((litgpt.lora, "LLaMAMoE", LoRAMoE))
    # litgpt.lora has its own names for the same classes.
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, replacement in replacements:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _check_litgpt() -> None:
    problems = []
    for name, expected in _EXPECTED.items():
        class_name, method = name.split(".")
        owner = getattr(litgpt.model, class_name, None)
        function = None if owner is None else getattr(owner, method, None)
        if function is None:
            problems.append(f"litgpt.model.{class_name if owner is None else name} is missing")
            continue
        parameters = tuple(inspect.signature(function).parameters)
        if parameters != expected:
            problems.append(f"litgpt.model.{name} takes ({', '.join(parameters)}), expected ({', '.join(expected)})")
    if problems:
        raise RuntimeError(
            f"custom_moe does not fit the installed litgpt {version('litgpt')}: {'; '.join(problems)}. "
            "Install the version that pyproject.toml pins."
        )
