"""How well a checkpoint predicts text: loss, perplexity and bits per byte over every token of the validation text.

What is counted. The tokens of all documents, each followed by the end-of-text token (and after the begin-of-text token,
where the tokenizer uses one), are one long text. It is cut into
windows of the context length that do not overlap: each token is predicted exactly once, from the tokens before it in
its window (the first one from the last token of the window before; the very first one from the end-of-text token,
after which documents begin). The last window is as short as it comes out.

- ``loss``: mean over these tokens, those that begin and end documents among them, of the negative log-probability, in
  nats.
- ``perplexity``: exp(loss).
- ``bits_per_byte``: the sum of the same, in bits, over the UTF-8 bytes of the documents. The end-of-text tokens add
  bits and no bytes: a model of text has to tell where it ends. Comparable between tokenizers; the loss is not.

Where ``max_iters`` stops early, the bytes are those of all documents times the share of the tokens that were read.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from litgpt import GPT
from rich.table import Table
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError, quoted
from litmoe.data import manifest
from litmoe.data.manifest import Manifest, Split
from litmoe.data.module import checked_manifest
from litmoe.data.reader import token_chunks
from litmoe.evaluation.common import Precision, as_table, load_model, with_progress

_LOGITS = 1 << 28  # at once, in fp32 1 GiB: decides the batch size


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, and on what."""

    checkpoint: str
    step: int
    data_dir: str
    same_data: bool | None
    """Whether this is the text that the checkpoint was trained beside; None where the checkpoint does not say."""
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Predicted tokens."""
    bytes: int
    """UTF-8 bytes of their text."""
    context: int
    """Tokens in a window."""
    windows: int
    device: str
    precision: str
    seconds: float


class ValidationText(NamedTuple):
    """The validation text of a prepared corpus, cut into batches for one checkpoint."""

    data_dir: Path
    same_data: bool | None
    """As in `Evaluation`"""
    split: Split
    context: int
    """Tokens in a window"""
    batches: Iterator[Tensor]
    """Token ids, each ``(B, T + 1)``: every token but a row's first is to be predicted. With a progress bar"""


