"""Prepare a data folder: text to tokens, with a manifest that says what the tokens were made from.

``prepare`` takes these steps:

1. Find the source: built in, on the Hub, the user's own files, or text in place in DATA_DIR/train and DATA_DIR/val.
2. Choose the tokenizer: from the Hub, a folder, trained on the text, or the one in place.
3. Compare both and the flags with the manifest. Nothing changed: done. Flags are never taken over from an earlier call.
4. Tokenize into the hidden folder DATA_DIR/tokens/.building, and move everything into place, the manifest last.

A killed call leaves nothing that looks complete, and the same command resumes it.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from litmoe.checksummed_json import read_json, write_json
from litmoe.cli import UserError, quoted
from litmoe.data import corpora, manifest, tokenizers, tokens
from litmoe.data.choose_tokenizer import (
    TRAIN,
    TokenizerChoice,
    choose_tokenizer,
    proof_documents,
    train_origin,
    train_tokenizer,
)
from litmoe.data.corpora import DEFAULT_VAL_FRACTION, Corpus, HubDataset
from litmoe.data.documents import END_OF_TEXT
from litmoe.data.files import READABLE, Unfinished, is_readable, kinds, text_files, unread_files
from litmoe.data.manifest import FILES, SPLITS, TEXT, FileRecord, Manifest, Settings, Source, Split, TokenizerRecord
from litmoe.data.tokenizers import TokenizerInfo
from litmoe.renaming import rename

if TYPE_CHECKING:
    from filelock import FileLock

# What a call without --source uses. No file has these names.
IN_PLACE = "(text in place)"
TOKENS = "(finished tokens)"
BUILDING = ".building"
"""Folder for tokens that are being made, below DATA_DIR/tokens."""
LOCK = ".prepare.lock"
PACKAGES = ("litdata", "tokenizers", "tiktoken", "datasets", "pyarrow")
# Flags that decide how a source is read.
SOURCE_FLAGS = (
    *("val_fraction", "document_separator", "text_column", "max_documents", "skip_broken", "extensions", "keep_text"),
)
VALID_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    # 256 bytes and the end-of-text token.
    "vocab_size": (lambda size: size >= 257, "257 or more"),
    "max_documents": (lambda number: number >= 1, "1 or more"),
    "num_workers": (lambda number: number >= 0, "0 or more"),
    "val_fraction": (lambda fraction: 0 < fraction < 1, "a number between 0 and 1, such as 0.1"),
}
"""The valid values of flags, as a function and in words."""


@dataclass
class PrepareArgs:
    """Turn text into tokens for training.

    With --instruct, conversations are prepared instead: `prepare_data.py --instruct stories --help`.
    """

    source: str | None = None
    """Where the text comes from: a file (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet or .arrow, each also as .gz,
    .bz2, .xz or .zst); a folder of such files (files named val, valid, validation or dev are validation text, files
    named test are left out); a folder of source code with --extensions; `sample` (built-in stories, no network); a
    corpus of the Hugging Face Hub by name (`tinystories`, `shakespeare`, `wikitext-103`, `openwebtext`, `fineweb-edu`);
    or `hf:ORG/NAME[:CONFIG]`, any dataset of the Hub with a column of text. Default: the text in DATA_DIR/train and
    DATA_DIR/val, or else tinystories."""
    data_dir: Path = Path("data/custom_text")
    """Folder of the corpus: text in train/ and val/, tokens in tokens/."""
    tokenizer: str | None = None
    """A tokenizer of the Hugging Face Hub, a folder with a tokenizer.json, or `train`: a byte-level BPE trained on this
    text. Default: the one in TOKENIZER_DIR, or else gpt2."""
    tokenizer_dir: Path = manifest.DEFAULT_TOKENIZER_DIR
    """Folder where the tokenizer is stored."""
    vocab_size: int | None = None
    """Number of tokens of a trained tokenizer (default 8192); a small text may give fewer."""
    val_fraction: float | None = None
    """Share of the documents that become validation text, chosen by their hash, if the corpus has none (default 0.1;
    for a large corpus of the Hub less: 0.01, openwebtext 0.0005, fineweb-edu 0.001)."""
    document_separator: str = ""
    """A line of a .txt that ends a document, in addition to the line <|endoftext|>; '\\n' is an empty line. Without
    such a line a file is one document."""
    text_column: str | None = None
    """Field of a .jsonl or .json, or column of a .parquet, .arrow, .csv or .tsv, that holds the text. Default: `text`,
    or the only one with text (a .csv or .tsv must have a column `text` then)."""
    extensions: str | None = None
    """Endings of the files to read from a folder, such as `.py,.c`: each file is a document, whatever its format.
    Hidden files and those in node_modules, site-packages and __pycache__ are left out, and binary files."""
    max_documents: int | None = None
    """Take at most this many documents from the beginning of the source (for a quick try)."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, such as a line of a .jsonl that is not JSON, and count them."""
    keep_text: bool = False
    """Also write the documents as text files, to DATA_DIR/tokens/text."""
    overwrite: bool = False
    """Replace another corpus or tokenizer, and build everything again."""
    num_workers: int | None = None
    """Tokenizing threads; 0 tokenizes in the main thread. Default: one for each core."""
    log_to_wandb: bool = False
    """Log text and tokens to Weights & Biases as a dataset (also by WANDB_LOG_DATASET=1)."""
    wandb_artifact: str | None = None
    """Name of that dataset (default: dataset-FOLDER)."""
    wandb_project: str | None = None
    """Its project (default: WANDB_PROJECT)."""
    wandb_entity: str | None = None
    """Its user or team (default: WANDB_ENTITY)."""

    @property
    def separator(self) -> str | None:
        """The separator line; None for none, or for the one that always separates."""
        given = self.document_separator.replace("\\n", "\n")
        if given in ("", END_OF_TEXT):
            return None
        return given if given.strip("\n") else ""

    @property
    def endings(self) -> str | None:
        """Return ``extensions`` in one spelling, so that ``py, .C`` is ``.c,.py``; None for none."""
        names = {name.strip().lower().removeprefix(".") for name in (self.extensions or "").split(",")} - {""}
        return ",".join(f".{name}" for name in sorted(names)) or None

    def check(self) -> None:
        """Raise one ``UserError`` with all problems that are visible before anything is read."""
        problems = self._problems_of_values()
        source = corpora.find(self.source) if self.source is not None else None
        if isinstance(source, Path):
            problems += self._problems_of_path(source)
        if self.extensions is not None and not (isinstance(source, Path) and source.is_dir()):
            problems.append("--extensions needs a folder: --source FOLDER.")
        if problems:
            raise UserError("\n".join(problems))

    def _problems_of_values(self) -> list[str]:
        problems = []
        for name, (is_valid, expected) in VALID_VALUES.items():
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                problems.append(f"--{name} {value}: expected {expected}.")
        if self.separator is not None and "\n" in self.separator:
            problems.append(
                f"--document_separator {self.document_separator!r}: expected one line; '\\n' is an empty one."
            )
        if self.extensions is not None and not self.endings:
            problems.append(f"--extensions {self.extensions!r}: expected endings such as .py,.c")
        if self.vocab_size is not None and self.tokenizer != TRAIN:
            problems.append("--vocab_size needs --tokenizer train; other tokenizers have a fixed size.")
        return problems

    def _problems_of_path(self, source: Path) -> list[str]:
        """Name why the source cannot be read into ``data_dir``: one of them is inside of the other."""
        path, data_dir = source.resolve(), self.data_dir.resolve()
        prepared = {data_dir / "train", data_dir / "val", data_dir / "tokens"}
        if path == data_dir or prepared.intersection([path, *path.parents]):
            return [f"--source {source} is the prepared text; leave out --source to use it."]
        if data_dir.is_relative_to(path):
            return [f"--data_dir {self.data_dir} is inside --source {source}; choose one outside of it."]
        return []


