"""Instructions: conversations in any common form, made the lines of ``train.jsonl`` and ``val.jsonl``.

A line is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, as chat APIs and
other tuning libraries read it too. ``instructions.json`` is written last: without it the folder is not complete.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.prompts import prompt_styles

from recipe.cli import UserError, nearest
from recipe.data import manifest
from recipe.data.conversations import Message, problem_with
from recipe.data.corpora import HUB_NAME, VALIDATION_FOLDERS, HubDataset
from recipe.data.documents import clean, split_of, writable
from recipe.data.files import Location, open_file, reading, suffix
from recipe.data.manifest import SPLITS, FileRecord, Settings
from recipe.data.prepare import DEFAULT_VAL_FRACTION, locked
from recipe.data.story_instructions import story_instructions
from recipe.sealed import read_sealed, write_sealed

FORMAT = 1  # of the folder; another one must be made anew
MANIFEST = "instructions.json"
BUILDING = ".building"  # the folder on its way, below data_dir
SUFFIXES = (".json", ".jsonl", ".parquet")
STORIES = "stories"
STORY_INSTRUCTIONS = 6000  # 1.1 million tokens to train on: an epoch takes two CPU cores a minute or two

# What a row calls an instruction, more to it, and the answer; the first of these lines that it has is taken.
PAIRS = (
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
    ("question", None, "answer"),
)
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
FORMS = (
    'expected {"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]}, or the '
    "fields " + ", ".join("/".join(name for name in names if name) for names in PAIRS)
)


@dataclass
class InstructArgs:
    """Turns instructions and their answers into the conversations that finetune.py trains on."""

    instruct: str = STORIES
    """Where they come from: a .json, .jsonl or .parquet file, a folder of them (train.* and val.* in it, else all are
    split), `hf:ORG/NAME[:CONFIG]`, a dataset of the Hugging Face Hub, or `stories`, 6,000 requests for stories of the
    built-in corpus. A row is Alpaca's (instruction, input, output), Dolly's (instruction, context, response), a pair
    (prompt and response or completion, question and answer), or a chat (messages, or ShareGPT's conversations)."""
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
    duplicates: int
    """Conversations left out since they stood there twice."""
    held_out: int
    """Training conversations left out since their first message begins one of the validation."""
    unwrapped: int
    """Prompts that came in a template, which was taken off."""
    skipped: int
    """Rows left out since they hold no conversation."""


class Row(NamedTuple):
    """A conversation as it is written: a line of train.jsonl or val.jsonl."""

    messages: list[Message]
    names: list[str] | None = None
    """Those that a request for a story asks for"""
    unwrapped: int = 0
    """Prompts that stood in a template"""


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
            print(f"{args.data_dir} is prepared and nothing changed; nothing to do.\n{_summary(lying)}")
            return lying
        found = _build(args, source)
    print(f"{args.data_dir}: {_summary(found)}")
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
    )


# --- what is asked for, and what lies there ---


class Source(NamedTuple):
    """Where conversations come from; the first four are what the manifest notes."""

    name: str
    location: str
    val_fraction: float | None
    skip_broken: bool
    records: tuple[FileRecord, ...] = ()
    files: dict[str | None, list[Location]] = {}  # noqa: RUF012 - by split; None: the hash decides


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
            f"--instruct {args.instruct}: no such file or folder{hint} Expected a .json, .jsonl or .parquet file, a "
            f"folder of them, `{STORIES}` or hf:ORG/NAME."
        )
    files = _source_files(path)
    own = [(args.data_dir / f"{split}.jsonl").resolve() for split in SPLITS]
    if any(Path(file).resolve() in own for found in files.values() for file in found):
        raise UserError(f"--instruct {path}: {args.data_dir} is what would be written; choose another --data_dir.")
    base = path.parent if path.is_file() else path
    paths = [Path(file) for found in files.values() for file in found]
    records = manifest.refresh(paths, base, lying.source_files if lying else ())
    return Source("files", str(path.resolve()), None if "val" in files else fraction, args.skip_broken, records, files)


def _source_files(path: Path) -> dict[str | None, list[Location]]:
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    files = [file for file in files if file.suffix.lower() in SUFFIXES and file.name != MANIFEST]
    if not files:
        raise UserError(f"--instruct {path}: expected a {', '.join(SUFFIXES)} file, or a folder with such files in it.")
    val = [file for file in files if file.stem in VALIDATION_FOLDERS]
    train = [file for file in files if file.stem == "train" or file.stem.startswith("train-")]
    others = [file.name for file in files if file not in (*val, *train)]
    if path.is_file() or not (val or train):
        return {None: list(files)}
    if others:
        raise UserError(
            f"--instruct {path}: {others[0]} is neither train.* nor val.*, which lie there too; move it elsewhere."
        )
    if not train:
        raise UserError(f"--instruct {path}: {val[0].name} is there, but no train.jsonl beside it.")
    return {"train": list(train), "val": list(val)} if val else {None: list(train)}


