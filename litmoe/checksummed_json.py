"""JSON files that are written whole or not at all and know when they were damaged; checksums of files."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

CHECKSUM = "sha256"
"""Where a sealed file says what the rest of it comes to."""


def read_json(path: Path) -> Any:
    """What ``json.load`` gives.

    Raises:
        OSError, ValueError: it can't be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames, so that nobody ever reads half of it."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    os.replace(beside, path)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """As ``write_json``, with a checksum of all that it says."""
    write_json(path, {**values, CHECKSUM: _seal(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What ``write_sealed`` was given; files of older versions have no checksum.

    Raises:
        OSError, ValueError: it can't be read, or its checksum is another.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, expected an object")
    sealed = values.pop(CHECKSUM, None)
    if sealed is not None and sealed != _seal(values):
        raise ValueError("its checksum is not that of what it says: it was damaged or changed")
    return values


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the fields of a dataclass. Those that another version of this project added are left out: where
    they change what the rest means, that version writes another format number."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The checksum of a file; other threads run on meanwhile.

    Raises:
        OSError: it can't be read, or is a device or a pipe, which have no end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
