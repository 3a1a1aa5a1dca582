"""The road from text to tokens: what lies where, what is stale, and how it is built anew without ever being half."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from litmoe.checksummed_json import known_fields, write_json
from litmoe.cli import UserError, quoted
from litmoe.data import corpora, manifest, tokenizers, tokens
from litmoe.data.corpora import HubDataset
from litmoe.data.documents import (
    END_OF_TEXT,
    READABLE,
    Part,
    Rules,
    first_documents,
    is_readable,
    kinds,
    parts,
    read,
    text_files,
    unread_files,
    visible_files,
)
from litmoe.data.files import Unfinished, is_remote
from litmoe.data.manifest import SPLITS, BuiltSplit, FileRecord, Manifest, Settings, Source, TokenizerRecord
from litmoe.data.tokenizers import TokenizerInfo

DEFAULT_VAL_FRACTION = 0.1
BUILDING = ".building"  # tokens on their way, below data_dir/tokens; stays when the work is interrupted
DOCUMENT_BYTES = 4096  # of a document that nobody has seen yet
LOCK = ".prepare.lock"
PROOF_BYTES = 1 << 18  # of the corpus on which tiktoken must give the tokenizer's own ids
PACKAGES = ("litdata", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass
class PrepareArgs:
    """Turns text into tokens that training reads.

    A setting that is not given keeps the value that the data was prepared with before. With --instruct, conversations
    are prepared instead: `prepare_data.py --instruct stories --help`.
    """

    source: str | None = None
    """Where the text comes from: a file (.txt, .md, .jsonl, .json, .csv, .tsv, each also as .gz, .bz2, .xz or .zst, or
    .parquet), a folder of them (whose validation text is what is named val, valid, validation or dev beside train; what
    is named test is left out), `sample` (built-in stories, no network), a corpus of the Hugging Face Hub that is known
    by name (`tinystories`, 2.1 million stories, 1.9 GB; `shakespeare`, 1 MB; `wikitext-103`, 0.5 GB; `openwebtext`, 8.0
    million documents, 9.0 B GPT-2 tokens; `fineweb-edu`, its sample-10BT, 9.7 million documents, 10 B GPT-2 tokens,
    28 GB of parquet), or `hf:ORG/NAME[:CONFIG]`, any dataset of the Hub with a column of text. Not given: the text that
    lies in DATA_DIR/train and DATA_DIR/val, else tinystories."""
    data_dir: Path = Path("data/custom_text")
    """Folder of the corpus: text in train/ and val/, tokens in tokens/."""
    tokenizer: str | None = None
    """A tokenizer of the Hugging Face Hub, a folder with a tokenizer.json, or `train`: a byte-level BPE trained on this
    text. Not given: the one that lies in TOKENIZER_DIR, else gpt2."""
    tokenizer_dir: Path = Path("data/tokenizer")
    """Folder that the tokenizer is put into."""
    vocab_size: int | None = None
    """Number of tokens of a trained tokenizer (default 8192); a small text may give fewer."""
    val_fraction: float | None = None
    """Share of the documents that become validation text, chosen by their hash, where there is none (default 0.1;
    openwebtext 0.0005, fineweb-edu 0.001, hf: 0.01)."""
    document_separator: str = ""
    """A line of a .txt that ends a document, as the line <|endoftext|> always does; '\\n' is an empty line. Where no
    line does, a file is one document."""
    text_column: str | None = None
    """Field of a .jsonl or .json or column of a .parquet, .csv or .tsv that holds the text; not given: `text`, or the
    only one with text (a .csv or .tsv must have a column `text` then)."""
    max_documents: int | None = None
    """Take no more than so many documents of the source, from its beginning (for a quick try)."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, such as a line of a .jsonl that is not JSON, and count them."""
    keep_text: bool = False
    """Write the text of a corpus of the Hub too, into DATA_DIR/train and DATA_DIR/val, not its tokens alone."""
    overwrite: bool = False
    """Replace another corpus or tokenizer that lies there, and build everything anew with the settings given now."""
    num_workers: int | None = None
    """Tokenizing processes; 0: none beside this one; not given: one for each core, two where text comes from the
    Hub."""
    log_to_wandb: bool = False
    """Log text and tokens to Weights & Biases as a dataset (also by WANDB_LOG_DATASET=1)."""
    wandb_artifact: str | None = None
    """Name of that dataset (default: dataset-FOLDER)."""
    wandb_project: str | None = None
    """Its project (default: WANDB_PROJECT)."""
    wandb_entity: str | None = None
    """Its user or team (default: WANDB_ENTITY)."""


def prepare(args: PrepareArgs) -> Manifest:
    """Sees to it that ``data_dir`` holds text and whole tokens of it, and ``tokenizer_dir`` the tokenizer.

    Does nothing where that is so already. Several processes may call it at once for the same folder: one builds, the
    others wait and find it done. Killed at any moment, it leaves nothing that looks complete, and goes on where it was
    when called again.

    Returns:
        The manifest of the tokens.

    Raises:
        UserError: for anything in the text, the tokenizer or the settings that the user must mend. Nothing is written
            or lost then.
    """
    _check(args)
    found = None
    with suppress(UserError, OSError):  # it may be about another process's work half-way; asked again below
        found = _already_done(args)
    if found is not None and not (_times_are_noted(found, args.data_dir) and _is_tidy(args.data_dir)):
        with suppress(OSError), locked(args.data_dir):  # a folder that is only to be read serves as well
            _note_times(args.data_dir)
            if not _is_tidy(args.data_dir):
                shutil.rmtree(manifest.tokens_dir(args.data_dir) / BUILDING)
    if found is None:
        with locked(args.data_dir):
            corpora.publish(args.data_dir)
            # Another process may have done it meanwhile.
            found = _already_done(args)
            try:
                found = found or _build(args)
            except KeyboardInterrupt:
                kept = (args.data_dir / corpora.INCOMING, manifest.tokens_dir(args.data_dir) / BUILDING / "splits")
                goes_on = " What was done is kept: the same command goes on where it was."
                print("\nStopped." + goes_on * any(path.exists() for path in kept))
                raise
    if args.log_to_wandb or os.environ.get("WANDB_LOG_DATASET") == "1":
        _log_to_wandb(args)
    return found


