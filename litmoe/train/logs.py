"""Loggers of a run: the CSV file that every run has, TensorBoard, W&B, and the terminal."""

import csv
import math
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.loggers import Logger, TensorBoardLogger
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from litmoe import checkpoints
from litmoe.cli import UserError, strip_control_chars
from litmoe.config import RunSettings
from litmoe.run_files import JOURNAL_FILE, METRICS_FILE, REPORT_FILE, RUN_CONFIG, write_atomically

COLUMNS = (
    *("step", "train_loss", "val_loss", "learning_rate", "epoch", "time", "iter_tokens", "total_tokens"),
    *("tokens_per_second", "mfu", "grad_norm", "load_balancing_loss", "z_loss", "val_perplexity"),
    *("hellaswag_acc", "hellaswag_acc_norm"),
)
"""The first columns of the CSV file, in this order; other metrics get columns after them."""


class MetricsCSV(Logger):
    """``<out_dir>/metrics.csv``: a row per log line and a row per evaluation, on disk as soon as it is logged.

    A resumed run continues the file after the step that it resumes from; Lightning's ``CSVLogger`` would start another
    one. Files with other columns, from other versions, stay readable: columns are only added. A full disk does not stop
    the run: rows that cannot be written wait for the next call.

    Args:
        path: of the file.
        resume_step: step of the checkpoint that the run resumes from; None starts a new file.
    """

    name = None
    version = None

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        # A rewrite keeps the rows up to this step. The steps after a checkpoint are taken again, and log their rows
        # again. None keeps nothing: the file belongs to the run that --overwrite removes.
        self._keep_until: float | None = resume_step
        # The header of the file, as this process wrote it. Empty until then, so that the first write rewrites the file.
        self._columns: list[str] = []
        # Bytes of the file up to the last complete row, to remove what a full disk cut off.
        self._size = 0
        # Rows that are not in the file yet; more than one only while it can't be written.
        self._waiting: list[dict[str, Any]] = []
        self._is_failing = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._waiting.append({"step": step, **metrics})
        self._write_waiting()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in the ``hyperparameters.yaml`` of each checkpoint."""

    @rank_zero_only
    def save(self) -> None:
        """Flush the rows to disk, before a checkpoint that comes after them."""
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
            self._write(self._waiting)
        except OSError as error:
            if not self._is_failing:
                print(f"{self.path} can't be written: {error.strerror or error}. Its rows wait until it can be.")
            self._is_failing = True
            return
        if self._is_failing:
            print(f"{self.path} is written again, with the {len(self._waiting):,} rows that waited.")
        self._waiting = []
        self._is_failing = False

    def _write(self, rows: list[dict[str, Any]]) -> None:
        # A column that the header lacks needs a new file: rows of more cells than the header are unreadable.
        names = list(dict.fromkeys(name for row in rows for name in row))
        # A file that was deleted meanwhile is written again, with its header.
        can_append = self._columns and self.path.is_file() and set(names) <= set(self._columns)
        if can_append:
            self._append(rows)
        else:
            self._rewrite(names, rows)
        self._size = self.path.stat().st_size

    def _append(self, rows: list[dict[str, Any]]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerows(rows)
        except OSError:
            # Remove a partial row.
            os.truncate(self.path, self._size)
            raise

    def _rewrite(self, names: list[str], rows: list[dict[str, Any]]) -> None:
        """Write a file with the earlier rows, ``rows``, and columns for ``names``; a kill leaves the old or the new."""
        columns, earlier_rows = self._read_earlier_rows(names)
        # Columns of the file keep their places, and new ones follow. dict.fromkeys drops repeated names.
        columns = list(dict.fromkeys((*columns, *COLUMNS, *names)))
        text = StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows([*earlier_rows, *rows])
        write_atomically(self.path, text.getvalue())
        self._columns = columns
        # From now on all rows are those of this run.
        self._keep_until = math.inf

    def _read_earlier_rows(self, names: list[str]) -> tuple[list[str], list[dict[str, str]]]:
        """Return the columns and the readable rows of the file that are kept.

        If something is damaged, other than a row that a kill cut off, a copy of the file is kept.
        """
        keep_until = self._keep_until
        if keep_until is None or not self.path.is_file():
            return [], []
        # Bytes and not text, so that a copy of a damaged file is exact.
        content = self.path.read_bytes()
        table = _read_table(content.decode("utf-8-sig", errors="surrogateescape"), numeric={*COLUMNS, *names})
        if table.damage:
            print(f"{self.path} is damaged: {table.damage}. A copy of it is kept: {_keep_copy(self.path, content)}")
        return table.columns, [row for row in table.rows if int(row["step"]) <= keep_until]


class _Table(NamedTuple):
    columns: list[str]
    rows: list[dict[str, str]]
    damage: str
    """What can't be read, other than a last row that a kill cut off; empty if everything can"""


