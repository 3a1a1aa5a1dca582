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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from litmoe.checksummed_json import known_fields, read_checksummed, read_json, write_checksummed, write_json
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
from litmoe.data.corpora import DEFAULT_VAL_FRACTION, FILES, TEXT, Corpus, HubDataset
from litmoe.data.documents import END_OF_TEXT
from litmoe.data.files import READABLE, Unfinished, is_readable, kinds, text_files, unread_files, visible_files
from litmoe.data.manifest import SPLITS, FileRecord, Manifest, Settings, Source, Split, TokenizerRecord
from litmoe.data.tokenizers import TokenizerInfo

BUILDING = ".building"
"""Folder for tokens that are being made, below DATA_DIR/tokens."""
LOCK = ".prepare.lock"
PACKAGES = ("litdata", "tokenizers", "tiktoken", "datasets", "pyarrow")
# Flags that decide how a source is read.
SOURCE_FLAGS = ("val_fraction", "document_separator", "text_column", "max_documents", "skip_broken", "keep_text")
MINIMUMS = {"vocab_size": 257, "max_documents": 1, "num_workers": 0}
"""Smallest values of flags. A vocabulary contains 256 bytes and the end-of-text token."""


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
    """Also write the documents of the source as text to DATA_DIR/train and DATA_DIR/val, not only its tokens."""
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

    def check(self) -> None:
        """Raise one ``UserError`` with all problems that are visible before anything is read."""
        problems = self._problems_of_values()
        source = corpora.find(self.source) if self.source is not None else None
        if isinstance(source, Path):
            corpora.source_files(source)
            problems += self._problems_of_path(source)
        if problems:
            raise UserError("\n".join(problems))

    def _problems_of_values(self) -> list[str]:
        problems = []
        for name, minimum in MINIMUMS.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                problems.append(f"--{name} {value}: expected {minimum} or more.")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            problems.append(f"--val_fraction {self.val_fraction}: expected a number between 0 and 1, such as 0.1.")
        if self.separator is not None and "\n" in self.separator:
            problems.append(
                f"--document_separator {self.document_separator!r}: expected one line; '\\n' is an empty one."
            )
        if self.vocab_size is not None and self.tokenizer != "train":
            problems.append("--vocab_size needs --tokenizer train; other tokenizers have a fixed size.")
        return problems

    def _problems_of_path(self, source: Path) -> list[str]:
        """Name why the source cannot be read into ``data_dir``: one of them is inside of the other."""
        path, data_dir = source.resolve(), self.data_dir.resolve()
        prepared = [data_dir / name for name in (*SPLITS, "tokens")]
        if path == data_dir or any(path.is_relative_to(folder) for folder in prepared):
            return [f"--source {source} is the prepared text; leave out --source to use it."]
        if data_dir.is_relative_to(path):
            return [f"--data_dir {self.data_dir} is inside of --source {source}; choose one outside of it."]
        return []


def prepare(args: PrepareArgs) -> Manifest:
    """Make ``data_dir`` contain the complete tokens of the text, and ``tokenizer_dir`` the tokenizer.

    Does nothing if they are up to date. Several processes may call it for the same folder: one of them builds, and the
    others wait.

    Returns:
        The manifest of the tokens.

    Raises:
        UserError: the text, the tokenizer or the flags have a mistake. Nothing is written or lost then.
    """
    args.check()
    with locked(args.data_dir):
        _publish(args.data_dir, args.tokenizer_dir)
        found = manifest.read(args.data_dir)
        source = _choose_source(args, found)
        corpus = _open_local(args, source, found)
        tokenizer = _choose_tokenizer(args, corpus, found)
        changes = _changes(args, source, corpus, tokenizer, found)
        if found is not None and not changes:
            _remove_rest(args.data_dir, source)
            if tokenizer.files is not None:
                tokenizers.install(tokenizer.files, tokenizer.origin, args.tokenizer_dir)
            print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
            print(_summary(found))
        elif source is None:
            raise _no_source(args, found, tokenizer)
        else:
            # The Hub is asked only now: an unchanged folder needs no network.
            found = _build(args, source, corpus or _open_stream(args, source), tokenizer, changes)
    if args.log_to_wandb or os.environ.get("WANDB_LOG_DATASET") == "1":
        _log_to_wandb(args)
    return found


# --- what to do ---


