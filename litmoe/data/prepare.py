"""Prepare a data folder: text to tokens, with a manifest that says what the tokens were made from.

``prepare`` runs these steps in order. Each step compares its inputs with what the folder contains, and is skipped if
nothing changed. Flags are never taken over from an earlier call.

1. Find the corpus: built in, on the Hub, the user's own files, or text in place in DATA_DIR/train and DATA_DIR/val.
2. Write its text to DATA_DIR/train and DATA_DIR/val, unless it is streamed or in place already.
3. Get the tokenizer: from the Hub, a folder, or trained on the text.
4. Tokenize the text to DATA_DIR/tokens, and write the manifest last.

Everything is built in hidden folders and moved into place at the end. A killed call leaves nothing that looks complete,
and the same command resumes it.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from litmoe.checksummed_json import read_json, write_json
from litmoe.cli import UserError, quoted
from litmoe.data import corpora, manifest, tokenizers, tokens
from litmoe.data.corpora import DEFAULT_VAL_FRACTION, Corpus, HubDataset
from litmoe.data.documents import END_OF_TEXT, SPLITS, Batch, Rules, Unit, read_unit
from litmoe.data.files import (
    COMPRESSED_TO_TEXT,
    READABLE,
    Unfinished,
    is_compressed,
    is_readable,
    is_remote,
    kinds,
    text_files,
    unread_files,
    visible_files,
)
from litmoe.data.manifest import FileRecord, Manifest, Settings, Source, Split, TextOrigin, TokenizerRecord
from litmoe.data.tokenizers import TokenizerFiles, TokenizerInfo

INCOMING = ".incoming"  # text that is being written, below data_dir
BUILDING = ".building"  # tokens that are being made, below data_dir/tokens
LOCK = ".prepare.lock"
PROOF_DOCUMENTS = 64  # of the first, the middle and the last file: tiktoken must give the tokenizer's ids for them
PROGRESS_SECONDS = 10
PACKAGES = ("litdata", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass
class PrepareArgs:
    """Turn text into tokens for training.

    With --instruct, conversations are prepared instead: `prepare_data.py --instruct stories --help`.
    """

    source: str | None = None
    """Where the text comes from: a file (.txt, .md, .jsonl, .json, .csv, .tsv, each also as .gz, .bz2, .xz or .zst, or
    .parquet); a folder of such files (files named val, valid, validation or dev are validation text, files named test
    are left out); `sample` (built-in stories, no network); a corpus of the Hugging Face Hub by name (`tinystories`, 2.1
    million stories, 1.9 GB; `shakespeare`, 1 MB; `wikitext-103`, 0.5 GB; `openwebtext`, 8.0 million documents, 9.0 B
    GPT-2 tokens; `fineweb-edu`, its sample-10BT, 9.7 million documents, 10 B GPT-2 tokens, 28 GB of parquet); or
    `hf:ORG/NAME[:CONFIG]`, any dataset of the Hub with a column of text. Default: the text in DATA_DIR/train and
    DATA_DIR/val, or else tinystories."""
    data_dir: Path = Path("data/custom_text")
    """Folder of the corpus: text in train/ and val/, tokens in tokens/."""
    tokenizer: str | None = None
    """A tokenizer of the Hugging Face Hub, a folder with a tokenizer.json, or `train`: a byte-level BPE trained on this
    text. Default: the one in TOKENIZER_DIR, or else gpt2."""
    tokenizer_dir: Path = Path("data/tokenizer")
    """Folder where the tokenizer is stored."""
    vocab_size: int | None = None
    """Number of tokens of a trained tokenizer (default 8192); a small text may give fewer."""
    val_fraction: float | None = None
    """Share of the documents that become validation text, chosen by their hash, if the corpus has none (default 0.1;
    openwebtext 0.0005, fineweb-edu 0.001, hf: 0.01)."""
    document_separator: str = ""
    """A line of a .txt that ends a document, in addition to the line <|endoftext|>; '\\n' is an empty line. Without
    such a line a file is one document."""
    text_column: str | None = None
    """Field of a .jsonl or .json, or column of a .parquet, .csv or .tsv, that holds the text. Default: `text`, or the
    only one with text (a .csv or .tsv must have a column `text` then)."""
    max_documents: int | None = None
    """Take at most this many documents from the beginning of the source (for a quick try)."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, such as a line of a .jsonl that is not JSON, and count them."""
    keep_text: bool = False
    """Also write the text of a Hub corpus to DATA_DIR/train and DATA_DIR/val, not only its tokens."""
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


