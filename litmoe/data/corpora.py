"""Find the text of a corpus: built in, on the Hugging Face Hub, the user's own files, or in place in the data folder.

A new corpus is one entry in ``CORPORA``. ``open_local``, ``open_hub`` and ``open_text`` return a ``Corpus``: the files
that were found, and how they are read.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import count
from math import inf
from pathlib import Path
from typing import NamedTuple

from litmoe.cli import UserError, nearest, quoted
from litmoe.data import manifest
from litmoe.data.documents import Rules, Unit
from litmoe.data.files import (
    COMPRESSED_TO_TEXT,
    READABLE,
    Location,
    code_files,
    connection_errors,
    first_names,
    is_compressed,
    is_readable,
    is_text,
    kinds,
    open_parquet,
    suffix,
    text_files,
    unread_files,
    visible_files,
)
from litmoe.data.hub import HUB_NAME, Dataset
from litmoe.data.manifest import FILES, TEXT, FileRecord, Settings
from litmoe.data.stories import SAMPLE_BYTES, stories_until

DEFAULT_VAL_FRACTION = 0.1
# Small files, and small row groups of a large .parquet, are joined to units of about this size.
UNIT_BYTES = 16 << 20
VALIDATION_FOLDERS = ("val", "validation", "valid", "dev")
# The names that the datasets library uses.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(VALIDATION_FOLDERS, "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# The word must stand alone, possibly with set, data or split after it: testset and c4-train, but not contest or
# trained.
SPLIT_NAME = re.compile(rf"(?:.*[^a-z])?({'|'.join(SPLIT_NAMES)})(?:set|data|split)?(?:[^a-z].*)?", re.I)


# --- the corpora with a name ---


@dataclass(frozen=True)
class Stories:
    """The built-in corpus, generated from a seed."""

    about: str


@dataclass(frozen=True)
class HubDataset:
    """A corpus on the Hugging Face Hub."""

    about: str
    path: str
    """``owner/name`` on the Hub. The dataset needs a split called train, as .parquet or plain .jsonl files, or in a
    format that the Hub converts to parquet."""
    config: str | None = None
    column: str | None = None
    """The column with the text; None for ``text``, or the only column with text."""
    val_fraction: float = 0.01
    """Used if the dataset has no validation split of its own, and without ``--max_documents``."""
    articles: bool = False
    """The rows are lines of articles (WikiText)."""


CORPORA: dict[str, Stories | HubDataset] = {
    "sample": Stories("20 MB of short children's stories, generated without a network"),
    "tinystories": HubDataset("2.1 million short stories, 1.9 GB (Eldan & Li 2023)", "roneneldan/TinyStories"),
    "shakespeare": HubDataset("Shakespeare's plays, 1 MB", "karpathy/tiny_shakespeare"),
    "wikitext-103": HubDataset(
        "28,000 articles of Wikipedia, 0.5 GB", "Salesforce/wikitext", "wikitext-103-v1", articles=True
    ),
    "openwebtext": HubDataset(
        "8.0 million web pages, 9.0 B GPT-2 tokens, a reproduction of GPT-2's training text",
        "Skylion007/openwebtext",
        # The fraction that nanoGPT uses: 4.5 M tokens.
        val_fraction=0.0005,
    ),
    "fineweb-edu": HubDataset(
        "9.7 million educational web pages, 10 B GPT-2 tokens (28 GB of parquet)",
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        # 10 M tokens.
        val_fraction=0.001,
    ),
}
DEFAULT = "tinystories"


def find(source: str) -> Stories | HubDataset | Path:
    """Return the corpus with this name, or the path.

    Raises:
        UserError: there is no such corpus or path.
    """
    # A corpus comes before a file of the same name, which can be given as ./NAME.
    if source in CORPORA:
        return CORPORA[source]
    if source.startswith("hf:"):
        named = HUB_NAME.fullmatch(source)
        if not named:
            raise UserError(f"--source {source}: expected hf:ORG/NAME or hf:ORG/NAME:CONFIG.")
        return HubDataset("a dataset of the Hub", named["path"], named["config"])
    path = Path(source)
    if path.exists():
        return path
    likely = nearest(source, CORPORA)
    hint = f" Did you mean {likely}?" if likely else ""
    width = max(map(len, CORPORA))
    names = [f"  {name:{width}}  {corpus.about}" for name, corpus in CORPORA.items()]
    names.append("  hf:ORG/NAME[:CONFIG]  any dataset of the Hugging Face Hub with a column of text")
    raise UserError(
        f"--source {source}: no such file, folder or corpus.{hint} Known corpora:\n"
        + "\n".join(names)
        + f"\nor your own file ({READABLE}), or a folder of such files."
    )


def is_hub(source: str) -> bool:
    """Return whether a source is streamed from the Hub."""
    return source.startswith("hf:") or isinstance(CORPORA.get(source), HubDataset)


# --- an opened corpus ---


@dataclass(frozen=True)
class Corpus:
    """Text that was found: its files, and how they become documents."""

    name: str
    """Name of a corpus, ``FILES`` for ``--source PATH``, ``TEXT`` for text in place."""
    location: str
    """Name of the file or folder, or dataset and revision; empty for text in place."""
    files: Mapping[str, Sequence[Location]]
    """``train``, and ``val`` if the corpus has its own validation text."""
    records: dict[str, tuple[FileRecord, ...]]
    """The same files as the manifest stores them."""
    settings: Settings
    column: str | None = None
    """Field with the text, unless ``settings.text_column`` names one."""
    articles: bool = False
    revision: str | None = None
    """Given to ``open_hub``, finds the same files again."""
    generate: Callable[[], Iterator[str]] | None = None
    """Source of generated documents, in place of files."""
    notes: tuple[str, ...] = ()
    """Sentences about files that are left out, or become validation text by their name."""
    path_sha256: str | None = None
    """Of ``--source PATH``; see ``manifest.Source``."""

    @property
    def all_records(self) -> list[FileRecord]:
        """The files of both splits."""
        return [record for records in self.records.values() for record in records]

    @property
    def rules(self) -> Rules:
        """How the files become documents."""
        return Rules(
            separator=self.settings.document_separator,
            text_column=self.settings.text_column or self.column,
            val_fraction=self.settings.val_fraction or 0.0,
            skip_broken=self.settings.skip_broken,
            # Text that the user has put in place is tokenized unchanged. Without validation files the hash of a
            # document decides its split, so its copies are in the same one.
            drop_duplicates="val" in self.files and self.name != TEXT,
            articles=self.articles,
            as_text=bool(self.settings.extensions),
        )

    @property
    def training_bytes(self) -> int:
        """About the bytes of its training text, decompressed."""
        records = self.records["train"]
        return sum(record.bytes * (COMPRESSED_TO_TEXT if is_compressed(record.path) else 1) for record in records)

    def records_of(self, split: str) -> tuple[FileRecord, ...]:
        """Return the files that a split is made from. Without validation text, both splits come from train."""
        return self.records.get(split, self.records["train"])

    def unit_groups(self) -> list[Iterator[Unit]]:
        """Return the units of the validation files, if there are any, and those of the training files."""
        if self.generate is not None:
            return [iter([Unit(0, None, (), SAMPLE_BYTES, generate=self.generate)])]
        # One sequence for both splits, because the number is the file name of a finished unit.
        numbers = count()
        # Validation comes first: its documents are dropped from the training text.
        return [self._units(split, numbers) for split in ("val", "train") if split in self.files]

    def _units(self, split: str, numbers: Iterator[int]) -> Iterator[Unit]:
        """Yield the units of a split in the order of its files."""
        # Without validation files both splits come from the same units, by the hash of each document.
        unit_split = split if "val" in self.files else None
        for files, size in self._file_groups(split):
            # A compressed .parquet would be decompressed for each of its units.
            has_row_groups = suffix(files[0]) == ".parquet" and not is_compressed(files[0])
            if len(files) > 1 or not has_row_groups or self.articles:
                yield Unit(next(numbers), unit_split, files, size)
                continue
            # A .parquet is opened only when its first unit is asked for.
            for groups, share in _row_group_ranges(files[0]):
                yield Unit(next(numbers), unit_split, files, round(size * share), groups)

    def _file_groups(self, split: str) -> Iterator[tuple[tuple[Location, ...], int]]:
        """Yield the files that are read together, with their bytes: a large file alone, small ones joined.

        Many small files would be many small units, each with part files of its own.
        """
        # Articles continue across files.
        limit = inf if self.articles else UNIT_BYTES
        group: list[Location] = []
        group_size = 0
        for file, record in zip(self.files[split], self.records[split], strict=True):
            if group and group_size + record.bytes > limit:
                yield tuple(group), group_size
                group, group_size = [], 0
            group.append(file)
            group_size += record.bytes
        if group:
            yield tuple(group), group_size


def _row_group_ranges(location: Location) -> Iterator[tuple[range, float]]:
    """Yield ranges of row groups with ``UNIT_BYTES`` or more, and the share of the file that each of them is."""
    with connection_errors(location), open_parquet(location) as file:
        # Only the footer is read. Sizes are uncompressed, as the amount of work depends on the text.
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    # Avoids a division by zero for a file without rows.
    total = sum(sizes) or 1
    start = size = 0
    for group, group_size in enumerate(sizes):
        size += group_size
        if size >= UNIT_BYTES or group == len(sizes) - 1:
            yield range(start, group + 1), size / total
            start, size = group + 1, 0


def open_local(source: str, settings: Settings, known: Sequence[FileRecord] = ()) -> Corpus:
    """Open the built-in corpus or the user's own files.

    Args:
        source: a name in ``CORPORA``, or a path.
        settings: how the text is read.
        known: records of files; those that did not change are not read again for their checksum.

    Raises:
        UserError: there is no readable text.
    """
    entry = find(source)
    if isinstance(entry, Stories):
        generate = partial(stories_until, SAMPLE_BYTES)
        return Corpus(source, "generate_stories(seed=0)", {"train": []}, {"train": ()}, settings, generate=generate)
    assert isinstance(entry, Path), "Hub corpora are opened by open_hub"
    # Records hold paths relative to the source, so the source can be moved.
    base = entry.parent if entry.is_file() else entry
    # Only the name of the path is stored: token folders are shared.
    corpus = _open_files(FILES, entry.resolve().name, source_files(entry, settings.extensions), base, settings, known)
    return replace(corpus, path_sha256=path_sha256(entry))


def path_sha256(path: Path) -> str:
    """Return a fingerprint of a path, which tells two folders with one name apart."""
    return sha256(str(path.resolve()).encode()).hexdigest()


def open_hub(source: str, settings: Settings, revision: str | None = None) -> Corpus:
    """Open a Hub corpus.

    Args:
        source: a name in ``CORPORA``, or ``hf:ORG/NAME[:CONFIG]``.
        settings: how the text is read; ``text_column`` overrides the column of the entry.
        revision: ``Corpus.revision`` of an earlier call, to find the same files.

    Raises:
        UserError: without a network, or for a dataset that does not exist or cannot be read.
    """
    entry = find(source)
    assert isinstance(entry, HubDataset), "the caller has checked the kind of the source"
    hub_files = Dataset(entry.path, entry.config).find(revision)
    return Corpus(
        source,
        hub_files.location,
        hub_files.files,
        hub_files.records,
        # The fraction has no effect then. It is not recorded, so that another one does not build the tokens again.
        replace(settings, val_fraction=None) if "val" in hub_files.files else settings,
        entry.column,
        entry.articles,
        hub_files.revision,
    )


def open_text(data_dir: Path, settings: Settings, known: Sequence[FileRecord] = ()) -> Corpus:
    """Open the text in DATA_DIR/train and DATA_DIR/val; the arguments are those of ``open_local``.

    Raises:
        UserError: there is no training text.
    """
    train, val = text_files(data_dir / "train"), text_files(data_dir / "val")
    if not train:
        raise UserError(
            f"{data_dir / 'val'} contains text and {data_dir / 'train'} none; put the training text there, or name a "
            "--source."
        )
    # Files of other formats are named in a note. Their text would otherwise be missing without a message.
    unread = unread_files(data_dir / "train") + unread_files(data_dir / "val")
    return _open_files(TEXT, "", SourceFiles(train, val, unread=unread), data_dir, settings, known)


def _open_files(
    name: str, location: str, files: "SourceFiles", base: Path, settings: Settings, known: Sequence[FileRecord]
) -> Corpus:
    paths = {"train": files.train}
    if files.val:
        paths["val"] = files.val
        settings = replace(settings, val_fraction=None)
    records = {split: manifest.refresh(some, base, known) for split, some in paths.items()}
    return Corpus(name, location, paths, records, settings, notes=files.notes(base))


# --- the user's own files ---


class SourceFiles(NamedTuple):
    """The files of a user's folder, sorted by their names."""

    train: Sequence[Path]
    val: Sequence[Path] = ()
    test: Sequence[Path] = ()
    """Left out."""
    unnamed: Sequence[Path] = ()
    """Left out, since other files are named train."""
    unread: Sequence[Path] = ()
    """Files of formats that are not read."""
    undecodable: Sequence[Path] = ()
    """Left out: files with one of the endings of ``--extensions`` that are no text."""

    def notes(self, folder: Path) -> tuple[str, ...]:
        """Return a sentence for each group of files that is not training text."""
        groups = {
            "Validation text, by name": self.val,
            "Left out as test text, by name": self.test,
            "Left out, named neither train nor validation": self.unnamed,
            f"Not read: {_number(self.unread)} ({kinds(self.unread)})": self.unread,
            f"Left out, no UTF-8 text: {_number(self.undecodable)}": self.undecodable,
        }
        return tuple(f"{what}: {listed(folder, paths)}" for what, paths in groups.items() if paths)


