"""The experts: their parameters, the dispatch of tokens to rows, forward and backward.

All experts' SwiGLU is one differentiable function that keeps little for its backward: the pre-activations and the
layer's own input, which other layers keep anyway. Plain autograd would also keep the gathered rows, the activations,
their product and the experts' outputs; gathering and activating again is cheap compared with the matrix products.

Shape suffixes: see ``custom_moe``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_moe.backends import BACKENDS, backend_for, choose_backend, hardware_of, swiglu
from custom_moe.router import RouterOutput


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that a linear layer would compute ``x`` in: autocast's if it is on for the device, else ``x``'s.

    grouped_mm is not registered for autocast: without an explicit cast, bf16-mixed would silently compute in fp32.
    """
    device_type = x.device.type
    if device_type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


# ------------------------------------------------------------------------------------------------------------ dispatch


class Dispatch(NamedTuple):
    """Which row computes which assignment, prepared once for forward and backward. Rows are sorted by expert."""

    token_R: Tensor
    """The token of each row; token 0 for padding"""
    ends_E: Tensor
    """int32, where each expert's rows end"""
    row_S: Tensor
    """The row of each assignment"""
    rows: Tensor
    """The rows of each token: ``(N, K)``, or ``(S,)`` token by token"""
    starts_N: Tensor | None
    """Where each token begins in ``rows`` ``(S,)``"""


def dispatch(router: RouterOutput, row_multiple: int = 1) -> Dispatch:
    """Lay out the assignments as rows, without waiting for the device.

    Args:
        router: the assignments.
        row_multiple: the number of rows that each expert's are padded to a multiple of. ``R`` is then an upper bound;
            rows after the last end are unused.
    """
    # An example with 2 tokens, 3 experts and K = 2. Token 0 goes to experts 2 and 0, token 1 to experts 0 and 1:
    #
    #   tokens    0 0 1 1      the assignments as the router lists them
    #   experts   2 0 0 1
    #   expert_S  0 0 1 2      sorted by expert
    #   order_S   1 2 3 0      which assignment that is
    #   token_R   0 1 1 0      row 0: token 0 by expert 0, row 1: token 1 by expert 0, ...
    #   ends_E    2 3 4        expert 0 has rows 0 and 1, expert 1 row 2, expert 2 row 3
    #   row_S     3 0 1 2      assignment 0 (token 0, expert 2) is row 3
    #   rows      (3 0) (1 2)  token 0 is the sum of rows 3 and 0
    #
    # With row_multiple = 2, experts 1 and 2 get a row of padding each (token 0 with weight 0):
    #
    #   token_R   0 1 1 0 0 0 0   the last row is after the last end, so no expert computes it
    #   ends_E    2 4 6
    #   row_S     4 0 1 2
    S, E, device = router.experts.size(0), router.logits.size(1), router.experts.device
    # Stable: tokens keep their order within an expert, so each run adds in the same order.
    expert_S, order_S = router.experts.sort(stable=True)
    # searchsorted and not bincount, which waits for the GPU to learn the size of its result.
    ends_E = torch.searchsorted(expert_S, torch.arange(E, device=device), right=True, out_int32=True)
    sorted_row_S = torch.arange(S, device=device)
    token_R = router.tokens.index_select(0, order_S)
    if row_multiple > 1:
        starts_E = F.pad(ends_E[:-1], (1, 0))
        padded_counts_E = (ends_E - starts_E + row_multiple - 1) // row_multiple * row_multiple
        ends_E = padded_counts_E.cumsum(0, dtype=torch.int32)
        shift_E = ends_E - padded_counts_E - starts_E  # by how much the padding moves each expert's rows
        sorted_row_S = sorted_row_S + shift_E.index_select(0, expert_S)
        # The largest possible padding, because a size that depends on the values would wait for the GPU.
        token_R = token_R.new_zeros(S + E * (row_multiple - 1)).index_copy_(0, sorted_row_S, token_R)
    # The inverse of order_S: assignment order_S[s] is computed in row s.
    row_S = torch.empty_like(order_S).index_copy_(0, order_S, sorted_row_S)
    rows, starts_N = rows_of_tokens(router, row_S)
    return Dispatch(token_R, ends_E, row_S, rows, starts_N)


