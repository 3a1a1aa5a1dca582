"""Turn files into documents: find the text, divide it, choose the split, and drop duplicates of validation documents.

The text of a document is kept exactly, including white space at its ends. These rules apply:

- .txt, .md and files of --extensions: a line ``<|endoftext|>`` separates two documents. The line end before the
  separator and its own line end belong to the separator. A file without a separator is one document. Line ends become
  ``\\n``.
- .jsonl, .json, .csv, .tsv, .parquet and .arrow: a row is a document with its line ends unchanged. A line
  ``<|endoftext|>`` inside a row also separates documents.
- WikiText stores articles as rows of single lines; an article is one document.
- Documents that are empty or only white space are left out and counted.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

from litmoe.cli import UserError
from litmoe.data.files import (
    DELIMITERS,
    TEXT_SUFFIXES,
    BadRow,
    Location,
    first_bad_line,
    first_names,
    open_text,
    read_rows,
    read_schema,
    suffix,
    undecoded,
)
from litmoe.data.manifest import SPLITS

END_OF_TEXT = "<|endoftext|>"
# Characters in a batch, which one thread encodes in one call.
BATCH_CHARACTERS = 1 << 20
# The beginning of a document decides its split. 64 KiB are enough to tell documents apart.
HASHED_BYTES = 1 << 16
# Types of pyarrow.
PARQUET_TEXTS = ("string", "large_string", "string_view")
# Fields of rows that are no documents.
CONVERSATION_FIELDS = ("messages", "conversations", "conversation", "instruction", "prompt", "question", "chosen")
# WikiText: ` = Title = ` begins an article, ` = = Section = = ` does not.
ARTICLE_HEADING = re.compile(r" = (?!= )(?:.*[^=] )?= \s*")


@dataclass(frozen=True)
class Rules:
    """How files become documents."""

    separator: str | None = None
    """A line of a text file that separates documents, in addition to ``<|endoftext|>``."""
    text_column: str | None = None
    """Field or column with the text; None finds it."""
    val_fraction: float = 0.0
    """Share of the documents of a unit without a split that become validation text."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, and count them."""
    drop_duplicates: bool = False
    """Leave training documents out that also occur in the validation text, for units with a split. Copies of a document
    need no check in units without one, because its hash decides their split."""
    articles: bool = False
    """Rows are lines of WikiText articles."""
    as_text: bool = False
    """Every file is text, whatever the ending of its name."""
    cut: bool = False
    """Split each document instead of the corpus: its end becomes validation text."""


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is processed completely or not at all: some files, or some row groups of one file."""

    number: int
    split: str | None
    """None: the hash of each document decides."""
    files: tuple[Location, ...]
    size: int
    """Stored bytes, for the progress display."""
    row_groups: range | None = None
    generate: Callable[[], Iterator[str]] | None = None
    """Source of generated documents, in place of files."""


@dataclass
class Counts:
    """What was read from a unit."""

    read: int = 0
    """Documents, before any of them was cut in two."""
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty_documents: int = 0
    dropped_duplicates: int = 0
    broken_rows: int = 0
    eot_in_text: int = 0
    """``<|endoftext|>`` inside a line, which is ordinary text."""
    hashes: list[int] = field(default_factory=list)
    """``document_hash`` of each validation document, if duplicates of them are dropped."""

    def add(self, other: "Counts") -> None:
        """Add the counts of another unit."""
        for split in SPLITS:
            self.documents[split] += other.documents[split]
            self.bytes[split] += other.bytes[split]
        self.empty_documents += other.empty_documents
        self.dropped_duplicates += other.dropped_duplicates
        self.broken_rows += other.broken_rows
        self.eot_in_text += other.eot_in_text


class Batch(NamedTuple):
    """Consecutive documents of one split."""

    unit: Unit
    split: str
    texts: list[str]


class UnitEnd(NamedTuple):
    """Follows the last batch of a unit."""

    unit: Unit
    counts: Counts


# --- from a unit to batches ---


def read_unit(unit: Unit, rules: Rules, val_hashes: set[int], limit: float | None = None) -> Iterator[Batch | UnitEnd]:
    """Yield the documents of a unit in batches, then its counts.

    Args:
        unit: what to read.
        rules: how its files become documents.
        val_hashes: hashes of all validation documents so far; validation units add to it, training units drop these.
        limit: read at most this many documents.

    Raises:
        UserError: the text cannot be read.
    """
    counts = Counts()
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for text in _texts(unit, rules, counts):
        for split, document in _documents_of(text, unit.split, rules, counts, val_hashes):
            counts.documents[split] += 1
            counts.bytes[split] += len(document.encode())
            counts.eot_in_text += document.count(END_OF_TEXT)
            texts[split].append(document)
            sizes[split] += len(document)
            if sizes[split] >= BATCH_CHARACTERS:
                yield Batch(unit, split, texts[split])
                texts[split], sizes[split] = [], 0
        # Checked after the document, so that nothing after the last one is read.
        if counts.read == limit:
            break
    # The rest is no full batch, but the unit ends here.
    yield from (Batch(unit, split, rest) for split, rest in texts.items() if rest)
    yield UnitEnd(unit, counts)


def _documents_of(
    text: str, split: str | None, rules: Rules, counts: Counts, val_hashes: set[int]
) -> list[tuple[str, str]]:
    """Return the documents that a text becomes, each with its split: none if it is left out, two if it is cut."""
    # A blank document would be an end-of-text token after another one.
    if is_blank(text):
        counts.empty_documents += 1
        return []
    if rules.drop_duplicates:
        identity = document_hash(text)
        if split == "val":
            val_hashes.add(identity)
            # Kept in the unit's record: a restarted call gets them without reading the unit again.
            counts.hashes.append(identity)
        elif identity in val_hashes:
            counts.dropped_duplicates += 1
            return []
    # Documents that are left out do not count towards --max_documents.
    counts.read += 1
    if rules.cut:
        head, tail = cut_document(text, rules.val_fraction)
        return [("train", head), ("val", tail)] if tail else [("train", head)]
    return [(split or split_of(text, rules.val_fraction), text)]


# --- from files to texts ---


def _texts(unit: Unit, rules: Rules, counts: Counts) -> Iterator[str]:
    """Yield the text of each document of a unit."""
    if unit.generate is not None:
        yield from unit.generate()
    elif rules.articles:
        rows = (_row_texts(file, unit.row_groups, rules, counts) for file in unit.files)
        yield from _articles(chain.from_iterable(rows))
    else:
        for file in unit.files:
            if rules.as_text or suffix(file) in TEXT_SUFFIXES:
                yield from _text_file_documents(file, rules)
            else:
                for text in _row_texts(file, unit.row_groups, rules, counts):
                    yield from documents_of_row(text)


def _text_file_documents(location: Location, rules: Rules) -> Iterator[str]:
    # newline=None turns all line ends into "\n".
    with open_text(location, newline=None) as file:
        for document in _divided(file, rules.separator):
            # Checked per document instead of per line, because there are many more lines.
            if undecoded(document):
                raise UserError(first_bad_line(location))
            yield document


def _divided(lines: Iterable[str], separator: str | None) -> Iterator[str]:
    """Join lines to documents. White space after the last separator is no document."""
    separators = [END_OF_TEXT]
    if separator is not None:
        separators.append(separator.rstrip(" \t"))
    document: list[str] = []
    # The line end before a separator belongs to the separator. A file without one is kept exactly.
    line_end = ""
    for line in lines:
        # White space after a separator is invisible in an editor, so it is ignored.
        if line.rstrip(" \t\n") in separators:
            line_end = "\n"
            yield "".join(document).removesuffix(line_end)
            document = []
        else:
            document.append(line)
    rest = "".join(document)
    if not is_blank(rest):
        yield rest.removesuffix(line_end)


def documents_of_row(text: str) -> list[str]:
    """Divide the text of a row at lines ``<|endoftext|>``. The documents are kept exactly."""
    # Nearly all rows take this way.
    if END_OF_TEXT not in text:
        return [text]
    # The lookbehind finds a separator directly after another one, which has consumed the line end between them.
    return re.split(rf"(?:\A|\r?\n|(?<=\n)){re.escape(END_OF_TEXT)}[ \t]*(?:\r?\n|\Z)", text)


def _articles(rows: Iterator[str]) -> Iterator[str]:
    """Join the lines of WikiText to articles. An article may continue in the next file."""
    article: list[str] = []
    for row in rows:
        if article and ARTICLE_HEADING.fullmatch(row):
            yield "".join(article).strip()
            article = []
        # WikiText stores a blank line as an empty row.
        article.append(row or "\n")
    yield "".join(article).strip()


# --- rows ---


def _row_texts(location: Location, row_groups: range | None, rules: Rules, counts: Counts) -> Iterator[str]:
    """Yield the text of each row; broken rows are counted or raised."""
    column = _text_column(location, rules.text_column)
    # Of a .parquet on the Hub, only the bytes of this column are downloaded.
    for place, row in read_rows(location, columns=[column], row_groups=row_groups):
        try:
            yield _text_of(row, column)
        except BadRow as problem:
            if not rules.skip_broken:
                raise UserError(
                    f"{location}, {place}: {problem}. Correct it, or leave out such rows and count them with "
                    "--skip_broken."
                ) from None
            counts.broken_rows += 1


def _text_of(row: Any, column: str) -> str:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f'{type(row).__name__} where an object was expected, such as {{"text": "Once ..."}}')
    if column not in row:
        raise BadRow(f"no field {column!r} (it has {_names(row)}); --text_column names the field with the text")
    value = row[column]
    # A null becomes an empty document, which is left out and counted.
    if not isinstance(value, str | None):
        raise BadRow(f"{type(value).__name__} where text was expected, in {column!r}; use --text_column")
    return writable(value or "")


def _text_column(location: Location, wanted: str | None) -> str:
    """Return the field that holds the text: the wanted one, or else ``text`` or the only one with text."""
    if suffix(location) in (".parquet", ".arrow"):
        return _schema_text_column(location, wanted)
    # The only column of a .csv is not taken as the text: its first line may be text instead of names.
    if wanted is not None or suffix(location) in DELIMITERS:
        return wanted or "text"
    # The first object of a .jsonl or .json decides.
    for _, row in read_rows(location):
        if isinstance(row, dict):
            return _text_field(location, row, [name for name, value in row.items() if isinstance(value, str)])
    return "text"


def _schema_text_column(location: Location, wanted: str | None) -> str:
    """Return the column of a .parquet or .arrow file that holds the text.

    Raises:
        UserError: there is no such column, or it does not hold text.
    """
    types = {column.name: column.type for column in read_schema(location)}
    texts = [name for name, kind in types.items() if _is_text(kind)]
    column = wanted or _text_field(location, types, texts)
    if column in texts:
        return column
    problem = f"no column {column!r}"
    if column in types:
        problem = f"the column {column!r} holds {types[column]}, expected a string"
    raise UserError(f"{location}: {problem}; its columns with text: {_names(texts)} (--text_column).")


def _is_text(kind: Any) -> bool:
    from pyarrow.types import is_dictionary

    # A dictionary stores repeated texts once.
    return str(kind.value_type if is_dictionary(kind) else kind) in PARQUET_TEXTS


def _text_field(location: Location, fields: Collection[str], texts: list[str]) -> str:
    """Return ``text`` if there is such a field, or else the only one of ``texts``, the fields that hold text.

    Raises:
        UserError: it is not clear which field holds the text.
    """
    if "text" in fields:
        return "text"
    if len(texts) == 1:
        return texts[0]
    hint = " Conversations and instructions are prepared with --instruct instead of --source."
    raise UserError(
        f"{location}: expected a field 'text', or one field with text; found {len(texts)} with text ({_names(texts)}) "
        f"among {_names(fields)}. --text_column NAME selects one."
        + (hint if set(CONVERSATION_FIELDS).intersection(fields) else "")
    )


def _names(fields: Iterable[str]) -> str:
    return first_names([repr(name) for name in fields], limit=10) or "none"


# --- one document ---


def is_blank(text: str) -> bool:
    """Return whether a text is empty or only white space."""
    return not text or text.isspace()


def writable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can write and UTF-8 cannot, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean(text: str) -> str:
    """Return a text with ``\\n`` line ends and without white space at its ends, to compare documents."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def document_hash(text: str) -> int:
    """Return 64 bits that identify a document; line ends and white space at the ends do not count."""
    # Cut twice: first cheaply in characters, then exactly in bytes.
    # 64 bits: among 10 million documents, the chance of any two with the same hash is 1 in 370,000. Python's own hash()
    # differs between processes.
    beginning = clean(text)[:HASHED_BYTES].encode()[:HASHED_BYTES]
    return int.from_bytes(blake2b(beginning, digest_size=8).digest(), "big")


