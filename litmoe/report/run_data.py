"""Read what the report shows of a run: everything is in its folder, so a report can be made again at any time."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from litmoe import checkpoints
from litmoe.checkpoints import CheckpointMetadata
from litmoe.checksummed_json import known_fields
from litmoe.cli import UserError, command
from litmoe.report.journal import Session, read_journal
from litmoe.run_files import JOURNAL_FILE, METRICS_FILE, RUN_CONFIG

COLUMNS = (
    *("step", "time", "total_tokens", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second"),
    *("hellaswag_acc_norm", "epoch"),
)
"""The columns of ``metrics.csv`` that are drawn"""
POINTS = 1000
"""A curve has at most as many points, so that the page of a long run stays small"""


@dataclass(frozen=True)
class Curve:
    """The values of one metric, in the order of the steps."""

    step: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    """Of training, over all sessions"""
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.value)

    def thinned(self) -> "Curve":
        """Return the lowest and the highest value of each stretch, so that no spike is lost."""
        if len(self) <= POINTS:
            return self
        stretches = np.array_split(np.arange(len(self)), POINTS // 2)
        extremes = [(part[self.value[part].argmin()], part[self.value[part].argmax()]) for part in stretches]
        kept = np.unique([0, len(self) - 1, *np.ravel(extremes)])
        return Curve(self.step[kept], self.tokens[kept], self.seconds[kept], self.value[kept])


@dataclass(frozen=True)
class State:
    """What was recorded beside the metrics after a step."""

    step: int
    tokens: int
    memory: int
    """Bytes, the peak so far"""
    expert_load: list[list[float]]
    """By MoE layer and expert, relative to an even share; empty for a dense model"""
    expected_seconds: float
    """Estimated duration of the complete run"""


@dataclass(frozen=True)
class RunData:
    """A run as its folder describes it. Parts that are missing there are empty."""

    folder: Path
    curves: dict[str, Curve]
    """Complete, by column"""
    settings: dict[str, str]
    """By dotted name"""
    sessions: list[dict[str, Any]]
    """With the keys of ``Session``, and ``step``"""
    states: list[State]
    samples: list[tuple[int, str]]
    """Step and text"""
    ending: str
    """``finished``, ``stopped`` or ``out of time``; empty for a run that is running or was killed"""
    bytes_per_token: float | None
    """Of the validation text"""
    checkpoints: dict[Path, CheckpointMetadata]
    """In the order of their steps"""


def read_run(folder: Path) -> RunData:
    """Read the folder of a run.

    Raises:
        UserError: there is no run.
    """
    if not any((folder / name).is_file() for name in (METRICS_FILE, JOURNAL_FILE)):
        raise UserError(f"{folder} holds no run: it has no {METRICS_FILE}. Pass the out_dir of a run.")
    records: dict[str, list[dict[str, Any]]] = {"start": [], "state": [], "sample": [], "end": []}
    for record in read_journal(folder / JOURNAL_FILE):
        records.setdefault(record.pop("kind"), []).append(record)
    defaults = {"bytes_per_token": None, **{name: None for name in Session.__dataclass_fields__}}
    sessions = [{**defaults, **record} for record in records["start"]]
    return RunData(
        folder=folder,
        curves=read_curves(folder / METRICS_FILE),
        settings=read_settings(folder / RUN_CONFIG),
        sessions=sessions,
        states=[State(**known_fields(State, record)) for record in records["state"]],
        samples=[(record["step"], str(record.get("text"))) for record in records["sample"]],
        ending=str(records["end"][-1].get("ending")) if records["end"] else "",
        bytes_per_token=sessions[-1]["bytes_per_token"] if sessions else None,
        checkpoints=read_checkpoints(folder),
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """Return the curve of each column of a metrics file that has values. Damaged rows and cells are skipped."""
    table = _read_numbers(path)
    step, tokens, seconds = table["step"], table["total_tokens"], table["time"]
    # Rows of evaluations have no token count; it is that of the training row of their step.
    has_tokens = np.isfinite(tokens) & np.isfinite(step)
    tokens = np.interp(step, [0, *step[has_tokens]], [0, *tokens[has_tokens]])
    curves = {}
    for name in COLUMNS[3:]:
        rows = np.isfinite(table[name]) & np.isfinite(step)
        if rows.any():
            curves[name] = Curve(step[rows], tokens[rows], seconds[rows], table[name][rows])
    return curves


def _read_numbers(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of ``COLUMNS`` as floats, NaN where a cell is empty or damaged."""
    # Training imports this module at its start, and needs pyarrow only when it writes a report.
    import pyarrow as pa
    from pyarrow import csv

    try:
        table = csv.read_csv(
            path,
            # A row that a kill cut off.
            parse_options=csv.ParseOptions(invalid_row_handler=lambda row: "skip"),
            convert_options=csv.ConvertOptions(include_columns=COLUMNS, include_missing_columns=True),
        )
    except (FileNotFoundError, pa.ArrowInvalid):
        # There is no header yet.
        return {name: np.empty(0) for name in COLUMNS}
    return {name: _as_floats(table[name]) for name in COLUMNS}


