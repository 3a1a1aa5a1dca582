"""Prepare conversations for finetuning: rows of any common shape become ``train.jsonl`` and ``val.jsonl``.

A line is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, which chat APIs
and other tuning libraries read too. ``instructions.json`` is written last: without it the folder is incomplete.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from litmoe.checksummed_json import file_sha256, known_fields, read_sealed, write_sealed
from litmoe.cli import UserError, command, harmless, nearest, quoted
from litmoe.data.conversations import Message
from litmoe.data.corpora import HUB_NAME, HubDataset, split_names
from litmoe.data.documents import split_of
from litmoe.data.files import ROW_SUFFIXES, BadRow, Location, read_rows, suffix
from litmoe.data.instruction_rows import Row, conversation_of, has_conversation
from litmoe.data.manifest import Settings
from litmoe.data.stories import story_requests

FORMAT = 2
"""Format of the folder. Format 1 removed white space at the ends of texts; it can still be read."""
MANIFEST = "instructions.json"
SPLITS = ("train", "val")
BUILDING = ".building"
"""Folder in ``data_dir`` for files that are not complete yet"""
LOCK = ".prepare.lock"
STORIES = "stories"
STORY_REQUESTS = 6000
"""1.1 million training tokens: an epoch takes two CPU cores a minute or two"""
DEFAULT_VAL_FRACTION = 0.1
MAX_NAMES = 5
"""Files or fields that a message names"""
# Descriptions of a data set, which are not rows of it.
METADATA_FILES = (MANIFEST, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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
class FileRecord:
    """A file and its contents at the time of preparation."""

    path: str
    bytes: int
    sha256: str


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
    duplicates: int = 0
    """Conversations left out because they occurred before."""
    held_out: int = 0
    """Training conversations left out because a validation conversation begins with the same message."""
    unwrapped: int = 0
    """Prompts that were stored in a template, which was removed."""
    skipped: int = 0
    """Rows left out because they hold no usable conversation."""
    unused_fields: tuple[str, ...] = ()
    """Fields of the rows that do not belong to the conversations."""

    def summary(self) -> str:
        """Return the counts, one line each."""
        train, val = (self.splits[split].conversations for split in SPLITS)
        lines = [f"{train:,} training conversations, {val:,} for validation."]
        if self.duplicates:
            lines.append(f"{self.duplicates:,} duplicates are left out.")
        if self.held_out:
            lines.append(f"{self.held_out:,} that begin like a validation conversation are left out of training.")
        if self.skipped:
            lines.append(f"{self.skipped:,} rows that cannot be used are left out.")
        if self.unwrapped:
            lines.append(f"{self.unwrapped:,} prompts were taken out of a template; finetuning applies its own.")
        if self.unused_fields:
            lines.append(f"Fields not used: {harmless(_some_of(self.unused_fields))}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Source:
    """The source of the conversations; the first five fields are recorded in ``instructions.json``."""

    source: str
    location: str
    val_fraction: float | None
    skip_broken: bool
    source_files: tuple[FileRecord, ...] = ()
    files: dict[str | None, list[Location]] = field(default_factory=dict)
    """Files by split; those of None are split by hash"""
    notes: tuple[str, ...] = ()
    """Messages about files of the source that are not used"""


def prepare_instructions(args: InstructArgs) -> Instructions:
    """Write the conversations of a source into ``data_dir``; do nothing if they are there already.

    Raises:
        UserError: a mistake in the source or the settings. ``data_dir`` is unchanged then.
    """
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: expected a number between 0 and 1, such as 0.1.")
    _publish(args.data_dir)
    existing = None if args.overwrite else _existing(args.data_dir)
    source = _find_source(args, existing)
    if existing is not None:
        if reasons := _differences(existing, source):
            raise UserError(
                f"{args.data_dir} holds conversations with other settings ({'; '.join(reasons)}); choose another "
                "--data_dir, or replace them with --overwrite."
            )
        print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
        print("\n".join([existing.summary(), *source.notes]))
        return existing
    result = _build(args.data_dir, source)
    print("\n".join([f"{args.data_dir}: {result.summary()}", *source.notes]))
    return result


def _existing(data_dir: Path) -> Instructions | None:
    if (data_dir / MANIFEST).exists():
        return read(data_dir)
    for split in SPLITS:
        if (data_dir / f"{split}.jsonl").exists():
            raise UserError(
                f"{data_dir / f'{split}.jsonl'} was not made by this command, which would replace it. Choose another "
                f"--data_dir (and use this folder as the source: --instruct {quoted(data_dir)}), or --overwrite."
            )
    return None


def _differences(existing: Instructions, source: Source) -> list[str]:
    differences = []
    for name in ("source", "location", "val_fraction", "skip_broken"):
        old, new = getattr(existing, name), getattr(source, name)
        if old != new:
            differences.append(f"{name} {old!r} became {new!r}")
    # No built-in story has white space at its ends, so format 1 makes no difference there.
    if existing.format != FORMAT and source.source != STORIES:
        differences.append("an older version made them, which removed white space at the ends of texts")
    return differences or _changed_files(existing.source_files, source.source_files)


# --- finding the source ---


def _find_source(args: InstructArgs, existing: Instructions | None) -> Source:
    fraction = DEFAULT_VAL_FRACTION if args.val_fraction is None else args.val_fraction
    if args.instruct == STORIES:
        # The location is part of folders that 0.1.0 made, so its text stays as it is.
        return Source(STORIES, "story_instructions(seed=1)", fraction, args.skip_broken)
    if HUB_NAME.fullmatch(args.instruct):
        return _hub_source(args, fraction, existing)
    path = Path(args.instruct)
    if not path.exists():
        hint = "; did you mean stories?" if nearest(args.instruct, [STORIES]) else "."
        raise UserError(
            f"--instruct {args.instruct}: no such file or folder{hint} Expected a {', '.join(ROW_SUFFIXES)} file, a "
            f"folder of them, `{STORIES}` or hf:ORG/NAME."
        )
    files, notes = _local_files(path, args.data_dir)
    paths = [file for split_files in files.values() for file in split_files]
    outputs = [(args.data_dir / f"{split}.jsonl").resolve() for split in SPLITS]
    if any(file.resolve() in outputs for file in paths):
        raise UserError(
            f"--instruct {path}: its files in {args.data_dir} would be replaced; choose another --data_dir."
        )
    base = path.parent if path.is_file() else path
    return Source(
        "files",
        str(path.resolve()),
        None if "val" in files else fraction,
        args.skip_broken,
        tuple(_record(file, base) for file in paths),
        {split: list(split_files) for split, split_files in files.items()},
        notes,
    )


def _hub_source(args: InstructArgs, fraction: float, existing: Instructions | None) -> Source:
    if existing is not None and existing.source == args.instruct:
        # The folder holds a fixed revision of the dataset, so there is nothing to ask the Hub.
        same_fraction = None if existing.val_fraction is None else fraction
        return Source(args.instruct, existing.location, same_fraction, args.skip_broken, existing.source_files)
    name = HUB_NAME.fullmatch(args.instruct)
    assert name is not None
    dataset = HubDataset("", name["path"], name["config"], column=None, flag="--instruct")
    opened = dataset.open(Settings(None, None, None, None))
    records = tuple(
        FileRecord(**known_fields(FileRecord, asdict(record))) for split in opened.records.values() for record in split
    )
    has_val = "val" in opened.files
    files = {split if has_val else None: locations for split, locations in opened.files.items()}
    return Source(args.instruct, opened.location, None if has_val else fraction, args.skip_broken, records, files)


def _local_files(path: Path, data_dir: Path) -> tuple[dict[str | None, list[Path]], tuple[str, ...]]:
    """Return the files of each split (None: to be split by hash), and a note on each kind of file that is not used."""
    if path.is_file():
        if suffix(path) not in ROW_SUFFIXES:
            raise UserError(
                f"--instruct {path}: expected a {', '.join(ROW_SUFFIXES)} file, or a folder with such files."
            )
        return {None: [path]}, ()
    all_files = _visible_files(path, data_dir)
    row_files = [file for file in all_files if suffix(file) in ROW_SUFFIXES and file.name not in METADATA_FILES]
    by_split: dict[str | None, list[Path]] = {"train": [], "val": [], "test": [], None: []}
    for file, split in split_names(path, row_files).items():
        by_split[split].append(file)
    train, val, test, unnamed = by_split["train"], by_split["val"], by_split["test"], by_split[None]

    notes = []
    for files, use in (
        (val, "Used for validation"),
        (test, "Left out because it is test data"),
        ([file for file in all_files if file not in row_files], "Not read because of its type"),
    ):
        if files:
            names = _some_of(file.relative_to(path).as_posix() for file in files)
            notes.append(f"{use}: {names} ({len(files):,} files).")
    if unnamed and (train or val):
        raise UserError(
            f"--instruct {path}: {unnamed[0].relative_to(path).as_posix()} is neither train.* nor val.*, while other "
            "files are; move it elsewhere."
        )
    if not (train or unnamed):
        problem = f"--instruct {path}: expected a {', '.join(ROW_SUFFIXES)} file to train on in that folder."
        raise UserError("\n".join([problem, *notes]))
    if val:
        return {"train": train, "val": val}, tuple(notes)
    return {None: train or unnamed}, tuple(notes)


def _visible_files(folder: Path, data_dir: Path) -> list[Path]:
    """Return the files below ``folder`` in a fixed order, without hidden ones and what is prepared in ``data_dir``."""
    has_output_inside = folder.resolve() != data_dir.resolve()
    files = []
    for file in folder.rglob("*"):
        is_hidden = any(name.startswith(".") for name in file.relative_to(folder).parts)
        is_output = has_output_inside and file.resolve().is_relative_to(data_dir.resolve())
        if file.is_file() and not is_hidden and not is_output:
            files.append(file)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


# --- reading the rows ---


def _read_source(source: Source) -> tuple[dict[str, list[Row]], int]:
    """Return the conversations of each split, and the number of rows without one.

    Raises:
        UserError: there are such rows, and they are not to be skipped.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    if source.source == STORIES:
        assert source.val_fraction is not None
        for request in story_requests(STORY_REQUESTS, source.val_fraction):
            question = Message(role="user", content=request.request)
            answer = Message(role="assistant", content=request.story)
            rows[request.split].append(Row([question, answer], request.names))
        return rows, 0

    problems: list[tuple[str, str]] = []  # place and reason
    for split, locations in source.files.items():
        for location in locations:
            for place, value in _rows_in(location):
                try:
                    row = _row_of(value)
                except ValueError as error:
                    problems.append((f"{location}, {place}", str(error)))
                else:
                    rows[split or split_of(_first_question(row), source.val_fraction or 0)].append(row)
    if problems and not source.skip_broken:
        lines = [f"{place}: {reason}" for place, reason in problems[:3]]
        if len(problems) > 3:
            lines.append(f"... and {len(problems) - 3:,} more rows")
        raise UserError("\n".join([*lines, "Correct them, or leave out such rows: --skip_broken"]))
    for reason, number in Counter(reason for _, reason in problems).most_common(MAX_NAMES):
        print(f"Left out {number:,} row{'s' if number > 1 else ''}: {harmless(reason)}")
    return rows, len(problems)