def _choose_source(args: PrepareArgs, found: Manifest | None) -> str | None:
    """Return the source of the tokens: ``--source``, ``TEXT`` for text in place, or None for the tokens as they are.

    Raises:
        UserError: the source would replace something else, or the text is in a wrong place.
    """
    source = args.source
    if source is None:
        check_placed_text(args.data_dir)
        if any(text_files(args.data_dir / split) for split in SPLITS):
            source = TEXT
        elif found is None:
            _refuse_damaged_tokens(args.data_dir)
            source = corpora.DEFAULT
    if args.source is None and found is not None and found.source.name != TEXT and not args.overwrite:
        if _own_text(args.data_dir):
            print(
                f"The text in {args.data_dir} is not part of its tokens, which were made from {found.source.name}. To "
                "tokenize this text instead: --overwrite"
            )
        return None
    if source is not None and not args.overwrite:
        _refuse_replacing(args, source, found)
    if args.keep_text and source != TEXT and _own_text(args.data_dir):
        raise UserError(f"--keep_text would mix its text with yours in {args.data_dir}; choose another --data_dir.")
    return source


def _refuse_replacing(args: PrepareArgs, source: str, found: Manifest | None) -> None:
    """Raise ``UserError`` if a source would replace another one, or finished units of an interrupted call."""
    own_text = _own_text(args.data_dir) if source != TEXT else []
    existing = ""
    if found is not None and not _is_same(source, found.source):
        what = f"{found.source.name} ({found.source.location})" if found.source.location else found.source.name
        existing = f"the tokens of {what}, which --source {source} would replace"
    elif found is None and own_text:
        existing = f"files of your own ({', '.join(own_text[:3])}), which --source {source} would leave out"
    if existing:
        raise UserError(
            f"{args.data_dir} already contains {existing}. Choose another --data_dir, leave out --source to use what "
            "is there, or make the tokens of this source with --overwrite (no text of yours is deleted)."
        )
    interrupted = _read_started(args.data_dir).get("source")
    if found is None and interrupted not in (None, _label(source)):
        flag = "" if interrupted == TEXT else f" with --source {quoted(str(interrupted))}"
        raise UserError(
            f"{args.data_dir} contains the unfinished preparation of {interrupted}. Resume it{flag}, choose another "
            "--data_dir, or delete it with --overwrite."
        )


def _is_same(source: str, recorded: Source) -> bool:
    if recorded.name == FILES:
        # Only the name of the path is recorded: token folders are shared.
        return Path(source).exists() and Path(source).resolve().name == recorded.location
    return source == recorded.name


def _refuse_damaged_tokens(data_dir: Path) -> None:
    """Raise ``UserError`` for tokens with missing chunks and no text, which the default source would replace."""
    damaged = manifest.read_file(manifest.manifest_path(data_dir))
    if damaged is not None:
        raise UserError(
            f"the tokens of {data_dir} are damaged: a chunk is missing or has another size. Make them again: "
            f"{manifest.command_to_repeat(data_dir, damaged)}"
        )


def _settings(args: PrepareArgs, source: str) -> Settings:
    """Return the settings of the flags, with the defaults of a source."""
    fraction = args.val_fraction
    if fraction is None:
        fraction = DEFAULT_VAL_FRACTION
        dataset = corpora.find(source) if corpora.is_hub(source) else None
        # A thousandth of the first documents of a large corpus would be none.
        if isinstance(dataset, HubDataset) and args.max_documents is None:
            fraction = dataset.val_fraction
    return Settings(fraction, args.separator, args.text_column, args.max_documents, args.skip_broken)


def _open_local(args: PrepareArgs, source: str | None, found: Manifest | None) -> Corpus | None:
    """Open a source on this machine; None for the Hub, which is asked only if something changed."""
    if source is None or corpora.is_hub(source):
        return None
    known = found.text if found is not None else []
    if source != TEXT:
        return corpora.open_local(source, _settings(args, source), known)
    if args.max_documents is not None:
        raise UserError("--max_documents needs a --source; text in place is taken completely.")
    return corpora.open_text(args.data_dir, _settings(args, source), known)


def _choose_tokenizer(args: PrepareArgs, corpus: Corpus | None, found: Manifest | None) -> TokenizerChoice:
    if corpus is not None:
        return choose_tokenizer(args, corpus.records["train"], corpus.settings)
    if found is not None:
        return choose_tokenizer(args, found.splits["train"].text, found.settings)
    return choose_tokenizer(args, (), None)