def rows_of_tokens(router: RouterOutput, row_S: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``Dispatch.rows`` and ``Dispatch.starts_N`` for assignments that are computed in the given rows."""
    if router.per_token is not None:
        return row_S.view(-1, router.per_token), None  # (S,) -> (N, K)
    # Any number of assignments per token: list them token by token, and find where each token begins.
    by_token_S = router.tokens.argsort(stable=True)
    token_N = torch.arange(router.logits.size(0), device=row_S.device)
    starts_N = torch.searchsorted(router.tokens.index_select(0, by_token_S), token_N)
    return row_S.index_select(0, by_token_S), starts_N


def weights_of_rows(weights_S: Tensor, layout: Dispatch) -> Tensor:
    """Return the router's weight of each row, 0 for padding: ``(R,)``; differentiable."""
    # Not weights[...]: the gradient of an index is a sum by index, on a GPU atomic additions in a random order.
    return weights_S.new_zeros(layout.token_R.size(0)).index_copy(0, layout.row_S, weights_S)


def sum_rows(y_RC: Tensor, rows: Tensor, starts_N: Tensor | None = None) -> Tensor:
    """Add up the rows of each token, 16-bit types in fp32. Not differentiable, see ``combine``.

    Args:
        y_RC: rows.
        rows: as ``Dispatch.rows``.
        starts_N: as ``Dispatch.starts_N``.

    Returns:
        ``(N, C)`` in the type of ``y``.
    """
    if starts_N is not None or y_RC.is_cpu:
        # One pass over memory, on a CPU five times as fast as gathering first.
        return F.embedding_bag(rows, y_RC, starts_N, mode="sum")
    rows_NKC = y_RC.index_select(0, rows.flatten()).view(*rows.shape, y_RC.size(1))  # (N * K, C) -> (N, K, C)
    return rows_NKC.sum(dim=1, dtype=y_RC.dtype)  # explicit type: CUDA's autocast would return fp32


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, token_S: Tensor, rows: Tensor, starts_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, starts_N)
        return x_NC.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_rows(grad_SC, *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SC: Tensor, token_S: Tensor, rows: Tensor, starts_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_S)
        return sum_rows(y_SC, rows, starts_N)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_NC.index_select(0, *ctx.saved_tensors), None, None, None


def gather(x_NC: Tensor, layout: Dispatch) -> Tensor:
    """Return ``x[token_S]`` for a dispatch without padding. Its gradient is ``sum_rows``.

    Autograd would take ``index_add_``, which is slower and adds in another order on each run.
    """
    x_SC: Tensor = _Gather.apply(x_NC, layout.token_R, layout.rows, layout.starts_N)
    return x_SC


def combine(y_SC: Tensor, layout: Dispatch) -> Tensor:
    """Return ``sum_rows`` with the gradient of its rows, for a dispatch without padding."""
    y_NC: Tensor = _Combine.apply(y_SC, layout.token_R, layout.rows, layout.starts_N)
    return y_NC


# --------------------------------------------------------------------------------------------------- the whole function


