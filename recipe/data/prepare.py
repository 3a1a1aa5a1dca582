"""The road from text to tokens: what lies where, what is stale, and how it is built anew without ever being half."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipe.cli import UserError
from recipe.data import corpora, manifest, tokenizers, tokens
from recipe.data.documents import END_OF_TEXT, Part, Rules, parts, read, text_files
from recipe.data.manifest import SPLITS, BuiltSplit, FileRecord, Manifest, Settings, Source, TokenizerRecord
from recipe.data.tokenizers import TokenizerInfo

DEFAULT_VAL_FRACTION = 0.1
BUILDING = ".building"  # tokens on their way, below data_dir/tokens
LOCK = ".prepare.lock"
PROOF_BYTES = 1 << 18  # of the corpus on which tiktoken must give the tokenizer's own ids
PACKAGES = ("litdata", "tokenizers", "tiktoken", "datasets", "pyarrow")


@dataclass
class PrepareArgs:
    """Turns text into tokens that training reads.

    A setting that is not given keeps the value that the data was prepared with before.
    """

    source: str | None = None
    """Where the text comes from: a .txt, .jsonl or .parquet file, a folder of them (with train/ and val/ in it where
    there is validation text), `sample` (built-in stories, no network), or `tinystories`. Not given: the text that lies
    in DATA_DIR/train and DATA_DIR/val, else tinystories."""
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
    """Share of the documents that become validation text, chosen by their hash, where there is none (default 0.1)."""
    document_separator: str = ""
    """A line of a .txt that ends a document, as the line <|endoftext|> always does; '\\n' is an empty line. Where no
    line does, a file is one document."""
    text_column: str | None = None
    """Field of a .jsonl or column of a .parquet that holds the text; not given: `text`, or the only one with text."""
    max_documents: int | None = None
    """Take no more than so many documents of the source, from its beginning (for a quick try)."""
    overwrite: bool = False
    """Replace another corpus or tokenizer that lies there, and build everything anew with the settings given now."""
    num_workers: int | None = None
    """Tokenizing processes; 0: none beside this one; not given: one for each core."""
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
    others wait and find it done. Killed at any moment, it leaves nothing that looks complete, and goes on when called
    again.

    Returns:
        The manifest of the tokens.

    Raises:
        UserError: for anything in the text, the tokenizer or the settings that the user must mend. Nothing is written
            or lost then.
    """
    _check(args)
    found = None
    with suppress(UserError):  # it may be about another process's work half-way; asked again below
        found = _already_done(args)
    if found is not None and not _times_are_noted(found, args.data_dir):
        with suppress(OSError), _locked(args.data_dir):  # a folder that is only to be read serves as well
            _note_times(args.data_dir)
    if found is None:
        with _locked(args.data_dir):
            corpora.publish(args.data_dir)
            shutil.rmtree(manifest.tokens_dir(args.data_dir) / BUILDING, ignore_errors=True)
            # Another process may have done it meanwhile.
            found = _already_done(args) or _build(args)
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
            if args.data_dir.resolve().is_relative_to(path) or any(path.is_relative_to(folder) for folder in own):
                problems.append(f"--source {found} is where the prepared text lies; leave --source out to take it so.")
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

    @property
    def written(self) -> corpora.TextOrigin | None:
        """The origin of the text, if the text is still as it was written."""
        if self.origin is None:
            return None
        lying = [entry for entries in self.text.values() for entry in entries]
        written = [entry for entries in self.origin.text.values() for entry in entries]
        return self.origin if manifest.contents(lying) == manifest.contents(written) else None


def _look(data_dir: Path) -> _Lying:
    origin = corpora.read_origin(data_dir)
    built = {split: found for split in SPLITS if (found := manifest.read_split(data_dir, split))}
    known = [entry for found in built.values() for entry in found.counts.text]
    known += [entry for entries in (origin.text if origin else {}).values() for entry in entries]
    text = {}
    for split in SPLITS:
        if files := text_files(data_dir / split):
            text[split] = manifest.refresh(files, data_dir, known)
    return _Lying(manifest.read(data_dir), built, text, origin)


