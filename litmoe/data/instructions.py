"""Prepare conversations for finetuning: rows of any common shape become ``train.jsonl`` and ``val.jsonl``.

A line is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, which chat APIs
and other tuning libraries read too. ``instructions.json`` is written last: without it the folder is incomplete.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from litmoe.checksummed_json import known_fields, read_checksummed, write_checksummed
from litmoe.cli import UserError, command, nearest, quoted, strip_control_chars
from litmoe.data import manifest
from litmoe.data.conversations import Message
from litmoe.data.corpora import HUB_NAME, HubDataset, split_names
from litmoe.data.documents import split_of
from litmoe.data.files import METADATA_FILES, ROW_SUFFIXES, Location, read_rows, suffix, visible_files
from litmoe.data.instruction_rows import Row, conversation_of, has_conversation
from litmoe.data.manifest import SPLITS, FileRecord, Settings
from litmoe.data.stories import story_requests

# Format of the folder. Format 1 removed white space at the ends of texts; it can still be read.
FORMAT = 2
MANIFEST = "instructions.json"
# Folder in ``data_dir`` for files that are not complete yet.
BUILDING = ".building"
LOCK = ".prepare.lock"
STORIES = "stories"
# 1.1 million training tokens: an epoch takes two CPU cores a minute or two.
STORY_REQUESTS = 6000
DEFAULT_VAL_FRACTION = 0.1
# Files or fields that a message names.
MAX_NAMES = 5
NOT_ROWS = (MANIFEST, *METADATA_FILES)


@dataclass
class InstructArgs:
    """Turns instructions and their answers into the conversations that finetune.py trains on."""

    instruct: str = STORIES
    """The source: a .json, .jsonl, .parquet, .csv or .tsv file (also as .gz, .bz2, .xz or .zst), a folder of such
    files, `hf:ORG/NAME[:CONFIG]` for a dataset of the Hugging Face Hub, or `stories`, 6,000 requests for stories of the
    built-in corpus. In a folder, files and sub-folders called train and val (or valid, validation, dev) keep their
    split, test is left out, and without a val all are split. A row is Alpaca's (instruction, input, output, history),
    Dolly's (instruction, context, response), a pair (prompt and response or completion, question and answer, ...), or a
    chat (messages, conversations or conversation, with a system message in it or next to it)."""
    data_dir: Path = Path("data/instruct")
    """Folder for train.jsonl, val.jsonl and instructions.json."""
    val_fraction: float | None = None
    """Share of the conversations for validation, chosen by the hash of their first message, if the source has no val
    split of its own (default 0.1)."""
    skip_broken: bool = False
    """Leave out rows without a usable conversation, such as one with an empty answer, and count them."""
    overwrite: bool = False
    """Replace other conversations in DATA_DIR."""


@dataclass(frozen=True)
class Split:
    """``train.jsonl`` or ``val.jsonl``."""

    conversations: int
    file: FileRecord


@dataclass(frozen=True)
class Instructions:
    """The contents of ``instructions.json``: what the folder holds and what it was made from."""

    format: int
    source: str
    """``stories``, ``files`` for the user's own, or the Hub's ``hf:ORG/NAME``."""
    location: str
    """The path, the generator's call, or the dataset and its revision."""
    val_fraction: float | None
    """None if the source has validation conversations of its own."""
    skip_broken: bool
    source_files: tuple[FileRecord, ...]
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()
    """Sentences about what was left out or changed."""

    def summary(self) -> str:
        """Return the size of the splits and the notes, one line each."""
        train, val = self.splits["train"].conversations, self.splits["val"].conversations
        return "\n".join([f"{train:,} training conversations, {val:,} for validation.", *self.notes])


@dataclass(frozen=True)
class Source:
    """The source of the conversations; the first five fields are recorded in ``instructions.json``."""

    source: str
    location: str
    val_fraction: float | None
    skip_broken: bool
    source_files: tuple[FileRecord, ...] = ()
    files: tuple[tuple[str | None, Location], ...] = ()
    """Files with their split; those of None are split by hash"""
    notes: tuple[str, ...] = ()
    """Sentences about files of the source that are not used"""