def _row_of(value: Any) -> Row:
    if isinstance(value, BadRow):
        raise value
    return conversation_of(value)


def _rows_in(location: Location) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file with their places, also those of an object such as ``{"data": [...]}``."""
    for place, value in read_rows(location):
        if suffix(location) != ".json" or not isinstance(value, dict) or has_conversation(value):
            yield place, value
            continue
        lists = [name for name, rows in value.items() if isinstance(rows, list) and _are_objects(rows)]
        if len(lists) > 1:
            raise UserError(
                f"{location}: one JSON object with several lists ({', '.join(map(repr, lists))}); expected one list of "
                "rows. Write each into its own file, such as train.json and val.json."
            )
        if lists:
            yield from ((f"row {number} of {lists[0]!r}", row) for number, row in enumerate(value[lists[0]], 1))
        else:
            yield place, value


def _are_objects(rows: list[Any]) -> bool:
    return len(rows) > 0 and isinstance(rows[0], dict | list)


def _first_question(row: Row) -> str:
    """Return the first user's message without white space at its ends, which decides the split."""
    return next(message["content"] for message in row.messages if message["role"] == "user").strip()


# --- writing ---


def _build(data_dir: Path, source: Source) -> Instructions:
    from filelock import FileLock

    rows, skipped = _read_source(source)
    unused = {name for split_rows in rows.values() for row in split_rows for name in row.unused}

    # The first message of a conversation occurs in one split only.
    val_questions = {_first_question(row) for row in rows["val"]}
    train = [row for row in rows["train"] if _first_question(row) not in val_questions]
    unique = {"train": _without_duplicates(train), "val": _without_duplicates(rows["val"])}
    for split, split_rows in unique.items():
        if not split_rows:
            total = sum(map(len, unique.values()))
            skipped_rows = f" ({skipped:,} rows were left out)" if skipped else ""
            raise UserError(
                f"--instruct {source.location}: no conversation for {split} among {total}{skipped_rows}; give more, or "
                "another --val_fraction."
            )

    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / LOCK):
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
            duplicates=len(train) + len(rows["val"]) - sum(map(len, unique.values())),
            held_out=len(rows["train"]) - len(train),
            unwrapped=sum(row.unwrapped for split_rows in unique.values() for row in split_rows),
            skipped=skipped,
            unused_fields=tuple(sorted(unused)),
        )
        write_sealed(building / MANIFEST, asdict(result))  # from here on the build is complete
        _publish(data_dir)
    return result


