"""Compare a data folder with the flags: what it contains, and what must be made again and why."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from litmoe.checksummed_json import read_json
from litmoe.cli import UserError, quoted
from litmoe.data import corpora, manifest
from litmoe.data.corpora import DEFAULT_VAL_FRACTION, Corpus, HubDataset
from litmoe.data.documents import SPLITS
from litmoe.data.files import READABLE, is_readable, kinds, text_files, unread_files
from litmoe.data.manifest import FileRecord, Manifest, Settings, TextOrigin
from litmoe.data.prepare_args import PrepareArgs

INCOMING = ".incoming"
"""Folder for text that is being written, below data_dir."""
BUILDING = ".building"
"""Folder for tokens that are being made, below data_dir/tokens."""
# Flags that decide how a source is read.
SOURCE_FLAGS = ("val_fraction", "text_column", "max_documents", "separator", "keep_text")


@dataclass(frozen=True)
class DataDir:
    """What a data folder contains."""

    path: Path
    manifest: Manifest | None
    text: dict[str, tuple[FileRecord, ...]]
    """The text files of each split with text."""
    origin: TextOrigin | None
    """Where the text was written from, None for text that the user put there."""

    @classmethod
    def read(cls, path: Path) -> "DataDir":
        """Look at the folder. Files with known size and time are not read again."""
        found, origin = manifest.read(path), manifest.read_origin(path)
        known: list[FileRecord] = []
        if found is not None:
            known += [record for split in found.splits.values() for record in split.text]
        if origin is not None:
            known += [record for records in origin.text.values() for record in records]
        text = {}
        for split in SPLITS:
            files = text_files(path / split)
            if files:
                text[split] = manifest.refresh(files, path, known)
        return cls(path, found, text, origin)

    @property
    def is_empty(self) -> bool:
        """Whether the folder has neither text nor complete tokens."""
        return not self.text and self.manifest is None

    @property
    def text_is_as_written(self) -> bool:
        """Whether the text was not changed since it was written from its source."""
        if self.origin is None:
            return False
        current = [record for records in self.text.values() for record in records]
        written = [record for records in self.origin.text.values() for record in records]
        return manifest.contents(current) == manifest.contents(written)

    @property
    def streamed(self) -> Manifest | None:
        """The manifest of tokens of a Hub corpus without text."""
        if self.manifest is None or self.text or not corpora.is_hub(self.manifest.source.name):
            return None
        return self.manifest

    @property
    def source(self) -> TextOrigin | None:
        """The source of the text or of the streamed tokens, None for text that the user put there."""
        if self.streamed is None:
            return self.origin
        found = self.streamed
        return TextOrigin(found.source.name, found.source.location or "", found.settings, (), {})

    @property
    def training_text(self) -> tuple[FileRecord, ...]:
        """The files that a trained tokenizer depends on."""
        if self.manifest is not None and not self.text:
            return self.manifest.splits["train"].text
        return self.text.get("train", ())

    def corpus(self, args: PrepareArgs) -> Corpus | None:
        """Return the text in place as a corpus, None without text."""
        if not self.text:
            return None
        files: dict[str, list[Any]] = {}
        for split, records in self.text.items():
            files[split] = [self.path / record.path for record in records]
        if self.origin is not None and self.text_is_as_written:
            # Its documents were separated, split and limited when it was written.
            origin = self.origin
            return Corpus(origin.name, origin.location, files, self.text, origin.settings, written_here=True)
        settings = settings_of(args, None)
        if "val" in files:
            settings = replace(settings, val_fraction=None)
        return Corpus("text", "", files, self.text, settings)


def settings_of(args: PrepareArgs, source: str | None) -> Settings:
    """Return the settings of the flags, with the defaults of a source."""
    fraction = args.val_fraction
    dataset = corpora.find(source) if source else None
    if fraction is None and isinstance(dataset, HubDataset) and not args.max_documents:
        fraction = dataset.val_fraction
    elif fraction is None:
        # Also for a few documents of a large corpus, because a thousandth of them is none.
        fraction = DEFAULT_VAL_FRACTION
    return Settings(fraction, args.separator, args.text_column, args.max_documents, args.skip_broken)


def _differences(old: Settings, new: Settings) -> list[str]:
    """Name the settings that differ."""
    before = asdict(old)
    return [f"{name} {before[name]!r} became {value!r}" for name, value in asdict(new).items() if before[name] != value]


# --- tokens ---


def stale_splits(corpus: Corpus, found: Manifest | None, tokenizer: str) -> dict[str, list[str]]:
    """Return for each split the reasons why its tokens must be made; no reasons if they are up to date.

    Args:
        corpus: the text in place.
        found: the manifest of the existing tokens.
        tokenizer: the fingerprint of the tokenizer.
    """
    if found is None:
        return {split: ["not tokenized yet"] for split in SPLITS}
    # The settings of text from a source were applied when it was written.
    common = [] if corpus.written_here else _differences(found.settings, corpus.settings)
    if found.tokenizer.sha256 != tokenizer:
        common.append("another tokenizer")
    reasons = {}
    for split in SPLITS:
        reasons[split] = manifest.changed_files(found.splits[split].text, corpus.records_of(split)) + common
    return reasons


# --- the source ---


def reasons_to_read_source(args: PrepareArgs, data: DataDir, tokenizer: str | None) -> list[str] | None:
    """Return why the source must be read, None to use what the folder contains.

    Args:
        args: the flags.
        data: what the folder contains.
        tokenizer: fingerprint of the tokenizer, None if it will be trained.

    Returns:
        The changes since the source was read; an empty list if it was never read, or is read because of --overwrite.

    Raises:
        UserError: the flags contradict what the folder contains.
    """
    _refuse_unfinished_stream(args, data)
    if args.source is None:
        _check_without_source(args, data)
        return [] if data.is_empty else None
    if data.is_empty or args.overwrite:
        return []
    known = _same_source(args.source, data)
    return _changes_of_source(args, args.source, data, known, tokenizer) or None


def _refuse_unfinished_stream(args: PrepareArgs, data: DataDir) -> None:
    """Raise ``UserError`` if the call would delete finished units of another corpus."""
    if not data.is_empty or args.overwrite:
        return
    unfinished = read_stream(data.path).get("source")
    if unfinished is not None and unfinished != args.source:
        raise UserError(
            f"{data.path} contains the unfinished preparation of {unfinished}. Resume it with --source "
            f"{quoted(unfinished)}, choose another --data_dir, or delete it with --overwrite."
        )


def read_stream(data_dir: Path) -> dict[str, Any]:
    """Return source and revision of an interrupted stream; empty without one."""
    try:
        return dict(read_json(manifest.tokens_dir(data_dir) / BUILDING / "stream.json"))
    except (OSError, ValueError, TypeError):
        return {}


def _check_without_source(args: PrepareArgs, data: DataDir) -> None:
    """Check a call without --source, which uses the text in place or the finished tokens."""
    check_placed_text(data.path)
    if "val" in data.text and "train" not in data.text:
        raise UserError(
            f"{data.path / 'val'} contains text and {data.path / 'train'} none; put the training text there, or name a "
            "--source."
        )
    if data.is_empty:
        return
    # Flags are compared with what was given to the source; without a source they have no effect.
    if data.streamed is not None or data.text_is_as_written:
        _refuse_source_flags(args, data)
    if data.text and args.max_documents is not None:
        raise UserError("--max_documents needs a --source; text in place is taken completely.")
    if not data.text and args.overwrite:
        raise UserError(f"there is no text in {data.path} to make its tokens from; name a --source.")


def _refuse_source_flags(args: PrepareArgs, data: DataDir) -> None:
    """Raise ``UserError`` for flags that cannot be applied to text that was already read from its source."""
    given = [name for name in SOURCE_FLAGS if getattr(args, name) not in (None, False)]
    if given:
        assert data.source is not None, "the caller has checked that the text has a source"
        source = data.source.location if data.source.name == "files" else data.source.name
        flags = " and ".join(f"--{name.replace('separator', 'document_separator')}" for name in given)
        raise UserError(
            f"the text of {data.path} was taken from {source}, so {flags} can only be applied by reading it again: add "
            f"--source {quoted(source)}."
        )


def _same_source(source: str, data: DataDir) -> TextOrigin:
    """Return the known source of the folder's text.

    Raises:
        UserError: the folder contains something else, or its text was changed by hand.
    """
    known = data.source
    is_same = known is not None and known.name == source
    # Files are known by their path, which the manifest does not contain.
    if known is not None and known.name == "files":
        is_same = known.location == str(Path(source).resolve())
    if known is None or not is_same:
        what = f"{known.name} ({known.location})" if known else "text"
        raise UserError(
            f"{data.path} already contains {what}, which --source {source} would replace. Choose another --data_dir, "
            "leave out --source to use the existing data, or replace it with --overwrite."
        )
    if data.text and not data.text_is_as_written:
        raise UserError(
            f"the text in {data.path} was changed since it was written from {known.location}. Leave out --source to "
            "use it as it is, or write it again with --overwrite."
        )
    return known


def _changes_of_source(
    args: PrepareArgs, source: str, data: DataDir, known: TextOrigin, tokenizer: str | None
) -> list[str]:
    """Name what changed since the source was read."""
    wanted = settings_of(args, source)
    if known.settings.val_fraction is None:
        # The source has its own validation text.
        wanted = replace(wanted, val_fraction=None)
    changes = _differences(known.settings, wanted)
    if known.name == "files":
        files = corpora.open_local(source, wanted).records
        records = [record for split in files.values() for record in split]
        changes += manifest.changed_files(known.source_files, records)
    if data.streamed is not None and args.keep_text:
        changes.append("--keep_text")
    if data.streamed is not None and data.streamed.tokenizer.sha256 != tokenizer:
        # There is no text to make the tokens from.
        changes.append("another tokenizer")
    return changes


def check_placed_text(data_dir: Path) -> None:
    """Raise ``UserError`` for text in a wrong place, which would be ignored and replaced by another corpus."""
    for split in SPLITS:
        unread = unread_files(data_dir / split)
        if unread and not text_files(data_dir / split):
            raise UserError(
                f"nothing in {data_dir / split} can be read (it has {kinds(unread)}); expected files of {READABLE}. "
                "Put text there, or move these files away and name a --source."
            )
    # A folder with a tokenizer has text files such as merges.txt.
    complete = ("train", "tokenizer.json", "tokens/manifest.json")
    if any((data_dir / name).exists() for name in complete):
        return
    for path in sorted(data_dir.glob("*")):
        place = _right_place(path)
        if place is not None:
            raise UserError(
                f"{path} is not read: move it to {place}, or name it: --source {quoted(path)} --data_dir ANOTHER."
            )


def _right_place(path: Path) -> Path | None:
    """Return where a file or folder of text next to train/ and val/ should be; None for anything else."""
    named = corpora.split_name(path.name.split(".")[0])
    if path.is_dir():
        is_split = named in SPLITS and path.name not in SPLITS
        return path.parent / str(named) if is_split and text_files(path) else None
    # A .md or .json may be a description of the data.
    if not is_readable(path) or path.suffix in (".md", ".json"):
        return None
    return path.parent / (named if named in SPLITS else "train") / path.name
