"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings does a model find likeliest?

What is counted. The protocol is that of EleutherAI's lm-evaluation-harness, task ``hellaswag``, without examples:

- texts: the context is ``activity_label: ctx_a Ctx_b``; it and the endings lose ``[title]`` and other brackets.
- tokens: context, a space and ending are tokenized together; what follows the context's own tokens is the ending's.
- ``acc``: how often the right ending has the highest log-probability, summed over its tokens.
- ``acc_norm``: the same with the sum divided by the characters of the ending, without the space before it.
- A context that does not fit is cut from the left. An ending without text is the space alone; its length is 0, so that
  acc_norm never chooses it.

llm.c and build-nanogpt count otherwise (the sum divided by tokens, texts as they are) and get other numbers: GPT-2 124M
has 28.9 / 31.1 by lm-eval and 28.6 / 29.6 by llm.c. Numbers of different protocols do not compare.

It is quick because a context is computed once: a row of a batch holds the context and its four endings side by side,
each with positions that go on from the context and a mask by which it sees the context and itself alone.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from litgpt import GPT, Config, Tokenizer
from rich.table import Table
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.documents import writable
from litmoe.data.files import in_short
from litmoe.data.tokenizers import text_ids
from litmoe.evaluation.common import Precision, as_table, load_model, with_progress
from litmoe.forward import hidden_states, logits_of

PROTOCOL = "lm-eval, 0-shot"
ENDINGS = 4

_TOKENS = 1 << 12  # in a batch, padding counted; small, because it may run beside a training
_LOGITS = 1 << 26  # at once, in fp32 256 MiB

_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_EXPECTED = (
    "expected HellaSwag's validation set: the original hellaswag_val.jsonl (github.com/rowanz/hellaswag), or"
    " Rowan/hellaswag from the Hub."
)


@dataclass(frozen=True)
class Question:
    """A context and its endings as lm-eval writes them."""

    context: str
    endings: tuple[str, ...]
    label: int
    """The right ending's place"""


class Row(NamedTuple):
    """A line of a batch: a context and some or all of its endings."""

    question: int
    context: list[int]
    """Token ids"""
    endings: list[tuple[int, list[int]]]
    """Place among the four, token ids"""

    def __len__(self) -> int:
        # An ending's last token is only predicted.
        return len(self.context) + sum(len(ids) - 1 for _, ids in self.endings)


@dataclass(frozen=True)
class Encoded:
    """Questions made ready for one model and one context length."""

    questions: list[Question]
    batches: list[list[Row]]


@dataclass(frozen=True)
class HellaSwag:
    """A score."""

    acc: float
    acc_stderr: float | None
    """As lm-eval gives it; None for a single question"""
    acc_norm: float
    acc_norm_stderr: float | None
    questions: int
    protocol: str = PROTOCOL


@dataclass(frozen=True, kw_only=True)
class HellaSwagEvaluation(HellaSwag):
    """The score of a checkpoint."""

    checkpoint: str
    step: int
    source: str
    """Where the questions came from"""
    context: int
    """Tokens that the model was given at most"""
    device: str
    precision: str
    seconds: float