def prepare_instructions(args: InstructArgs) -> Instructions:
    """Write the conversations of a source into ``data_dir``; do nothing if they are there already.

    Raises:
        UserError: a mistake in the source or the settings. ``data_dir`` is unchanged then.
    """
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: expected a number between 0 and 1, such as 0.1.")
    # A call that was killed at its very end left a complete build behind.
    _publish(args.data_dir)
    existing = None if args.overwrite else _existing(args.data_dir)
    source = _find_source(args, existing)
    if existing is None:
        result = _build(args.data_dir, source)
        print("\n".join([f"{args.data_dir}: {result.summary()}", *source.notes]))
        return result
    differences = _differences(existing, source)
    if differences:
        raise UserError(
            f"{args.data_dir} holds conversations with other settings ({'; '.join(differences)}); choose another "
            "--data_dir, or replace them with --overwrite."
        )
    print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
    print("\n".join([existing.summary(), *source.notes]))
    return existing


def _existing(data_dir: Path) -> Instructions | None:
    if (data_dir / MANIFEST).exists():
        return read(data_dir)
    # Without metadata the files may be the user's own.
    for split in SPLITS:
        path = data_dir / f"{split}.jsonl"
        if path.exists():
            raise UserError(
                f"{path} was not made by this command, which would replace it. Choose another --data_dir (and use this "
                f"folder as the source: --instruct {quoted(data_dir)}), or --overwrite."
            )
    return None


def _differences(existing: Instructions, source: Source) -> list[str]:
    # Settings first: with another source, all files would be reported as changed.
    differences = []
    for name in ("source", "location", "val_fraction", "skip_broken"):
        old, new = getattr(existing, name), getattr(source, name)
        if old != new:
            differences.append(f"{name} {old!r} became {new!r}")
    # No built-in story has white space at its ends, so format 1 makes no difference there.
    if existing.format != FORMAT and source.source != STORIES:
        differences.append("an older version made them, which removed white space at the ends of texts")
    return differences or manifest.changed_files(existing.source_files, source.source_files)


# --- finding the source ---


def _find_source(args: InstructArgs, existing: Instructions | None) -> Source:
    fraction = DEFAULT_VAL_FRACTION if args.val_fraction is None else args.val_fraction
    if args.instruct == STORIES:
        # The location is compared with the one in folders of 0.1.0, so its text stays the same.
        return Source(STORIES, "story_instructions(seed=1)", fraction, args.skip_broken)
    if HUB_NAME.fullmatch(args.instruct):
        return _hub_source(args, fraction, existing)
    if not Path(args.instruct).exists():
        hint = "; did you mean stories?" if nearest(args.instruct, [STORIES]) else "."
        raise UserError(
            f"--instruct {args.instruct}: no such file or folder{hint} Expected a {', '.join(ROW_SUFFIXES)} file, a "
            f"folder of them, `{STORIES}` or hf:ORG/NAME."
        )
    return _local_source(args, fraction, existing)


def _hub_source(args: InstructArgs, fraction: float, existing: Instructions | None) -> Source:
    if existing is not None and existing.source == args.instruct:
        # The folder holds a fixed revision of the dataset, so there is nothing to ask the Hub.
        same_fraction = None if existing.val_fraction is None else fraction
        return Source(args.instruct, existing.location, same_fraction, args.skip_broken, existing.source_files)
    name = HUB_NAME.fullmatch(args.instruct)
    assert name is not None
    dataset = HubDataset("", name["path"], name["config"], column=None, flag="--instruct")
    opened = dataset.open(Settings(None, None, None, None))
    files = _with_splits(opened.files["train"], opened.files.get("val", []))
    return Source(
        source=args.instruct,
        location=opened.location,
        val_fraction=None if "val" in opened.files else fraction,
        skip_broken=args.skip_broken,
        source_files=tuple(chain.from_iterable(opened.records.values())),
        files=files,
    )


