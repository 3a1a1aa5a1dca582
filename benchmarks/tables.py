"""Format numbers and Markdown tables for report.py."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Lines = list[str]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Lines:
    """Return the lines of a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def ranged(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Format (lowest, median, highest) as `median (lowest to highest)`."""
    low, middle, high = (form.format(value) for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def plus_minus(spread: Row, form: str = "{:+.4f}") -> str:
    """Format a mean and half of its 95% interval."""
    half = form.replace("+", "").format(spread["interval"])
    return f"{form.format(spread['mean'])} ± {half}"


def verdict(difference: Row) -> str:
    """Say what the 95% interval of a difference of losses says; below 0 is better."""
    if difference["interval"] == 0 or abs(difference["mean"]) <= difference["interval"]:
        return "no clear difference"
    return "better" if difference["mean"] < 0 else "worse"


def gib(number_of_bytes: float) -> str:
    return f"{number_of_bytes / 2**30:,.1f} GiB"


def machine(result: Row) -> str:
    """Name the hardware of a result."""
    hardware = result["hardware"]
    if hardware.get("gpu"):
        return hardware["gpu"]["name"]
    cpu = hardware["cpu"].replace("Intel(R) Xeon(R) Processor", "Intel Xeon")
    return f"{cpu}, {hardware['cores']} cores"
