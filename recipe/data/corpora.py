"""Where text comes from: corpora known by name, the user's own files, and the folder that it is written into.

A new corpus is one entry in ``CORPORA``.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from recipe.cli import UserError, nearest
from recipe.data import manifest
from recipe.data.documents import END_OF_TEXT, PartText, Rules, documents_of, part_text, parts, read, text_files
from recipe.data.manifest import SPLITS, FileRecord, Settings
from recipe.data.tokenizers import OFFLINE_WAYS, in_short

SHARD_BYTES = 16 << 20  # of text a file: stock LitGPT's TextFiles holds a whole file in memory, at 180 times its size
SAMPLE_BYTES = 20 << 20
VALIDATION_FOLDERS = ("val", "validation", "valid")
INCOMING = ".incoming"  # text on its way, below data_dir

OnProgress = Callable[[int, int, int | None], None]


@dataclass(frozen=True)
class OpenCorpus:
    """A corpus that is there."""

    location: str
    """What exactly it is, for the manifest."""
    documents: dict[str, Callable[[], Iterator[str]]]
    """For each split (``val`` may be missing) what iterates over its documents."""
    size: int | None
    """Bytes of text, about, where it is known."""


@dataclass(frozen=True)
class Stories:
    """The built-in corpus: made here, from a seed."""

    about: str

    def open(self) -> OpenCorpus:
        """Needs nothing."""
        from recipe.data.stories import generate_stories

        def documents() -> Iterator[str]:
            size = 0
            for story in generate_stories():
                yield story
                size += len(story.encode())
                if size >= SAMPLE_BYTES:
                    return

        return OpenCorpus("generate_stories(seed=0)", {"train": documents}, SAMPLE_BYTES)


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, or a local folder in the Hub's layout."""

    about: str
    path: str
    """``owner/name`` on the Hub."""
    column: str = "text"
    config: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    """The Hub's name of the split; None where it has no validation text."""

    def open(self) -> OpenCorpus:
        """Asks the Hub for the revision: one short question, so that a missing network shows at once."""
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        revision = None
        if not Path(self.path).is_dir():
            import huggingface_hub

            try:
                revision = huggingface_hub.HfApi().dataset_info(self.path, timeout=10).sha
            except Exception as error:  # the transport has many ways to say that there is no network
                raise UserError(
                    f"{self.path} cannot be had from the Hugging Face Hub ({in_short(error)}).\n{OFFLINE_WAYS}"
                ) from None
        names = {"train": self.train, **({"val": self.validation} if self.validation else {})}
        return OpenCorpus(
            f"{self.path}@{revision}" if revision else self.path,
            {split: partial(self._documents, name, revision) for split, name in names.items()},
            self._size(names.values(), revision),
        )

    def _size(self, splits: Iterable[str], revision: str | None) -> int | None:
        """What the dataset's card says, which need not say anything."""
        import datasets

        try:
            known = datasets.load_dataset_builder(self.path, self.config, revision=revision).info.splits or {}
            return sum(known[split].num_bytes for split in splits)
        except Exception:  # only the time left depends on it
            return None

    def _documents(self, split: str, revision: str | None) -> Iterator[str]:
        import datasets

        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(self.path, self.config, split=split, revision=revision, streaming=True)
            for row in rows:
                if self.column not in row:
                    raise UserError(f"{self.path} has no column {self.column!r}, but {', '.join(map(repr, row))}.")
                yield row[self.column] or ""
        except UserError:
            raise
        except Exception as error:  # as many ways to lose a connection half-way, or to get a broken file
            raise UserError(f"{self.path} could not be read to its end ({in_short(error)}).\n{OFFLINE_WAYS}") from None


Corpus = Stories | HubDataset
CORPORA: dict[str, Corpus] = {
    "sample": Stories("20 MB of short children's stories, made here: no network needed"),
    "tinystories": HubDataset("2.1 million short stories, 1.9 GB (Eldan & Li 2023)", "roneneldan/TinyStories"),
}
DEFAULT = "tinystories"


@dataclass(frozen=True)
class TextOrigin:
    """``source.json``: where the text in train/ and val/ came from, written when it was put there."""

    name: str
    location: str
    settings: Settings
    source_files: tuple[FileRecord, ...]
    """The user's files as they were read, for ``--source PATH``."""
    text: dict[str, tuple[FileRecord, ...]]
    """What was written, for each split."""
    empty_documents: int
    """Left out."""


