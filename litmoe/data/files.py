"""Open local, compressed and Hugging Face Hub files, and read the rows of every supported format.

``read_rows`` is the only row reader of the project. Text preparation and instruction data both use it::

    for place, value in read_rows(Path("corpus.jsonl.gz")):
        if isinstance(value, BadRow):
            print(f"{place}: {value}")  # the row cannot be read, the rows after it can
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from litmoe.cli import UserError, strip_control_chars

Location = Path | str
"""A local path, or the ``hf://`` address of a file on the Hub."""

HUB = "hf://"
COMPRESSED_TO_TEXT = 3
"""About how many bytes of text a byte of a compressed file gives."""
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
READABLE = ".txt, .md, .jsonl, .json, .csv, .tsv, .parquet or .arrow (each also as .gz, .bz2, .xz or .zst)"
# Operating systems leave these in folders, in addition to names that begin with a dot.
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
# The datasets library writes these next to the rows, and litdata (LitGPT's TextFiles) an index.json next to its chunks.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "index.json")
# A cloned Hub dataset has these next to the rows.
DESCRIPTIONS = ("readme.md", "license.md", "license.txt")
# Folders of a source tree with code of others, or code that programs wrote.
DEPENDENCIES = ("node_modules", "site-packages", "__pycache__")
# On the Hub every block is one request.
BUFFER_BYTES = 8 << 20
# The csv module stores its limit in a C long, which has 32 bits on Windows.
MAX_CSV_FIELD = 2**31 - 1
# Rows that exist as Python objects at the same time, to limit the memory.
BATCH_ROWS = 256
# The file format of Arrow begins with these bytes, the streaming format does not.
ARROW_MARK = b"ARROW1\0\0"
# UTF-32 comes first: its little-endian mark begins with the one of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# The decoder's ``surrogateescape`` turns bytes that are not UTF-8 into these characters.
UNDECODED = re.compile("[\udc80-\udcff]")
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


def _open_zstd(file: BinaryIO) -> Any:
    # Python's standard library reads zstd only since 3.14.
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


class Unfinished(UserError):
    """An outside event ended the work. Finished parts are kept, and the same command resumes."""


class BadRow(ValueError):
    """The reason why a single row cannot be read, while the rows after it can."""


# --- names and opening ---


def is_remote(location: Location) -> bool:
    """Return whether a file is stored on the Hub."""
    return str(location).startswith(HUB)


def is_compressed(location: Location) -> bool:
    """Return whether the name of a file ends with a compression suffix."""
    return Path(str(location)).suffix.lower() in DECOMPRESSORS


def suffix(location: Location) -> str:
    """Return the format suffix of a file in lower case: ``.jsonl`` for ``a.jsonl`` and for ``a.JSONL.gz``."""
    name = Path(str(location))
    if is_compressed(location):
        name = Path(name.stem)
    return name.suffix.lower()


def open_file(location: Location) -> BinaryIO:
    """Open the decompressed bytes of a file. Reading a remote file fetches only the bytes that are read."""
    if is_remote(location):
        # Imported here, because reading local files must not wait for it.
        from huggingface_hub import HfFileSystem

        # No cache of the file system: the readers request large blocks themselves.
        raw: Any = HfFileSystem().open(location, "rb", cache_type="none")
    else:
        raw = open(location, "rb")  # noqa: SIM115 - the caller closes it
    if not is_compressed(location):
        return raw
    decompress = DECOMPRESSORS[Path(str(location)).suffix.lower()]
    return decompress(io.BufferedReader(raw, BUFFER_BYTES))


@contextmanager
def open_text(location: Location, newline: str | None = "") -> Iterator[TextIO]:
    """Open a text file, decompressed and decoded as its byte order mark says, or else as UTF-8.

    Bytes that are not UTF-8 become lone surrogates, so that the reader can name the row (``undecoded``).

    Args:
        location: a plain or compressed file.
        newline: as in ``open``: None turns every line end into ``\\n``, "" and ``\\n`` keep them.

    Raises:
        UserError: the file is damaged, or does not have the encoding of its byte order mark.
    """
    with open_file(location) as file, damage_errors(location):
        source = io.BufferedReader(file, BUFFER_BYTES)  # type: ignore[type-var]
        encoding = _encoding(location, source.peek(4096)[:4096])
        # UTF-16 and UTF-32 have no way to mark single bad bytes.
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        try:
            yield io.TextIOWrapper(source, encoding, errors, newline)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{location} is broken {encoding.upper()} text ({error.reason}); get the file again, or save it as "
                "UTF-8."
            ) from None


