"""The experts' arithmetic in plain torch: SwiGLU, and all experts computed one after the other.

The functions that go through the experts are custom operators, so that ``torch.compile`` sees one step and no graph
break. On a GPU each of them waits for the device once, to learn how many rows each expert has.

Shape suffixes: see ``custom_moe``. ``B``: rows of one block of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_silu_out: Callable[..., Tensor] = torch.ops.aten.silu.out
_silu_grad: Callable[..., Tensor] = torch.ops.aten.silu_backward.default
_silu_grad_out: Callable[..., Tensor] = torch.ops.aten.silu_backward.grad_input
Span = tuple[int, int, int]
"""An expert, the first of its rows, and the number of its rows"""

BLOCK_SIZE = 2**18
"""Pre-activations that are computed together, in buffers that all blocks share. On a CPU, fresh memory for each step of
the formula costs as much as the step itself."""


# -------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(h_SJ: Tensor, weights_S: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return ``weights * silu(gate) * up``.

    Args:
        h_SJ: pre-activations, gate next to up.
        weights_S: factor of each row; None for 1.
        out: ``(S, I)`` memory for the result; None keeps the function differentiable and compilable.

    Returns:
        ``(S, I)`` in the type of ``h``.
    """
    # With out=None each operation returns a new tensor; with out they all write to the same memory.
    gate_SI, up_SI = h_SJ.chunk(2, dim=1)
    a_SI = torch.mul(_silu(gate_SI, out), up_SI, out=out)
    if weights_S is None:
        return a_SI
    return torch.mul(a_SI, weights_S.to(h_SJ.dtype).unsqueeze(1), out=out)


class SwiGLUBuffers(NamedTuple):
    """Memory for ``swiglu_backward``, so that nothing is allocated; all in the type of ``h`` but ``dweights``."""

    dh_SJ: Tensor
    silu_SI: Tensor
    a_SI: Tensor
    dweights_S: Tensor
    da_SI: Tensor
    """May be the incoming gradient, which is then overwritten"""