def _lying(args: InstructArgs) -> Instructions | None:
    """What lies in the folder, after finishing what a call that was killed at the very end left to do."""
    _publish(args.data_dir)
    if args.overwrite:
        return None
    if not (args.data_dir / MANIFEST).exists():
        if foreign := [name for name in SPLITS if (args.data_dir / f"{name}.jsonl").exists()]:
            raise UserError(
                f"{args.data_dir / foreign[0]}.jsonl was not made by this command, which would replace it. Choose "
                f"another --data_dir (and give this folder as SOURCE: --instruct {args.data_dir}), or --overwrite."
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
    kept, duplicates, held_out = _without_repetitions(rows)
    splits = {}
    for split, found in kept.items():
        if not found:
            raise UserError(
                f"--instruct {source.location}: no conversation for {split} among {sum(map(len, kept.values()))}; "
                "give more, or another --val_fraction."
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
    )


def _without_repetitions(rows: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], int, int]:
    """Each conversation once, and none in training whose first message begins a held-out one; how many left out."""
    asked = {_first_message(row) for row in rows["val"]}
    train = [row for row in rows["train"] if _first_message(row) not in asked]
    kept: dict[str, list[Row]] = {}
    for split, found in (("train", train), ("val", rows["val"])):
        kept[split] = list({blake2b(json.dumps(row.messages).encode()).digest(): row for row in found}.values())
    duplicates = len(train) + len(rows["val"]) - sum(map(len, kept.values()))
    return kept, duplicates, len(rows["train"]) - len(train)


def _first_message(row: Row) -> str:
    """The user's first."""
    return next(message["content"] for message in row.messages if message["role"] == "user")


def _story_rows(source: Source) -> tuple[dict[str, list[Row]], int]:
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    assert source.val_fraction is not None
    for made in story_instructions(STORY_INSTRUCTIONS, source.val_fraction):
        rows[made.split].append(Row(_turn(made.request, made.story), made.names))
    return rows, 0


