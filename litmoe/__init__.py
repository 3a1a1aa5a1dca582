"""LitMoE: pretrain a small mixture-of-experts language model, from text to chat (docs/ARCHITECTURE.md).

>>> from litmoe import load
>>> load("checkpoints/final").generate("Once upon a time", max_new_tokens=50)
"""

from typing import Any

from litmoe import fast_imports

__all__ = ["load"]

fast_imports.install()


def __getattr__(name: str) -> Any:
    # Lazy, so that worker processes which only tokenize text do not import torch.
    if name == "load":
        from litmoe.inference.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