def _check(args: PrepareArgs) -> None:
    """Everything that can be refused before anything is read; all problems in one message."""
    problems = []
    if args.source is not None:
        found = corpora.find(args.source)
        if isinstance(found, Path):
            corpora.source_files(found)
            own = [(args.data_dir / name).resolve() for name in (*SPLITS, "tokens")]
            path = found.resolve()
            if any(path.is_relative_to(folder) for folder in own) or args.data_dir.resolve() == path:
                problems.append(f"--source {found} is where the prepared text lies; leave --source out to take it so.")
            elif args.data_dir.resolve().is_relative_to(path):
                problems.append(f"--data_dir {args.data_dir} lies in --source {found}; choose one outside of it.")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction}: expected a number between 0 and 1, such as 0.1.")
    if "\n" in (_separator(args) or ""):
        problems.append(
            f"--document_separator {args.document_separator!r}: expected a line without its end; '\\n' is an empty one."
        )
    if args.vocab_size is not None and args.tokenizer != "train":
        problems.append("--vocab_size goes with --tokenizer train; other tokenizers have the size that they have.")
    if args.vocab_size is not None and args.vocab_size < 257:
        problems.append(f"--vocab_size {args.vocab_size}: expected 257 or more (256 bytes and {END_OF_TEXT}).")
    if args.max_documents is not None and args.max_documents < 1:
        problems.append(f"--max_documents {args.max_documents}: expected 1 or more.")
    if args.num_workers is not None and args.num_workers < 0:
        problems.append(f"--num_workers {args.num_workers}: expected 0 or more.")
    if problems:
        raise UserError("\n".join(problems))


# --- what lies there, and what is to do ---


@dataclass(frozen=True)
class _Lying:
    """What lies in a data folder."""

    manifest: Manifest | None
    built: dict[str, BuiltSplit]
    text: dict[str, tuple[FileRecord, ...]]
    """For each split that has text its files."""
    origin: corpora.TextOrigin | None
    """Where the text was once written from, if it was."""
    begun: "_Begun | None" = None
    """What a call that was interrupted streams, where nothing complete lies beside it."""

    @property
    def written(self) -> corpora.TextOrigin | None:
        """The origin of the text, if the text is still as it was written."""
        if self.origin is None:
            return None
        lying = [entry for entries in self.text.values() for entry in entries]
        written = [entry for entries in self.origin.text.values() for entry in entries]
        return self.origin if manifest.contents(lying) == manifest.contents(written) else None

    @property
    def streamed(self) -> Manifest | None:
        """The manifest, if there are tokens alone, of a corpus of the Hub."""
        is_streamed = self.manifest is not None and not self.text and _of_hub(self.manifest.source.name)
        return self.manifest if is_streamed else None


def _of_hub(source: str) -> bool:
    return source.startswith("hf:") or isinstance(corpora.CORPORA.get(source), HubDataset)


def _look(data_dir: Path) -> _Lying:
    origin = corpora.read_origin(data_dir)
    built = {split: found for split in SPLITS if (found := manifest.read_split(data_dir, split))}
    known = [entry for found in built.values() for entry in found.counts.text]
    known += [entry for entries in (origin.text if origin else {}).values() for entry in entries]
    text = {}
    for split in SPLITS:
        if files := text_files(data_dir / split):
            text[split] = manifest.refresh(files, data_dir, known)
    complete = manifest.read(data_dir)
    return _Lying(complete, built, text, origin, None if complete or text else _read_begun(data_dir))


def _already_done(args: PrepareArgs) -> Manifest | None:
    """The manifest where nothing is to be done, after saying so."""
    lying = _look(args.data_dir)
    if lying.manifest is None or args.overwrite or _text_to_write(args, lying) or _tokenizer_to_put(args, lying):
        return None
    tokenizer = manifest.tokenizer_fingerprint(args.tokenizer_dir)
    if _needs_streaming(args, lying, tokenizer) or _stale(lying, _settings(args, lying), tokenizer):
        return None
    print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
    print(_summary(lying.manifest))
    return lying.manifest


def _times_are_noted(found: Manifest, data_dir: Path) -> bool:
    entries = {(data_dir / entry.path): entry.mtime_ns for split in found.splits.values() for entry in split.text}
    return all(path.stat().st_mtime_ns == mtime_ns for path, mtime_ns in entries.items() if path.exists())


def _is_tidy(data_dir: Path) -> bool:
    """False where a call was killed after its last token was in place; what waits to be gone on with is left alone."""
    building = manifest.tokens_dir(data_dir) / BUILDING
    return not building.exists() or any((building / "splits" / split).exists() for split in SPLITS)


def _note_times(data_dir: Path) -> None:
    """Notes the times of files that were copied or touched, so that they are not read through at each call."""
    lying = _look(data_dir)
    if lying.manifest is None or not lying.text:
        return
    splits = dict(lying.manifest.splits)
    for split, built in lying.built.items():
        now = _inputs(lying, split)
        if manifest.changed_files(built.counts.text, now):
            return
        splits[split] = replace(built.counts, text=now)
        if splits[split] != built.counts:
            manifest.write_split(manifest.tokens_dir(data_dir, split), replace(built, counts=splits[split]))
    if splits != lying.manifest.splits:
        manifest.write(data_dir, replace(lying.manifest, splits=splits))


