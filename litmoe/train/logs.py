"""Where a run's numbers go: one CSV file always, other loggers beside it, and the terminal."""

import csv
import io
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.fabric.loggers import Logger, TensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from litmoe import checkpoints
from litmoe.cli import UserError, harmless

METRICS_FILE = "metrics.csv"
COLUMNS = (
    *("step", "train_loss", "val_loss", "learning_rate", "epoch", "time", "iter_tokens", "total_tokens"),
    *("tokens_per_second", "mfu", "grad_norm", "load_balancing_loss", "z_loss", "val_perplexity"),
    *("hellaswag_acc", "hellaswag_acc_norm"),
)
"""Columns of the CSV file that every run has; those of each layer's experts follow."""
CUT_OFF = re.compile(r"\d+(,[-+.\deinfa]*)*")
"""What a kill may leave of a row"""


class MetricsCSV(Logger):
    """One row per step in ``<out_dir>/metrics.csv``, on disk as soon as it is logged.

    Lightning's ``CSVLogger`` starts another ``version_1/`` file for a resumed run. This one goes on in the same file,
    less the rows after the step that the run resumes from, so that no step stands in it twice. A full disk ends no run
    here: rows that can't be written wait for the next time.
    """

    name = None
    version = None

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self._resume_step = resume_step
        self._columns: list[str] = []  # of the file, once it is this run's
        self._size = 0  # of the file, up to the last whole row
        self._waiting: list[dict[str, Any]] = []
        self._refused = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._waiting.append({"step": step, **metrics})
        self._write_waiting()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the settings stand in the checkpoint's ``hyperparameters.yaml``."""

    @rank_zero_only
    def save(self) -> None:
        """Sees to it that the rows outlive the machine's power too: before a checkpoint that comes after them."""
        self._write_waiting()
        if self._columns and not self._waiting:
            with suppress(OSError), open(self.path, "ab") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write_waiting()
        if self._waiting:
            print(f"{len(self._waiting):,} rows, from step {self._waiting[0]['step']} on, are missing in {self.path}.")

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        try:
            self._write()
        except OSError as error:
            if not self._refused:
                print(f"{self.path} can't be written: {error.strerror or error}. Its rows wait until it can be.")
            self._refused = True
            return
        if self._refused:
            print(f"{self.path} is written again, with the {len(self._waiting):,} rows that waited.")
        self._waiting, self._refused = [], False

    def _write(self) -> None:
        names = [name for row in self._waiting for name in row]
        if self._columns and self.path.is_file() and not set(names) - set(self._columns):
            try:
                with open(self.path, "a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self._columns, restval="").writerows(self._waiting)
            except OSError:
                os.truncate(self.path, self._size)  # half a row
                raise
        else:
            columns, rows = self._read_rows(names)
            columns = list(dict.fromkeys((*columns, *COLUMNS, *names)))
            self._write_all(columns, [*rows, *self._waiting])
            self._columns = columns
        self._size = self.path.stat().st_size

    def _read_rows(self, names: list[str]) -> tuple[list[str], list[dict[str, str]]]:
        """The columns of the file so far, and its rows that can be read; of a file that another process wrote those up
        to the step that the run resumes from.

        Another version of this project may have written other columns: they stay, as they are. The file is kept beside
        where more is lost than a last row that a kill cut off.

        Args:
            names: this run's columns, whose cells must be numbers.
        """
        before = not self._columns
        if not self.path.is_file() or (before and self._resume_step is None):
            return [], []
        content = self.path.read_bytes()
        text = content.decode("utf-8-sig", errors="replace")
        header, *lines = text.splitlines() or [""]
        columns = _cells(header)
        readable = "step" in columns and "" not in columns and len(set(columns)) == len(columns) and "\n" in text
        numbers = {*COLUMNS, *names}
        rows: list[dict[str, str]] = []
        broken = []
        for line in filter(None, lines):
            cells = _cells(line)
            row = dict(zip(columns, cells, strict=False))
            whole = readable and len(cells) == len(columns)
            if whole and _are_numbers(row, numbers) and int(row["step"]) > (int(rows[-1]["step"]) if rows else -1):
                rows.append(row)
            else:
                broken.append(line)
        if broken and broken == lines[-1:] and not text.endswith("\n") and CUT_OFF.fullmatch(lines[-1]):
            broken = []
        if broken or not readable:
            what = f"{len(broken)} of its rows can't be read" if readable else "its first line names no columns"
            print(f"{self.path} is damaged: {what}. As it was: {_keep_beside(self.path, content)}")
        elif before and (others := [name for name in columns if name not in numbers]) and numbers - set(columns):
            print(f"{self.path} has columns that this version does not write; they stay: {', '.join(others)}.")
        if not readable:
            return [], []
        return columns, [row for row in rows if int(row["step"]) <= (self._resume_step or 0)] if before else rows

    def _write_all(self, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            with open(partial, "w", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave an empty file in the place of all rows
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def _cells(line: str) -> list[str]:
    """The cells of a line; none of a damaged one."""
    if not line.isprintable() or "\ufffd" in line:
        return []
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _are_numbers(row: Mapping[str, str], names: Collection[str]) -> bool:
    """Whether a row has a step, and numbers or nothing in the columns of these names."""
    try:
        return int(row["step"]) >= 0 and all(float(row[name]) is not None for name in names if row.get(name))
    except ValueError:
        return False


def _keep_beside(path: Path, content: bytes) -> Path:
    """Writes what a damaged file held to a name beside it; the copies of earlier runs stay."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}")
        if not kept.exists() or kept.read_bytes() == content:
            break
    try:
        kept.write_bytes(content)
    except OSError:  # no half of it on a full disk
        kept.unlink(missing_ok=True)
        raise
    return kept


class Loggers(Logger):
    """Several loggers behind one, since ``litgpt.pretrain.setup`` takes one."""

    name = None
    version = None

    def __init__(self, loggers: list[Logger]) -> None:
        self.loggers = loggers
        self._refused: list[Logger] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        for logger in self.loggers:
            with self._going_on(logger):
                logger.log_metrics(dict(metrics), step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        for logger in self.loggers:
            logger.log_hyperparams(params)

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        """Sends a generated text to the loggers that show texts."""
        for logger in self.loggers:
            with self._going_on(logger):
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(name, text, step)
                elif isinstance(logger, WandbLogger):
                    logger.log_text(name, columns=["step", "text"], data=[[str(step), text]], step=step)

    def save(self) -> None:
        for logger in self.loggers:
            with self._going_on(logger):
                logger.save()

    def finalize(self, status: str) -> None:
        for logger in self.loggers:
            with self._going_on(logger):
                logger.finalize(status)

    @contextmanager
    def _going_on(self, logger: Logger) -> Iterator[None]:
        """A full disk ends no run at another logger either; what it misses stands in the CSV file."""
        try:
            yield
        except OSError as error:
            if logger not in self._refused:
                self._refused.append(logger)
                name, why = type(logger).__name__, error.strerror or error
                print(f"warning: {name} can't write: {why}. The run goes on; {METRICS_FILE} has all.")


def logger_factory(names: Iterable[str], *, run_name: str | None, resume_step: int | None) -> Callable[..., Loggers]:
    """What stands in for ``litgpt.utils.choose_logger`` (same parameters): the CSV file and the loggers named."""

    def choose_logger(
        logger_name: str,
        out_dir: Path,
        name: str,
        log_interval: int = 1,
        log_args: dict[str, Any] | None = None,
        resume: bool | None = None,
        **kwargs: Any,
    ) -> Loggers:
        loggers: list[Logger] = [MetricsCSV(out_dir / METRICS_FILE, resume_step)]
        for wanted in dict.fromkeys(names):
            if wanted == "tensorboard":
                loggers.append(_tensorboard(out_dir, resume_step))
            elif wanted == "wandb":
                loggers.append(_wandb(out_dir, name, run_name, log_args or {}, resumed=resume_step is not None))
        return Loggers(loggers)

    return choose_logger


def _tensorboard(out_dir: Path, resume_step: int | None) -> Logger:
    purge = None if resume_step is None else resume_step + 1
    return TensorBoardLogger(root_dir=out_dir / "logs", name="tensorboard", version="", purge_step=purge)


def _wandb(out_dir: Path, name: str, run_name: str | None, log_args: dict[str, Any], *, resumed: bool) -> Logger:
    """A W&B logger; for a resumed run it goes on with the W&B run whose id lies in ``out_dir``.

    LitGPT's takes the id from ``./wandb``, so that it continued another folder's run, and calls the project
    ``lightning_logs``.
    """
    import wandb

    id_file = out_dir / "wandb_run_id"
    known = resumed and id_file.is_file()
    run_id = id_file.read_text(encoding="utf-8").strip() if known else uuid.uuid4().hex[:8]
    logger = WandbLogger(
        project=log_args.get("project") or os.environ.get("WANDB_PROJECT") or name,
        name=run_name or log_args.get("run") or os.environ.get("WANDB_RUN_NAME"),
        group=log_args.get("group") or os.environ.get("WANDB_RUN_GROUP"),
        id=run_id,
        resume="allow",
        save_dir=out_dir,
    )
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            _ = logger.experiment  # starts the run now, so that a missing login is known before the model is built
        except wandb.errors.Error as error:
            raise UserError(
                f"W&B can't start a run: {error}; log in with `uv run wandb login`, or keep the run on this machine"
                " with WANDB_MODE=offline."
            ) from None
        id_file.write_text(run_id + "\n", encoding="utf-8")
    return logger


class RunDisplay:
    """The terminal of a run: a progress bar where there is a terminal, plain lines elsewhere.

    Use as a context manager; only the process with ``enabled`` prints.
    """

    def __init__(self, *, enabled: bool, bar: bool | None, steps: int, first_step: int) -> None:
        self._enabled = enabled
        self._steps = steps
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        show = enabled and (self.console.is_terminal if bar is None else bar)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=not show,
            refresh_per_second=4,
        )
        self._shown = show
        self._task = self._progress.add_task("", total=steps, completed=first_step, numbers="")

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def print(self, text: str) -> None:
        """A line above the progress bar, on the main process alone."""
        self.console.print(harmless(text), markup=False)

    def step(self, step: int, row: Mapping[str, Any], seconds_left: float) -> None:
        """Shows that ``step`` steps are done; with a row of metrics (an empty one is none) also the numbers."""
        if not row:
            self._progress.update(self._task, completed=step)
            return
        parts = [f"{row['total_tokens']:,} tokens", f"loss {row['train_loss']:.3f}"]
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        if dead := sum(value for name, value in row.items() if name.startswith("dead_experts/")):
            parts.append(f"dead experts {dead:.0f}")
        self._progress.update(self._task, completed=step, numbers=" | ".join(parts))
        if not self._shown:
            minutes, seconds = divmod(int(seconds_left), 60)
            left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
            self.print(f"step {step}/{self._steps} | {' | '.join(parts)} | {left}")


def run_files(out_dir: Path) -> list[Path]:
    """What a run leaves in its ``out_dir``: checkpoints, metrics, logs. Nothing else there is its own.

    W&B's folder is not among them: runs that were logged offline wait in it to be sent.
    """
    own = [out_dir / name for name in (METRICS_FILE, "logs", "final", "run_config.yaml") if (out_dir / name).exists()]
    return [*sorted(out_dir.glob("step-*")), *own, *checkpoints.leftovers(out_dir)]


def remove_run(out_dir: Path) -> None:
    """Removes what another run left in ``out_dir``; nothing else."""
    for path in run_files(out_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