def find(source: str) -> Corpus | Path:
    """The corpus of that name, or the path.

    Raises:
        UserError: for a name or path that there is none of.
    """
    if source in CORPORA:
        return CORPORA[source]
    path = Path(source)
    if path.exists():
        return path
    likely = nearest(source, CORPORA)
    known = "\n".join(f"  {name:12} {corpus.about}" for name, corpus in CORPORA.items())
    raise UserError(
        f"--source {source}: no such file, folder or corpus."
        + (f" Did you mean {likely}?" if likely else "")
        + f" Known corpora:\n{known}\nor a .txt, .jsonl or .parquet file, or a folder of them."
    )


def source_files(path: Path) -> dict[str, list[Path]]:
    """The user's files by split: ``train`` alone, or ``train`` and ``val`` where the folder has such subfolders.

    Raises:
        UserError: where there is no file to read.
    """
    if path.is_file():
        if path.suffix.lower() not in (".txt", ".jsonl", ".parquet"):
            raise UserError(f"--source {path}: a {path.suffix or 'nameless'} file; expected .txt, .jsonl or .parquet.")
        return {"train": [path]}
    validation = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if (path / "train").is_dir() and validation is not None:
        found = {"train": text_files(path / "train"), "val": text_files(validation)}
    else:
        found = {"train": text_files(path)}
    for split, files in found.items():
        if not files:
            raise UserError(f"--source {path}: no .txt, .jsonl or .parquet file for {split} in that folder.")
    return found


def write_text(
    source: str,
    data_dir: Path,
    settings: Settings,
    on_progress: OnProgress = lambda documents, size, total: None,
) -> TextOrigin:
    """Writes a source's documents as text under ``train/`` and ``val/``, all or nothing.

    Documents are divided by lines of ``<|endoftext|>``. Without validation text of its own the source is split by
    document hash; one whose few documents all fall on one side gives the end of each document instead.

    Args:
        source: a known corpus or a path.
        data_dir: text that lies there is replaced.
        settings: ``val_fraction`` is ignored for a source with validation text.
        on_progress: called with the documents and bytes so far, and how many bytes there are, about, or None.

    Raises:
        UserError: for a source that cannot be had or read, or that holds no text.
    """
    found = find(source)
    incoming = data_dir / INCOMING
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        if isinstance(found, Path):
            origin = _write_files(found, source, incoming, settings, on_progress)
        else:
            origin = _write_corpus(found.open(), source, incoming, settings, on_progress)
        for split in SPLITS:
            if not origin.text.get(split):
                raise UserError(_no_text(source, split, origin.settings))
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    manifest.write_json(incoming / "source.json", asdict(origin))  # last: from here on the text counts as complete
    publish(data_dir)
    return origin


def publish(data_dir: Path) -> None:
    """Moves text that was written to its end into its place; text that was not is removed.

    Called again after a call that was killed half-way.
    """
    incoming = data_dir / INCOMING
    if (incoming / "source.json").is_file():
        # The manifest goes first, so that never tokens of one text lie beside another one.
        manifest.manifest_path(data_dir).unlink(missing_ok=True)
        for split in SPLITS:
            if (incoming / split).is_dir():
                manifest.replace_folder(incoming / split, data_dir / split)
        os.replace(incoming / "source.json", data_dir / "source.json")
    shutil.rmtree(incoming, ignore_errors=True)