def _settings(args: PrepareArgs, lying: _Lying) -> Settings:
    """The settings given, for the others those from before, for the rest the defaults."""
    before = Settings(None, None, None, None)
    if not args.overwrite and (args.source is None or _is_same_source(args, lying)):
        if lying.written:
            before = lying.written.settings
        elif lying.streamed:
            before = lying.streamed.settings
        elif lying.begun:
            before = lying.begun.settings
        elif lying.built:
            rules = next(iter(lying.built.values())).rules
            broken = rules.get("skip_broken", False)
            before = Settings(rules["val_fraction"], rules["separator"], rules["text_column"], None, broken)
    return Settings(
        val_fraction=_first(args.val_fraction, before.val_fraction, _default_val_fraction(args, lying)),
        document_separator=_first(_separator(args), before.document_separator),
        text_column=_first(args.text_column, before.text_column),
        max_documents=_first(args.max_documents, before.max_documents),
        skip_broken=args.skip_broken or before.skip_broken,
    )


def _default_val_fraction(args: PrepareArgs, lying: _Lying) -> float:
    source = args.source or (None if lying.text or lying.manifest else corpora.DEFAULT)
    found = corpora.find(source) if source else None
    if not isinstance(found, HubDataset) or args.max_documents:  # of few documents a thousandth is none
        return DEFAULT_VAL_FRACTION
    return found.val_fraction


def _separator(args: PrepareArgs) -> str | None:
    """The separator given; None for none, or for the mark that always is one."""
    given = args.document_separator.replace("\\n", "\n")
    if given in ("", END_OF_TEXT):
        return None
    return given if given.strip("\n") else ""


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_same_source(args: PrepareArgs, lying: _Lying) -> bool:
    origin = lying.origin
    if args.source is not None and lying.streamed:
        return lying.streamed.source.name == args.source
    if args.source is not None and lying.begun:
        return lying.begun.source == args.source
    if origin is None or args.source is None:
        return False
    if args.source in corpora.CORPORA or _of_hub(args.source):
        return origin.name == args.source
    return (origin.name, origin.location) == ("files", str(Path(args.source).resolve()))


@dataclass(frozen=True)
class _TextToWrite:
    source: str
    why: str = ""


def _text_to_write(args: PrepareArgs, lying: _Lying) -> _TextToWrite | None:
    """What text to write, None where the text that lies there stays."""
    settings, written = _settings(args, lying), lying.written
    if args.source is None:
        if "val" in lying.text and "train" not in lying.text:
            raise UserError(
                f"{args.data_dir / 'val'} holds text and {args.data_dir / 'train'} none; put the training text there, "
                "or name a --source."
            )
        if not lying.text and lying.manifest and args.overwrite:
            raise UserError(f"there is no text in {args.data_dir} to build its tokens anew from; name a --source.")
        if lying.streamed and (reasons := _differences(lying.streamed.settings, settings)):
            raise UserError(_other_settings(args, lying.streamed.source.name, lying.streamed.source.name, reasons))
        if lying.streamed and args.keep_text:
            raise UserError(
                f"--keep_text streams the text again; name the source: --source {quoted(lying.streamed.source.name)}"
            )
        if "val" not in lying.text and not written:
            check_placed_text(args.data_dir)
        if not lying.text:
            begun = lying.begun.source if lying.begun else corpora.DEFAULT
            return None if lying.manifest else _TextToWrite(begun)
        if args.max_documents is not None and not written:
            raise UserError("--max_documents goes with a --source; text that lies in place is taken whole.")
        if written and (reasons := _differences(written.settings, settings)):
            source = written.location if written.name == "files" else written.name
            raise UserError(_other_settings(args, written.location, source, reasons))
        return None
    if lying.begun and lying.begun.source != args.source and not args.overwrite:
        raise UserError(
            f"{args.data_dir} holds the beginning of {lying.begun.source}, which --source {args.source} would drop. Go"
            f" on with it (--source {quoted(lying.begun.source)}), choose another --data_dir, or drop it with"
            " --overwrite."
        )
    if (not lying.text and not lying.streamed) or args.overwrite:
        return _TextToWrite(args.source)
    if lying.streamed and _is_same_source(args, lying):
        reasons = _differences(lying.streamed.settings, settings) + ["--keep_text"] * args.keep_text
        return _TextToWrite(args.source, "; ".join(reasons)) if reasons else None
    if not _is_same_source(args, lying) or lying.origin is None:
        known = written or (lying.streamed and lying.streamed.source)
        what = f"{known.name} ({known.location})" if known else "text"
        raise UserError(
            f"{args.data_dir} already holds {what}, which --source {args.source} would replace. Choose another "
            "--data_dir, leave --source out to use what is there, or replace it with --overwrite."
        )
    if not written:
        raise UserError(
            f"the text in {args.data_dir} was changed since it was written from {lying.origin.location}. Leave "
            "--source out to use it as it is, or write it anew with --overwrite."
        )
    reasons = _differences(written.settings, settings)
    if written.name == "files":
        path = Path(args.source)
        files = [file for files in corpora.source_files(path).values() for file in files]
        base = path.parent if path.is_file() else path
        reasons += manifest.changed_files(written.source_files, manifest.refresh(files, base, written.source_files))
        if written.format != corpora.TEXT_FORMAT:
            reasons.append("written by an older version, which cut white space at the ends of documents")
    return _TextToWrite(args.source, "; ".join(reasons)) if reasons else None


