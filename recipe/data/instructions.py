"""Instructions: conversations of any common form, made the lines of ``train.jsonl`` and ``val.jsonl``."""

import json
from dataclasses import dataclass
from pathlib import Path

from recipe.cli import UserError
from recipe.data import manifest
from recipe.data.conversations import Message
from recipe.data.manifest import SPLITS, FileRecord

FORMAT = 1  # of the folder; another one must be made anew
MANIFEST = "instructions.json"


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
    source_files: tuple[FileRecord, ...]
    splits: dict[str, Split]
    duplicates: int
    """Conversations left out since they stood there twice."""
    held_out: int
    """Training conversations left out since their first message begins one of the validation."""
    unwrapped: int
    """Prompts that came in a template, which was taken off."""
    skipped: int
    """Rows left out by ``--skip_broken``."""


def read(data_dir: Path) -> Instructions:
    """The manifest of a prepared folder, whose two files are as they were written.

    Raises:
        UserError: there is none, or a file changed.
    """
    command = f"`uv run python prepare_data.py --instruct SOURCE --data_dir {data_dir}"
    try:
        values = json.loads((data_dir / MANIFEST).read_text(encoding="utf-8"))
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
    if changes := manifest.changed_files(known, manifest.refresh(lying, data_dir, known)):
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