def read_origin(data_dir: Path) -> TextOrigin | None:
    """Where the text came from, None for text that was put there by hand."""
    try:
        values = json.loads((data_dir / "source.json").read_text(encoding="utf-8"))
        return TextOrigin(
            values["name"],
            values["location"],
            Settings(**values["settings"]),
            tuple(FileRecord(**entry) for entry in values["source_files"]),
            {split: tuple(FileRecord(**entry) for entry in entries) for split, entries in values["text"].items()},
            values["empty_documents"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- writing ---


class TextWriter:
    """Writes the documents of a split into files of about 16 MB."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder / split, split
        self.records: list[FileRecord] = []
        self._file: BinaryIO | None = None
        self._size = 0
        self._digest = hashlib.sha256()

    def write(self, text: str, closes: bool) -> None:
        """Appends a document, or a part of one."""
        data = text.encode()
        if closes:
            data += f"\n{END_OF_TEXT}\n".encode()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / f"{self.split}-{len(self.records):05d}.txt", "wb")  # noqa: SIM115
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
        if closes and self._size >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Ends the file."""
        if self._file is None:
            return
        self._file.close()
        path = Path(self._file.name)
        mtime = path.stat().st_mtime_ns
        name = path.relative_to(self.folder.parent).as_posix()
        self.records.append(FileRecord(name, self._size, mtime, self._digest.hexdigest()))
        self._file, self._size, self._digest = None, 0, hashlib.sha256()


def _write_files(path: Path, source: str, incoming: Path, settings: Settings, on_progress: OnProgress) -> TextOrigin:
    files = source_files(path)
    own_validation = "val" in files
    settings = replace(settings, val_fraction=None if own_validation else settings.val_fraction)
    base = path.parent if path.is_file() else path

    def contents(cut: bool) -> Iterator[PartText]:
        rules = Rules(settings.document_separator, settings.text_column, settings.val_fraction, cut)
        for split, paths in files.items():
            left = (settings.max_documents or sys.maxsize) * (2 if cut else 1)  # cut documents come in two
            for file in paths:
                for part in parts(file, rules, split if own_validation else None, may_cut=True):
                    text = read(part, rules)
                    yield _first_documents(text, left)
                    left -= sum(piece.closes for piece in text.pieces)
                    if left <= 0:
                        break
                if left <= 0:
                    break

    total = sum(file.stat().st_size for paths in files.values() for file in paths)
    text, empty = _write_splits(contents, incoming, settings, on_progress, total)
    records = tuple(manifest.record(file, base) for paths in files.values() for file in paths)
    return TextOrigin("files", str(path.resolve()), settings, records, text, empty)


def _first_documents(text: PartText, number: int) -> PartText:
    ends = [i for i, piece in enumerate(text.pieces, 1) if piece.closes]
    return text if len(ends) <= number else text._replace(pieces=text.pieces[: ends[number - 1]])


def _write_corpus(
    corpus: OpenCorpus, source: str, incoming: Path, settings: Settings, on_progress: OnProgress
) -> TextOrigin:
    own_validation = "val" in corpus.documents
    settings = replace(settings, val_fraction=None if own_validation else settings.val_fraction)

    def contents(cut: bool) -> Iterator[PartText]:
        rules = Rules(val_fraction=settings.val_fraction, cut=cut)
        for split, documents in corpus.documents.items():
            for row in islice(documents(), settings.max_documents):
                yield part_text(documents_of(row), rules, split if own_validation else None)

    text, empty = _write_splits(contents, incoming, settings, on_progress, corpus.size)
    return TextOrigin(source, corpus.location, settings, (), text, empty)


def _write_splits(
    contents: Callable[[bool], Iterable[PartText]],
    incoming: Path,
    settings: Settings,
    on_progress: OnProgress,
    total: int | None,
) -> tuple[dict[str, tuple[FileRecord, ...]], int]:
    """Writes both splits; returns their files and how many empty documents were left out."""
    for cut in (False, True):
        writers = {split: TextWriter(incoming, split) for split in SPLITS}
        documents = size = empty = 0
        try:
            for text in contents(cut):
                empty += text.empty
                for piece in text.pieces:
                    writers[piece.split].write(piece.text, piece.closes)
                    documents += piece.closes
                    size += len(piece.text)
                on_progress(documents, size, total)
        finally:
            for writer in writers.values():
                writer.close()
        written = {split: tuple(writer.records) for split, writer in writers.items()}
        if settings.val_fraction is None or all(written.values()) or not any(written.values()):
            break
        if not cut:
            shutil.rmtree(incoming)
            print(few_documents(documents, settings.val_fraction))
    return written, empty


def few_documents(documents: int, val_fraction: float) -> str:
    """Why the end of each document becomes validation text."""
    return (
        f"{documents} document{'s' if documents != 1 else ''}: too few to split by document, so the last "
        f"{val_fraction:.0%} of each becomes validation text."
    )


def _no_text(source: str, split: str, settings: Settings) -> str:
    if split == "val" and settings.val_fraction is not None:
        return (
            f"--source {source}: too little text to take validation text from; give more, or a folder with train/ and "
            "val/ in it."
        )
    return f"--source {source}: no text for {split} (every document is empty); expected text in UTF-8."
