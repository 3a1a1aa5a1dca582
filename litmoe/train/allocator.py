"""The setting of CUDA's allocator. It must be made before the first allocation."""

import os
import platform
import sys


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