def _encoding(location: Location, beginning: bytes) -> str:
    """Return the Python encoding that the byte order mark names, ``utf-8`` without one.

    Raises:
        UserError: the file is binary, or UTF-16 without a mark. Its NUL bytes would be valid UTF-8.
    """
    if not beginning and is_compressed(location):
        raise UserError(f"{location} is damaged or truncated (it is empty); get the file again.")
    for mark, name in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return name
    # Half of the bytes of ASCII text in UTF-16 are NUL.
    if 4 * beginning.count(0) > len(beginning):
        raise UserError(
            f"{location} is not UTF-8 text: a quarter or more of its first bytes are NUL. If it is UTF-16, convert it: "
            "`iconv -f UTF-16LE -t UTF-8 OLD > NEW`."
        )
    return "utf-8"


def undecoded(text: str) -> str | None:
    """Return why text from ``open_text`` is not UTF-8 and how to convert its file; None for good text."""
    # Much faster than the search, and true for most text.
    if text.isascii():
        return None
    bad = UNDECODED.search(text)
    if bad is None:
        return None
    return (
        f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8; convert the file, for example with "
        "`iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` if it comes from an older Windows program"
    )


def first_bad_line(location: Location) -> str:
    """Return the message for a file with text that is not UTF-8, with the number of the line."""
    with open_text(location, newline=None) as file:
        problems = ((number, undecoded(line)) for number, line in enumerate(file, 1))
        number, problem = next((number, problem) for number, problem in problems if problem)
    return f"{location}, line {number}: {problem}."


@contextmanager
def damage_errors(
    location: Location,
    errors: tuple[type[Exception], ...] = DECOMPRESSION_ERRORS,
    problem: str = "is damaged or truncated",
) -> Iterator[None]:
    """Turn the errors that a reader raises for a damaged file into a ``UserError``."""
    try:
        yield
    except errors as error:
        # Readers raise an OSError without a number for damaged data. One with a number comes from the operating system,
        # such as a full disk, and one of a remote file may come from the connection.
        if isinstance(error, OSError) and (error.errno is not None or is_remote(location)):
            raise
        raise UserError(f"{location} {problem} ({in_short(error)}); get the file again.") from None


@contextmanager
def connection_errors(location: Location) -> Iterator[None]:
    """Turn errors while a Hub file is read into ``Unfinished``; the transport raises many kinds of them."""
    try:
        yield
    except UserError:
        # Raised here for the content of the file.
        raise
    except Exception as error:
        if not is_remote(location):
            raise
        raise Unfinished(
            f"the connection was lost while reading {location} ({in_short(error)}). Finished parts are kept; run the "
            "same command again to resume."
        ) from None


def in_short(error: Exception) -> str:
    """Return the type and the first line of another library's exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names of files or fields for a message, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return strip_control_chars(", ".join(names[:limit]) + more)


# --- rows ---


def read_rows(
    location: Location, columns: Sequence[str] | None = None, row_groups: range | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a .jsonl, .json, .csv, .tsv, .parquet or .arrow file with the place of each.

    - .jsonl: the JSON value on each line.
    - .json: the elements of a list, or the value on each line, or the only object of the file.
    - .csv, .tsv, .parquet and .arrow: a dictionary from column to value.

    Args:
        location: a plain, compressed or remote file.
        columns: for .parquet and .arrow, read only these.
        row_groups: for .parquet, read only these, such as ``range(0, 4)``.

    Yields:
        ``("line 3", value)`` or ``("row 3", value)``. A row that cannot be read comes as a ``BadRow``.

    Raises:
        UserError: the file cannot be read.
        Unfinished: the connection to the Hub was lost.
    """
    readers: dict[str, Callable[[Location], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": partial(_parquet_rows, columns=columns, row_groups=row_groups),
        ".arrow": partial(_arrow_rows, columns=columns),
    }
    with connection_errors(location):
        yield from readers[suffix(location)](location)


def _json_lines(location: Location) -> Iterator[tuple[str, Any]]:
    # A lone carriage return is white space in JSON and ends no line.
    with open_text(location, newline="\n") as file:
        for number, line in enumerate(file, 1):
            # Concatenated files have byte order marks in the middle.
            line = line.lstrip("\ufeff").strip()
            if line:
                yield f"line {number}", _decode_line(line)


def _decode_line(line: str) -> Any:
    if problem := undecoded(line):
        return BadRow(problem)
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); expected an object")
    except RecursionError:
        return BadRow("JSON nested too deeply; expected an object with texts in it")
    except ValueError as error:
        # Python limits the number of digits; the rest of its message is advice to programmers.
        return BadRow(f"a number that can't be read ({str(error).partition(';')[0]})")


