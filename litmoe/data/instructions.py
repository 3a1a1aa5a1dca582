"""Instructions: conversations in any common shape (``instruction_rows``), made the lines of ``train.jsonl`` and
``val.jsonl``.

A line is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, as chat APIs and
other tuning libraries read it too. ``instructions.json`` is written last: without it the folder is not complete.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from litmoe.checksummed_json import known_fields, read_sealed, write_sealed
from litmoe.cli import UserError, command, harmless, nearest, quoted
from litmoe.data import manifest
from litmoe.data.conversations import Message
from litmoe.data.corpora import HUB_NAME, HubDataset, split_names
from litmoe.data.documents import split_of
from litmoe.data.files import Location, suffix
from litmoe.data.instruction_rows import SUFFIXES, Row, conversation_of, rows_of
from litmoe.data.manifest import SPLITS, FileRecord, Settings
from litmoe.data.prepare import DEFAULT_VAL_FRACTION, locked
from litmoe.data.stories import story_requests

FORMAT = 2
"""Of the folder. 1 had no white space at the ends of texts; finetuning and evaluation read it as it is."""
MANIFEST = "instructions.json"
BUILDING = ".building"  # the folder on its way, below data_dir
STORIES = "stories"
STORY_INSTRUCTIONS = 6000  # 1.1 million tokens to train on: an epoch takes two CPU cores a minute or two

NO_ROWS = (MANIFEST, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set"""
NAMED = 5  # files or fields that a message names at most


@dataclass
class InstructArgs:
    """Turns instructions and their answers into the conversations that finetune.py trains on."""

    instruct: str = STORIES
    """Where they come from: a .json, .jsonl, .parquet, .csv or .tsv file (also as .gz, .bz2, .xz or .zst), a folder of
    them, `hf:ORG/NAME[:CONFIG]`, a dataset of the Hugging Face Hub, or `stories`, 6,000 requests for stories of the
    built-in corpus. In a folder, files and sub-folders called train and val (or valid, validation, dev) keep their
    split, test is left out, and where there is no val all are split. A row is Alpaca's (instruction, input, output,
    history), Dolly's (instruction, context, response), a pair (prompt and response or completion, question and answer,
    ...), or a chat (messages, conversations or conversation, with a system message in it or beside it)."""
    data_dir: Path = Path("data/instruct")
    """Folder that train.jsonl, val.jsonl and instructions.json go into."""
    val_fraction: float | None = None
    """Share of the conversations that are held out, chosen by the hash of their first message, where the source has no
    val.* of its own (default 0.1)."""
    skip_broken: bool = False
    """Leave out rows that hold no conversation, such as one with an empty answer, and count them."""
    overwrite: bool = False
    """Replace other conversations that lie there."""


@dataclass(frozen=True)
class Split:
    """One of the two files."""

    conversations: int
    file: FileRecord


@dataclass(frozen=True)
class Instructions:
    """``instructions.json``: what lies in the folder and what it was made from, written last."""

    format: int
    source: str
    """``stories``, ``files`` for the user's own, or the Hub's ``hf:ORG/NAME``."""
    location: str
    """The path, the generator's call, or the dataset and its revision."""
    val_fraction: float | None
    """None: the source came with validation conversations of its own."""
    skip_broken: bool
    source_files: tuple[FileRecord, ...]
    splits: dict[str, Split]
    duplicates: int = 0
    """Conversations left out since they stood there twice."""
    held_out: int = 0
    """Training conversations left out since their first message begins one of the validation."""
    unwrapped: int = 0
    """Prompts that came in a template, which was taken off."""
    skipped: int = 0
    """Rows left out since they hold no conversation."""
    unused_fields: tuple[str, ...] = ()
    """Fields of the rows that are no part of the conversations."""


def prepare_instructions(args: InstructArgs) -> Instructions:
    """Sees to it that ``data_dir`` holds the source's conversations; does nothing where that is so already.

    Returns:
        The manifest of the folder.

    Raises:
        UserError: for anything in the source or the settings that the user must mend. Nothing is written or lost then.
    """
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: expected a number between 0 and 1, such as 0.1.")
    with locked(args.data_dir):
        lying = _lying(args)
        source = _find(args, lying)
        if lying is not None:
            if reasons := _differences(lying, source):
                raise UserError(
                    f"{args.data_dir} holds conversations made otherwise ({'; '.join(reasons)}); choose another "
                    "--data_dir, or replace them with --overwrite."
                )
            print(f"{args.data_dir} is prepared and nothing changed; nothing to do.")
            print("\n".join([_summary(lying), *source.notes]))
            return lying
        found = _build(args, source)
    print("\n".join([f"{args.data_dir}: {_summary(found)}", *source.notes]))
    return found


