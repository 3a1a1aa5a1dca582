"""``torch.compile``: whether it can work here, found out before it fails in the first step, and how it is to work."""

import importlib.util
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import torch


def should_compile(asked: bool | None, device_type: str) -> tuple[bool, str | None]:
    """(compile or not, a line that says why not where it was asked for or would have paid).

    Args:
        asked: the setting; None compiles on a CUDA GPU alone: elsewhere compiling takes longer than it saves in a short
            run.
        device_type: ``cuda``, ``cpu``, ``mps``.
    """
    if asked is False or (asked is None and device_type != "cuda"):
        return False, None
    if missing := missing_for_compile(device_type):
        return False, f"torch.compile is off: {missing}."
    return True, None


def compiler_settings() -> AbstractContextManager[None]:
    """While open, what is compiled within DDP stays in one piece, and each kind of block may have many graphs.

    Torch would part a graph at the size of a bucket, so that gradients travel early; of a model that is compiled block
    by block they do so anyway, and recomputed activations can't be parted. And it takes 8 graphs of a function for a
    mistake; here one function has a graph for each kind of block, for training and validation, and for sizes.
    """
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=64)
    return settings


def missing_for_compile(device_type: str) -> str | None:
    """What ``torch.compile`` lacks on this machine, or None."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"the package {package} is not installed"
    if device_type == "cuda" and sys.platform == "win32":
        return None  # triton-windows brings a compiler of its own
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "there is no C++ compiler (Debian and Ubuntu: apt-get install g++)"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler} is not found)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing (Debian and Ubuntu: apt-get install python3-dev)"
    return None
