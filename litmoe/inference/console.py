"""Shared by the command lines of inference and evaluation: the checkpoint that they use, and stdin and stdout."""

import os
import sys
from pathlib import Path
from typing import TextIO

from litmoe import checkpoints


def find_checkpoint(given: Path | None, router: str | None) -> Path:
    """Return the checkpoint folder that the user gives, or else the newest one, and print it to stderr.

    The line is printed before the slow imports, so that a wrong checkpoint is noticed early.

    Raises:
        UserError: there is no such checkpoint, or it was trained with another router than the one the user names.
    """
    folder = checkpoints.resolve(given)
    step = checkpoints.read_metadata(folder).step
    print(f"{'Newest checkpoint' if given is None else 'Checkpoint'}: {folder}, step {step:,}", file=sys.stderr)
    checkpoints.check_router(folder, router)
    return folder


def use_utf8(stream: TextIO, errors: str = "replace") -> None:
    """Read or write UTF-8, also in consoles of Windows, which have other encodings by default."""
    stream.reconfigure(encoding="utf-8", errors=errors)  # type: ignore[attr-defined]


def discard_output() -> None:
    """Discard further output after a BrokenPipeError, because Python flushes stdout at exit and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
