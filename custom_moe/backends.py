"""Products of rows, sorted by expert, with their expert's weights: two primitives, each in three backends.

=============  ============================================================================  ======================
backend        how                                                                           waits for the device
=============  ============================================================================  ======================
``grouped_mm`` ``torch.nn.functional.grouped_mm``: one kernel for all experts                no
``triton``     the same as kernels of our own (``custom_moe.triton_kernels``)                no
``loop``       one product per expert, on any device and in any type                         once in each direction
=============  ============================================================================  ======================

(With biases or LoRA the loop waits for each product. ``grouped_mm`` asked for by name where torch has no fast kernel
for it, see ``backend_for``, is a loop of torch's own, which waits too; torch 2.10 compiles it in bf16 alone.)

Shape suffixes: S rows, E experts, C input width, O output width.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_moe import loop

Backend = Literal["grouped_mm", "triton", "loop"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def choose_backend(
    wanted: Backend | None, dtype: torch.dtype, device: torch.device, rows: int, widths: tuple[int, ...]
) -> Backend:
    """The backend that is asked for, or the one for this hardware.

    Args:
        wanted: None to choose.
        dtype: that the products are computed in.
        device: of the rows.
        rows: of the layer's input; without any there is nothing to group.
        widths: of the layer's input and of an expert.

    Raises:
        ValueError: what is asked for can't be had.
    """
    return "loop" if rows == 0 else _choose(wanted, dtype, device, widths)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.11 can't trace comparing capabilities
def _choose(wanted: Backend | None, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> Backend:
    hardware = hardware_of(device)
    if wanted is None:
        return backend_for(dtype, hardware, widths)
    if problem := _problem(wanted, dtype, device.type, hardware, widths):
        raise ValueError(f"the MoE backend {wanted!r} {problem}; leave the choice to the layer, or take 'loop'.")
    return wanted


class Hardware(NamedTuple):
    """What decides which backends there are."""

    capability: tuple[int, int] | None
    """Of the NVIDIA card; None without one"""
    triton: bool
    """Whether Triton is there and can build its kernels"""
    grouped_mm: bool = True
    """Whether torch was built with its fast grouped_mm"""
    interpreter: bool = False
    """Whether Triton interprets its kernels (TRITON_INTERPRET=1), on any device, for tests"""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile can't trace these questions
def hardware_of(device: torch.device) -> Hardware:
    """That of a device. Warns, once, where a card could do better with Triton."""
    return _find_hardware(device.type, device.index)


@functools.cache
def _find_hardware(device_type: str, index: int | None) -> Hardware:
    problem = _triton_problem()
    interpreter = problem is None and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" or torch.version.hip:
        return Hardware(None, problem is None, interpreter=interpreter)
    capability = torch.cuda.get_device_capability(index)
    if capability >= (8, 0) and capability[0] not in (9, 10) and problem:
        warnings.warn(
            f"{problem}: in 16 bits the experts are computed in a loop that waits for the GPU in each layer.",
            stacklevel=2,
        )
    return Hardware(capability, problem is None, sys.platform != "win32", interpreter)


def _triton_problem() -> str | None:
    """Why Triton can't be used. Its wheel for Linux builds a small library with the system's compiler at first use."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: triton-windows)"
    if sys.platform == "linux":
        if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
            return "Triton needs a C compiler, and there is none (Debian and Ubuntu: build-essential)"
        if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
            return "Triton needs Python's headers, and there are none (Debian and Ubuntu: python3-dev)"
    return None


def backend_for(dtype: torch.dtype, hardware: Hardware, widths: tuple[int, ...]) -> Backend:
    """The table of what is fastest where.

    - Compute capability 9.x and 10.x in bf16: ``grouped_mm``, for which torch has a fast kernel there alone, not on
      Windows. It wants row strides of a multiple of 16 bytes.
    - NVIDIA cards from 8.0 on in 16 bits: ``triton``, where it works. (grouped_mm would loop there, and wait.)
    - All else: ``loop``. On a CPU nothing waits; in fp32 on a GPU the products should outweigh the wait.

    Measured on a CPU only (docs/PERFORMANCE.md); on GPUs it goes by what torch and others say of their kernels.
    """
    capability = hardware.capability
    if capability is None or capability < (8, 0) or dtype not in (torch.bfloat16, torch.float16):
        return "loop"
    fast = hardware.grouped_mm and capability[0] in (9, 10)
    if fast and dtype == torch.bfloat16 and _aligned(dtype, widths):
        return "grouped_mm"
    return "triton" if hardware.triton else "loop"


