"""Prepare conversations for finetuning: rows of any common shape become ``train.jsonl`` and ``val.jsonl``.

A line is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, which chat APIs
and other tuning libraries read too. ``instructions.json`` is written last: without it the folder is incomplete.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from litmoe.checksummed_json import known_fields, read_checksummed, write_checksummed
from litmoe.cli import UserError, command, nearest, quoted, strip_control_chars
from litmoe.data import manifest
from litmoe.data.conversations import Message
from litmoe.data.corpora import DEFAULT_VAL_FRACTION, files_by_split, listed
from litmoe.data.documents import split_of
from litmoe.data.files import (
    METADATA_FILES,
    ROW_SUFFIXES,
    Location,
    first_names,
    kinds,
    read_rows,
    suffix,
    visible_files,
)
from litmoe.data.hub import HUB_NAME, Dataset
from litmoe.data.instruction_rows import Row, conversation_of
from litmoe.data.manifest import SPLITS, FileRecord
from litmoe.data.stories import story_requests
from litmoe.renaming import rename

# Format of the folder, since 0.1.0.
FORMAT = 2
MANIFEST = "instructions.json"
OUTPUTS = ("train.jsonl", "val.jsonl", MANIFEST)
# Folder in ``data_dir`` for files that are not complete yet.
BUILDING = ".building"
LOCK = ".prepare.lock"
STORIES = "stories"
# 1.1 million training tokens: an epoch takes two CPU cores a minute or two.
STORY_REQUESTS = 6000
# Reasons why rows are left out that a message names.
MAX_REASONS = 5
ROW_FILE = f"{', '.join(ROW_SUFFIXES)} file"


@dataclass
class InstructArgs:
    """Turns instructions and their answers into the conversations that finetune.py trains on."""

    instruct: str = STORIES
    """The source: a .json, .jsonl, .parquet, .arrow, .csv or .tsv file (also as .gz, .bz2, .xz or .zst), a folder of
    such files, `hf:ORG/NAME[:CONFIG]` for a dataset of the Hugging Face Hub, or `stories`, 6,000 requests for stories
    of the built-in corpus. In a folder, files and sub-folders called train and val (or valid, validation, dev) keep
    their split, test is left out, and without a val all are split. A row is Alpaca's (instruction, input, output,
    history), Dolly's (instruction, context, response), a pair (prompt and response or completion, question and answer,
    ...), or a chat (messages, conversations or conversation, with a system message in it or next to it)."""
    data_dir: Path = Path("data/instruct")
    """Folder for train.jsonl, val.jsonl and instructions.json."""
    val_fraction: float = DEFAULT_VAL_FRACTION
    """Share of the conversations for validation, chosen by the hash of their first message, if the source has no val
    split of its own."""
    skip_broken: bool = False
    """Leave out rows without a usable conversation, such as one with an empty answer, and count them."""
    overwrite: bool = False
    """Replace other conversations in DATA_DIR."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction}: expected a number between 0 and 1, such as 0.1.")


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
    splits: dict[str, Split] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Sentences about what was left out or changed."""

    def summary(self) -> str:
        """Return the size of the splits and the notes, one line each."""
        train, val = self.splits["train"].conversations, self.splits["val"].conversations
        return "\n".join([f"{train:,} training conversations, {val:,} for validation.", *self.notes])


class Source(NamedTuple):
    """Where the rows come from."""

    name: str
    """``Instructions.source``"""
    location: str
    """``Instructions.location``"""
    has_val: bool
    """Whether it has validation rows of its own. Otherwise all rows are split by hash."""
    files: Mapping[str, Sequence[Location]]
    """The files of each split"""
    records: tuple[FileRecord, ...]
    """The same files as ``instructions.json`` stores them"""
    notes: dict[str, int]
    """What is used for validation, or not at all, and how many files"""

    def rows(self) -> Iterator[tuple[str, str, Any]]:
        """Yield the split of the file, the place and the content of each row."""
        for split, locations in self.files.items():
            for location in locations:
                for place, value in read_rows(location):
                    yield split, f"{location}, {place}", value


def prepare_instructions(args: InstructArgs) -> Instructions:
    """Write the conversations of a source into ``data_dir``; do nothing if they are there already.

    Raises:
        UserError: a mistake in the source or the settings. ``data_dir`` is unchanged then.
    """
    # A call that was killed at its very end left a complete build behind. Without one, the folder may be read-only.
    if (args.data_dir / BUILDING / MANIFEST).is_file():
        from filelock import FileLock

        with FileLock(args.data_dir / LOCK):
            _publish(args.data_dir)
    existing = None if args.overwrite else _existing(args.data_dir)
    source = _find_source(args, existing)
    val_fraction = None if source.has_val else args.val_fraction
    wanted = Instructions(FORMAT, source.name, source.location, val_fraction, args.skip_broken, source.records)
    if existing is not None:
        _require_same(args.data_dir, existing, wanted)
        print(f"{args.data_dir} is prepared and nothing changed; nothing to do.\n{existing.summary()}")
        return existing

    rows, problems = _read_rows(source, args.val_fraction)
    if problems and not args.skip_broken:
        raise UserError(_first_problems(problems))
    rows, changes = _without_repetitions(rows)
    notes = source.notes | changes | _notes_on_problems(problems)
    wanted = replace(wanted, notes=tuple(f"{number:,} {what}." for what, number in notes.items() if number))
    _require_rows(rows, wanted)
    # Only from here on anything is written, so a mistake in the source leaves the folder as it was.
    result = _write(args.data_dir, wanted, rows)
    print(f"{args.data_dir}: {result.summary()}")
    return result


def _existing(data_dir: Path) -> Instructions | None:
    if (data_dir / MANIFEST).exists():
        return read(data_dir)
    # Without metadata the files may be the user's own.
    for path in (data_dir / "train.jsonl", data_dir / "val.jsonl"):
        if path.exists():
            raise UserError(
                f"{path} was not made by this command, which would replace it. Choose another --data_dir (and use this "
                f"folder as the source: --instruct {quoted(data_dir)}), or --overwrite."
            )
    return None


def _require_same(data_dir: Path, existing: Instructions, wanted: Instructions) -> None:
    """Raise ``UserError`` if the folder was made from other files or with other settings."""
    differences = []
    for name in ("source", "location", "val_fraction", "skip_broken"):
        old, new = getattr(existing, name), getattr(wanted, name)
        if old != new:
            differences.append(f"{name} {old!r} became {new!r}")
    # With another source, all files would be reported as changed.
    differences = differences or manifest.changed_files(existing.source_files, wanted.source_files)
    if differences:
        raise UserError(
            f"{data_dir} holds conversations with other settings ({'; '.join(differences)}); choose another "
            "--data_dir, or replace them with --overwrite."
        )


# --- finding the source ---


def _find_source(args: InstructArgs, existing: Instructions | None) -> Source:
    if args.instruct == STORIES:
        # The location is compared with the one in folders of 0.1.0, so its text stays the same.
        return Source(STORIES, "story_instructions(seed=1)", False, {}, (), {})
    hub_name = HUB_NAME.fullmatch(args.instruct)
    if hub_name:
        return _hub_source(hub_name, existing)
    return _local_source(args, existing)


def _hub_source(match: re.Match[str], existing: Instructions | None) -> Source:
    name = match.group()
    if existing is not None and existing.source == name:
        # The folder holds a fixed revision of the dataset, so there is nothing to ask the Hub.
        return Source(name, existing.location, existing.val_fraction is None, {}, existing.source_files, {})
    opened = Dataset(match["path"], match["config"], flag="--instruct").find()
    records = tuple(chain.from_iterable(opened.records.values()))
    return Source(name, opened.location, "val" in opened.files, opened.files, records, {})


def _local_source(args: InstructArgs, existing: Instructions | None) -> Source:
    path = Path(args.instruct)
    outputs = [(args.data_dir / name).resolve() for name in OUTPUTS]
    _check_path(path, args.data_dir, outputs)
    folder, splits = path.parent, {"train": [path], "val": []}
    notes: dict[str, int] = {}
    if path.is_dir():
        # The prepared conversations may be in a folder inside the source, and are no source themselves.
        folder, files = path, [file for file in visible_files(path) if file.resolve() not in outputs]
        splits, notes = _sort_files(folder, files)
    # The checksums of unchanged files are known from the last time.
    known = existing.source_files if existing is not None else ()
    records = manifest.refresh(chain.from_iterable(splits.values()), folder, known)
    return Source("files", str(path.resolve()), bool(splits["val"]), splits, records, notes)


def _check_path(path: Path, data_dir: Path, outputs: list[Path]) -> None:
    """Raise ``UserError`` if a file or folder of the user cannot be a source."""
    if not path.exists():
        hint = "; did you mean stories?" if nearest(str(path), [STORIES]) else "."
        raise UserError(
            f"--instruct {path}: no such file or folder{hint} Expected a {ROW_FILE}, a folder of them, `{STORIES}` or "
            "hf:ORG/NAME."
        )
    if path.is_file() and suffix(path) not in ROW_SUFFIXES:
        raise UserError(f"--instruct {path}: expected a {ROW_FILE}, or a folder with such files.")
    # With --overwrite, the source would be replaced by a part of itself.
    if path.resolve() in (data_dir.resolve(), *outputs):
        raise UserError(f"--instruct {path}: files of it in {data_dir} would be replaced; choose another --data_dir.")


def _sort_files(folder: Path, files: list[Path]) -> tuple[dict[str, list[Path]], dict[str, int]]:
    """Return the files of each split, and notes on the files that are not for training."""
    by_split = files_by_split(folder, [*filter(_has_rows, files)])
    # Without a file that is named train, those without a split in their name are the training data.
    train, val = by_split["train"] or by_split[None], by_split["val"]
    unused = sorted({*files} - {*train, *val})
    by_name = [file for file in unused if _has_rows(file)]
    by_type = [file for file in unused if not _has_rows(file)]
    if not train:
        content = listed(folder, unused) or "no files"
        raise UserError(f"--instruct {folder}: expected a {ROW_FILE} to train on in that folder. It has {content}.")
    notes = {
        f"files are used for validation: {listed(folder, val)}": len(val),
        f"files are not used, because of their names (test data): {listed(folder, by_name)}": len(by_name),
        f"files are not read ({kinds(by_type)}): {listed(folder, by_type)}": len(by_type),
    }
    return {"train": train, "val": val}, notes


def _has_rows(file: Path) -> bool:
    return suffix(file) in ROW_SUFFIXES and file.name not in (MANIFEST, *METADATA_FILES)


# --- reading the rows ---


def _read_rows(source: Source, val_fraction: float) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Return the conversations of each split, and the rows without one: the place of each row and the reason."""
    if source.name == STORIES:
        return _story_rows(val_fraction), {}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    # All problems are collected before the first is reported: a data set often has several kinds of them.
    problems: dict[str, str] = {}
    for file_split, place, value in source.rows():
        try:
            row = conversation_of(value)
        except ValueError as error:
            problems[place] = strip_control_chars(str(error))
        else:
            # The hash of the question alone: a row keeps its split when rows are added or removed.
            split = file_split if source.has_val else split_of(_first_question(row), val_fraction)
            rows[split].append(row)
    return rows, problems