def _read_table(text: str, numeric: Collection[str]) -> _Table:
    """Parse a metrics file.

    Args:
        numeric: columns with cells that must be numbers or empty.
    """
    complete_lines, _, last_line = text.rpartition("\n")
    header, *lines = complete_lines.splitlines() or [""]
    columns = _cells(header)
    if "step" not in columns or len(set(columns)) < len(columns):
        return _Table([], [], "its first line has no column names")
    # A row without a line break was cut off by a kill. It counts if only the line break is missing.
    if _parse_row(last_line, columns, numeric) is not None:
        lines.append(last_line)
    rows: list[dict[str, str]] = []
    last_step = 0
    for line in lines:
        row = _parse_row(line, columns, numeric)
        # Rows are in the order of their steps, so a smaller step is a damaged one.
        if row is not None and int(row["step"]) >= last_step:
            rows.append(row)
            last_step = int(row["step"])
    unreadable = len(lines) - lines.count("") - len(rows)
    return _Table(columns, rows, f"{unreadable} rows can't be read" if unreadable else "")


def _parse_row(line: str, columns: list[str], numeric: Collection[str]) -> dict[str, str] | None:
    """Return the cells of a line by column; None if one is missing or is not the number that it should be."""
    cells = _cells(line)
    if len(cells) != len(columns):
        return None
    row = dict(zip(columns, cells, strict=True))
    try:
        for name in numeric:
            float(row.get(name) or 0)
        int(row["step"])
    except ValueError:
        return None
    return row


def _cells(line: str) -> list[str]:
    """Return the cells of a line; an empty list if it has characters that no CSV file of ours has."""
    # Bytes that are no UTF-8 are not printable either.
    return next(csv.reader([line]), []) if line.isprintable() else []