class _ExpertsFunction(torch.autograd.Function):
    """``sum over the token's assignments of weight * expert(x)``: ``(N, C)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weights_S: Tensor,
        fc_EJC: Tensor,
        proj_ECI: Tensor,
        token_R: Tensor,
        ends_E: Tensor,
        row_S: Tensor,
        rows: Tensor,
        starts_N: Tensor | None,
        backend: str,
    ) -> Tensor:
        weights_R = weights_of_rows(weights_S, Dispatch(token_R, ends_E, row_S, rows, starts_N))
        # Under mixed precision the weights may have another type than x. The copies are kept for the backward. In
        # training that takes no memory: a layer that is recomputed has its backward at once, and otherwise the loop
        # passes weights that are cast already.
        fc, proj = fc_EJC.to(x_NC.dtype), proj_ECI.to(x_NC.dtype)
        y_RC, h_RJ = BACKENDS[backend].forward(x_NC, weights_R, fc, proj, token_R, ends_E)
        ctx.save_for_backward(x_NC, weights_R, h_RJ, fc, proj, token_R, ends_E, row_S, rows, starts_N)
        ctx.backend = backend
        return sum_rows(y_RC, rows, starts_N)

    @staticmethod
    def backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weights_R, h_RJ, fc, proj, token_R, ends_E, row_S, rows, starts_N = ctx.saved_tensors
        _, _, need_fc, need_proj, *_ = ctx.needs_input_grad
        dx_RC, dweights_R, dfc_EJC, dproj_ECI = BACKENDS[ctx.backend].backward(
            dy_NC, x_NC, weights_R, h_RJ, fc, proj, token_R, ends_E, need_fc, need_proj
        )
        dx_NC = sum_rows(dx_RC, rows, starts_N)
        dweights_S = dweights_R.index_select(0, row_S)
        # Under mixed precision fp32 parameters get gradients in the type of the products: autograd casts them.
        dfc = dfc_EJC if need_fc else None
        dproj = dproj_ECI if need_proj else None
        return dx_NC, dweights_S, dfc, dproj, None, None, None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SC: Tensor, weight_EOC: Tensor, ends_E: Tensor, backend: str) -> Tensor:
        # The rows are needed for the gradient of the weights only, which LoRA freezes.
        ctx.save_for_backward(x_SC if ctx.needs_input_grad[1] else None, weight_EOC, ends_E)
        ctx.backend = backend
        return BACKENDS[backend].multiply(x_SC, weight_EOC, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_SC, weight_EOC, ends_E = ctx.saved_tensors
        backend = BACKENDS[ctx.backend]
        grad_SO = grad_SO.contiguous()  # `y.sum()` sends a gradient of stride 0, which grouped_mm rejects
        need_x, need_weight = ctx.needs_input_grad[:2]
        dx_SC = backend.multiply(grad_SO, weight_EOC.transpose(1, 2), ends_E) if need_x else None
        dweight_EOC = backend.weight_gradient(grad_SO, x_SC, ends_E) if need_weight else None
        return dx_SC, dweight_EOC, None, None


def grouped_linear(x_SC: Tensor, weight_EOC: Tensor, ends_E: Tensor, backend: str) -> Tensor:
    """Return ``F.linear`` with another weight for each group of rows, ``(S, O)``; differentiable."""
    y_SO: Tensor = _GroupedLinear.apply(x_SC, weight_EOC, ends_E, backend)
    return y_SO


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SO: Tensor, bias_EO: Tensor, ends_E: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.backend = backend
        # ends_E tells the expert of each row without waiting for the device.
        row_S = torch.arange(y_SO.size(0), device=y_SO.device)
        expert_S = torch.searchsorted(ends_E, row_S, right=True)
        return y_SO + bias_EO.index_select(0, expert_S)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (ends_E,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad_SO, None, None, None
        # The gradient of a weight with the input 1; 16 columns of it, for kernels that require aligned rows.
        ones_S16 = grad_SO.new_ones(grad_SO.size(0), 16)
        dbias_EO16 = BACKENDS[ctx.backend].weight_gradient(grad_SO.contiguous(), ones_S16, ends_E)
        return grad_SO, dbias_EO16[:, :, 0], None, None


def add_bias(y_SO: Tensor, bias_EO: Tensor, ends_E: Tensor, backend: str) -> Tensor:
    """Add each row's expert bias, which has the type of the rows; differentiable.

    The gradient of the bias is computed as a matrix product: summed in fp32, with the same bits on each run. The
    gradient of ``index_select`` would be atomic additions on a GPU, which in bf16 round after each row.
    """
    biased_SO: Tensor = _AddBias.apply(y_SO, bias_EO, ends_E, backend)
    return biased_SO


def run_assignments(x_NC: Tensor, router: RouterOutput, fc: Sequence[Tensor], proj: Sequence[Tensor]) -> Tensor:
    """Compute each assignment on its own, without gradients and without sorting: ``(N, C)``.

    This is faster on a CPU for so few tokens that hardly two share an expert, as in a step of generation.

    Args:
        x_NC: tokens.
        router: their assignments, at least one.
        fc: each expert's gate next to its up projection, transposed: ``(C, J)``.
        proj: each expert's down projection, transposed: ``(I, C)``.
    """
    experts, tokens = router.experts.tolist(), router.tokens.tolist()
    # Rows of (1, C) and (1, I); chunk is C++, unlike split
    x_rows = x_NC.chunk(x_NC.size(0))
    h_SJ = torch.cat([torch.mm(x_rows[token], fc[expert]) for token, expert in zip(tokens, experts, strict=True)])
    a_rows = swiglu(h_SJ, router.weights).chunk(len(experts))
    # Views of y, so that each product is added to its token in place.
    y_NC = torch.zeros_like(x_NC)
    y_rows = y_NC.chunk(x_NC.size(0))
    for a, token, expert in zip(a_rows, tokens, experts, strict=True):
        y_rows[token].addmm_(a, proj[expert])  # product and sum in one call: calls are most of the time
    return y_NC


# ---------------------------------------------------------------------------------------------------------- the module


class Experts(nn.Module):
    """``n_expert`` SwiGLU feed-forwards with stacked weights, and the state dict of ``nn.ModuleList(LLaMAMLP(...))``.

    Parameters: ``fc_weight (E, 2I, C)`` holds each expert's ``fc_1`` (gate) above its ``fc_2`` (up), ``proj_weight
    (E, C, I)``, and with ``bias`` also ``fc_bias (E, 2I)`` and ``proj_bias (E, C)``.
    """

    _KINDS: tuple[str, ...] = ("weight", "bias")
    """The names of the parameters of one of LitGPT's layers"""

    def __init__(self, n_expert: int, n_embd: int, intermediate_size: int, n_layer: int, bias: bool) -> None:
        super().__init__()
        self.n_layer = n_layer
        self.backend: str | None = None
        self.fc_weight = nn.Parameter(torch.empty(n_expert, 2 * intermediate_size, n_embd))
        self.proj_weight = nn.Parameter(torch.empty(n_expert, n_embd, intermediate_size))
        self.fc_bias = nn.Parameter(torch.empty(n_expert, 2 * intermediate_size)) if bias else None
        self.proj_bias = nn.Parameter(torch.empty(n_expert, n_embd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as ``litgpt.pretrain.initialize_weights`` draws for the same layers (arXiv 2204.06745)."""
        # That function knows linear layers only, and would leave stacked parameters as they are.
        n_embd = self.proj_weight.size(1)
        nn.init.normal_(self.fc_weight, mean=0.0, std=(2.0 / 5 / n_embd) ** 0.5)
        nn.init.normal_(self.proj_weight, mean=0.0, std=1 / n_embd**0.5 / self.n_layer)
        if self.fc_bias is not None and self.proj_bias is not None:
            nn.init.zeros_(self.fc_bias)
            nn.init.zeros_(self.proj_bias)

    def forward(self, x_NC: Tensor, router: RouterOutput) -> Tensor:
        """Send each token through its experts, and add up their weighted outputs.

        Gathers and sums instead of scattering, forward and backward, so that repeated runs give the same bits.

        Args:
            x_NC: tokens.
            router: their assignments.

        Returns:
            ``(N, C)`` in the type of ``x``; 0 for a token without an expert.

        Raises:
            ValueError: ``backend`` can't compute these types and shapes here.
        """
        dtype = compute_dtype(x_NC)
        backend = self._choose_backend(dtype, x_NC.device, router.experts.size(0))
        return self._feed_forward(x_NC.to(dtype), router, backend).to(x_NC.dtype)

    def for_inference(self) -> Callable[[Tensor, RouterOutput], Tensor]:
        """Return ``forward`` without gradients, as a function that has the weights at hand.

        Looking up what the module consists of, and sorting, takes longer than the products of one token. Training may
        go on: the function uses the memory of the parameters.
        """
        fc_weight = self.fc_weight.detach()
        unusual = type(self) is not Experts or self.fc_bias is not None or self.backend not in (None, "loop")
        # On a GPU the launches count and not Python, and autocast would cast the weights in each step.
        if unusual or not fc_weight.is_cpu or compute_dtype(fc_weight) != fc_weight.dtype:
            return self.forward
        fc, proj = fc_weight.mT.unbind(), self.proj_weight.detach().mT.unbind()  # (C, J) and (I, C) each

        def forward(x_NC: Tensor, router: RouterOutput) -> Tensor:
            # With more assignments than experts, several share one, and a product for all of them is faster.
            if 0 < router.experts.size(0) <= len(fc) and x_NC.dtype == fc_weight.dtype:
                return run_assignments(x_NC, router, fc, proj)
            return self.forward(x_NC, router)

        return forward

    def backend_on(self, device: torch.device) -> str:
        """Return the backend for rows of the weights' type on a device, under the current autocast.

        Raises:
            ValueError: as ``forward``.
        """
        return self._choose_backend(self._dtype_on(device), device, 1)

    def waits_for_device(self, device: torch.device) -> bool:
        """Return whether the CPU waits for the device, so that a step can't be recorded as a CUDA graph.

        Raises:
            ValueError: as ``forward``.
        """
        backend = self.backend_on(device)
        fastest = backend_for(self._dtype_on(device), hardware_of(device), self._widths)
        # On request grouped_mm also runs where torch has no fast kernel for it, only a loop.
        is_loop_of_torch = backend == "grouped_mm" and fastest != backend
        return BACKENDS[backend].waits_for_device or is_loop_of_torch

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        return compute_dtype(self.fc_weight.new_empty(0, device=device))

    @property
    def _widths(self) -> tuple[int, int]:
        return self.fc_weight.size(2), self.proj_weight.size(2)

    def _choose_backend(self, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        return choose_backend(self.backend, dtype, device, rows, self._widths)

    def _feed_forward(self, x_NC: Tensor, router: RouterOutput, backend: str) -> Tensor:
        if self.fc_bias is not None:
            # The weight is applied to the activation below, which is wrong with a bias in the last layer.
            return self._feed_forward_by_layers(x_NC, router, backend)
        layout = dispatch(router, BACKENDS[backend].row_multiple(x_NC))
        y_NC: Tensor = _ExpertsFunction.apply(x_NC, router.weights, self.fc_weight, self.proj_weight, *layout, backend)
        return y_NC

    def _feed_forward_by_layers(self, x_NC: Tensor, router: RouterOutput, backend: str) -> Tensor:
        """Compute layer by layer, with room for biases and LoRA; autograd keeps more for the backward."""
        layout = dispatch(router)
        # N tokens -> S rows -> (S, J) -> (S, I) -> (S, C) -> N tokens
        h_SJ = self._linear("fc", gather(x_NC, layout), layout.ends_E, backend)
        y_SC = self._linear("proj", swiglu(h_SJ), layout.ends_E, backend)
        weights_S = weights_of_rows(router.weights, layout)
        return combine(y_SC * weights_S.unsqueeze(1), layout)  # in fp32, the type of the weights

    def _linear(self, name: str, x_S: Tensor, ends_E: Tensor, backend: str) -> Tensor:
        """Send each row through its expert's layer ``name`` ("fc" or "proj"), in the type of the row."""
        weight_EOC, bias_EO = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        y_SO = grouped_linear(x_S, weight_EOC.to(x_S.dtype), ends_E, backend)
        if bias_EO is not None:
            y_SO = add_bias(y_SO, bias_EO.to(x_S.dtype), ends_E, backend)
        return y_SO

    # ------------------------------------------------------------------------------------------- as LitGPT's ModuleList

    def __len__(self) -> int:
        """Return the number of experts."""
        return self.fc_weight.size(0)

    def __getitem__(self, index: int) -> "Expert":
        """Return an expert by itself, for code that expects LitGPT's ``ModuleList``. See `Expert`."""
        expert = range(len(self))[index]
        gate, up = self.fc_weight[expert].detach().chunk(2)
        gate_bias = up_bias = proj_bias = None
        if self.fc_bias is not None and self.proj_bias is not None:
            gate_bias, up_bias = self.fc_bias[expert].detach().chunk(2)
            proj_bias = self.proj_bias[expert].detach()
        proj = self.proj_weight[expert].detach()
        return Expert(_as_linear(gate, gate_bias), _as_linear(up, up_bias), _as_linear(proj, proj_bias))

    def __iter__(self) -> Iterator["Expert"]:
        """Yield each expert by itself."""
        return (self[index] for index in range(len(self)))

    # ------------------------------------------------------------------------------------------------------ state dict

    def _litgpt_views(self, prefix: str) -> dict[str, tuple[str, Tensor]]:
        """Return LitGPT's key -> (name of the stacked parameter, this key's part of it), in LitGPT's order."""
        stacked = {name: parameter.unbind(0) for name, parameter in self.named_parameters(recurse=False)}
        views: dict[str, tuple[str, Tensor]] = {}
        # fc_1 is above fc_2: the two are one product.
        places = (("fc_1", "fc", 2, 0), ("fc_2", "fc", 2, 1), ("proj", "proj", 1, 0))
        for expert in range(self.fc_weight.size(0)):
            for layer, stacked_layer, parts, part in places:
                for kind in self._KINDS:
                    name = f"{stacked_layer}_{kind}"
                    if name in stacked:
                        view = stacked[name][expert].chunk(parts)[part]
                        views[f"{prefix}{expert}.{layer}.{kind}"] = (name, view)
        return views

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, (_, view) in self._litgpt_views(prefix).items():
            # Views, not copies: a copy would double the memory of each save.
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
        if local_metadata.get("assign_to_params_buffers", False):
            self._take_type_and_device(state_dict, prefix)
        views = self._litgpt_views(prefix)
        for key, (_, view) in views.items():
            if key not in state_dict:
                missing_keys.extend([key] if strict else [])
            elif state_dict[key].shape != view.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {state_dict[key].shape} from checkpoint, "
                    f"the shape in current model is {view.shape}."
                )
            else:
                view.copy_(state_dict[key])
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in views)

    def _take_type_and_device(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace the parameters by empty ones with the type and device of the loaded tensors (``assign=True``).

        The parameters may be on the meta device. LitGPT's tensors are parts of ours, so they are copied, not assigned.
        """
        views = self._litgpt_views(prefix)
        for name, parameter in list(self.named_parameters(recurse=False)):
            keys = [key for key, (stacked_name, _) in views.items() if stacked_name == name]
            if any(key not in state_dict for key in keys):
                continue
            loaded = state_dict[keys[0]]
            storage = torch.empty_like(parameter, dtype=loaded.dtype, device=loaded.device)
            setattr(self, name, nn.Parameter(storage, requires_grad=parameter.requires_grad))


class Expert(nn.Module):
    """One expert with the layers of ``litgpt.model.LLaMAMLP``, to look at it or to write its weights.

    The weights are views of the stacked ones: what is written to them changes the layer. They have no gradients, and
    a replaced weight, a hook or the update of LoRA has no effect on the layer.
    """

    def __init__(self, fc_1: nn.Linear, fc_2: nn.Linear, proj: nn.Linear) -> None:
        super().__init__()
        self.fc_1, self.fc_2, self.proj = fc_1, fc_2, proj

    def forward(self, x: Tensor) -> Tensor:
        """Return the SwiGLU feed-forward of ``x``."""
        y: Tensor = self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))
        return y


def _as_linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight_OI.size(1), weight_OI.size(0), bias=bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    return layer