def _file_rows(source: Source) -> tuple[dict[str, list[Row]], int]:
    """The conversations of each split, and how many rows held none.

    Raises:
        UserError: rows held none, and they are not to be skipped.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    problems = []
    for split, files in source.files.items():
        for path in files:
            for place, values in _values(path):
                try:
                    row = conversation_of(values)
                except ValueError as error:
                    problems.append(f"{path}, {place}: {error}")
                    continue
                rows[split or split_of(_first_message(row), source.val_fraction or 0)].append(row)
    if problems and not source.skip_broken:
        more = f"\n... and {len(problems) - 3:,} rows more" if len(problems) > 3 else ""
        raise UserError(
            "\n".join(problems[:3]) + f"{more}\nMend them, or leave such rows out and have them counted: --skip_broken"
        )
    return rows, len(problems)


def _values(path: Location) -> Iterator[tuple[str, Any]]:
    """What a file holds, row by row, each with its place; a line of JSON as it stands there."""
    with reading(path):
        if suffix(path) == ".parquet":
            yield from _parquet_rows(path)
            return
        with open_file(path) as file:
            data = file.read().removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):
        if b"\n" in data.strip() and _is_one_object(data):
            raise UserError(f"{path}: one JSON object over lines; expected a list of rows, or a row on each line.")
        yield from ((f"line {i}", line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip())
        return
    try:
        yield from ((f"row {i}", values) for i, values in enumerate(json.loads(data.decode("utf-8")), 1))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); expected a list of objects.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{path}: can't be read as JSON ({error}); expected a list of objects.") from None


def _is_one_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_rows(path: Location) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            values = (values for batch in batches for values in batch.to_pylist())
            yield from ((f"row {i}", row) for i, row in enumerate(values, 1))
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); get the file anew."
        ) from None


# --- one row ---


def conversation_of(values: Any) -> Row:
    """A conversation from a row in any of the forms; ``bytes`` are a line of JSON.

    Raises:
        ValueError: it holds none, and what was found instead.
    """
    if isinstance(values, bytes):
        try:
            values = json.loads(values.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"byte 0x{values[error.start]:02x} at column {error.start + 1} is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at column {error.colno}); expected an object on a line") from None
        except RecursionError:
            raise ValueError("JSON nested too deeply; expected an object with texts in it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{type(values).__name__} where an object was expected")
    messages = [message for message in _messages(values) if message["content"] or message["role"] != "system"]
    if not messages:
        raise ValueError("no messages")
    if problem := problem_with(messages, last="assistant"):
        raise ValueError(problem)
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            raise ValueError(f"message {number}, the {message['role']}'s, is empty")
    unwrapped = 0
    for message in messages:
        if message["role"] == "user" and (inside := unwrap(message["content"])):
            message["content"], unwrapped = inside, unwrapped + 1
    return Row(messages, unwrapped=unwrapped)


def _messages(values: dict[str, Any]) -> list[Message]:
    """The messages of a row, as they stand there."""
    if isinstance(values.get("messages"), list):
        return [_message(entry, "role", "content") for entry in values["messages"]]
    if isinstance(values.get("conversations"), list):
        return [_message(entry, "from", "value") for entry in values["conversations"]]
    for instruction, more, answer in PAIRS:
        if instruction in values and answer in values:
            asked = _text(values[instruction], instruction)
            if more and (given := _text(values.get(more), more)):
                asked = f"{asked}\n\n{given}"
            return _turn(asked, _text(values[answer], answer))
    raise ValueError(f"the fields {', '.join(map(repr, values)) or '(none)'}; {FORMS}")


def _turn(asked: str, answer: str) -> list[Message]:
    return [Message(role="user", content=asked), Message(role="assistant", content=answer)]


def _message(entry: Any, role: str, content: str) -> Message:
    if not isinstance(entry, dict) or not {role, content} <= entry.keys():
        raise ValueError(
            f"a message {json.dumps(entry, default=str)[:80]}; expected an object with {role!r} and {content!r}"
        )
    if str(entry[role]) not in SHAREGPT_ROLES:
        raise ValueError(f"a message of {entry[role]!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    return Message(role=SHAREGPT_ROLES[entry[role]], content=_text(entry[content], content))  # type: ignore[typeddict-item]


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)  # a chat API's parts
    if not isinstance(value, str):
        raise ValueError(f"expected text in {field!r}, found {type(value).__name__}")
    return clean(writable(value))


def unwrap(prompt: str) -> str | None:
    """The instruction in a prompt that stands in a template of LitGPT's, Alpaca's above all; None where it doesn't.

    Left in, the model would be asked in two templates, one inside the other, and chat would ask in one.
    """
    for before, after in _templates():
        if len(prompt) > len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after):
            asked, _, given = prompt[len(before) : -len(after)].partition(ALPACA_INPUT)
            return f"{asked.strip()}\n\n{given.strip()}".strip() or None
    return None


ALPACA_INPUT = "\n\n### Input:\n"


@cache
def _templates() -> list[tuple[str, str]]:
    """What stands before and after a prompt, of the styles that have both; the longest first."""
    found = set()
    for style in prompt_styles.values():
        before, _, after = style().apply("PROMPT").partition("PROMPT")
        if before.strip() and after.strip():
            found.add((before.strip(), after.strip()))
    return sorted(found, key=lambda ends: (-len(ends[0]), ends))


# --- reading it ---


def read(data_dir: Path) -> Instructions:
    """The manifest of a prepared folder, whose two files are as they were written.

    Raises:
        UserError: there is none, or a file changed.
    """
    command = f"`uv run python prepare_data.py --instruct SOURCE --data_dir {data_dir}"
    try:
        values = read_sealed(data_dir / MANIFEST)
        splits = {name: Split(n["conversations"], FileRecord(**n["file"])) for name, n in values["splits"].items()}
        records = tuple(FileRecord(**entry) for entry in values["source_files"])
        found = Instructions(**{**values, "splits": splits, "source_files": records})
    except FileNotFoundError:
        state = f"holds no {MANIFEST}" if data_dir.is_dir() else "does not exist"
        raise UserError(f"{data_dir} {state}; expected prepared instructions: {command}` makes them.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{data_dir / MANIFEST} cannot be read ({error}); {command} --overwrite` makes it anew."
        ) from None
    if found.format != FORMAT:
        raise UserError(
            f"{data_dir} was made in format {found.format}, expected {FORMAT}; {command} --overwrite` makes it anew."
        )
    known = [split.file for split in found.splits.values()]
    lying = [path for name in SPLITS if (path := data_dir / f"{name}.jsonl").is_file()]
    # Read through, though size and time are as they were: a disk's errors change neither.
    if changes := manifest.changed_files(known, [manifest.record(path, data_dir) for path in lying]):
        raise UserError(
            f"{data_dir} is not as it was prepared: {'; '.join(changes)}. Put it back, or make it anew: "
            f"{command} --overwrite`. Conversations of your own are a SOURCE."
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