def prepare(args: PrepareArgs) -> Manifest:
    """Make ``data_dir`` contain the complete tokens of the text, and ``tokenizer_dir`` the tokenizer.

    Does nothing if they are up to date. Several processes may call it for the same folder: one of them builds, and the
    others wait.

    Returns:
        The manifest of the tokens.

    Raises:
        UserError: the text, the tokenizer or the flags have a mistake. Finished tokens and the text are kept.
    """
    args.check()
    with locked(args.data_dir):
        # First finish a call that was killed while it moved complete tokens into place.
        _publish(args.data_dir, args.tokenizer_dir)
        previous = manifest.read(args.data_dir)
        source = args.source or _source_in_place(args, previous)
        # Refuse before the source is opened: that reads its files for their checksums, which can take minutes.
        _refuse_replacing(args, source, previous)
        settings = _settings(args, source)
        corpus = _open_local(args, source, settings, previous)
        tokenizer = _choose_tokenizer(args, settings, corpus, previous)
        changes = _changes(args, source, settings, corpus, tokenizer, previous)
        if previous is None or changes:
            # The Hub is asked only now: an unchanged folder needs no network.
            corpus = corpus or _open_stream(args, source, settings)
            result = _build(args, source, corpus, tokenizer, changes)
        else:
            result = previous
            _keep(args, source, tokenizer, previous)
    if args.log_to_wandb or os.environ.get("WANDB_LOG_DATASET") == "1":
        _log_to_wandb(args)
    return result


