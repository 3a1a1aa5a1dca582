"""Chunks of tokens have the bytes that litdata's own writer gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming import TokensLoader
from litdata.streaming.writer import BinaryWriter

from litmoe.data import documents, tokens


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_chunks_are_litdatas_bytes(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MIN_CHUNK_TOKENS", 100)
    ids = np.arange(330).astype(dtype)
    store = tokens.UnitStore(tmp_path / "units", "inputs")
    ids.tofile(store.part(0, "train"))
    tokens.write_chunks(store, [store.write(0, documents.Counts())], "train", dtype)
    writer = BinaryWriter(str(tmp_path / "expected"), chunk_size=1, item_loader=TokensLoader())
    for i, part in enumerate(np.split(ids, [100, 200])):
        writer.add_item(i, torch.from_numpy(part))
    writer.done()
    (tmp_path / "expected" / f"{writer.rank}.index.json").rename(tmp_path / "expected/index.json")
    written, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "units/train", tmp_path / "expected")
    )
    assert written == expected and len(written) == 4


def test_dtype_holds_every_id() -> None:
    assert tokens.dtype_for(1 << 16) == "uint16"
    assert tokens.dtype_for((1 << 16) + 1) == "int32"