def evaluate(
    folder: Path,
    source: str,
    *,
    limit: int | None = None,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> HellaSwagEvaluation:
    """Scores a checkpoint; a progress bar goes to stderr.

    Args:
        folder: the checkpoint.
        source, limit: as in `read_questions`.
        max_seq_length: tokens of context and ending at most; as many as in training when None.
        device, precision: as in `litmoe.evaluation.common.load_model`.

    Raises:
        UserError: no or a damaged checkpoint, bad questions, a context longer than the model's, or a model whose
            output is not a number.
    """
    mark = checkpoints.read_mark(folder)
    config = checkpoints.load_config(folder)
    context = checkpoints.context_of(folder, max_seq_length)
    encoded = encode(read_questions(source, limit), checkpoints.load_tokenizer(folder), config, context)
    loaded = load_model(folder, device, precision, context)
    start = time.perf_counter()
    with loaded.autocast:
        scores = log_probabilities(loaded.gpt, with_progress(encoded.batches, len(encoded.batches)), encoded)
    score = accuracy(encoded.questions, scores)
    return HellaSwagEvaluation(
        **vars(score),
        checkpoint=str(folder),
        step=mark.step,
        source=source,
        context=context,
        device=loaded.device,
        precision=loaded.precision,
        seconds=time.perf_counter() - start,
    )


def table(result: HellaSwagEvaluation) -> Table:
    """The result for people."""

    def shown(value: float, error: float | None) -> str:
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")

    return as_table(
        {
            "checkpoint": f"{result.checkpoint}, step {result.step:,}",
            "HellaSwag": f"{result.source}, {result.questions:,} questions",
            "protocol": result.protocol,
            "acc": shown(result.acc, result.acc_stderr),
            "acc_norm": shown(result.acc_norm, result.acc_norm_stderr),
            "computed": f"on {result.device} in {result.precision}, {result.seconds:,.1f} s",
        }
    )


# ----------------------------------------------------------------------------------------------------------- questions


def read_questions(source: str, limit: int | None = None) -> list[Question]:
    """The questions of a file in the original JSONL, else of a dataset on the Hub (its validation split).

    Args:
        source: a path, or a name on the Hub such as ``Rowan/hellaswag``. A file that is there wins.
        limit: only the first so many.

    Raises:
        UserError: for a source that cannot be read, or that holds something else.
    """
    rows = _file_rows(Path(source)) if Path(source).is_file() else _hub_rows(source)
    questions = [_question(row, place) for place, row in islice(rows, limit)]
    if not questions:
        raise UserError(f"{source} holds no questions; {_EXPECTED}")
    return questions


def preprocess(text: str) -> str:
    """lm_eval/tasks/hellaswag/utils.py: without the marks of WikiHow's pages. In this order, flaws included."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _file_rows(path: Path) -> Iterable[tuple[str, Any]]:
    data = path.read_bytes()
    number = 0
    try:
        text = data.decode(json.detect_encoding(data))  # UTF-16 where a Windows shell wrote it
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number:,}", json.loads(line)
    except (ValueError, RecursionError) as error:  # not text, not JSON, a number too long, lists in lists in lists
        if isinstance(error, UnicodeDecodeError):
            number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is no file of JSON lines (line {number:,}: {in_short(error)}); {_EXPECTED}") from None


def _hub_rows(source: str) -> Iterable[tuple[str, Any]]:
    path = Path(source)
    like_a_file = path.suffix in (".json", ".jsonl") or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if like_a_file and not path.is_dir():
        raise UserError(f"no file {source}; {_EXPECTED}")
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    problem = ""
    if not path.is_dir():
        try:
            # One short question first: without a network `load_dataset` retries, and says something else in the end.
            huggingface_hub.HfApi().dataset_info(source, timeout=10)
        except Exception as error:  # the transport has many ways to say that there is no network
            problem = in_short(error)
    try:
        rows = datasets.load_dataset(source, split="validation")  # from the Hub's cache, too
    except Exception as error:
        raise UserError(
            f"{source} is no file here and cannot be had from the Hugging Face Hub ({problem or in_short(error)});"
            f" {_EXPECTED}"
        ) from None
    return _numbered_rows(source, rows)


def _numbered_rows(source: str, rows: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(rows):
            yield f"{source}, row {number:,}", row
    except UserError:
        raise
    except Exception as error:  # of pyarrow, for a text that is not UTF-8
        raise UserError(f"{source} can't be read after row {number:,} ({in_short(error)}); {_EXPECTED}") from None


def _question(row: Any, place: str) -> Question:
    missing = [name for name in _FIELDS if name not in row] if isinstance(row, dict) else list(_FIELDS)
    if missing:
        raise UserError(f"{place} has no {', '.join(missing)}; {_EXPECTED} The test set has no labels.")
    endings, label = row["endings"], str(row["label"])
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(isinstance(text, str) for text in endings):
        raise UserError(f"{place} has other endings than {ENDINGS} texts; {_EXPECTED}")
    if label not in map(str, range(ENDINGS)):
        raise UserError(f"{place} has label {label!r}, expected 0 to {ENDINGS - 1}; {_EXPECTED}")
    if not all(isinstance(row[name], str) for name in _FIELDS[:3]):
        raise UserError(f"{place} has {', '.join(_FIELDS[:3])} that are no texts; {_EXPECTED}")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    texts = [preprocess(writable(text)) for text in (context, *endings)]  # tokenizers take no half surrogate pair
    return Question(texts[0], tuple(texts[1:]), int(label))


# -------------------------------------------------------------------------------------------------------------- tokens


def encode(questions: Sequence[Question], tokenizer: Tokenizer, config: Config, max_length: int) -> Encoded:
    """Tokenizes questions and lays them into batches.

    Args:
        max_length: tokens that the model can read.

    Raises:
        UserError: an ending longer than that or without tokens, or ids that the model does not know.
    """
    rows: list[Row] = []
    for index, question in enumerate(questions):
        context, endings = encode_question(question, tokenizer)
        for text, ids in zip(question.endings, endings, strict=True):
            if not 1 <= len(ids) <= max_length:
                longest = config.block_size
                remedy = f" Give a longer --max-seq-length, up to {longest:,}." if len(ids) <= longest and ids else ""
                raise UserError(
                    f"the ending {text!r} of HellaSwag's question {index + 1:,} has {len(ids):,} tokens; expected 1 to"
                    f" {max_length:,}, the context.{remedy}"
                )
        if (largest := max(map(max, [context, *endings]))) >= (config.padded_vocab_size or 0):
            raise UserError(
                f"the tokenizer gives the id {largest:,}, but the model's vocabulary holds {config.padded_vocab_size:,}"
                " tokens: it is not the tokenizer of this model."
            )
        numbered, longest = list(enumerate(endings)), max(map(len, endings))
        if shares_context(config) and len(context) + longest <= max_length + 1:
            rows.append(Row(index, context, numbered))
        else:
            rows += [Row(index, context[-(max_length + 1 - len(ids)) :], [(place, ids)]) for place, ids in numbered]
    return Encoded(list(questions), make_batches(rows))


def encode_question(question: Question, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context and of each ending, as ``lm_eval.api.model.TemplateLM._encode_pair`` gives them."""
    context = text_ids(tokenizer, question.context.rstrip())
    endings = [text_ids(tokenizer, f"{question.context} {ending}")[len(context) :] for ending in question.endings]
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return context or [first], endings


def shares_context(config: Config) -> bool:
    """Whether LitGPT's attention takes our mask: a sliding window overwrites it, soft-capped scores only add it."""
    return config.sliding_window_size is None and config.attention_logit_softcapping is None


def make_batches(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of like length together, the longest first, so that too little memory shows at once."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= _TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def log_probabilities(gpt: GPT, batches: Iterable[list[Row]], encoded: Encoded) -> Tensor:
    """Log-probability of each ending after its context, ``(questions, 4)`` in nats; 0 where no batch holds it.

    Takes the plain `litgpt.GPT`, in training or not, and leaves it, its mode and every random state as they are.

    Args:
        batches: those of ``encoded``, or a process's share of them.
    """
    weight = gpt.transformer.wte.weight
    scores = torch.zeros(len(encoded.questions) * ENDINGS, dtype=torch.float64)
    for batch in batches:
        laid = _lay_out(batch, masked=shares_context(gpt.config), device=weight.device)
        x, _ = hidden_states(gpt, laid.tokens, laid.positions, laid.mask)
        x = x.flatten(0, 1)[laid.sources]  # (N, C)
        at_once = max(1, _LOGITS // weight.size(0))
        for part, targets, owners in zip(
            *(each.split(at_once) for each in (x, laid.targets, laid.owners)), strict=True
        ):
            nats = F.cross_entropy(logits_of(gpt, part).float(), targets, reduction="none")
            scores.index_add_(0, owners.cpu(), -nats.cpu().double())
    return scores.view(-1, ENDINGS)


def accuracy(questions: Sequence[Question], scores: Tensor) -> HellaSwag:
    """Counts right answers.

    Args:
        scores: what `log_probabilities` gives for the questions, its shares added up.

    Raises:
        UserError: the model's output was not a number.
    """
    if not scores.isfinite().all():
        raise UserError("the model's output is not a number: its training diverged. Use an earlier checkpoint.")
    labels = torch.tensor([question.label for question in questions])
    lengths = torch.tensor([[len(text) for text in question.endings] for question in questions], dtype=torch.float64)
    n = len(questions)

    def mean_and_error(scores: Tensor) -> tuple[float, float | None]:
        hits = (scores.argmax(dim=1) == labels).double()
        return hits.mean().item(), hits.std().item() / math.sqrt(n) if n > 1 else None

    # A length of 0 makes -inf.
    return HellaSwag(*mean_and_error(scores), *mean_and_error(scores / lengths), questions=n)


class _LaidOut(NamedTuple):
    """A batch as tensors."""

    tokens: Tensor
    """``(B, T)``"""
    positions: Tensor
    """``(B, T)``"""
    mask: Tensor | None
    """``(B, 1, T, T)``, True where a token sees another; None is causal"""
    sources: Tensor
    """``(N,)``: for each predicted token the place, among B*T, of the one before it"""
    targets: Tensor
    """``(N,)``: the predicted token"""
    owners: Tensor
    """``(N,)``: its ending, question * 4 + place"""


def _lay_out(batch: list[Row], *, masked: bool, device: torch.device) -> _LaidOut:
    width = max(map(len, batch))
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    segments = torch.full_like(tokens, -1)  # 0 the context, from 1 the endings, -1 padding
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for line, row in enumerate(batch):
        start = len(row.context)
        ids, places, parts = list(row.context), list(range(start)), [0] * start
        for place, ending in row.endings:
            # The context's last token predicts its first one.
            sources += [
                line * width + start - 1,
                *range(line * width + len(ids), line * width + len(ids) + len(ending) - 1),
            ]
            targets += ending
            owners += [row.question * ENDINGS + place] * len(ending)
            ids += ending[:-1]
            places += range(start, start + len(ending) - 1)
            parts += [place + 1] * (len(ending) - 1)
        for filled, values in ((tokens, ids), (positions, places), (segments, parts)):
            filled[line, : len(row)] = torch.tensor(values)
    mask = None
    if masked:
        segments = segments.to(device)
        by, of = segments.unsqueeze(2), segments.unsqueeze(1)  # who looks, at whom
        mask = ((by == of) | (of == 0)).tril().unsqueeze(1)
    listed = (torch.tensor(values, device=device) for values in (sources, targets, owners))
    return _LaidOut(tokens.to(device), positions.to(device), mask, *listed)
