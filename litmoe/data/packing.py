"""Place the conversations of a micro batch into rows of equal length, with as little padding as possible."""

from collections.abc import Sequence
from typing import NamedTuple

# Lengths of rows are multiples of it: matrices that fill a GPU's tiles.
LENGTH_MULTIPLE = 8
# Between a length and its double there are so many others, so rounding up adds at most an eighth to longer rows.
LENGTHS_PER_DOUBLING = 8


class Packing(NamedTuple):
    """Where the conversations of a micro batch are."""

    rows: list[list[int]]
    """The numbers of the conversations in each row, in their order"""
    length: int
    """Of every row, in tokens"""


def row_length(tokens: int, context: int) -> int:
    """Return the smallest of a few fixed lengths of a row that holds ``tokens``, at most ``context``.

    A kernel or graph that depends on the shape is then used again. The lengths are the multiples of 8 up to 128, of 16
    up to 256, of 32 up to 512 and so on, and the context: 40 for a context of 1,024.
    """
    power = (tokens - 1).bit_length()  # of two, the first that is not below tokens
    step = max(LENGTH_MULTIPLE, 2**power // (2 * LENGTHS_PER_DOUBLING))
    return min(-(-tokens // step) * step, context)


def row_lengths(shortest: int, context: int) -> list[int]:
    """Return the lengths of rows that hold ``shortest`` tokens or more, in ascending order."""
    lengths = [row_length(shortest, context)]
    while lengths[-1] < context:
        lengths.append(row_length(lengths[-1] + 1, context))
    return lengths


def pack(lengths: Sequence[int], context: int) -> Packing:
    """Place conversations into rows, several in a row, so that the fewest tokens are computed.

    Each row length is tried with first-fit decreasing. If two need the same number of tokens, the shorter rows are
    taken, because attention may compute complete rows.

    Args:
        lengths: tokens of each conversation, at most ``context``.
        context: the longest row.
    """
    best: Packing | None = None
    for length in row_lengths(max(lengths), context):
        fewest_rows = -(-sum(lengths) // length)
        if best is not None and fewest_rows * length >= len(best.rows) * best.length:
            continue
        packing = Packing(_first_fit(lengths, length), length)
        if best is None or len(packing.rows) * length < len(best.rows) * best.length:
            best = packing
    assert best is not None, "there is always a first row length"
    return best


def one_per_row(lengths: Sequence[int], context: int) -> Packing:
    """Give each conversation a row of its own."""
    return Packing([[index] for index in range(len(lengths))], row_length(max(lengths), context))


def _first_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Place each conversation, the longest first, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []  # tokens left in each row
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(index)
        room[row] -= lengths[index]
    # In the order of the conversations again, which is easier to follow than that of their lengths.
    return sorted(sorted(row) for row in rows)
