"""``torch.compile``: whether it works on this machine, and its settings."""

import importlib.util
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import torch


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
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"the package {package} is not installed"
    if device_type == "cuda" and sys.platform == "win32":
        return None  # triton-windows includes a compiler
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "there is no C++ compiler (Debian and Ubuntu: apt-get install g++)"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler} is not found)"
    # Compiled code is linked into Python. Some distributions package the headers separately.
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing (Debian and Ubuntu: apt-get install python3-dev)"
    return None
