"""The report of a run that is training: kept up to date at each evaluation, and never a reason to end the run."""

import time
from pathlib import Path

from litmoe.report.journal import Journal
from litmoe.run_files import JOURNAL_FILE, REPORT_FILE

SHARE = 0.02
"""The largest share of the time that goes into the report. Evaluations that follow each other faster leave it out"""
FIRST = 10.0
"""Seconds before the first report: runs that take less write it at their end only"""


class RunReport:
    """The journal of a run and the page that is made of it.

    Args:
        out_dir: of the run.
        enabled: only rank 0 writes.
    """

    def __init__(self, out_dir: Path, *, enabled: bool) -> None:
        self.path = out_dir / REPORT_FILE
        self.journal = Journal(out_dir / JOURNAL_FILE, enabled=enabled)
        self.seconds = 0.0
        """That the last writing took, without the imports of the first one"""
        self._enabled = enabled
        self._next_write = time.perf_counter() + FIRST
        self._has_warned = False

    def write_if_due(self) -> None:
        """Write the page, unless the run has just begun or the last writing was just before."""
        if time.perf_counter() >= self._next_write:
            self.write()

    def write(self) -> None:
        """Write the page again. A failure prints one warning per run."""
        if not self._enabled:
            return
        start = time.perf_counter()
        try:
            # Imported here, because the plotting library takes a second and no step needs it.
            from litmoe.report.page import write_report

            start = time.perf_counter()
            write_report([self.path.parent], self.path)
        except Exception as error:
            # Whatever it is (a full disk, an unreadable file, a bug), the run is worth more than its report.
            if not self._has_warned:
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                print(f"warning: {self.path} can't be written: {reason}. The run continues.")
            self._has_warned = True
        self.seconds = time.perf_counter() - start
        self._next_write = time.perf_counter() + self.seconds / SHARE
