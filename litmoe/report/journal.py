"""The journal of a run: ``<out_dir>/report.jsonl``, one JSON object per line, for what ``metrics.csv`` can't hold.

Every record has ``kind`` and ``step``. The other keys depend on the kind:

- ``start``: a session of the run began. ``Session`` lists the keys.
- ``state``: ``tokens``, ``memory`` (bytes), ``expert_load`` (a list for each MoE layer: assignments of each expert,
  divided by an even share), ``expected_seconds`` (estimated duration of the complete run).
- ``sample``: ``text``.
- ``end``: ``ending`` of the session, ``finished``, ``stopped`` or ``out of time``.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litmoe.run_files import write_atomically

STATES = 200
"""About as many states are recorded over a run, however many log lines it has"""


@dataclass(frozen=True, kw_only=True)
class Session:
    """How a session of the run began: what was planned, and with what."""

    time: str
    """ISO 8601, UTC"""
    steps: int | None
    """Planned for the complete run; None with a time budget that has not become a number of steps yet"""
    tokens: int | None
    """Planned for the complete run, over all devices"""
    epochs: float | None
    """Planned passes over the training set"""
    seconds: float | None
    """The time budget; None without one"""
    limited_by: str
    """The setting that ends the run"""
    bytes_per_token: float | None
    """Of the validation text; None where it is unknown"""
    notes: list[str]
    """The lines that the run prints about model, length and hardware"""
    versions: dict[str, str]
    """Of Python and of packages"""


class Journal:
    """Appends records to the journal of a run. A file that cannot be written is reported once and never stops the run.

    Args:
        path: of the file.
        enabled: only rank 0 writes.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path = path
        self._enabled = enabled
        # A rewrite keeps the records up to this step. None keeps nothing.
        self._keep_until: float | None = None
        # The first record rewrites the file, and so does the first one after an error, which may have cut off a line.
        self._can_append = False
        self._last_state = 0
        self._has_warned = False

    def start(self, step: int, session: Session, *, resumed: bool) -> None:
        """Record the start of a session.

        Args:
            step: the last one done.
            session: what is recorded.
            resumed: keep the records up to ``step``. The steps after it are taken again, and recorded again.
        """
        self._keep_until = step if resumed else None
        self._add("start", step, **asdict(session))

    def is_state_due(self, step: int, steps: int) -> bool:
        """Return whether the next state of a run of ``steps`` steps is due."""
        return self._enabled and (step - self._last_state) * STATES >= steps

    def state(
        self, step: int, *, tokens: int, memory: int, expert_load: list[list[float]], expected_seconds: float
    ) -> None:
        """Record the peak of the memory in bytes, and the load of the experts by layer, relative to an even share."""
        self._last_state = step
        rounded = [[round(load, 3) for load in layer] for layer in expert_load]
        seconds = round(expected_seconds, 1)
        self._add("state", step, tokens=tokens, memory=memory, expert_load=rounded, expected_seconds=seconds)

    def sample(self, step: int, text: str) -> None:
        """Record a generated text."""
        self._add("sample", step, text=text)

    def end(self, step: int, ending: str) -> None:
        """Record why the session ended."""
        self._add("end", step, ending=ending)

    def _add(self, kind: str, step: int, **values: Any) -> None:
        if not self._enabled:
            return
        line = json.dumps({"kind": kind, "step": step, **values}) + "\n"
        try:
            if self._can_append:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line)
            else:
                self._rewrite(line)
            self._can_append = True
        except OSError as error:
            self._can_append = False
            self._warn(error)

    def _rewrite(self, line: str) -> None:
        """Write a file with the earlier records that stay valid, and ``line``. A kill leaves the old or the new."""
        kept = []
        if self._keep_until is not None:
            # The end of an earlier session is no longer the end of the run.
            kept = [
                json.dumps(record) + "\n"
                for record in read_journal(self.path)
                if record["step"] <= self._keep_until and record["kind"] != "end"
            ]
        write_atomically(self.path, "".join([*kept, line]))
        self._keep_until = math.inf

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            print(f"warning: {self.path} can't be written: {error.strerror or error}. The report will lack a part.")
        self._has_warned = True


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal. Lines that a kill cut off or that are damaged are skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("kind"), str):
            yield record