def check_placed_text(data_dir: Path) -> None:
    """Raises ``UserError`` for text that was put beside the places where it is read, or that is of no kind that is
    read: another corpus would take its place."""
    for split in SPLITS:
        folder = data_dir / split
        if (unread := unread_files(folder)) and not text_files(folder):
            raise UserError(
                f"nothing in {folder} can be read (it has {kinds(unread)}); expected files of {READABLE}. Put text"
                " there, or move these files away and name a --source."
            )
    for path in sorted(data_dir.glob("*")):
        meant = corpora.split_name(path.name.split(".")[0])
        is_text = bool(text_files(path)) if path.is_dir() else is_readable(path)
        if meant in SPLITS and path.name not in SPLITS and is_text:
            place = data_dir / meant if path.is_dir() else data_dir / meant / path.name
            raise UserError(f"{path} is not where text is read from: move it to {place}, or name a --source.")
    if not (text_files(data_dir / "train") or manifest.manifest_path(data_dir).exists()):
        _refuse_loose_text(data_dir)


def _refuse_loose_text(data_dir: Path) -> None:
    """Raises ``UserError`` for files of text in ``data_dir`` itself; a .md or .json there may be about the data."""
    if (data_dir / "tokenizer.json").exists():  # which has .txt files of its own beside it
        return
    loose = [path for path in sorted(data_dir.glob("*")) if is_readable(path) and path.suffix not in (".md", ".json")]
    if loose:
        raise UserError(
            f"{loose[0]} is not where text is read from: move it to {data_dir / 'train' / loose[0].name}, or name it:"
            f" --source {quoted(loose[0])} --data_dir ANOTHER."
        )


def _other_settings(args: PrepareArgs, location: str, source: str, reasons: list[str]) -> str:
    return (
        f"the text in {args.data_dir} was taken from {location} with other settings ({'; '.join(reasons)}). To take it "
        f"again, name its source too: --source {quoted(source)}."
    )


def _needs_streaming(args: PrepareArgs, lying: _Lying, tokenizer: str | None) -> bool:
    """Tokens alone, of the source that is named, by another tokenizer."""
    return bool(args.source and lying.streamed and lying.streamed.tokenizer.sha256 != tokenizer)


def _differences(old: Settings, new: Settings) -> list[str]:
    """Names what differs; a text with validation text of its own (old.val_fraction None) needs no fraction."""
    return [
        f"{name} {getattr(old, name)!r} became {value!r}"
        for name, value in asdict(new).items()
        if getattr(old, name) != value and not (name == "val_fraction" and old.val_fraction is None)
    ]


def _tokenizer_to_put(args: PrepareArgs, lying: _Lying) -> str | None:
    """What to put into tokenizer_dir, None where the right one lies there."""
    there = (args.tokenizer_dir / "tokenizer.json").is_file()
    if args.tokenizer is None:
        if not there:
            return tokenizers.DEFAULT
        # A tokenizer that was put there by hand may not name the tokens that begin and end a text.
        return None if tokenizers.is_complete(args.tokenizer_dir) else str(args.tokenizer_dir)
    if not there or args.overwrite:
        return args.tokenizer
    origin = tokenizers.origin(args.tokenizer_dir)
    if args.tokenizer == "train":
        return None if origin == _train_origin(args, lying) else "train"
    if Path(args.tokenizer).is_dir():
        files = tokenizers.from_folder(Path(args.tokenizer))
        same = files.sha256 == manifest.tokenizer_fingerprint(args.tokenizer_dir)
        return None if same else args.tokenizer
    return None if origin.get("name") == args.tokenizer else args.tokenizer


def _train_origin(args: PrepareArgs, lying: _Lying) -> dict[str, Any]:
    return {
        "name": "train",
        "vocab_size": args.vocab_size or tokenizers.DEFAULT_VOCAB_SIZE,
        "data_dir": _beside(args.tokenizer_dir, args.data_dir),
        "text": manifest.text_fingerprint(_inputs(lying, "train") if lying.text or lying.streamed else ()),
    }


