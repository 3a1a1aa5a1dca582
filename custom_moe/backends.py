"""Backends compute the experts' SwiGLU over rows sorted by expert.

=============== ==================================================================== =======================
backend         how                                                                  waits for the device
=============== ==================================================================== =======================
``grouped_mm``  ``torch.nn.functional.grouped_mm``: one kernel for all experts       no
``triton``      kernels of this package (``custom_moe.triton_kernels``)              no
``loop``        one product per expert, on any device and in any type                once in each direction
=============== ==================================================================== =======================

With biases or LoRA the loop waits for each product. If ``grouped_mm`` is requested where torch has no fast kernel for
it (see ``backend_for``), torch runs a loop of its own, which waits too; torch 2.10 compiles that loop in bf16 only.

Experimental: ``triton``, and the choice for GPUs. Only the loop on CPUs has been timed (docs/performance.md). The rest
of ``backend_for`` follows what torch and others report about their kernels.

To add a backend, subclass ``ExpertBackend`` and add an instance to ``BACKENDS``.

Shape suffixes: see ``custom_moe``. ``N`` and ``C`` of an argument are the rows and the width of that argument. ``B``:
rows of one block of experts.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["grouped_mm", "triton", "loop"]

_silu_out: Callable[..., Tensor] = torch.ops.aten.silu.out
_silu_grad: Callable[..., Tensor] = torch.ops.aten.silu_backward.default
_silu_grad_out: Callable[..., Tensor] = torch.ops.aten.silu_backward.grad_input


# ------------------------------------------------------------------------------------------------------------ hardware


class Hardware(NamedTuple):
    """The properties of a device that decide which backends work and which is fastest."""

    capability: tuple[int, int] | None
    """Compute capability of an NVIDIA GPU; None for other devices"""
    triton: bool
    """Whether Triton is installed and can build its kernels"""
    grouped_mm: bool = True
    """Whether torch was built with its fast grouped_mm"""
    hip: bool = False
    """Whether it is an AMD GPU"""
    interpreter: bool = False
    """Whether Triton interprets its kernels (TRITON_INTERPRET=1), on any device, for tests"""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile can't trace these queries
def hardware_of(device: torch.device) -> Hardware:
    """Return the hardware of a device. Warns once if a GPU would be faster with Triton."""
    return _find_hardware(device.type, device.index)


# Cached, because each forward asks.
@functools.cache
def _find_hardware(device_type: str, index: int | None) -> Hardware:
    problem = _triton_problem()
    # ROCm builds of torch call AMD GPUs "cuda" too; their capability is not comparable.
    has_triton = problem is None
    if device_type != "cuda" or torch.version.hip:
        is_interpreter = has_triton and os.environ.get("TRITON_INTERPRET") == "1"
        return Hardware(None, has_triton, hip=device_type == "cuda", interpreter=is_interpreter)
    capability = torch.cuda.get_device_capability(index)
    # On 9.x and 10.x grouped_mm is fast without Triton.
    if problem and capability >= (8, 0) and capability[0] not in (9, 10):
        warnings.warn(
            f"{problem}: in 16-bit precision the experts are computed one by one, which waits for the GPU in each "
            "layer.",
            stacklevel=2,
        )
    return Hardware(capability, has_triton, grouped_mm=sys.platform != "win32")


def _triton_problem() -> str | None:
    """Return why Triton does not work here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: triton-windows)"
    if sys.platform != "linux":
        return None
    # On Linux, Triton builds a small library with the system's compiler at its first use.
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler, and none was found (Debian and Ubuntu: build-essential)"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Triton needs Python's headers, and they were not found (Debian and Ubuntu: python3-dev)"
    return None


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

    # What the memory of each buffer holds, line by line of the formulas below. An empty cell keeps what is above it.
    #
    #   silu         a              da                   dgate (left of dh)   dup (right of dh)
    #                               gradient of result
    #   silu(gate)   silu * up                           da * a, for dweights
    #                a * weight     da * weight                               dup
    #                               da * weight * up     dgate
    silu_SI = _silu(gate_SI, silu_out)
    a_SI = torch.mul(silu_SI, up_SI, out=a_out)
    # The weight is applied to the activation, the narrowest place, so its gradient needs no expert output (SonicMoE,
    # arXiv 2512.14080). It needs a and da without the weight, so it comes before they are multiplied with it: to divide
    # by the weight again would fail where it is 0. Summed in fp32, the type of the router's weights.
    product_SI = torch.mul(da_SI, a_SI, out=dgate_out)
    dweights_S = torch.sum(product_SI, dim=1, dtype=torch.float32, out=dweights_out)

    a_SI = torch.mul(a_SI, weights_S1, out=a_out)
    da_SI = torch.mul(da_SI, weights_S1, out=da_out)
    dup_SI = torch.mul(da_SI, silu_SI, out=dup_out)
    dgate_SI = _silu_backward(torch.mul(da_SI, up_SI, out=da_out), gate_SI, dgate_out)
    # With buffers, dgate and dup are the two halves of dh already.
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


