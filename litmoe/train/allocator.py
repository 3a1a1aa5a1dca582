"""A setting of CUDA's allocator that has to be made before its first allocation."""

import os
import platform
import sys


def use_expandable_segments(cuda: bool) -> None:
    """Lets the allocator's segments grow, so that little is lost in gaps between blocks of different sizes.

    For each CUDA run on Linux; processes that are started later inherit it. Not on Windows, which has none, nor in
    WSL2, where the first allocation can fail (pytorch/pytorch issue 192330). ``PYTORCH_ALLOC_CONF`` beats it.

    Args:
        cuda: whether there is such a device.
    """
    chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if cuda and not chosen and sys.platform == "linux" and "microsoft" not in platform.release().lower():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