def prepare(args: PrepareArgs) -> Manifest:
    """Make ``data_dir`` contain the complete tokens of the text, and ``tokenizer_dir`` the tokenizer.

    Does nothing if they are up to date. Several processes may call it for the same folder: one of them builds, and the
    others wait.

    Returns:
        The manifest of the tokens.

    Raises:
        UserError: the text, the tokenizer or the flags have a mistake. Nothing is written or lost then.
    """
    _check_flags(args)
    unfinished = (args.data_dir / INCOMING, manifest.tokens_dir(args.data_dir) / BUILDING)
    found = None
    if not any(folder.exists() for folder in unfinished):
        # Without the lock, so that a read-only folder can be used. If another process is writing, ask again below.
        with suppress(UserError, OSError):
            found = _if_up_to_date(args)
    if found is None:
        with locked(args.data_dir):
            _publish_text(args.data_dir)
            _publish_tokens(args.data_dir, args.tokenizer_dir)
            found = _if_up_to_date(args)
            try:
                found = found or _build(args)
            except KeyboardInterrupt:
                print("\nStopped. Finished parts are kept; run the same command again to resume.")
                raise
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
    if args.log_to_wandb or os.environ.get("WANDB_LOG_DATASET") == "1":
        _log_to_wandb(args)
    return found


def _check_flags(args: PrepareArgs) -> None:
    """Raise one ``UserError`` with all problems that are visible before anything is read."""
    problems = []
    source = corpora.find(args.source) if args.source is not None else None
    if isinstance(source, Path):
        corpora.source_files(source)
        path, data_dir = source.resolve(), args.data_dir.resolve()
        prepared = [data_dir / name for name in (*SPLITS, "tokens")]
        if path == data_dir or any(path.is_relative_to(folder) for folder in prepared):
            problems.append(f"--source {source} is the prepared text; leave out --source to use it.")
        elif data_dir.is_relative_to(path):
            problems.append(f"--data_dir {args.data_dir} is inside of --source {source}; choose one outside of it.")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction}: expected a number between 0 and 1, such as 0.1.")
    if "\n" in (args.separator or ""):
        problems.append(f"--document_separator {args.document_separator!r}: expected one line; '\\n' is an empty one.")
    if args.vocab_size is not None and args.tokenizer != "train":
        problems.append("--vocab_size needs --tokenizer train; other tokenizers have a fixed size.")
    if args.vocab_size is not None and args.vocab_size < 257:
        problems.append(f"--vocab_size {args.vocab_size}: expected 257 or more (256 bytes and {END_OF_TEXT}).")
    if args.max_documents is not None and args.max_documents < 1:
        problems.append(f"--max_documents {args.max_documents}: expected 1 or more.")
    if args.num_workers is not None and args.num_workers < 0:
        problems.append(f"--num_workers {args.num_workers}: expected 0 or more.")
    if problems:
        raise UserError("\n".join(problems))


# --- what the folder contains, and what must be done ---


@dataclass(frozen=True)
class DataDir:
    """What a data folder contains."""

    path: Path
    manifest: Manifest | None
    text: dict[str, tuple[FileRecord, ...]]
    """The text files of each split that has some."""
    origin: TextOrigin | None
    """Where the text was written from, None for text that the user put there."""

    @classmethod
    def read(cls, path: Path) -> "DataDir":
        """Look at the folder. Files with known size and time are not read again."""
        found, origin = manifest.read(path), manifest.read_origin(path)
        known = [record for split in found.splits.values() for record in split.text] if found else []
        known += [record for records in origin.text.values() for record in records] if origin else []
        files = {split: text_files(path / split) for split in SPLITS}
        text = {split: manifest.refresh(paths, path, known) for split, paths in files.items() if paths}
        return cls(path, found, text, origin)

    @property
    def text_is_as_written(self) -> bool:
        """Whether nobody changed the text since it was written from its source."""
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
    def known_source(self) -> tuple[str, str | None, Settings] | None:
        """Name, location and settings of the source of the text or the streamed tokens; None for the user's text."""
        if self.origin is not None:
            return self.origin.name, self.origin.location, self.origin.settings
        if self.streamed is not None:
            return self.streamed.source.name, self.streamed.source.location, self.streamed.settings
        return None

    def corpus(self, args: PrepareArgs) -> Corpus | None:
        """Return the text in place as a corpus, None without text."""
        if not self.text:
            return None
        files: dict[str, list[Any]] = {
            split: [self.path / record.path for record in records] for split, records in self.text.items()
        }
        if self.origin is not None and self.text_is_as_written:
            origin = self.origin
            return Corpus(origin.name, origin.location, files, self.text, origin.settings, written_here=True)
        settings = _settings(args, None)
        if "val" in files:
            settings = replace(settings, val_fraction=None)
        return Corpus("text", "", files, self.text, settings)


def _settings(args: PrepareArgs, source: str | None) -> Settings:
    """Return the settings of the flags, with the defaults of a source."""
    fraction = args.val_fraction
    if fraction is None:
        dataset = corpora.find(source) if source else None
        # A thousandth of a few documents is none.
        use_own = isinstance(dataset, HubDataset) and not args.max_documents
        fraction = dataset.val_fraction if use_own and isinstance(dataset, HubDataset) else DEFAULT_VAL_FRACTION
    return Settings(fraction, args.separator, args.text_column, args.max_documents, args.skip_broken)


def _differences(old: Settings, new: Settings) -> list[str]:
    """Name the settings that differ."""
    before = asdict(old)
    return [f"{name} {before[name]!r} became {value!r}" for name, value in asdict(new).items() if before[name] != value]