def swiglu_backward(
    h_SJ: Tensor, weights_S: Tensor, da_SI: Tensor, buffers: SwiGLUBuffers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the backward pass needs of the activation.

    Args:
        h_SJ: pre-activations.
        weights_S: fp32, factor of each row.
        da_SI: gradient of the result of ``swiglu``.
        buffers: memory for the results and intermediate values; None allocates it.

    Returns:
        The gradient of ``h`` ``(S, J)``, the result of ``swiglu`` again ``(S, I)``, and the gradient of ``weights``
        ``(S,)`` in fp32.
    """
    if buffers is None:
        dh_out = silu_out = a_out = dweights_out = da_out = dgate_out = dup_out = None
    else:
        dh_out, silu_out, a_out, dweights_out, da_out = buffers
        dgate_out, dup_out = dh_out.chunk(2, dim=1)
    gate_SI, up_SI = h_SJ.chunk(2, dim=1)
    weights_S1 = weights_S.to(h_SJ.dtype).unsqueeze(1)

    silu_SI = _silu(gate_SI, silu_out)
    a_SI = torch.mul(silu_SI, up_SI, out=a_out)
    # The weight is applied to the activation, the narrowest place, so its gradient needs no expert output (SonicMoE,
    # arXiv 2512.14080). The memory of dgate is free until dgate itself is computed.
    product_SI = torch.mul(da_SI, a_SI, out=dgate_out)
    dweights_S = torch.sum(product_SI, dim=1, dtype=torch.float32, out=dweights_out)

    a_SI = torch.mul(a_SI, weights_S1, out=a_out)
    da_SI = torch.mul(da_SI, weights_S1, out=da_out)
    dup_SI = torch.mul(da_SI, silu_SI, out=dup_out)
    dgate_SI = _silu_backward(torch.mul(da_SI, up_SI, out=da_out), gate_SI, dgate_out)
    dh_SJ = torch.cat([dgate_SI, dup_SI], dim=1) if dh_out is None else dh_out
    return dh_SJ, a_SI, dweights_S


def _silu(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return F.silu(x)
    return _silu_out(x, out=out)


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return _silu_grad(grad, x)
    return _silu_grad_out(grad, x, grad_input=out)


# ------------------------------------------------------------------------------------------- one expert after the other


def row_multiple(x_NC: Tensor) -> int:
    """Return the number that each expert's rows are padded to a multiple of.

    oneDNN, which multiplies bf16 matrices on a CPU, builds a kernel for each new number of rows: thirty times the time
    of a small product, and routing gives new numbers in each step. Few tokens, as in generation, have few such
    numbers, and padding would be most of their work.
    """
    padded = x_NC.device.type == "cpu" and x_NC.dtype == torch.bfloat16 and x_NC.size(0) > 64
    return 64 if padded else 1


@torch.library.custom_op("custom_moe::loop_multiply", mutates_args=())
def loop_multiply(x_RC: Tensor, weight_EOC: Tensor, ends_E: Tensor) -> Tensor:
    """Compute ``custom_moe.backends.ExpertBackend.multiply`` expert by expert."""
    y_RO = x_RC.new_empty(len(x_RC), weight_EOC.size(1))
    _multiply(x_RC, weight_EOC, _spans(ends_E), out=y_RO)
    return y_RO


@loop_multiply.register_fake
def _(x_RC: Tensor, weight_EOC: Tensor, ends_E: Tensor) -> Tensor:
    return x_RC.new_empty(x_RC.size(0), weight_EOC.size(1))


@torch.library.custom_op("custom_moe::loop_weight_gradient", mutates_args=())
def loop_weight_gradient(grad_RO: Tensor, x_RC: Tensor, ends_E: Tensor) -> Tensor:
    """Compute ``custom_moe.backends.ExpertBackend.weight_gradient`` expert by expert."""
    dweight_EOC = x_RC.new_empty(len(ends_E), grad_RO.size(1), x_RC.size(1))
    _weight_gradient(grad_RO, x_RC, _spans(ends_E), out=dweight_EOC)
    return dweight_EOC


@loop_weight_gradient.register_fake
def _(grad_RO: Tensor, x_RC: Tensor, ends_E: Tensor) -> Tensor:
    return x_RC.new_empty(ends_E.size(0), grad_RO.size(1), x_RC.size(1))


@torch.library.custom_op("custom_moe::loop_forward", mutates_args=())
def loop_forward(
    x_NC: Tensor, weights_R: Tensor, fc_EJC: Tensor, proj_ECI: Tensor, token_R: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``custom_moe.backends.ExpertBackend.forward`` expert by expert.

    Returns:
        The output of each row ``(R, C)`` and the pre-activations ``(R, J)``.
    """
    # h is kept for the backward. The gathered rows and the activation live in buffers that the blocks share.
    R, C, J = len(token_R), x_NC.size(1), fc_EJC.size(1)
    y_RC, h_RJ = x_NC.new_empty(R, C), x_NC.new_empty(R, J)
    blocks = _blocks(ends_E, J)
    largest = max(block.n_rows for block in blocks)
    x_BC, a_BI = x_NC.new_empty(largest, C), x_NC.new_empty(largest, J // 2)
    for start, n_rows, block_spans in blocks:
        x, a = x_BC.narrow(0, 0, n_rows), a_BI.narrow(0, 0, n_rows)
        h, y = h_RJ.narrow(0, start, n_rows), y_RC.narrow(0, start, n_rows)
        torch.index_select(x_NC, 0, token_R.narrow(0, start, n_rows), out=x)
        # (B, C) -> (B, J) -> (B, I) -> (B, C)
        _multiply(x, fc_EJC, block_spans, out=h)
        swiglu(h, weights_R.narrow(0, start, n_rows), out=a)
        _multiply(a, proj_ECI, block_spans, out=y)
    return y_RC, h_RJ


@loop_forward.register_fake
def _(
    x_NC: Tensor, weights_R: Tensor, fc_EJC: Tensor, proj_ECI: Tensor, token_R: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    R = token_R.size(0)
    return x_NC.new_empty(R, x_NC.size(1)), x_NC.new_empty(R, fc_EJC.size(1))


@torch.library.custom_op("custom_moe::loop_backward", mutates_args=())
def loop_backward(
    dy_NC: Tensor,
    x_NC: Tensor,
    weights_R: Tensor,
    h_RJ: Tensor,
    fc_EJC: Tensor,
    proj_ECI: Tensor,
    token_R: Tensor,
    ends_E: Tensor,
    need_fc: bool,
    need_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients, as ``custom_moe.backends.ExpertBackend.backward``.

    Returns:
        The gradients of the gathered rows ``(R, C)``, of ``weights`` (fp32), of ``fc`` and of ``proj``; the last two
        are empty if not needed.
    """
    R, C, I = len(token_R), x_NC.size(1), proj_ECI.size(2)  # noqa: E741
    dx_RC, dweights_R = x_NC.new_empty(R, C), torch.empty_like(weights_R)
    dfc_EJC, dproj_ECI = _empty_like(fc_EJC, need_fc), _empty_like(proj_ECI, need_proj)
    blocks = _blocks(ends_E, 2 * I)
    largest = max(block.n_rows for block in blocks)
    buffers = [x_NC.new_empty(largest, width) for width in (C, 2 * I, I, I, I)]
    for start, n_rows, spans in blocks:
        x, dh, da, silu, a = (buffer.narrow(0, 0, n_rows) for buffer in buffers)
        tokens, h = token_R.narrow(0, start, n_rows), h_RJ.narrow(0, start, n_rows)
        weights, dweights = weights_R.narrow(0, start, n_rows), dweights_R.narrow(0, start, n_rows)
        dy = x  # the same memory: x is gathered when dy is not needed any more
        torch.index_select(dy_NC, 0, tokens, out=dy)
        _multiply(dy, proj_ECI.transpose(1, 2), spans, out=da)
        swiglu_backward(h, weights, da, SwiGLUBuffers(dh, silu, a, dweights, da))
        # swiglu_backward left the activation in a and the gradient of h in dh.
        if need_proj:
            _weight_gradient(dy, a, spans, out=dproj_ECI)
        if need_fc:
            torch.index_select(x_NC, 0, tokens, out=x)
            _weight_gradient(dh, x, spans, out=dfc_EJC)
        _multiply(dh, fc_EJC.transpose(1, 2), spans, out=dx_RC.narrow(0, start, n_rows))
    return dx_RC, dweights_R, dfc_EJC, dproj_ECI


@loop_backward.register_fake
def _(
    dy_NC: Tensor,
    x_NC: Tensor,
    weights_R: Tensor,
    h_RJ: Tensor,
    fc_EJC: Tensor,
    proj_ECI: Tensor,
    token_R: Tensor,
    ends_E: Tensor,
    need_fc: bool,
    need_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx_RC = x_NC.new_empty(token_R.size(0), x_NC.size(1))
    return dx_RC, torch.empty_like(weights_R), _empty_like(fc_EJC, need_fc), _empty_like(proj_ECI, need_proj)


def _empty_like(weight: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(weight) if needed else weight.new_empty(0)


class _Block(NamedTuple):
    """Neighboring rows that are computed together."""

    start: int
    n_rows: int
    spans: list[Span]
    """Relative to the start of the block"""


def _spans(ends_E: Tensor) -> list[Span]:
    """Return the rows of each expert."""
    spans = []
    start = 0
    for expert, end in enumerate(ends_E.tolist()):  # on a GPU this waits for the device
        spans.append((expert, start, end - start))
        start = end
    return spans


def _blocks(ends_E: Tensor, width: int) -> list[_Block]:
    """Divide the rows into blocks of at most ``BLOCK_SIZE // width``, or of one expert."""
    blocks = [_Block(0, 0, [])]
    for expert, start, n_rows in _spans(ends_E):
        # An expert's rows stay together, so that each product is computed in one piece.
        block = blocks.pop()
        if block.n_rows > 0 and (block.n_rows + n_rows) * width > BLOCK_SIZE:
            blocks.append(block)
            block = _Block(start, 0, [])
        block.spans.append((expert, start - block.start, n_rows))
        blocks.append(block._replace(n_rows=block.n_rows + n_rows))
    return blocks


def _multiply(x_BC: Tensor, weight_EOC: Tensor, spans: list[Span], out: Tensor) -> None:
    """Multiply each expert's rows with its transposed weight."""
    for expert, start, n_rows in spans:
        if n_rows > 0:  # with few tokens, most experts have none
            weight_CO = weight_EOC.select(0, expert).t()
            torch.mm(x_BC.narrow(0, start, n_rows), weight_CO, out=out.narrow(0, start, n_rows))


def _weight_gradient(grad_BO: Tensor, x_BC: Tensor, spans: list[Span], out: Tensor) -> None:
    """Multiply each expert's transposed gradients with its rows; the result is 0 for an expert without rows."""
    for expert, start, n_rows in spans:
        grad_OB = grad_BO.narrow(0, start, n_rows).t()
        torch.mm(grad_OB, x_BC.narrow(0, start, n_rows), out=out.select(0, expert))
