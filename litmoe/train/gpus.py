"""Specifications of NVIDIA GPUs, so that a run can be planned without one: memory, compute capability, peak speed."""

import re
from typing import NamedTuple

import torch

GIB = 2**30


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
