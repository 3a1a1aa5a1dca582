"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings does the model find most probable?

The protocol is task ``hellaswag`` of EleutherAI's lm-evaluation-harness without examples. Its own code prepares the
texts, and the endings are scored as for every other task (`litmoe.evaluation.common`):

- Context, a space and ending are tokenized together. The tokens after those of the context are the ending.
- ``acc``: share of questions in which the correct ending has the highest log-probability, summed over its tokens.
- ``acc_norm``: the same with the sum divided by the number of characters of the ending, without the space before it.
- A context that does not fit is cut from the left.

llm.c and build-nanogpt use another protocol (the sum divided by the number of tokens, texts unchanged): GPT-2 124M has
28.9 / 31.1 by lm-eval and 28.6 / 29.6 by llm.c. Numbers of different protocols can't be compared.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from litgpt import GPT, Config, Tokenizer
from rich.table import Table
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.files import in_short
from litmoe.data.tokenizers import text_ids
from litmoe.evaluation.common import (
    Continuation,
    ModelOptions,
    Result,
    as_table,
    batches_by_length,
    load_model,
    make_continuation,
    score_batches,
    with_progress,
)

PROTOCOL = "lm-eval, 0-shot"
ENDINGS = 4

# Small, because the evaluation may run during a training that needs most of the memory.
_BATCH_TOKENS = 1 << 12
_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_EXPECTED = (
    "expected the validation set of HellaSwag: a file in its JSONL (hellaswag_val.jsonl from"
    " github.com/rowanz/hellaswag), or Rowan/hellaswag from the Hugging Face Hub."
)


class Question(NamedTuple):
    """A question as lm-eval prepares it."""

    context: str
    endings: list[str]
    label: int  # index of the correct ending


class Encoded(NamedTuple):
    """Questions prepared for one model and one context length."""

    questions: list[Question]
    rows: list[Continuation]  # four for each question, in order
    batches: list[list[int]]  # indices of rows


@dataclass(frozen=True)
class HellaSwag:
    """Accuracies with their standard errors, None for a single question."""

    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    questions: int
    protocol: str = PROTOCOL


@dataclass(frozen=True, kw_only=True)
class HellaSwagEvaluation(HellaSwag, Result):
    """Accuracies of a checkpoint."""

    source: str
    context: int
    seconds: float


def evaluate(
    folder: Path,
    source: str,
    *,
    limit: int | None = None,
    **options: Unpack[ModelOptions],
) -> HellaSwagEvaluation:
    """Score a checkpoint and show a progress bar on stderr.

    ``source`` and ``limit`` as `read_questions`, the other arguments as `litmoe.evaluation.loss.evaluate`.

    Raises:
        UserError: the checkpoint or the questions can't be read, the questions do not fit the context, or the output of
            the model is not finite.
    """
    context = checkpoints.context_of(folder, options.get("max_seq_length"))
    # Read and tokenize the questions first. The model needs more time, and a wrong file is a common mistake.
    questions = read_questions(source, limit)
    encoded = encode(questions, checkpoints.load_tokenizer(folder), checkpoints.load_config(folder), context)
    model = load_model(folder, **options)
    start = time.perf_counter()
    with model.autocast:
        scores = log_probabilities(model.gpt, with_progress(encoded.batches, len(encoded.batches)), encoded)
    return HellaSwagEvaluation(
        **vars(accuracy(questions, scores)),
        **model.about,
        source=source,
        context=context,
        seconds=time.perf_counter() - start,
    )


def table(result: HellaSwagEvaluation) -> Table:
    """Return the result as a table for the terminal."""

    def with_error(value: float, error: float | None) -> str:
        return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"

    rows = {
        "HellaSwag": f"{result.source}, {result.questions:,} questions",
        "protocol": result.protocol,
        "acc": with_error(result.acc, result.acc_stderr),
        "acc_norm": with_error(result.acc_norm, result.acc_norm_stderr),
    }
    return as_table(result, rows, f", {result.seconds:,.1f} s")


# ----------------------------------------------------------------------------------------------------------- questions


def read_questions(source: str, limit: int | None = None) -> list[Question]:
    """Read questions from a JSONL file, or from the validation split of a dataset on the Hugging Face Hub.

    Args:
        source: path, or name on the Hub such as ``Rowan/hellaswag``. An existing file is preferred.
        limit: read only the first questions.

    Raises:
        UserError: the source can't be read, or contains something else.
    """
    path = Path(source)
    rows: Iterable[Any]
    if path.is_file():
        rows = _read_jsonl(path)
    elif path.suffix in (".json", ".jsonl"):
        raise UserError(f"found no file {source}; {_EXPECTED}")
    else:
        rows = _read_hub(source)
    try:
        questions = _prepare(list(islice(rows, limit)))
    except Exception as error:  # KeyError, TypeError, ValueError or an error of pyarrow, depending on the field
        raise UserError(f"{source} does not contain HellaSwag questions ({in_short(error)}); {_EXPECTED}") from None
    if not questions:
        raise UserError(f"{source} contains no questions; {_EXPECTED}")
    return questions