def _changes(
    args: PrepareArgs, source: str | None, corpus: Corpus | None, tokenizer: TokenizerChoice, found: Manifest | None
) -> list[str]:
    """Name what differs between the manifest and this call; nothing if the tokens are up to date."""
    if found is None:
        return ["not tokenized yet"]
    if args.overwrite:
        return ["--overwrite"]
    changes = []
    if source is None:
        _refuse_source_flags(args, found)
    else:
        settings = corpus.settings if corpus is not None else _settings(args, source)
        if corpus is None and found.settings.val_fraction is None:
            # A Hub dataset with its own validation text.
            settings = replace(settings, val_fraction=None)
        old = asdict(found.settings)
        changes += [
            f"{name} {old[name]!r} became {new!r}" for name, new in asdict(settings).items() if old[name] != new
        ]
        if corpus is not None and corpus.generate is None:
            changes += manifest.changed_files(found.text, corpus.all_records)
        if args.keep_text and source != TEXT and not found.keeps_text:
            changes.append("--keep_text")
    if tokenizer.sha256 != found.tokenizer.sha256:
        changes.append("another tokenizer")
    return changes


def _refuse_source_flags(args: PrepareArgs, found: Manifest) -> None:
    """Raise ``UserError`` for flags that cannot be applied to finished tokens."""
    given = [name for name in SOURCE_FLAGS if getattr(args, name) not in (None, False, "")]
    if given and found.source.name != TEXT:
        source = str(found.source.location if found.source.name == FILES else found.source.name)
        raise UserError(
            f"the tokens of {args.data_dir} were made from {source}, so {' and '.join(f'--{name}' for name in given)} "
            f"can only be applied by reading it again: add --source {quoted(source)}."
        )


def _no_source(args: PrepareArgs, found: Manifest | None, tokenizer: TokenizerChoice) -> UserError:
    """Return the error of a change that needs the text, which is not there."""
    assert found is not None, "without tokens a source is read"
    if tokenizer.name == TRAIN:
        return UserError(f"there is no text in {args.data_dir} to train a tokenizer on; name a --source.")
    if args.overwrite:
        return UserError(f"there is no text in {args.data_dir} to make its tokens from; name a --source.")
    return UserError(
        f"the tokens of {args.data_dir} were made with another tokenizer ({found.tokenizer.name}), and their text is "
        "not there. Bring back the text or that tokenizer (--tokenizer), or name a --source."
    )


# --- text in the data folder ---


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
        # A .md or .json may be a description of the data.
        is_text = is_readable(path) and path.suffix not in (".md", ".json")
        is_split = path.is_dir() and path.name not in SPLITS and corpora.split_name(path.name) in SPLITS
        if is_text or (is_split and text_files(path)):
            named = corpora.split_name(path.name.split(".")[0])
            folder = data_dir / (named if named in SPLITS else "train")
            raise UserError(
                f"{path} is not read: move it to {folder}, or name it: --source {quoted(path)} --data_dir ANOTHER."
            )


def _kept_text(folder: Path) -> list[FileRecord]:
    """Return the files in train/ and val/ that ``--keep_text`` wrote (0.1.0 wrote every source), by ``source.json``."""
    try:
        text = read_checksummed(folder / "source.json")["text"]
        return [FileRecord(**known_fields(FileRecord, entry)) for entries in text.values() for entry in entries]
    except manifest.UNREADABLE:
        return []


def _own_text(data_dir: Path) -> list[str]:
    """Return the files in the place of the text that this project did not write, or that were changed since."""
    kept = _kept_text(data_dir)
    paths = [path for split in SPLITS for path in visible_files(data_dir / split)]
    own = set(manifest.refresh(paths, data_dir, kept)) - set(kept)
    contents = manifest.contents(kept)
    names = sorted(record.path for record in own if contents.get(record.path) != record.sha256)
    if not kept and (data_dir / "source.json").exists():
        names.append("source.json")
    return names


# --- building ---


def _label(source: str) -> str:
    """Return what identifies a source on this machine."""
    is_path = source != TEXT and not corpora.is_hub(source) and source not in corpora.CORPORA
    return str(Path(source).resolve()) if is_path else source


def _read_started(data_dir: Path) -> dict[str, Any]:
    """Return the source and the revision of an interrupted call; empty without one."""
    try:
        return dict(read_json(manifest.tokens_dir(data_dir) / BUILDING / "started.json"))
    except manifest.UNREADABLE:
        return {}


