"""Rows of conversations: each conversation once, no row too long, few lengths, little padding."""

import random

import pytest

from litmoe.data.packing import one_per_row, pack, row_length, row_lengths


def random_lengths(seed: int, count: int, context: int) -> list[int]:
    """Many short conversations and a few long ones, as in instruction data."""
    generator = random.Random(seed)
    return [min(context, 1 + int(generator.expovariate(6 / context))) for _ in range(count)]


def test_row_lengths() -> None:
    assert row_lengths(1, 100) == [*range(8, 97, 8), 100]
    assert row_lengths(200, 600) == [208, 224, 240, 256, 288, 320, 352, 384, 416, 448, 480, 512, 576, 600]
    assert [len(row_lengths(1, context)) for context in (256, 1024, 4096)] == [24, 40, 56]
    for tokens in range(1, 1001):
        length = row_length(tokens, 1000)
        assert tokens <= length <= 1000 and length - tokens < max(8, tokens / 8)
        assert length in row_lengths(1, 1000)


@pytest.mark.parametrize("context", [64, 100, 1024])
@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_each_conversation_has_one_place(context: int, count: int) -> None:
    for seed in range(50):
        lengths = random_lengths(seed, count, context)
        rows, length = pack(lengths, context)
        assert sorted(index for row in rows for index in row) == list(range(count))
        assert max(sum(lengths[index] for index in row) for row in rows) <= length <= context
        assert length in row_lengths(1, context)
        # Conversations keep their order, so a batch without packing is numbered like its rows.
        assert rows == sorted(sorted(row) for row in rows)


def test_packing_needs_less_than_padding() -> None:
    batches = [random_lengths(seed, 4, 1024) for seed in range(200)]
    packed = sum(len(rows) * length for rows, length in (pack(batch, 1024) for batch in batches))
    padded = sum(len(rows) * length for rows, length in (one_per_row(batch, 1024) for batch in batches))
    assert packed < 0.65 * padded and packed < 1.15 * sum(map(sum, batches))
    for batch in batches:
        rows, length = pack(batch, 1024)
        assert len(rows) * length <= len(batch) * row_length(max(batch), 1024)


def test_the_fewest_tokens_are_chosen() -> None:
    # 2 rows of 1,024 would need 2,048 tokens, and 3 of 512 fewer.
    assert pack([500, 500, 500], 1024) == ([[0], [1], [2]], 512)
    # The shorter rows if the tokens are the same: 2 of 512, not 1 of 1,024.
    assert pack([512, 300, 212], 1024) == ([[0], [1, 2]], 512)
    # A conversation as long as the context has a row of its own.
    assert pack([30, 100, 40], 100) == ([[0, 2], [1]], 100)
    assert pack([100], 100) == ([[0]], 100)
