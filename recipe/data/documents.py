"""Text files as documents: what ends a document, what belongs to it, and which split it goes to.

A file is read in parts (about 1 MB each, ending where a document ends), so that memory stays flat, several processes
can read one file, and what a part holds never depends on how many processes there are.
"""

import json
import mmap
import re
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from recipe.cli import UserError
from recipe.data.files import Location, Unfinished, is_remote, open_file, reading, suffix

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")
PART_BYTES = 1 << 20
REMOTE_PART_BYTES = 8 << 20  # of a .jsonl on the Hub: each part is a request
LONG_DOCUMENT_BYTES = 4 << 20  # a longer one is read in several parts
HASHED_BYTES = 1 << 16  # of a document's beginning decide its split: enough to tell documents apart, and known at once


@dataclass(frozen=True)
class Rules:
    """How files become documents."""

    separator: str | None = None
    """A line of a .txt that ends a document, beside ``<|endoftext|>``."""
    text_column: str | None = None
    """The field of a .jsonl or the column of a .parquet that holds the text; None finds it."""
    val_fraction: float | None = None
    """The share of documents that become validation text, by hash; None: no split is made."""
    cut: bool = False
    """Split each document, its end becoming validation text, instead of the corpus: for a corpus of few documents."""


@dataclass(frozen=True)
class Part:
    """What one process reads: bytes of a .txt, the lines of a .jsonl that begin there, row groups of a .parquet."""

    path: Location
    start: int
    stop: int
    column: str | None = None
    size: int = 0
    """Bytes of text, about."""
    split: str | None = None
    """The split that all of it goes to; None: each document's hash decides."""
    opens: bool = True
    closes: bool = True
    """False at either end where a long document goes on in the part before or after."""
    document: int | None = None
    """The hash of such a long document."""
    articles: tuple[Location, ...] | None = None
    """None: a row of a .parquet is a document. Else rows are lines and a document is an article of WikiText, from its
    heading to the next one: the files after this one, where the last article may go on."""


class Piece(NamedTuple):
    """A document, or the part of a long one."""

    text: str
    split: str
    closes: bool  # the document ends here
    opens: bool = True  # the document begins here


class PartText(NamedTuple):
    """What a part holds."""

    pieces: list[Piece]
    empty: int = 0  # documents without text, left out
    marks: int = 0  # ``<|endoftext|>`` inside a line: text like any other
    held_out: int = 0  # training documents that also stand in the validation text, left out
    hashes: Sequence[int] = ()  # of each validation document that ends here, where the file is validation text


def text_files(folder: Path) -> list[Path]:
    """The .txt, .jsonl and .parquet files under ``folder``, in a fixed order; hidden ones are left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def clean(text: str) -> str:
    """A document's text: line ends as ``\\n``, no white space around it, no half of a surrogate pair."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def document_hash(text: str) -> int:
    """What two documents have in common when they are the same: 64 bits of hash."""
    return int.from_bytes(blake2b(text[:HASHED_BYTES].encode()[:HASHED_BYTES], digest_size=8).digest(), "big")


def split_of(text: str, val_fraction: float) -> str:
    """``train`` or ``val``, by the document's own text alone: the same document is always in the same split."""
    return split_of_hash(document_hash(text), val_fraction)


def split_of_hash(document: int, val_fraction: float) -> str:
    """See ``split_of``."""
    return "val" if document < val_fraction * 2**64 else "train"


def cut_document(text: str, val_fraction: float) -> tuple[str, str]:
    """The beginning and the end of a document, cut where a line (or else a word) ends; the end may be empty."""
    middle = round(len(text) * (1 - val_fraction))
    reach = round(len(text) * val_fraction / 2)
    for blank in ("\n", ". ", " "):
        # The nearest one after or before the middle, not so far that the share becomes another.
        after, before = text.find(blank, middle, middle + reach), text.rfind(blank, middle - reach, middle)
        at = before if after < 0 or 0 <= middle - before < after - middle else after
        if at >= 0 and (head := text[: at + 1].rstrip()) and (tail := text[at + 1 :].lstrip()):
            return head, tail
    return text, ""


