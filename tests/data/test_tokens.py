"""Chunks of tokens have the bytes that litdata's own writer gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming import TokensLoader
from litdata.streaming.writer import BinaryWriter

from litmoe.data import corpora, documents, tokens
from litmoe.data.manifest import Settings


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lost_unit_keeps_its_place(tmp_path: Path, num_workers: int) -> None:
    """After a power failure a unit in the middle may be lost. The units after it are finished."""
    settings = Settings(None, None, None, None)
    progress = tokens.Progress(corpora.Corpus("text", "", {"train": []}, {"train": ()}, settings))
    units = [documents.Unit(i, "train", (), 0, generate=lambda i=i: iter(["x" * (i + 1)])) for i in range(9)]

    def process() -> list[int]:
        store = tokens.UnitStore(tmp_path / "units", "inputs")
        records = tokens.process_units(
            [units], documents.Rules(), lambda texts: texts[0].encode(), store, num_workers, None, False, progress
        )
        return [record.sizes["train"] for record in records]

    assert process() == list(range(1, 10))
    for name in ("complete.json", "000003.train", "000004.json"):
        (tmp_path / "units" / name).unlink()
    assert process() == list(range(1, 10))


def test_dtype_holds_every_id() -> None:
    assert tokens.dtype_for(1 << 16) == "uint16"
    assert tokens.dtype_for((1 << 16) + 1) == "int32"