def _summary(found: Instructions) -> str:
    train, val = (found.splits[split].conversations for split in SPLITS)
    left_out = {
        "that stand there twice": found.duplicates,
        "whose first message is one of the held-out": found.held_out,
        "that could not be read": found.skipped,
    }
    return "\n".join(
        [f"{train:,} conversations to train on, {val:,} held out."]
        + [f"{number:,} {why} are left out." for why, number in left_out.items() if number]
        + [f"{found.unwrapped:,} prompts were taken out of a template; the tuning's own goes around them."]
        * bool(found.unwrapped)
        + [f"Fields not used: {harmless(_some(found.unused_fields))}."] * bool(found.unused_fields)
    )


def _some(names: Iterable[str]) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# --- what is asked for, and what lies there ---


class Source(NamedTuple):
    """Where conversations come from; the first four are what the manifest notes."""

    name: str
    location: str
    val_fraction: float | None
    skip_broken: bool
    records: tuple[FileRecord, ...] = ()
    files: dict[str | None, list[Location]] = {}  # noqa: RUF012 - by split; None: the hash decides
    notes: tuple[str, ...] = ()
    """What else is in the folder and is not used"""


def _find(args: InstructArgs, lying: Instructions | None) -> Source:
    fraction = DEFAULT_VAL_FRACTION if args.val_fraction is None else args.val_fraction
    path = Path(args.instruct)
    if args.instruct == STORIES:
        return Source(STORIES, "story_instructions(seed=1)", fraction, args.skip_broken)
    if named := HUB_NAME.fullmatch(args.instruct):
        if lying is not None and lying.source == args.instruct:
            # The Hub is not asked again: what lies there is of a revision that stays.
            same = None if lying.val_fraction is None else fraction
            return Source(args.instruct, lying.location, same, args.skip_broken, lying.source_files)
        dataset = HubDataset("", named["path"], named["config"], column=None, flag="--instruct")
        found = dataset.open(Settings(None, None, None, None))
        files = {split if "val" in found.files else None: paths for split, paths in found.files.items()}
        records = tuple(record for split in found.records.values() for record in split)
        return Source(
            args.instruct, found.location, None if "val" in files else fraction, args.skip_broken, records, files
        )
    if not path.exists():
        hint = "; did you mean stories?" if nearest(args.instruct, [STORIES]) else "."
        raise UserError(
            f"--instruct {args.instruct}: no such file or folder{hint} Expected a {', '.join(SUFFIXES)} file, a folder "
            f"of them, `{STORIES}` or hf:ORG/NAME."
        )
    files, notes = _source_files(path, args.data_dir)
    own = [(args.data_dir / f"{split}.jsonl").resolve() for split in SPLITS]
    if any(Path(file).resolve() in own for found in files.values() for file in found):
        raise UserError(f"--instruct {path}: {args.data_dir} is what would be written; choose another --data_dir.")
    base = path.parent if path.is_file() else path
    paths = [Path(file) for found in files.values() for file in found]
    records = manifest.refresh(paths, base, lying.source_files if lying else ())
    location, val_fraction = str(path.resolve()), None if "val" in files else fraction
    return Source("files", location, val_fraction, args.skip_broken, records, files, notes)


def _source_files(path: Path, data_dir: Path) -> tuple[dict[str | None, list[Location]], tuple[str, ...]]:
    """The files of each split (None: they are to be split), and a line on each kind of file that is not used."""
    if path.is_file():
        if suffix(path) not in SUFFIXES:
            raise UserError(f"--instruct {path}: expected a {', '.join(SUFFIXES)} file, or a folder with such files.")
        return {None: [path]}, ()
    found: dict[str | None, list[Path]] = {"train": [], "val": [], "test": [], None: []}
    every = _files_below(path, data_dir)
    with_rows = [file for file in every if suffix(file) in SUFFIXES and file.name not in NO_ROWS]
    others = [file for file in every if file not in with_rows]
    for file, split in split_names(path, with_rows).items():
        found[split].append(file)

    def named(files: list[Path]) -> str:
        return _some(file.relative_to(path).as_posix() for file in files)

    train, val, test, rest = found["train"], found["val"], found["test"], found[None]
    notes = []
    if val:
        notes.append(f"Held out, as validation data: {named(val)} ({len(val):,} of the files).")
    if test:
        notes.append(f"Left out, since they are test data: {named(test)} ({len(test):,} of the files).")
    if others:
        notes.append(f"Not read, since they are files of other kinds: {named(others)} ({len(others):,} of the files).")
    if rest and (train or val):
        raise UserError(
            f"--instruct {path}: {rest[0].relative_to(path).as_posix()} is neither train.* nor val.*, which lie there "
            "too; move it elsewhere."
        )
    if val and not train:
        raise UserError(f"--instruct {path}: {named(val)} is there, but no train.jsonl beside it.")
    if not (train or rest):
        raise UserError(
            "\n".join([f"--instruct {path}: expected a {', '.join(SUFFIXES)} file to train on in that folder.", *notes])
        )
    if val:
        return {"train": list(train), "val": list(val)}, tuple(notes)
    return {None: list(train or rest)}, tuple(notes)


