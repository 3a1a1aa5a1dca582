"""What this machine allows (processes, precision, ``torch.compile``, allocator), and specifications of NVIDIA GPUs."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from litmoe.cli import UserError
from litmoe.config import Accelerator, RunSettings


def select_accelerator(requested: Accelerator) -> None:
    """Make all code that follows, LitGPT's Fabric too, use this kind of device. Call it before anything uses CUDA.

    Fabric alone would choose the GPU of a Mac, which has no fp64 and is not tested.

    Raises:
        UserError: this machine has no such device.
    """
    if requested == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    is_missing = (requested == "cuda" and not torch.cuda.is_available()) or (
        requested == "mps" and not torch.backends.mps.is_available()
    )
    if is_missing:
        raise UserError(f"--accelerator is {requested}, but torch finds no such device here; --accelerator auto")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if requested == "auto" else requested
    # Fabric reads this variable; LitGPT leaves the choice to Fabric.
    os.environ["LT_ACCELERATOR"] = chosen


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on any device."""
    # torch has no class of its own for the allocators of CPUs and Apple's GPUs.
    messages = ("can't allocate memory", "not enough memory: you tried to allocate", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def processes(settings: RunSettings) -> tuple[int, int]:
    """Return (devices per machine, machines): what torchrun started, or else what the settings ask for.

    Raises:
        UserError: this machine has fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    # Without a GPU, devices are CPU processes, of which any number can run.
    limit = gpus or sys.maxsize
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if local > limit:
            raise UserError(
                f"torchrun started {local} processes, but this machine has {gpus} GPU(s); expected --nproc_per_node"
                f" {gpus} or less."
            )
        return local, int(os.environ["WORLD_SIZE"]) // local
    if settings.devices == "auto":
        return max(gpus, 1), settings.num_nodes
    try:
        devices = int(settings.devices)
    except ValueError:
        devices = 0
    if not 1 <= devices <= limit:
        expected = f"`auto` or 1 to {gpus}, the GPUs of this machine" if gpus else "`auto` or a number of CPU processes"
        raise UserError(f"--devices is {settings.devices}; expected {expected}.")
    return devices, settings.num_nodes


def is_sharded(settings: RunSettings) -> bool:
    """Return whether FSDP shards the parameters, which needs more than one device."""
    devices, num_nodes = processes(settings)
    return settings.strategy == "fsdp" and devices * num_nodes > 1


def cpu_has_bf16() -> bool:
    """Return whether torch multiplies bf16 matrices on this CPU with oneDNN's kernels.

    They need AVX-512 on x86. Without them a large product takes about a hundred times as long as in fp32.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has instructions that multiply bf16: AVX512-BF16 (AMD since Zen 4) or AMX (Intel Xeon).

    Measured with AVX512-BF16: a product takes half the time of fp32. Not measured with AMX.
    """
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and cpu_has_bf16()


def choose_precision(requested: str | None, accelerator: Accelerator = "auto") -> tuple[str, str | None]:
    """Return the precision of the run, and a line for the user if it is not the requested one or slow here.

    A GPU without bf16 falls back to fp16 with a gradient scaler. A CPU that does not multiply bf16 falls back to fp32;
    ``bf16-true`` is kept if requested.
    """
    if accelerator == "mps":
        return requested or "32-true", None
    if not torch.cuda.is_available():
        return _choose_cpu_precision(requested)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if requested is None:
        return ("bf16-mixed" if has_bf16 else "16-mixed"), None
    if requested.startswith("bf16") and not has_bf16:
        name = torch.cuda.get_device_name()
        return "16-mixed", f"{name} has no bf16, so this run uses 16-mixed instead of {requested}."
    return requested, None


def _choose_cpu_precision(requested: str | None) -> tuple[str, str | None]:
    if requested is None:
        return ("bf16-mixed" if cpu_multiplies_bf16() else "32-true"), None
    if requested == "16-mixed" or (requested == "bf16-mixed" and not cpu_multiplies_bf16()):
        needed = "a GPU" if requested == "16-mixed" else "a GPU or a CPU that multiplies bf16"
        return "32-true", f"precision {requested} needs {needed}; this run uses 32-true on the CPU."
    if requested == "bf16-true" and not cpu_has_bf16():
        return requested, "this CPU has no instructions for bf16: 32-true is many times faster on it than bf16-true."
    return requested, None


def missing_cuda_note() -> str | None:
    """Return a line for the user if torch does not use an NVIDIA GPU whose driver is installed; else None."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or is_hidden or shutil.which("nvidia-smi") is None:
        return None
    problem = "warning: an NVIDIA driver is installed, but this run does not use the GPU:"
    if torch.version.cuda is None:
        return f"{problem} the installed torch is built without CUDA. Replace it (docs/windows-and-mac.md)."
    return f"{problem} torch {torch.__version__} does not find it. Update the driver to CUDA {torch.version.cuda}."


def use_expandable_segments(cuda: bool) -> None:
    """Let the allocator's segments grow, so that little memory is lost in gaps between blocks of different sizes.

    It applies to CUDA runs on Linux and to the processes they start. ``PYTORCH_ALLOC_CONF`` overrides it.

    Args:
        cuda: whether the run uses CUDA.
    """
    is_set = "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    # Windows does not support it. In WSL2 the first allocation can fail (pytorch/pytorch issue 192330).
    is_wsl = "microsoft" in platform.release().lower()
    if cuda and not is_set and sys.platform == "linux" and not is_wsl:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


# From glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory(cuda: bool) -> None:
    """Let glibc keep freed memory for the next step of a run on a CPU.

    By default it returns large pieces to the system, and the next step touches them again: thousands of page faults,
    about 3% of a small model's step. Other C libraries are left as they are.

    Args:
        cuda: whether the run uses CUDA.
    """
    if sys.platform != "linux" or cuda:
        return
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


# --- torch.compile


def should_compile(requested: bool | None, device_type: str) -> tuple[bool, str | None]:
    """Return whether to compile, and a line for the user if compilation is useful or requested but not possible.

    Args:
        requested: the setting; None compiles on CUDA GPUs only. Elsewhere compilation takes longer than it saves in a
            short run.
        device_type: ``cuda``, ``cpu``, ``mps``.
    """
    if requested is False or (requested is None and device_type != "cuda"):
        return False, None
    missing = missing_for_compile(device_type)
    if missing:
        return False, f"torch.compile is off: {missing}."
    return True, None


def compiler_settings() -> AbstractContextManager[None]:
    """Return a context manager with the settings for models that are compiled block by block."""
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(
        # Under DDP, torch splits graphs at the size of a gradient bucket, so that gradients are sent early. With one
        # graph per block they are sent early anyway, and graphs with recomputed activations can't be split.
        optimize_ddp=False,
        # The default limit is 8 graphs per function. One function here has graphs for each kind of block, for training
        # and validation, and for several sizes.
        recompile_limit=64,
    )
    return settings


def missing_for_compile(device_type: str) -> str | None:
    """Return what ``torch.compile`` lacks on this machine, or None.

    Without this check it would fail in the first step.
    """
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton (on Windows: triton-windows) is not installed"
        if sys.platform == "win32":
            return None  # triton-windows includes a compiler
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "there is no C++ compiler (Debian and Ubuntu: apt-get install g++)"
    # Compiled code is linked into Python. Some distributions package the headers separately.
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing (Debian and Ubuntu: apt-get install python3-dev)"
    return None


# --- Specifications of GPUs, so that a run can be planned without one

GIB = 2**30
ALLOCATOR_OVERHEAD = 1.05
"""Bytes that CUDA's allocator takes for each byte in use"""


class GPUSpec(NamedTuple):
    """A GPU: this machine's, or one from the tables below."""

    name: str
    memory: float
    """GiB in total, as programs see it"""
    taken: float
    """GiB of it that are not available: other programs, the display, the CUDA context"""
    capability: tuple[int, int]
    peak: float | None
    """FLOP/s in 16 bits, dense, accumulated in fp32; None if unknown"""
    is_local: bool = False
    """Whether it is in this machine"""
    has_display: bool = False
    """Whether ``taken`` includes a desktop"""

    @property
    def available(self) -> float:
        """Bytes that tensors can take."""
        return (self.memory - self.taken) / ALLOCATOR_OVERHEAD * GIB


# Cores, boost clock in MHz, memory in GB, compute capability, from NVIDIA's product pages. A laptop GPU's clock is the
# lowest one listed for its power limits. Per core and clock, the tensor cores do two multiply-adds in 16 bits.
_GEFORCE = {
    "rtx3060": (3584, 1777, 12, (8, 6)),
    "rtx3060ti": (4864, 1665, 8, (8, 6)),
    "rtx3070": (5888, 1725, 8, (8, 6)),
    "rtx3070ti": (6144, 1770, 8, (8, 6)),
    "rtx3080": (8704, 1710, 10, (8, 6)),
    "rtx3080ti": (10240, 1665, 12, (8, 6)),
    "rtx3090": (10496, 1695, 24, (8, 6)),
    "rtx3090ti": (10752, 1860, 24, (8, 6)),
    "rtx3050-laptop": (2048, 1057, 4, (8, 6)),
    "rtx3050ti-laptop": (2560, 1035, 4, (8, 6)),
    "rtx3060-laptop": (3840, 1283, 6, (8, 6)),
    "rtx3070-laptop": (5120, 1290, 8, (8, 6)),
    "rtx3080-laptop": (6144, 1245, 8, (8, 6)),
    "rtx4060": (3072, 2460, 8, (8, 9)),
    "rtx4060ti": (4352, 2535, 8, (8, 9)),
    "rtx4060ti-16gb": (4352, 2535, 16, (8, 9)),
    "rtx4070": (5888, 2475, 12, (8, 9)),
    "rtx4070super": (7168, 2475, 12, (8, 9)),
    "rtx4070ti": (7680, 2610, 12, (8, 9)),
    "rtx4070tisuper": (8448, 2610, 16, (8, 9)),
    "rtx4080": (9728, 2505, 16, (8, 9)),
    "rtx4080super": (10240, 2550, 16, (8, 9)),
    "rtx4090": (16384, 2520, 24, (8, 9)),
    "rtx4050-laptop": (2560, 1605, 6, (8, 9)),
    "rtx4060-laptop": (3072, 1470, 8, (8, 9)),
    "rtx4070-laptop": (4608, 1230, 8, (8, 9)),
    "rtx4080-laptop": (7424, 1350, 12, (8, 9)),
    "rtx4090-laptop": (9728, 1455, 16, (8, 9)),
    "rtx5060": (3840, 2497, 8, (12, 0)),
    "rtx5060ti": (4608, 2572, 8, (12, 0)),
    "rtx5060ti-16gb": (4608, 2572, 16, (12, 0)),
    "rtx5070": (6144, 2512, 12, (12, 0)),
    "rtx5070ti": (8960, 2452, 16, (12, 0)),
    "rtx5080": (10752, 2617, 16, (12, 0)),
    "rtx5090": (21760, 2407, 32, (12, 0)),
}
# Memory in GiB as the driver reports it, TFLOP/s of the data sheet, compute capability, torch's name for it (a regular
# expression).
_OTHERS = {
    "t4": (14.6, 65, (7, 5), "tesla t4"),
    "l4": (22.0, 121, (8, 9), "nvidia l4"),
    "l40s": (44.4, 362, (8, 9), "nvidia l40s"),
    "a6000": (47.4, 154.8, (8, 6), "nvidia rtx a6000"),
    "a100-40gb": (39.4, 312, (8, 0), r"nvidia a100-(sxm4|pcie)-40gb"),
    "a100": (79.1, 312, (8, 0), r"nvidia a100(-sxm4-80gb| 80gb pcie)"),
    "h100-pcie": (79.1, 756, (9, 0), "nvidia h100 pcie"),
    "h100": (79.1, 989, (9, 0), "nvidia h100 80gb hbm3"),
    "h200": (139.8, 989, (9, 0), "nvidia h200"),
    "b200": (178.4, 2250, (10, 0), "nvidia b200"),
}
NAMES = [*_GEFORCE, *_OTHERS]

CUDA_CONTEXT = 0.5
"""GiB that the first CUDA call takes for libraries and kernels: about 0.3 to 0.5"""
DISPLAY = 0.7
"""GiB that a desktop takes, on Windows or Linux, without a browser full of videos"""


def gpu_by_name(name: str) -> GPUSpec | None:
    """Return the GPU with one of ``NAMES``, in any spelling (``RTX 3060 Laptop``), or None."""
    key = next((key for key in NAMES if _letters(key) == _letters(name)), None)
    if key in _GEFORCE:
        cores, clock, memory, capability = _GEFORCE[key]
        # cores * MHz * 1e6 * 2 multiply-adds * 2 operations
        peak = 4.0e6 * cores * clock
        # A GeForce is usually the machine's only GPU, so it also shows the desktop.
        return GPUSpec(key, memory, CUDA_CONTEXT + DISPLAY, capability, peak, has_display=True)
    if key in _OTHERS:
        reported_memory, teraflops, capability, _ = _OTHERS[key]
        return GPUSpec(key, reported_memory, CUDA_CONTEXT, capability, teraflops * 1.0e12)
    return None


def detect_gpu() -> GPUSpec | None:
    """Return this machine's current GPU, or None. Memory of this process does not count as taken."""
    if not torch.cuda.is_available():
        return None
    # This call creates the CUDA context, so that it is part of what is taken.
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved()
    return GPUSpec(
        name=torch.cuda.get_device_name(),
        memory=total / GIB,
        taken=(total - free) / GIB,
        capability=torch.cuda.get_device_capability(),
        peak=peak_flops(torch.cuda.get_device_name()),
        is_local=True,
    )


def peak_flops(device_name: str) -> float | None:
    """Return the FLOP/s in 16 bits of a GPU by torch's name for it. None for unknown GPUs.

    None also for laptop GPUs: their power limit, which differs by model, decides. ``lightning`` has a table too, but it
    has half of the speed of GeForce GPUs (without tensor cores), twice that of an H200 (for sparse matrices), and does
    not recognize torch's name of the H200.
    """
    for _, teraflops, _, pattern in _OTHERS.values():
        if re.fullmatch(pattern, device_name.lower()):
            return teraflops * 1.0e12
    if "laptop" in device_name.lower():
        return None
    gpu = gpu_by_name(device_name)
    return gpu.peak if gpu else None


def _letters(name: str) -> str:
    # "NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop" and "rtx3060-laptop" become equal.
    return re.sub(r"nvidia|geforce|tesla|gpu|[^a-z0-9]", "", name.lower())