def _local_source(args: InstructArgs, fraction: float, existing: Instructions | None) -> Source:
    path = Path(args.instruct)
    if path.is_dir():
        train, val, notes = _files_in(path, args.data_dir)
    elif suffix(path) in ROW_SUFFIXES:
        train, val, notes = [path], [], []
    else:
        raise UserError(f"--instruct {path}: expected a {', '.join(ROW_SUFFIXES)} file, or a folder with such files.")

    # With --overwrite, the source would be replaced by a part of itself.
    outputs = {(args.data_dir / f"{split}.jsonl").resolve() for split in SPLITS}
    if outputs & {file.resolve() for file in (*train, *val)}:
        raise UserError(
            f"--instruct {path}: files of it in {args.data_dir} would be replaced; choose another --data_dir."
        )
    # The checksums of unchanged files are known from the last time.
    known = existing.source_files if existing is not None else ()
    return Source(
        source="files",
        location=str(path.resolve()),
        val_fraction=None if val else fraction,
        skip_broken=args.skip_broken,
        source_files=manifest.refresh([*train, *val], path if path.is_dir() else path.parent, known),
        files=_with_splits(train, val),
        notes=tuple(notes),
    )


def _with_splits(train: Sequence[Location], val: Sequence[Location]) -> tuple[tuple[str | None, Location], ...]:
    """Return files with their splits; without validation files, training files are split by hash (None)."""
    train_split = "train" if val else None
    return (*((train_split, file) for file in train), *(("val", file) for file in val))


