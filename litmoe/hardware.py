"""What the hardware of this machine allows: number of processes, sharding, precision."""

import os

import torch

from litmoe.cli import UserError
from litmoe.config import RunSettings


def processes(settings: RunSettings) -> tuple[int, int]:
    """Return (devices per machine, machines): what torchrun started, or else what the settings ask for.

    Raises:
        UserError: this machine has fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if gpus and local > gpus:
            raise UserError(f"torchrun started {local} processes, but this machine has {gpus} GPU(s); start no more.")
        return local, int(os.environ["WORLD_SIZE"]) // local
    if settings.devices == "auto":
        return max(gpus, 1), settings.num_nodes
    try:
        devices = int(settings.devices)
    except ValueError:
        devices = 0
    if devices < 1 or (gpus and devices > gpus):
        there = f"this machine has {gpus} GPU(s)" if gpus else "this machine has no GPU, so devices are CPU processes"
        raise UserError(f"--devices {settings.devices}: {there}; expected `auto` or a number from 1.")
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


def choose_precision(requested: str | None) -> tuple[str, str | None]:
    """Return the precision of the run, and a line for the user if it is not the requested one or slow here.

    A GPU without bf16 falls back to fp16 with a gradient scaler. A CPU falls back to fp32, which is the fastest there
    for small models and gives the same results on every machine; ``bf16-true`` is kept if requested.
    """
    if not torch.cuda.is_available():
        if requested == "bf16-true" and not cpu_has_bf16():
            return (
                requested,
                "this CPU has no instructions for bf16: 32-true is many times faster on it than bf16-true.",
            )
        if requested in (None, "32-true", "bf16-true"):
            return requested or "32-true", None
        return "32-true", f"precision {requested} needs a GPU; this run uses 32-true on the CPU."
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if requested is None:
        return ("bf16-mixed" if has_bf16 else "16-mixed"), None
    if requested.startswith("bf16") and not has_bf16:
        name = torch.cuda.get_device_name()
        return "16-mixed", f"{name} has no bf16, so this run uses 16-mixed instead of {requested}."
    return requested, None