def split_of(text: str, val_fraction: float) -> str:
    """Return ``train`` or ``val`` by the text alone: the same document is always in the same split."""
    return "val" if document_hash(text) < val_fraction * 2**64 else "train"


def cut_document(text: str, val_fraction: float) -> tuple[str, str]:
    """Cut the end off a document, where a line, a sentence or a word ends.

    Args:
        text: the document.
        val_fraction: share of the end, between 0 and 1.

    Returns:
        The beginning and the end, without the line end or space between them. The end is empty if there is no place.
    """
    middle = round(len(text) * (1 - val_fraction))
    # So the end has between half and one and a half times its share.
    reach = round(len(text) * val_fraction / 2)
    for blank in ("\n", ". ", " "):
        # The nearest place after or before the middle, near enough to keep the share. -1, for none, is farther away.
        places = text.find(blank, middle, middle + reach), text.rfind(blank, middle - reach, middle)
        at = min(places, key=lambda place: abs(place - middle))
        if at < 0:
            continue
        head, tail = text[:at] + blank.rstrip(), text[at + len(blank) :]
        if blank == "\n":
            head = head.removesuffix("\r")
        # Each part becomes a document, so none of them may be blank.
        if not (is_blank(head) or is_blank(tail)):
            return head, tail
    return text, ""