def _if_up_to_date(args: PrepareArgs) -> Manifest | None:
    """Return the manifest if nothing must be done, and say so."""
    data = DataDir.read(args.data_dir)
    found = data.manifest
    if found is None or args.overwrite or _tokenizer_to_install(args, data.text or _text_records(found)):
        return None
    fingerprint = manifest.tokenizer_fingerprint(args.tokenizer_dir)
    if _source_to_read(args, data, fingerprint) is not None:
        return None
    corpus = data.corpus(args)
    if corpus is None and found.tokenizer.sha256 != fingerprint:
        return None
    if corpus is not None and any(_stale_splits(corpus, found, fingerprint).values()):
        return None
    print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
    print(_summary(found))
    return found


def _text_records(found: Manifest) -> dict[str, tuple[FileRecord, ...]]:
    return {split: entry.text for split, entry in found.splits.items()}


def _records_of(corpus: Corpus, split: str) -> tuple[FileRecord, ...]:
    """Return the files that a split is made from. Without validation text, both splits come from train."""
    return corpus.records.get(split, corpus.records["train"])


def _stale_splits(corpus: Corpus, found: Manifest | None, tokenizer: str) -> dict[str, list[str]]:
    """Return for each split the reasons why its tokens must be built."""
    if found is None:
        return {split: ["not tokenized yet"] for split in SPLITS}
    # The settings of text from a source were applied when it was written.
    common = [] if corpus.written_here else _differences(found.settings, corpus.settings)
    if found.tokenizer.sha256 != tokenizer:
        common.append("another tokenizer")
    return {
        split: manifest.changed_files(found.splits[split].text, _records_of(corpus, split)) + common for split in SPLITS
    }


def _source_to_read(args: PrepareArgs, data: DataDir, tokenizer: str | None) -> list[str] | None:
    """Return the reasons to read ``--source``, None to use what the folder contains.

    Args:
        args: the flags.
        data: what the folder contains.
        tokenizer: fingerprint of the tokenizer, None if it is not known yet.

    Raises:
        UserError: the flags contradict what the folder contains.
    """
    pending = _pending_stream(data)
    if pending not in (None, args.source) and not args.overwrite:
        raise UserError(
            f"{data.path} contains the unfinished preparation of {pending}. Resume it with --source "
            f"{quoted(str(pending))}, choose another --data_dir, or delete it with --overwrite."
        )
    if args.source is None:
        return _check_without_source(args, data)
    known = data.known_source
    is_empty = not data.text and data.manifest is None
    if is_empty or args.overwrite:
        return []
    if known is None or not _is_same_source(args.source, known[0], known[1]):
        what = f"{known[0]} ({known[1]})" if known else "text"
        raise UserError(
            f"{data.path} already contains {what}, which --source {args.source} would replace. Choose another "
            "--data_dir, leave out --source to use the existing data, or replace it with --overwrite."
        )
    if data.text and not data.text_is_as_written:
        raise UserError(
            f"the text in {data.path} was changed since it was written from {known[1]}. Leave out --source to use it "
            "as it is, or write it again with --overwrite."
        )
    wanted = _settings(args, args.source)
    if known[2].val_fraction is None:
        # The source has its own validation text.
        wanted = replace(wanted, val_fraction=None)
    reasons = _differences(known[2], wanted)
    if data.origin is not None and data.origin.name == "files":
        current = corpora.open_local(args.source, wanted)
        records = [record for records in current.records.values() for record in records]
        reasons += manifest.changed_files(data.origin.source_files, records)
    if data.streamed is not None:
        if args.keep_text:
            reasons.append("--keep_text")
        if tokenizer != data.streamed.tokenizer.sha256:
            reasons.append("another tokenizer")
    return reasons or None


def _check_without_source(args: PrepareArgs, data: DataDir) -> list[str] | None:
    """Check a call without --source, which uses the text in place or the finished tokens.

    Returns:
        An empty list if the folder is empty, so that the default corpus is read; else None.
    """
    check_placed_text(data.path)
    if "val" in data.text and "train" not in data.text:
        raise UserError(
            f"{data.path / 'val'} contains text and {data.path / 'train'} none; put the training text there, or name a "
            "--source."
        )
    if not data.text and data.manifest is None:
        return []
    given = [name for name in ("val_fraction", "text_column", "max_documents") if getattr(args, name) is not None]
    given += ["document_separator"] * (args.separator is not None) + ["keep_text"] * args.keep_text
    known = data.known_source
    if known is not None and (data.streamed or data.text_is_as_written) and given:
        source = known[1] if known[0] == "files" else known[0]
        raise UserError(
            f"the text of {data.path} was taken from {source}, so --{' and --'.join(given)} can only be applied by "
            f"reading it again: add --source {quoted(str(source))}."
        )
    if data.text and args.max_documents is not None:
        raise UserError("--max_documents needs a --source; text in place is taken completely.")
    if not data.text and args.overwrite:
        raise UserError(f"there is no text in {data.path} to make its tokens from; name a --source.")
    return None


def _is_same_source(source: str, name: str, location: str | None) -> bool:
    if source in corpora.CORPORA or corpora.is_hub(source):
        return source == name
    return (name, location) == ("files", str(Path(source).resolve()))


