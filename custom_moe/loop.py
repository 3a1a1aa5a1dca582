"""The experts one after the other: on any device, in any type; on a GPU it waits for the device once in each direction.

These are operators of their own, so that ``torch.compile`` sees one step and no graph break.

Shape suffixes: N tokens, C input width, E experts, S rows sorted by expert, B those of a block, I an expert's hidden
width, J = 2*I gate and up together, O output width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

BLOCK_SIZE = 2**18
"""How many pre-activations are worked on together, in memory that all blocks share: on a CPU, fresh memory for each
step of the formula costs as much as the step."""


def padded_rows(x_NC: Tensor) -> int:
    """What an expert's rows should be a multiple of. oneDNN, which multiplies bf16 matrices on a CPU, builds a kernel
    for each new number of rows: thirty times a small product's own time, and routing brings new numbers at each step.
    Few tokens, as in generation, have few such numbers, and padding would be most of their work.
    """
    return 64 if x_NC.device.type == "cpu" and x_NC.dtype == torch.bfloat16 and x_NC.size(0) > 64 else 1


@torch.library.custom_op("custom_moe::loop_multiply", mutates_args=())
def multiply(x_SC: Tensor, weight_EOC: Tensor, ends_E: Tensor) -> Tensor:
    """``custom_moe.backends.multiply``"""
    y_SO = x_SC.new_empty(len(x_SC), weight_EOC.size(1))
    _multiply(x_SC, weight_EOC, _sizes(ends_E), out=y_SO)
    return y_SO


@multiply.register_fake
def _(x_SC: Tensor, weight_EOC: Tensor, ends_E: Tensor) -> Tensor:
    return x_SC.new_empty(x_SC.size(0), weight_EOC.size(1))


@torch.library.custom_op("custom_moe::loop_weight_gradient", mutates_args=())
def weight_gradient(grad_SO: Tensor, x_SC: Tensor, ends_E: Tensor) -> Tensor:
    """``custom_moe.backends.weight_gradient``"""
    dweight_EOC = x_SC.new_empty(len(ends_E), grad_SO.size(1), x_SC.size(1))
    _weight_gradient(grad_SO, x_SC, _sizes(ends_E), out=dweight_EOC)
    return dweight_EOC


@weight_gradient.register_fake
def _(grad_SO: Tensor, x_SC: Tensor, ends_E: Tensor) -> Tensor:
    return x_SC.new_empty(ends_E.size(0), grad_SO.size(1), x_SC.size(1))


@torch.library.custom_op("custom_moe::loop_swiglu", mutates_args=())
def swiglu(
    x_NC: Tensor, weights_S: Tensor, fc_EJC: Tensor, proj_ECI: Tensor, token_S: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """``custom_moe.swiglu.grouped_swiglu`` up to the sum: each row's output ``(S, C)``, and its pre-activations."""
    S, C, I = len(token_S), x_NC.size(1), proj_ECI.size(2)  # noqa: E741
    y_SC, h_SJ, weights_S1 = x_NC.new_empty(S, C), x_NC.new_empty(S, 2 * I), weights_S.to(x_NC.dtype).unsqueeze(1)
    blocks = _blocks(ends_E, 2 * I)
    most = max(sum(sizes) for _, _, sizes in blocks)
    x_BC, a_BI = x_NC.new_empty(most, C), x_NC.new_empty(most, I)
    for experts, rows, sizes in blocks:
        x, a, h = x_BC[: sum(sizes)], a_BI[: sum(sizes)], h_SJ[rows]
        gate, up = h.chunk(2, dim=1)
        torch.index_select(x_NC, 0, token_S[rows], out=x)
        _multiply(x, fc_EJC[experts], sizes, out=h)
        aten.silu.out(gate, out=a)
        a.mul_(up).mul_(weights_S1[rows])
        _multiply(a, proj_ECI[experts], sizes, out=y_SC[rows])
    return y_SC, h_SJ


