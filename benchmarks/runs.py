"""Whole training runs for the benchmarks: each a command in a process of its own, watched from outside."""

import csv
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.common import ROOT, peak_memory
from litmoe.data import manifest

Row = dict[str, float]


class Failed(Exception):
    """A run that ended badly; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Corpus:
    """A prepared text and its tokenizer."""

    data_dir: Path
    tokenizer_dir: Path

    @property
    def flags(self) -> list[str]:
        """For run_train.py."""
        paths = [f"--data.init_args.{split}_data_path={self.data_dir / split}" for split in manifest.SPLITS]
        return [*paths, f"--tokenizer_dir={self.tokenizer_dir}"]

    def bits_per_byte(self, loss: float) -> float:
        """Of a loss on the validation text in nats per token; litmoe/evaluation/loss.py counts the same."""
        found = manifest.read(self.data_dir)
        assert found is not None
        return loss / math.log(2) * found.splits["val"].tokens / found.splits["val"].bytes


def corpus(data_dir: Path | None) -> Corpus:
    """A prepared corpus with its tokenizer in it, or beside it; without one the quickstart's, made if need be."""
    if data_dir is None:
        data_dir = ROOT / "data/stories"
        if manifest.read(data_dir) is None:
            flags = ["--source", "sample", "--tokenizer", "train", "--vocab_size", "2048"]
            places = ["--data_dir", str(data_dir), "--tokenizer_dir", str(data_dir / "tokenizer")]
            subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), *flags, *places], cwd=ROOT, check=True)
    inside = data_dir / "tokenizer"
    found = Corpus(data_dir.resolve(), (inside if inside.is_dir() else data_dir.parent / "tokenizer").resolve())
    if manifest.read(data_dir) is None or not found.tokenizer_dir.is_dir():
        sys.exit(
            f"error: {data_dir} is no prepared corpus with a tokenizer; `uv run python prepare_data.py` makes one."
        )
    return found


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    seconds: float
    """The whole command, with imports, validation and the checkpoint at its end"""
    first_line: tuple[int, float]
    """The step of the first line about one, and the seconds until it was written"""
    peak_bytes: int
    """CUDA's allocator, or of all its processes together on a CPU"""
    rows: list[Row]
    """Of its metrics file"""
    val_loss: float | None = None
    """The last one that it printed, in nats per token: LitGPT's never reaches its metrics file"""
    saved_bytes: Mapping[str, int] = field(default_factory=dict)
    """The files of its last checkpoint, by name"""
    saves: int = 0
    """Checkpoints that it said to write"""

    @property
    def tokens_per_second(self) -> float:
        """Over the second half of its steps, when everything is warm and compiled."""
        rows = [row for row in self.rows if {"total_tokens", "time"} <= row.keys()]
        if len(rows) < 2:
            raise Failed(f"{len(rows)} lines in its log are too few for a speed")
        middle, last = rows[(len(rows) - 1) // 2], rows[-1]
        return (last["total_tokens"] - middle["total_tokens"]) / (last["time"] - middle["time"])

    @property
    def first_step_seconds(self) -> float:
        """From the start of the command to the end of the first step: the other steps before the first line are taken
        to be as fast as later ones."""
        step, seconds = self.first_line
        tokens_a_step = next(row["total_tokens"] for row in self.rows if "total_tokens" in row) / step
        return seconds - (step - 1) * tokens_a_step / self.tokens_per_second


def train(
    flags: Sequence[str],
    *,
    script: str = "run_train.py",
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Run:
    """Runs a training script to its end; what it leaves is removed.

    Args:
        flags: all but the folder to write to.
        script: run_train.py, or another that takes its flags.
        environment: beside this process's.
        limit: seconds after which it is ended.

    Raises:
        Failed: for an exit code that is not 0.
    """
    with tempfile.TemporaryDirectory() as name:
        out_dir = Path(name, "run")
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags, "--out_dir", str(out_dir)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        timer = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
        timer.start()
        lines, first_line = [], None
        try:
            with peak_memory(process) as peak:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.append(line.strip())
                    # `step 10/1953 | ...`, and LitGPT's `Epoch 1 | iter 10 step 10 | ...`
                    if first_line is None and (found := re.search(r"\bstep ([1-9]\d*)\b.* \| ", line)):
                        first_line = int(found[1]), time.perf_counter() - start
                code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        seconds = time.perf_counter() - start
        if limit and code and seconds >= limit:
            raise Failed(f"ended after {limit:.0f} s")
        if code or first_line is None:
            print("\n".join(lines[-30:]), file=sys.stderr)
            said = next((line for line in reversed(lines) if line), f"exit code {code}")
            raise Failed(said[:200] if code else "it wrote no line about a step")
        allocated = re.findall(r"Peak memory ([\d.]+) GiB", "\n".join(lines))
        val_losses = re.findall(r"val loss:? ([\d.]+)", "\n".join(lines))
        return Run(
            seconds=seconds,
            first_line=first_line,
            peak_bytes=round(float(allocated[-1]) * 2**30) if allocated else round(peak["all"]),
            rows=read_metrics(next(out_dir.rglob("metrics.csv"))),
            val_loss=float(val_losses[-1]) if val_losses else None,
            saved_bytes={path.name: path.stat().st_size for path in (out_dir / "final").glob("*.pth")},
            saves=sum(line.startswith("Saving ") for line in lines),
        )


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file, each with the columns that it has numbers in."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def last(rows: Sequence[Row], column: str) -> float:
    """The last number of a column."""
    return next(row[column] for row in reversed(rows) if column in row)


class Point(NamedTuple):
    """A validation of a run."""

    tokens: float
    seconds: float
    """Of training alone: validation and saving are left out"""
    loss: float


def curve(rows: Sequence[Row]) -> list[Point]:
    """The validations of run_train.py's metrics; each must be in a row with the step's own numbers."""
    points, seconds, tokens = [], 0.0, 0.0
    for row in rows:
        if "tokens_per_second" in row:
            seconds += (row["total_tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["total_tokens"]
        if "val_loss" in row:
            points.append(Point(tokens, seconds, row["val_loss"]))
    return points


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The value at a place between two points, in order, on the line that joins them; None outside."""
    for (left, before), (right, after) in pairwise(points):
        if left <= at <= right:
            return before + (after - before) * (at - left) / (right - left)
    return None


class Spread(NamedTuple):
    """A few numbers of the same kind."""

    mean: float
    deviation: float
    """Standard deviation of one of them; 0 for a single one"""
    interval: float
    """Half of the 95% interval of the mean by Student's t; 0 for a single one"""

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.interval > 0 and abs(self.mean) > self.interval


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for 95%, by how many numbers there are."""
SEEDS = range(1, max(T_95) + 1)
"""As many as `spread` knows of."""


def spread(values: Sequence[float]) -> Spread:
    """Their mean and how sure it is."""
    if len(values) < 2:
        return Spread(mean(values), 0.0, 0.0)
    deviation = stdev(values)
    return Spread(mean(values), deviation, T_95[len(values)] * deviation / math.sqrt(len(values)))
