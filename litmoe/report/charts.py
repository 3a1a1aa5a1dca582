"""The charts of the report, made with Bokeh. Colors of axes and of the heat map follow the page, which sets them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    Image,
    LinearColorMapper,
    NumeralTickFormatter,
    PrintfTickFormatter,
)
from bokeh.plotting import figure

from litmoe.report.run_data import Curve, RunData, State

COLORS = ("#3b7dd8", "#e0702b", "#2a9d78", "#9b5fc0", "#d04a72", "#a58416", "#2b9bb5", "#7f8794")
"""Of runs, or of training and validation of a single run; readable on white and on black"""
CELLS = 40_000
"""Of the heat map at most, so that models with thousands of experts keep the page small"""
TOKEN_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
TIME_UNITS = ((3600.0, "h"), (60.0, "min"))


class Chart(NamedTuple):
    """A chart and what the page writes around it."""

    id: str
    title: str
    description: str
    """For readers who do not see it"""
    item: Any
    """For ``Bokeh.embed.embed_item``"""


class Axis(NamedTuple):
    """What the horizontal axis of a chart shows."""

    name: str
    values: Callable[[Curve], np.ndarray]
    units: tuple[tuple[float, str], ...]
    """Factors with their names, the largest first"""
    unit: str
    """The unit with the factor 1"""


TOKENS = Axis("tokens", lambda curve: curve.tokens, TOKEN_UNITS, "")
TIME = Axis("time", lambda curve: curve.seconds, TIME_UNITS, "s")


class Line(NamedTuple):
    """A curve in a chart."""

    curve: Curve
    name: str
    color: str
    is_validation: bool = False


def run_color(index: int) -> str:
    """Return the color of a run in a comparison."""
    return COLORS[index % len(COLORS)]


def all_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the charts of one run or of several, without those that no run has data for."""
    charts = [
        _chart("loss-tokens", "Loss over tokens", _loss_lines(runs), TOKENS, "0.0000"),
        _chart("loss-time", "Loss over time", _loss_lines(runs), TIME, "0.0000"),
        _chart("rate", "Learning rate", _lines(runs, "learning_rate"), TOKENS, "0.00e+0"),
        _chart("norm", "Gradient norm", _lines(runs, "grad_norm"), TOKENS, "0.000"),
        _chart("speed", "Tokens per second", _lines(runs, "tokens_per_second"), TOKENS, "0,0"),
        _chart("memory", "Peak memory, GiB", _memory_lines(runs), TOKENS, "0.00"),
        _chart("hellaswag", "HellaSwag, acc_norm", _lines(runs, "hellaswag_acc_norm"), TOKENS, "0.000"),
    ]
    return [chart for chart in charts if chart is not None]


def _lines(runs: Sequence[RunData], column: str) -> list[Line]:
    return [
        Line(run.curves[column].thinned(), str(run.folder), run_color(index))
        for index, run in enumerate(runs)
        if column in run.curves
    ]


def _loss_lines(runs: Sequence[RunData]) -> list[Line]:
    """Training and validation loss: two colors for one run; one color for each of several."""
    lines = _lines(runs, "train_loss")
    for line in _lines(runs, "val_loss"):
        color = COLORS[1] if len(runs) == 1 else line.color
        lines.append(line._replace(name=f"{line.name}, validation", color=color, is_validation=True))
    return lines


def _memory_lines(runs: Sequence[RunData]) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        if run.states:
            steps, tokens, memory = np.array([(s.step, s.tokens, s.memory / 2**30) for s in run.states]).T
            lines.append(Line(Curve(steps, tokens, np.zeros_like(steps), memory), str(run.folder), run_color(index)))
    return lines


def _chart(id: str, title: str, lines: list[Line], axis: Axis, number: str) -> Chart | None:
    """Draw curves.

    Args:
        id: of the element of the page.
        title: shown above the chart.
        lines: may be empty; then there is no chart.
        axis: the horizontal one.
        number: format of the values, in numbro's language.
    """
    # Metrics of old versions have no time.
    lines = [line for line in lines if np.isfinite(axis.values(line.curve)).any()]
    if not lines:
        return None
    values = np.concatenate([line.curve.value for line in lines])
    factor, unit = _unit(max(np.nanmax(axis.values(line.curve)) for line in lines), axis)
    plot = _figure(y_axis_type="log" if _needs_log(values) else "linear")
    for line in lines:
        data = {
            "x": (axis.values(line.curve) / factor).astype(np.float32),
            "y": line.curve.value.astype(np.float32),
            "step": line.curve.step.astype(np.int32),
        }
        drawn = plot.line("x", "y", source=data, color=line.color, line_width=1.75, line_join="round")
        # A comparison has one color for each run.
        if line.is_validation and len(lines) > 2:
            drawn.glyph.line_dash = [5, 3]
        # The dots show where a validation was, and a curve of a single value.
        if line.is_validation or len(line.curve) == 1:
            plot.scatter("x", "y", source=drawn.data_source, color=line.color, size=6)
        tooltips = [(line.name, f"@y{{{number}}}"), ("step", "@step{0,0}"), (axis.name, f"@x{{0,0.[00]}} {unit}")]
        plot.add_tools(HoverTool(renderers=[drawn], mode="vline", tooltips=tooltips))
    plot.xaxis.formatter = PrintfTickFormatter(format=f"%g {unit}".strip())
    if values.max() > 1000:
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[00]a")
    else:
        plot.yaxis.formatter = PrintfTickFormatter(format="%.3g")
    if _needs_log(values):
        plot.yaxis.ticker = FixedTicker(ticks=_log_ticks(values))
    parts = [f"{line.name}: from {line.curve.value[0]:.4g} to {line.curve.value[-1]:.4g}" for line in lines]
    description = f"{title} over {axis.name}. {'; '.join(parts)}."
    return Chart(id, title, description, json_item(plot))