def _number(paths: Sequence[Path]) -> str:
    return f"{len(paths):,} file{'s' if len(paths) > 1 else ''}"


def listed(folder: Path, paths: Sequence[Path]) -> str:
    """Return the first paths below ``folder`` for a message, and how many more there are."""
    return first_names([path.relative_to(folder).as_posix() for path in paths])


def split_name(name: str) -> str | None:
    """Return the split that the name of a folder, or of a file without its endings, says: train, val, test or None.

    The split is a word of the name in any letter case, as in ``train``, ``valid-0``, ``testset``, ``train_sft``,
    ``dev-v2.0``, ``TinyStories-train`` and ``c4-validation.00000-of-00008``.
    """
    match = SPLIT_NAME.fullmatch(name)
    return SPLIT_NAMES[match.group(1).lower()] if match else None


def split_of_path(path: Path) -> str | None:
    """Return the split that the outermost folder with such a name says, or else the name of the file."""
    # A compressed file has two endings.
    stem = Path(path.stem).stem if is_compressed(path) else path.stem
    return next(filter(None, map(split_name, (*path.parts[:-1], stem))), None)


def files_by_split(folder: Path, files: list[Path]) -> dict[str | None, list[Path]]:
    """Return the files below ``folder`` by the split that their names say: train, val, test and None."""
    by_split: dict[str | None, list[Path]] = {"train": [], "val": [], "test": [], None: []}
    for file, split in _split_names(folder, files).items():
        by_split[split].append(file)
    return by_split


