"""What the benchmarks share: where they run, on what, and how much memory a process takes."""

import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def circumstances(command: str, packages: Iterable[str]) -> dict[str, Any]:
    """What stands beside every result: command, commit, date, hardware, versions."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "load_before": load},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def commit() -> str:
    """The commit that was checked out, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def peak_memory(
    process: "subprocess.Popen[str]", kind: str = "rss", seconds: float = 0.1
) -> Iterator[dict[str, float]]:
    """Watches a process and its children, in a thread, until the context ends.

    Args:
        process: just started.
        kind: ``rss``, which counts a page for each process that shares it, or ``pss``, which counts it once (Linux).
        seconds: between two looks.

    Yields:
        ``all`` (the largest sum at one look) and ``one`` (the largest single process), in bytes.
    """
    import psutil

    peak = {"all": 0.0, "one": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            try:
                family = [psutil.Process(process.pid)]
                family += family[0].children(recursive=True)
                sizes = [
                    member.memory_full_info().pss if kind == "pss" else member.memory_info().rss for member in family
                ]
                peak["all"], peak["one"] = max(peak["all"], sum(sizes)), max(peak["one"], *sizes)
            except psutil.Error:  # one of them has just ended
                pass
            time.sleep(seconds)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