def _beside(folder: Path, other: Path) -> str:
    """The way from one folder to another: it holds when both are moved, and shows nothing of the machine."""
    try:
        return Path(os.path.relpath(other, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return other.name


def _rules(lying: _Lying, settings: Settings) -> Rules:
    """How the text in train/ and val/ is read: what a source gave was divided and split when it was written."""
    if lying.written:
        return Rules(written=True)
    fraction = None if "val" in lying.text else settings.val_fraction
    return corpora.rules_of(replace(settings, val_fraction=fraction), settings.text_column)


def _stale(lying: _Lying, settings: Settings, tokenizer: str) -> dict[str, list[str]]:
    """The splits whose tokens are to be built, each with the reasons."""
    if not lying.text:
        known = lying.manifest
        if known is not None and known.tokenizer.sha256 != tokenizer:
            raise UserError(
                f"the tokens were made with another tokenizer ({known.tokenizer.name}) than the one that lies there "
                "now, and the text to make them anew is gone. Bring back the text or that tokenizer (--tokenizer), or "
                "name a --source."
            )
        return {}
    stale = {}
    rules = asdict(_rules(lying, settings))
    for split in SPLITS:
        found = lying.built.get(split)
        if found is None:
            stale[split] = ["not tokenized yet"]
            continue
        reasons = manifest.changed_files(found.counts.text, _inputs(lying, split))
        if found.tokenizer != tokenizer:
            reasons.append("another tokenizer")
        if "written" not in found.rules:
            reasons.append("made by an older version, which cut white space at the ends of documents")
        else:
            reasons += [
                f"{name} {found.rules[name]!r} became {value!r}"
                for name, value in rules.items()
                if name not in ("cut", "written") and found.rules[name] != value
            ]
        if reasons:
            stale[split] = reasons
    return stale


def _inputs(lying: _Lying, split: str) -> tuple[FileRecord, ...]:
    """The files that a split is made from; without validation text both come from train/."""
    if lying.streamed:
        return lying.streamed.splits[split].text
    return lying.text.get(split, lying.text["train"])


# --- doing it ---


@dataclass(frozen=True)
class _Text:
    """What is tokenized: the text in train/ and val/, or a corpus of the Hub."""

    rules: Rules
    records: dict[str, tuple[FileRecord, ...]]
    """Its files, for each split that has some of its own."""
    parts: Callable[[str, Rules, bool], Iterable[Part]]
    """Of such a split's files, read by these rules, long documents cut or not."""
    source: Source | None = None
    settings: Settings | None = None
    max_documents: int | None = None
    """Take no more, for each split that has files of its own, and ask for no more parts than that takes."""

    def inputs(self, split: str) -> tuple[FileRecord, ...]:
        """The files that a split is made from."""
        return self.records.get(split, self.records["train"])

    @property
    def holds_out(self) -> bool:
        """Whether training documents that also stand in the validation text are left out: not where a user put them."""
        return self.source is not None and "val" in self.records


def _text_there(args: PrepareArgs, lying: _Lying, settings: Settings) -> _Text:
    def found(split: str, rules: Rules, may_cut: bool) -> list[Part]:
        into = split if rules.val_fraction is None else None
        paths = (args.data_dir / entry.path for entry in lying.text[split])
        return [part for path in paths for part in parts(path, rules, into, may_cut=may_cut)]

    return _Text(_rules(lying, settings), lying.text, found)


@dataclass(frozen=True)
class _Begun:
    """``.building/source.json``: what is streamed, for the call that goes on."""

    source: str
    revision: str | None
    settings: Settings


def _read_begun(data_dir: Path) -> _Begun | None:
    try:
        values = json.loads((manifest.tokens_dir(data_dir) / BUILDING / "source.json").read_text(encoding="utf-8"))
        return _Begun(values["source"], values["revision"], Settings(**known_fields(Settings, values["settings"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _text_of_hub(args: PrepareArgs, text: _TextToWrite, settings: Settings, building: Path) -> _Text:
    """Opens a corpus of the Hub: the files of the newest revision, or those that an interrupted call had begun with."""
    print(f"Streaming {text.source}, tokens alone (--keep_text keeps the text)" + (f": {text.why}" if text.why else ""))
    dataset, begun = corpora.find(text.source), building / "source.json"
    assert isinstance(dataset, HubDataset)
    before = _read_begun(args.data_dir)
    files = dataset.open(settings, before.revision if before and before.source == text.source else None)
    building.mkdir(parents=True, exist_ok=True)
    write_json(begun, asdict(_Begun(text.source, files.revision, settings)))
    settings = replace(settings, val_fraction=None if "val" in files.files else settings.val_fraction)
    records = [entry for entries in files.records.values() for entry in entries]
    lazily = settings.max_documents is not None
    return _Text(
        corpora.rules_of(settings, files.column),
        files.records,
        lambda split, rules, may_cut: files.parts(split, rules, may_cut=may_cut, lazily=lazily),
        Source(text.source, files.location, manifest.text_fingerprint(records), 0),
        settings,
        settings.max_documents,
    )


def _build(args: PrepareArgs) -> Manifest:
    """Makes what is missing or stale beside what lies there, then puts it in its place."""
    started = time.perf_counter()
    lying = _look(args.data_dir)
    settings = _settings(args, lying)
    text, name = _text_to_write(args, lying), _tokenizer_to_put(args, lying)
    # The tokenizer first: it may not be had, and the text may be long.
    files = _tokenizer_at_hand(args, name)
    there = manifest.tokenizer_fingerprint(args.tokenizer_dir) if name is None else None
    if text is None and _needs_streaming(args, lying, files.sha256 if files else there):
        text = _TextToWrite(str(args.source), "another tokenizer")
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    if text:
        _refuse_foreign_files(args, lying)
    streamed = None
    if text and _of_hub(text.source) and not args.keep_text and (args.overwrite or not lying.written):
        streamed = _text_of_hub(args, text, settings, building)
    elif text:
        _write_text(args, text, settings)
        lying = _look(args.data_dir)
        settings = _settings(replace(args, source=None), lying)
        name = name or _tokenizer_to_put(args, lying)  # trained on the text from before?
    try:
        todo = streamed or (_text_there(args, lying, settings) if lying.text else None)
        folder, origin = args.tokenizer_dir, {"name": _shown_name(str(name))}
        if name == "train":
            if todo is None:
                raise UserError(f"there is no text in {args.data_dir} to train a tokenizer on; name a --source.")
            origin = {**_train_origin(args, lying), "text": manifest.text_fingerprint(todo.inputs("train"))}
            files = _train_tokenizer(args, todo, building / "tokenizer", origin)
        if files is not None:
            folder = building / "tokenizer"
            tokenizers.install(files, origin, folder)
        info = tokenizers.load(folder)
        print(
            f"Tokenizer in {args.tokenizer_dir} ({info.name}): {info.vocab_size:,} tokens, so a model needs a "
            "padded_vocab_size of that or more. Each document "
            + (f"begins with {info.bos_token!r}, id {info.bos_id}, and " if info.bos_token else "")
            + f"ends with {info.eos_token!r}, id {info.eos_id}"
            + (" (not named by the tokenizer, but no other can be meant)." if files and files.inferred else ".")
        )
        stale = {split: ["from the Hub"] for split in SPLITS} if streamed else _stale(lying, settings, info.sha256)
        if args.overwrite:
            stale = {split: stale.get(split, ["--overwrite"]) for split in SPLITS}
        for split in lying.text if stale and not streamed else ():
            if unread := corpora.not_read(args.data_dir / split, unread_files(args.data_dir / split)):
                print(f"{args.data_dir / split}: {unread}")
        built = _tokenize(args, todo, info, stale, building) if stale and todo else {}
        # From here to the new manifest nothing counts as complete; each split is whole in itself at any moment.
        if files is not None or built:
            manifest.manifest_path(args.data_dir).unlink(missing_ok=True)
        if files is not None:
            tokenizers.install(files, origin, args.tokenizer_dir)
        if streamed:
            _remove_text(args.data_dir, building)
        for split, new in built.items():
            manifest.replace_folder(new, manifest.tokens_dir(args.data_dir, split))
        found = _write_manifest(args, settings, info, todo, lying.manifest)
    except Unfinished:
        raise  # what is built stays, as after any error that is not the user's to mend: the next call goes on
    except UserError:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(args.data_dir / corpora.INCOMING, ignore_errors=True)  # of a call that was given up
    print(_summary(found))
    print(f"Prepared in {time.perf_counter() - started:.1f} s. The tokens serve any context length.")
    return found


def _refuse_foreign_files(args: PrepareArgs, lying: _Lying) -> None:
    """Raises ``UserError`` where new text would take the place of files that are no text of this project."""
    own = {args.data_dir / entry.path for entries in lying.text.values() for entry in entries}
    foreign = [path for split in SPLITS for path in visible_files(args.data_dir / split) if path not in own]
    if lying.origin is None and (args.data_dir / "source.json").exists():
        foreign.append(args.data_dir / "source.json")
    if foreign:
        names = ", ".join(path.relative_to(args.data_dir).as_posix() for path in foreign[:3])
        raise UserError(
            f"{args.data_dir} holds files that are not this project's ({names}), where text would be put; choose"
            " another --data_dir, or move them away."
        )


def _remove_text(data_dir: Path, building: Path) -> None:
    """Takes away the text of another corpus, which the tokens take the place of."""
    for name in ("val", "train", "source.json"):  # in this order: validation text alone is no state to go on from
        if (data_dir / name).exists():
            old = building / "old"
            shutil.rmtree(old, ignore_errors=True)
            old.mkdir()
            os.replace(data_dir / name, old / name)  # at once: half a text looks like a whole one


def _write_text(args: PrepareArgs, text: _TextToWrite, settings: Settings) -> None:
    print(f"Text: {text.source} into {args.data_dir}" + (f" again ({text.why})" if text.why else ""))
    with _progress("text") as progress:
        seen = 0

        def on_progress(documents: int, size: int, total: int | None) -> None:
            nonlocal seen
            if size - seen >= 1 << 18:
                progress(documents, 0, size, total)
                seen = size

        corpora.write_text(text.source, args.data_dir, settings, on_progress)


def _tokenizer_at_hand(args: PrepareArgs, name: str | None) -> tokenizers.TokenizerFiles | None:
    """The tokenizer to put into its place; None where it is to be trained, or lies there already."""
    if name is None:
        tokenizers.load(args.tokenizer_dir)
        return None
    there = tokenizers.origin(args.tokenizer_dir)
    if name == "train":
        # One that was trained for this very text may be renewed; on another one, other data and models may rest.
        ours = _beside(args.tokenizer_dir, args.data_dir)
        may_replace = (there.get("name"), there.get("data_dir")) == ("train", ours)
        files = None
    else:
        files = tokenizers.from_folder(Path(name)) if Path(name).is_dir() else tokenizers.from_hub(name)
        may_replace = Path(name) == args.tokenizer_dir  # the same one, completed
        with suppress(UserError):
            may_replace |= manifest.tokenizer_fingerprint(args.tokenizer_dir) == files.sha256
    if (args.tokenizer_dir / "tokenizer.json").is_file() and not (may_replace or args.overwrite):
        what = "a newly trained one" if name == "train" else name
        raise UserError(
            f"{args.tokenizer_dir} already holds another tokenizer ({there.get('name', 'put there by hand')}), which "
            f"{what} would replace. Choose another --tokenizer_dir, leave --tokenizer out to use the one that is "
            "there, or replace it with --overwrite."
        )
    return files


def _train_tokenizer(args: PrepareArgs, text: _Text, begun: Path, origin: dict[str, Any]) -> tokenizers.TokenizerFiles:
    if tokenizers.origin(begun) == origin:  # an interrupted call had trained it
        return tokenizers.from_folder(begun)
    wanted = args.vocab_size or tokenizers.DEFAULT_VOCAB_SIZE
    print(f"Training a tokenizer of {wanted:,} tokens on {'the corpus' if text.source else args.data_dir / 'train'}")
    files = tokenizers.train(_training_sample(text), wanted)
    found = len(files.tokenizer["model"]["vocab"])
    if found < wanted:
        print(f"  This text gives no more than {found:,} tokens.")
    return files


def _training_sample(text: _Text) -> Iterator[str]:
    """Training text for a tokenizer: all of a small text, else parts from everywhere in it."""
    size = 0
    for cut in (False, True):  # as in _tokenize: few documents may all have gone to validation
        rules = replace(text.rules, cut=cut)
        todo = text.parts("train", rules, True)
        if text.max_documents is None:
            todo = list(todo)
            todo = todo[:: max(1, -(-tokens.total_size(todo) // tokenizers.TRAINING_BYTES))]
        some = (batch for part in todo for batch in read(part, rules))
        for batch in some if text.max_documents is None else first_documents(some, text.max_documents):
            for piece in batch.pieces:
                if piece.split == "train":
                    size += len(piece.text)
                    yield piece.text
            if text.max_documents is not None and size >= tokenizers.TRAINING_BYTES:
                break
        if size:
            return


def _tokenize(
    args: PrepareArgs, text: _Text, info: TokenizerInfo, stale: dict[str, list[str]], building: Path
) -> dict[str, Path]:
    """Builds the tokens of the stale splits below ``building``; returns the folders that are to be moved."""
    rules = text.rules
    if rules.val_fraction is not None:
        stale = {split: stale.get(split, ["it shares its text with the other split"]) for split in SPLITS}
    for split, reasons in stale.items():
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        print(f"Tokenizing {split}: {'; '.join(reasons[:3])}{more}")
    tokenizer_json = info.folder / "tokenizer.json"
    may_cut = tokenizers.divides_between_words(tokenizer_json)
    work = building / "splits"
    folders = {split: work / split for split in stale}
    inputs = {cut: _fingerprint(text, replace(rules, cut=cut), info.sha256, may_cut, folders) for cut in (False, True)}
    begun = _begun(work)
    if begun in inputs.values():
        print("Going on where an interrupted call was.")
    elif begun:
        print("An interrupted call had begun with another text, tokenizer or setting; beginning anew.")
    for cut in (False, True):
        if not cut and begun == inputs[True]:
            continue
        if begun != inputs[cut]:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_json(work / "inputs.json", inputs[cut])
        rules = replace(rules, cut=cut)
        job = tokens.Job(tokenizer_json, False, info.eos_id, info.bos_id, tokens.dtype_for(info.vocab_size), rules)
        counts: dict[str, tokens.Counts] = {}
        for splits in _stages(text, list(stale)):
            counts |= _encode(args, text, splits, job, folders, may_cut)
        if rules.val_fraction is None or cut or all(count.tokens for count in counts.values()):
            break
        begun = None
        print(corpora.few_documents(sum(count.documents for count in counts.values()), rules.val_fraction))
    for split, count in counts.items():
        if not count.tokens:
            raise UserError(_empty(args.data_dir, text, split))
        if count.marks:
            print(f"{split}: {count.marks:,} times {END_OF_TEXT} inside a line, taken as plain text, not as an end.")
        if not folders[split].exists():  # a call that was killed late had moved it to its place
            if manifest.read_split(args.data_dir, split) is None:
                shutil.rmtree(work)
                raise Unfinished(f"the tokens of {split} were removed meanwhile; run the same command again.")
            del folders[split]
            continue
        entry = manifest.Split(
            count.documents,
            count.tokens,
            count.bytes,
            count.empty_documents,
            count.chunks,
            job.dtype,
            text.inputs(split),
            count.held_out,
            manifest.checksums(folders[split]),
            count.broken_rows,
        )
        manifest.write_split(folders[split], BuiltSplit(manifest.FORMAT, info.sha256, asdict(rules), entry))
    return folders


def _stages(text: _Text, splits: list[str]) -> list[list[str]]:
    """Which splits are built together: validation comes first where its documents are left out of the training text."""
    return [["val"], ["train"]] if text.holds_out else [splits]


def _encode(
    args: PrepareArgs, text: _Text, splits: list[str], job: tokens.Job, folders: dict[str, Path], may_cut: bool
) -> dict[str, tokens.Counts]:
    """Builds the tokens of some splits together."""
    rules = job.rules
    own = ["train"] if rules.val_fraction is not None else splits

    def some_parts() -> Iterator[Part]:
        return chain.from_iterable(text.parts(split, rules, may_cut) for split in own)

    total = None
    if text.max_documents is None:
        todo: Iterable[Part] = (every := list(some_parts()))
        sizes, total = {split: tokens.total_size(every, split) for split in splits}, tokens.total_size(every)
        proof = [every[i] for i in sorted({0, len(every) // 2, len(every) - 1})] if every else []
    else:
        todo, proof = some_parts(), list(islice(some_parts(), 1))
        compressed = sum(entry.bytes for split in own for entry in text.records[split])
        sizes = dict.fromkeys(splits, min(DOCUMENT_BYTES * text.max_documents, 4 * compressed))
    hashes = folders[splits[0]].with_name("val.hashes")
    job = replace(
        job,
        fast=tokenizers.agrees_with_tiktoken(job.tokenizer_json, _proof(proof, rules)),
        held_out=hashes if text.holds_out and splits == ["train"] else None,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # While one waits for the Hub the other computes.
    default = 2 * cores if any(is_remote(part.path) for part in proof) else cores
    with _progress("tokens" if len(splits) > 1 else f"{splits[0]} tokens") as progress:

        def on_progress(documents: int, tokens_seen: int, size: int) -> None:
            guess = size * text.max_documents // documents if text.max_documents and documents else None
            progress(documents, tokens_seen, size, total or guess)

        return tokens.build(
            todo,
            sizes,
            job,
            {split: folders[split] for split in splits},
            default if args.num_workers is None else args.num_workers,
            on_progress,
            max_documents=text.max_documents and text.max_documents * (2 if rules.cut else 1),  # cut: in two
            hashes=hashes if text.holds_out and splits == ["val"] else None,
        )


def _begun(work: Path) -> str | None:
    """The fingerprint of what an interrupted call was making."""
    try:
        return str(json.loads((work / "inputs.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _fingerprint(text: _Text, rules: Rules, tokenizer: str, may_cut: bool, splits: Iterable[str]) -> str:
    """Of all that decides what the tokens become."""
    records = {split: manifest.contents(entries) for split, entries in text.records.items()}
    values = [manifest.FORMAT, records, asdict(rules), tokenizer, may_cut, sorted(splits), text.max_documents]
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _proof(some: list[Part], rules: Rules) -> list[str]:
    """Text from the beginning, the middle and the end of the corpus."""
    sample, size = [], 0
    for part in some:
        pieces = (piece.text for batch in read(part, rules) for piece in batch.pieces)
        for text in islice(pieces, 64):
            sample.append(text[: PROOF_BYTES // len(some)])
            size += len(sample[-1])
            if size >= PROOF_BYTES:
                return sample
    return sample


def _empty(data_dir: Path, text: _Text, split: str) -> str:
    if text.source:
        return (
            f"--source {text.source.name}: no text for {split} (too few documents, or every one is empty); give a"
            " larger --val_fraction or more documents."
        )
    if split not in text.records:
        return (
            f"{data_dir / 'train'} holds too little text to take some for validation; put more into it, or into val/."
        )
    names = ", ".join(entry.path for entry in text.records[split][:3])
    return f"there is no text in {data_dir / split} ({names}: empty); put text there, or name a --source."


def _write_manifest(
    args: PrepareArgs, settings: Settings, info: TokenizerInfo, text: _Text | None, before: Manifest | None
) -> Manifest:
    tokenizer = TokenizerRecord(info.name, info.sha256, info.vocab_size, info.eos_token, info.eos_id)
    if text is None:  # the tokenizer alone was brought back
        assert before is not None
        manifest.write(args.data_dir, found := replace(before, tokenizer=tokenizer))
        return found
    lying = _look(args.data_dir)
    written = lying.written
    if text.source and text.settings:
        source, settings = text.source, text.settings
    else:
        entries = [entry for entries in lying.text.values() for entry in entries]
        source = Source(
            written.name if written else "text",
            _shown_location(written),
            manifest.text_fingerprint(entries),
            written.empty_documents if written else 0,
            written.held_out if written else 0,
            written.broken_rows if written else 0,
        )
        own_validation = "val" in lying.text
        settings = replace(settings, val_fraction=None if own_validation else settings.val_fraction)
        settings = written.settings if written else settings
    found = Manifest(
        format=manifest.FORMAT,
        source=source,
        tokenizer=tokenizer,
        settings=settings,
        splits={
            split: replace(lying.built[split].counts, text=text.inputs(split) if text.source else _inputs(lying, split))
            for split in SPLITS
        },
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    )
    manifest.write(args.data_dir, found)
    return found


def _shown_name(tokenizer: str) -> str:
    """A Hub name as it is; of a folder its name alone."""
    return Path(tokenizer).resolve().name if Path(tokenizer).is_dir() else tokenizer


def _shown_location(written: corpora.TextOrigin | None) -> str | None:
    """The location without the way to it: manifests travel with checkpoints and artifacts."""
    if written is None:
        return None
    return Path(written.location).name if written.name == "files" else written.location


def _summary(found: Manifest) -> str:
    lines = [f"{'':6} {'documents':>12} {'tokens':>15} {'text':>12}"]
    for name, split in found.splits.items():
        lines.append(f"{name:6} {split.documents:>12,} {split.tokens:>15,} {split.bytes / 1e6:>9,.2f} MB")
    empty = found.source.empty_documents + sum(split.empty_documents for split in found.splits.values())
    if empty:
        lines.append(f"{empty:,} empty documents left out.")
    held_out = found.source.held_out + sum(split.held_out for split in found.splits.values())
    if held_out:
        lines.append(f"{held_out:,} training documents left out that also stand in the validation text.")
    broken = found.source.broken_rows + sum(split.broken_rows for split in found.splits.values())
    if broken:
        lines.append(f"{broken:,} rows left out that could not be read (--skip_broken).")
    return "\n".join(lines)


def _log_to_wandb(args: PrepareArgs) -> None:
    if int(os.environ.get("RANK", 0)) > 0:  # of a run on several devices, in which every process prepares
        return
    from litmoe.data import artifacts

    artifacts.log_dataset(
        args.data_dir,
        tokenizer_dir=args.tokenizer_dir,
        name=args.wandb_artifact,
        project=args.wandb_project,
        entity=args.wandb_entity,
    )


# --- one at a time, and how far it is ---


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Holds a folder that is being prepared; folders that the call made and put nothing into are gone afterwards."""
    from filelock import FileLock, Timeout

    made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    for folder in (data_dir, *data_dir.parents):
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
        # An open file can be deleted on POSIX alone; once released it may be another process's, which Windows protects.
        if is_unused and os.name != "nt":
            (data_dir / LOCK).unlink()
        lock.release()
        with suppress(OSError):
            if is_unused and os.name == "nt":
                (data_dir / LOCK).unlink()
            for folder in made:
                folder.rmdir()


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, int, int | None], None]]:
    """A bar with documents, tokens and time left on a terminal; a line every ten seconds elsewhere.

    Yields:
        What to call with the documents, tokens and bytes so far, and the bytes in all, about, or None.
    """

    def line(documents: int, tokens_seen: int, size: int) -> str:
        middle = f"{tokens_seen:,} tokens, " if tokens_seen else ""
        return f"{documents:,} documents, {middle}{size / 1e6:,.1f} MB"

    if not sys.stdout.isatty():
        started = said = time.perf_counter()
        first: int | None = None  # what an interrupted call had done took none of this one's time

        def say(documents: int, tokens_seen: int, size: int, total: int | None) -> None:
            nonlocal said, first
            first = size if first is None else first
            now = time.perf_counter()
            if now - said >= 10:
                said = now
                new = size - first
                left = f", {(now - started) * max(0, total - size) / new:,.0f} s left" if total and new else ""
                print(f"  {what}: {line(documents, tokens_seen, size)}{left}", flush=True)

        yield say
        return

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("  {task.description}"), BarColumn(30), TextColumn("{task.fields[line]}")]
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(what, total=None, line="")

        def move(documents: int, tokens_seen: int, size: int, total: int | None) -> None:
            bar.update(task, completed=size, total=total, line=line(documents, tokens_seen, size))

        yield move
