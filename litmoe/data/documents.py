"""Text files as documents: what ends a document, what belongs to it, and which split it goes to.

The text of a document is kept exactly, white space at its ends included, with these rules:

- .txt and .md: a line ``<|endoftext|>`` separates two documents; the line end before it and its own belong to the
  separator, and so does the line end at the end of the file; everything else belongs to the documents. Without such a
  line the whole file is one document. Line ends become ``\\n``.
- A row of .jsonl, .json, .csv, .tsv or .parquet is a document, its line ends as they are. A line ``<|endoftext|>``
  inside a row separates documents too.
- WikiText's articles, whose rows are lines, lose the blanks and blank lines around them.
- A document that is empty or all white space is left out and counted.

A plain file is read in parts (about 1 MB each, ending where a document ends), so that memory stays flat, several
processes can read one file, and what a part holds never depends on how many processes there are. A file that cannot be
divided (compressed, in UTF-16, .json, .csv, .tsv) is one part, read as a stream; of these only a .json that holds one
list is read into memory at once.
"""

import csv
import json
import mmap
import re
from collections import Counter
from collections.abc import Collection, Container, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from litmoe.cli import UserError
from litmoe.data.files import (
    UNDECODED,
    Location,
    Unfinished,
    check_utf8,
    conversion_advice,
    encoding_of,
    is_compressed,
    is_remote,
    open_file,
    open_text,
    reading,
    suffix,
)

END_OF_TEXT = "<|endoftext|>"
TEXTS = (".txt", ".md")  # their content is text; the others hold rows
STREAMS = (".json", ".csv", ".tsv")  # read from their beginning to their end
SUFFIXES = (*TEXTS, ".jsonl", *STREAMS, ".parquet")
READABLE = ".txt, .md, .jsonl, .json, .csv, .tsv (each also as .gz, .bz2, .xz or .zst) or .parquet"
# What systems and programs leave in folders, beside names that begin with a dot.
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
# What the datasets library writes beside the rows, about them.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# About the texts beside them, as in a dataset cloned from the Hub.
ABOUT = ("readme.md", "license.md", "license.txt")
PART_BYTES = 1 << 20
REMOTE_PART_BYTES = 8 << 20  # of a .jsonl on the Hub: each part is a request
LONG_DOCUMENT_BYTES = 4 << 20  # a longer one is read in several parts
COMPRESSED_TO_TEXT = 3  # about how many bytes of text a byte of a compressed file gives
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
    skip_broken: bool = False
    """Leave out rows that cannot be read, and count them."""
    written: bool = False
    """The .txt files are this project's own (``corpora.TextWriter``): their line ends are kept too."""


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
    streamed: bool = False
    """All of a file that is read from its beginning to its end; ``start`` and ``stop`` mean nothing then."""


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
    broken: int = 0  # rows that cannot be read, left out


class BrokenRow(UserError):
    """A row that cannot be read, while those after it can: ``--skip_broken`` leaves it out."""


def text_files(folder: Path) -> list[Path]:
    """The files under ``folder`` that can be read, in a fixed order; hidden ones are left out, and a README.md or a
    licence beside others."""
    readable = [path for path in visible_files(folder) if is_readable(path)]
    return [path for path in readable if path.name.lower() not in ABOUT] or readable


def unread_files(folder: Path) -> list[Path]:
    """The files under ``folder`` that are neither read nor hidden, and links that lead to no file."""
    taken = set(text_files(folder))
    return [path for path in visible_files(folder) if path not in taken]