def _files_below(folder: Path, data_dir: Path) -> list[Path]:
    """All files but hidden ones and, where it is a folder in there, what is prepared in ``data_dir``."""
    files = []
    for file in folder.rglob("*"):
        is_hidden = any(name.startswith(".") for name in file.relative_to(folder).parts)
        is_own = folder.resolve() != data_dir.resolve() and file.resolve().is_relative_to(data_dir.resolve())
        if file.is_file() and not is_hidden and not is_own:
            files.append(file)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _lying(args: InstructArgs) -> Instructions | None:
    """What lies in the folder, after finishing what a call that was killed at the very end left to do."""
    _publish(args.data_dir)
    if args.overwrite:
        return None
    if not (args.data_dir / MANIFEST).exists():
        if foreign := [name for name in SPLITS if (args.data_dir / f"{name}.jsonl").exists()]:
            raise UserError(
                f"{args.data_dir / foreign[0]}.jsonl was not made by this command, which would replace it. Choose "
                f"another --data_dir (and give this folder as SOURCE: --instruct {quoted(args.data_dir)}), or "
                "--overwrite."
            )
        return None
    return read(args.data_dir)


def _differences(lying: Instructions, source: Source) -> list[str]:
    settings = {
        "source": (lying.source, source.name),
        "location": (lying.location, source.location),
        "val_fraction": (lying.val_fraction, source.val_fraction),
        "skip_broken": (lying.skip_broken, source.skip_broken),
    }
    if reasons := [f"{name} {old!r} became {new!r}" for name, (old, new) in settings.items() if old != new]:
        return reasons
    if lying.format != FORMAT and source.name != STORIES:  # no story has white space at its ends
        return ["by an older version, which cut off white space at the ends of texts"]
    return manifest.changed_files(lying.source_files, source.records)


# --- making it ---


def _build(args: InstructArgs, source: Source) -> Instructions:
    building = args.data_dir / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        found = _write(building, source)
        write_sealed(building / MANIFEST, asdict(found))  # from here on it counts as complete
        _publish(args.data_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return found


def _publish(data_dir: Path) -> None:
    """Moves what was made to its end into its place, the manifest last: a new file beside the old one is refused."""
    building = data_dir / BUILDING
    if (building / MANIFEST).is_file():
        for name in (*(f"{split}.jsonl" for split in SPLITS), MANIFEST):
            if (building / name).exists():
                os.replace(building / name, data_dir / name)
        building.rmdir()


def _write(folder: Path, source: Source) -> Instructions:
    rows, skipped = _story_rows(source) if source.name == STORIES else _file_rows(source)
    unused = {name for found in rows.values() for row in found for name in row.unused}
    kept, duplicates, held_out = _without_repetitions(rows)
    splits = {}
    for split, found in kept.items():
        if not found:
            raise UserError(
                f"--instruct {source.location}: no conversation for {split} among {sum(map(len, kept.values()))}"
                + (f" ({skipped:,} rows were left out)" if skipped else "")
                + "; give more, or another --val_fraction."
            )
        path = folder / f"{split}.jsonl"
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for row in found:
                values = {"messages": row.messages} | ({} if row.names is None else {"names": row.names})
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        splits[split] = Split(len(found), manifest.record(path, folder))
    return Instructions(
        format=FORMAT,
        source=source.name,
        location=source.location,
        val_fraction=source.val_fraction,
        skip_broken=source.skip_broken,
        source_files=source.records,
        splits=splits,
        duplicates=duplicates,
        held_out=held_out,
        unwrapped=sum(row.unwrapped for found in kept.values() for row in found),
        skipped=skipped,
        unused_fields=tuple(sorted(unused)),
    )


def _without_repetitions(rows: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], int, int]:
    """Each conversation once, and none in training whose first message begins a held-out one; how many left out.

    White space at the ends tells no first messages apart, but it does conversations: an answer may be code.
    """
    asked = {_first_message(row) for row in rows["val"]}
    train = [row for row in rows["train"] if _first_message(row) not in asked]
    kept: dict[str, list[Row]] = {}
    for split, found in (("train", train), ("val", rows["val"])):
        kept[split] = list({blake2b(json.dumps(row.messages).encode()).digest(): row for row in found}.values())
    duplicates = len(train) + len(rows["val"]) - sum(map(len, kept.values()))
    return kept, duplicates, len(rows["train"]) - len(train)


