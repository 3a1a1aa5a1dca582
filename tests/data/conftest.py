"""Fixtures of prepared data."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from litmoe.data import tokens
from litmoe.data.manifest import Manifest
from litmoe.data.prepare import PrepareArgs, prepare

if TYPE_CHECKING:
    from litgpt import Tokenizer


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


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> "Tokenizer":
    # Imported here, because most tests of this folder need no torch.
    from litgpt import Tokenizer

    return Tokenizer(tokenizer_dir)


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of this process of two; the fake backend needs no second one, because nothing is sent."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    if distributed.is_initialized():
        distributed.destroy_process_group()