def _already_done(args: PrepareArgs) -> Manifest | None:
    """The manifest where nothing is to be done, after saying so."""
    lying = _look(args.data_dir)
    if lying.manifest is None or args.overwrite or _text_to_write(args, lying) or _tokenizer_to_put(args, lying):
        return None
    if _stale(lying, _settings(args, lying), manifest.tokenizer_fingerprint(args.tokenizer_dir)):
        return None
    print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
    print(_summary(lying.manifest))
    return lying.manifest


def _times_are_noted(found: Manifest, data_dir: Path) -> bool:
    entries = {(data_dir / entry.path): entry.mtime_ns for split in found.splits.values() for entry in split.text}
    return all(path.stat().st_mtime_ns == mtime_ns for path, mtime_ns in entries.items() if path.exists())


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
    if not args.overwrite and (args.source is None or _is_same_source(args, lying.origin)):
        if lying.written:
            before = lying.written.settings
        elif lying.built:
            rules = next(iter(lying.built.values())).rules
            before = Settings(rules["val_fraction"], rules["separator"], rules["text_column"], None)
    return Settings(
        val_fraction=_first(args.val_fraction, before.val_fraction, DEFAULT_VAL_FRACTION),
        document_separator=_first(_separator(args), before.document_separator),
        text_column=_first(args.text_column, before.text_column),
        max_documents=_first(args.max_documents, before.max_documents),
    )


def _separator(args: PrepareArgs) -> str | None:
    """The separator given; None for none, or for the mark that always is one."""
    given = args.document_separator.replace("\\n", "\n")
    if given in ("", END_OF_TEXT):
        return None
    return given if given.strip("\n") else ""


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_same_source(args: PrepareArgs, origin: corpora.TextOrigin | None) -> bool:
    if origin is None or args.source is None:
        return False
    if args.source in corpora.CORPORA:
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
        if not lying.text:
            return None if lying.manifest else _TextToWrite(corpora.DEFAULT)
        if args.max_documents is not None and not written:
            raise UserError("--max_documents goes with a --source; text that lies in place is taken whole.")
        if written and (reasons := _differences(written.settings, settings)):
            raise UserError(
                f"the text in {args.data_dir} was written from {written.location} with other settings "
                f"({'; '.join(reasons)}). To write it anew, name its source too: --source "
                f"{written.location if written.name == 'files' else written.name}."
            )
        return None
    if not lying.text or args.overwrite:
        return _TextToWrite(args.source)
    if not _is_same_source(args, lying.origin) or lying.origin is None:
        what = f"{written.name} ({written.location})" if written else "text"
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
    if args.source not in corpora.CORPORA:
        path = Path(args.source)
        files = [file for files in corpora.source_files(path).values() for file in files]
        base = path.parent if path.is_file() else path
        reasons += manifest.changed_files(written.source_files, manifest.refresh(files, base, written.source_files))
    return _TextToWrite(args.source, "; ".join(reasons)) if reasons else None


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
        # A tokenizer that was put there by hand may not name its end-of-text token.
        return None if manifest.end_of_text_token(args.tokenizer_dir) else str(args.tokenizer_dir)
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
        "text": manifest.text_fingerprint(lying.text.get("train", ())),
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
        return Rules()
    fraction = None if "val" in lying.text else settings.val_fraction
    return Rules(settings.document_separator, settings.text_column, fraction)


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
        reasons += [
            f"{name} {found.rules[name]!r} became {value!r}"
            for name, value in rules.items()
            if name != "cut" and found.rules[name] != value
        ]
        if reasons:
            stale[split] = reasons
    return stale


def _inputs(lying: _Lying, split: str) -> tuple[FileRecord, ...]:
    """The files that a split is made from; without validation text both come from train/."""
    return lying.text.get(split, lying.text["train"])


# --- doing it ---