def _story_rows(val_fraction: float) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for request in story_requests(STORY_REQUESTS, val_fraction):
        question = Message(role="user", content=request.request)
        answer = Message(role="assistant", content=request.story)
        rows[request.split].append(Row([question, answer], request.names))
    return rows


def _first_question(row: Row) -> str:
    """Return the first user's message without white space at its ends, which decides the split."""
    return next(message["content"] for message in row.messages if message["role"] == "user").strip()


def _notes_on_problems(problems: dict[str, str]) -> dict[str, int]:
    reasons = Counter(problems.values()).most_common(MAX_REASONS)
    total = {"rows that cannot be used are left out": len(problems)}
    return total | {f"of these: {reason}": number for reason, number in reasons}


def _first_problems(problems: dict[str, str]) -> str:
    lines = [f"{place}: {reason}" for place, reason in islice(problems.items(), 3)]
    if len(problems) > 3:
        lines.append(f"... and {len(problems) - 3:,} more rows")
    return "\n".join([*lines, "Correct them, or leave out such rows: --skip_broken"])


def _without_repetitions(rows: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Return the rows to keep, and notes on what was left out or changed."""
    # The first message of a validation conversation must not occur in training: with another answer to a question that
    # was trained on, the validation loss would say little about new questions.
    val_questions = {_first_question(row) for row in rows["val"]}
    train = [row for row in rows["train"] if _first_question(row) not in val_questions]
    kept = {"train": _unique(train), "val": _unique(rows["val"])}
    all_kept = kept["train"] + kept["val"]
    unused = sorted({name for row in all_kept for name in row.unused})
    notes = {
        "duplicates are left out": len(train) + len(rows["val"]) - len(all_kept),
        "that begin like a validation conversation are left out of training": len(rows["train"]) - len(train),
        "prompts were taken out of a template; finetuning applies its own": sum(row.unwrapped for row in all_kept),
        f"fields are not used: {first_names(unused)}": len(unused),
    }
    return kept, notes


def _unique(rows: list[Row]) -> list[Row]:
    # White space at the ends makes a difference here, because an answer may be code.
    return list({blake2b(json.dumps(row.messages).encode()).digest(): row for row in rows}.values())


def _require_rows(rows: dict[str, list[Row]], wanted: Instructions) -> None:
    total = sum(map(len, rows.values()))
    for split in SPLITS:
        if not rows[split]:
            problem = f"--instruct {wanted.location}: no conversation for {split} among {total} that can be used"
            raise UserError("\n".join([f"{problem}; give more, or another --val_fraction.", *wanted.notes]))


# --- writing ---


def _write(data_dir: Path, wanted: Instructions, rows: dict[str, list[Row]]) -> Instructions:
    from filelock import FileLock

    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / LOCK):
        # What a killed call left behind is incomplete: _publish has moved complete builds.
        building = data_dir / BUILDING
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        result = replace(wanted, splits={split: _write_split(building, split, rows[split]) for split in SPLITS})
        write_checksummed(building / MANIFEST, asdict(result))  # from here on the build is complete
        _publish(data_dir)
    return result


def _write_split(folder: Path, split: str, rows: list[Row]) -> Split:
    path = folder / f"{split}.jsonl"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            # "names" lets an evaluation compare the names in a request with those in the answer.
            names = {} if row.names is None else {"names": row.names}
            file.write(json.dumps({"messages": row.messages, **names}, ensure_ascii=False) + "\n")
    return Split(len(rows), manifest.record(path, folder))


def _publish(data_dir: Path) -> None:
    """Move a complete build to its place, also one of a call that was killed here; the manifest is moved last."""
    building = data_dir / BUILDING
    if (building / MANIFEST).is_file():
        for name in OUTPUTS:
            if (building / name).exists():
                rename(building / name, data_dir / name)
        building.rmdir()


# --- reading the prepared folder ---


def read(data_dir: Path) -> Instructions:
    """Return the metadata of a prepared folder after comparing its files with their checksums.

    Raises:
        UserError: the folder is missing or incomplete, or a file changed.
    """
    prepare = command("prepare_data.py", "--instruct", "SOURCE", "--data_dir", data_dir)
    try:
        metadata = _parse(read_checksummed(data_dir / MANIFEST))
    except FileNotFoundError:
        raise UserError(
            f"{data_dir / MANIFEST} does not exist; expected prepared instructions. Make them: `{prepare}`"
        ) from None
    except manifest.UNREADABLE as error:
        raise UserError(
            f"{data_dir / MANIFEST} cannot be read ({error}). Make it again: `{prepare} --overwrite`"
        ) from None

    # Checksums and not times: damage on the disk changes no time.
    files = [manifest.record(path, data_dir) for path in data_dir.glob("*.jsonl") if path.name in OUTPUTS]
    changes = manifest.changed_files([split.file for split in metadata.splits.values()], files)
    if changes:
        raise UserError(
            f"{data_dir} changed since it was prepared: {'; '.join(changes)}. Restore it, or make it again: `{prepare} "
            "--overwrite`. To add conversations of your own, give them as SOURCE."
        )
    return metadata


def _parse(values: dict[str, Any]) -> Instructions:
    if values["format"] != FORMAT:
        raise ValueError(f"it has the format {values['format']}, expected {FORMAT}")
    # Unknown fields come from other versions, which change the format number if the known fields change their meaning.
    known = known_fields(Instructions, values)
    known["splits"] = {
        name: Split(split["conversations"], FileRecord(**known_fields(FileRecord, split["file"])))
        for name, split in values["splits"].items()
    }
    known["source_files"] = tuple(FileRecord(**known_fields(FileRecord, file)) for file in values["source_files"])
    known["notes"] = tuple(values.get("notes", ()))
    return Instructions(**known)


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