def _without_duplicates(rows: list[Row]) -> list[Row]:
    return list({blake2b(json.dumps(row.messages).encode()).digest(): row for row in rows}.values())


def _write_split(folder: Path, split: str, rows: list[Row]) -> Split:
    path = folder / f"{split}.jsonl"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            values: dict[str, Any] = {"messages": row.messages}
            if row.names is not None:
                values["names"] = row.names
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    return Split(len(rows), _record(path, folder))


def _publish(data_dir: Path) -> None:
    """Move a complete build to its place, also one of a call that was killed here; the manifest is moved last."""
    building = data_dir / BUILDING
    if (building / MANIFEST).is_file():
        for name in ("train.jsonl", "val.jsonl", MANIFEST):
            if (building / name).exists():
                os.replace(building / name, data_dir / name)
        building.rmdir()


def _record(path: Path, folder: Path) -> FileRecord:
    return FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))


def _changed_files(old: Iterable[FileRecord], new: Iterable[FileRecord]) -> list[str]:
    before, after = ({record.path: record.sha256 for record in records} for records in (old, new))
    changes = [f"{path} changed" for path in before if path in after and before[path] != after[path]]
    changes += [f"{path} is missing" for path in before if path not in after]
    changes += [f"{path} is new" for path in after if path not in before]
    return changes


