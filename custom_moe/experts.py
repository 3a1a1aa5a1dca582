"""The experts' SwiGLU over tokens sorted by expert, as grouped matrix products.

Shape suffixes: N tokens, C n_embd, E n_expert, K n_expert_per_token, S = N*K assignments sorted by expert, I an
expert's hidden width, J = 2*I gate and up together, O any output width.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Backend = Literal["grouped_mm", "loop"]


GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _dtypes_without_numbers() -> tuple[torch.dtype, ...]:
    """The types of ``GROUPED_MM_DTYPES`` that work where there are shapes but no numbers; in torch 2.10 bf16 alone."""

    def works(dtype: torch.dtype) -> bool:
        x, weight = torch.empty(8, 8, dtype=dtype, device="meta"), torch.empty(1, 8, 8, dtype=dtype, device="meta")
        try:
            F.grouped_mm(x, weight, offs=torch.empty(1, dtype=torch.int32, device="meta"))
        except RuntimeError:
            return False
        return True

    return tuple(dtype for dtype in GROUPED_MM_DTYPES if works(dtype))


TRACED_DTYPES = _dtypes_without_numbers()


def choose_backend(dtype: torch.dtype, device_type: str, rows: int, *widths: int, traced: bool = False) -> Backend:
    """Which way to compute ``rows`` assignments: ``grouped_mm`` wherever torch has it for these shapes, else ``loop``.

    ``torch.nn.functional.grouped_mm`` wants bf16, fp16 or fp32, row strides of a multiple of 16 bytes, at least one
    row, and a CPU or CUDA device. ``traced`` is for the meta device and ``torch.compile``, where older versions of
    torch know fewer types.
    """
    aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
    known = dtype in (TRACED_DTYPES if traced else GROUPED_MM_DTYPES) and device_type in ("cpu", "cuda", "meta")
    return "grouped_mm" if known and aligned and rows > 0 else "loop"


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
        """
        N, K = indices_NK.shape
        expert_S, order_S = indices_NK.flatten().sort(stable=True)
        inverse_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(N * K, device=order_S.device))
        experts_E = torch.arange(self.fc_weight.size(0), device=expert_S.device)
        ends_E = torch.searchsorted(expert_S, experts_E, right=True, out_int32=True)

        x_SC = gather_rows(x_NC.to(compute_dtype(x_NC)), order_S // K, inverse_S)
        gate_SI, up_SI = self._linear("fc", x_SC, ends_E, expert_S).chunk(2, dim=-1)
        y_SC = self._linear("proj", F.silu(gate_SI) * up_SI, ends_E, expert_S)
        y_NKC = gather_rows(y_SC, inverse_S, order_S).view(N, K, y_SC.size(1))
        y_NC: Tensor = (y_NKC * weights_NK.unsqueeze(-1)).sum(dim=1)
        return y_NC.to(x_NC.dtype)

    def _linear(self, name: str, x_S: Tensor, ends_E: Tensor, expert_S: Tensor) -> Tensor:
        """Each row through its expert's layer ``name`` ("fc" or "proj"), in the row's type."""
        weight_EOC, bias_EO = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        traced = x_S.is_meta or torch.compiler.is_compiling()
        backend = choose_backend(x_S.dtype, x_S.device.type, x_S.size(0), *weight_EOC.shape[1:], traced=traced)
        bias_EO = None if bias_EO is None else bias_EO.to(x_S.dtype)
        return grouped_linear(x_S, weight_EOC.to(x_S.dtype), bias_EO, ends_E, expert_S, backend)

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


def gather_rows(x: Tensor, index_S: Tensor, inverse_S: Tensor) -> Tensor:
    """``x[index]`` for an index that takes every row of ``x`` equally often: ``(S, C)`` from ``(N, C)``.

    ``inverse_S`` lists the places in ``index_S`` that took row 0, then those of row 1, and so on. With it the gradient
    is a gather and a sum: faster than ``index_add_``, and the same bits on each run.
    """
    rows: Tensor = _GatherRows.apply(x, index_S, inverse_S)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_S: Tensor, inverse_S: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_S)
        ctx.n_row = x.size(0)
        return x.index_select(0, index_S)

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None, None]:
        (inverse_S,) = ctx.saved_tensors
        grad = grad_SC.index_select(0, inverse_S)
        if grad.size(0) != ctx.n_row:
            grad = grad.view(ctx.n_row, -1, grad.size(1)).sum(dim=1)
        return grad, None, None


def grouped_linear(
    x_SC: Tensor, weight_EOC: Tensor, bias_EO: Tensor | None, ends_E: Tensor, expert_S: Tensor, backend: Backend
) -> Tensor:
    """``F.linear`` with another weight for each group of rows: ``(S, O)``.

    Args:
        x_SC: rows sorted by expert.
        weight_EOC, bias_EO: one linear layer per expert.
        ends_E: int32, where each expert's rows end.
        expert_S: each row's expert.
        backend: see ``choose_backend``.
    """
    return _BACKENDS[backend](x_SC, weight_EOC, bias_EO, ends_E, expert_S)


def _grouped_mm(x_SC: Tensor, weight_EOC: Tensor, bias_EO: Tensor | None, ends_E: Tensor, expert_S: Tensor) -> Tensor:
    y_SO = F.grouped_mm(x_SC, weight_EOC.transpose(-2, -1), offs=ends_E)
    return y_SO if bias_EO is None else y_SO + bias_EO.index_select(0, expert_S)


def _loop(x_SC: Tensor, weight_EOC: Tensor, bias_EO: Tensor | None, ends_E: Tensor, expert_S: Tensor) -> Tensor:
    # On meta there are no numbers to split by: everything to the last expert gives the right shapes.
    ends = [0] * (len(ends_E) - 1) + [len(x_SC)] if ends_E.is_meta else ends_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    biases = [None] * len(sizes) if bias_EO is None else bias_EO.unbind(0)
    # unbind and not [e]: its gradient is one stack instead of one zero-filled (E, O, C) per expert.
    groups = zip(torch.split(x_SC, sizes), weight_EOC.unbind(0), biases, strict=True)
    return torch.cat([F.linear(x, weight, bias) for x, weight, bias in groups])


_BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]] = {
    "grouped_mm": _grouped_mm,
    "loop": _loop,
}
