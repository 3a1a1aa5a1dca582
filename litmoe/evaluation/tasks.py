"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval): its own by name, or those of a folder.

lm-eval asks the questions, and `Harness` answers them for a LitGPT model. The answers are those of lm-eval's ``HFLM``
for the same weights in transformers (a test compares both): context and continuation are tokenized together, a text
that does not fit is cut from the left, and a text without context starts after the begin- or end-of-text token. No chat
template is applied.
"""

import difflib
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from litgpt import GPT, Tokenizer
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Group
from rich.table import Table

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.files import in_short
from litmoe.data.tokenizers import text_ids
from litmoe.evaluation.common import (
    ModelOptions,
    Result,
    as_table,
    batches_by_length,
    load_model,
    make_continuation,
    score_batches,
    with_progress,
)
from litmoe.inference.generate import generate_tokens
from litmoe.inference.text_stream import TextStream

PROTOCOL = f"lm-eval {version('lm-eval')}"

_BATCH_TOKENS = 1 << 13
_SEED = 1234  # for tasks that sample


@dataclass(frozen=True)
class Score:
    """One line of the result."""

    task: str  # name of a task, or of a group with a mean of its own
    metric: str
    filter: str  # how lm-eval extracted the answer from the text; ``none`` for most tasks
    value: float
    stderr: float | None
    n: int | None  # number of questions; None for a group
    num_fewshot: int | None
    version: float | str | None


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation(Result):
    """Scores of a checkpoint."""

    scores: list[Score]
    protocol: str
    tasks_dir: str | None
    limit: int | None
    context: int
    seconds: float


def evaluate(
    folder: Path,
    names: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    **options: Unpack[ModelOptions],
) -> TaskEvaluation:
    """Score a checkpoint and show a progress bar on stderr. lm-eval seeds the random states of Python, numpy and torch.

    Args (others as `litmoe.evaluation.loss.evaluate`):
        names: tasks, groups or tags of lm-eval or of ``tasks_dir``.
        tasks_dir: folder of tasks in the YAML of lm-eval, which may name functions to run.
        limit: use only the first questions of each task.
        num_fewshot: examples before each question; the default of the task if None.

    Raises:
        UserError: the checkpoint can't be read; a task is unknown, can't be loaded or would run code that the model
            wrote; or the questions do not fit the context.
    """
    context = checkpoints.context_of(folder, options.get("max_seq_length"))
    tokenizer = checkpoints.load_tokenizer(folder)
    manager = find_tasks(names, tasks_dir)
    # Load the data before the model, because a missing network is a common problem.
    tasks = load_tasks(manager, names)
    model = load_model(folder, **options)
    start = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    results = evaluator.simple_evaluate(
        Harness(model.gpt, tokenizer, context, model.autocast),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        # The texts of all questions are no part of the result.
        log_samples=False,
    )
    return TaskEvaluation(
        **model.about,
        scores=scores_of(results),
        protocol=PROTOCOL,
        tasks_dir=None if tasks_dir is None else str(tasks_dir),
        limit=limit,
        context=context,
        seconds=time.perf_counter() - start,
    )


def table(result: TaskEvaluation) -> Group:
    """Return the result as tables for the terminal."""
    scores = Table("task", "metric", "value", "stderr", "questions", "examples")
    for score in result.scores:
        scores.add_row(
            score.task,
            score.metric if score.filter == "none" else f"{score.metric}, {score.filter}",
            f"{score.value:.4f}",
            _format("± {:.4f}", score.stderr),
            _format("{:,}", score.n),
            _format("{}", score.num_fewshot),
        )
    rows = {"protocol": result.protocol}
    if result.limit is not None:
        rows["note"] = f"only the first {result.limit:,} questions of each task: do not compare with published numbers"
    return Group(scores, as_table(result, rows, f", {result.seconds:,.1f} s"))


def _format(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)


# --------------------------------------------------------------------------------------------------------------- tasks


def find_tasks(names: Sequence[str], tasks_dir: Path | None) -> TaskManager:
    """Return lm-eval's index of tasks, including those of ``tasks_dir``.

    Raises:
        UserError: the folder or a task does not exist.
    """
    if tasks_dir is not None:
        if not tasks_dir.is_dir():
            raise UserError(f"found no folder {tasks_dir}; expected a folder of tasks in the YAML of lm-eval.")
        # lm-eval needs seconds to index its 14,000 tasks, so try the folder alone first.
        manager = TaskManager(include_path=tasks_dir, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=tasks_dir)
    for name in set(names) - set(manager.all_tasks):
        close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
        raise UserError(
            f"found no task {name!r} in lm-eval or --tasks_dir. Similar names: {', '.join(close) or 'none'}."
            " `uv run lm-eval ls tasks` lists all tasks."
        )
    return manager


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """Load tasks with their data.

    Raises:
        UserError: a task or its data can't be loaded, or the task would run code that the model wrote.
    """
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of lm-eval, of datasets, of the client of the Hub, or of the connection
        raise UserError(
            f"can't load {', '.join(names)} ({in_short(_first_cause(error))}). The data of lm-eval's tasks comes from"
            " the Hugging Face Hub, which needs a network or an earlier download in the cache. To use tasks with"
            " local data, name their folder with --tasks_dir."
        ) from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UserError(f"{', '.join(unsafe)} would run code that the model wrote, which is not allowed here.")
    # Loaded tasks are passed on. Groups are passed by name, because they need their own aggregation.
    return list(names) if loaded["groups"] else [*loaded["tasks"].values()]


def _first_cause(error: Exception) -> Exception:
    """Return the first error of a chain: without a network, the last one says something else."""
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    return error


def scores_of(results: Any) -> list[Score]:
    """Flatten the nested results of lm-eval."""
    scores = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            # Metrics have the key "metric,filter"; all other keys describe the task.
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) and stderr == stderr else None,  # "N/A" or NaN: None
                    n=results["n-samples"].get(task, {}).get("effective"),
                    num_fewshot=results["n-shot"].get(task),
                    version=results["versions"].get(task),
                )
            )
    return scores


# ------------------------------------------------------------------------------------------------------------- answers


class Harness(TemplateLM):
    """A LitGPT model with the interface that lm-eval expects of a model."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, max_length: int, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.gpt = gpt
        self.max_length = max_length
        # Not `tokenizer`, which in lm-eval is one of transformers.
        self._litgpt_tokenizer = tokenizer
        self._autocast = autocast
        self._device = gpt.lm_head.weight.device
        self._generator = torch.Generator(self._device).manual_seed(_SEED)

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-text token."""
        return int(self._litgpt_tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token that precedes a text without context."""
        bos_id = self._litgpt_tokenizer.bos_id
        return self.eot_token_id if bos_id is None else int(bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize, with a begin-of-text token if the tokenizer uses one and the text does not start with it."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._decode_token(self.prefix_token_id))
        return text_ids(self._litgpt_tokenizer, string, begin=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answer as lm-eval does, but without its progress bar for tokenizing."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> Any:
        rows, block_size = [], self.gpt.config.block_size
        for text, context, continuation in requests:
            # The windows of loglikelihood_rolling have no text.
            name = f"the answer {text and text[1]!r} of a task"
            rows.append(make_continuation(context, continuation, self.max_length, name=name, block_size=block_size))
        batches = batches_by_length(rows, _BATCH_TOKENS)
        with self._autocast:
            scores = dict(score_batches(self.gpt, rows, with_progress(batches, len(batches))))
        # Batches are by length, and answers in the order of the requests.
        return [scores[index] for index in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score complete texts in windows of the context, each token once and after as many tokens as fit."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            text_windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, text_windows):
                windows.append((None, context, continuation))
                owners.append(index)
        # A text may have several windows.
        totals = [0.0] * len(requests)
        for index, score in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += score.log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate after each context until a stop string, the end-of-text token or the requested length."""
        return [self._generate(*request.args) for request in with_progress(requests, len(requests))]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        wanted = _generation_settings(settings)
        if not 0 < wanted.max_new_tokens < self.max_length:
            raise UserError(
                f"a task asks for {wanted.max_new_tokens:,} new tokens (max_gen_toks), but the context has room for"
                f" {self.max_length:,} tokens in all. Use a longer --max_seq_length, or a smaller max_gen_toks in the"
                " generation_kwargs of the task."
            )
        room = self.max_length - wanted.max_new_tokens
        # A long context is cut from the left, as in HFLM.
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        # HFLM also stops where a text contains the text of the end-of-text token.
        stops = [*wanted.stops, self._decode_token(self.eot_token_id)]
        stream, text = TextStream(self._litgpt_tokenizer), ""
        with self._autocast:
            for token in generate_tokens(
                self.gpt,
                torch.tensor(prompt, device=self._device),
                max_new_tokens=wanted.max_new_tokens,
                temperature=wanted.temperature,
                top_k=wanted.top_k,
                top_p=wanted.top_p,
                eos_id=self.eot_token_id,
                generator=self._generator,
            ):
                # The end-of-text token has no text, so the stop strings below would not find it.
                if int(token) == self.eot_token_id:
                    break
                text += stream.push(int(token))
                # In the whole text, because a stop string can come from several tokens.
                if any(stop in text for stop in stops if stop):
                    break
        # Cuts the text before the first stop string.
        complete: str = postprocess_generated_text(text + stream.flush(), stop=stops, think_end_token=None)
        return complete

    def _decode_token(self, token: int) -> str:
        text: str = self._litgpt_tokenizer.processor.decode([token], skip_special_tokens=False)
        return text


class _GenerationSettings(NamedTuple):
    stops: list[str]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float


def _generation_settings(settings: dict[str, Any]) -> _GenerationSettings:
    """Read the ``generation_kwargs`` of a task, with the defaults of ``HFLM``.

    Raises:
        UserError: the task asks for something that is not implemented here.
    """
    values: dict[str, Any] = dict(normalize_gen_kwargs(settings, default_max_gen_toks=256))
    do_sample, temperature = values.pop("do_sample"), float(values.pop("temperature", 0.0))
    wanted = _GenerationSettings(
        stops=values.pop("until"),
        max_new_tokens=values.pop("max_gen_toks"),
        # transformers ignores the temperature without do_sample.
        temperature=temperature if do_sample else 0.0,
        # The default of transformers.
        top_k=values.pop("top_k", 50),
        top_p=float(values.pop("top_p", 1.0)),
    )
    # What is left over would silently change the meaning of the task.
    if values.pop("num_beams", 1) != 1 or values:
        raise UserError(
            f"a task has the generation_kwargs {settings}; supported are until, max_gen_toks, do_sample, temperature,"
            " top_k and top_p."
        )
    return wanted