def documents_of(text: str, separator: str | None = None) -> Iterator[str]:
    """Divides at lines that hold only ``<|endoftext|>`` (or ``separator``); documents come out cleaned, maybe empty."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # A "\n" in front, so that a separator in the first line looks like any other and the search has a fixed beginning.
    for document in re.split(rf"\n{_separator_pattern(separator)}(?=\n|\Z)", "\n" + text):
        yield document.strip()


def _separator_pattern(separator: str | None) -> str:
    # No group around a single literal: re then searches for the literal itself, many times faster.
    lines = re.escape(END_OF_TEXT) if separator is None else f"(?:{re.escape(END_OF_TEXT)}|{re.escape(separator)})"
    return lines + r"[ \t]*"


def parts(
    path: Location,
    rules: Rules,
    split: str | None,
    *,
    may_cut: bool,
    articles: tuple[Location, ...] | None = None,
) -> Iterator[Part]:
    """Divides a file.

    Args:
        path: a .txt, .jsonl or .parquet file.
        rules: what ends a document, where the text is, how splits are made.
        split: the split of the whole file, None where the documents are to be split.
        may_cut: a long document may be divided between words and lines (its tokens are the same, divided or not).
        articles: see ``Part``.

    Raises:
        UserError: for a .jsonl or .parquet file without text in it, or a broken one.
    """
    with reading(path):
        if suffix(path) == ".parquet":
            yield from _parquet_parts(path, rules, split, articles)
        elif suffix(path) == ".jsonl":
            yield from _jsonl_parts(path, rules, split)
        elif (path := Path(path)).stat().st_size:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                begin = 3 if data[:3] == b"\xef\xbb\xbf" else 0
                yield from _txt_parts(path, data, begin, rules, split, may_cut)


def read(part: Part, rules: Rules, held_out: Container[int] = ()) -> Iterator[PartText]:
    """Reads a part, a little at a time: a row group of a .parquet may be long.

    Args:
        part: what to read.
        rules: how it was divided.
        held_out: hashes of documents that are left out of the training text.

    Raises:
        UserError: for text that is not UTF-8, for a broken line or row.
    """
    with reading(part.path):
        if suffix(part.path) == ".txt":
            found = part_text(_read_txt(part, rules), rules, part.split, held_out, part.document)
            if found.pieces and not part.closes:
                found.pieces[-1] = found.pieces[-1]._replace(closes=False)
                found = found._replace(hashes=())
            if found.pieces and not part.opens:
                found.pieces[0] = found.pieces[0]._replace(opens=False)
            if found.held_out and not part.opens:
                found = found._replace(held_out=0)  # counted where it opened
            yield found
            return
        rows = _read_jsonl(part) if suffix(part.path) == ".jsonl" else _read_parquet(part)
        for some in _batched(rows):
            texts = (document for row in some for document in (documents_of(row) if row else [""]))
            yield part_text(texts, rules, part.split, held_out)


def _batched(rows: Iterator[str]) -> Iterator[list[str]]:
    some, size = [], 0
    for row in rows:
        some.append(row)
        size += len(row)
        if size >= PART_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def part_text(
    texts: Iterable[str],
    rules: Rules,
    split: str | None,
    held_out: Container[int] = (),
    document: int | None = None,
) -> PartText:
    """Documents, cleaned, with the split that each belongs to; empty ones and those held out are counted.

    ``document`` is the hash of the one document that all of it is a part of.
    """
    pieces: list[Piece] = []
    hashes: list[int] = []
    empty = marks = left_out = 0
    for text in texts:
        if not text:
            empty += 1
            continue
        if split == "val":
            hashes.append(document_hash(text) if document is None else document)
        elif split == "train" and held_out and (document_hash(text) if document is None else document) in held_out:
            left_out += 1
            continue
        marks += text.count(END_OF_TEXT)
        if split is not None or rules.val_fraction is None:
            pieces.append(Piece(text, split or "train", True))
        elif rules.cut:
            head, tail = cut_document(text, rules.val_fraction)
            pieces.append(Piece(head, "train", True))
            if tail:
                pieces.append(Piece(tail, "val", True))
        else:
            pieces.append(Piece(text, split_of(text, rules.val_fraction), True))
    return PartText(pieces, empty, marks, left_out, hashes)


def first_documents(texts: Iterable[PartText], number: int) -> Iterator[PartText]:
    """No more than ``number`` documents, without reading further."""
    for text in texts:
        ends = [i for i, piece in enumerate(text.pieces, 1) if piece.closes]
        if len(ends) >= number:
            yield text._replace(pieces=text.pieces[: ends[number - 1]], hashes=text.hashes[:number])
            return
        number -= len(ends)
        yield text


# --- .txt ---


def _txt_parts(
    path: Path, data: mmap.mmap, begin: int, rules: Rules, split: str | None, may_cut: bool
) -> Iterator[Part]:
    # A line of its own, the first one of the file too; its line end is left for a separator that follows.
    first = r"(?<![\s\S])|(?<=\xef\xbb\xbf)" if begin else r"(?<![\s\S])"
    pattern = re.compile(
        rf"(?:\n|{first})".encode("latin-1") + rf"{_separator_pattern(rules.separator)}\r?(?=\n|\Z)".encode()
    )
    size = len(data)
    while begin < size:
        # One byte early: a separator's own "\n" may be the last byte of the target.
        target = begin + PART_BYTES - 1
        match = pattern.search(data, target) if target + 1 < size else None
        end = match.end() if match else size
        if end - begin > LONG_DOCUMENT_BYTES and may_cut:
            long_begin = begin
            for before in pattern.finditer(data, begin):
                if before.start() >= target:
                    break
                long_begin = before.end()
            if long_begin > begin:
                yield Part(path, begin, long_begin, size=long_begin - begin, split=split)
            yield from _long_document(path, data, long_begin, match.start() if match else size, rules, split)
        else:
            yield Part(path, begin, end, size=end - begin, split=split)
        begin = end


def _long_document(
    path: Path, data: mmap.mmap, begin: int, end: int, rules: Rules, split: str | None
) -> Iterator[Part]:
    """Parts of a single document; its split is settled here, since none of them holds all of it."""
    sections = [(begin, end, split)]
    head = data[begin : min(begin + 8 * HASHED_BYTES, end)]
    document = document_hash(clean(head.decode("utf-8", errors="ignore")))
    if split is None and rules.val_fraction is not None:
        if rules.cut:
            wanted = begin + round((end - begin) * (1 - rules.val_fraction))
            near = wanted + round((end - begin) * rules.val_fraction / 2)
            middle = _cut_place(data, wanted, near, b"\n")
            middle = middle if middle < near else _cut_place(data, wanted, end)
            sections = [(begin, middle, "train"), (middle, end, "val")]
        else:
            sections = [(begin, end, split_of_hash(document, rules.val_fraction))]
    for section_begin, section_end, section_split in sections:
        start = section_begin
        while start < section_end:
            stop = section_end
            if start + PART_BYTES < section_end:
                stop = _cut_place(data, start + PART_BYTES, section_end)
            yield Part(
                path,
                start,
                stop,
                size=stop - start,
                split=section_split,
                opens=start == section_begin,
                closes=stop == section_end,
                document=document,
            )
            start = stop


def _cut_place(data: mmap.mmap, start: int, end: int, blanks: bytes = b" \n") -> int:
    """The next place where a byte-level pre-tokenizer divides in any case, or ``end``.

    That is after a lone line end between two visible characters, or before a lone space between two letters; in longer
    runs of white space it depends on what follows.
    """
    for match in re.compile(b"[" + blanks + b"]").finditer(data, start, end - 1):
        at = match.start()
        before = data[max(0, at - 5) : at].removesuffix(b"\r").decode("utf-8", errors="ignore")[-1:]
        after = data[at + 1 : at + 5].decode("utf-8", errors="ignore")[:1]
        if match.group() == b" ":
            if before.isalpha() and after.isalpha():
                return at
        elif before and after and not before.isspace() and not after.isspace():
            return at + 1
    return end


def _read_txt(part: Part, rules: Rules) -> Iterator[str]:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        text = _decode(part.path, file.read(part.stop - part.start), part.start)
    if not (part.opens and part.closes):  # of a single document, so no separator is in here
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = text.lstrip() if part.opens else text
        yield text.rstrip() if part.closes else text
        return
    documents = list(documents_of(text, rules.separator))
    # Nothing stands before a leading separator or after a trailing one: no document, not an empty one.
    while len(documents) > 1 and not documents[-1]:
        documents.pop()
    while len(documents) > 1 and not documents[0]:
        documents.pop(0)
    yield from documents


def _decode(path: Location, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} "
            f"({_place(path, offset + error.start)}) cannot be read; expected text in UTF-8. Convert it, for "
            f"instance from Latin-1: iconv -f ISO-8859-1 -t UTF-8 {Path(path).name} > utf8.txt"
        ) from None


def _place(path: Location, offset: int) -> str:
    """The line; of a file on the Hub the byte, as counting lines would fetch all that stands before."""
    if is_remote(path):
        return f"byte {offset:,}"
    number = 1
    with open_file(path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return f"line {number}"


# --- .jsonl ---


def _jsonl_parts(path: Location, rules: Rules, split: str | None) -> Iterator[Part]:
    with open_file(path) as file:
        size = file.seek(0, 2)
    column = rules.text_column
    if column is None:
        lines = ((offset, line) for offset, line in _lines(Part(path, 0, size), first=1 << 16) if line.strip())
        column = next((_text_column(path, _json_row(path, line, offset)) for offset, line in lines), None)
    step = REMOTE_PART_BYTES if is_remote(path) else PART_BYTES
    for begin in range(0, size, step):
        end = min(size, begin + step)
        yield Part(path, begin, end, column=column, size=end - begin, split=split)


def _lines(part: Part, first: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part, each with its place; the ``first`` bytes (None: all) are read at once."""
    with open_file(part.path) as file:
        offset = max(part.start - 1, 0)  # one byte early: it tells whether a line begins at the start
        file.seek(offset)
        data, skip, step = b"", part.start > 0, min(first or part.stop, part.stop - offset)
        while offset < part.stop and not (skip and offset + len(data) >= part.stop):
            more = file.read(step)
            *lines, data = (data + more).split(b"\n") if more else (data, b"")
            for line in lines:
                if not skip and offset < part.stop:
                    yield offset, line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
                skip = False
                offset += len(line) + 1
            if not more:
                return
            step = 2 * step if not lines else first or 1 << 16