def _read_jsonl(path: Path) -> list[Any]:
    try:
        # Not splitlines(): JSON strings may contain other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not a JSONL file in UTF-8 ({in_short(error)}); {_EXPECTED}") from None


def _read_hub(name: str) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(name, split="validation")
    except Exception as error:  # of datasets, of the client of the Hub, or of the connection
        raise UserError(
            f"{name} is not a file, and could not be loaded from the Hugging Face Hub ({in_short(error)}); {_EXPECTED}"
        ) from None


def _prepare(rows: list[dict[str, Any]]) -> list[Question]:
    # Imported here, because training reads this module and both packages take seconds.
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs

    if not rows:
        return []
    # The original file has numbers as labels, the Hub texts; a column has one type.
    columns = [{name: row[name] for name in _FIELDS} | {"label": str(row["label"])} for row in rows]
    datasets.disable_progress_bars()
    documents = process_docs(datasets.Dataset.from_list(columns))
    questions = [Question(document["query"], document["choices"], document["gold"]) for document in documents]
    _check_endings(questions)
    return questions


def _check_endings(questions: list[Question]) -> None:
    for number, question in enumerate(questions, start=1):
        # `log_probabilities` needs the same number of endings for all questions.
        if len(question.endings) != ENDINGS or question.label not in range(ENDINGS):
            raise ValueError(f"question {number:,} has {len(question.endings)} endings and label {question.label}")


# -------------------------------------------------------------------------------------------------------------- tokens


def encode(questions: Sequence[Question], tokenizer: Tokenizer, config: Config, max_length: int) -> Encoded:
    """Tokenize questions and group their endings into batches.

    Args:
        questions: from `read_questions`.
        tokenizer: of the model.
        config: of the model.
        max_length: tokens that the model can read.

    Raises:
        UserError: an ending does not fit, or the tokenizer is not the one of the model.
    """
    rows = []
    for number, question in enumerate(questions, start=1):
        context, endings = encode_question(question, tokenizer)
        for text, ids in zip(question.endings, endings, strict=True):
            name = f"the ending {text!r} of HellaSwag question {number:,}"
            rows.append(make_continuation(context, ids, max_length, name=name, block_size=config.block_size))
    # On a GPU, an id outside the vocabulary would be an assertion in a kernel, without a useful message.
    largest = max(max(row.ids) for row in rows)
    if largest >= config.padded_vocab_size:
        raise UserError(
            f"the tokenizer gives the id {largest:,}, but the vocabulary of the model has"
            f" {config.padded_vocab_size:,} tokens. Use the tokenizer of the model."
        )
    return Encoded(list(questions), rows, batches_by_length(rows, _BATCH_TOKENS))


def encode_question(question: Question, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of the context and of each ending, as ``TemplateLM._encode_pair`` of lm-eval does."""
    # lm-eval moves spaces at the end of a context to the ending.
    context = text_ids(tokenizer, question.context.rstrip())
    endings = [text_ids(tokenizer, f"{question.context} {ending}")[len(context) :] for ending in question.endings]
    # The first token of an ending needs a token before it.
    if not context:
        context = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    return context, endings


# ------------------------------------------------------------------------------------------------------------- scoring


def log_probabilities(gpt: GPT, batches: Iterable[list[int]], encoded: Encoded) -> Tensor:
    """Return the log-probability of each ending after its context.

    Args:
        gpt: plain model, in training or not. It is not changed.
        batches: those of ``encoded``, or the share of one rank.
        encoded: from `encode`.

    Returns:
        ``(questions, 4)`` in nats; 0 for endings that are in none of the batches, so that the shares of several ranks
        can be added.
    """
    scores = torch.zeros(len(encoded.rows), dtype=torch.float64)
    # Batches are by length; the scores return to the order of the questions.
    for index, score in score_batches(gpt, encoded.rows, batches):
        scores[index] = score.log_probability
    return scores.view(-1, ENDINGS)


def accuracy(questions: Sequence[Question], scores: Tensor) -> HellaSwag:
    """Count correct answers.

    Args:
        questions: from `read_questions`.
        scores: ``(questions, 4)`` from `log_probabilities`, summed over the ranks.
    """
    labels = torch.tensor([question.label for question in questions])
    lengths = torch.tensor([[len(text) for text in question.endings] for question in questions], dtype=torch.float64)
    acc, acc_stderr = _mean_and_error(scores.argmax(dim=1) == labels)
    # An ending without text has length 0, hence the score -inf: acc_norm never chooses it.
    acc_norm, acc_norm_stderr = _mean_and_error((scores / lengths).argmax(dim=1) == labels)
    return HellaSwag(acc, acc_stderr, acc_norm, acc_norm_stderr, questions=len(questions))


def _mean_and_error(hits: Tensor) -> tuple[float, float | None]:
    hits = hits.double()
    if len(hits) == 1:
        # One question has no standard deviation.
        return hits.item(), None
    return hits.mean().item(), hits.std().item() / math.sqrt(len(hits))