def _figure(**options: Any) -> figure:
    """Return an empty plot in the style of the page."""
    plot = figure(
        height=230, sizing_mode="stretch_width", tools="box_zoom,reset,save", toolbar_location="above", **options
    )
    plot.toolbar_inner = True
    plot.toolbar.autohide = True
    plot.toolbar.logo = None
    # A finger on a chart must be able to scroll the page.
    plot.toolbar.active_drag = None
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.min_border_right = 12
    # Few enough for a phone.
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=4)
    plot.axis.axis_line_color = None
    plot.axis.major_tick_line_color = plot.axis.minor_tick_line_color = None
    plot.axis.major_label_text_font = "system-ui, sans-serif"
    plot.axis.major_label_text_font_size = "12px"
    plot.xgrid.visible = False
    return plot


def _unit(largest: float, axis: Axis) -> tuple[float, str]:
    """Return the largest unit of an axis in which its end is at least 1, as a factor and a name."""
    for factor, unit in axis.units:
        if largest >= factor:
            return factor, unit
    return 1.0, axis.unit


def _needs_log(values: np.ndarray) -> bool:
    """Return whether a linear axis would press most values onto its lower end."""
    return bool(values.min() > 0 and values.max() / np.median(values) > 6)


def _log_ticks(values: np.ndarray) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten within the range; only the powers if that is many."""
    decades = range(int(np.floor(np.log10(values.min()))), int(np.ceil(np.log10(values.max()))) + 1)
    digits = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [digit * 10.0**decade for decade in decades for digit in digits]


# --- Experts


def expert_chart(run: RunData, id: str) -> Chart | None:
    """Draw the load of each expert over time: a row for each expert, the rows of a layer together."""
    states = [state for state in run.states if state.expert_load]
    if not states:
        return None
    load = _load_over_time(states)
    n_layer, n_expert = len(states[0].expert_load), len(states[0].expert_load[0])
    factor, unit = _unit(states[-1].tokens, TOKENS)
    layer, expert = np.divmod(np.arange(n_layer * n_expert, dtype=np.int32), n_expert)
    columns = load.shape[1]
    # Images are drawn from the bottom; the first layer is on top.
    data = {
        "load": [load[::-1]],
        "layer": [np.repeat(layer[::-1, None], columns, axis=1)],
        "expert": [np.repeat(expert[::-1, None], columns, axis=1)],
    }
    plot = _figure(x_range=(0, states[-1].tokens / factor), y_range=(0, n_layer * n_expert))
    plot.height = int(np.clip(60 + 10 * n_layer * n_expert, 200, 640))
    # The page replaces the palette by one that fits its background.
    mapper = LinearColorMapper(palette=["#3b7dd8", "#d8d8d8", "#d0483a"], low=0, high=2)
    width, height = states[-1].tokens / factor, n_layer * n_expert
    image = Image(image="load", x=0, y=0, dw=width, dh=height, color_mapper=mapper)
    drawn = plot.add_glyph(ColumnDataSource(data), image)
    tooltips = [("layer", "@layer"), ("expert", "@expert"), ("load", "@load{0.00}"), ("tokens", f"$x{{0.0}} {unit}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips))
    centers = [(n_layer - index - 0.5) * n_expert for index in range(n_layer)]
    shown = range(0, n_layer, 1 + n_layer // 24)
    plot.yaxis.ticker = FixedTicker(ticks=[centers[index] for index in shown])
    plot.yaxis.major_label_overrides = {centers[index]: f"layer {index}" for index in shown}
    plot.ygrid.ticker = FixedTicker(ticks=[index * n_expert for index in range(1, n_layer)])
    # Gaps between the layers.
    plot.ygrid.level = "overlay"
    plot.ygrid.grid_line_width = 3
    plot.xaxis.formatter = PrintfTickFormatter(format=f"%g {unit}".strip())
    last = np.array(states[-1].expert_load)
    description = (
        f"Load of {n_expert} experts in {n_layer} layers over tokens, relative to an even share. At the end it is"
        f" {last.min():.2f} to {last.max():.2f}."
    )
    return Chart(id, "Expert load", description, json_item(plot))


def _load_over_time(states: Sequence[State]) -> np.ndarray:
    """Return the load as an image, ``(layers * experts, columns)``, whose columns are equally many tokens apart."""
    loads = np.array([np.ravel(state.expert_load) for state in states], dtype=np.float32)
    n_columns = max(2, min(len(states), CELLS // loads.shape[1]))
    tokens = np.array([state.tokens for state in states])
    # The first state at or after the end of each column.
    ends = np.linspace(0, tokens[-1], n_columns + 1)[1:]
    nearest = np.searchsorted(tokens, ends).clip(max=len(states) - 1)
    return loads[nearest].T
