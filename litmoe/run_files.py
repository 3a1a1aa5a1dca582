"""Names of the files that a run writes into its ``out_dir``, beside the checkpoint folders."""

import os
from contextlib import suppress
from pathlib import Path

from litmoe.renaming import rename

METRICS_FILE = "metrics.csv"
"""A row for each log line and each evaluation"""
RUN_CONFIG = "run_config.yaml"
"""The settings of the run"""
JOURNAL_FILE = "report.jsonl"
"""What the report shows beside metrics and settings: sessions, expert load, memory, samples, the end"""
REPORT_FILE = "report.html"
"""The report, one self-contained page"""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a hidden name, then rename it. A kill or a full disk leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            # Otherwise a power cut could leave an empty file.
            os.fsync(file.fileno())
        rename(partial, path)
    finally:
        # On a read-only file system even this fails, and the error above is the one to show.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
