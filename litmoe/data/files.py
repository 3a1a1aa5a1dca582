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
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from litmoe.cli import UserError, quoted

Location = Path | str
"""A local path, or the ``hf://`` address of a file on the Hub."""

HUB = "hf://"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# On the Hub every block is one request.
BUFFER_BYTES = 8 << 20
MAX_CSV_FIELD = 2**31 - 1
PARQUET_ROWS = 256
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


class Unfinished(UserError):
    """An outside event ended the work. Finished parts are kept, and the same command resumes."""


class BadRow(ValueError):
    """The reason why a single row cannot be read, while the rows after it can."""


# --- names and opening ---


def is_remote(location: Location) -> bool:
    """Return whether a file is stored on the Hub."""
    return isinstance(location, str) and location.startswith(HUB)


def is_compressed(location: Location) -> bool:
    """Return whether the name of a file ends with a compression suffix."""
    return Path(str(location)).suffix.lower() in COMPRESSIONS


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

        raw: Any = HfFileSystem().open(location, "rb", cache_type="none")
    else:
        raw = open(location, "rb")  # noqa: SIM115 - the caller closes it
    if not is_compressed(location):
        return raw
    compression = Path(str(location)).suffix.lower()
    buffered = io.BufferedReader(raw, BUFFER_BYTES)
    if compression == ".zst":
        # Python's standard library reads zstd only since 3.14.
        import pyarrow

        return pyarrow.CompressedInputStream(buffered, "zstd")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[compression](buffered, "rb")


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
    encoding = _encoding(location)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with open_file(location) as file, decompression_errors(location):
        source: Any = file if is_compressed(location) else io.BufferedReader(file, BUFFER_BYTES)
        try:
            yield io.TextIOWrapper(source, encoding, errors, newline)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{location} is broken {encoding.upper()} text ({error.reason}); get the file again, or save it as "
                "UTF-8."
            ) from None


def _encoding(location: Location) -> str:
    """Return the Python encoding that the byte order mark names, ``utf-8`` without one.

    Raises:
        UserError: the file is binary, or UTF-16 without a mark. Its NUL bytes would be valid UTF-8.
    """
    with open_file(location) as file, decompression_errors(location):
        beginning = file.read(4096)
    if not beginning and is_compressed(location):
        raise UserError(f"{location} is damaged or truncated (it is empty); get the file again.")
    for mark, name in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return name
    if 4 * beginning.count(0) > len(beginning):
        raise UserError(
            f"{location} is not UTF-8 text: a quarter or more of its first bytes are NUL. If it is UTF-16, convert it: "
            "`iconv -f UTF-16LE -t UTF-8 OLD > NEW`."
        )
    return "utf-8"


def undecoded(text: str) -> str | None:
    """Return why text from ``open_text`` is not UTF-8 and how to convert its file; None for good text."""
    if text.isascii():
        return None
    bad = UNDECODED.search(text)
    if bad is None:
        return None
    return (
        f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8; convert the file, for example with "
        "`iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` if it comes from an older Windows program"
    )


@contextmanager
def decompression_errors(location: Location) -> Iterator[None]:
    """Turn the errors of the decompressors for a damaged file into a ``UserError``."""
    try:
        yield
    except DECOMPRESSION_ERRORS as error:
        # An error number comes from the operating system, such as a full disk.
        if not is_compressed(location) or getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{location} is damaged or truncated ({in_short(error)}); get the file again.") from None


@contextmanager
def connection_errors(location: Location) -> Iterator[None]:
    """Turn errors while a Hub file is read into ``Unfinished``; the transport raises many kinds of them."""
    try:
        yield
    except UserError:
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


# --- rows ---


