"""Names for files and folders that were just written."""

import os

import pytest

from litmoe import renaming
from litmoe.renaming import rename


def test_a_file_that_is_held_for_a_moment(tmp_path, monkeypatch):
    """As by a virus scanner on Windows: the third attempt works."""
    (tmp_path / "new").mkdir()
    replace, attempts = os.replace, []

    def held(source, target):
        attempts.append(source)
        if len(attempts) < 3:
            raise PermissionError(13, "held by another process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(renaming, "WAITS", (0.0, 0.0, 0.0))
    rename(tmp_path / "new", tmp_path / "final")
    assert len(attempts) == 3 and (tmp_path / "final").is_dir()


def test_a_file_that_stays_held(tmp_path, monkeypatch):
    def held(source, target):
        raise PermissionError(13, "held by another process")

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(renaming, "WAITS", (0.0, 0.0))
    with pytest.raises(PermissionError):
        rename(tmp_path / "new", tmp_path / "final")
