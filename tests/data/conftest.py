"""Fixtures of prepared data."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from litmoe.data import tokens
from litmoe.data.manifest import Manifest
from litmoe.data.prepare import PrepareArgs, prepare


@pytest.fixture
def run(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Manifest]:
    """``prepare`` into tmp_path/data with a copy of the shared tokenizer, in this process."""
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")

    def call(**settings: object) -> Manifest:
        defaults = {"data_dir": tmp_path / "data", "tokenizer_dir": tmp_path / "tokenizer", "num_workers": 0}
        return prepare(PrepareArgs(**{**defaults, **settings}))

    return call


@pytest.fixture(scope="session")
def chunked(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A prepared corpus with several chunks in train and one in val; tests must not write there."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    for split, texts in (("train", stories[:120]), ("val", stories[120:])):
        (folder / split).mkdir(parents=True)
        (folder / split / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "MIN_CHUNK_TOKENS", 400)
        metadata = prepare(PrepareArgs(data_dir=folder, tokenizer_dir=tokenizer_dir, num_workers=0))
    assert metadata.splits["train"].chunks > 4 and metadata.splits["val"].chunks == 1
    return folder
