"""LitMoE: the recipe that the scripts share, one room per stage (docs/ARCHITECTURE.md).

>>> from litmoe import load
>>> load("checkpoints/final").generate("Once upon a time", max_new_tokens=50)
"""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that workers which only tokenize text do not import torch.
    if name == "load":
        from litmoe.inference.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