@swiglu.register_fake
def _(
    x_NC: Tensor, weights_S: Tensor, fc_EJC: Tensor, proj_ECI: Tensor, token_S: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    S = token_S.size(0)
    return x_NC.new_empty(S, x_NC.size(1)), x_NC.new_empty(S, fc_EJC.size(1))


@torch.library.custom_op("custom_moe::loop_swiglu_backward", mutates_args=())
def swiglu_backward(
    dy_NC: Tensor,
    x_NC: Tensor,
    weights_S: Tensor,
    h_SJ: Tensor,
    fc_EJC: Tensor,
    proj_ECI: Tensor,
    token_S: Tensor,
    ends_E: Tensor,
    need_fc: bool,
    need_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the sum: those of each row ``(S, C)``, of ``weights`` (fp32), of ``fc`` and ``proj``, which
    are empty where they are not needed."""
    S, C, I = len(token_S), x_NC.size(1), proj_ECI.size(2)  # noqa: E741
    dx_SC, dweights_S, weights_S1 = x_NC.new_empty(S, C), torch.empty_like(weights_S), weights_S.to(x_NC.dtype)[:, None]
    dfc_EJC, dproj_ECI = _like(fc_EJC, need_fc), _like(proj_ECI, need_proj)
    blocks = _blocks(ends_E, 2 * I)
    most = max(sum(sizes) for _, _, sizes in blocks)
    x_BC, dh_BJ, da_BI, silu_BI, a_BI = (x_NC.new_empty(most, width) for width in (C, 2 * I, I, I, I))
    for experts, rows, sizes in blocks:
        x, dh, da, silu, a = (buffer[: sum(sizes)] for buffer in (x_BC, dh_BJ, da_BI, silu_BI, a_BI))
        (gate, up), (dgate, dup) = h_SJ[rows].chunk(2, dim=1), dh.chunk(2, dim=1)
        dy, product = x, dgate  # their memory is free until x and dgate themselves are worked out
        torch.index_select(dy_NC, 0, token_S[rows], out=dy)
        _multiply(dy, proj_ECI[experts].transpose(1, 2), sizes, out=da)
        aten.silu.out(gate, out=silu)
        torch.mul(silu, up, out=a)
        torch.mul(da, a, out=product)
        torch.sum(product, dim=1, dtype=torch.float32, out=dweights_S[rows])
        a.mul_(weights_S1[rows])
        da.mul_(weights_S1[rows])
        if need_proj:
            _weight_gradient(dy, a, sizes, out=dproj_ECI[experts])
        torch.mul(da, silu, out=dup)
        aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
        if need_fc:
            torch.index_select(x_NC, 0, token_S[rows], out=x)
            _weight_gradient(dh, x, sizes, out=dfc_EJC[experts])
        _multiply(dh, fc_EJC[experts].transpose(1, 2), sizes, out=dx_SC[rows])
    return dx_SC, dweights_S, dfc_EJC, dproj_ECI


@swiglu_backward.register_fake
def _(
    dy_NC: Tensor,
    x_NC: Tensor,
    weights_S: Tensor,
    h_SJ: Tensor,
    fc_EJC: Tensor,
    proj_ECI: Tensor,
    token_S: Tensor,
    ends_E: Tensor,
    need_fc: bool,
    need_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx_SC = x_NC.new_empty(token_S.size(0), x_NC.size(1))
    return dx_SC, torch.empty_like(weights_S), _like(fc_EJC, need_fc), _like(proj_ECI, need_proj)


def _like(weight: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(weight) if needed else weight.new_empty(0)


class _Block(NamedTuple):
    """Neighbouring experts and their rows."""

    experts: slice
    rows: slice
    sizes: list[int]
    """How many rows each of them has"""


def _sizes(ends_E: Tensor) -> list[int]:
    """How many rows each expert has."""
    ends = ends_E.tolist()  # on a GPU this waits for the device
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _blocks(ends_E: Tensor, width: int) -> list[_Block]:
    """All experts, in blocks of rows with ``BLOCK_SIZE`` numbers in a width, or of one expert."""
    all_sizes = _sizes(ends_E)
    blocks, first, start = [], 0, 0
    for end in range(1, len(all_sizes) + 1):
        sizes = all_sizes[first:end]
        if sum(all_sizes[first : end + 1]) * width > BLOCK_SIZE or end == len(all_sizes):
            blocks.append(_Block(slice(first, end), slice(start, start + sum(sizes)), sizes))
            first, start = end, start + sum(sizes)
    return blocks


def _multiply(x_BC: Tensor, weight_EOC: Tensor, sizes: list[int], out: Tensor) -> None:
    for x, weight_CO, y in zip(
        torch.split(x_BC, sizes), weight_EOC.transpose(1, 2), torch.split(out, sizes), strict=True
    ):
        torch.mm(x, weight_CO, out=y)


def _weight_gradient(grad_BO: Tensor, x_BC: Tensor, sizes: list[int], out: Tensor) -> None:
    for grad_OB, x, dweight_OC in zip(
        torch.split(grad_BO.t(), sizes, dim=1), torch.split(x_BC, sizes), out, strict=True
    ):
        torch.mm(grad_OB, x, out=dweight_OC)  # 0 where there are no rows
