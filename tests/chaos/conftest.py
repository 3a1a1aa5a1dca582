"""How many times processes are killed, and a histogram of the kills at the end of the session.

``CHAOS_KILLS=200 pytest tests/chaos -m slow`` kills 200 times (``make chaos``); without it `make test-slow` kills 20.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

from tests.chaos.helpers import RUN
from tests.chaos.processes import end_all

KILLS = int(os.environ.get("CHAOS_KILLS", "20"))


def share(of_twenty: int) -> int:
    """Return a test's share of all kills."""
    return max(1, round(of_twenty * KILLS / 20))


@dataclass
class Moment:
    """Where a process was when it was killed."""

    work: str
    """The kind of process, for example ``training``"""
    place: float
    """Progress of the process, from 0 to 1"""
    doing: str
    part: float | None = None
    """Progress of that activity, from 0 to 1"""
    operation: str = ""
    """The last file operation, or the one that would have been next"""


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """End all processes: after a failed assertion a run would continue for an hour."""
    yield
    end_all()


@pytest.fixture
def moments(record_property: Callable[[str, object], None]) -> Callable[[Moment], None]:
    """Return a function that records a kill for the histogram."""
    return lambda moment: record_property("moment", astuple(moment))


@pytest.fixture
def command(run_file: Path) -> tuple[str, ...]:
    """The script and the arguments of a run of 60 steps."""
    return ("run_train.py", "--config", str(run_file), *RUN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [item for report in reports if report.when == "call" for item in report.user_properties]
    if not (found := [Moment(*value) for name, value in properties if name == "moment"]):
        return
    say = terminalreporter.line
    terminalreporter.section(f"the moments of {len(found)} kills")
    for work in sorted({moment.work for moment in found}):
        _show(say, work, [moment.place for moment in found if moment.work == work])
        for doing, count in Counter(moment.doing for moment in found if moment.work == work).most_common():
            say(f"  {count:>4}  {doing}")
    for doing in sorted({moment.doing for moment in found if moment.part is not None}):
        within = [moment for moment in found if moment.doing == doing]
        _show(say, doing, [moment.part or 0.0 for moment in within])
        for operation, count in Counter(moment.operation for moment in within).most_common():
            say(f"  {count:>4}  {operation}")


def _show(say: Callable[[str], None], name: str, places: list[float]) -> None:
    say(f"{name}: {len(places)} kills")
    tenths = Counter(min(int(place * 10), 9) for place in places)
    for tenth in range(10):
        say(f"  {tenth * 10:>3} to {tenth * 10 + 10:>3}%  {tenths[tenth]:>4}  {'#' * tenths[tenth]}")