def _keep_copy(path: Path, content: bytes) -> Path:
    """Write ``content`` to a free name next to ``path``, unless a copy of it is there already."""
    copy = path.with_name(f"{path.name}.damaged")
    number = 1
    while copy.exists() and copy.read_bytes() != content:
        number += 1
        copy = path.with_name(f"{path.name}.damaged-{number}")
    try:
        copy.write_bytes(content)
    except OSError:
        # No partial copy on a full disk.
        copy.unlink(missing_ok=True)
        raise
    return copy


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, without its chart of a constant ``hp_metric``, and with texts that keep their lines."""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log the settings of the run, which TensorBoard lists next to the last ``val_loss``."""
        from torch.utils.tensorboard.summary import hparams

        settings = self._sanitize_params(_flatten_dict(params))
        # TensorBoard lists runs only if they name a metric. The value given here is not written.
        for summary in hparams(settings, {"val_loss": 0.0}):
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text as a code block, because TensorBoard renders Markdown, in which line breaks are spaces."""
        block = "\n".join(f"    {line}" for line in text.splitlines())
        self.experiment.add_text(name, block, step)


class Loggers(Logger):
    """Several loggers as one, because ``litgpt.pretrain.setup`` takes one."""

    name = None
    version = None

    def __init__(self, loggers: list[Logger]) -> None:
        self.loggers = loggers
        self._refused: list[Logger] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._for_each(lambda logger: logger.log_metrics(dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._for_each(lambda logger: logger.log_hyperparams(params))

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a generated text to the loggers that show texts."""

        def log(logger: Logger) -> None:
            if isinstance(logger, TensorBoard):
                logger.log_text(name, text, step)
            elif isinstance(logger, WandbLogger):
                logger.log_text(name, columns=["step", "text"], data=[[str(step), text]], step=step)

        self._for_each(log)

    def save(self) -> None:
        self._for_each(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        self._for_each(lambda logger: logger.finalize(status))

    def _for_each(self, log: Callable[[Logger], None]) -> None:
        """Call ``log`` with each logger. If one can't write, the run continues: the CSV file has all of its numbers."""
        for logger in self.loggers:
            try:
                log(logger)
            except OSError as error:
                if logger not in self._refused:
                    self._refused.append(logger)
                    name, why = type(logger).__name__, error.strerror or error
                    print(f"warning: {name} can't write: {why}. The run continues; {METRICS_FILE} has all numbers.")


def logger_factory(settings: RunSettings, resume_from: Path | None) -> Callable[..., Loggers]:
    """Return a replacement of ``litgpt.utils.choose_logger``: it makes the CSV file and the loggers of the settings."""
    names = settings.loggers or [settings.logger_name]
    # The loggers drop what was logged after this step, because these steps are taken again.
    resume_step = checkpoints.read_metadata(resume_from).step if resume_from else None

    def choose_logger(logger_name: str, out_dir: Path, name: str, log_args: dict[str, Any], **kwargs: Any) -> Loggers:
        # The CSV file comes first and always: other loggers may miss rows, for example on a full disk.
        loggers: list[Logger] = [MetricsCSV(out_dir / METRICS_FILE, resume_step)]
        if "tensorboard" in names:
            loggers.append(_tensorboard(out_dir, resume_step))
        if "wandb" in names:
            loggers.append(_wandb(out_dir, name, settings.run_name, log_args, resumed=resume_step is not None))
        return Loggers(loggers)

    return choose_logger


def _tensorboard(out_dir: Path, resume_step: int | None) -> Logger:
    # Steps after the checkpoint are taken again.
    purge = None if resume_step is None else resume_step + 1
    # No version, so that a resumed run writes into the same folder.
    return TensorBoard(root_dir=out_dir / "logs", name="tensorboard", version="", purge_step=purge)


def _wandb(out_dir: Path, name: str, run_name: str | None, log_args: dict[str, Any], *, resumed: bool) -> Logger:
    """Return a W&B logger. A resumed run continues the W&B run with the id that is stored in ``out_dir``.

    LitGPT's takes the id from ``./wandb``, which may be the run of another folder, and names the project
    ``lightning_logs``.

    Raises:
        UserError: W&B cannot start a run, for example without a login.
    """
    import wandb

    id_file = out_dir / "wandb_run_id"
    if resumed and id_file.is_file():
        run_id = id_file.read_text(encoding="utf-8").strip()
    else:
        run_id = uuid.uuid4().hex[:8]
    logger = WandbLogger(
        project=log_args["project"] or os.environ.get("WANDB_PROJECT", name),
        name=run_name or log_args["run"] or os.environ.get("WANDB_RUN_NAME"),
        # W&B itself reads WANDB_RUN_GROUP.
        group=log_args["group"],
        id=run_id,
        # Continues the W&B run with this id, or starts one if there is none.
        resume="allow",
        save_dir=out_dir,
    )
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            # Starts the run now, so that a missing login is reported before the model is built.
            _ = logger.experiment
        except wandb.errors.Error as error:
            raise UserError(
                f"W&B can't start a run: {error}; log in with `uv run wandb login`, or keep the run on this machine"
                " with WANDB_MODE=offline."
            ) from None
        # After the start, because only a run that was started can be continued.
        id_file.write_text(run_id + "\n", encoding="utf-8")
    return logger


class RunDisplay:
    """Shows a run in the terminal: as a progress bar, or as plain lines if the output is not a terminal.

    Use as a context manager. Only the rank with ``enabled`` prints.
    """

    def __init__(self, *, enabled: bool, bar: bool | None, steps: int | None, first_step: int) -> None:
        self._enabled = enabled
        self._steps = steps
        # soft_wrap: Rich would break long lines, also in a file.
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        # In a file or a CI log, each refresh of a bar would be a line of its own.
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

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        # No markup: Rich would read brackets in a sample as its own tags.
        self.console.print(strip_control_chars(text), markup=False)

    def set_steps(self, steps: int) -> None:
        """Set the length of the run, which was unknown."""
        self._steps = steps
        self._progress.update(self._task, total=steps)

    def step(self, step: int, row: Mapping[str, Any], seconds_left: float) -> None:
        """Show that ``step`` steps are done, and the numbers of ``row`` unless it is empty."""
        self._progress.update(self._task, completed=step)
        if not row:
            return
        numbers = " | ".join(_shown_numbers(row))
        self._progress.update(self._task, numbers=numbers)
        if not self._shown:
            left = timedelta(seconds=int(seconds_left))
            self.print(f"step {step}/{self._steps or '?'} | {numbers} | {left} left")


def _shown_numbers(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{row['total_tokens']:,} tokens"
    yield f"loss {row['train_loss']:.3f}"
    yield f"{row['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in row:
        yield f"MFU {row['mfu']:.1%}"
    dead = sum(value for name, value in row.items() if name.startswith("dead_experts/"))
    if dead:
        yield f"dead experts {dead:.0f}"


def run_files(out_dir: Path) -> list[Path]:
    """Return the files and folders that a run writes in ``out_dir``: checkpoints, metrics, logs, report.

    W&B's folder is not included, because it can contain offline runs that were not uploaded yet.
    """
    fixed = [out_dir / name for name in (METRICS_FILE, "logs", "final", RUN_CONFIG, JOURNAL_FILE, REPORT_FILE)]
    existing = [path for path in fixed if path.exists()]
    return [*sorted(out_dir.glob("step-*")), *existing, *checkpoints.leftovers(out_dir)]


def remove_run(out_dir: Path) -> None:
    """Remove the files of another run from ``out_dir``, and nothing else."""
    for path in run_files(out_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
