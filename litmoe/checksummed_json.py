"""JSON files that are written atomically and detect damage by a checksum; SHA-256 of files."""

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from litmoe.renaming import rename

CHECKSUM = "sha256"
"""The key of a checksummed file that holds the checksum of all other keys."""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError, ValueError: the file can't be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary name and rename, so that a reader never gets an incomplete file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    rename(temporary, path)


def write_checksummed(path: Path, values: dict[str, Any]) -> None:
    """Write as ``write_json``, with a checksum of the content."""
    write_json(path, {**values, CHECKSUM: _checksum(values)})


def read_checksummed(path: Path) -> dict[str, Any]:
    """Return what ``write_checksummed`` was given.

    Raises:
        OSError, ValueError: the file can't be read, or its content does not match its checksum.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, expected an object")
    # The first versions wrote no checksum; their files are still read.
    checksum = values.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(values):
        raise ValueError("its content does not match its checksum: it was damaged or edited")
    return values


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for the fields of a dataclass, without those that another version of this project added.

    A version that changes the meaning of the other fields writes another format number.
    """
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _checksum(values: dict[str, Any]) -> str:
    # Sorted, so that the order of keys in the file does not matter.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Hashing releases the GIL, so other threads keep running.

    Raises:
        OSError: the file can't be read, or is a device or a pipe, which may never end.
    """
    # A checkpoint from elsewhere may contain a link to /dev/zero.
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
