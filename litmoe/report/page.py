"""Write the report: one HTML page with everything inside, which opens without a network."""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from litmoe.checkpoints import CheckpointMetadata
from litmoe.cli import command
from litmoe.report.charts import COLORS, Chart, all_charts, expert_chart, run_color
from litmoe.report.run_data import RunData, format_bytes, format_seconds, next_commands, read_run, spread, summarize
from litmoe.run_files import RUN_CONFIG, write_atomically

SAMPLES = 12
"""Samples of a run that the page shows, the first and the last included"""


class CheckpointView(NamedTuple):
    """What the page shows of a checkpoint."""

    folder: str
    step: int
    tokens: int
    size: str
    commands: dict[str, str]


class RunView(NamedTuple):
    """What the page shows of a run beside the charts that several runs share."""

    name: str
    color: str
    status: str
    summary: dict[str, str]
    plan: list[tuple[str, str, str]]
    """What was planned and what happened, by name"""
    sessions: list[tuple[int, str]]
    """Step and time of each start"""
    notes: list[str]
    versions: dict[str, str]
    expert_chart: Chart | None
    samples: list[tuple[int, str]]
    """Step and text"""
    checkpoints: list[CheckpointView]
    resume: str
    """The command that continues an unfinished run"""


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the report of one run or the comparison of several.

    Args:
        folders: the ``out_dir`` of each run.
        path: of the page. A reader never sees an incomplete one.

    Raises:
        UserError: a folder holds no run.
        OSError: the page cannot be written.
    """
    write_atomically(path, render([read_run(folder) for folder in folders]))


def render(runs: Sequence[RunData]) -> str:
    """Return the page."""
    views = [_view(run, index) for index, run in enumerate(runs)]
    charts = all_charts(runs)
    heat_maps = [view.expert_chart for view in views if view.expert_chart]
    return _template().render(
        title=", ".join(view.name for view in views),
        views=views,
        summary_names=list(dict.fromkeys(name for view in views for name in view.summary)),
        charts=charts,
        items={chart.id: chart.item for chart in [*charts, *heat_maps]},
        differences=_settings_table(runs, differing=True),
        settings=_settings_table(runs, differing=False),
        validation_color=COLORS[1],
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        library=_library(),
        # Scripts without it are not executed, whatever text got into the page.
        nonce=secrets.token_urlsafe(16),
    )


@cache
def _template() -> Template:
    # Everything is escaped: names, settings and samples may contain HTML.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # Bokeh reads objects in their order: the default sorts the keys.
    environment.policies["json.dumps_kwargs"] = {}
    return environment.get_template("page.html.jinja")


@cache
def _library() -> str:
    """Return BokehJS, without its widgets."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def _view(run: RunData, index: int) -> RunView:
    config = command("run_train.py", "--config", run.folder / RUN_CONFIG, "--resume", "auto")
    return RunView(
        name=str(run.folder),
        color=run_color(index),
        status=_status(run),
        summary=_summary(run),
        plan=_plan(run),
        sessions=[(session["step"], str(session["time"])[:16].replace("T", " ")) for session in run.sessions],
        notes=run.sessions[-1]["notes"] or [] if run.sessions else [],
        versions=run.sessions[-1]["versions"] or {} if run.sessions else {},
        expert_chart=expert_chart(run, f"experts-{index}"),
        samples=spread(run.samples, SAMPLES),
        checkpoints=[_checkpoint(run, *item) for item in run.checkpoints.items()][::-1],
        resume="" if run.ending == "finished" or "checkpoint_dir" in run.settings else config,
    )


def _checkpoint(run: RunData, folder: Path, metadata: CheckpointMetadata) -> CheckpointView:
    size = format_bytes(sum(file.size for file in metadata.files.values()))
    return CheckpointView(str(folder), metadata.step, metadata.tokens, size, next_commands(folder, run.settings))


def _status(run: RunData) -> str:
    steps = run.sessions[-1]["steps"] if run.sessions else None
    done = _last(run, "train_loss", "step")
    of = f" of {steps:,}" if steps else ""
    return f"{run.ending or 'not finished'}, step {done or 0:,.0f}{of}"


def _last(run: RunData, column: str, field: str = "value") -> float | None:
    curve = run.curves.get(column)
    return None if curve is None else float(getattr(curve, field)[-1])


def _summary(run: RunData) -> dict[str, str]:
    speed = run.curves.get("tokens_per_second")
    return summarize(
        val_loss=_last(run, "val_loss"),
        train_loss=_last(run, "train_loss"),
        bytes_per_token=run.bytes_per_token,
        tokens=int(_last(run, "train_loss", "tokens") or 0),
        seconds=_last(run, "train_loss", "seconds") or 0.0,
        tokens_per_second=0.0 if speed is None else float(speed.value[len(speed) // 2 :].mean()),
        memory=format_bytes(run.states[-1].memory) if run.states else None,
    )


def _plan(run: RunData) -> list[tuple[str, str, str]]:
    """Return what the last session planned and what happened, by name."""
    if not run.sessions:
        return []
    planned = run.sessions[-1]
    # The time budget, or the estimate of the first log line.
    expected = planned["seconds"] or (run.states[0].expected_seconds if run.states else None)
    steps, tokens, seconds = (_last(run, "train_loss", field) for field in ("step", "tokens", "seconds"))
    return [
        ("Steps", _text(planned["steps"]), _text(steps)),
        ("Tokens", _text(planned["tokens"]), _text(tokens)),
        ("Time", "" if expected is None else format_seconds(expected), format_seconds(seconds or 0)),
        ("Epochs", _text(planned["epochs"], ".2f"), _text(_last(run, "epoch"), ".0f") + " complete"),
        ("End", str(planned["limited_by"]), run.ending or "not finished"),
    ]


def _text(number: float | None, form: str = ",.0f") -> str:
    return "" if number is None else format(number, form)


def _settings_table(runs: Sequence[RunData], *, differing: bool) -> dict[str, list[str]]:
    """Return the values of each setting, one for each run.

    Args:
        runs: the columns.
        differing: only settings that are not the same in all runs.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    table = {name: [run.settings.get(name, "") for run in runs] for name in names}
    if differing:
        table = {name: values for name, values in table.items() if len(set(values)) > 1}
    return table
