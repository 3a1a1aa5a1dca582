"""Chunks of tokens: every id is kept, in litdata's own layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming import StreamingDataset, TokensLoader
from litdata.streaming.writer import BinaryWriter

from litmoe.data import tokens


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 65_535), ("int32", 200_000)])
def test_chunks_keep_every_id(tmp_path: Path, dtype: str, top: int) -> None:
    assert tokens.dtype_for(top + 1) == dtype
    ids = np.random.default_rng(0).integers(0, top + 1, 5000).astype(dtype)
    ids[:2] = (0, top)
    writer = tokens.ChunkWriter(tmp_path / "t", 10**6, dtype)
    for part in np.array_split(ids, 7):
        writer.append(part)
    writer.close()
    data = StreamingDataset(str(tmp_path / "t"), item_loader=TokensLoader(block_size=10))
    assert torch.cat([data[i].long() for i in range(len(data))]).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_chunks_are_byte_for_byte_litdatas_own(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is written without litdata, whose import takes longer than the work."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    ids = np.arange(330).astype(dtype)
    ours = tokens.ChunkWriter(tmp_path / "ours", 0, dtype)
    ours.append(ids)
    ours.close()
    theirs = BinaryWriter(str(tmp_path / "theirs"), chunk_size=1, item_loader=TokensLoader())
    for i, part in enumerate(np.split(ids, [100, 200])):
        theirs.add_item(i, torch.from_numpy(part))
    theirs.done()
    (tmp_path / "theirs" / f"{theirs.rank}.index.json").rename(tmp_path / "theirs/index.json")
    found = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert found.pop("index.json") == wanted.pop("index.json")
    assert found == wanted and len(found) == 3


@pytest.mark.parametrize("count", [1, 99, 100, 149, 150, 151, 250, 1000])
def test_no_chunk_is_a_scrap(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens after a chunk's last whole window are lost, so there must be no chunk of few tokens."""
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    writer = tokens.ChunkWriter(tmp_path, 0, "uint16")
    ids = np.arange(count, dtype=np.uint16)
    for part in np.array_split(ids, min(count, 13)):
        writer.append(part)
    writer.close()
    sizes = [len(chunk) for chunk in stream_of(tmp_path)]
    assert sum(sizes) == count and len(sizes) == len(writer.chunks) == max(1, (count + 50) // 100)
    assert all(50 <= size <= 150 for size in sizes) or count < 50
    assert np.concatenate(stream_of(tmp_path)).tolist() == ids.tolist()


def stream_of(folder: Path) -> list[np.ndarray]:
    files = sorted(folder.glob("*.bin"), key=lambda path: int(path.stem.split("-")[-1]))
    return [np.fromfile(path, np.uint16, offset=12) for path in files]


def test_chunks_grow_with_the_text_up_to_32_mb(tmp_path: Path) -> None:
    def size(text_bytes: float) -> int:
        return tokens.ChunkWriter(tmp_path, int(text_bytes), "uint16").chunk_tokens

    assert size(1e6) == 1 << 20
    assert size(1e9) == int(1e9) // 64
    assert size(1e11) == 1 << 24
