"""What the benchmarks share: where they run, on what, and how much memory a process takes."""

import ctypes
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

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


def invocation(script: str) -> str:
    """The command of this process, ready to be run again."""
    return shlex.join(["uv", "run", "python", f"benchmarks/{script}.py", *sys.argv[1:]])


def kept_rows(path: Path, result: dict[str, Any], key: str, *same: str) -> dict[str, Any]:
    """The rows of a former result, by name, each with its commit.

    Args:
        path: of the former result; no rows where there is none.
        result: the new one; no rows where the former has other hardware or versions, or differs in ``same``.
        key: of the rows.
    """
    if not path.exists():
        return {}
    former = json.loads(path.read_text(encoding="utf-8"))
    here, there = (
        [{**of["hardware"], "load_before": None}, of["versions"], *(of.get(name) for name in same)]
        for of in (result, former)
    )
    return {name: {"commit": former["commit"], **row} for name, row in former[key].items()} if here == there else {}


def write_result(result: dict[str, Any], path: Path) -> None:
    """As JSON, with lists of numbers on one line each."""
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of Markdown, and an empty one."""
    heads = list(heads)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (heads, ["---"] * len(heads), *rows)] + [""]


NO_BF16 = "this CPU has no instructions for it, and would take a hundred times as long as in fp32"
"""Why something is left out; on a GPU it never is."""


class Target(NamedTuple):
    """Something that was to be reached."""

    text: str
    measured: str | None
    """None where it was not"""
    reached: bool


def verdicts(targets: Iterable[Target]) -> list[str]:
    """A table: what was to be reached, what was measured, whether that is enough."""
    rows = [
        (text, "not measured yet", "") if measured is None else (text, measured, "yes" if reached else "**no**")
        for text, measured, reached in targets
    ]
    return table(("to reach", "measured", "reached"), rows)


def plotting() -> Any:
    """``matplotlib.pyplot`` that draws SVG, the same picture from the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "litmoe"
    import matplotlib.pyplot as plt

    return plt


def where(result: dict[str, Any]) -> str:
    """The circumstances of a result as a line of text."""
    hardware, versions = result["hardware"], ", ".join(" ".join(pair) for pair in result["versions"].items())
    place = f"{hardware['cpu']}, {hardware['cores']} cores"
    place += f", {hardware['threads']} threads" if "threads" in hardware else ""
    if gpu := hardware.get("gpu"):
        card = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        place = f"{card}, driver {gpu['driver']}, CUDA {gpu['cuda']}; {place}"
    return f"{place}; {versions}; {result['date'][:10]}; `{result['command']}` at commit {result['commit']}."


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc (Linux).

    glibc gives blocks above 32 MB back to the system, which clears their pages when they are taken again. On a virtual
    machine that can cost more than what is timed. Not for real runs: the heap may grow to many times its largest block.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def commit() -> str:
    """The commit that was checked out, marked where files differ from it other than those that benchmarks write."""
    name = output(["git", "rev-parse", "--short=12", "HEAD"]) or "unknown"
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs"]
    return f"{name}-dirty" if output(changed) else name


def output(command: list[str]) -> str:
    """What a program printed; nothing where it is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def installed(packages: Iterable[str]) -> list[str]:
    """Those of the packages that are here."""

    def here(package: str) -> bool:
        try:
            return bool(version(package))
        except PackageNotFoundError:
            return False

    return [package for package in packages if here(package)]


def choose_device(device: str) -> None:
    """Ends the program where there is no such; without a GPU this process and all that it starts see none."""
    import torch

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA GPU here; `--device cpu` needs none.")


def gpu() -> dict[str, Any]:
    """The first CUDA GPU as torch and the driver tell it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]) or "unknown",
        "cuda": torch.version.cuda,
    }


def matmul_flops(size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of this CPU in large products of fp32 matrices: what no training step can go beyond."""
    import torch

    a, b = torch.randn(2, size, size)
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - before))
    return max(rates)


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
