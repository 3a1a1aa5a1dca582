"""Training runs that are killed or stopped, and compared with an uninterrupted run."""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

from litmoe import checkpoints
from tests.chaos.processes import Death, Life, Operation, Watched
from tests.helpers import assert_equal, assert_same_state, untimed_rows

SAVES = r"\.(step-\d+|final)\.(?:partial|old)(?:/|$)"
"""Paths below an ``out_dir`` that are written while a checkpoint is saved: ``Watched.pattern``"""
STEPS = 60
INTERVAL = 5
RUN = (
    *("--train.max_steps", str(STEPS), "--train.save_interval", str(INTERVAL)),
    *("--eval.interval", "20", "--progress", "false", "--checkpoint.every_minutes", "null"),
)


@dataclass(frozen=True)
class FullRun:
    """An uninterrupted run, and the times of its steps and saves."""

    command: tuple[str, ...]
    """A script and its arguments"""
    out: Path
    start: float
    """Seconds until the end of its first step"""
    step: float
    """Seconds per step"""
    saves: dict[str, list[Operation]]


def begin(folder: Path, out: Path, command: tuple[str, ...], *flags: str, death: Death | None = None) -> Life:
    """Start a process of the run in ``out``."""
    script, *arguments = command
    return Life(folder, script, [*arguments, *flags, "--out_dir", str(out)], watched=Watched(out, SAVES), death=death)


def run_uninterrupted(folder: Path, *command: str) -> FullRun:
    """Train without a kill."""
    life = begin(folder / "life", folder / "out", command)
    first, last = (wait_for(life, step) - life.started for step in (1, STEPS))
    assert life.end() == 0, life.said
    return FullRun(command, folder / "out", first, (last - first) / (STEPS - 1), saves_of(life.operations))


def saves_of(operations: list[Operation]) -> dict[str, list[Operation]]:
    """Return the operations of each save, including the removal of older checkpoints after it."""
    saves: dict[str, list[Operation]] = {}
    for operation in operations:
        if not (saves and operation.group.endswith(" removed")):
            saves.setdefault(operation.group, [])
        next(reversed(saves.values())).append(operation)
    return saves


def wait_for(life: Life, step: int, seconds: float = math.inf) -> float:
    """Wait until the process reports ``step``, ends, or has run for ``seconds``. Return the time."""
    while last_step(life) < step and life.is_alive and time.monotonic() - life.started < seconds:
        time.sleep(0.005)
    return time.monotonic()


def last_step(life: Life) -> int:
    """Return the step that it reported last; 0 before the first."""
    said = re.findall(r"^step (\d+)/", life.said, re.MULTILINE)
    return int(said[-1]) if said else 0


def saved_step(out: Path) -> int:
    """Return the step that ``--resume auto`` continues from."""
    newest = checkpoints.newest_undamaged(out)[0]
    return checkpoints.read_metadata(newest).step if newest else 0


def assert_same_end(one: Path, other: Path) -> None:
    """Compare ``final`` and the metrics. There may be other checkpoints."""
    assert not [path for path in other.rglob("*") if re.search(r"^\.|\.(tmp|partial|old)$", path.name)]
    assert_same_checkpoint(one / "final", other / "final")
    tables = [untimed_rows(out) for out in (one, other)]
    assert [int(row["step"]) for row in tables[1] if row["train_loss"]] == list(range(1, STEPS + 1))
    assert tables[0] == tables[1]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    checkpoints.verify(other)
    assert_equal(checkpoints.load_weights(one), checkpoints.load_weights(other))
    assert_same_state(other, one)
