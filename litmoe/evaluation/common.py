"""Shared by all evaluations: load the model of a checkpoint, score continuations, show progress and results."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from litgpt import GPT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from litmoe import checkpoints
from litmoe.cli import UserError, strip_control_chars
from litmoe.inference.generate import check_finite, supports_bf16
from litmoe.layers import hidden_states, logits_of

Precision = Literal["auto", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]

T = TypeVar("T")

_LOGITS = 1 << 26  # logits that are computed in one step: 256 MiB in fp32
_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


# --------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class Result:
    """Fields that every result of an evaluation has."""

    checkpoint: str
    step: int
    device: str
    precision: str


class ModelOptions(TypedDict, total=False):
    """How a checkpoint is loaded; `load_model` has the defaults."""

    max_seq_length: int | None
    device: str
    precision: Precision
    router: str | None


class LoadedModel(NamedTuple):
    """The model of a checkpoint on a device."""

    gpt: GPT
    autocast: AbstractContextManager[Any]  # context for its forward passes
    about: dict[str, Any]  # fields of `Result`


def load_model(
    folder: Path,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    router: str | None = None,
) -> LoadedModel:
    """Load the model of a checkpoint. The ``evaluate`` functions have the same options.

    Args:
        folder: checkpoint folder.
        max_seq_length: maximum number of tokens that the model is given; as many as in training if None.
        device: a torch device; "auto" takes a GPU if there is one.
        precision: "auto" is bf16-mixed on a GPU with bf16 support, else 32-true.
        router: see `checkpoints.load_model`.

    Raises:
        UserError: the checkpoint is missing, damaged or has another router, the context is too long, or there is no
            such device.
    """
    step = checkpoints.read_metadata(folder).step
    torch_device = checkpoints.choose_device(device)
    if precision == "auto":
        precision = "bf16-mixed" if supports_bf16(torch_device) else "32-true"
    bits, _, mode = precision.partition("-")
    autocast: AbstractContextManager[Any] = nullcontext()
    weights_dtype = _DTYPES[bits]
    if mode == "mixed":
        # Mixed precision: fp32 weights, and autocast computes in 16 bits.
        autocast = torch.autocast(torch_device.type, _DTYPES[bits])
        weights_dtype = torch.float32
    device_name = torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else torch_device.type
    # Last, because it takes longest: errors of the arguments come first.
    gpt = checkpoints.load_model(folder, torch_device, weights_dtype, max_seq_length, router)
    about = {"checkpoint": str(folder), "step": step, "device": device_name, "precision": precision}
    return LoadedModel(gpt, autocast, about)


# ------------------------------------------------------------------------------------------------------- continuations


class Continuation(NamedTuple):
    """Tokens that are scored after their context."""

    ids: list[int]  # context and continuation
    length: int  # number of tokens of the continuation, the last ones of ``ids``


class ContinuationScore(NamedTuple):
    """How probable a continuation is."""

    log_probability: float  # in nats, summed over its tokens
    is_greedy: bool  # whether each token is the most probable one


def make_continuation(
    context: Sequence[int], continuation: Sequence[int], max_length: int, *, name: str, block_size: int
) -> Continuation:
    """Join context and continuation, cut from the left to what fits.

    Args:
        context: token ids, at least one.
        continuation: token ids.
        max_length: tokens that the model can read. The last token is predicted but not read, so one more fits.
        name: of the continuation, for the message.
        block_size: of the model, for the message.

    Raises:
        UserError: the continuation has no tokens, or does not fit.
    """
    if not 1 <= len(continuation) <= max_length:
        raise UserError(
            f"{name} has {len(continuation):,} tokens; expected 1 to {max_length:,}, the context. Use a longer"
            f" --max_seq_length, up to {block_size:,}."
        )
    ids = [*context, *continuation][-(max_length + 1) :]
    return Continuation(ids, len(continuation))


def batches_by_length(rows: Sequence[Continuation], batch_tokens: int) -> list[list[int]]:
    """Group the indices of rows of similar length into batches.

    The longest rows come first, so that a lack of memory shows at the start.

    Args:
        rows: what to score.
        batch_tokens: maximum number of tokens in a batch, including padding. A single longer row is allowed.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].ids)):
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = len(rows[index].ids)
    return batches


def score_batches(
    gpt: GPT, rows: Sequence[Continuation], batches: Iterable[list[int]]
) -> Iterator[tuple[int, ContinuationScore]]:
    """Yield the index and the score of each row in the batches, which are lists of indices."""
    for batch in batches:
        yield from zip(batch, score_continuations(gpt, [rows[index] for index in batch]), strict=True)


@torch.no_grad()
def score_continuations(gpt: GPT, rows: Sequence[Continuation]) -> list[ContinuationScore]:
    """Return the score of each continuation, computed in one batch.

    The mode of the model and all random states stay as they are, so the model may be the one in training.

    Raises:
        UserError: the output of the model is not finite.
    """
    device = gpt.transformer.wte.weight.device
    width = max(len(row.ids) for row in rows) - 1
    # Padding on the right needs no mask: causal attention never looks there.
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    sources: list[int] = []
    targets: list[int] = []
    for line, row in enumerate(rows):
        n_read = len(row.ids) - 1
        ids_BT[line, :n_read] = torch.tensor(row.ids[:-1])
        # The token at position p predicts the one at p + 1.
        end = line * width + n_read
        sources += range(end - row.length, end)
        targets += row.ids[-row.length :]
    x_BTC, _ = hidden_states(gpt, ids_BT.to(device))
    # Only the positions that predict a continuation go through the output layer, which is the largest matrix.
    x_NC = x_BTC.flatten(0, 1)[torch.tensor(sources, device=device)]
    targets_N = torch.tensor(targets, device=device)
    step = max(1, _LOGITS // gpt.config.padded_vocab_size)
    nats, hits = [], []
    for x_part, targets_part in zip(x_NC.split(step), targets_N.split(step), strict=True):
        logits = logits_of(gpt, x_part).float()
        nats.append(F.cross_entropy(logits, targets_part, reduction="none").cpu().double())
        hits.append((logits.argmax(dim=-1) == targets_part).cpu())
    nats_N = torch.cat(nats)
    check_finite(nats_N)
    lengths = [row.length for row in rows]
    pairs = zip(nats_N.split(lengths), torch.cat(hits).split(lengths), strict=True)
    return [ContinuationScore(-float(nats.sum()), bool(hits.all())) for nats, hits in pairs]


# ------------------------------------------------------------------------------------------------------------- display


def with_progress(batches: Iterable[T], total: int | None = None) -> Iterator[T]:
    """Yield the batches and show a progress bar on stderr; ``total`` is their number, if they are not a sequence."""
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(batches, total=total)


def as_table(result: Result, rows: dict[str, str], speed: str = "") -> Table:
    """Return a table of names and values, with the checkpoint and the device of the result."""
    table = Table(show_header=False)
    rows = {
        "checkpoint": f"{result.checkpoint}, step {result.step:,}",
        **rows,
        "computed": f"on {result.device} in {result.precision}{speed}",
    }
    for name, value in rows.items():
        table.add_row(Text(strip_control_chars(name)), Text(strip_control_chars(value)))
    return table
