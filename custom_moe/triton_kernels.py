# ruff: noqa: E741 (O and I are letters of the legend)
"""Grouped matrix products and the experts' SwiGLU as Triton kernels.

They are for NVIDIA GPUs on which torch's ``grouped_mm`` has no fast kernel (compute capability 8.0, 8.6, 8.9, 12.0).
None of them waits for the GPU.

Experimental: their results are tested, in Triton's interpreter and on a GPU; their speed has not been measured on the
GPUs they are for.

Import this module only where Triton is installed, inside the function that needs it. The import registers the operators
``custom_moe::*`` and has no other effect.

Shape suffixes: see ``custom_moe``. ``S`` are the rows of one operator, ``N`` the rows that they are gathered from.
``ends_E`` (int32) says where each expert's rows end; an expert may have none. In a kernel the same names are pointers,
and lower-case letters are the indices that a program works on.

How ``multiply`` divides its work: the output is cut into tiles of BLOCK_S rows and BLOCK_O columns, with one program
per tile. All rows of a tile must belong to one expert, but only the GPU knows ``ends_E``, so the grid has the largest
size that may be needed: expert ``e`` with the rows ``start`` to ``end`` owns the row tiles ``start // BLOCK_S + e`` to
``end // BLOCK_S + e``. These are always enough for its rows, follow those of the previous expert without a gap, and are
``S // BLOCK_S + E`` in all. A program finds its expert by counting the experts whose last tile is before its own, and
returns if that expert's rows end before the tile. ``weight_gradient`` needs no search: the program of one tile of one
expert's gradient goes through that expert's rows in order, so each run gives the same bits.

Tile sizes are fixed by type and GPU, not timed at the start: an autotuner may choose differently in the next session,
and a resumed run would then differ from the uninterrupted one.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How one program computes an output of ``rows`` x ``columns``, in steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Steps that are loaded ahead, each ``depth * (rows + columns)`` numbers in shared memory"""


def choose_tile(dtype: torch.dtype, capability: tuple[int, int], aligned: bool = True, tf32: bool = False) -> Tile:
    """Return the tile for a type and a compute capability.

    Args:
        dtype: type of the inputs.
        capability: of the GPU.
        aligned: whether all widths are multiples of 16.
        tf32: whether fp32 is computed in TF32.
    """
    # Two programs should fit on a multiprocessor, so that one computes while the other begins or ends
    # (benchmarks/triton_resources.py shows them). An accumulator of 128 x 128 takes a quarter of the registers. Shared
    # memory is 100 kB on consumer GPUs (8.6, 8.9, 12.x), 164 kB on 8.0, and 228 kB on 9.0 and 10.x.
    if not aligned:
        # Each number is read on its own then: its address needs registers too, and two bytes can't be copied ahead.
        return Tile(64, 64, 16 if dtype == torch.float32 else 32, 4, 1)
    if dtype == torch.float32:
        return Tile(128, 64, 32, 4, 3) if tf32 else Tile(64, 64, 16, 4, 3)
    return Tile(128, 128, 64, 8, 3) if capability[0] in (9, 10) else Tile(128, 128, 32, 4, 4)