def _first_message(row: Row) -> str:
    """The user's first, without white space around it."""
    return next(message["content"] for message in row.messages if message["role"] == "user").strip()


def _story_rows(source: Source) -> tuple[dict[str, list[Row]], int]:
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    assert source.val_fraction is not None
    for made in story_requests(STORY_INSTRUCTIONS, source.val_fraction):
        asked, told = Message(role="user", content=made.request), Message(role="assistant", content=made.story)
        rows[made.split].append(Row([asked, told], made.names))
    return rows, 0


def _file_rows(source: Source) -> tuple[dict[str, list[Row]], int]:
    """The conversations of each split, and how many rows held none.

    Raises:
        UserError: rows held none, and they are not to be skipped.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    problems: list[tuple[str, str]] = []  # where, and the reason
    for split, files in source.files.items():
        for path in files:
            for place, values in rows_of(path):
                try:
                    row = conversation_of(values)
                except ValueError as error:
                    problems.append((f"{path}, {place}", str(error)))
                    continue
                rows[split or split_of(_first_message(row), source.val_fraction or 0)].append(row)
    if problems and not source.skip_broken:
        more = f"\n... and {len(problems) - 3:,} rows more" if len(problems) > 3 else ""
        raise UserError(
            "\n".join(f"{place}: {reason}" for place, reason in problems[:3])
            + f"{more}\nCorrect them, or leave such rows out and have them counted: --skip_broken"
        )
    for reason, number in Counter(reason for _, reason in problems).most_common(NAMED):
        print(f"Left out, {number:,} row{'s' * (number > 1)}: {harmless(reason)}")
    return rows, len(problems)


# --- reading it ---


def read(data_dir: Path) -> Instructions:
    """The manifest of a prepared folder, whose two files are as they were written.

    Raises:
        UserError: there is none, or a file changed.
    """
    again = f"`{command('prepare_data.py', '--instruct', 'SOURCE', '--data_dir', data_dir)}"
    try:
        values = read_sealed(data_dir / MANIFEST)
        splits = {
            name: Split(split["conversations"], FileRecord(**known_fields(FileRecord, split["file"])))
            for name, split in values["splits"].items()
        }
        records = tuple(FileRecord(**known_fields(FileRecord, entry)) for entry in values["source_files"])
        unused = tuple(values.get("unused_fields", ()))
        values = known_fields(Instructions, values)
        found = Instructions(**{**values, "splits": splits, "source_files": records, "unused_fields": unused})
    except FileNotFoundError:
        state = f"holds no {MANIFEST}" if data_dir.is_dir() else "does not exist"
        raise UserError(f"{data_dir} {state}; expected prepared instructions: {again}` makes them.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{data_dir / MANIFEST} cannot be read ({error}); {again} --overwrite` makes it again."
        ) from None
    if found.format not in (1, FORMAT):
        raise UserError(
            f"{data_dir} was made in format {found.format}, expected {FORMAT}; {again} --overwrite` makes it again."
        )
    split_files = [split.file for split in found.splits.values()]
    lying = [path for name in SPLITS if (path := data_dir / f"{name}.jsonl").is_file()]
    # Read through, though size and time are as they were: a disk's errors change neither.
    if changes := manifest.changed_files(split_files, [manifest.record(path, data_dir) for path in lying]):
        raise UserError(
            f"{data_dir} is not as it was prepared: {'; '.join(changes)}. Put it back, or make it again: "
            f"{again} --overwrite`. Conversations of your own are a SOURCE."
        )
    return found


def instructions_fingerprint(data_dir: Path) -> str:
    """What the training conversations are: the SHA-256 of ``train.jsonl``.

    Raises:
        UserError: the folder is not whole.
    """
    return read(data_dir).splits["train"].file.sha256


def conversations(data_dir: Path, split: str) -> list[list[Message]]:
    """The conversations of a split, in the order of its file."""
    with open(data_dir / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]
