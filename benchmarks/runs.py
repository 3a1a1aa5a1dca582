"""Start training runs as commands in processes of their own, watch them, and read their metrics."""

import csv
import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT, Row, peak_memory, spread
from litmoe.data import manifest


class RunFailed(Exception):
    """A run that exited with an error. The message is the last line that it printed."""


# --------------------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Corpus:
    """A prepared token folder and its tokenizer."""

    data_dir: Path
    tokenizer_dir: Path

    @property
    def flags(self) -> list[str]:
        """The flags of run_train.py that select this corpus."""
        paths = [f"--data.init_args.{split}_data_path={self.data_dir / split}" for split in ("train", "val")]
        return [*paths, f"--tokenizer_dir={self.tokenizer_dir}"]

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens, wherever they are."""
        metadata = manifest.read(self.data_dir)
        assert metadata is not None
        return hashlib.sha256(repr(metadata.made_from("train", "val")).encode()).hexdigest()[:12]

    def bits_per_byte(self, loss: float) -> float:
        """Convert a validation loss in nats per token."""
        # The metadata counts the tokens and the bytes of text that they came from.
        metadata = manifest.read(self.data_dir)
        assert metadata is not None
        validation = metadata.splits["val"]
        return loss / math.log(2) * validation.tokens / validation.bytes


def find_corpus(data_dir: Path | None) -> Corpus:
    """Return a prepared corpus with its tokenizer inside the folder or next to it.

    Without a folder: the quickstart's corpus in data/stories, which is prepared if it is missing.
    """
    if data_dir is None:
        data_dir = ROOT / "data" / "stories"
        if manifest.read(data_dir) is None:  # as the quickstart's run file prepares it
            flags = ["--source", "sample", "--tokenizer", "train", "--vocab_size", "2048"]
            flags += ["--data_dir", str(data_dir), "--tokenizer_dir", str(data_dir / "tokenizer")]
            subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), *flags], cwd=ROOT, check=True)
    # A tokenizer next to the folder serves several corpora.
    tokenizer_dir = data_dir / "tokenizer"
    if not tokenizer_dir.is_dir():
        tokenizer_dir = data_dir.parent / "tokenizer"
    if manifest.read(data_dir) is None or not tokenizer_dir.is_dir():
        sys.exit(
            f"error: {data_dir} is not a prepared corpus with a tokenizer. "
            f"Run: uv run python prepare_data.py --data_dir {data_dir}"
        )
    return Corpus(data_dir.resolve(), tokenizer_dir.resolve())


# Flags for runs that only train and validate.
NOTHING_ELSE = ("--train.save_interval=null", "--checkpoint.every_minutes=null", "--sample.prompt=null")


# Muon at the rate of the quickstart's AdamW
MUON = '--optimizer={"class_path": "litmoe.train.muon.Muon", "init_args": {"lr": 0.004, "weight_decay": 0.1}}'


def seed_flags(seed: int) -> list[str]:
    """Return the flags that decide the initial weights and the order of the data."""
    return [f"--seed={seed}", f"--data.init_args.seed={seed}"]


# ----------------------------------------------------------------------------------------------------------------- runs

# The environment of runs that share a CPU: one core each.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@contextmanager
def run_pool(at_once: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool of threads, each of which starts a run and waits for it; Ctrl-C drops the runs that wait."""
    executor = ThreadPoolExecutor(at_once)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Run:
    """The measurements of a run that has ended."""

    seconds: float  # of the complete command, with imports, validation and the last checkpoint
    first_log_line: tuple[int, float]  # its step, and seconds until it was printed
    peak_bytes: int  # reserved by CUDA's allocator; on a CPU the memory of all processes, 0 if it was not watched
    rows: list[dict[str, float]]  # of its metrics file
    val_loss: float | None  # the last one printed, in nats per token (LitGPT's own never reaches its metrics file)

    @property
    def tokens_per_second(self) -> float:
        """Speed over the second half of the steps, when everything is warm and compiled."""
        # Rows of validations have no token count.
        rows = [row for row in self.rows if "total_tokens" in row]
        if len(rows) < 2:
            raise RunFailed(f"{len(rows)} rows in the metrics file are too few to compute a speed")
        middle, last = rows[(len(rows) - 1) // 2], rows[-1]
        return (last["total_tokens"] - middle["total_tokens"]) / (last["time"] - middle["time"])

    @property
    def first_step_seconds(self) -> float:
        """Seconds from the start of the command to the end of the first step.

        The first log line appears after several steps. The others are subtracted at the speed of the later ones.
        """
        step, seconds = self.first_log_line
        tokens_per_step = next(row["total_tokens"] for row in self.rows if "total_tokens" in row) / step
        return seconds - (step - 1) * tokens_per_step / self.tokens_per_second


def train(
    flags: Sequence[str],
    *,
    script: Sequence[str] = ("run_train.py",),
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
    watch_memory: bool = False,
    out_dir: Path | None = None,
) -> Run:
    """Run a training script to its end.

    Args:
        flags: of the script, without --out_dir.
        script: its path from the root, and arguments before the flags.
        environment: added to the environment of this process.
        limit: seconds after which the run is killed.
        watch_memory: measure the memory of the processes, which takes a fifth of a core.
        out_dir: output folder; None: a temporary one.

    Raises:
        RunFailed: for an exit code other than 0, or a run without a log line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out_dir = out_dir or Path(folder, "run")
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *script, *flags, "--out_dir", str(out_dir)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        timer = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
        timer.start()
        try:
            with peak_memory(process) if watch_memory else nullcontext({"bytes": 0}) as peak:
                lines, first_log_line = follow_output(process, start)
                code = process.wait()
        finally:
            # Also after Ctrl-C: nothing may go on training in the background.
            timer.cancel()
            process.kill()
        seconds = time.perf_counter() - start

        if limit and seconds >= limit:
            raise RunFailed(f"killed after {limit:.0f} s")
        if code != 0 or first_log_line is None:
            print("\n".join(lines[-30:]), file=sys.stderr)
            last_line = [f"exit code {code}", *lines][-1][:200]
            raise RunFailed(last_line if code != 0 else "the run printed no line about a step")
        # On a CPU the run prints the memory of its main process, which is not that of all.
        reserved_gib = last_number(r"Peak memory +([\d.]+) GiB(?! of RAM)", lines)
        return Run(
            seconds=seconds,
            first_log_line=first_log_line,
            peak_bytes=round(reserved_gib * 2**30) if reserved_gib else round(peak["bytes"]),
            rows=read_metrics(next(out_dir.rglob("metrics.csv"))),
            val_loss=last_number(r"val loss:? ([\d.]+)", lines),
        )


def follow_output(process: "subprocess.Popen[str]", start: float) -> tuple[list[str], tuple[int, float] | None]:
    """Read a run's output to its end. Return its lines, and the step and time of the first log line."""
    assert process.stdout is not None
    lines, first_log_line = [], None
    for line in filter(str.strip, process.stdout):
        lines.append(line.strip())
        # Ours: `step 10/1953 | ...`, LitGPT's: `Epoch 1 | iter 10 step 10 | ...`. Step 0 is the first validation.
        match = re.search(r"\bstep ([1-9]\d*)\b.* \| ", line)
        if match and first_log_line is None:
            first_log_line = int(match[1]), time.perf_counter() - start
    return lines, first_log_line


def last_number(pattern: str, lines: list[str]) -> float | None:
    """Return the number of the last match; None without one."""
    matches = re.findall(pattern, "\n".join(lines))
    return float(matches[-1]) if matches else None


# -------------------------------------------------------------------------------------------------------------- metrics


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics file, each with the columns that contain a number."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


class Point(NamedTuple):
    """One validation during a run."""

    tokens: float
    seconds: float  # of training alone, without validation and saving
    loss: float


def validation_curve(rows: Sequence[dict[str, float]]) -> list[Point]:
    """Return the validations in the metrics of run_train.py, in order."""
    points, seconds, tokens = [], 0.0, 0.0
    for row in rows:
        # The speed of a row covers the steps since the last one, so it gives their seconds without validation.
        if "tokens_per_second" in row:
            seconds += (row["total_tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["total_tokens"]
        if "val_loss" in row:
            points.append(Point(tokens, seconds, row["val_loss"]))
    return points


def score(rows: Sequence[dict[str, float]], corpus: Corpus) -> Row:
    """Return the end of a run from its metrics, and its curve as (tokens, seconds, bits per byte)."""
    points = validation_curve(rows)
    curve = [[point.tokens, round(point.seconds, 2), round(corpus.bits_per_byte(point.loss), 5)] for point in points]
    # The last validation is after the last step.
    last = points[-1]
    return {
        "bits_per_byte": corpus.bits_per_byte(last.loss),
        "tokens": last.tokens,
        "seconds": round(last.seconds, 2),
        "tokens_per_second": round(last.tokens / last.seconds, 1),
        "curve": curve,
    }


def difference(runs: Sequence[Row], base: Sequence[Row]) -> Row:
    """Return the mean difference of the scores to those with the same seed in ``base``; empty without a pair."""
    scores = {run["seed"]: run["bits_per_byte"] for run in base}
    changes = [run["bits_per_byte"] - scores[run["seed"]] for run in runs if run["seed"] in scores]
    return {"difference": spread(changes)._asdict()} if changes else {}