def _keep(args: PrepareArgs, source: str, tokenizer: TokenizerChoice, previous: Manifest) -> None:
    """Keep tokens that are up to date. Their tokenizer is put into ``tokenizer_dir`` if it is not there."""
    if tokenizer.files is not None:
        tokenizers.install(tokenizer.files, tokenizer.origin, args.tokenizer_dir)
    # What a call left that was killed after its tokens were complete. The unfinished work of another source stays.
    if _read_started(args.data_dir).get("source") in (None, _label(source)):
        shutil.rmtree(manifest.tokens_dir(args.data_dir) / BUILDING, ignore_errors=True)
    print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
    print(_summary(previous))


# --- what to do ---


def _source_in_place(args: PrepareArgs, previous: Manifest | None) -> str:
    """Return the source of a call without ``--source``: ``IN_PLACE``, ``TOKENS`` as they are, or the default.

    Raises:
        UserError: the text is in a wrong place, or the tokens must be made again and their text is not there.
    """
    check_placed_text(args.data_dir)
    has_text = bool(manifest.text_in_place(args.data_dir))
    # 0.1.0 wrote the text of every source to train/ and val/, and said so in source.json.
    was_written = previous is not None and previous.source.name != TEXT and (args.data_dir / "source.json").exists()
    if has_text and not was_written:
        return IN_PLACE
    # If chunks are missing, the manifest does not count as complete, but it still names the source.
    recorded = manifest.read_file(manifest.manifest_path(args.data_dir))
    if recorded is None:
        return corpora.DEFAULT
    if previous is not None and not args.overwrite:
        return TOKENS
    reason = "--overwrite" if previous is not None else "they are damaged"
    command = manifest.command_to_repeat(args.data_dir, recorded, args.tokenizer_dir, overwrite=args.overwrite)
    raise UserError(
        f"the tokens of {args.data_dir} must be made again ({reason}), but their text is not there. Name the source: "
        f"{command}"
    )


def _refuse_replacing(args: PrepareArgs, source: str, previous: Manifest | None) -> None:
    """Raise ``UserError`` if a source would replace the tokens of another one, finished or not."""
    if args.overwrite:
        return
    if previous is None:
        unfinished = _read_started(args.data_dir).get("source", _label(source))
        if unfinished != _label(source):
            resume = "without --source" if unfinished == IN_PLACE else f"with --source {quoted(unfinished)}"
            raise UserError(
                f"{args.data_dir} contains the unfinished preparation of {unfinished}. Resume it {resume}, choose "
                "another --data_dir, or delete it with --overwrite."
            )
    elif not _is_same(source, previous.source):
        new = f"the text in {args.data_dir}" if source == IN_PLACE else f"--source {source}"
        raise UserError(
            f"{args.data_dir} already contains the tokens of {previous.source.name} "
            f"({previous.source.location or 'in place'}), which {new} would replace. Choose another --data_dir, or "
            "replace them with --overwrite."
        )