def evaluate(
    folder: Path,
    data_dir: Path | None = None,
    *,
    max_iters: int | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Evaluation:
    """Evaluates a checkpoint on the validation text of a prepared corpus; a progress bar goes to stderr.

    Args:
        folder: the checkpoint.
        data_dir: the corpus; the one that the checkpoint was trained on when None.
        max_iters: batches at most.
        batch_size: windows at once; when None as many as give 2^28 logits.
        max_seq_length: tokens in a window; when None as many as in training.
        device: as torch names it; "auto" is the GPU where there is one.
        precision: "auto" is bf16-mixed on a GPU that computes in it, else 32-true.

    Raises:
        UserError: no or a damaged checkpoint, no tokens, tokens of another tokenizer, a context longer than the
            model's, or a loss that is not a number.
    """
    text = open_validation(folder, data_dir, max_iters=max_iters, batch_size=batch_size, max_seq_length=max_seq_length)
    loaded = load_model(folder, device, precision, text.context)
    start = time.perf_counter()
    nats, tokens, n_windows = sum_loss(loaded.gpt, text.batches, loaded.autocast)
    loss = nats / tokens
    if not math.isfinite(loss):
        raise UserError(f"the loss of {folder} is {loss}: its training diverged. Use an earlier checkpoint.")
    n_bytes = round(text.split.bytes * tokens / text.split.tokens)
    return Evaluation(
        checkpoint=str(folder),
        step=checkpoints.read_mark(folder).step,
        data_dir=str(text.data_dir),
        same_data=text.same_data,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / n_bytes,
        tokens=tokens,
        bytes=n_bytes,
        context=text.context,
        windows=n_windows,
        device=loaded.device,
        precision=loaded.precision,
        seconds=time.perf_counter() - start,
    )


def open_validation(
    folder: Path, data_dir: Path | None, *, max_iters: int | None, batch_size: int | None, max_seq_length: int | None
) -> ValidationText:
    """The validation text for a checkpoint; arguments and errors as `evaluate`."""
    mark = checkpoints.read_mark(folder)
    config = checkpoints.load_config(folder)
    settings = checkpoints.load_hyperparameters(folder)
    data_dir = trained_on(settings, folder) if data_dir is None else data_dir
    found = checked_manifest(data_dir)
    _check_tokenizer(folder, mark, found, data_dir, config.padded_vocab_size)
    context = checkpoints.context_of(folder, max_seq_length)
    batch_size = batch_size or min(64, max(1, _LOGITS // (context * config.padded_vocab_size)))
    split = found.splits["val"]
    total = -(-split.tokens // (context * batch_size))
    batches = batched(windows(read_tokens(data_dir, "val"), context, found.tokenizer.eos_id), batch_size)
    shown = with_progress(islice(batches, max_iters), min(total, max_iters or total))
    return ValidationText(data_dir, _same_data(folder, mark, found), split, context, shown)


def table(result: Evaluation) -> Table:
    """The result for people."""
    rows = {
        "checkpoint": f"{result.checkpoint}, step {result.step:,}",
        "text": f"{result.data_dir}, validation",
        "loss": f"{result.loss:.4f} nats per token",
        "perplexity": f"{result.perplexity:,.3f}",
        "bits per byte": f"{result.bits_per_byte:.4f}",
        "tokens": f"{result.tokens:,} ({result.bytes:,} bytes of text)",
        "windows": f"{result.windows:,} of {result.context:,} tokens, not overlapping",
        "computed": f"on {result.device} in {result.precision}, {result.tokens / result.seconds:,.0f} tokens/s",
    }
    if result.same_data is False:
        rows["note"] = "not the text that this checkpoint was trained beside"
    return as_table(rows)


# ---------------------------------------------------------------------------------------------------------------- loss


@torch.inference_mode()
def sum_loss(gpt: GPT, batches: Iterable[Tensor], autocast: Any = None) -> tuple[float, int, int]:
    """The summed negative log-probability of each token of each row but the row's first.

    Args:
        batches: token ids, each ``(B, T + 1)``.
        autocast: the context of the forward passes.

    Returns:
        The sum in nats, the number of predicted tokens, and the number of rows.
    """
    device = gpt.transformer.wte.weight.device
    nats, tokens, rows = torch.zeros((), dtype=torch.float64), 0, 0
    for batch in batches:
        ids = batch.to(device)
        with autocast or nullcontext():
            logits = gpt(ids[:, :-1])  # (B, T, V)
        targets = ids[:, 1:].flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        nats += losses.double().sum().cpu()  # in fp32 the sum over a large corpus would lose digits
        tokens += targets.numel()
        rows += ids.size(0)
    return nats.item(), tokens, rows


# -------------------------------------------------------------------------------------------------------------- tokens


def read_tokens(data_dir: Path, split: str) -> Iterator[Tensor]:
    """All tokens of a split in the order of the text, one tensor ``(n,)`` a chunk.

    The windows of training leave out what fills none at the end of a chunk; here it counts.
    """
    for chunk in token_chunks(data_dir, split):
        yield torch.from_numpy(chunk.open().astype(np.int64))


def windows(chunks: Iterable[Tensor], context: int, first: int) -> Iterator[Tensor]:
    """Cuts a text into windows in which each token is a target exactly once.

    Args:
        chunks: the text's tokens, ``(n,)`` each.
        context: tokens to predict in a window.
        first: what stands before the text.

    Yields:
        ``(context + 1,)``: the last token of the window before, then the tokens to predict; the last one is shorter.
    """
    waiting = torch.tensor([first])
    for chunk in chunks:
        waiting = torch.cat((waiting, chunk))
        count = (waiting.numel() - 1) // context
        for index in range(count):
            yield waiting[index * context : (index + 1) * context + 1]
        waiting = waiting[count * context :]
    if waiting.numel() > 1:
        yield waiting


def batched(rows: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stacks up to ``batch_size`` rows of the same length: ``(B, T + 1)``."""
    waiting: list[Tensor] = []
    for row in rows:
        if waiting and (len(waiting) == batch_size or row.numel() != waiting[0].numel()):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield torch.stack(waiting)


# -------------------------------------------------------------------------------------------------------------- checks


def trained_on(settings: dict[str, Any], folder: Path) -> Path:
    """The corpus that a run's settings name.

    Raises:
        UserError: they name none, or it is not there.
    """
    data = settings.get("data")
    paths = data.get("init_args", data) if isinstance(data, dict) else {}
    if not isinstance(paths, dict) or not paths.get("val_data_path"):
        raise UserError(f"{folder} does not say what it was trained on; name a prepared corpus with --data_dir.")
    data_dir = Path(paths["val_data_path"]).parent
    if not data_dir.is_dir():
        raise UserError(
            f"{folder} was trained on {data_dir}, which is not there (seen from {Path.cwd()}); "
            "name a prepared corpus with --data_dir."
        )
    return data_dir


def _check_tokenizer(
    folder: Path, mark: checkpoints.CheckpointMark, found: Manifest, data_dir: Path, vocabulary: int
) -> None:
    theirs = _trained_manifest(folder, mark)
    if "tokenizer.json" in mark.files:
        checkpoints.verify(folder, mark.files.keys() & set(checkpoints.TOKENIZER_FILES))
        sha256 = manifest.tokenizer_fingerprint(folder)
    else:
        sha256 = theirs.tokenizer.sha256 if theirs else found.tokenizer.sha256
    if sha256 != found.tokenizer.sha256:
        raise UserError(
            f"the tokens of {data_dir} were made by another tokenizer ({found.tokenizer.name}, "
            f"{found.tokenizer.vocab_size:,} tokens) than the one of {folder}. Prepare the text with it: "
            f"`uv run python prepare_data.py --source {quoted(data_dir)} --tokenizer {quoted(folder)} --data_dir "
            "ANOTHER_FOLDER --tokenizer_dir ANOTHER_FOLDER`, then --data_dir ANOTHER_FOLDER here."
        )
    if found.tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"the tokens of {data_dir} have ids up to {found.tokenizer.vocab_size - 1:,}; the model of {folder} knows "
            f"{vocabulary:,}. Name a corpus of its tokenizer with --data_dir."
        )


def _trained_manifest(folder: Path, mark: checkpoints.CheckpointMark) -> Manifest | None:
    if checkpoints.MANIFEST not in mark.files:
        return None
    checkpoints.verify(folder, [checkpoints.MANIFEST])
    return manifest.read_file(folder / checkpoints.MANIFEST)


def _same_data(folder: Path, mark: checkpoints.CheckpointMark, found: Manifest) -> bool | None:
    theirs = _trained_manifest(folder, mark)
    return None if theirs is None else theirs.source.sha256 == found.source.sha256
