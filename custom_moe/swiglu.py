"""All experts' SwiGLU as one differentiable function that keeps little for its backward.

Plain autograd would keep the gathered rows, the pre-activations, the activations, their product, the experts' outputs
and their gathered form. This keeps the pre-activations and the layer's own input (which others keep anyway), and works
the rest out again: gathering and activating are cheap beside the products. A token's router weight is applied to the
activation, the narrowest place, so that its gradient is a row sum that needs no expert output (SonicMoE, arXiv
2512.14080).

Shape suffixes: N tokens, C n_embd, E n_expert, K n_expert_per_token, S rows sorted by expert (see
``custom_moe.dispatch``), I an expert's hidden width, J = 2*I gate and up together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_moe import loop
from custom_moe.backends import Backend, hardware_of, multiply, weight_gradient
from custom_moe.dispatch import ExpertOrder, sum_rows, weights_of_rows


def grouped_swiglu(
    x_NC: Tensor, weights_NK: Tensor, fc_EJC: Tensor, proj_ECI: Tensor, order: ExpertOrder, backend: Backend
) -> Tensor:
    """``sum_k weights[n, k] * proj_e(silu(gate_e(x_n)) * up_e(x_n))`` over each token's experts ``e``: ``(N, C)``.

    Args:
        x_NC: tokens.
        weights_NK: the router's weights, fp32.
        fc_EJC: each expert's gate above its up projection. Under mixed precision they are of another type than ``x``,
            and cast in each direction: keeping the copy would be as much memory as half the weights.
        proj_ECI: each expert's down projection, likewise.
        order: of the chosen experts; may have padding.
        backend: see ``custom_moe.backends``.
    """
    y_NC: Tensor = _GroupedSwiGLU.apply(x_NC, weights_NK, fc_EJC, proj_ECI, *order, backend)
    return y_NC


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weights_NK: Tensor,
        fc_EJC: Tensor,
        proj_ECI: Tensor,
        token_S: Tensor,
        row_NK: Tensor,
        ends_E: Tensor,
        backend: Backend,
    ) -> Tensor:
        weights_S = weights_of_rows(weights_NK, ExpertOrder(token_S, row_NK, ends_E))
        fc, proj = fc_EJC.to(x_NC.dtype), proj_ECI.to(x_NC.dtype)
        if backend == "loop":
            y_SC, h_SJ = loop.swiglu(x_NC, weights_S, fc, proj, token_S, ends_E)
        else:
            h_SJ = multiply(x_NC, fc, ends_E, backend, rows_S=token_S)
            y_SC = multiply(_swiglu(h_SJ, weights_S, backend), proj, ends_E, backend)
        ctx.save_for_backward(x_NC, weights_S, h_SJ, fc_EJC, proj_ECI, token_S, row_NK, ends_E)
        ctx.backend = backend
        return sum_rows(y_SC, row_NK)

    @staticmethod
    def backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weights_S, h_SJ, fc_EJC, proj_ECI, token_S, row_NK, ends_E = ctx.saved_tensors
        backend: Backend = ctx.backend
        _, _, need_fc, need_proj, *_ = ctx.needs_input_grad
        fc, proj = fc_EJC.to(x_NC.dtype), proj_ECI.to(x_NC.dtype)
        dfc_EJC: Tensor | None = None
        dproj_ECI: Tensor | None = None
        if backend == "loop":
            dx_SC, dweights_S, dfc_EJC, dproj_ECI = loop.swiglu_backward(
                dy_NC, x_NC, weights_S, h_SJ, fc, proj, token_S, ends_E, need_fc, need_proj
            )
        else:
            da_SI = multiply(dy_NC, proj.transpose(1, 2), ends_E, backend, rows_S=token_S)
            dh_SJ, a_SI, dweights_S = _swiglu_backward(h_SJ, weights_S, da_SI, backend)
            del da_SI
            if need_proj:
                dproj_ECI = weight_gradient(dy_NC, a_SI, ends_E, backend, grad_rows_S=token_S)
            del a_SI
            if need_fc:
                dfc_EJC = weight_gradient(dh_SJ, x_NC, ends_E, backend, x_rows_S=token_S)
            dx_SC = multiply(dh_SJ, fc.transpose(1, 2), ends_E, backend)
        # fp32 parameters under mixed precision get gradients in the type of the products: autograd casts them.
        dweights_NK = dweights_S.index_select(0, row_NK.flatten()).view(row_NK.shape)
        dfc_EJC, dproj_ECI = dfc_EJC if need_fc else None, dproj_ECI if need_proj else None
        return sum_rows(dx_SC, row_NK), dweights_NK, dfc_EJC, dproj_ECI, None, None, None, None


def _in_one_kernel(h_SJ: Tensor, backend: Backend) -> bool:
    """Whether Triton activates. A compiler would fuse the plain functions by itself."""
    eager = h_SJ.is_cuda and not torch.compiler.is_compiling()
    return backend == "triton" or (eager and hardware_of(h_SJ.device).triton)


def _swiglu(h_SJ: Tensor, weights_S: Tensor, backend: Backend) -> Tensor:
    """``(S, I)``, times each row's weight."""
    if _in_one_kernel(h_SJ, backend):
        from custom_moe import triton_kernels

        a_SI: Tensor = triton_kernels.swiglu(h_SJ, weights_S)
        return a_SI
    gate_SI, up_SI = h_SJ.chunk(2, dim=1)
    return F.silu(gate_SI) * up_SI * weights_S.to(h_SJ.dtype).unsqueeze(1)


def _swiglu_backward(h_SJ: Tensor, weights_S: Tensor, da_SI: Tensor, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient to ``h``, the weighted activation once more, and the gradient to the weights (fp32)."""
    if _in_one_kernel(h_SJ, backend):
        from custom_moe import triton_kernels

        gradients: tuple[Tensor, Tensor, Tensor] = triton_kernels.swiglu_backward(h_SJ, weights_S, da_SI)
        return gradients
    gate_SI, up_SI = h_SJ.chunk(2, dim=1)
    weights_S1 = weights_S.to(h_SJ.dtype).unsqueeze(1)
    silu_SI = F.silu(gate_SI)
    a_SI = silu_SI * up_SI
    dweights_S = (da_SI * a_SI).sum(dim=1, dtype=torch.float32)
    da_SI = da_SI * weights_S1
    dgate_SI = torch.ops.aten.silu_backward(da_SI * up_SI, gate_SI)
    return torch.cat([dgate_SI, da_SI * silu_SI], dim=1), a_SI * weights_S1, dweights_S
