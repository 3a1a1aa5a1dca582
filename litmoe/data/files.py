"""Files to read, here (a ``Path``) or on the Hugging Face Hub (an ``hf://`` address): what they are, how they open."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from litmoe.cli import UserError, quoted

Location = Path | str
HUB = "hf://"
WAITS = (0.5, 2.0)  # seconds before a broken request is made again
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BUFFER_BYTES = 8 << 20  # of a file that is read as a stream: on the Hub each block is a request
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with the one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
UNDECODED = re.compile("[\udc80-\udcff]")  # what ``surrogateescape`` makes of bytes that are not UTF-8
BROKEN_COMPRESSION = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What the decompressors raise for a damaged or truncated file."""


class Unfinished(UserError):
    """What ended the work from outside: what was done is kept, and the same command goes on there."""


def is_remote(location: Location) -> bool:
    """Whether a file is on the Hub."""
    return isinstance(location, str) and location.startswith(HUB)


def suffix(location: Location) -> str:
    """The ending of a file's name, in lower case; of a compressed one that of its content: ``a.jsonl.gz`` is .jsonl."""
    name = Path(str(location))
    return Path(name.stem).suffix.lower() if is_compressed(location) else name.suffix.lower()


def is_compressed(location: Location) -> bool:
    """Whether a file's name ends like a compressed one."""
    return Path(str(location)).suffix.lower() in COMPRESSIONS


def open_file(location: Location) -> BinaryIO:
    """Opens a file's bytes, decompressed; plain files can be read in any order, and of one on the Hub no more is
    fetched than is read."""
    if not is_compressed(location):
        return _open_raw(location)
    raw: Any = io.BufferedReader(_open_raw(location), BUFFER_BYTES)
    compression = Path(str(location)).suffix.lower()
    if compression == ".zst":  # Python has none of its own before 3.14
        import pyarrow  # here alone: processes that read plain text need none of it

        return pyarrow.CompressedInputStream(raw, "zstd")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[compression](raw, "rb")


def encoding_of(location: Location) -> str:
    """The encoding of a text file by its byte order mark: ``utf-16``, ``utf-32`` or ``utf-8-sig``; else ``utf-8``.

    Raises:
        UserError: for UTF-16 or UTF-32 without such a mark, whose ASCII characters are valid UTF-8 between NUL bytes.
    """
    with open_file(location) as file, decompressing(location):
        beginning = file.read(4096)
    for mark, name in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return name
    nuls = beginning.count(0)
    if 4 * nuls > len(beginning):
        raise UserError(
            f"{location} is not text in UTF-8: {nuls:,} of its first {len(beginning):,} bytes are NUL. "
            f"{conversion_advice(location, beginning)}"
        )
    return "utf-8"


@contextmanager
def open_text(location: Location, newline: str | None = "") -> Iterator[TextIO]:
    """Opens a text file as a stream, decompressed and decoded as its byte order mark says, else from UTF-8.

    Bytes that are not UTF-8 become lone surrogates (``surrogateescape``), so that the reader can name their row.

    Args:
        location: a plain or compressed file.
        newline: as in ``open``: None makes every line end ``\\n``, "" keeps them.

    Raises:
        UserError: while reading, for a damaged compressed file, or one that is not in the encoding of its mark.
    """
    encoding = encoding_of(location)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with open_file(location) as file, decompressing(location):
        source: Any = file if is_compressed(location) else io.BufferedReader(file, BUFFER_BYTES)
        try:
            yield io.TextIOWrapper(source, encoding, errors, newline)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{location} begins with the byte order mark of {encoding.upper()}, but is not {encoding.upper()} "
                f"({error.reason}); get the file again, or save it as UTF-8."
            ) from None


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


@contextmanager
def decompressing(location: Location) -> Iterator[None]:
    """Turns the errors of the decompressors for a damaged file into a ``UserError``."""
    try:
        yield
    except BROKEN_COMPRESSION as error:
        if not is_compressed(location) or getattr(error, "errno", None) is not None:
            raise
        kind = Unfinished if is_remote(location) else UserError  # from the Hub it may come complete the next time
        raise kind(f"{location} is damaged or truncated ({in_short(error)}); get the file again.") from None


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


def _open_raw(location: Location) -> BinaryIO:
    if not is_remote(location):
        return open(location, "rb")
    from huggingface_hub import HfFileSystem  # here alone: processes that read local files need none of it

    file = _again(HfFileSystem().open)(location, "rb", cache_type="none")
    file.cache.fetcher = _again(file.cache.fetcher)
    return file


def _again(call: Callable[..., Any]) -> Callable[..., Any]:
    """Calls again when the server hangs up in the middle, which huggingface_hub does not for all kinds of it."""
    import httpx

    def patient(*args: Any, **kwargs: Any) -> Any:
        for wait in WAITS:
            try:
                return call(*args, **kwargs)
            except httpx.RemoteProtocolError:
                time.sleep(wait)
        return call(*args, **kwargs)

    return patient


@contextmanager
def reading(location: Location) -> Iterator[None]:
    """Whatever goes wrong with a file of the Hub in here is a lost connection: transports have many ways to say so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(location):
            raise
        raise Unfinished(
            f"{location} could not be read on: the connection was lost ({in_short(error)}). What was done is kept; the "
            "same command goes on where it was."
        ) from None


def in_short(error: Exception) -> str:
    """An exception of another library in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
