"""Read prepared tokens directly from their files, to compare with what the loaders return."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

T = 16
"""Context length of the tests"""


def stream(folder: Path, split: str) -> list[np.ndarray]:
    """The tokens of each chunk."""
    files = sorted((folder / "tokens" / split).glob("*.bin"), key=lambda path: int(path.stem.split("-")[-1]))
    return [np.fromfile(path, np.uint16, offset=12) for path in files]


def windows_of(folder: Path, split: str, length: int = T) -> list[tuple[int, ...]]:
    """The windows of ``length`` + 1 tokens of a split, in the order of the text."""
    size = length + 1
    return [
        tuple(chunk[i * size : (i + 1) * size].tolist())
        for chunk in stream(folder, split)
        for i in range(len(chunk) // size)
    ]


def rows_of(batches: Iterable[Any]) -> list[tuple[int, ...]]:
    """The rows of micro batches, in order."""
    return [tuple(row.tolist()) for batch in batches for row in batch]


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """One pass after the other."""
    while True:
        yield from loader


def take(loader: Iterable[Any], number: int) -> list[Any]:
    """The first micro batches, over as many passes as they need."""
    return list(itertools.islice(endless(loader), number))