def _json_rows(location: Location) -> Iterator[tuple[str, Any]]:
    with open_text(location) as file:
        # A list of rows is a single JSON value, so the complete file is read.
        text = file.read().removeprefix("\ufeff")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # More than one value: the file holds a row on each line.
            yield from _json_lines(location)
            return
        raise UserError(
            f"{location}, line {error.lineno}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); "
            "expected a list of rows, or one row on each line (`jq -c . OLD > NEW` writes it like that)."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} cannot be read as JSON ({str(error).partition(';')[0]}).") from None
    rows = content if isinstance(content, list) else [content]
    # Checked once for the file. Only a file with bad bytes is searched row by row.
    has_bad_bytes = undecoded(text) is not None
    for number, row in enumerate(rows, 1):
        problem = undecoded(json.dumps(row, ensure_ascii=False)) if has_bad_bytes else None
        yield f"row {number}", BadRow(problem) if problem else row


def _csv_rows(location: Location) -> Iterator[tuple[str, Any]]:
    # Python's own limit for a cell is 131,072 characters.
    csv.field_size_limit(MAX_CSV_FIELD)
    with open_text(location) as file:
        # strict: otherwise the reader accepts a quote that is never closed, and the rest of the file is one cell.
        lines = csv.reader(file, delimiter=DELIMITERS[suffix(location)], strict=True)
        header = _csv_header(location, lines)
        while True:
            # Named before the row is read: a quoted cell may span many lines.
            place = f"line {lines.line_num + 1}"
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):
                    # All rows after the quote would be one cell, so this is no single bad row.
                    raise UserError(
                        f"{location}, {place}: a quote that opens here is never closed; close it, or double the quotes "
                        "inside a text."
                    ) from None
                yield place, BadRow(f"not a row of a {suffix(location)} file ({error})")
                continue
            # An empty line has no cells.
            if cells:
                yield place, _csv_row(header, cells)


def _csv_header(location: Location, lines: Iterator[list[str]]) -> list[str]:
    try:
        names = next(lines, [])
    except csv.Error as error:
        raise UserError(f"{location}, line 1: the names of the columns cannot be read ({error}).") from None
    if problem := undecoded("".join(names)):
        raise UserError(f"{location}, line 1: {problem}.")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{location}, line 1: several columns are called {repeated[0]!r}; give each its own name.")
    return names


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells, but the header has {len(header)}")
    for cell in cells:
        if problem := undecoded(cell):
            return BadRow(problem)
    return dict(zip(header, cells, strict=True))


def open_parquet(location: Location) -> Any:
    """Open a ``pyarrow.parquet.ParquetFile``.

    Raises:
        UserError: the file is not parquet.
    """
    from pyarrow.parquet import ParquetFile

    file = _decompressed(location) if is_compressed(location) else open_file(location)
    with _arrow_errors(location, "parquet"):
        return ParquetFile(file, buffer_size=BUFFER_BYTES)