def _options(x: Tensor, *widths: int) -> tuple[Tile, dict[str, Any]]:
    """Return the tile for ``x``, and the options that all matrix products are compiled with."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)  # no GPU: Triton's interpreter
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tile = choose_tile(x.dtype, capability, all(width % 16 == 0 for width in widths), tf32)
    return tile, {"PRECISION": "tf32" if tf32 else "ieee", "enable_fp_fusion": True}


GROUP = tl.constexpr(8)
"""Row tiles that go through all columns together, so that rows and weights stay in the L2 cache"""


@triton.jit
def _tile_of(index, n_row, n_column):
    """Return row and column of tile number ``index``: down a group of rows, then to the next column."""
    first = index // (GROUP * n_column) * GROUP
    rows = tl.minimum(n_row - first, GROUP)
    within = index % (GROUP * n_column)
    return first + within % rows, within // rows


@triton.jit(do_not_specialize=["n_tile"])
def multiply_kernel(
    x_NC,
    weight_EOC,
    y_SO,
    ends_E,
    rows_S,  # or None
    n_tile,
    E,
    C,
    O,
    stride_E,
    stride_O,
    stride_C,
    EVEN: tl.constexpr,  # C is a multiple of BLOCK_C
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, column = _tile_of(tl.program_id(0), n_tile, tl.cdiv(O, BLOCK_O))
    # The expert of this tile: as many as have all their tiles before it.
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_E + e, mask=e < E, other=0)
    expert = tl.sum(((ends // BLOCK_S + e < tile) & (e < E)).to(tl.int32))
    if expert >= E:
        return
    # The first of the tile's rows. The grid has more tiles than rows need.
    start = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)
    first = start + (tile - start // BLOCK_S - expert) * BLOCK_S
    if first >= end:
        return

    s = first + tl.arange(0, BLOCK_S)
    row = tl.minimum(s, end - 1)  # past the end read the last row again, which needs no mask; it is not stored
    if rows_S is not None:
        row = tl.load(rows_S + row)
    o = (column * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)  # 64 bits: products of sizes may not fit into 32
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    x_SC = x_NC + row.to(tl.int64)[:, None] * C + c[None, :]
    weight_CO = weight_EOC + expert.to(tl.int64) * stride_E + o[None, :] * stride_O + c[:, None] * stride_C
    # y = x @ weight.T in steps of BLOCK_C, summed in fp32.
    y = tl.zeros((BLOCK_S, BLOCK_O), dtype=tl.float32)
    for done in range(0, C, BLOCK_C):
        inside = (c < C - done) | EVEN
        x = tl.load(x_SC, mask=inside[None, :], other=0.0)
        weight = tl.load(weight_CO, mask=inside[:, None] & (o < O)[None, :], other=0.0)
        y = tl.dot(x, weight, y, input_precision=PRECISION)
        x_SC += BLOCK_C
        weight_CO += BLOCK_C * stride_C
    y_SO += s.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(y_SO, y.to(y_SO.dtype.element_ty), mask=(s < end)[:, None] & (o < O)[None, :])


@torch.library.custom_op("custom_moe::multiply", mutates_args=())
def multiply(x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_S: Tensor | None = None) -> Tensor:
    """Multiply each row with its expert's transposed weight: ``(S, O)`` in the type of ``x``, summed in fp32.

    Args:
        x_NC: rows sorted by expert, or the tensor that ``rows_S`` gathers them from; bf16, fp16 or fp32, which is
            computed in TF32 if ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".
        weight_EOC: in the same type, with any strides, so that ``weight.transpose(1, 2)`` is not copied.
        ends_E: int32, where each expert's rows end; the last is S.
        rows_S: assignment s reads ``x_NC[rows_S[s]]``.
    """
    E, O, C = weight_EOC.shape
    y_SO = x_NC.new_empty((x_NC if rows_S is None else rows_S).size(0), O)
    tile, options = _options(x_NC, C, O)
    rows = min(tile.rows, max(16, triton.next_power_of_2(y_SO.size(0) // E)))  # smaller tiles for few rows
    n_tile = y_SO.size(0) // rows + E
    with torch.cuda.device_of(x_NC):
        multiply_kernel[(n_tile * triton.cdiv(O, tile.columns),)](
            *(x_NC.contiguous(), weight_EOC, y_SO, ends_E, rows_S, n_tile, E, C, O, *weight_EOC.stride()),
            EVEN=C % tile.depth == 0,
            BLOCK_E=triton.next_power_of_2(E),
            BLOCK_S=rows,
            BLOCK_O=tile.columns,
            BLOCK_C=tile.depth,
            num_warps=min(tile.warps, max(4, rows // 16)),
            num_stages=tile.stages,
            **options,
        )
    return y_SO


@multiply.register_fake
def _(x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_S: Tensor | None = None) -> Tensor:
    return x_NC.new_empty((x_NC if rows_S is None else rows_S).size(0), weight_EOC.size(1))


@triton.jit
def weight_gradient_kernel(
    grad_NO,
    x_NC,
    out_EOC,
    ends_E,
    grad_rows_S,  # or None
    x_rows_S,  # or None
    C,
    O,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n_row, n_column = tl.cdiv(O, BLOCK_O), tl.cdiv(C, BLOCK_C)
    expert = tl.program_id(0) // (n_row * n_column)
    row, column = _tile_of(tl.program_id(0) % (n_row * n_column), n_row, n_column)
    start = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)

    # out = grad.T @ x over the expert's rows, in steps of BLOCK_S, summed in fp32. Without rows it stays 0.
    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    out = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    for first in range(start, end, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = s < end  # masks both factors: zero times an infinity of the next expert is not zero
        grad_row, x_row = s, s
        if grad_rows_S is not None:
            grad_row = tl.load(grad_rows_S + s, mask=inside, other=0)
        if x_rows_S is not None:
            x_row = tl.load(x_rows_S + s, mask=inside, other=0)
        grad_OS = grad_NO + grad_row.to(tl.int64)[None, :] * O + o[:, None]
        x_SC = x_NC + x_row.to(tl.int64)[:, None] * C + c[None, :]
        grad = tl.load(grad_OS, mask=(o < O)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_SC, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        out = tl.dot(grad, x, out, input_precision=PRECISION)
    out_EOC += (expert.to(tl.int64) * O + o[:, None]) * C + c[None, :]
    tl.store(out_EOC, out.to(out_EOC.dtype.element_ty), mask=(o < O)[:, None] & (c < C)[None, :])


@torch.library.custom_op("custom_moe::weight_gradient", mutates_args=())
def weight_gradient(
    grad_NO: Tensor, x_NC: Tensor, ends_E: Tensor, grad_rows_S: Tensor | None = None, x_rows_S: Tensor | None = None
) -> Tensor:
    """Return the sum over each expert's rows of ``outer(grad, x)``: ``(E, O, C)``, 0 for an expert without rows.

    It has the type of ``x`` and is summed in fp32, in the order of the rows. The arguments are as for ``multiply``;
    ``grad`` and ``x`` may be gathered separately.
    """
    E, O, C = ends_E.size(0), grad_NO.size(1), x_NC.size(1)
    out_EOC = x_NC.new_empty(E, O, C)
    tile, options = _options(x_NC, C, O)
    gathered = grad_rows_S is not None or x_rows_S is not None
    with torch.cuda.device_of(x_NC):
        weight_gradient_kernel[(E * triton.cdiv(O, tile.rows) * triton.cdiv(C, tile.columns),)](
            *(grad_NO.contiguous(), x_NC.contiguous(), out_EOC, ends_E, grad_rows_S, x_rows_S, C, O),
            BLOCK_O=tile.rows,
            BLOCK_C=tile.columns,
            BLOCK_S=tile.depth,
            num_warps=tile.warps,
            # Triton divides the stages between loading the row numbers and loading the rows.
            num_stages=2 * tile.stages - 1 if gathered else tile.stages,
            **options,
        )
    return out_EOC


@weight_gradient.register_fake
def _(
    grad_NO: Tensor, x_NC: Tensor, ends_E: Tensor, grad_rows_S: Tensor | None = None, x_rows_S: Tensor | None = None
) -> Tensor:
    return x_NC.new_empty(ends_E.size(0), grad_NO.size(1), x_NC.size(1))


@triton.jit(do_not_specialize=["S"])
def swiglu_kernel(h_SJ, weights_S, a_SI, S, I, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = s.to(tl.int64)[:, None]
    weight = tl.load(weights_S + s, mask=s < S, other=0.0).to(tl.float32)[:, None]
    # Each row of h is I gates, then I ups.
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)[None, :]
        inside = (s < S)[:, None] & (i < I)
        gate = tl.load(h_SJ + row * 2 * I + i, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_SJ + row * 2 * I + I + i, mask=inside, other=0.0).to(tl.float32)
        a = weight * (gate * tl.sigmoid(gate) * up)
        tl.store(a_SI + row * I + i, a.to(a_SI.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])
def swiglu_backward_kernel(
    h_SJ, weights_S, da_SI, dh_SJ, a_SI, dweights_S, S, I, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = s.to(tl.int64)[:, None]
    weight = tl.load(weights_S + s, mask=s < S, other=0.0).to(tl.float32)[:, None]
    dweight = tl.zeros((BLOCK_S, BLOCK_I), dtype=tl.float32)
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)[None, :]
        inside = (s < S)[:, None] & (i < I)
        gate = tl.load(h_SJ + row * 2 * I + i, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_SJ + row * 2 * I + I + i, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_SI + row * I + i, mask=inside, other=0.0).to(tl.float32)
        # a = weight * silu(gate) * up, and silu' = sigmoid + silu * (1 - sigmoid)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dweight += da * (silu * up)
        a = weight * (silu * up)
        dgate = weight * da * up * (sigmoid + silu * (1 - sigmoid))
        dup = weight * da * silu
        tl.store(a_SI + row * I + i, a.to(a_SI.dtype.element_ty), mask=inside)
        tl.store(dh_SJ + row * 2 * I + i, dgate.to(dh_SJ.dtype.element_ty), mask=inside)
        tl.store(dh_SJ + row * 2 * I + I + i, dup.to(dh_SJ.dtype.element_ty), mask=inside)
    tl.store(dweights_S + s, tl.sum(dweight, axis=1), mask=s < S)


def _launch_rows(kernel: Any, *tensors: Tensor, S: int, I: int) -> None:
    """Launch one program for each 1,024 numbers of rows ``I`` wide, or for one row if it is longer."""
    width = min(1024, triton.next_power_of_2(I))
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(S * width, 1024),)](
            *tensors, S, I, BLOCK_S=1024 // width, BLOCK_I=width, num_warps=4, enable_fp_fusion=True
        )


@torch.library.custom_op("custom_moe::swiglu", mutates_args=())
def swiglu(h_SJ: Tensor, weights_S: Tensor) -> Tensor:
    """Return ``weights[:, None] * silu(h[:, :I]) * h[:, I:]``: ``(S, I)`` in the type of ``h``, computed in fp32."""
    S, I = h_SJ.size(0), h_SJ.size(1) // 2
    a_SI = h_SJ.new_empty(S, I)
    _launch_rows(swiglu_kernel, h_SJ.contiguous(), weights_S.contiguous(), a_SI, S=S, I=I)
    return a_SI


@swiglu.register_fake
def _(h_SJ: Tensor, weights_S: Tensor) -> Tensor:
    return h_SJ.new_empty(h_SJ.size(0), h_SJ.size(1) // 2)


@torch.library.custom_op("custom_moe::swiglu_backward", mutates_args=())
def swiglu_backward(h_SJ: Tensor, weights_S: Tensor, da_SI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``custom_moe.backends.swiglu_backward`` in one pass.

    Returns:
        The gradient of ``h`` ``(S, J)``, the result of ``swiglu`` again ``(S, I)``, and the gradient of the weights
        ``(S,)`` in fp32.
    """
    S, I = da_SI.shape
    results = h_SJ.new_empty(S, 2 * I), h_SJ.new_empty(S, I), h_SJ.new_empty(S, dtype=torch.float32)
    inputs = h_SJ.contiguous(), weights_S.contiguous(), da_SI.contiguous()
    _launch_rows(swiglu_backward_kernel, *inputs, *results, S=S, I=I)
    return results


@swiglu_backward.register_fake
def _(h_SJ: Tensor, weights_S: Tensor, da_SI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, I = da_SI.shape
    return h_SJ.new_empty(S, 2 * I), h_SJ.new_empty(S, I), h_SJ.new_empty(S, dtype=torch.float32)