def _path(source: str) -> Path | None:
    """Return the full path of the user's own files; None for any other source."""
    is_name = source in (IN_PLACE, TOKENS, *corpora.CORPORA) or corpora.is_hub(source)
    return None if is_name else Path(source).resolve()


def _label(source: str) -> str:
    """Return what identifies a source on this machine."""
    # The full path: unlike the manifest, the unfinished folder is not shared, and two folders may have the same name.
    return str(_path(source) or source)


def _is_same(source: str, recorded: Source) -> bool:
    path = _path(source)
    if path is None:
        return {IN_PLACE: TEXT, TOKENS: recorded.name}.get(source, source) == recorded.name
    is_same_name = (recorded.name, recorded.location) == (FILES, path.name)
    # 0.1.0 recorded only the name.
    return is_same_name and recorded.path_sha256 in (None, corpora.path_sha256(path))


def _settings(args: PrepareArgs, source: str) -> Settings:
    """Return the settings of the flags, with the defaults of a source."""
    default = DEFAULT_VAL_FRACTION
    dataset = corpora.find(source) if corpora.is_hub(source) else None
    # The fraction of a large corpus, such as a thousandth, would be too little of its first documents.
    if isinstance(dataset, HubDataset) and args.max_documents is None:
        default = dataset.val_fraction
    return Settings(
        args.val_fraction or default,
        args.separator,
        args.text_column,
        args.max_documents,
        args.skip_broken,
        args.endings,
    )


def _open_local(args: PrepareArgs, source: str, settings: Settings, previous: Manifest | None) -> Corpus | None:
    """Open a source on this machine; None for the Hub, which is asked only if something changed."""
    if source == TOKENS or corpora.is_hub(source):
        return None
    known = previous.text if previous is not None else []
    if source != IN_PLACE:
        return corpora.open_local(source, settings, known)
    if args.max_documents is not None:
        raise UserError("--max_documents needs a --source; text in place is taken completely.")
    return corpora.open_text(args.data_dir, settings, known)


def _choose_tokenizer(
    args: PrepareArgs, settings: Settings, corpus: Corpus | None, previous: Manifest | None
) -> TokenizerChoice:
    # A trained tokenizer depends on the text as it is now. The manifest describes text that is not opened yet.
    text: tuple[FileRecord, ...] = ()
    if corpus is not None:
        text, settings = corpus.records["train"], corpus.settings
    elif previous is not None:
        text, settings = previous.splits["train"].text, previous.settings
    trained = train_origin(args.vocab_size, args.tokenizer_dir, args.data_dir, text, settings)
    return choose_tokenizer(args.tokenizer, args.tokenizer_dir, trained, overwrite=args.overwrite)


def _changes(
    args: PrepareArgs,
    source: str,
    settings: Settings,
    corpus: Corpus | None,
    tokenizer: TokenizerChoice,
    previous: Manifest | None,
) -> list[str]:
    """Name what differs between the manifest and this call; nothing if the tokens are up to date.

    Raises:
        UserError: finished tokens were to be used as they are, and that is not possible.
    """
    if previous is None:
        return ["not tokenized yet"]
    if args.overwrite:
        return ["--overwrite"]
    changes = [] if tokenizer.sha256 == previous.tokenizer.sha256 else ["another tokenizer"]
    if source == TOKENS:
        _require_source(args, previous, changes)
        return []
    changes += _changed_settings(previous.settings, settings)
    # Only local files can have changed: a Hub corpus was tokenized at a fixed commit, and stories have no files.
    if corpus is not None and corpus.generate is None:
        changes += manifest.changed_files(previous.text, corpus.all_records)
    if args.keep_text and not previous.keeps_text:
        changes.append("--keep_text")
    return changes


def _require_source(args: PrepareArgs, previous: Manifest, changes: list[str]) -> None:
    """Raise ``UserError`` if finished tokens cannot be used as they are."""
    given = [f"--{name}" for name in SOURCE_FLAGS if getattr(args, name) != getattr(PrepareArgs, name)]
    source = previous.source.flag
    where = f"add --source {source}" if source else f"put its text back into {args.data_dir}"
    if given or changes:
        raise UserError(
            f"{args.data_dir} contains tokens without their text, and this call names no --source. For "
            f"{' and '.join(given + changes)} they must be made again: {where}."
        )