def _some_of(names: Iterable[str]) -> str:
    """Return the first names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


# --- reading the prepared folder ---


def read(data_dir: Path) -> Instructions:
    """Return the metadata of a prepared folder after comparing its files with their checksums.

    Raises:
        UserError: the folder is missing or incomplete, or a file changed.
    """
    prepare = command("prepare_data.py", "--instruct", "SOURCE", "--data_dir", data_dir)
    try:
        result = _parse(read_sealed(data_dir / MANIFEST))
    except FileNotFoundError:
        state = f"holds no {MANIFEST}" if data_dir.is_dir() else "does not exist"
        raise UserError(f"{data_dir} {state}; expected prepared instructions. Make them: `{prepare}`") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{data_dir / MANIFEST} cannot be read ({error}). Make it again: `{prepare} --overwrite`"
        ) from None
    if result.format not in (1, FORMAT):
        raise UserError(
            f"{data_dir} has the format {result.format}, expected {FORMAT}. Make it again: `{prepare} --overwrite`"
        )
    # Checksums and not times: damage on the disk changes no time.
    files = [path for split in SPLITS if (path := data_dir / f"{split}.jsonl").is_file()]
    records = [split.file for split in result.splits.values()]
    if changes := _changed_files(records, [_record(path, data_dir) for path in files]):
        raise UserError(
            f"{data_dir} is not as it was prepared: {'; '.join(changes)}. Restore it, or make it again: `{prepare} "
            "--overwrite`. To add conversations of your own, give them as SOURCE."
        )
    return result


def _parse(values: dict[str, Any]) -> Instructions:
    splits = {
        name: Split(split["conversations"], FileRecord(**known_fields(FileRecord, split["file"])))
        for name, split in values["splits"].items()
    }
    records = tuple(FileRecord(**known_fields(FileRecord, record)) for record in values["source_files"])
    unused = tuple(values.get("unused_fields", ()))
    fields = known_fields(Instructions, values)
    return Instructions(**{**fields, "splits": splits, "source_files": records, "unused_fields": unused})


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
