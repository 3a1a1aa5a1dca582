"""Shared by all benchmarks: the machine, statistics, peak memory, the JSON result file, and tables of numbers.

A benchmark stores its tables in its result file, and report.py puts them into documents.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
Table = list[list[str]]  # the heads, then the rows
T = TypeVar("T")


def make_parser(doc: str | None, result: str, *, runs: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has.

    Args:
        doc: the docstring of the script, shown by --help.
        result: name of the result file, with ``DEVICE`` if the script runs on a GPU too.
        runs: whether the script starts training runs on a corpus.
    """
    # No abbreviations: some scripts hand unknown flags on to run_train.py.
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(device="cpu")
    if "DEVICE" in result:
        parser.add_argument("--device", choices=("cpu", "cuda"))
    if runs:
        parser.add_argument("--data-dir", type=Path, help="a prepared corpus (default: the quickstart's)")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{result}.json", help="result file")
    return parser


def start(args: argparse.Namespace, *packages: str) -> Row:
    """Select the device and return what every result starts with: command, commit, date, hardware and versions.

    ``args.output`` becomes the result file of the device. GPUs are hidden from this process and its children (cpu), or
    the process exits with a message if there is none (cuda).
    """
    import torch

    # Before anything initializes CUDA, which reads the variable once.
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no CUDA GPU on this machine. Use --device cpu.")
    args.output = args.output.with_name(args.output.name.replace("DEVICE", args.device))
    # A busy machine explains odd numbers. Windows has no load average.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "command": shlex.join(["uv", "run", "python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": current_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": args.device,
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_before": load,
            "threads": torch.get_num_threads(),
            "gpu": describe_gpu() if args.device == "cuda" else None,
        },
        "versions": {"python": platform.python_version(), **installed_versions(packages)},
    }


def current_commit() -> str:
    """Return the short commit hash, with `-dirty` if tracked files were changed.

    Result files and documents are left out: otherwise each benchmark of `make bench` would mark the next one dirty.
    """
    commit = output_of(["git", "rev-parse", "--short=12", "HEAD"]) or "unknown"
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs"]
    return f"{commit}-dirty" if output_of(status) else commit


def output_of(command: list[str]) -> str:
    """Return what a program prints; an empty string if it is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):  # an optional peer
            versions[package] = version(package)
    return versions


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_gpu() -> Row:
    import torch

    properties = torch.cuda.get_device_properties(0)
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
    }


def write_result(result: Row, path: Path) -> None:
    """Write JSON with each list of numbers on one line."""
    # json.dumps writes each number of a curve on a line of its own, which makes diffs unreadable.
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def is_comparable(earlier: Row, result: Row) -> bool:
    """Return whether two results are from the same hardware and versions. Date, commit and load may differ."""
    machines = [(row["hardware"]["cpu"], row["hardware"].get("gpu"), row["versions"]) for row in (earlier, result)]
    return machines[0] == machines[1]


def earlier_rows(path: Path, result: Row, key: str, settings: Sequence[str] = ()) -> Row:
    """Return the rows of an earlier result file, so that a run of a few rows keeps the others.

    Rows of other hardware, other versions or other ``settings`` (keys of the file) are dropped, because they can't be
    compared.
    """
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if not is_comparable(earlier, result) or any(earlier[name] != result[name] for name in settings):
        return {}
    return {name: {"commit": earlier["commit"], **row} for name, row in earlier[key].items()}


# ----------------------------------------------------------------------------------------------------------- statistics


class Spread(NamedTuple):
    """The mean of a few measurements and how certain it is."""

    mean: float
    deviation: float  # standard deviation of one measurement
    interval: float  # half of the 95% confidence interval of the mean (Student's t); 0 for a single measurement


# Student's t for a 95% interval, by the number of measurements.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(mean(values), 0.0, 0.0)
    deviation = stdev(values)
    return Spread(mean(values), deviation, T_95[len(values)] * deviation / math.sqrt(len(values)))


def low_median_high(values: Sequence[float]) -> list[float]:
    """Return three numbers with four significant digits."""
    return [float(f"{value:.4g}") for value in (min(values), median(values), max(values))]


def take_turns(functions: dict[str, Callable[[], T]], rounds: int) -> list[dict[str, T]]:
    """Call each function once per round.

    The speed of a shared machine changes within minutes, so ratios are formed between results of the same round.
    """
    return [{name: function() for name, function in functions.items()} for _ in range(rounds)]


# --------------------------------------------------------------------------------------------------------------- memory


@contextmanager
def peak_memory(process: "subprocess.Popen[str]", seconds: float = 0.1) -> Iterator[dict[str, float]]:
    """Watch the memory of a process and its children until the context ends.

    Yields:
        A dictionary whose entry ``bytes`` is the largest sum of proportional set sizes so far, in bytes. (A page that
        several processes share counts once. Outside of Linux: the resident set sizes.)
    """
    import psutil

    peak = {"bytes": 0.0}
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(seconds):
            with suppress(psutil.Error):  # one of the processes has just ended
                parent = psutil.Process(process.pid)
                sizes = [member.memory_full_info() for member in (parent, *parent.children(recursive=True))]
                peak["bytes"] = max(peak["bytes"], sum(getattr(size, "pss", size.rss) for size in sizes))

    # A thread, because the caller reads the output of the process meanwhile.
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stopped.set()
        watcher.join()


# --------------------------------------------------------------------------------------------------------------- tables


def make_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    return [list(heads), *([str(cell) for cell in row] for row in rows)]


def markdown(table: Table) -> list[str]:
    """Return the lines of a Markdown table."""
    heads, *rows = table
    rule = ["---"] * len(heads)
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def print_table(result: Row) -> None:
    print("\n".join(markdown(result["table"])))


def ranged(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Format (lowest, median, highest) as `median (lowest to highest)`; a single round has no range."""
    low, middle, high = (form.format(value) for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def with_verdict(difference: Row) -> str:
    """Format a mean difference of losses with its interval, and say whether it is clear; below 0 is better."""
    change, interval = difference["mean"], difference["interval"]
    verdict = "better" if change < 0 else "worse"
    # A single seed has no interval, so nothing is clear.
    if interval == 0 or abs(change) <= interval:
        verdict = "no clear difference"
    return f"{change:+.4f} ± {interval:.4f}: {verdict}"


def bold_ours(name: str) -> str:
    """Return a name as it appears in a table."""
    return "**ours**" if name == "ours" else name


def gib(number_of_bytes: float) -> str:
    return f"{number_of_bytes / 2**30:,.1f} GiB"