def _build(args: PrepareArgs) -> Manifest:
    """Makes what is missing or stale beside what lies there, then puts it in its place."""
    started = time.perf_counter()
    lying = _look(args.data_dir)
    settings = _settings(args, lying)
    text, name = _text_to_write(args, lying), _tokenizer_to_put(args, lying)
    # The tokenizer first: it may not be had, and the text may be long.
    files = _tokenizer_at_hand(args, name)
    if text:
        _write_text(args, text, settings)
        lying = _look(args.data_dir)
        settings = _settings(replace(args, source=None), lying)
        name = name or _tokenizer_to_put(args, lying)  # trained on the text from before?
    building = manifest.tokens_dir(args.data_dir) / BUILDING
    try:
        folder, origin = args.tokenizer_dir, {"name": _shown_name(str(name))}
        if name == "train":
            files, origin = _train_tokenizer(args, lying, settings), _train_origin(args, lying)
        if files is not None:
            folder = building / "tokenizer"
            tokenizers.install(files, origin, folder)
        info = tokenizers.load(folder)
        print(
            f"Tokenizer in {args.tokenizer_dir} ({info.name}): {info.vocab_size:,} tokens, so a model needs a "
            f"padded_vocab_size of that or more. Each document ends with {info.eos_token!r}, id {info.eos_id}"
            + (" (not named by the tokenizer, but no other can be meant)." if files and files.inferred else ".")
        )
        stale = _stale(lying, settings, info.sha256)
        if args.overwrite:
            stale = {split: stale.get(split, ["--overwrite"]) for split in SPLITS}
        built = _tokenize(args, lying, settings, info, stale, building) if stale else {}
        # From here to the new manifest nothing counts as complete; each split is whole in itself at any moment.
        if files is not None or built:
            manifest.manifest_path(args.data_dir).unlink(missing_ok=True)
        if files is not None:
            tokenizers.install(files, origin, args.tokenizer_dir)
        for split, new in built.items():
            manifest.replace_folder(new, manifest.tokens_dir(args.data_dir, split))
    finally:
        shutil.rmtree(building, ignore_errors=True)
    found = _write_manifest(args, settings, info)
    print(_summary(found))
    print(f"Prepared in {time.perf_counter() - started:.1f} s. The tokens serve any context length.")
    return found


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


def _train_tokenizer(args: PrepareArgs, lying: _Lying, settings: Settings) -> tokenizers.TokenizerFiles:
    wanted = args.vocab_size or tokenizers.DEFAULT_VOCAB_SIZE
    print(f"Training a tokenizer of {wanted:,} tokens on {args.data_dir / 'train'}")
    files = tokenizers.train(_training_sample(args.data_dir, lying, settings), wanted)
    found = len(files.tokenizer["model"]["vocab"])
    if found < wanted:
        print(f"  This text gives no more than {found:,} tokens.")
    return files