def _remove_rest(data_dir: Path, source: str | None) -> None:
    """Remove what a call left that was killed after its tokens were complete."""
    if source is not None and _read_started(data_dir).get("source") in (None, _label(source)):
        shutil.rmtree(manifest.tokens_dir(data_dir) / BUILDING, ignore_errors=True)


def _open_stream(args: PrepareArgs, source: str) -> Corpus:
    """Open a Hub corpus. An interrupted call is resumed with the same revision of the dataset."""
    dataset = corpora.find(source)
    assert isinstance(dataset, HubDataset), "the other sources are local"
    started = _read_started(args.data_dir)
    revision = started.get("revision") if started.get("source") == source else None
    return dataset.open(_settings(args, source), revision)


def _build(args: PrepareArgs, source: str, corpus: Corpus, tokenizer: TokenizerChoice, changes: list[str]) -> Manifest:
    """Tokenize a corpus with the right tokenizer, and move both into place."""
    started = time.perf_counter()
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    print(f"Tokenizing {'the text in ' + str(args.data_dir) if source == TEXT else source}: ", end="")
    print("; ".join(changes[:3]) + more)
    for note in corpus.notes:
        print(note)
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    try:
        building.mkdir(parents=True, exist_ok=True)
        write_json(building / "started.json", {"source": _label(source), "revision": corpus.revision})
        info = _prepare_tokenizer(args, corpus, tokenizer, building / "tokenizer")
        found = _tokenize(args, corpus, info, building)
        # From here on the tokens count as complete: a killed call is finished by the next one.
        manifest.write_file(building / "manifest.json", found)
        _publish(args.data_dir, args.tokenizer_dir)
    except Unfinished:
        raise
    except UserError:
        # The same mistake would stop the next call too, so there is nothing to resume.
        shutil.rmtree(building, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        print("\nStopped. Finished parts are kept; run the same command again to resume.")
        raise
    print(_summary(found))
    print(f"Prepared in {time.perf_counter() - started:.1f} s. The tokens can be used with any context length.")
    return found


def _prepare_tokenizer(args: PrepareArgs, corpus: Corpus, tokenizer: TokenizerChoice, folder: Path) -> TokenizerInfo:
    """Return the tokenizer for the corpus: the existing one, or a new one in ``folder``."""
    files, origin = tokenizer.files, tokenizer.origin
    if args.tokenizer == TRAIN:
        # A stream was opened only now, so its text may not be what the tokenizer in place was trained on.
        origin = train_origin(args, corpus.records["train"], corpus.settings)
        if tokenizers.origin(folder) == origin:
            files = tokenizers.from_folder(folder)  # of an interrupted call
        elif args.overwrite or tokenizers.origin(args.tokenizer_dir) != origin:
            files = train_tokenizer(corpus, origin["vocab_size"])
    if files is None:
        info = tokenizers.load(args.tokenizer_dir)
    else:
        tokenizers.install(files, origin, folder)
        info = tokenizers.load(folder)
    begins = f"begins with {info.bos_token!r}, id {info.bos_id}, and " if info.bos_token else ""
    inferred = " (the tokenizer does not name it, but no other token is possible)" if files and files.inferred else ""
    print(
        f"Tokenizer in {args.tokenizer_dir} ({info.name}): {info.vocab_size:,} tokens, so a model needs a "
        f"padded_vocab_size of that or more. Each document {begins}ends with {info.eos_token!r}, id {info.eos_id}"
        f"{inferred}."
    )
    return info


def _tokenize(args: PrepareArgs, corpus: Corpus, info: TokenizerInfo, building: Path) -> Manifest:
    """Write the chunks of both splits, and with ``--keep_text`` the text, below ``building``."""
    tokenizer_json = info.folder / "tokenizer.json"
    rules = replace(corpus.rules, divide_long=tokenizers.divides_between_words(tokenizer_json))
    fast = tokenizers.agrees_with_tiktoken(tokenizer_json, proof_documents(corpus, rules))
    dtype = tokens.dtype_for(info.vocab_size)
    encoder = tokenizers.Encoder(tokenizer_json, info.eos_id, info.bos_id, fast=fast)
    encode = tokens.TokenEncoder(encoder, dtype, info.bos_id, info.eos_id)
    keeps_text = args.keep_text and corpus.name != TEXT
    store, records = tokens.tokenize_corpus(
        corpus, rules, encode, building, inputs=[info.sha256], keep_text=keeps_text, num_workers=args.num_workers
    )
    totals = tokens.totals_of(records)
    if totals.eot_in_text:
        print(f"{totals.eot_in_text:,} times {END_OF_TEXT} inside a line: taken as text, not as the end of a document.")
    splits: dict[str, Split] = {}
    for split in SPLITS:
        if not totals.documents[split]:
            raise UserError(_no_text(corpus, split))
        number, chunks = tokens.write_chunks(store, records, split, dtype)
        is_first = not splits
        splits[split] = Split(
            documents=totals.documents[split],
            tokens=number,
            bytes=totals.bytes[split],
            # These were counted for both splits together.
            empty_documents=totals.empty_documents if is_first else 0,
            dropped_duplicates=totals.dropped_duplicates if is_first else 0,
            broken_rows=totals.broken_rows if is_first else 0,
            chunks=chunks,
            dtype=dtype,
            text=corpus.records_of(split),
            files=manifest.checksums(store.folder / split),
        )
    if keeps_text:
        tokens.move_text(store, records, building / "text")
        text = {
            split: manifest.refresh(text_files(building / "text" / split), building / "text", ()) for split in SPLITS
        }
        kept = {split: [asdict(record) for record in records] for split, records in text.items()}
        write_checksummed(building / "source.json", {"text": kept})
    return Manifest(
        format=manifest.FORMAT,
        source=Source(corpus.name, corpus.location or None, manifest.text_fingerprint(corpus.all_records)),
        tokenizer=TokenizerRecord(info.name, info.sha256, info.vocab_size, info.eos_token, info.eos_id),
        settings=corpus.settings,
        splits=splits,
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        keeps_text=keeps_text,
    )


def _no_text(corpus: Corpus, split: str) -> str:
    source = corpus.location if corpus.name == FILES else corpus.name
    if split == "val" and "val" not in corpus.files:
        return f"{source}: too little text to take validation text from; give more, or a larger --val_fraction."
    return f"{source}: no text for {split}; every document is empty or left out."


def _publish(data_dir: Path, tokenizer_dir: Path) -> None:
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
    _publish_text(data_dir, building, found)
    for split in SPLITS:
        # The chunks are in the folder of the units, "units" or "cut".
        for chunks in building.glob(f"*/{split}/index.json"):
            manifest.replace_folder(chunks.parent, folder / split)
    os.replace(building / "manifest.json", manifest.manifest_path(data_dir))
    shutil.rmtree(building)


def _publish_text(data_dir: Path, building: Path, found: Manifest) -> None:
    """Move kept text into place, and remove that of the tokens that are replaced."""
    listing = building / "source.json"
    if found.keeps_text and not listing.exists():
        return  # a killed call has moved everything
    new = {record.path for record in _kept_text(building)}
    if found.source.name != TEXT:
        own = _own_text(data_dir)
        for record in _kept_text(data_dir):
            if record.path not in new and record.path not in own:
                (data_dir / record.path).unlink(missing_ok=True)
    for name in sorted(new):
        if (building / "text" / name).exists():
            (data_dir / name).parent.mkdir(exist_ok=True)
            os.replace(building / "text" / name, data_dir / name)
    if new:
        os.replace(listing, data_dir / "source.json")
    elif _kept_text(data_dir):
        (data_dir / "source.json").unlink()
        for split in SPLITS:
            with suppress(OSError):  # not empty, or not there
                (data_dir / split).rmdir()


def _summary(found: Manifest) -> str:
    lines = [f"{'':6} {'documents':>12} {'tokens':>15} {'text':>12}"]
    for name, split in found.splits.items():
        lines.append(f"{name:6} {split.documents:>12,} {split.tokens:>15,} {split.bytes / 1e6:>9,.2f} MB")
    left_out = {
        "empty documents left out.": "empty_documents",
        "training documents left out that also occur in the validation text.": "dropped_duplicates",
        "rows left out that could not be read (--skip_broken).": "broken_rows",
    }
    for what, name in left_out.items():
        number = sum(getattr(split, name) for split in found.splits.values())
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

    parents = (data_dir, *data_dir.parents)
    made = [folder for folder in parents if not folder.exists()]
    for folder in parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--data_dir {data_dir}: {folder} is a file; expected a folder.")
    data_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(data_dir, os.W_OK):
        # Prepared tokens can be used from a read-only folder.
        yield
        return
    lock = FileLock(data_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {data_dir}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        # After an error nothing is left of folders that did not exist before.
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