def check_placed_text(data_dir: Path) -> None:
    """Raise ``UserError`` for text in a wrong place, which would be ignored and replaced by another corpus."""
    for split in SPLITS:
        folder = data_dir / split
        unread = unread_files(folder)
        if unread and not text_files(folder):
            raise UserError(
                f"nothing in {folder} can be read (it has {kinds(unread)}); expected files of {READABLE}. Put text "
                "there, or move these files away and name a --source."
            )
    if (data_dir / "train").is_dir() or manifest.manifest_path(data_dir).exists():
        return
    # A folder with a tokenizer has text files such as merges.txt.
    loose = [] if (data_dir / "tokenizer.json").exists() else sorted(data_dir.glob("*"))
    for path in loose:
        named = corpora.split_name(path.name.split(".")[0])
        is_text = bool(text_files(path)) if path.is_dir() else is_readable(path) and path.suffix not in (".md", ".json")
        if is_text and path.name not in SPLITS and (named in SPLITS or path.is_file()):
            place = data_dir / (named or "train")
            raise UserError(
                f"{path} is not read: move it to {place if path.is_dir() else place / path.name}, or name it: --source "
                f"{quoted(path)} --data_dir ANOTHER."
            )


def _pending_stream(data: DataDir) -> str | None:
    """Return the Hub corpus whose preparation was interrupted in a folder without anything else."""
    if data.text or data.manifest is not None:
        return None
    return _read_stream(data.path).get("source")


def _read_stream(data_dir: Path) -> dict[str, Any]:
    """Return source, revision and settings of an interrupted stream; empty without one."""
    try:
        return dict(read_json(manifest.tokens_dir(data_dir) / BUILDING / "stream.json"))
    except (OSError, ValueError, TypeError):
        return {}


# --- the tokenizer ---


def _tokenizer_to_install(args: PrepareArgs, text: dict[str, tuple[FileRecord, ...]]) -> str | None:
    """Return the tokenizer to put into ``tokenizer_dir``, None if the right one is there.

    Args:
        args: the flags.
        text: the training text, which a trained tokenizer depends on.
    """
    if not (args.tokenizer_dir / "tokenizer.json").is_file():
        return args.tokenizer or tokenizers.DEFAULT
    if args.tokenizer is None:
        # A tokenizer.json from elsewhere may not say which tokens begin and end a text: complete it.
        return None if tokenizers.is_complete(args.tokenizer_dir) else str(args.tokenizer_dir)
    if args.overwrite:
        return args.tokenizer
    origin = tokenizers.origin(args.tokenizer_dir)
    if args.tokenizer == "train":
        is_right = origin == _train_origin(args, text.get("train", ()))
    elif Path(args.tokenizer).is_dir():
        wanted = tokenizers.from_folder(Path(args.tokenizer)).sha256
        is_right = wanted == manifest.tokenizer_fingerprint(args.tokenizer_dir)
    else:
        is_right = origin.get("name") == args.tokenizer
    return None if is_right else args.tokenizer


def _train_origin(args: PrepareArgs, records: tuple[FileRecord, ...]) -> dict[str, Any]:
    """Return everything that a trained tokenizer depends on."""
    return {
        "name": "train",
        "vocab_size": args.vocab_size or tokenizers.DEFAULT_VOCAB_SIZE,
        "data_dir": _relative(args.tokenizer_dir, args.data_dir),
        "text": manifest.text_fingerprint(records),
    }