def _files_in(folder: Path, data_dir: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Return the files of a folder to train on, those for validation, and notes on the other files."""
    files = _source_files(folder, data_dir)
    row_files = [file for file in files if suffix(file) in ROW_SUFFIXES and file.name not in NOT_ROWS]
    by_split: dict[str | None, list[Path]] = {"train": [], "val": [], "test": [], None: []}
    for file, split in split_names(folder, row_files).items():
        by_split[split].append(file)

    # Without a file that is named train, those without a split in their name are the training data.
    train, val = by_split["train"] or by_split[None], by_split["val"]
    unused = sorted(set(files) - {*train, *val})
    notes = _notes_on_files("Used for validation", val, folder)
    notes += _notes_on_files("Not used, because of name (test data) or type", unused, folder)
    if not train:
        problem = f"--instruct {folder}: expected a {', '.join(ROW_SUFFIXES)} file to train on in that folder."
        raise UserError("\n".join([problem, *notes]))
    return train, val, notes


def _source_files(folder: Path, data_dir: Path) -> list[Path]:
    files = visible_files(folder)
    if folder.resolve() == data_dir.resolve():
        return files
    # The prepared conversations may be in a folder inside the source, and are no source themselves.
    return [file for file in files if not file.resolve().is_relative_to(data_dir.resolve())]


def _notes_on_files(use: str, files: list[Path], folder: Path) -> list[str]:
    if not files:
        return []
    return [f"{use}: {_first_of([file.relative_to(folder).as_posix() for file in files])}."]


def _first_of(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


# --- reading the rows ---


def _read_source(source: Source) -> tuple[dict[str, list[Row]], int]:
    """Return the conversations of each split, and the number of rows without one.

    Raises:
        UserError: there are such rows, and they are not to be skipped.
    """
    if source.source == STORIES:
        return _story_rows(source.val_fraction or 0), 0
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    # All problems are collected before the first is reported: a data set often has several kinds of them.
    problems: list[tuple[str, str]] = []  # place and reason
    for file_split, location in source.files:
        for place, value in _rows_in(location):
            try:
                row = conversation_of(value)
            except ValueError as error:
                problems.append((f"{location}, {place}", str(error)))
                continue
            # The hash of the question alone: a row keeps its split when rows are added or removed.
            split = file_split or split_of(_first_question(row), source.val_fraction or 0)
            rows[split].append(row)
    _report(problems, source.skip_broken)
    return rows, len(problems)


def _report(problems: list[tuple[str, str]], skip_broken: bool) -> None:
    """Print the reasons of skipped rows, or raise ``UserError`` with the first rows if they are not to be skipped."""
    if problems and not skip_broken:
        lines = [f"{place}: {reason}" for place, reason in problems[:3]]
        if len(problems) > 3:
            lines.append(f"... and {len(problems) - 3:,} more rows")
        raise UserError("\n".join([*lines, "Correct them, or leave out such rows: --skip_broken"]))
    reasons = Counter(reason for _, reason in problems)
    for reason, number in reasons.most_common(MAX_NAMES):
        print(f"Left out {number:,} row{'s' if number > 1 else ''}: {strip_control_chars(reason)}")


def _story_rows(val_fraction: float) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for request in story_requests(STORY_REQUESTS, val_fraction):
        question = Message(role="user", content=request.request)
        answer = Message(role="assistant", content=request.story)
        rows[request.split].append(Row([question, answer], request.names))
    return rows


def _rows_in(location: Location) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file with their places, also those of an object such as ``{"data": [...]}``."""
    for place, value in read_rows(location):
        lists = _lists_of_rows(value) if suffix(location) == ".json" else []
        if not lists:
            yield place, value
        elif len(lists) == 1:
            name = lists[0]
            for number, row in enumerate(value[name], 1):
                yield f"row {number} of {name!r}", row
        else:
            raise UserError(
                f"{location}: one JSON object with several lists ({', '.join(map(repr, lists))}); expected one list of "
                "rows. Write each into its own file, such as train.json and val.json."
            )


def _lists_of_rows(value: Any) -> list[str]:
    """Return the names of the lists of rows in an object that is not a row."""
    if not isinstance(value, dict) or has_conversation(value):
        return []
    lists = [name for name, rows in value.items() if isinstance(rows, list) and rows]
    return [name for name in lists if isinstance(value[name][0], dict | list)]


def _first_question(row: Row) -> str:
    """Return the first user's message without white space at its ends, which decides the split."""
    return next(message["content"] for message in row.messages if message["role"] == "user").strip()


# --- writing ---


def _build(data_dir: Path, source: Source) -> Instructions:
    from filelock import FileLock

    rows, skipped = _read_source(source)
    # The first message of a validation conversation must not occur in training: with another answer to a question that
    # was trained on, the validation loss would say little about new questions.
    val_questions = {_first_question(row) for row in rows["val"]}
    train = [row for row in rows["train"] if _first_question(row) not in val_questions]
    unique = {"train": _without_duplicates(train), "val": _without_duplicates(rows["val"])}
    for split, split_rows in unique.items():
        if not split_rows:
            raise UserError(
                f"--instruct {source.location}: no conversation for {split} among {sum(map(len, unique.values()))} "
                f"({skipped:,} rows were left out); give more, or another --val_fraction."
            )

    # Only from here on anything is written, so a mistake in the source leaves the folder as it was.
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / LOCK):
        # What a killed call left behind is incomplete: _publish has moved complete builds.
        building = data_dir / BUILDING
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        result = Instructions(
            format=FORMAT,
            source=source.source,
            location=source.location,
            val_fraction=source.val_fraction,
            skip_broken=source.skip_broken,
            source_files=source.source_files,
            splits={split: _write_split(building, split, split_rows) for split, split_rows in unique.items()},
            notes=tuple(_notes(rows, train, unique, skipped)),
        )
        write_checksummed(building / MANIFEST, asdict(result))  # from here on the build is complete
        _publish(data_dir)
    return result