def _read_jsonl(part: Part) -> Iterator[str]:
    for offset, line in _lines(part):
        if line.strip():
            row = _json_row(part.path, line, offset)
            if part.column not in row:
                raise UserError(
                    f"{part.path}, {_place(part.path, offset)}: no field {part.column!r} (it has "
                    f"{', '.join(map(repr, row))}); --text_column names the field that holds the text."
                )
            yield _text_of(row[part.column], part.path, offset)


def _json_row(path: Location, line: bytes, offset: int) -> dict[str, Any]:
    try:
        row = json.loads(_decode(path, line, offset))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, {_place(path, offset)}: not JSON ({error.msg} at column {error.colno}); a .jsonl "
            'holds one object a line, such as {"text": "Once upon a time"}.'
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, {_place(path, offset)}: {type(row).__name__} where an object was expected, such as "
            '{"text": "Once upon a time"}.'
        )
    return row


def _text_column(path: Location, row: dict[str, Any]) -> str:
    """The field that holds the text: ``text`` where there is one, else the only one that holds a string."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings or row.get("text", 0) is None:  # null is an empty text
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"{path}: none of its fields ({', '.join(map(repr, row)) or 'none'}) is called 'text', and "
        f"{len(strings)} hold text; say which one with --text_column NAME."
    )


def _text_of(value: Any, path: Location, offset: int | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        place = f"{path}, {_place(path, offset)}" if offset is not None else path
        raise UserError(
            f"{place}: {type(value).__name__} where text was expected; --text_column names the right field."
        )
    return writable(value)


def writable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- .parquet ---

READ_BYTES = 8 << 20  # of a column at a time
ROWS = 256  # that are made strings at a time
HEADING = re.compile(r" = (?!= )(?:.*[^=] )?= \s*")  # ` = Title = `, not ` = = Section = = `


def _parquet_parts(
    path: Location, rules: Rules, split: str | None, articles: tuple[Location, ...] | None
) -> Iterator[Part]:
    import pyarrow

    with _open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)

    def holds_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        return any(is_kind(kind) for is_kind in kinds)

    example = {field.name: "" if holds_text(field.type) else 0 for field in schema}
    column = rules.text_column or _text_column(path, example)
    if example.get(column) != "":
        texts = ", ".join(repr(name) for name, value in example.items() if value == "") or "none"
        what = (
            f"the column {column!r} holds {schema.field(column).type}" if column in example else f"no column {column!r}"
        )
        raise UserError(f"{path}: {what}; its columns with text: {texts} (--text_column).")
    index = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).column(index).total_uncompressed_size
        yield Part(path, group, group + 1, column=column, size=size, split=split, articles=articles)


def _read_parquet(part: Part) -> Iterator[str]:
    rows = _parquet_rows(part.path, part.column, part.start, part.stop)
    return rows if part.articles is None else _articles(part, rows)


def _parquet_rows(path: Location, column: str | None, start: int = 0, stop: int | None = None) -> Generator[str]:
    """The rows of row groups ``start`` to ``stop``."""
    import pyarrow

    try:
        with _open_parquet(path) as file:
            groups = list(range(start, file.metadata.num_row_groups if stop is None else stop))
            for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _text_of(value, path, None)
    except pyarrow.ArrowException as error:
        raise _broken(path, error) from None


def _articles(part: Part, rows: Iterator[str]) -> Iterator[str]:
    """The articles whose heading is in the part; its last one is read on to where the next one begins."""
    article: list[str] | None = [] if part.opens else None  # None: the part before reads these rows
    for row in rows:
        if HEADING.fullmatch(row):
            if article:
                yield "".join(article)
            article = []
        if article is not None:
            article.append(row or "\n")
    if article is None:
        return
    following = chain.from_iterable(_parquet_rows(path, part.column) for path in part.articles or ())
    with closing(_parquet_rows(part.path, part.column, part.stop)) as rest:
        for row in chain(rest, following):
            if HEADING.fullmatch(row):
                break
            article.append(row or "\n")
    yield "".join(article)


def _open_parquet(path: Location) -> Any:
    """A ``ParquetFile``; the last one of the Hub stays open, since its footer costs requests."""
    return nullcontext(_remote_parquet(path)) if is_remote(path) else _parquet_file(path)


@lru_cache(maxsize=1)
def _remote_parquet(path: Location) -> Any:
    return _parquet_file(path)


def _parquet_file(path: Location) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(open_file(path) if is_remote(path) else path, buffer_size=READ_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        if is_remote(path) and not isinstance(error, pyarrow.ArrowException):
            raise
        raise _broken(path, error) from None


def _broken(path: Location, error: Exception) -> UserError:
    kind = Unfinished if is_remote(path) else UserError  # from the Hub it may come whole the next time
    return kind(f"{path} cannot be read as parquet ({_first_line(error)}); get the file anew.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
