"""What evaluations of a checkpoint share: device and precision, context, tokens, a progress bar, a table."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from litgpt import GPT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from litmoe import checkpoints
from litmoe.cli import harmless

Precision = Literal["auto", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]

T = TypeVar("T")


class Loaded(NamedTuple):
    """A checkpoint's model, ready to compute."""

    gpt: GPT
    autocast: AbstractContextManager[Any]
    """The context of its forward passes"""
    device: str
    """Its name, for the result"""
    precision: str


def load_model(folder: Path, device: str, precision: Precision, context: int) -> Loaded:
    """Loads a checkpoint onto a device.

    Args:
        context: tokens that the model is given at most.
        device: as torch names it; "auto" is the GPU where there is one.
        precision: "auto" is bf16-mixed on a GPU that computes in it, else 32-true.
    """
    where = checkpoints.choose_device(device)
    if precision == "auto":
        bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-mixed" if bf16 else "32-true"
    compute = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision.partition("-")[0]]
    mixed = precision.endswith("-mixed")
    return Loaded(
        gpt=checkpoints.load_model(folder, where, torch.float32 if mixed else compute, context),
        autocast=torch.autocast(where.type, compute) if mixed else nullcontext(),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        precision=precision,
    )


def with_progress(batches: Iterable[T], total: int) -> Iterator[T]:
    """The batches, with a progress bar on stderr."""
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(batches, total=total)


def as_table(rows: dict[str, str]) -> Table:
    """A result for people."""
    shown = Table(show_header=False)
    for name, value in rows.items():
        shown.add_row(Text(harmless(name)), Text(harmless(value)))
    return shown