def _relative(folder: Path, other: Path) -> str:
    """Return the path from one folder to another. It stays true when both are moved."""
    try:
        return Path(os.path.relpath(other, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return other.name


def _get_tokenizer(args: PrepareArgs, name: str | None) -> TokenizerFiles | None:
    """Load the tokenizer to install; None if it will be trained, or is in its place.

    Raises:
        UserError: it does not exist, or would replace another one.
    """
    if name is None:
        tokenizers.load(args.tokenizer_dir)
        return None
    existing = tokenizers.origin(args.tokenizer_dir)
    files = None
    if name == "train":
        # A tokenizer trained on another text may be in use by other data and models.
        is_same_text = existing.get("data_dir") == _relative(args.tokenizer_dir, args.data_dir)
        may_replace = existing.get("name") == "train" and is_same_text
    else:
        files = tokenizers.from_folder(Path(name)) if Path(name).is_dir() else tokenizers.from_hub(name)
        may_replace = Path(name) == args.tokenizer_dir
        with suppress(UserError):
            may_replace |= manifest.tokenizer_fingerprint(args.tokenizer_dir) == files.sha256
    if (args.tokenizer_dir / "tokenizer.json").is_file() and not (may_replace or args.overwrite):
        what = "a newly trained one" if name == "train" else name
        raise UserError(
            f"{args.tokenizer_dir} already contains another tokenizer ({existing.get('name', 'of unknown origin')}), "
            f"which {what} would replace. Choose another --tokenizer_dir, leave out --tokenizer to use the existing "
            "one, or replace it with --overwrite."
        )
    return files


def _train_tokenizer(args: PrepareArgs, corpus: Corpus, folder: Path, origin: dict[str, Any]) -> TokenizerFiles:
    if tokenizers.origin(folder) == origin:  # an interrupted call trained it
        return tokenizers.from_folder(folder)
    print(f"Training a tokenizer of {origin['vocab_size']:,} tokens on the training text")
    files = tokenizers.train(_training_sample(corpus), origin["vocab_size"])
    size = len(files.tokenizer["model"]["vocab"])
    if size < origin["vocab_size"]:
        print(f"  This text gives no more than {size:,} tokens.")
    return files


def _training_sample(corpus: Corpus) -> Iterator[str]:
    """Yield about ``TRAINING_BYTES`` of training text: blocks from everywhere in local text, the beginning of a stream.

    Few documents may all be validation text. Then the beginnings of the documents are taken, as in the tokens.
    """
    records = corpus.records["train"]
    is_stream = any(is_remote(file) for file in corpus.files["train"])
    stored = sum(record.bytes * (COMPRESSED_TO_TEXT if is_compressed(record.path) else 1) for record in records)
    every = 1 if is_stream else max(1, -(-stored // tokenizers.TRAINING_BYTES))
    for cut in (False, True):
        size = 0
        for text in _every_block(corpus, replace(corpus.rules, cut=cut), every):
            yield text
            size += len(text)
            if is_stream and size >= tokenizers.TRAINING_BYTES:
                return
        if size:
            return


def _every_block(corpus: Corpus, rules: Rules, every: int) -> Iterator[str]:
    """Yield the training documents of the first of every ``every`` blocks of text."""
    block = 0
    for unit in corpus.unit_groups(["train"])[0]:
        size = 0
        for text in _train_documents(unit, rules, corpus.settings.max_documents):
            if block % every == 0:
                yield text
            size += len(text.encode())
            if size >= tokenizers.BLOCK_BYTES - 1:
                block, size = block + 1, 0
            else:
                size += len(f"\n{END_OF_TEXT}\n")
        block += size > 0


def _train_documents(unit: Unit, rules: Rules, limit: int | None) -> Iterator[str]:
    for item in read_unit(unit, replace(rules, divide_long=False), set(), limit):
        if isinstance(item, Batch) and item.split == "train":
            yield from item.texts


# --- building ---


def _build(args: PrepareArgs) -> Manifest:
    """Build everything that is missing or out of date, then move it into place."""
    started = time.perf_counter()
    data = DataDir.read(args.data_dir)
    # The tokenizer comes first: it may not be available, and reading the text may take long.
    name = _tokenizer_to_install(args, data.text or (_text_records(data.manifest) if data.manifest else {}))
    files = _get_tokenizer(args, name)
    existing = manifest.tokenizer_fingerprint(args.tokenizer_dir) if name is None else None
    reasons = _source_to_read(args, data, files.sha256 if files else existing)
    try:
        corpus = data.corpus(args)
        if reasons is not None:
            corpus, data = _read_source(args, data, reasons)
        if corpus is None:
            return _bring_back_tokenizer(args, data, name, files)
        found = _tokenize(args, data, corpus, name, files)
    except Unfinished:
        raise
    except UserError:
        # The same mistake would stop the next call too, so there is nothing to resume.
        shutil.rmtree(manifest.tokens_dir(args.data_dir) / BUILDING, ignore_errors=True)
        shutil.rmtree(args.data_dir / INCOMING, ignore_errors=True)
        raise
    print(_summary(found))
    print(f"Prepared in {time.perf_counter() - started:.1f} s. The tokens can be used with any context length.")
    return found


def _read_source(args: PrepareArgs, data: DataDir, reasons: list[str]) -> tuple[Corpus, DataDir]:
    """Open the source as a stream, or write its text to the data folder.

    Returns:
        The corpus to tokenize, and the data folder with the text.
    """
    source = args.source or corpora.DEFAULT
    settings = _settings(args, source)
    _refuse_foreign_files(data)
    why = f" again ({'; '.join(reasons)})" if reasons else ""
    if not corpora.is_hub(source):
        print(f"Writing the text of {source} to {args.data_dir}{why}")
        corpus = corpora.open_local(source, settings)
        if corpus.name == "files" and Path(source).is_dir():
            print(corpora.sort_files(Path(source)).report(Path(source)), end="\n")
    else:
        print(f"Streaming {source}{why}")
        dataset = corpora.find(source)
        assert isinstance(dataset, HubDataset)
        pending = _read_stream(args.data_dir)
        # An interrupted stream continues with the same revision of the dataset.
        corpus = dataset.open(settings, pending.get("revision") if pending.get("source") == source else None)
        building = manifest.tokens_dir(args.data_dir) / BUILDING
        building.mkdir(parents=True, exist_ok=True)
        write_json(building / "stream.json", {"source": source, "revision": corpus.revision})
        if not args.keep_text and not (data.origin is not None and data.text and not args.overwrite):
            return corpus, data
    _write_text(args, corpus)
    data = DataDir.read(args.data_dir)
    in_place = data.corpus(args)
    assert in_place is not None, "the text was just written"
    return in_place, data


def _refuse_foreign_files(data: DataDir) -> None:
    """Raise ``UserError`` if new text would replace files that this project did not read or write."""
    known = {data.path / record.path for records in data.text.values() for record in records}
    foreign = [path for split in SPLITS for path in visible_files(data.path / split) if path not in known]
    if data.origin is None and (data.path / "source.json").exists():
        foreign.append(data.path / "source.json")
    if foreign:
        names = ", ".join(path.relative_to(data.path).as_posix() for path in foreign[:3])
        raise UserError(
            f"{data.path} contains files that are not this project's ({names}), in the place of the text; choose "
            "another --data_dir, or move them away."
        )


def _process(
    args: PrepareArgs,
    corpus: Corpus,
    splits: list[str],
    rules: Rules,
    encode: Callable[[Any], bytes],
    folder: Path,
    inputs: list[Any],
) -> tuple[tokens.UnitStore, list[tokens.UnitRecord]]:
    """Process all units of a corpus. Few documents that are all in one split are cut in two, and processed again.

    Args:
        args: the flags.
        corpus: the text.
        splits: the splits to make.
        rules: how the files become documents.
        encode: makes the stored bytes of a batch.
        folder: of the finished units.
        inputs: everything that the result depends on, in addition to the corpus.
    """
    workers = args.num_workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    contents = {split: manifest.contents(records) for split, records in corpus.records.items()}
    total = sum(record.bytes for records in corpus.records.values() for record in records)
    for cut in (False, True):
        rules = replace(rules, cut=cut)
        values = [manifest.FORMAT, contents, asdict(rules), corpus.settings.max_documents, splits, inputs]
        # A finished first attempt without cutting is only repeated if its documents were all in one split.
        store = tokens.UnitStore(folder / ("cut" if cut else "units"), sha256(json.dumps(values).encode()).hexdigest())
        groups = corpus.unit_groups(splits if "val" in corpus.files else SPLITS)
        progress = _progress(total if corpus.settings.max_documents is None else None)
        records = tokens.process_units(groups, rules, encode, store, workers, corpus.settings.max_documents, progress)
        documents = tokens.totals_of(records).documents
        if rules.val_fraction is None or all(documents.values()) or not any(documents.values()):
            break
        if not cut:
            number = sum(documents.values())
            print(
                f"{number} document{'s' if number != 1 else ''}: too few to split by document, so the last "
                f"{100 * rules.val_fraction:g}% of each becomes validation text."
            )
    return store, records


def _write_text(args: PrepareArgs, corpus: Corpus) -> None:
    """Write the documents of a corpus to DATA_DIR/train and DATA_DIR/val."""
    incoming = args.data_dir / INCOMING
    rules = replace(corpus.rules, divide_long=False)
    store, records = _process(args, corpus, list(SPLITS), rules, tokens.encode_text, incoming, ["text"])
    totals = tokens.totals_of(records)
    for split in SPLITS:
        if not totals.documents[split]:
            raise UserError(_no_text(corpus, split))
        tokens.write_shards(store, records, split, incoming / split)
    text = {split: manifest.refresh(text_files(incoming / split), incoming, ()) for split in SPLITS}
    source_files = tuple(record for split in corpus.files for record in corpus.records[split])
    counts = totals.empty_documents, totals.dropped_duplicates, totals.broken_rows
    origin = TextOrigin(corpus.name, corpus.location, corpus.settings, source_files, text, *counts)
    manifest.write_origin(incoming, origin)  # last: from here on the text counts as complete
    _publish_text(args.data_dir)


def _no_text(corpus: Corpus, split: str) -> str:
    source = corpus.location if corpus.name == "files" else corpus.name
    if split == "val" and "val" not in corpus.files:
        return f"{source}: too little text to take validation text from; give more, or a larger --val_fraction."
    return f"{source}: no text for {split}; every document is empty or left out."


def _publish_text(data_dir: Path) -> None:
    """Move text that was written completely into place; also finishes this for a killed call."""
    incoming = data_dir / INCOMING
    if not (incoming / "source.json").is_file():
        return
    # The manifest goes first, so that tokens of another text never look complete.
    manifest.manifest_path(data_dir).unlink(missing_ok=True)
    for split in SPLITS:
        if (incoming / split).is_dir():
            manifest.replace_folder(incoming / split, data_dir / split)
    os.replace(incoming / "source.json", data_dir / "source.json")
    shutil.rmtree(incoming)


def _bring_back_tokenizer(args: PrepareArgs, data: DataDir, name: str | None, files: TokenizerFiles | None) -> Manifest:
    """Install the tokenizer of tokens without text.

    Raises:
        UserError: the tokens need another tokenizer, and there is no text to make them again.
    """
    found = data.manifest
    assert found is not None, "without text and tokens a source is read"
    if name == "train":
        raise UserError(f"there is no text in {data.path} to train a tokenizer on; name a --source.")
    fingerprint = files.sha256 if files else manifest.tokenizer_fingerprint(args.tokenizer_dir)
    if fingerprint != found.tokenizer.sha256:
        raise UserError(
            f"the tokens of {data.path} were made with another tokenizer ({found.tokenizer.name}), and its text is not "
            "there. Bring back the text or that tokenizer (--tokenizer), or name a --source."
        )
    if files is not None:
        tokenizers.install(files, {"name": _shown_name(str(name))}, args.tokenizer_dir)
        found = replace(found, tokenizer=_tokenizer_record(tokenizers.load(args.tokenizer_dir)))
        manifest.write(args.data_dir, found)
    return found


def _shown_name(tokenizer: str) -> str:
    """Return the name of a tokenizer without the path of its folder: manifests are shared."""
    return Path(tokenizer).resolve().name if Path(tokenizer).is_dir() else tokenizer


def _tokenizer_record(info: TokenizerInfo) -> TokenizerRecord:
    return TokenizerRecord(info.name, info.sha256, info.vocab_size, info.eos_token, info.eos_id)


def _tokenize(
    args: PrepareArgs, data: DataDir, corpus: Corpus, name: str | None, files: TokenizerFiles | None
) -> Manifest:
    """Make the tokens of a corpus with the right tokenizer, and move both into place."""
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    folder = args.tokenizer_dir
    origin = {"name": _shown_name(str(name))}
    if args.tokenizer == "train" and files is None:
        origin = _train_origin(args, corpus.records["train"])
        if args.overwrite or tokenizers.origin(args.tokenizer_dir) != origin:
            files = _train_tokenizer(args, corpus, building / "tokenizer", origin)
    if files is not None:
        folder = building / "tokenizer"
        tokenizers.install(files, origin, folder)
    info = tokenizers.load(folder)
    _describe_tokenizer(args, info, files)
    stale = {split: ["from the Hub"] for split in SPLITS}
    if corpus.name == "text" or corpus.written_here:
        stale = _stale_splits(corpus, data.manifest, info.sha256)
        _report_unread(args.data_dir, corpus)
    if args.overwrite:
        stale = {split: ["--overwrite"] for split in SPLITS}
    splits = {split: data.manifest.splits[split] for split in SPLITS if not stale[split] and data.manifest}
    splits |= _make_splits(args, corpus, info, {split: why for split, why in stale.items() if why}, building)
    found = Manifest(
        format=manifest.FORMAT,
        source=_source_of(corpus, data.origin),
        tokenizer=_tokenizer_record(info),
        settings=corpus.settings,
        splits={split: replace(splits[split], text=_records_of(corpus, split)) for split in SPLITS},
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    )
    manifest.write_file(building / "manifest.json", found)  # from here on the tokens count as complete
    _publish_tokens(args.data_dir, args.tokenizer_dir)
    return found


def _describe_tokenizer(args: PrepareArgs, info: TokenizerInfo, files: TokenizerFiles | None) -> None:
    begins = f"begins with {info.bos_token!r}, id {info.bos_id}, and " if info.bos_token else ""
    inferred = " (the tokenizer does not name it, but no other token is possible)" if files and files.inferred else ""
    print(
        f"Tokenizer in {args.tokenizer_dir} ({info.name}): {info.vocab_size:,} tokens, so a model needs a "
        f"padded_vocab_size of that or more. Each document {begins}ends with {info.eos_token!r}, id {info.eos_id}"
        f"{inferred}."
    )


def _report_unread(data_dir: Path, corpus: Corpus) -> None:
    for split in corpus.files:
        unread = unread_files(data_dir / split)
        if unread:
            print(f"{data_dir / split}: {corpora.not_read(data_dir / split, unread)}")


def _source_of(corpus: Corpus, origin: TextOrigin | None) -> Source:
    """Return the manifest's entry about the source."""
    fingerprint = manifest.text_fingerprint(record for records in corpus.records.values() for record in records)
    # Without the path of the user's files: manifests are shared.
    location = Path(corpus.location).name if corpus.name == "files" else corpus.location
    counts = (0, 0, 0)
    if corpus.written_here and origin is not None:
        counts = origin.empty_documents, origin.dropped_duplicates, origin.broken_rows
    return Source(corpus.name, location or None, fingerprint, *counts)


def _make_splits(
    args: PrepareArgs, corpus: Corpus, info: TokenizerInfo, stale: dict[str, list[str]], building: Path
) -> dict[str, Split]:
    """Tokenize the splits with reasons to do so, into folders below ``building``."""
    if not stale:
        return {}
    for split, reasons in stale.items():
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        print(f"Tokenizing {split}: {'; '.join(reasons[:3])}{more}")
    tokenizer_json = info.folder / "tokenizer.json"
    rules = replace(corpus.rules, divide_long=tokenizers.divides_between_words(tokenizer_json))
    fast = tokenizers.agrees_with_tiktoken(tokenizer_json, _proof(corpus, rules))
    encoder = tokenizers.Encoder(tokenizer_json, info.eos_id, info.bos_id, fast=fast)
    dtype = tokens.dtype_for(info.vocab_size)
    encode = tokens.TokenEncoder(encoder, dtype, info.bos_id, info.eos_id)
    store, records = _process(args, corpus, list(stale), rules, encode, building, [info.sha256])
    totals = tokens.totals_of(records)
    if totals.eot_in_text:
        print(f"{totals.eot_in_text:,} times {END_OF_TEXT} inside a line: taken as text, not as the end of a document.")
    splits = {}
    for split in stale:
        if not totals.documents[split]:
            raise UserError(_no_text(corpus, split))
        number, chunks = tokens.write_chunks(store, records, split, dtype)
        is_first = split == next(iter(stale))
        splits[split] = Split(
            documents=totals.documents[split],
            tokens=number,
            bytes=totals.bytes[split],
            # These were counted for all splits together.
            empty_documents=totals.empty_documents if is_first else 0,
            dropped_duplicates=totals.dropped_duplicates if is_first else 0,
            broken_rows=totals.broken_rows if is_first else 0,
            chunks=chunks,
            dtype=dtype,
            text=_records_of(corpus, split),
            files=manifest.checksums(store.folder / split),
        )
    return splits


def _proof(corpus: Corpus, rules: Rules) -> list[str]:
    """Return some documents of the corpus, on which the fast encoder is compared with the tokenizer's own."""
    if corpus.settings.max_documents is not None:
        units = [next(corpus.unit_groups()[-1])]
    else:
        files = corpus.files["train"]
        chosen = sorted({0, len(files) // 2, len(files) - 1})
        units = [Unit(0, "train", (files[i],), 0, range(1) if files[i] else None) for i in chosen]
    sample = []
    for unit in units:
        sample += list(islice(_train_documents(unit, rules, PROOF_DOCUMENTS), PROOF_DOCUMENTS))
    return [text[: 1 << 16] for text in sample]


def _publish_tokens(data_dir: Path, tokenizer_dir: Path) -> None:
    """Move complete tokens and their tokenizer into place; also finishes this for a killed call."""
    folder = manifest.tokens_dir(data_dir)
    building = folder / BUILDING
    found = manifest.read_file(building / "manifest.json")
    if found is None:
        return
    # From here to the new manifest nothing counts as complete.
    manifest.manifest_path(data_dir).unlink(missing_ok=True)
    if (building / "tokenizer" / "tokenizer.json").is_file():
        files = tokenizers.from_folder(building / "tokenizer")
        tokenizers.install(files, tokenizers.origin(building / "tokenizer"), tokenizer_dir)
    if corpora.is_hub(found.source.name):
        _remove_text(data_dir, found)
    for split in SPLITS:
        for chunks in building.glob(f"*/{split}"):
            manifest.replace_folder(chunks, folder / split)
    os.replace(building / "manifest.json", manifest.manifest_path(data_dir))
    shutil.rmtree(building)


def _remove_text(data_dir: Path, found: Manifest) -> None:
    """Remove the text of another corpus, which the streamed tokens replace."""
    if any((data_dir / record.path).exists() for split in found.splits.values() for record in split.text):
        return  # the text of these tokens
    for name in ("val", "train", "source.json"):
        path = data_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _summary(found: Manifest) -> str:
    lines = [f"{'':6} {'documents':>12} {'tokens':>15} {'text':>12}"]
    for name, split in found.splits.items():
        lines.append(f"{name:6} {split.documents:>12,} {split.tokens:>15,} {split.bytes / 1e6:>9,.2f} MB")
    counted: list[Source | Split] = [found.source, *found.splits.values()]
    empty = sum(entry.empty_documents for entry in counted)
    dropped = sum(entry.dropped_duplicates for entry in counted)
    broken = sum(entry.broken_rows for entry in counted)
    if empty:
        lines.append(f"{empty:,} empty documents left out.")
    if dropped:
        lines.append(f"{dropped:,} training documents left out that also occur in the validation text.")
    if broken:
        lines.append(f"{broken:,} rows left out that could not be read (--skip_broken).")
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


# --- one process at a time, and progress ---


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Lock a folder that is being prepared. Folders that the call made and left empty are removed afterwards."""
    from filelock import FileLock, Timeout

    parents = (data_dir, *data_dir.parents)
    made = [folder for folder in parents if not folder.exists()]
    for folder in parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--data_dir {data_dir}: {folder} is a file; expected a folder.")
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {data_dir}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            (data_dir / "tokens").rmdir()
        is_unused = [entry.name for entry in data_dir.iterdir()] == [LOCK]
        # Windows can't delete an open file, and POSIX must delete it before another process locks it.
        if is_unused and os.name != "nt":
            (data_dir / LOCK).unlink()
        lock.release()
        with suppress(OSError):
            if is_unused and os.name == "nt":
                (data_dir / LOCK).unlink()
            for folder in made:
                folder.rmdir()


def _progress(total: int | None) -> tokens.OnProgress:
    """Return a function that prints a line from time to time.

    Args:
        total: stored bytes of the corpus, None if only a part of it will be read.
    """
    started = last = time.perf_counter()
    resumed_at: int | None = None

    def report(documents: int, written: int, text_bytes: int, stored: int) -> None:
        nonlocal last, resumed_at
        now = time.perf_counter()
        if now - last < PROGRESS_SECONDS:
            return
        last = now
        line = f"  {documents:,} documents, {text_bytes / 1e6:,.1f} MB of text"
        if total and stored:
            left = (now - started) * (total - stored) / stored
            line += f", {100 * stored / total:.0f}%, {left:,.0f} s left"
        print(line, flush=True)

    return report
