"""What is known of NVIDIA's cards before one is there: memory, compute capability, and the peak of its data sheet."""

import re
from typing import NamedTuple

import torch

GIB = 2**30


class Card(NamedTuple):
    """A card, found or named."""

    name: str
    memory: float
    """GiB that programs see in all"""
    taken: float
    """GiB of it that others have: the display, Windows, and what CUDA needs for itself"""
    capability: tuple[int, int]
    peak: float | None
    """FLOP/s in 16 bits, dense, summed up in fp32; None where it is not known"""
    named: bool = True
    """Not of this machine, but by its name"""
    display: bool = False
    """Whether people look at a desktop that it shows"""


# cores, boost clock in MHz, GB, compute capability: NVIDIA's product pages. A laptop's clock is the lowest that is
# listed for its power limits. Each core's share of the tensor cores does two multiply-adds in 16 bits per clock.
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
# GiB that the driver shows, TFLOP/s of the data sheet, capability, and what torch calls it (a regular expression).
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
"""GiB that the first call of CUDA takes, libraries and kernels: from some 0.3 to 0.5"""
DISPLAY = 0.7
"""GiB that a desktop takes of the card which shows it, Windows' or another, without a browser full of videos"""


def named_card(name: str) -> Card | None:
    """A card by one of ``NAMES``, in any spelling (``RTX 3060 Laptop``)."""
    key = next((key for key in NAMES if _plain(key) == _plain(name)), None)
    if key in _GEFORCE:
        cores, clock, memory, capability = _GEFORCE[key]
        return Card(key, memory, CUDA_CONTEXT + DISPLAY, capability, 4.0e6 * cores * clock, display=True)
    if key in _OTHERS:
        memory_shown, peak, capability, _ = _OTHERS[key]
        return Card(key, memory_shown, CUDA_CONTEXT, capability, peak * 1.0e12)
    return None


def found_card() -> Card | None:
    """This machine's, with the memory that is free now or this process's; None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()  # by then the context is there, and among what is taken
    free += torch.cuda.memory_reserved()
    name = torch.cuda.get_device_name()
    capability = torch.cuda.get_device_capability()
    return Card(name, total / GIB, (total - free) / GIB, capability, peak_flops(name), named=False)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in 16 bits of the card that torch calls so; None for an unknown one, and for laptops, whose power limit
    decides.

    ``lightning``'s own table has half of what GeForce cards do (their rate without tensor cores), twice what an H200
    does (its rate for sparse matrices), and no H200 under the name that torch has for it.
    """
    for _, peak, _, pattern in _OTHERS.values():
        if re.fullmatch(pattern, device_name.lower()):
            return peak * 1.0e12
    card = named_card(device_name) if "laptop" not in device_name.lower() else None
    return card.peak if card else None


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|gpu|[^a-z0-9]", "", name.lower())