def _as_floats(column: Any) -> np.ndarray:
    try:
        return column.cast("float64").to_numpy()
    except ValueError:
        # A damaged cell makes its column one of texts.
        return np.array([_number(cell) for cell in column.to_pylist()])


def _number(cell: object) -> float:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def read_settings(path: Path) -> dict[str, str]:
    """Return the settings of a run by dotted name; empty if the file is missing or no YAML."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flatten(settings) if isinstance(settings, dict) else {}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by dotted name, with values as text."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def read_checkpoints(folder: Path) -> dict[Path, CheckpointMetadata]:
    """Return the complete checkpoints of a run in the order of their steps."""
    found = {}
    for path in [*sorted(folder.glob("step-*")), folder / "final"]:
        try:
            found[path] = checkpoints.read_metadata(path)
        except (OSError, UserError):
            # Being written or removed, or damaged.
            continue
    return found


def next_commands(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """Return the commands that use a checkpoint, by what they do.

    Args:
        folder: of the checkpoint.
        settings: of its run, as ``flatten`` returns them.
    """
    router = settings.get("moe.router", "null")
    own_router = [] if router == "null" else ["--router", router]
    commands = {}
    # Finetuned models answer; they do not continue text.
    if "checkpoint_dir" not in settings:
        prompt = settings.get("sample.prompt", "null")
        prompt = "Once upon a time" if prompt == "null" else prompt
        commands["Write"] = command("generate.py", folder, "--prompt", prompt, *own_router)
        commands["Evaluate"] = command("evaluate.py", folder, *own_router)
    commands["Chat"] = command("chat.py", folder, *own_router)
    return commands


def summarize(
    *,
    val_loss: float | None,
    train_loss: float | None,
    bytes_per_token: float | None,
    tokens: int,
    seconds: float,
    tokens_per_second: float,
    memory: str | None,
) -> dict[str, str]:
    """Return what a run achieved as rows of a table. Unknown values are left out.

    Args:
        val_loss: the last one, in nats per token.
        train_loss: the last one; shown without a validation loss.
        bytes_per_token: of the validation text.
        tokens: trained on.
        seconds: of training.
        tokens_per_second: their ratio, or that of a part of the run.
        memory: the peak.
    """
    rows = {}
    loss = train_loss if val_loss is None else val_loss
    if loss is not None:
        kind = "training" if val_loss is None else "validation"
        rows["Loss"] = f"{loss:.4f} nats per token ({kind})"
        # exp overflows above 709.
        rows["Perplexity"] = f"{math.exp(min(loss, 700)):,.2f}"
    if val_loss is not None and bytes_per_token:
        rows["Bits/byte"] = f"{val_loss / math.log(2) / bytes_per_token:.4f}"
    rows["Tokens"] = f"{tokens:,}"
    rows["Time"] = format_seconds(seconds)
    rows["Tokens/s"] = f"{tokens_per_second:,.0f}"
    if memory:
        rows["Peak memory"] = memory
    return rows


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 600:
        return f"{seconds:,.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / 3600:,.1f} h"


def format_bytes(size: float) -> str:
    """Return a size in GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """Return at most ``number`` items at even distances, the first and the last included."""
    if len(items) <= number:
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, number)]