def _notes(rows: dict[str, list[Row]], train: list[Row], unique: dict[str, list[Row]], skipped: int) -> Iterator[str]:
    """Yield a sentence about each change between the rows that were read and the conversations that are kept."""
    kept = [*unique["train"], *unique["val"]]
    counts = {
        "duplicates are left out": len(train) + len(rows["val"]) - len(kept),
        "that begin like a validation conversation are left out of training": len(rows["train"]) - len(train),
        "rows that cannot be used are left out": skipped,
        "prompts were taken out of a template; finetuning applies its own": sum(row.unwrapped for row in kept),
    }
    for what, number in counts.items():
        if number:
            yield f"{number:,} {what}."
    unused = sorted({name for row in [*rows["train"], *rows["val"]] for name in row.unused})
    if unused:
        yield f"Fields not used: {strip_control_chars(_first_of(unused))}."


def _without_duplicates(rows: list[Row]) -> list[Row]:
    # White space at the ends makes a difference here, because an answer may be code.
    return list({blake2b(json.dumps(row.messages).encode()).digest(): row for row in rows}.values())


def _write_split(folder: Path, split: str, rows: list[Row]) -> Split:
    path = folder / f"{split}.jsonl"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            # "names" lets an evaluation compare the names in a request with those in the answer.
            values: dict[str, Any] = {"messages": row.messages}
            if row.names is not None:
                values["names"] = row.names
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    return Split(len(rows), manifest.record(path, folder))


def _publish(data_dir: Path) -> None:
    """Move a complete build to its place, also one of a call that was killed here; the manifest is moved last."""
    building = data_dir / BUILDING
    if (building / MANIFEST).is_file():
        for name in ("train.jsonl", "val.jsonl", MANIFEST):
            if (building / name).exists():
                os.replace(building / name, data_dir / name)
        building.rmdir()


# --- reading the prepared folder ---


def read(data_dir: Path) -> Instructions:
    """Return the metadata of a prepared folder after comparing its files with their checksums.

    Raises:
        UserError: the folder is missing or incomplete, or a file changed.
    """
    prepare = command("prepare_data.py", "--instruct", "SOURCE", "--data_dir", data_dir)
    metadata = _read_metadata(data_dir, prepare)
    # Checksums and not times: damage on the disk changes no time.
    paths = [data_dir / f"{split}.jsonl" for split in SPLITS]
    files = [manifest.record(path, data_dir) for path in paths if path.is_file()]
    changes = manifest.changed_files([split.file for split in metadata.splits.values()], files)
    if changes:
        raise UserError(
            f"{data_dir} is not as it was prepared: {'; '.join(changes)}. Restore it, or make it again: `{prepare} "
            "--overwrite`. To add conversations of your own, give them as SOURCE."
        )
    return metadata


def _read_metadata(data_dir: Path, prepare: str) -> Instructions:
    try:
        return _parse(read_checksummed(data_dir / MANIFEST))
    except FileNotFoundError:
        state = f"holds no {MANIFEST}" if data_dir.is_dir() else "does not exist"
        raise UserError(f"{data_dir} {state}; expected prepared instructions. Make them: `{prepare}`") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{data_dir / MANIFEST} cannot be read ({error}). Make it again: `{prepare} --overwrite`"
        ) from None


def _parse(values: dict[str, Any]) -> Instructions:
    if values["format"] not in (1, FORMAT):
        raise ValueError(f"it has the format {values['format']}, expected {FORMAT}")
    # Unknown fields come from other versions, which change the format number if the known fields change their meaning.
    splits = {
        name: Split(split["conversations"], FileRecord(**known_fields(FileRecord, split["file"])))
        for name, split in values["splits"].items()
    }
    records = tuple(FileRecord(**known_fields(FileRecord, record)) for record in values["source_files"])
    known = {**known_fields(Instructions, values), "notes": tuple(values.get("notes", ()))}
    return Instructions(**{**known, "splits": splits, "source_files": records})


def instructions_fingerprint(data_dir: Path) -> str:
    """Return the SHA-256 of ``train.jsonl``.

    Raises:
        UserError: the folder is incomplete or changed.
    """
    return read(data_dir).splits["train"].file.sha256


def conversations(data_dir: Path, split: str) -> list[list[Message]]:
    """Return the conversations of a split in the order of its file."""
    with open(data_dir / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]