def _changed_settings(old: Settings, new: Settings) -> list[str]:
    old_values, new_values = asdict(old), asdict(new)
    # A corpus with its own validation text has no fraction, which its flags can't tell.
    if old.val_fraction is None:
        new_values["val_fraction"] = None
    changed = [name for name, value in new_values.items() if value != old_values[name]]
    return [f"{name} {old_values[name]!r} became {new_values[name]!r}" for name in changed]


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
    if any((data_dir / name).exists() for name in ("train", "tokenizer.json", "tokens/manifest.json")):
        return
    for path in sorted(data_dir.glob("*")):
        if _is_misplaced_text(path):
            folder = "val" if corpora.split_name(path.name.split(".")[0]) == "val" else "train"
            raise UserError(
                f"{path} is not read: move it to {data_dir / folder}, or name it: --source {quoted(path)} --data_dir "
                "ANOTHER."
            )


def _is_misplaced_text(path: Path) -> bool:
    """Return whether a path next to train/ and val/ is a text file, or a folder of them with the name of a split."""
    if path.is_dir():
        is_split = path.name not in SPLITS and corpora.split_name(path.name) in SPLITS
        return is_split and bool(text_files(path))
    # A .md or .json may be a description of the data.
    return is_readable(path) and path.suffix not in (".md", ".json")


# --- building ---


def _read_started(data_dir: Path) -> dict[str, Any]:
    """Return the source and the revision of an interrupted call; empty without one."""
    try:
        return dict(read_json(manifest.tokens_dir(data_dir) / BUILDING / "started.json"))
    except manifest.UNREADABLE:
        return {}


def _open_stream(args: PrepareArgs, source: str, settings: Settings) -> Corpus:
    """Open a Hub corpus. An interrupted call is resumed with the same revision of the dataset."""
    started = _read_started(args.data_dir)
    # Finished units must come from the same commit as the rest, or documents could be missing or doubled.
    revision = started.get("revision") if started.get("source") == source else None
    return corpora.open_hub(source, settings, revision)