def read_rows(
    location: Location, columns: Sequence[str] | None = None, row_groups: range | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a .jsonl, .json, .csv, .tsv or .parquet file with the place of each.

    - .jsonl: the JSON value on each line.
    - .json: the elements of a list, or the value on each line, or the only object of the file.
    - .csv, .tsv and .parquet: a dictionary from column to value.

    Args:
        location: a plain, compressed or remote file.
        columns: for .parquet, read only these.
        row_groups: for .parquet, read only these, such as ``range(0, 4)``.

    Yields:
        ``("line 3", value)`` or ``("row 3", value)``. A row that cannot be read comes as a ``BadRow``.

    Raises:
        UserError: the file as a whole cannot be read.
        Unfinished: the connection to the Hub was lost.
    """
    readers: dict[str, Callable[[Location], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
    }
    with connection_errors(location):
        if suffix(location) == ".parquet":
            yield from _parquet_rows(location, columns, row_groups)
        else:
            yield from readers[suffix(location)](location)


def _json_lines(location: Location) -> Iterator[tuple[str, Any]]:
    with open_text(location, newline="\n") as file:
        yield from _decode_lines(file)


def _decode_lines(lines: Iterator[str] | TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
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
        first_lines = list(islice(file, 20))
        if _are_json_lines(first_lines):
            yield from _decode_lines(chain(first_lines, file))
            return
        text = "".join(first_lines) + file.read()
    try:
        whole = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}, line {error.lineno}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); "
            "expected a list of rows, or one row on each line (`jq -c . OLD > NEW` writes it like that)."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} cannot be read as JSON ({str(error).partition(';')[0]}).") from None
    rows = whole if isinstance(whole, list) else [whole]
    has_bad_bytes = undecoded(text) is not None
    for number, row in enumerate(rows, 1):
        problem = undecoded(json.dumps(row, ensure_ascii=False)) if has_bad_bytes else None
        yield f"row {number}", BadRow(problem) if problem else row


def _are_json_lines(lines: list[str]) -> bool:
    """Return whether each line holds a row, judged by the first lines of a file; some of them may be broken."""
    lines = [line for line in lines if line.strip()]
    if not lines or (len(lines) == 1 and lines[0].lstrip("\ufeff \t").startswith("[")):
        return False
    return 2 * sum(map(_is_json_row, lines)) >= len(lines)


def _is_json_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line.lstrip("\ufeff")), dict | list)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        # Well-formed, but with a number or a nesting that Python cannot read.
        return line.lstrip().startswith(("{", "["))


def _csv_rows(location: Location) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    header: list[str] | None = None
    with open_text(location) as file:
        lines = csv.reader(file, delimiter="\t" if suffix(location) == ".tsv" else ",", strict=True)
        while True:
            place = f"line {lines.line_num + 1}"
            try:
                cells = next(lines, None)
            except csv.Error as error:
                if "end of data" in str(error):
                    # All rows after the quote would be one cell, so this is no single bad row.
                    raise UserError(
                        f"{location}, {place}: a quote that opens here is never closed; close it, or double the quotes "
                        "inside a text."
                    ) from None
                yield place, BadRow(f"not a row of a {suffix(location)} file ({error})")
                continue
            if cells is None:
                return
            if header is None:
                header = _checked_header(location, cells)
            elif cells:
                yield place, _csv_row(header, cells)


def _checked_header(location: Location, names: list[str]) -> list[str]:
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
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(open_file(location), buffer_size=BUFFER_BYTES)
    except pyarrow.ArrowException as error:
        raise UserError(f"{location} cannot be read as parquet ({in_short(error)}); get the file again.") from None


def _parquet_rows(
    location: Location, columns: Sequence[str] | None, row_groups: range | None
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    import pyarrow

    with open_parquet(location) as file:
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        number = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        try:
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=columns):
                for row in _batch_rows(batch):
                    number += 1
                    yield f"row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and (is_remote(location) or error.errno is not None):
                raise
            raise UserError(f"{location} cannot be read as parquet ({in_short(error)}); get the file again.") from None


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


# --- used by the current text preparation; removed together with it ---

decompressing = decompression_errors
reading = connection_errors
encoding_of = _encoding


def read_text(location: Location) -> str:
    """All of a text file, its line ends as ``\\n``.

    Raises:
        UserError: it is not UTF-8, or not in the encoding of its byte order mark.
    """
    with open_text(location, newline=None) as file:
        text = file.read()
    check_utf8(text, location, "it")
    return text


def check_utf8(text: str, location: Location, place: str) -> None:
    """Raises ``UserError`` for text from ``open_text`` that is not UTF-8."""
    if not text.isascii() and (undecoded := UNDECODED.search(text)):
        with open_file(location) as file:
            beginning = file.read(1 << 20)
        raise UserError(
            f"{location} is not UTF-8: byte 0x{ord(undecoded.group()) - 0xDC00:02x} in {place} cannot be read. "
            + conversion_advice(location, beginning)
        )


UNDEFINED_IN_CP1252 = b"\x81\x8d\x8f\x90\x9d"


def conversion_advice(location: Location, data: bytes) -> str:
    """How to convert a file to UTF-8: a guess at its encoding from bytes of it, which should begin where it begins."""
    decoded = data.decode("utf-8", "replace")
    damaged = decoded.count("\ufffd")
    intact = sum(character > "\x7f" for character in decoded) - damaged
    c1_controls = bytes(set(data) & set(range(0x80, 0xA0)))
    if b"\0" in data:
        little = data[1::2].count(0) > data[::2].count(0)
        bits = 32 if 2 * data.count(0) > len(data) else 16  # four bytes a character, of which two or three are 0
        little = data[3::4].count(0) > data[::4].count(0) if bits == 32 else little
        encoding = f"UTF-{bits}{'LE' if little else 'BE'}"
        guess = f"It may be UTF-{bits} without a byte order mark"
    elif intact > 10 * damaged:
        errors = ", errors='replace'"
        return (
            "Most of its characters are UTF-8, so some bytes are damaged: get the file again, or mark the damaged"
            f" places: {_python_conversion(location, 'utf-8', errors)}"
        )
    elif set(c1_controls) & set(UNDEFINED_IN_CP1252) or _is_of_another_script(data):
        return (
            "It is neither Windows-1252 nor Latin-1 (perhaps GB18030, Big5, Shift_JIS or Windows-1251): save it as"
            " UTF-8 in the program that it comes from, or, with the right ENCODING: `iconv -f ENCODING -t UTF-8`."
        )
    elif c1_controls:
        encoding, guess = "CP1252", "If it is a text of Western Europe, it is Windows-1252"
    else:
        encoding, guess = "ISO-8859-1", "If it is a text of Western Europe, it is Latin-1"
    if os.name == "nt":
        return f"{guess}: {_python_conversion(location, encoding)}"
    name, first = _decompressed(location)
    return f"{guess}: {first}`iconv -f {encoding} -t UTF-8 {quoted(name)} > utf8{suffix(location)}`."


def _is_of_another_script(data: bytes) -> bool:
    """Whether most letters are outside of ASCII, as in Cyrillic or Chinese; in Western European text few are."""
    return sum(byte >= 0x80 for byte in data) > sum(chr(byte).isalpha() for byte in data if byte < 0x80)


def _python_conversion(location: Location, encoding: str, errors: str = "") -> str:
    """A command that converts a file on any system."""
    name, first = _decompressed(location)
    source = f"open({name!r}, encoding='{encoding.lower()}', newline=''{errors})"
    target = f"open('utf8{suffix(location)}', 'w', encoding='utf-8', newline='')"
    return f'{first}`python -c "{target}.write({source}.read())"`.'


def _decompressed(location: Location) -> tuple[str, str]:
    """The name of a file without its compression ending, and the advice to decompress it first."""
    name = str(location)
    return (name[: name.rindex(".")], "decompress it, then ") if is_compressed(location) else (name, "")
