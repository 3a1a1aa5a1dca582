"""From text to batches: corpora, tokenizers, token folders, conversations, and the data modules that training reads."""

from typing import Any

__all__ = ["InstructionData", "TokenizedText"]


def __getattr__(name: str) -> Any:
    # Lazy: processes that only tokenize text must not import torch.
    if name == "TokenizedText":
        from litmoe.data.text_data import TokenizedText

        return TokenizedText
    if name == "InstructionData":
        from litmoe.data.sft_data import InstructionData

        return InstructionData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
