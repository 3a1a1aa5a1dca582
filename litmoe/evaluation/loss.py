"""How well a checkpoint predicts text: loss, perplexity and bits per byte of the complete validation text.

All documents are one long token sequence, each followed by the end-of-text token (and preceded by the begin-of-text
token, if the tokenizer uses one). The sequence is cut into windows of the context length that do not overlap, so each
token is predicted once, from the tokens before it in its window. The first token of a window is predicted from the last
token of the previous window, and the very first one from the end-of-text token. The last window may be shorter.

- ``loss``: mean negative log-probability in nats per token, including the tokens that begin and end documents.
- ``perplexity``: exp(loss).
- ``bits_per_byte``: the sum of the same in bits, divided by the UTF-8 bytes of the documents. It can be compared
  between tokenizers; the loss can't.

With ``document_masking`` a token sees only the tokens of its own document in its window, as in a training with it.

With ``max_iters``, the bytes are those of all documents times the share of the tokens that were read.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from litgpt import GPT
from rich.table import Table
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError, quoted
from litmoe.data import manifest
from litmoe.data.loader import token_chunks
from litmoe.data.manifest import Manifest, Split, checked_manifest
from litmoe.documents import number_documents
from litmoe.evaluation.common import ModelOptions, Result, as_table, load_model, with_progress
from litmoe.inference.generate import check_finite
from litmoe.layers import hidden_states, logits_of, mask_for

_LOGITS = 1 << 28  # logits of a batch, 1 GiB in fp32: decides the batch size


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Loss of a checkpoint on a validation text."""

    data_dir: str
    same_data: bool | None  # whether the text belongs to the training data of the checkpoint; None if unknown
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    context: int  # tokens in a window
    windows: int
    document_masking: bool
    seconds: float


class ValidationText(NamedTuple):
    """The validation text of a prepared corpus, in batches for one checkpoint."""

    data_dir: Path
    same_data: bool | None
    split: Split
    context: int
    document_end: int | None  # the token that ends a document, for attention within documents
    # Token ids, each ``(B, T + 1)``, with a progress bar. All but the first token of a row are to be predicted.
    batches: Iterator[Tensor]


def evaluate(
    folder: Path,
    data_dir: Path | None = None,
    *,
    max_iters: int | None = None,
    batch_size: int | None = None,
    document_masking: bool | None = None,
    **options: Unpack[ModelOptions],
) -> Evaluation:
    """Evaluate a checkpoint on the validation text of a prepared corpus and show a progress bar on stderr.

    Args:
        folder: checkpoint folder.
        data_dir: prepared corpus; the one of training if None.
        max_iters: maximum number of batches.
        batch_size: windows in a batch; as many as give 2^28 logits if None.
        document_masking: whether tokens attend only to their own document; as in training if None.
        options: see `load_model`; ``max_seq_length`` is the number of tokens in a window.

    Raises:
        UserError: the checkpoint is missing or damaged, there are no tokens, they were made by another tokenizer, the
            context is longer than that of the model, or the loss is not finite.
    """
    text = open_validation(folder, data_dir, max_iters, batch_size, options.get("max_seq_length"))
    if document_masking is None:
        document_masking = bool(checkpoints.setting(checkpoints.load_hyperparameters(folder), "document_masking"))
    model = load_model(folder, **options)
    start = time.perf_counter()
    with model.autocast:
        nats, tokens, n_windows = sum_loss(model.gpt, text.batches, text.document_end if document_masking else None)
    check_finite(torch.tensor(nats))
    loss = nats / tokens
    # All bytes, or with max_iters the share of the tokens that were read.
    n_bytes = round(text.split.bytes * tokens / text.split.tokens)
    return Evaluation(
        **model.about,
        data_dir=str(text.data_dir),
        same_data=text.same_data,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp(710) overflows
        bits_per_byte=nats / math.log(2) / n_bytes,
        tokens=tokens,
        bytes=n_bytes,
        context=text.context,
        windows=n_windows,
        document_masking=document_masking,
        seconds=time.perf_counter() - start,
    )


