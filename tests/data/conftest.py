"""What the tests of prepared data share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