def _training_sample(data_dir: Path, lying: _Lying, settings: Settings) -> Iterator[str]:
    """Training text for a tokenizer: all of a small text, else parts from everywhere in it."""
    found_any = False
    for cut in (False, True):  # as in _tokenize: few documents may all have gone to validation
        rules = replace(_rules(lying, settings), cut=cut)
        todo = _parts(data_dir, lying, rules, ["train"], may_cut=True)
        step = max(1, -(-tokens.total_size(todo) // tokenizers.TRAINING_BYTES))
        for part in todo[::step]:
            for piece in read(part, rules).pieces:
                if piece.split == "train":
                    found_any = True
                    yield piece.text
        if found_any:
            return


def _tokenize(
    args: PrepareArgs,
    lying: _Lying,
    settings: Settings,
    info: TokenizerInfo,
    stale: dict[str, list[str]],
    building: Path,
) -> dict[str, Path]:
    """Builds the tokens of the stale splits below ``building``; returns their folders."""
    rules = _rules(lying, settings)
    if rules.val_fraction is not None:
        stale = {split: stale.get(split, ["it shares its text with the other split"]) for split in SPLITS}
    for split, reasons in stale.items():
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        print(f"Tokenizing {split}: {'; '.join(reasons[:3])}{more}")
    tokenizer_json = info.folder / "tokenizer.json"
    may_cut = tokenizers.divides_between_words(tokenizer_json)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if args.num_workers is None else args.num_workers
    folders = {split: building / split for split in stale}
    for cut in (False, True):
        rules = replace(rules, cut=cut)
        todo = _parts(args.data_dir, lying, rules, list(stale), may_cut)
        fast = tokenizers.agrees_with_tiktoken(tokenizer_json, _proof(todo, rules))
        job = tokens.Job(tokenizer_json, fast, info.eos_id, tokens.dtype_for(info.vocab_size), rules)
        with _progress("tokens") as progress:
            counts = tokens.build(todo, job, folders, workers, progress)
        if rules.val_fraction is None or cut or all(count.tokens for count in counts.values()):
            break
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        print(corpora.few_documents(sum(count.documents for count in counts.values()), rules.val_fraction))
    for split, count in counts.items():
        if not count.tokens:
            raise UserError(_empty(args.data_dir, lying, split))
        if count.marks:
            print(f"{split}: {count.marks:,} times {END_OF_TEXT} inside a line, taken as plain text, not as an end.")
        entry = manifest.Split(
            count.documents,
            count.tokens,
            count.bytes,
            count.empty_documents,
            count.chunks,
            job.dtype,
            _inputs(lying, split),
        )
        manifest.write_split(folders[split], BuiltSplit(manifest.FORMAT, info.sha256, asdict(rules), entry))
    return folders


def _parts(data_dir: Path, lying: _Lying, rules: Rules, splits: list[str], may_cut: bool) -> list[Part]:
    if rules.val_fraction is not None:
        return [p for entry in lying.text["train"] for p in parts(data_dir / entry.path, rules, None, may_cut=may_cut)]
    return [
        part
        for split in splits
        for entry in lying.text[split]
        for part in parts(data_dir / entry.path, rules, split, may_cut=may_cut)
    ]


def _proof(todo: list[Part], rules: Rules) -> list[str]:
    """Text from the beginning, the middle and the end of the corpus."""
    chosen = {0, len(todo) // 2, len(todo) - 1} if todo else set()
    pieces = (piece.text for i in sorted(chosen) for piece in read(todo[i], rules).pieces[:64])
    sample, size = [], 0
    for text in pieces:
        sample.append(text[: PROOF_BYTES // len(chosen)])
        size += len(sample[-1])
        if size >= PROOF_BYTES:
            break
    return sample


def _empty(data_dir: Path, lying: _Lying, split: str) -> str:
    if split not in lying.text:
        return (
            f"{data_dir / 'train'} holds too little text to take some for validation; put more into it, or into val/."
        )
    names = ", ".join(entry.path for entry in lying.text[split][:3])
    return f"there is no text in {data_dir / split} ({names}: empty); put text there, or name a --source."


def _write_manifest(args: PrepareArgs, settings: Settings, info: TokenizerInfo) -> Manifest:
    lying = _look(args.data_dir)
    written = lying.written
    text = [entry for entries in lying.text.values() for entry in entries]
    found = Manifest(
        format=manifest.FORMAT,
        source=Source(
            written.name if written else "text",
            _shown_location(written),
            manifest.text_fingerprint(text),
            written.empty_documents if written else 0,
        ),
        tokenizer=TokenizerRecord(info.name, info.sha256, info.vocab_size, info.eos_token, info.eos_id),
        settings=written.settings
        if written
        else replace(settings, val_fraction=None if "val" in lying.text else settings.val_fraction),
        splits={
            split: replace(
                lying.built[split].counts, text=_inputs(lying, split) if lying.text else lying.built[split].counts.text
            )
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
    return "\n".join(lines)


def _log_to_wandb(args: PrepareArgs) -> None:
    if int(os.environ.get("RANK", 0)) > 0:  # of a run on several devices, in which every process prepares
        return
    from recipe.data import artifacts

    artifacts.log_dataset(
        args.data_dir,
        tokenizer_dir=args.tokenizer_dir,
        name=args.wandb_artifact,
        project=args.wandb_project,
        entity=args.wandb_entity,
    )


# --- one at a time, and how far it is ---


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Holds the folder; folders that the call made and put nothing into are gone afterwards."""
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

        def say(documents: int, tokens_seen: int, size: int, total: int | None) -> None:
            nonlocal said
            now = time.perf_counter()
            if now - said >= 10:
                said = now
                left = f", {(now - started) * max(0, total / size - 1):,.0f} s left" if total and size else ""
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
