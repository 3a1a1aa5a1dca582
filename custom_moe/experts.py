"""The experts: their parameters, and their SwiGLU over tokens sorted by expert.

Shape suffixes: N tokens, C n_embd, E n_expert, K n_expert_per_token, S rows sorted by expert, I an expert's hidden
width, J = 2*I gate and up together, O an output width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_moe import loop
from custom_moe.backends import Backend, add_bias, choose_backend, grouped_linear
from custom_moe.dispatch import ExpertOrder, add_rows, gather_rows, sort_by_expert, weights_of_rows
from custom_moe.swiglu import grouped_swiglu


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a linear layer would compute ``x`` in: autocast's where it is on for ``x``'s device, else its own.
    (grouped_mm is not registered for autocast: without an explicit cast, bf16-mixed would silently run in fp32.)"""
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast and x.dtype != torch.float64 else x.dtype


class Experts(nn.Module):
    """``n_expert`` SwiGLU feed-forwards with stacked weights, and the state dict of ``nn.ModuleList(LLaMAMLP(...))``.

    Parameters: ``fc_weight (E, 2I, C)`` holds each expert's ``fc_1`` (gate) above its ``fc_2`` (up), ``proj_weight
    (E, C, I)``, and with ``bias`` also ``fc_bias (E, 2I)`` and ``proj_bias (E, C)``.
    """

    _KINDS: tuple[str, ...] = ("weight", "bias")
    """What LitGPT's layers call their parameters"""

    def __init__(self, n_expert: int, n_embd: int, intermediate_size: int, n_layer: int, bias: bool) -> None:
        super().__init__()
        self.n_layer = n_layer
        self.backend: Backend | None = None
        self.fc_weight = nn.Parameter(torch.empty(n_expert, 2 * intermediate_size, n_embd))
        self.proj_weight = nn.Parameter(torch.empty(n_expert, n_embd, intermediate_size))
        self.fc_bias = nn.Parameter(torch.empty(n_expert, 2 * intermediate_size)) if bias else None
        self.proj_bias = nn.Parameter(torch.empty(n_expert, n_embd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The distribution that ``litgpt.pretrain.initialize_weights`` gives the same layers (arXiv 2204.06745)."""
        n_embd = self.proj_weight.size(1)
        nn.init.normal_(self.fc_weight, mean=0.0, std=(2.0 / 5 / n_embd) ** 0.5)
        nn.init.normal_(self.proj_weight, mean=0.0, std=1 / n_embd**0.5 / self.n_layer)
        if self.fc_bias is not None and self.proj_bias is not None:
            nn.init.zeros_(self.fc_bias)
            nn.init.zeros_(self.proj_bias)

    def forward(self, x_NC: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """Each token through its chosen experts, their outputs weighted and summed: ``(N, C)`` in ``x``'s type.

        Gathers and sums instead of scattering, forward and backward, so that repeated runs give the same bits.

        Raises:
            ValueError: where ``backend`` was set to one that can't compute these types and shapes here.
        """
        dtype = compute_dtype(x_NC)
        backend = self._choose_backend(dtype, x_NC.device, x_NC.size(0))
        y_NC: Tensor = self._feed_forward(x_NC.to(dtype), weights_NK, indices_NK, backend).to(x_NC.dtype)
        return y_NC

    def backend_on(self, device: torch.device) -> Backend:
        """What would compute rows of the weights' type there, under the autocast that is on.

        Raises:
            ValueError: as ``forward``.
        """
        return self._choose_backend(compute_dtype(self.fc_weight.new_empty(0, device=device)), device, 1)

    def _choose_backend(self, dtype: torch.dtype, device: torch.device, rows: int) -> Backend:
        widths = (self.fc_weight.size(2), self.proj_weight.size(2))
        return choose_backend(self.backend, dtype, device, rows, widths)

    def _feed_forward(self, x_NC: Tensor, weights_NK: Tensor, indices_NK: Tensor, backend: Backend) -> Tensor:
        if self.fc_bias is not None:
            return self._feed_forward_by_layers(x_NC, weights_NK, indices_NK, backend)
        order = sort_by_expert(indices_NK, len(self.fc_weight), loop.padded_rows(x_NC) if backend == "loop" else 1)
        return grouped_swiglu(x_NC, weights_NK, self.fc_weight, self.proj_weight, order, backend)

    def _feed_forward_by_layers(self, x_NC: Tensor, weights_NK: Tensor, indices_NK: Tensor, backend: Backend) -> Tensor:
        """``grouped_swiglu`` with room around each layer, for biases and LoRA; keeps more for the backward."""
        order = sort_by_expert(indices_NK, len(self.fc_weight))
        x_SC = gather_rows(x_NC, order)
        gate_SI, up_SI = self._linear("fc", x_SC, order, backend).chunk(2, dim=-1)
        y_SC = self._linear("proj", F.silu(gate_SI) * up_SI, order, backend)
        return add_rows(y_SC * weights_of_rows(weights_NK, order).unsqueeze(1), order)  # in fp32, as the weights

    def _linear(self, name: str, x_S: Tensor, order: ExpertOrder, backend: Backend) -> Tensor:
        """Each row through its expert's layer ``name`` ("fc" or "proj"), in the row's type."""
        weight_EOC, bias_EO = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        y_SO = grouped_linear(x_S, weight_EOC.to(x_S.dtype), order.ends_E, backend)
        if bias_EO is not None:
            y_SO = add_bias(y_SO, bias_EO.to(x_S.dtype), order.ends_E, backend)
        return y_SO

    def _litgpt_views(self, prefix: str) -> dict[str, tuple[str, Tensor]]:
        """LitGPT's key -> (name of the stacked parameter, this key's part of it), in LitGPT's order."""
        views: dict[str, tuple[str, Tensor]] = {}
        stacked = {name: parameter.unbind(0) for name, parameter in self.named_parameters(recurse=False)}
        for expert in range(self.fc_weight.size(0)):
            for layer, part in (("fc_1", 0), ("fc_2", 1), ("proj", None)):
                for kind in self._KINDS:
                    name = f"{'proj' if part is None else 'fc'}_{kind}"
                    if name in stacked:
                        rows = stacked[name][expert]
                        view = rows if part is None else rows.chunk(2)[part]
                        views[f"{prefix}{expert}.{layer}.{kind}"] = (name, view)
        return views

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, (_, view) in self._litgpt_views(prefix).items():
            destination[key] = view if keep_vars else view.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        views = self._litgpt_views(prefix)
        if local_metadata.get("assign_to_params_buffers", False):
            # What is loaded decides type and device (the parameters may be on meta): new storage, then the same copy.
            for name, parameter in list(self.named_parameters(recurse=False)):
                keys = [key for key, (owner, _) in views.items() if owner == name]
                if all(key in state_dict for key in keys):
                    given = state_dict[keys[0]]
                    storage = torch.empty_like(parameter, dtype=given.dtype, device=given.device)
                    setattr(self, name, nn.Parameter(storage, requires_grad=parameter.requires_grad))
            views = self._litgpt_views(prefix)
        for key, (_, view) in views.items():
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
            elif state_dict[key].shape != view.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {state_dict[key].shape} from checkpoint, "
                    f"the shape in current model is {view.shape}."
                )
            else:
                view.copy_(state_dict[key])
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in views)