def visible_files(folder: Path) -> list[Path]:
    """The files and links under ``folder``, in a fixed order, without hidden ones and those of ``SYSTEM_FILES``."""

    def is_hidden(name: str) -> bool:
        return name.startswith(".") or name.lower() in SYSTEM_FILES

    found = [
        path
        for path in folder.rglob("*")
        if not any(is_hidden(name) for name in path.relative_to(folder).parts) and (path.is_file() or path.is_symlink())
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def is_readable(path: Path) -> bool:
    """Whether a file is one of ``READABLE``, by its name."""
    is_known = suffix(path) in SUFFIXES and not (suffix(path) == ".parquet" and is_compressed(path))
    return is_known and path.name not in METADATA and path.is_file()


def kinds(paths: Iterable[Path]) -> str:
    """Counts files by the ending of their names, the most frequent first: ``.pdf 2, .docx 1``."""
    endings = Counter("".join(path.suffixes[-2 if is_compressed(path) else -1 :]).lower() for path in paths)
    return ", ".join(f"{ending or 'without ending'} {number}" for ending, number in endings.most_common())


def clean(text: str) -> str:
    """A text with line ends as ``\\n`` and no white space around it: what two copies of it have in common."""
    return _with_newlines(text).strip()


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def document_hash(text: str) -> int:
    """What two documents have in common when they are the same, apart from white space around them and the kind of
    their line ends: 64 bits of hash."""
    beginning = clean(text)[:HASHED_BYTES].encode()[:HASHED_BYTES]
    return int.from_bytes(blake2b(beginning, digest_size=8).digest(), "big")


def split_of(text: str, val_fraction: float) -> str:
    """``train`` or ``val``, by the document's own text alone: the same document is always in the same split."""
    return split_of_hash(document_hash(text), val_fraction)


def split_of_hash(document: int, val_fraction: float) -> str:
    """See ``split_of``."""
    return "val" if document < val_fraction * 2**64 else "train"


def cut_document(text: str, val_fraction: float) -> tuple[str, str]:
    """The beginning and the end of a document, cut where a line (or else a word) ends; the end may be empty.

    The line end or blank at which it is cut is in neither of the two.
    """
    middle = round(len(text) * (1 - val_fraction))
    reach = round(len(text) * val_fraction / 2)
    for blank in ("\n", ". ", " "):
        # The nearest one after or before the middle, not so far that the share becomes another.
        after, before = text.find(blank, middle, middle + reach), text.rfind(blank, middle - reach, middle)
        at = before if after < 0 or 0 <= middle - before < after - middle else after
        if at < 0:
            continue
        head, tail = text[:at] + blank.rstrip(), text[at + len(blank) :]
        head = head.removesuffix("\r") if blank == "\n" else head
        if not (is_blank(head) or is_blank(tail)):
            return head, tail
    return text, ""


def is_blank(text: str) -> bool:
    """Whether a text is empty or all white space."""
    return not text or text.isspace()


def documents_of(text: str, separator: str | None = None) -> Iterator[str]:
    """Divides a text at lines that hold only ``<|endoftext|>`` (or ``separator``); documents may be empty.

    The line end before a separator and the separator's own belong to it, as does the one at the end of a text with
    separators; the rest is kept exactly, but for line ends, which become ``\\n``.
    """
    documents = list(_divided(_with_newlines(text), separator))
    yield from documents[:-1]
    yield documents[-1].removesuffix("\n") if len(documents) > 1 else documents[-1]


def _divided(text: str, separator: str | None) -> Iterator[str]:
    # A "\n" in front, so that a separator in the first line looks like any other and the search has a fixed beginning.
    for document in re.split(rf"\n{_separator_pattern(separator)}(?=\n|\Z)", "\n" + text):
        yield document.removeprefix("\n")


def documents_of_row(text: str) -> list[str]:
    """Divides the text of a row at lines that hold only ``<|endoftext|>``; the documents are kept exactly."""
    if END_OF_TEXT not in text:
        return [text]
    return re.split(rf"(?:\A|\r?\n|(?<=\n)){_separator_pattern(None)}(?:\r?\n|\Z)", text)


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
        elif not (size := _size(path)):
            if is_compressed(path):
                raise UserError(f"{path} is damaged or truncated (it is empty); get the file again.")
        elif suffix(path) in STREAMS or is_compressed(path) or encoding_of(path) in ("utf-16", "utf-32"):
            size *= COMPRESSED_TO_TEXT if is_compressed(path) else 1
            yield Part(path, 0, size, column=rules.text_column, size=size, split=split, streamed=True)
        elif suffix(path) == ".jsonl":
            yield from _jsonl_parts(path, rules, split)
        else:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                begin = 3 if data[:3] == b"\xef\xbb\xbf" else 0
                yield from _txt_parts(Path(path), data, begin, rules, split, may_cut)


def _size(path: Location) -> int:
    """Bytes of a file as it is stored."""
    if not is_remote(path):
        return Path(path).stat().st_size
    with open_file(path) as file:
        return file.seek(0, 2)


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
        if suffix(part.path) in TEXTS and not part.streamed:
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
        is_text = suffix(part.path) in TEXTS
        rows = _read_text_stream(part, rules) if is_text else _read_rows(part, rules)
        for texts, broken in _batched(rows, rules.skip_broken):
            documents = texts if is_text else chain.from_iterable(map(documents_of_row, texts))
            yield part_text(documents, rules, part.split, held_out)._replace(broken=broken)


def _read_rows(part: Part, rules: Rules) -> Iterator[str | BrokenRow]:
    """The text of each row; a row that cannot be read comes as what is wrong with it."""
    if suffix(part.path) == ".parquet":
        return _read_parquet(part)
    if suffix(part.path) == ".json":
        return _read_json(part)
    if suffix(part.path) in (".csv", ".tsv"):
        return _read_csv(part)
    return _read_jsonl(part, rules.skip_broken)


def _batched(rows: Iterator[str | BrokenRow], skip_broken: bool) -> Iterator[tuple[list[str], int]]:
    """Rows by about ``PART_BYTES`` of text, with the number of broken ones among them."""
    texts: list[str] = []
    size = broken = 0
    for row in rows:
        if isinstance(row, BrokenRow):
            if not skip_broken:
                raise _with_remedy(row)
            broken += 1
            continue
        texts.append(row)
        size += len(row)
        if size >= PART_BYTES:
            yield texts, broken
            texts, size, broken = [], 0, 0
    if texts or broken:
        yield texts, broken


def _with_remedy(row: BrokenRow) -> UserError:
    return UserError(f"{row} Correct it, or leave such rows out and count them: prepare_data.py --skip_broken")


def part_text(
    texts: Iterable[str],
    rules: Rules,
    split: str | None,
    held_out: Container[int] = (),
    document: int | None = None,
) -> PartText:
    """Documents with the split that each belongs to; empty ones and those held out are left out and counted.

    ``document`` is the hash of the one document that all of it is a part of.
    """
    pieces: list[Piece] = []
    hashes: list[int] = []
    empty = marks = left_out = 0
    for text in texts:
        if is_blank(text):
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
    if pattern.search(data, begin):  # the last line of the last document ends like those of the others
        size = _without_carriage_return(data, size - 1, rules) if data[size - 1 : size] == b"\n" else size
    # Sizes count the line ends between parts too: the length of the chunks, and so the order of training, follows from
    # them, and must not change for text whose tokens do not.
    counted = begin
    while begin < size:
        # One byte early: a separator's own "\n" may be the last byte of the target.
        target = begin + PART_BYTES - 1
        match = pattern.search(data, target) if target + 1 < size else None
        end = match.end() if match else size
        end_counted = end if end < size else len(data)
        if end - begin > LONG_DOCUMENT_BYTES and may_cut:
            long_begin, long_counted = begin, counted
            for before in pattern.finditer(data, max(begin - 1, 0)):  # a separator may follow another one
                if before.start() >= target:
                    break
                long_begin, long_counted = _after_line_end(data, before.end()), before.end()
            if long_begin > begin:
                yield Part(path, begin, long_begin, size=long_counted - counted, split=split)
                counted = long_counted
            long_end = match.start() if match else size
            place = long_begin, _without_carriage_return(data, long_end, rules) if match else size
            yield from _long_document(path, data, place, (counted, long_end + end_counted - end), rules, split)
        else:
            yield Part(path, begin, end, size=end_counted - counted, split=split)
        begin, counted = _after_line_end(data, end), end_counted


def _after_line_end(data: mmap.mmap, at: int) -> int:
    """Where the next line begins, behind a separator."""
    return at + (data[at : at + 1] == b"\n")


def _long_document(
    path: Path, data: mmap.mmap, place: tuple[int, int], counted: tuple[int, int], rules: Rules, split: str | None
) -> Iterator[Part]:
    """Parts of a single document; its split is settled here, since none of them holds all of it.

    ``counted`` is what its size counts: with the line ends around it.
    """
    begin, end = place
    first = re.compile(rb"\S").search(data, begin, end)
    if first is None:  # white space alone
        yield Part(path, begin, end, size=counted[1] - counted[0], split=split)
        return
    sections: list[tuple[int, int, int, str | None]] = [(begin, end, counted[1], split)]
    head = data[first.start() : min(first.start() + 8 * HASHED_BYTES, end)]
    document = document_hash(head.decode("utf-8", errors="ignore"))
    if split is None and rules.val_fraction is not None:
        if rules.cut:
            wanted = begin + round((end - begin) * (1 - rules.val_fraction))
            near = wanted + round((end - begin) * rules.val_fraction / 2)
            middle = _cut_place(data, wanted, near, rules, b"\n")
            middle = middle if middle < near else _cut_place(data, wanted, end, rules)
            # The line end or blank at which it is cut is in neither of the two.
            after_line = data[middle - 1 : middle] == b"\n"
            train_end = _without_carriage_return(data, middle - 1, rules) if after_line and middle < end else middle
            val_begin = middle + (not after_line)
            sections = [(begin, train_end, middle, "train"), (val_begin, end, counted[1], "val")]
        else:
            sections = [(begin, end, counted[1], split_of_hash(document, rules.val_fraction))]
    count = counted[0]
    for section_begin, section_end, section_counted, section_split in sections:
        start = section_begin
        while start < section_end:
            stop = section_end
            if start + PART_BYTES < section_end:
                stop = _cut_place(data, start + PART_BYTES, section_end, rules)
            yield Part(
                path,
                start,
                stop,
                size=(section_counted if stop == section_end else stop) - count,
                split=section_split,
                opens=start == section_begin,
                closes=stop == section_end,
                document=document,
            )
            start, count = stop, section_counted if stop == section_end else stop


def _without_carriage_return(data: mmap.mmap, end: int, rules: Rules) -> int:
    """The end of a line without its line end, where that may be of two characters."""
    return end - (not rules.written and data[max(end - 1, 0) : end] == b"\r")


def _cut_place(data: mmap.mmap, start: int, end: int, rules: Rules, blanks: bytes = b" \n") -> int:
    """The next place where a byte-level pre-tokenizer divides in any case, or ``end``.

    That is after a lone line end between two visible characters, or before a lone space between two letters; in longer
    runs of white space it depends on what follows.
    """
    for match in re.compile(b"[" + blanks + b"]").finditer(data, start, end - 1):
        at = match.start()
        before_bytes = data[max(0, at - 5) : _without_carriage_return(data, at, rules)]
        before = before_bytes.decode("utf-8", errors="ignore")[-1:]
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
    text = text if rules.written else _with_newlines(text)
    if not (part.opens and part.closes):  # of a single document, so no separator is in here
        yield text
        return
    documents = list(_divided(text, rules.separator))
    # Nothing comes before a leading separator or after a trailing one: no document, not an empty one.
    while len(documents) > 1 and is_blank(documents[-1]):
        documents.pop()
    while len(documents) > 1 and is_blank(documents[0]):
        documents.pop(0)
    yield from documents


def _read_text_stream(part: Part, rules: Rules) -> Iterator[str | BrokenRow]:
    """The documents of a text file that is read as a stream: the same that ``_read_txt`` gives."""
    is_separator = re.compile(_separator_pattern(rules.separator)).fullmatch
    lines: list[str] = []
    is_first = True
    with open_text(part.path, newline=None) as file:
        for number, line in enumerate(file, 1):
            check_utf8(line, part.path, f"line {number}")
            if not is_separator(line.removesuffix("\n")):
                lines.append(line)
                continue
            document = "".join(lines).removesuffix("\n")
            if not (is_first and is_blank(document)):
                yield document
            lines, is_first = [], False
    document = "".join(lines)
    if is_first:
        yield document
    elif not is_blank(document):
        yield document.removesuffix("\n")


def _decode(path: Location, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {at} ({_place(path, at)}) cannot be read. "
            + conversion_advice(path, data if is_remote(path) else _beginning(path, at))
        ) from None


def _beginning(path: Location, offset: int) -> bytes:
    """A file up to some way behind a place, as far as that is quickly read: what its encoding is guessed from."""
    with open_file(path) as file:
        return file.read(min(offset + (1 << 20), 1 << 26))


def _place(path: Location, offset: int) -> str:
    """The line; of a file on the Hub the byte, as counting lines would fetch all that comes before."""
    if is_remote(path):
        return f"byte {offset:,}"
    number = 1
    with open_file(path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return f"line {number}"


# --- rows: .jsonl, .json, .csv, .tsv ---


def _jsonl_parts(path: Location, rules: Rules, split: str | None) -> Iterator[Part]:
    size = _size(path)
    column = rules.text_column
    if column is None:
        for offset, line in _lines(Part(path, 0, size), first=1 << 16):
            try:
                if line.strip():
                    column = _text_column(path, _json_row(_decoded_row(line, path)))
                    break
            except BrokenRow as error:
                if not rules.skip_broken:
                    raise _with_remedy(_broken_row(path, _place(path, offset), error)) from None
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
                    yield offset, line
                skip = False
                offset += len(line) + 1
            if not more:
                return
            step = 2 * step if not lines else first or 1 << 16


def _read_jsonl(part: Part, skip_broken: bool) -> Iterator[str | BrokenRow]:
    if part.streamed:
        yield from _read_json_lines(part)
        return
    for offset, line in _lines(part):
        if line.strip():
            try:
                yield _text_of(_json_row(_decoded_row(line, part.path)), part.column)
            except BrokenRow as error:
                # To count lines takes time, so not for each row that is left out.
                yield error if skip_broken else _broken_row(part.path, _place(part.path, offset), error)


def _read_json_lines(part: Part) -> Iterator[str | BrokenRow]:
    column = part.column
    with open_text(part.path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    row = _json_row(_decoded_row(line, part.path))
                    column = column or _text_column(part.path, row)
                    yield _text_of(row, column)
            except BrokenRow as error:
                yield _broken_row(part.path, f"line {number}", error)


def _read_json(part: Part) -> Iterator[str | BrokenRow]:
    """The rows of a .json: a list of objects, an object on each line, or one object."""
    with open_text(part.path) as file:
        beginning = list(islice(file, 20))
        if _are_json_lines(beginning):
            yield from _read_json_lines(part)
            return
        text = "".join(beginning) + file.read()
    column = part.column
    rows = json_list(part.path, text, _ANY_LENGTH) if text.lstrip().startswith("[") else _json_object(part.path, text)
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise BrokenRow(f"{row}.")
            row = _checked_row(row)
            column = column or _text_column(part.path, row)
            yield _text_of(row, column)
        except BrokenRow as error:
            yield _broken_row(part.path, place, error)


_ANY_LENGTH = json.JSONDecoder(parse_int=float)  # int() takes no more than 4,300 digits


def _are_json_lines(lines: list[str]) -> bool:
    """Whether each line holds an object, by the first lines of a file; some of them may be broken."""
    lines = [line for line in lines if line.strip()]
    if not lines or lines[0].lstrip().startswith("["):
        return False
    return 2 * sum(map(_is_json_object, lines)) >= len(lines)


def _is_json_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # an object all the same, with a number or a nesting that can't be read
        return True
    return True


def _json_object(path: Location, text: str) -> Iterator[tuple[str, Any]]:
    """The only row of a file that holds one object, over several lines."""
    check_utf8(text, path, "it")
    try:
        yield "row 1", _ANY_LENGTH.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(_not_a_json_list(path, error)) from None
    except RecursionError as error:
        raise UserError(f"{path}: {json_problem(error)}.") from None


def _not_a_json_list(path: Location, error: json.JSONDecodeError) -> str:
    return (
        f"{path}, line {error.lineno}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); expected a"
        " list of objects, or one object on each line."
    )


_DEFAULT_DECODER = json.JSONDecoder()


def json_list(path: Location, text: str, decoder: json.JSONDecoder = _DEFAULT_DECODER) -> Iterator[tuple[str, Any]]:
    """Yields the elements of a JSON list, each with its place, so that one which can't be read is an error of its row.

    Args:
        path: of the file, for messages.
        text: all of it, from ``open_text`` or decoded in the same way.
        decoder: reads the elements.

    Raises:
        UserError: it is not JSON, so it is unknown where the next element begins.
    """

    def after_blanks(index: int) -> int:
        while text[index : index + 1] in (" ", "\t", "\r", "\n"):
            index += 1
        return index

    at = after_blanks(text.index("[") + 1)
    number = 0
    try:
        while text[at : at + 1] != "]":
            number += 1
            row, end = _element(text, at, decoder)
            yield f"row {number}", row
            at = after_blanks(end)
            if text[at : at + 1] == ",":
                at = after_blanks(at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except json.JSONDecodeError as error:
        raise UserError(_not_a_json_list(path, error)) from None


def _element(text: str, start: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    """A value, or the ``ValueError`` why it can't be read, and where it ends.

    Raises:
        json.JSONDecodeError: it is not JSON, so it has no end.
    """
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        return ValueError(json_problem(error)), _end_of_value(text, start)
    try:
        check_decoded(text[start:end])
    except ValueError as error:
        return error, end
    return value, end


def _end_of_value(text: str, start: int) -> int:
    """Where an object or a list ends, by its brackets alone."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]').finditer(text, start):
        depth += (match[0] in ("[", "{")) - (match[0] in ("]", "}"))
        if depth <= 0:
            return match.end() if depth == 0 else match.start()  # below 0: a number, and the list around it ends
    return len(text)


def json_problem(error: Exception) -> str:
    """Why JSON without a mistake in it can't be read."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply; expected an object with texts in it"
    reason = str(error).partition(";")[0]  # what follows is advice to programmers
    return f"a number that can't be read ({reason})"


def check_decoded(text: str) -> None:
    """Raises ``ValueError`` for text decoded with ``surrogateescape`` that holds a byte which is not UTF-8."""
    if found := UNDECODED.search(text):
        raise ValueError(not_utf8(ord(found[0]) - 0xDC00))


def not_utf8(byte: int, place: str = "") -> str:
    """What is wrong with a row that is not UTF-8, and how its file is converted."""
    return (
        f"byte 0x{byte:02x}{place} is not UTF-8; save the file as UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` "
        "where it comes from an older Windows program)"
    )


def _read_csv(part: Part) -> Iterator[str | BrokenRow]:
    """The rows of a .csv or .tsv, whose first line names the columns."""
    csv.field_size_limit(MAX_FIELD)
    with open_text(part.path) as file:
        lines = csv.reader(file, delimiter="\t" if suffix(part.path) == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            number = lines.line_num + 1
            try:
                if (row := next(lines, None)) is None:
                    return
                if header is None:
                    header = row
                    check_utf8(",".join(header), part.path, "line 1")
                    at = _csv_column(part, header)
                elif row:  # not an empty line
                    yield _csv_text(part, row, header, at)
            except csv.Error as error:
                if header is None or "end of data" in str(error):
                    raise UserError(
                        f"{part.path}, line {number}: a quote that opens here is never closed ({error}), so all the"
                        " rest would be one field; close it, or double the quotes that belong to the text."
                    ) from None
                reason = BrokenRow(f"not a row of a {suffix(part.path)} ({error}).")
                yield _broken_row(part.path, f"line {number}", reason)
            except BrokenRow as error:
                yield _broken_row(part.path, f"line {number}", error)


MAX_FIELD = 2**31 - 1  # characters: Python's own limit for a field of a .csv is 131,072


def _csv_column(part: Part, header: list[str]) -> int:
    """Which column of a .csv holds the text. The only one is not taken unasked: the first line may be text already."""
    column = part.column or "text"
    if header.count(column) != 1:
        raise UserError(
            f"{part.path}: its first line must name the columns, and it has {header.count(column) or 'none'} called"
            f" {column!r} but {_names(header)}; say which one holds the text with --text_column NAME, or put a first"
            " line with names there."
        )
    return header.index(column)


def _csv_text(part: Part, row: list[str], header: list[str], at: int) -> str:
    if len(row) != len(header):
        raise BrokenRow(f"{len(row)} fields where the first line names {len(header)}.")
    _decoded_row(row[at], part.path)
    return row[at]


# --- one row ---


def _broken_row(path: Location, place: str, error: BrokenRow) -> BrokenRow:
    return BrokenRow(f"{path}, {place}: {error}")


def _decoded_row(row: bytes | str, path: Location) -> str:
    """A row as text; a ``str`` comes from ``open_text``.

    Raises:
        BrokenRow: it is not UTF-8.
    """
    try:
        data = row if isinstance(row, bytes) else row.encode("utf-8", "surrogateescape")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenRow(
            f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} of it. {conversion_advice(path, data)}"
        ) from None


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix("\ufeff"))  # files that were joined have their marks in the middle
    except json.JSONDecodeError as error:
        raise BrokenRow(
            f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); expected one object a line, such as"
            ' {"text": "Once upon a time"}.'
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise BrokenRow(f"cannot be read as JSON ({str(error).partition(';')[0]}).") from None
    return _checked_row(row)


def _checked_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BrokenRow(f'{type(row).__name__} where an object was expected, such as {{"text": "Once upon a time"}}.')
    return row


def _text_of(row: dict[str, Any], column: str | None) -> str:
    if column not in row:
        raise BrokenRow(
            f"no field {column!r} (it has {_names(row)}); --text_column names the field that holds the text."
        )
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BrokenRow(
            f"{type(value).__name__} where text was expected, in {column!r}; --text_column names the right field."
        )
    return writable(value)


def _text_column(path: Location, row: dict[str, Any]) -> str:
    """The field that holds the text: ``text`` where there is one, else the only one that holds a string."""
    types = {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in row.items()}
    if row.get("text", 0) is None:  # null is an empty text
        return "text"
    return _column_of(path, types)


def _column_of(path: Location, types: dict[str, str]) -> str:
    """The same, from the type of each field; text is ``string``.

    Raises:
        BrokenRow: the field ``text`` is not a string.
        UserError: it is not clear which field holds the text.
    """
    strings = [name for name, kind in types.items() if kind == "string"]
    if "text" in strings or (len(strings) == 1 and "text" not in types):
        return "text" if "text" in strings else strings[0]
    remedy = "--text_column NAME says which one holds the text."
    if "text" in types:
        others = f" {_names(strings)} would be text: {remedy}" if strings else ""
        raise BrokenRow(f"its field 'text' holds {types['text']}, expected a string.{others}")
    if strings:
        raise UserError(
            f"{path}: none of its fields is called 'text', and {len(strings)} hold text: {_names(strings)}. {remedy}"
        )
    shown = [f"{name!r} holds {kind}" for name, kind in list(types.items())[:10]]
    raise UserError(
        f"{path}: none of its fields holds text ({', '.join(shown) or 'it has none'}); expected a field of strings,"
        " called 'text' or named by --text_column."
    )


def _names(fields: Collection[str]) -> str:
    """The names of fields, no more than ten."""
    more = f" and {len(fields) - 10} more" if len(fields) > 10 else ""
    return ", ".join(map(repr, islice(fields, 10))) + more if fields else "none"


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

    def type_name(kind: Any) -> str:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        return "string" if any(is_kind(kind) for is_kind in kinds) else str(kind)

    types = {field.name: type_name(field.type) for field in schema}
    try:
        column = rules.text_column or _column_of(path, types)
    except BrokenRow as error:
        raise UserError(f"{path}: {error}") from None
    if types.get(column) != "string":
        texts = [name for name, kind in types.items() if kind == "string"]
        what = f"the column {column!r} holds {types[column]}" if column in types else f"no column {column!r}"
        raise UserError(f"{path}: {what}; its columns with text: {_names(texts)} (--text_column).")
    index = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).column(index).total_uncompressed_size
        yield Part(path, group, group + 1, column=column, size=size, split=split, articles=articles)


def _read_parquet(part: Part) -> Iterator[str | BrokenRow]:
    rows = _parquet_rows(part.path, part.column, part.start, part.stop)
    return rows if part.articles is None else _articles(part, rows)


def _parquet_rows(
    path: Location, column: str | None, start: int = 0, stop: int | None = None
) -> Generator[str | BrokenRow]:
    """The rows of row groups ``start`` to ``stop``."""
    import pyarrow

    try:
        with _open_parquet(path) as file:
            metadata = file.metadata
            groups = list(range(start, metadata.num_row_groups if stop is None else stop))
            number = sum(metadata.row_group(group).num_rows for group in range(start))
            for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=[column]):
                for value in _strings(batch.column(0)):
                    number += 1
                    if isinstance(value, BrokenRow):
                        yield _broken_row(path, f"row {number:,}", value)
                    else:
                        yield value or ""
    except (pyarrow.ArrowException, OSError) as error:
        if not isinstance(error, pyarrow.ArrowException) and (is_remote(path) or error.errno is not None):
            raise
        raise _broken(path, error) from None


def _strings(column: Any) -> list[str | BrokenRow | None]:
    """The values of a column of text; what is not UTF-8, which parquet does not check, comes as what is wrong."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_string(value) for value in column]


def _string(value: Any) -> str | BrokenRow | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return BrokenRow(f"a text that is not UTF-8: byte 0x{byte:02x} at offset {error.start} of it.")


def _articles(part: Part, rows: Iterator[str | BrokenRow]) -> Iterator[str | BrokenRow]:
    """The articles whose heading is in the part; its last one is read on to where the next one begins."""
    article: list[str] | None = [] if part.opens else None  # None: the part before reads these rows
    for row in rows:
        if isinstance(row, BrokenRow):
            yield row
            continue
        if HEADING.fullmatch(row):
            if article:
                yield "".join(article).strip()
            article = []
        if article is not None:
            article.append(row or "\n")
    if article is None:
        return
    following = chain.from_iterable(_parquet_rows(path, part.column) for path in part.articles or ())
    with closing(_parquet_rows(part.path, part.column, part.stop)) as rest:
        for row in chain(rest, following):
            if isinstance(row, BrokenRow):  # the part that it is in has it
                continue
            if HEADING.fullmatch(row):
                break
            article.append(row or "\n")
    yield "".join(article).strip()


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
