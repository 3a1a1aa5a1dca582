"""Settings of stdin and stdout for the command lines of this package."""

import os
import sys
from typing import TextIO


def use_utf8(stream: TextIO, errors: str = "replace") -> None:
    """Read or write UTF-8, also in consoles of Windows, which have other encodings by default."""
    stream.reconfigure(encoding="utf-8", errors=errors)  # type: ignore[attr-defined]


def discard_output() -> None:
    """Discard further output after a BrokenPipeError, because Python flushes stdout at exit and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