def _decompressed(location: Location) -> BinaryIO:
    """Return a temporary copy: parquet is read from its end, which a compressed stream does not allow."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - removed when it is closed
    with open_file(location) as file, damage_errors(location):
        shutil.copyfileobj(file, copy, BUFFER_BYTES)
    copy.seek(0)
    return copy


def open_arrow(location: Location) -> Any:
    """Open a ``pyarrow.ipc.RecordBatchStreamReader`` of an Arrow file of either format.

    Raises:
        UserError: the file is not Arrow.
    """
    import pyarrow

    file = io.BufferedReader(open_file(location), BUFFER_BYTES)  # type: ignore[type-var]
    with damage_errors(location), _arrow_errors(location, "arrow"):
        # The file format is the streaming format between this mark and an index, which is not needed.
        if file.peek(len(ARROW_MARK)).startswith(ARROW_MARK):
            file.read(len(ARROW_MARK))
        return pyarrow.ipc.open_stream(file)


def read_schema(location: Location) -> Any:
    """Return the ``pyarrow.Schema`` of a .parquet or .arrow file; of an uncompressed one, only the schema is read.

    Raises:
        UserError: the file cannot be read.
        Unfinished: the connection to the Hub was lost.
    """
    with connection_errors(location):
        if suffix(location) == ".arrow":
            return open_arrow(location).schema
        with open_parquet(location) as file:
            return file.schema_arrow


def _arrow_errors(location: Location, kind: str) -> AbstractContextManager[None]:
    import pyarrow

    return damage_errors(location, (pyarrow.ArrowException, OSError), f"cannot be read as {kind}")


def _arrow_rows(location: Location, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    number = 0
    with open_arrow(location) as batches, damage_errors(location), _arrow_errors(location, "arrow"):
        for batch in batches:
            if columns is not None:
                batch = batch.select(columns)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in _batch_rows(batch.slice(start, BATCH_ROWS)):
                    number += 1
                    yield f"row {number}", row


def _parquet_rows(
    location: Location, columns: Sequence[str] | None, row_groups: range | None
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    with open_parquet(location) as file, _arrow_errors(location, "parquet"):
        groups = range(file.num_row_groups)
        if row_groups is not None:
            groups = groups[row_groups.start : row_groups.stop]
        # Rows are counted from the beginning of the file, for messages.
        first = 1 + sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        batches = file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=columns)
        for number, row in enumerate(chain.from_iterable(map(_batch_rows, batches)), first):
            yield f"row {number}", row


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | BadRow]:
    names = batch.schema.names
    try:
        values = [column.to_pylist() for column in batch.columns]
    except Exception:
        # A value that Python cannot hold, such as text that is not UTF-8: find the row.
        yield from (_single_row(batch, index) for index in range(batch.num_rows))
        return
    for row in zip(*values, strict=True):
        yield dict(zip(names, row, strict=True))


def _single_row(batch: Any, index: int) -> dict[str, Any] | BadRow:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return BadRow(f"byte 0x{error.object[error.start]:02x} in the column {name!r} is not UTF-8")
        except Exception as error:
            return BadRow(f"a value in the column {name!r} can't be read ({in_short(error)})")
    return row


# --- folders ---


def text_files(folder: Path) -> list[Path]:
    """Return the readable files below ``folder`` in a fixed order, without hidden files.

    A README.md or licence next to other files describes them and is left out; alone, it is text.
    """
    readable = [path for path in visible_files(folder) if is_readable(path)]
    return [path for path in readable if path.name.lower() not in DESCRIPTIONS] or readable


def unread_files(folder: Path) -> list[Path]:
    """Return the files below ``folder`` that are neither read nor hidden, and broken links."""
    taken = set(text_files(folder))
    return [path for path in visible_files(folder) if path not in taken]


def visible_files(folder: Path) -> list[Path]:
    """Return the files and links below ``folder`` in a fixed order, without hidden ones and those of the system."""
    visible = []
    for path in folder.rglob("*"):
        names = path.relative_to(folder).parts
        is_hidden = any(name.startswith(".") or name.lower() in SYSTEM_FILES for name in names)
        if not is_hidden and (path.is_file() or path.is_symlink()):
            visible.append(path)
    # By text: paths of Windows are compared without case, and the order of documents must be the same everywhere.
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def is_readable(path: Path) -> bool:
    """Return whether a file has one of the formats of ``READABLE``, by its name."""
    is_known = suffix(path) in (*TEXT_SUFFIXES, *ROW_SUFFIXES)
    return is_known and path.name not in METADATA_FILES and path.is_file()


def code_files(folder: Path, extensions: Sequence[str]) -> list[Path]:
    """Return the files below ``folder`` with one of these endings in a fixed order.

    Hidden files and those in folders of ``DEPENDENCIES`` are left out.
    """
    return [
        path
        for path in visible_files(folder)
        if suffix(path) in extensions
        and path.is_file()
        and not set(DEPENDENCIES).intersection(path.relative_to(folder).parts[:-1])
    ]


def is_text(path: Path) -> bool:
    """Return whether a file can be decoded; the complete file is read."""
    try:
        with open_text(path) as file:
            return not any(undecoded(block) for block in iter(partial(file.read, BUFFER_BYTES), ""))
    except UserError:
        return False


def kinds(paths: Iterable[Path]) -> str:
    """Count files by suffix, the most frequent first: ``.pdf 2, .docx 1``."""
    endings = Counter("".join(path.suffixes[-2 if is_compressed(path) else -1 :]).lower() for path in paths)
    return ", ".join(f"{ending or 'without ending'} {number}" for ending, number in endings.most_common())