def open_validation(
    folder: Path, data_dir: Path | None, max_iters: int | None, batch_size: int | None, max_seq_length: int | None
) -> ValidationText:
    """Open the validation text for a checkpoint; arguments and errors as `evaluate`."""
    metadata = checkpoints.read_metadata(folder)
    vocab_size = checkpoints.load_config(folder).padded_vocab_size
    if data_dir is None:
        data_dir = trained_on(checkpoints.load_hyperparameters(folder), folder)
    data = checked_manifest(data_dir)
    training_data = _training_manifest(folder, metadata)
    _check_tokenizer(folder, metadata, training_data, data, data_dir, vocab_size)
    # The manifest of a corpus has a hash of its source, so it identifies the text.
    same_data = None
    if training_data is not None:
        same_data = training_data.source.sha256 == data.source.sha256
    context = checkpoints.context_of(folder, max_seq_length)
    # The logits need most of the memory: more than the activations of a model in evaluation.
    if batch_size is None:
        batch_size = min(64, max(1, _LOGITS // (context * vocab_size)))
    split = data.splits["val"]
    n_batches = math.ceil(split.tokens / (context * batch_size))
    if max_iters is not None:
        n_batches = min(n_batches, max_iters)
    batches = batched(windows(read_tokens(data_dir, "val"), context, data.tokenizer.eos_id), batch_size)
    batches = with_progress(islice(batches, max_iters), n_batches)
    return ValidationText(data_dir, same_data, split, context, data.tokenizer.eos_id, batches)


def table(result: Evaluation) -> Table:
    """Return the result as a table for the terminal."""
    rows = {
        "text": f"{result.data_dir}, validation",
        "loss": f"{result.loss:.4f} nats per token",
        "perplexity": f"{result.perplexity:,.3f}",
        "bits per byte": f"{result.bits_per_byte:.4f}",
        "tokens": f"{result.tokens:,} ({result.bytes:,} bytes of text)",
        "windows": f"{result.windows:,} of {result.context:,} tokens, not overlapping",
    }
    if result.document_masking:
        rows["windows"] += ", each document by itself"
    if result.same_data is False:
        rows["note"] = "this checkpoint was trained on other data"
    return as_table(result, rows, f", {result.tokens / result.seconds:,.0f} tokens/s")


# ---------------------------------------------------------------------------------------------------------------- loss


@torch.inference_mode()
def sum_loss(gpt: GPT, batches: Iterable[Tensor], document_end: int | None = None) -> tuple[float, int, int]:
    """Sum the negative log-probability of all tokens but the first one of each row.

    Args:
        gpt: model.
        batches: token ids, each ``(B, T + 1)``.
        document_end: the token that ends a document, for attention within documents; None: to all tokens before.

    Returns:
        The sum in nats, the number of predicted tokens, and the number of rows.
    """
    device = gpt.transformer.wte.weight.device
    # In fp32, the sum over a large corpus would lose digits.
    nats = torch.zeros((), dtype=torch.float64)
    tokens, rows = 0, 0
    for batch in batches:
        ids = batch.to(device)
        inputs = ids[:, :-1]
        mask = None if document_end is None else mask_for(gpt, number_documents(inputs, document_end))
        logits_BTV = logits_of(gpt, hidden_states(gpt, inputs, mask=mask)[0])
        targets = ids[:, 1:].flatten()
        losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets, reduction="none")
        nats += losses.cpu().double().sum()
        tokens += targets.numel()
        rows += ids.size(0)
    return nats.item(), tokens, rows


# -------------------------------------------------------------------------------------------------------------- tokens


def read_tokens(data_dir: Path, split: str) -> Iterator[Tensor]:
    """Yield all tokens of a split in the order of the text, one tensor ``(n,)`` for each chunk.

    Unlike in training, tokens at the end of a chunk that do not fill a window are included.
    """
    for chunk in token_chunks(data_dir, split):
        yield torch.from_numpy(chunk.open().astype(np.int64))


def windows(chunks: Iterable[Tensor], context: int, first: int) -> Iterator[Tensor]:
    """Cut a text into windows, so that each token is predicted once.

    Args:
        chunks: tokens of the text, ``(n,)`` each.
        context: tokens to predict in a window.
        first: token before the text.

    Yields:
        ``(context + 1,)``: the last token of the previous window, then the tokens to predict. The last one is shorter.
    """
    # The first token of the text is predicted as well, from the token that ends a document.
    remaining = torch.tensor([first])
    for chunk in chunks:
        remaining = torch.cat((remaining, chunk))
        # Neighbouring windows share one token: it is predicted in one and read in the next.
        count = (remaining.numel() - 1) // context
        for index in range(count):
            yield remaining[index * context : (index + 1) * context + 1]
        # What fills no window continues in the next chunk. It begins with the token that was predicted last.
        remaining = remaining[count * context :]
    if remaining.numel() > 1:
        yield remaining


def batched(rows: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stack up to ``batch_size`` rows of the same length: ``(B, T + 1)``."""
    waiting: list[Tensor] = []
    for row in rows:
        is_full = len(waiting) == batch_size
        # The last window of the text is shorter, so it gets a batch of its own.
        if waiting and (is_full or row.numel() != waiting[0].numel()):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield torch.stack(waiting)


# -------------------------------------------------------------------------------------------------------------- checks


def trained_on(settings: dict[str, Any], folder: Path) -> Path:
    """Return the corpus that the settings of a run name.

    Raises:
        UserError: they name none, or it does not exist.
    """
    path = checkpoints.setting(settings, "data.init_args.val_data_path")
    path = path or checkpoints.setting(settings, "data.val_data_path")
    if not path:
        raise UserError(f"{folder} does not name its training data. Name a prepared corpus with --data_dir.")
    data_dir = Path(path).parent
    if not data_dir.is_dir():
        raise UserError(
            f"{folder} was trained on {data_dir}, which does not exist (relative to {Path.cwd()}). Name a prepared"
            " corpus with --data_dir."
        )
    return data_dir


def _training_manifest(folder: Path, metadata: checkpoints.CheckpointMetadata) -> Manifest | None:
    """Return the manifest of the training data, which a checkpoint of 0.1.0 or of another program may lack."""
    if checkpoints.MANIFEST not in metadata.files:
        return None
    checkpoints.verify(folder, [checkpoints.MANIFEST])
    return manifest.read_file(folder / checkpoints.MANIFEST)


def _check_tokenizer(
    folder: Path,
    metadata: checkpoints.CheckpointMetadata,
    training_data: Manifest | None,
    data: Manifest,
    data_dir: Path,
    vocab_size: int,
) -> None:
    """Raise UserError if the tokens were made by another tokenizer than that of the checkpoint."""
    tokenizer = data.tokenizer
    if "tokenizer.json" in metadata.files:
        # A damaged file would look like another tokenizer.
        checkpoints.verify(folder, metadata.files.keys() & set(checkpoints.TOKENIZER_FILES))
        sha256 = manifest.tokenizer_fingerprint(folder)
    elif training_data is not None:
        sha256 = training_data.tokenizer.sha256
    else:
        # There is nothing to compare with.
        sha256 = tokenizer.sha256
    if sha256 != tokenizer.sha256:
        raise UserError(
            f"the tokens of {data_dir} were made by another tokenizer ({tokenizer.name}, {tokenizer.vocab_size:,}"
            f" tokens) than the one of {folder}. Prepare the text again with: `uv run python prepare_data.py --source"
            f" {quoted(data_dir)} --tokenizer {quoted(folder)} --data_dir ANOTHER_FOLDER --tokenizer_dir"
            " ANOTHER_FOLDER`, then use --data_dir ANOTHER_FOLDER here."
        )
    # Such ids would be an error without an explanation in the embedding, on a GPU an assertion in a kernel.
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokens of {data_dir} have ids up to {tokenizer.vocab_size - 1:,}, but the vocabulary of {folder} has"
            f" {vocab_size:,} tokens. Name a corpus of its tokenizer with --data_dir."
        )