def _split_names(folder: Path, files: list[Path]) -> dict[Path, str | None]:
    """Return the split that the name of each file below ``folder`` says (``split_of_path``).

    A folder that contains all files with such names, as ``train_data`` around train/ and test/, distinguishes none of
    them. It counts only if the names below it say nothing.
    """
    names = {file: split_of_path(file.relative_to(folder)) for file in files}
    named = [file for file in files if names[file]]
    # Several names distinguish the files already.
    if len({names[file] for file in named}) != 1:
        return names
    shared = Path(os.path.commonpath([file.parent for file in named]))
    below = {file: split_of_path(file.relative_to(shared)) for file in named}
    return names | below if any(below.values()) else names


def sort_files(folder: Path) -> SourceFiles:
    """Sort the files of a folder into splits by the names of folders and files (``split_name``).

    The names count if some file is named validation, if some are named train and others test, or if a folder is named
    test. Otherwise all files are training text: a file test.txt among others is text like them. Training files are
    those named train, or without any such name those that are named nothing.

    Raises:
        UserError: there is no training text.
    """
    files, unread = text_files(folder), unread_files(folder)
    if not files:
        content = kinds(unread) or "no files"
        raise UserError(
            f"--source {folder}: nothing there can be read (it has {content}); expected files of {READABLE}."
        )
    train, val, test, unnamed = files_by_split(folder, files).values()
    # A folder of test files alone is more likely a mistake than training text.
    if not train and not unnamed:
        raise UserError(
            f"--source {folder}: by their names all files are validation or test text, such as {files[0].name};"
            f" expected some named train. To train on one of them, name it: --source {quoted(files[0])}"
        )
    has_test_folder = any("test" in map(split_name, path.relative_to(folder).parts[:-1]) for path in test)
    if not (val or has_test_folder or (train and test)):
        return SourceFiles(files, unread=unread)
    if not train:
        train, unnamed = unnamed, []
    return SourceFiles(train, val, test, unnamed, unread)


def sort_code(folder: Path, extensions: Sequence[str]) -> SourceFiles:
    """Return the files of a folder of source code. Their names say nothing about splits: train.py is code.

    Raises:
        UserError: there is no text with one of the endings.
    """
    files = code_files(folder, extensions)
    taken = [path for path in files if is_text(path)]
    others = sorted({*visible_files(folder)} - {*files})
    if not taken:
        content = kinds(others) or "no other files"
        raise UserError(
            f"--source {folder}: no text file ends in {' or '.join(extensions)} there (it has {content}). Correct "
            "--extensions."
        )
    return SourceFiles(taken, unread=others, undecodable=sorted({*files} - {*taken}))


def source_files(path: Path, extensions: str | None = None) -> SourceFiles:
    """Return the user's files by split; with ``Settings.extensions`` the source code in a folder.

    Raises:
        UserError: there is no file to read.
    """
    if extensions is not None:
        return sort_code(path, extensions.split(","))
    if path.is_dir():
        return sort_files(path)
    if not is_readable(path):
        raise UserError(f"--source {path}: a {path.suffix or 'nameless'} file; expected {READABLE}.")
    return SourceFiles([path])