def _problem(
    backend: str, dtype: torch.dtype, device_type: str, hardware: Hardware, widths: tuple[int, ...]
) -> str | None:
    if backend not in BACKENDS:
        return f"is not one of {', '.join(BACKENDS)}"
    if backend != "loop" and dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"does not compute {dtype}"
    if backend == "grouped_mm":
        if device_type not in ("cpu", "cuda", "meta"):
            return f"does not compute on {device_type}"
        if not _aligned(dtype, widths):
            return f"needs widths of a multiple of {16 // dtype.itemsize} in {dtype}, and these are {widths}"
    if backend == "triton":
        if hardware.capability is None and not hardware.interpreter and device_type != "meta":
            return f"needs an NVIDIA card, and this is {'an AMD card' if device_type == 'cuda' else device_type}"
        if not hardware.triton:
            return f"can't be had: {_triton_problem()}"
        if hardware.capability is not None and hardware.capability < (8, 0):
            return "needs a card of compute capability 8.0 or higher, and this has {}.{}".format(*hardware.capability)
    return None


def _aligned(dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def multiply(
    x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, backend: Backend, rows_S: Tensor | None = None
) -> Tensor:
    """Each row times the transposed weight of its expert: ``(S, O)``.

    Args:
        x_NC: rows sorted by expert, or what ``rows_S`` takes them from.
        weight_EOC: in the rows' type; strides as they come.
        ends_E: int32, where each expert's rows end; the last is S.
        backend: see the table above.
        rows_S: row s is ``x_NC[rows_S[s]]``.
    """
    y_SO: Tensor
    if backend == "triton":
        from custom_moe import triton_kernels

        y_SO = triton_kernels.multiply(x_NC, weight_EOC, ends_E, rows_S)
        return y_SO
    x_SC = x_NC if rows_S is None else x_NC.index_select(0, rows_S)
    if backend == "grouped_mm":
        y_SO = F.grouped_mm(x_SC, weight_EOC.transpose(1, 2), offs=ends_E)
    else:
        y_SO = loop.multiply(x_SC, weight_EOC, ends_E)
    return y_SO


def weight_gradient(
    grad_NO: Tensor,
    x_NC: Tensor,
    ends_E: Tensor,
    backend: Backend,
    grad_rows_S: Tensor | None = None,
    x_rows_S: Tensor | None = None,
) -> Tensor:
    """What ``multiply`` sends back to its weights, the sum of outer products over each expert's rows: ``(E, O, C)``."""
    dweight_EOC: Tensor
    if backend == "triton":
        from custom_moe import triton_kernels

        dweight_EOC = triton_kernels.weight_gradient(grad_NO, x_NC, ends_E, grad_rows_S, x_rows_S)
        return dweight_EOC
    grad_SO = grad_NO if grad_rows_S is None else grad_NO.index_select(0, grad_rows_S)
    x_SC = x_NC if x_rows_S is None else x_NC.index_select(0, x_rows_S)
    if backend == "grouped_mm":
        dweight_EOC = F.grouped_mm(grad_SO.t(), x_SC, offs=ends_E)
        if (hardware_of(x_SC.device).capability or (0, 0))[0] == 10:
            # There CUTLASS left the sum over no rows unset until its PR 2746 (pytorch issue 172439).
            empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
            dweight_EOC = dweight_EOC.masked_fill(empty_E[:, None, None], 0)
    else:
        dweight_EOC = loop.weight_gradient(grad_SO, x_SC, ends_E)
    return dweight_EOC


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SC: Tensor, weight_EOC: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(x_SC if ctx.needs_input_grad[1] else None, weight_EOC, ends_E)
        ctx.backend = backend
        return multiply(x_SC, weight_EOC, ends_E, backend)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_SC, weight_EOC, ends_E = ctx.saved_tensors
        grad_SO = grad_SO.contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        dx = multiply(grad_SO, weight_EOC.transpose(1, 2), ends_E, ctx.backend) if need_x else None
        dweight = weight_gradient(grad_SO, x_SC, ends_E, ctx.backend) if need_weight else None
        return dx, dweight, None, None


def grouped_linear(x_SC: Tensor, weight_EOC: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """``multiply`` with gradients for the rows and the weights: ``F.linear``, another weight for each group of rows."""
    y: Tensor = _GroupedLinear.apply(x_SC, weight_EOC, ends_E, backend)
    return y


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SO: Tensor, bias_EO: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.backend = backend
        row_S = torch.arange(y_SO.size(0), device=y_SO.device)
        expert_S = torch.searchsorted(ends_E, row_S, right=True)
        return y_SO + bias_EO.index_select(0, expert_S)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (ends_E,) = ctx.saved_tensors
        dbias_EO = None
        if ctx.needs_input_grad[1]:
            # The gradient of a weight whose input is always 1; 16 columns of it, for kernels that want aligned rows.
            ones_S16 = grad_SO.new_ones(grad_SO.size(0), 16)
            dbias_EO = weight_gradient(grad_SO.contiguous(), ones_S16, ends_E, ctx.backend)[:, :, 0]
        return grad_SO, dbias_EO, None, None


def add_bias(y_SO: Tensor, bias_EO: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Each row plus its expert's bias, which is of the rows' type.

    The bias' gradient is a product too: it is summed in fp32 and gives the same bits on each run. That of
    ``index_select`` would be ``index_add_``, whose atomic additions in bf16 on a GPU round after each row.
    """
    y: Tensor = _AddBias.apply(y_SO, bias_EO, ends_E, backend)
    return y