# ----------------------------------------------------------------------------------------------------- backends


class ExpertBackend:
    """Base class. A subclass implements ``multiply`` and ``weight_gradient``; the rest is built from these."""

    waits_for_device = False
    """Whether the CPU reads how many rows each expert has, so that a step cannot be recorded as a CUDA graph"""

    def problem(self, dtype: torch.dtype, device_type: str, hardware: Hardware, widths: tuple[int, ...]) -> str | None:
        """Return why the backend can't compute this, or None.

        Args:
            dtype: type of the products.
            device_type: such as "cuda".
            hardware: of the device.
            widths: of the layer's input and of an expert.
        """
        return None

    def row_multiple(self, x_NC: Tensor) -> int:
        """Return the number that each expert's rows must be padded to a multiple of."""
        return 1

    def multiply(self, x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """Multiply each row with the transposed weight of its expert.

        Args:
            x_NC: rows sorted by expert, or the tensor that ``rows_R`` gathers them from.
            weight_EOC: in the type of the rows, with any strides.
            ends_E: int32, where each expert's rows end; the last is at most R.
            rows_R: row r is ``x_NC[rows_R[r]]``.

        Returns:
            ``(R, O)``; rows after the last end are undefined.
        """
        raise NotImplementedError

    def weight_gradient(
        self,
        grad_NO: Tensor,
        x_NC: Tensor,
        ends_E: Tensor,
        grad_rows_R: Tensor | None = None,
        x_rows_R: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the weights of ``multiply``: each expert's sum of ``outer(grad, x)``, ``(E, O, C)``.

        Args:
            grad_NO: gradient of the result, or the tensor that ``grad_rows_R`` gathers it from.
            x_NC: the rows, or the tensor that ``x_rows_R`` gathers them from.
            ends_E: as for ``multiply``.
            grad_rows_R: row r is ``grad_NO[grad_rows_R[r]]``.
            x_rows_R: row r is ``x_NC[x_rows_R[r]]``.
        """
        raise NotImplementedError

    def swiglu(self, h_RJ: Tensor, weights_R: Tensor) -> Tensor:
        """Compute ``custom_moe.backends.swiglu``."""
        if _fuse_with_triton(h_RJ):
            a_RI: Tensor = _triton_kernels().swiglu(h_RJ, weights_R)
            return a_RI
        return swiglu(h_RJ, weights_R)

    def swiglu_backward(self, h_RJ: Tensor, weights_R: Tensor, da_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute ``custom_moe.backends.swiglu_backward``."""
        if _fuse_with_triton(h_RJ):
            gradients: tuple[Tensor, Tensor, Tensor] = _triton_kernels().swiglu_backward(h_RJ, weights_R, da_RI)
            return gradients
        return swiglu_backward(h_RJ, weights_R, da_RI)

    def forward(
        self, x_NC: Tensor, weights_R: Tensor, fc_EJC: Tensor, proj_ECI: Tensor, token_R: Tensor, ends_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute ``weight * proj(silu(gate(x)) * up(x))`` of each row.

        Args:
            x_NC: tokens.
            weights_R: fp32, the router's weight of each row.
            fc_EJC: each expert's gate above its up projection.
            proj_ECI: each expert's down projection.
            token_R: the token of each row.
            ends_E: int32, where each expert's rows end.

        Returns:
            The output of each row ``(R, C)``, and the pre-activations ``(R, J)`` for ``backward``.
        """
        # (N, C) -> (R, J) -> (R, I) -> (R, C). The product gathers the rows, so that they need not be stored.
        h_RJ = self.multiply(x_NC, fc_EJC, ends_E, rows_R=token_R)
        return self.multiply(self.swiglu(h_RJ, weights_R), proj_ECI, ends_E), h_RJ

    def backward(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Compute the gradients of ``forward`` from ``dy_NC``, the gradient of each token's sum of rows.

        Returns:
            The gradients of the gathered rows ``(R, C)``, of ``weights_R`` in fp32, of ``fc`` and of ``proj``. The last
            two may be anything if they are not needed.
        """
        # Backwards: (N, C) -> (R, I) -> (R, J) -> (R, C)
        da_RI = self.multiply(dy_NC, proj_ECI.transpose(1, 2), ends_E, rows_R=token_R)
        dh_RJ, a_RI, dweights_R = self.swiglu_backward(h_RJ, weights_R, da_RI)
        del da_RI  # each of these is freed as soon as possible: together they are the peak of the layer's memory
        dproj_ECI = self.weight_gradient(dy_NC, a_RI, ends_E, grad_rows_R=token_R) if need_proj else None
        del a_RI
        dfc_EJC = self.weight_gradient(dh_RJ, x_NC, ends_E, x_rows_R=token_R) if need_fc else None
        dx_RC = self.multiply(dh_RJ, fc_EJC.transpose(1, 2), ends_E)
        return dx_RC, dweights_R, dfc_EJC, dproj_ECI


class GroupedMM(ExpertBackend):
    """``torch.nn.functional.grouped_mm``."""

    def problem(self, dtype: torch.dtype, device_type: str, hardware: Hardware, widths: tuple[int, ...]) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"does not compute {dtype}"
        if device_type not in ("cpu", "cuda", "meta"):
            return f"does not compute on {device_type}"
        if not _aligned(dtype, widths):
            return f"needs widths of a multiple of {16 // dtype.itemsize} in {dtype}, and these are {widths}"
        return None

    def multiply(self, x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_R: Tensor | None = None) -> Tensor:
        y_RO: Tensor = F.grouped_mm(_gather(x_NC, rows_R), weight_EOC.transpose(1, 2), offs=ends_E)
        return y_RO

    def weight_gradient(
        self,
        grad_NO: Tensor,
        x_NC: Tensor,
        ends_E: Tensor,
        grad_rows_R: Tensor | None = None,
        x_rows_R: Tensor | None = None,
    ) -> Tensor:
        # (O, R) @ (R, C) for each expert's part of R
        grad_RO, x_RC = _gather(grad_NO, grad_rows_R), _gather(x_NC, x_rows_R)
        dweight_EOC: Tensor = F.grouped_mm(grad_RO.t(), x_RC, offs=ends_E)
        capability = hardware_of(x_RC.device).capability
        if capability is not None and capability[0] == 10:
            # CUTLASS left the sum over no rows unset there until its PR 2746 (pytorch issue 172439).
            empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
            dweight_EOC = dweight_EOC.masked_fill(empty_E[:, None, None], 0)
        return dweight_EOC


class TritonKernels(ExpertBackend):
    """The kernels of ``custom_moe.triton_kernels``, which gather rows themselves. Experimental."""

    def problem(self, dtype: torch.dtype, device_type: str, hardware: Hardware, widths: tuple[int, ...]) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"does not compute {dtype}"
        # AMD GPUs on request only: the kernels were not run on one yet.
        is_gpu = hardware.capability is not None or hardware.hip
        if not is_gpu and not hardware.interpreter and device_type != "meta":
            return f"needs a GPU, and this is {device_type}"
        if not hardware.triton:
            return f"is not available: {_triton_problem()}"
        if hardware.capability is not None and hardware.capability < (8, 0):
            return "needs a GPU of compute capability 8.0 or higher, and this has {}.{}".format(*hardware.capability)
        return None

    def multiply(self, x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_R: Tensor | None = None) -> Tensor:
        y_RO: Tensor = _triton_kernels().multiply(x_NC, weight_EOC, ends_E, rows_R)
        return y_RO

    def weight_gradient(
        self,
        grad_NO: Tensor,
        x_NC: Tensor,
        ends_E: Tensor,
        grad_rows_R: Tensor | None = None,
        x_rows_R: Tensor | None = None,
    ) -> Tensor:
        dweight_EOC: Tensor = _triton_kernels().weight_gradient(grad_NO, x_NC, ends_E, grad_rows_R, x_rows_R)
        return dweight_EOC

    def swiglu(self, h_RJ: Tensor, weights_R: Tensor) -> Tensor:
        a_RI: Tensor = _triton_kernels().swiglu(h_RJ, weights_R)
        return a_RI

    def swiglu_backward(self, h_RJ: Tensor, weights_R: Tensor, da_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = _triton_kernels().swiglu_backward(h_RJ, weights_R, da_RI)
        return gradients


def _fuse_with_triton(h_RJ: Tensor) -> bool:
    """Return whether Triton's fused SwiGLU serves a backend that has none. A compiler fuses plain functions itself."""
    return h_RJ.is_cuda and not torch.compiler.is_compiling() and hardware_of(h_RJ.device).triton


def _triton_kernels() -> ModuleType:
    # Importing it needs Triton, which does not exist on every system.
    from custom_moe import triton_kernels

    return triton_kernels


def _gather(x_NC: Tensor, rows_R: Tensor | None) -> Tensor:
    return x_NC if rows_R is None else x_NC.index_select(0, rows_R)


# ------------------------------------------------------------------------------------------- one expert after the other


BLOCK_SIZE = 2**18
"""Pre-activations that are computed together, in buffers that all blocks share. On a CPU, fresh memory for each step of
the formula costs as much as the step itself."""

Span = tuple[int, int, int]
"""An expert, the first of its rows, and the number of its rows"""


# The operators are custom, so that torch.compile sees one step and no graph break. On a GPU each of them waits for the
# device once, to learn how many rows each expert has.


@torch.library.custom_op("custom_moe::loop_multiply", mutates_args=())
def loop_multiply(x_RC: Tensor, weight_EOC: Tensor, ends_E: Tensor) -> Tensor:
    """Compute ``ExpertBackend.multiply`` expert by expert."""
    y_RO = x_RC.new_empty(len(x_RC), weight_EOC.size(1))
    _multiply(x_RC, weight_EOC, _spans(ends_E), out=y_RO)
    return y_RO


@loop_multiply.register_fake
def _(x_RC: Tensor, weight_EOC: Tensor, ends_E: Tensor) -> Tensor:
    return x_RC.new_empty(x_RC.size(0), weight_EOC.size(1))


@torch.library.custom_op("custom_moe::loop_weight_gradient", mutates_args=())
def loop_weight_gradient(grad_RO: Tensor, x_RC: Tensor, ends_E: Tensor) -> Tensor:
    """Compute ``ExpertBackend.weight_gradient`` expert by expert."""
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
    """Compute ``ExpertBackend.forward`` expert by expert."""
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
    """Compute ``ExpertBackend.backward`` expert by expert. A gradient that is not needed is empty."""
    R, C, I = len(token_R), x_NC.size(1), proj_ECI.size(2)  # noqa: E741
    dx_RC, dweights_R = x_NC.new_empty(R, C), torch.empty_like(weights_R)
    dfc_EJC, dproj_ECI = _empty_like(fc_EJC, need_fc), _empty_like(proj_ECI, need_proj)
    blocks = _blocks(ends_E, 2 * I)
    largest = max(block.n_rows for block in blocks)
    # Five buffers, used again by each block. What they hold after each line of the loop; an empty cell keeps it:
    #
    #   line                   dy and x (C)   da (I)          a (I)            dh (J)          silu (I)
    #   index_select, dy       dy
    #   _multiply, da                         gradient of a
    #   swiglu_backward                       overwritten     weighted a       gradient of h   silu(gate)
    #   _weight_gradient, a    read                           read
    #   index_select, x        x
    #   _weight_gradient, dh   read                                            read
    #   _multiply, dx                                                          read
    buffers = [x_NC.new_empty(largest, width) for width in (C, 2 * I, I, I, I)]
    for start, n_rows, spans in blocks:
        x, dh, da, silu, a = (buffer.narrow(0, 0, n_rows) for buffer in buffers)
        tokens, h = token_R.narrow(0, start, n_rows), h_RJ.narrow(0, start, n_rows)
        weights, dweights = weights_R.narrow(0, start, n_rows), dweights_R.narrow(0, start, n_rows)
        # The same memory under two names: x is gathered when dy is not needed any more.
        dy = x
        torch.index_select(dy_NC, 0, tokens, out=dy)
        _multiply(dy, proj_ECI.transpose(1, 2), spans, out=da)
        swiglu_backward(h, weights, da, SwiGLUBuffers(dh, silu, a, dweights, da))
        # Frozen weights, as under LoRA, need no gradient, but the layers before still need dx.
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
    # At least one block, so that `largest` exists without any row.
    blocks = [_Block(0, 0, [])]
    for expert, start, n_rows in _spans(ends_E):
        # An expert's rows stay together, so that each product is computed in one piece.
        block = blocks.pop()
        # An expert with more rows than a block holds gets a block of its own, of any size.
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
        # Also for an expert without rows: the product over no rows is 0, and the memory of `out` is not initialized.
        grad_OB = grad_BO.narrow(0, start, n_rows).t()
        torch.mm(grad_OB, x_BC.narrow(0, start, n_rows), out=out.select(0, expert))


class PerExpertLoop(ExpertBackend):
    """One product per expert, which also activates in buffers of its own."""

    waits_for_device = True

    def row_multiple(self, x_NC: Tensor) -> int:
        # oneDNN, which multiplies bf16 matrices on a CPU, builds a kernel for each new number of rows: thirty times the
        # time of a small product, and routing gives new numbers in each step. Few tokens, as in generation, have few
        # such numbers, and padding would be most of their work.
        padded = x_NC.device.type == "cpu" and x_NC.dtype == torch.bfloat16 and x_NC.size(0) > 64
        return 32 if padded else 1

    def multiply(self, x_NC: Tensor, weight_EOC: Tensor, ends_E: Tensor, rows_R: Tensor | None = None) -> Tensor:
        y_RO: Tensor = loop_multiply(_gather(x_NC, rows_R), weight_EOC, ends_E)
        return y_RO

    def weight_gradient(
        self,
        grad_NO: Tensor,
        x_NC: Tensor,
        ends_E: Tensor,
        grad_rows_R: Tensor | None = None,
        x_rows_R: Tensor | None = None,
    ) -> Tensor:
        dweight_EOC: Tensor = loop_weight_gradient(_gather(grad_NO, grad_rows_R), _gather(x_NC, x_rows_R), ends_E)
        return dweight_EOC

    forward = staticmethod(loop_forward)
    backward = staticmethod(loop_backward)


# -------------------------------------------------------------------------------------------------------------- choice


BACKENDS: dict[str, ExpertBackend] = {
    "grouped_mm": GroupedMM(),
    "triton": TritonKernels(),
    "loop": PerExpertLoop(),
}
"""All backends by name"""


def choose_backend(
    requested: str | None, dtype: torch.dtype, device: torch.device, rows: int, widths: tuple[int, ...]
) -> str:
    """Return the requested backend, or the fastest one for this hardware.

    Args:
        requested: name in ``BACKENDS``; None to choose.
        dtype: type of the products.
        device: of the rows.
        rows: number of assignments.
        widths: of the layer's input and of an expert.

    Raises:
        ValueError: the requested backend can't compute this here.
    """
    if rows == 0:  # no token, or a router that assigns none; the kernels of the others reject empty inputs
        return "loop"
    name: str = _choose(requested, dtype, device, widths)
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.11 can't trace comparing capabilities
def _choose(requested: str | None, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> str:
    hardware = hardware_of(device)
    if requested is None:
        return backend_for(dtype, hardware, widths)
    if requested in BACKENDS:
        problem = BACKENDS[requested].problem(dtype, device.type, hardware, widths)
    else:
        problem = f"is not one of {', '.join(BACKENDS)}"
    if problem is not None:
        raise ValueError(f"the MoE backend {requested!r} {problem}; use 'loop', or None to choose by hardware.")
    return requested


def backend_for(dtype: torch.dtype, hardware: Hardware, widths: tuple[int, ...]) -> Backend:
    """Return the fastest backend.

    ===================================================== ==============
    hardware and type                                     backend
    ===================================================== ==============
    compute capability 9.x and 10.x, bf16, aligned rows   ``grouped_mm``
    other NVIDIA GPUs from 8.0 on, bf16 and fp16          ``triton``
    everything else                                       ``loop``
    ===================================================== ==============
    """
    capability = hardware.capability
    if capability is None or capability < (8, 0) or dtype not in (torch.bfloat16, torch.float16):
        # On a CPU nothing waits; in fp32 on a GPU the products should outweigh the wait.
        return "loop"
    # torch has its fast kernel for these capabilities only, not on Windows; elsewhere it would loop, and wait.
    has_kernel = hardware.grouped_mm and capability[0] in (9, 10)
    if has_kernel and dtype == torch.bfloat16 and _aligned(dtype, widths):
        return "grouped_mm"
    return "triton" if hardware.triton else "loop"


def _aligned(dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Return whether rows of all widths start at multiples of 16 bytes, as grouped_mm requires."""
    return all(width * dtype.itemsize % 16 == 0 for width in widths)
