"""Write an exported folder completely or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litmoe.cli import UserError
from litmoe.renaming import rename


def check_free(out: Path) -> None:
    """Raise UserError if ``out`` exists and is not an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise UserError(f"{out} exists and is not empty; use another folder, or remove it.")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a folder next to ``out``, which replaces it at the end, or is removed after an error."""
    check_free(out)
    out = out.resolve()
    # In the same parent folder, because a rename is atomic only within one file system.
    partial = out.with_name(f".{out.name}.partial")
    try:
        # A killed export may have left one.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        # An empty folder. Windows does not replace folders in a rename.
        if out.exists():
            out.rmdir()
        rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
