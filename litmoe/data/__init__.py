"""From text to batches: corpora, tokenizers, token folders and the reader that training takes its batches from."""

from typing import Any

__all__ = ["InstructionData", "TokenizedText"]


def __getattr__(name: str) -> Any:
    # Lazy: the processes that only tokenize text must not import torch.
    if name == "TokenizedText":
        from litmoe.data.module import TokenizedText

        return TokenizedText
    if name == "InstructionData":
        from litmoe.data.instruction_module import InstructionData

        return InstructionData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