def _build(args: PrepareArgs, source: str, corpus: Corpus, tokenizer: TokenizerChoice, changes: list[str]) -> Manifest:
    """Tokenize a corpus with the right tokenizer, and move both into place."""
    started = time.perf_counter()
    reason = shorten("; ".join(changes), 300, placeholder=" ...")
    print(f"Tokenizing {args.data_dir if source == IN_PLACE else source}: {reason}")
    for note in corpus.notes:
        print(note)
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    try:
        building.mkdir(parents=True, exist_ok=True)
        # Written before any token, so that a later call knows whose work it would resume or delete.
        started_by = {
            "source": _label(source),
            "revision": corpus.revision,
            "tokenizer_dir": str(args.tokenizer_dir.resolve()),
        }
        write_json(building / "started.json", started_by)
        info = _prepare_tokenizer(args, corpus, tokenizer, building / "tokenizer")
        result = _tokenize(args, corpus, info, building)
    except UserError as error:
        # A lost connection does not lose finished units. Another mistake would stop the next call too, so there is
        # nothing to resume.
        if not isinstance(error, Unfinished):
            shutil.rmtree(building, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        print("\nStopped. Finished parts are kept; run the same command again to resume.")
        raise
    # From here on the tokens count as complete: a killed call is finished by the next one.
    manifest.write_file(building / "manifest.json", result)
    _publish(args.data_dir, args.tokenizer_dir)
    print(_summary(result))
    print(f"Prepared in {time.perf_counter() - started:.1f} s. The tokens can be used with any context length.")
    return result


def _prepare_tokenizer(args: PrepareArgs, corpus: Corpus, tokenizer: TokenizerChoice, folder: Path) -> TokenizerInfo:
    """Return the tokenizer for the corpus: the existing one, or a new one in ``folder``."""
    files, origin = tokenizer.files, tokenizer.origin
    if args.tokenizer == TRAIN:
        # A stream is opened only now, so its text may not be what the tokenizer in place was trained on.
        text = corpus.records["train"]
        origin = train_origin(args.vocab_size, args.tokenizer_dir, args.data_dir, text, corpus.settings)
        if args.overwrite or tokenizers.origin(args.tokenizer_dir) != origin:
            files = train_tokenizer(corpus, origin["vocab_size"])
    # One of an interrupted call with other flags must not be installed with these tokens.
    shutil.rmtree(folder, ignore_errors=True)
    if files is not None:
        tokenizers.install(files, origin, folder)
    info = tokenizers.load(folder if files is not None else args.tokenizer_dir)
    begins = f"begins with {info.bos_token!r}, id {info.bos_id}, and " if info.bos_token else ""
    print(
        f"Tokenizer in {args.tokenizer_dir} ({info.name}): {info.vocab_size:,} tokens, so a model needs a "
        f"padded_vocab_size of that or more. Each document {begins}ends with {info.eos_token!r}, id {info.eos_id}."
    )
    return info


def _tokenize(args: PrepareArgs, corpus: Corpus, info: TokenizerInfo, building: Path) -> Manifest:
    """Write the chunks of both splits, and with ``--keep_text`` the text, below ``building``."""
    dtype = tokens.dtype_for(info.vocab_size)
    encode = _encoder_to_bytes(corpus, info, dtype)
    # Which encoder runs is no input of the units: both give the same ids, so either may resume the other's work.
    store, records = tokens.tokenize_corpus(
        corpus, encode, building, inputs=[info.sha256], keep_text=args.keep_text, num_workers=args.num_workers
    )
    totals = tokens.totals_of(records)
    if totals.eot_in_text:
        print(f"{totals.eot_in_text:,} times {END_OF_TEXT} inside a line: taken as text, not as the end of a document.")
    splits: dict[str, Split] = {}
    for split in SPLITS:
        if not totals.documents[split]:
            raise UserError(_no_text(corpus, split))
        # From the records of all units, so the chunks of a resumed call equal those of an uninterrupted one.
        number, chunks = tokens.write_chunks(store, records, split, dtype)
        splits[split] = Split(
            documents=totals.documents[split],
            tokens=number,
            bytes=totals.bytes[split],
            empty_documents=0,
            chunks=chunks,
            dtype=dtype,
            text=corpus.records_of(split),
            files=manifest.checksums(store.folder / split),
        )
    # These were counted for both splits together. The summary adds up the splits, so one of them holds all.
    splits["train"] = replace(
        splits["train"],
        empty_documents=totals.empty_documents,
        dropped_duplicates=totals.dropped_duplicates,
        broken_rows=totals.broken_rows,
    )
    if args.keep_text:
        tokens.move_text(store, records)
    return Manifest(
        format=manifest.FORMAT,
        source=Source(
            corpus.name, corpus.location or None, manifest.text_fingerprint(corpus.all_records), corpus.path_sha256
        ),
        tokenizer=TokenizerRecord(info.name, info.sha256, info.vocab_size, info.eos_token, info.eos_id),
        settings=corpus.settings,
        splits=splits,
        # For the user; tokens made by other versions are used as they are.
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        keeps_text=args.keep_text,
    )


def _encoder_to_bytes(corpus: Corpus, info: TokenizerInfo, dtype: str) -> Callable[[list[str]], bytes]:
    """Return the function that makes the stored tokens of documents, with the fastest encoder that is exact."""
    tokenizer_json = info.folder / "tokenizer.json"
    # tiktoken encodes several times as fast. Its ids are compared with the tokenizer's on this text at each start.
    fast = tokenizers.agrees_with_tiktoken(tokenizer_json, proof_documents(corpus))
    encoder = tokenizers.Encoder(tokenizer_json, info.eos_id, info.bos_id, fast=fast)

    def encode(texts: list[str]) -> bytes:
        # Little-endian on every machine.
        return encoder(texts).astype(np.dtype(dtype).newbyteorder("<")).tobytes()

    return encode


def _no_text(corpus: Corpus, split: str) -> str:
    source = corpus.location if corpus.name == FILES else corpus.name
    if split == "val" and "val" not in corpus.files:
        return f"{source}: too little text to take validation text from; add text, or raise --val_fraction."
    return f"{source}: no text for {split}; every document is empty or left out."


def _publish(data_dir: Path, tokenizer_dir: Path) -> None:
    """Move complete tokens and their tokenizer into place; also finishes this for a killed call."""
    folder = manifest.tokens_dir(data_dir)
    building = folder / BUILDING
    finished = manifest.read_file(building / "manifest.json")
    if finished is None:
        return
    # From here to the new manifest nothing counts as complete.
    manifest.manifest_path(data_dir).unlink(missing_ok=True)
    # The call that was killed may have named another folder for its tokenizer.
    tokenizer_dir = Path(_read_started(data_dir).get("tokenizer_dir", tokenizer_dir))
    if (building / "tokenizer" / "tokenizer.json").is_file():
        files = tokenizers.from_folder(building / "tokenizer")
        tokenizers.install(files, tokenizers.origin(building / "tokenizer"), tokenizer_dir)
    # All results are in the folder of the units: "units", or "cut" for few documents. tokenize_corpus leaves only one.
    # What a killed call has moved already is not found again.
    for name in (*SPLITS, "text"):
        for folder_of_results in building.glob(f"*/{name}/"):
            # Windows cannot rename over a folder. A kill between the two steps is harmless, because the manifest is
            # deleted already.
            shutil.rmtree(folder / name, ignore_errors=True)
            rename(folder_of_results, folder / name)
    if not finished.keeps_text:
        shutil.rmtree(folder / "text", ignore_errors=True)
    # Last: from here on the tokens count as complete.
    rename(building / "manifest.json", manifest.manifest_path(data_dir))
    shutil.rmtree(building)


def _summary(result: Manifest) -> str:
    lines = [f"{'':6} {'documents':>12} {'tokens':>15} {'text':>12}"]
    for name, split in result.splits.items():
        lines.append(f"{name:6} {split.documents:>12,} {split.tokens:>15,} {split.bytes / 1e6:>9,.2f} MB")
    left_out = {
        "empty documents left out.": "empty_documents",
        "training documents left out that also occur in the validation text.": "dropped_duplicates",
        "rows left out that could not be read (--skip_broken).": "broken_rows",
    }
    for what, name in left_out.items():
        number = sum(getattr(split, name) for split in result.splits.values())
        if number:
            lines.append(f"{number:,} {what}")
    return "\n".join(lines)


def _log_to_wandb(args: PrepareArgs) -> None:
    # In a run on several devices every process prepares.
    if int(os.environ.get("RANK", 0)) > 0:
        return
    from litmoe.data import artifacts

    artifacts.log_dataset(
        args.data_dir,
        tokenizer_dir=args.tokenizer_dir,
        name=args.wandb_artifact,
        project=args.wandb_project,
        entity=args.wandb_entity,
    )


# --- one process at a time ---


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Lock a folder that is being prepared. Folders that the call made and left empty are removed afterwards."""
    from filelock import FileLock, Timeout

    made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--data_dir {data_dir}: it, or a folder above it, is a file; expected a folder.") from None
    if not os.access(data_dir, os.W_OK):
        # Prepared tokens can be used from a read-only folder.
        yield
        return
    # The operating system releases the lock when a process ends, so a killed call does not block the next one.
    lock = FileLock(data_dir / LOCK)
    try:
        # Try without waiting first, to tell the user why the call waits.
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {data_dir}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, or not there
            (data_dir / "tokens").rmdir()
        if made and os.listdir(data_dir) == [LOCK]:
            _remove_unused(lock, made)
        lock.release()


def _remove_unused(lock: "FileLock", made: list[Path]) -> None:
    """Remove the folders that a call made and left empty, unless another process has come to use them."""
    # POSIX must delete the lock file before another process locks it; Windows cannot delete an open file.
    if os.name == "nt":
        lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()
        for folder in made:
            folder.rmdir()
