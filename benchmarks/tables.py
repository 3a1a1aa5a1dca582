"""Format numbers and tables. A benchmark stores its tables in its result file; report.py puts them into documents."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Table = list[list[str]]  # the heads, then the rows


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
    """Format (lowest, median, highest) as `median (lowest to highest)`."""
    # A single round has no range.
    low, middle, high = (form.format(value) for value in values)
    if low == high:
        return middle
    return f"{middle} ({low} to {high})"


def plus_minus(spread: Row, form: str = "{:+.4f}") -> str:
    """Format a mean and half of its 95% interval."""
    # The interval has no sign of its own.
    half = form.replace("+", "").format(spread["interval"])
    return f"{form.format(spread['mean'])} ± {half}"


def with_verdict(difference: Row) -> str:
    """Format a difference of losses and say whether it is clear; below 0 is better."""
    text = plus_minus(difference)
    # A single seed has no interval, so nothing is clear.
    if difference["interval"] == 0 or abs(difference["mean"]) <= difference["interval"]:
        return f"{text}: no clear difference"
    if difference["mean"] < 0:
        return f"{text}: better"
    return f"{text}: worse"


def bold_ours(name: str) -> str:
    """Return a name as it appears in a table."""
    if name == "ours":
        return "**ours**"
    return name


def gib(number_of_bytes: float) -> str:
    return f"{number_of_bytes / 2**30:,.1f} GiB"
