"""A checkpoint on the tasks of EleutherAI's lm-evaluation-harness: its own by name, or those of a folder.

The harness asks, `Harness` answers for a LitGPT model as lm-eval's own ``HFLM`` does for the same weights in
transformers (held against it by a test): context and continuation are tokenized together, what does not fit is cut from
the left, a text without a context begins after the begin- or end-of-text token. Tasks see plain text: no chat format is
put around it.
"""

import difflib
import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from litmoe.evaluation.common import Precision, as_table, load_model, with_progress
from litmoe.forward import hidden_states, logits_of
from litmoe.inference.generate import TextStream, generate_tokens

PROTOCOL = f"lm-eval {version('lm-eval')}"

_TOKENS = 1 << 13  # in a batch, padding counted
_LOGITS = 1 << 26  # at once, in fp32 256 MiB
_NEW_TOKENS = 256  # where a task says nothing, as HFLM
_SEED = 1234  # of what a task asks to be sampled


@dataclass(frozen=True)
class Score:
    """A line of the result."""

    task: str
    """A task, or a group of tasks with a mean of its own"""
    metric: str
    filter: str
    """How the answers were cut out of the text; ``none`` in most tasks"""
    value: float
    stderr: float | None
    """Where the harness gives one"""
    n: int | None
    """Questions answered; None for a group"""
    num_fewshot: int | None
    version: float | str | None
    """Of the task"""


@dataclass(frozen=True)
class TaskEvaluation:
    """What `evaluate` measured, and on what."""

    checkpoint: str
    step: int
    scores: list[Score]
    protocol: str
    tasks_dir: str | None
    limit: int | None
    context: int
    """Tokens that the model was given at most"""
    device: str
    precision: str
    seconds: float


def evaluate(
    folder: Path,
    names: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> TaskEvaluation:
    """Scores a checkpoint; a progress bar goes to stderr. Python's, numpy's and torch's random states are reseeded.

    Args:
        folder: the checkpoint.
        names: tasks, groups or tags of the harness or of ``tasks_dir``.
        tasks_dir: a folder of tasks in the harness's YAML. Such a file may name functions that are run.
        limit: only the first so many questions of each task.
        num_fewshot: examples before each question; those of the task when None.
        max_seq_length: tokens of context and answer at most; as many as in training when None.
        device, precision: as in `litmoe.evaluation.common.load_model`.

    Raises:
        UserError: no or a damaged checkpoint, a task that is unknown, can't be loaded or would run code that the model
            wrote, or questions that do not fit the context.
    """
    mark = checkpoints.read_mark(folder)
    context = checkpoints.context_of(folder, max_seq_length)
    tokenizer = checkpoints.load_tokenizer(folder)
    manager = find_tasks(names, tasks_dir)
    tasks = load_tasks(manager, names)
    loaded = load_model(folder, device, precision, context)
    start = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    result = evaluator.simple_evaluate(
        Harness(loaded.gpt, tokenizer, context, loaded.autocast),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
    )
    assert result is not None
    return TaskEvaluation(
        checkpoint=str(folder),
        step=mark.step,
        scores=scores_of(result),
        protocol=PROTOCOL,
        tasks_dir=None if tasks_dir is None else str(tasks_dir),
        limit=limit,
        context=context,
        device=loaded.device,
        precision=loaded.precision,
        seconds=time.perf_counter() - start,
    )


def table(result: TaskEvaluation) -> Group:
    """The result for people."""
    scores = Table("task", "metric", "value", "stderr", "questions", "examples")
    for score in result.scores:
        scores.add_row(
            score.task,
            score.metric if score.filter == "none" else f"{score.metric}, {score.filter}",
            f"{score.value:.4f}",
            "" if score.stderr is None else f"± {score.stderr:.4f}",
            "" if score.n is None else f"{score.n:,}",
            "" if score.num_fewshot is None else str(score.num_fewshot),
        )
    rows = {
        "checkpoint": f"{result.checkpoint}, step {result.step:,}",
        "protocol": result.protocol,
        "computed": f"on {result.device} in {result.precision}, {result.seconds:,.1f} s",
    }
    if result.limit is not None:
        rows["note"] = f"only the first {result.limit:,} questions of each task: no number to compare with others'"
    return Group(scores, as_table(rows))


# --------------------------------------------------------------------------------------------------------------- tasks


def find_tasks(names: Sequence[str], tasks_dir: Path | None) -> TaskManager:
    """The harness's index of tasks, with those of ``tasks_dir``, which win.

    Raises:
        UserError: there is no such folder, or a name that is in neither.
    """
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise UserError(f"no folder {tasks_dir}; expected tasks in lm-eval's YAML.")
    if tasks_dir is not None:
        manager = TaskManager(include_path=tasks_dir, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager  # to read lm-eval's 14,000 takes seconds
    manager = TaskManager(include_path=tasks_dir)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"the nearest names are {', '.join(close)}" if close else "no name is like it"
            where = "lm-eval" if tasks_dir is None else f"lm-eval or {tasks_dir}"
            raise UserError(f"no task {name!r} in {where}; {hint}. `uv run lm-eval ls tasks` lists all.")
    return manager


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """Tasks with their data.

    Raises:
        UserError: the data can't be had, a file is wrong, or a task would run code that the model wrote.
    """
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of the harness, datasets, the Hub's client, or the transport
        cause = error
        while isinstance(before := cause.__cause__ or cause.__context__, Exception):
            cause = before  # without a network the last error says something else
        raise UserError(
            f"can't load {', '.join(names)} ({in_short(cause)}). The data of lm-eval's tasks come from the Hugging Face"
            " Hub: that needs a network, or an earlier call that left them in its cache. Tasks of your own, with data"
            " from files here, are read with --tasks_dir FOLDER."
        ) from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(f"{', '.join(unsafe)} would run code that the model wrote; such tasks are refused here.")
    return [*loaded["tasks"].values()] if not loaded["groups"] else list(names)


def scores_of(result: Any) -> list[Score]:
    """The harness's nested result as lines."""
    scores = []
    for task, values in {**result["results"], **result.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            counts = result["n-samples"].get(task)
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    n=None if counts is None else counts["effective"],
                    num_fewshot=result["n-shot"].get(task),
                    version=result["versions"].get(task),
                )
            )
    return scores


# ------------------------------------------------------------------------------------------------------------- answers


class Harness(TemplateLM):
    """A LitGPT model as lm-eval asks models."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, max_length: int, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.gpt = gpt
        self.max_length = max_length
        self._tokens = tokenizer  # `tokenizer` is transformers' in lm-eval
        self._autocast = autocast
        self._device = gpt.lm_head.weight.device
        self._generator = torch.Generator(self._device).manual_seed(_SEED)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self._tokens.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins after."""
        return self.eot_token_id if self._tokens.bos_id is None else int(self._tokens.bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With a begin-of-text token where the tokenizer uses one, unless the text has one, as transformers does."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._name_of(self.prefix_token_id))
        return text_ids(self._tokens, string, begin=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval's, without its progress bar for tokenizing."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> Any:
        rows = []
        for text, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise UserError(
                    f"the answer {(text or ('', ''))[1]!r} of a task has {len(continuation):,} tokens; expected 1 to"
                    f" {self.max_length:,}, the context. Give a longer --max-seq-length."
                )
            rows.append((context + continuation)[-(self.max_length + 1) :])
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
        batches = batches_by_length([len(row) for row in rows])
        for batch in with_progress(batches, len(batches)):
            found = self._score([rows[index] for index in batch], [len(requests[index][2]) for index in batch])
            for index, answer in zip(batch, found, strict=True):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    @torch.no_grad()
    def _score(self, rows: list[list[int]], lengths: list[int]) -> list[tuple[float, bool]]:
        """Log-probability of the last ``lengths`` tokens of each row, and whether each is the most probable one."""
        width = max(map(len, rows)) - 1
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # padded on the right, where nobody looks
        sources: list[int] = []
        targets: list[int] = []
        for line, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[line, : len(row) - 1] = torch.tensor(row[:-1])
            sources += range(line * width + len(row) - 1 - length, line * width + len(row) - 1)
            targets += row[-length:]
        nats, best = [], []
        with self._autocast:
            x, _ = hidden_states(self.gpt, ids.to(self._device))
            x = x.flatten(0, 1)[torch.tensor(sources, device=self._device)]  # (N, C)
            wanted = torch.tensor(targets, device=self._device)
            at_once = max(1, _LOGITS // self.gpt.config.padded_vocab_size)
            for part, ahead in zip(x.split(at_once), wanted.split(at_once), strict=True):
                logits = logits_of(self.gpt, part).float()  # (N, V)
                nats.append(F.cross_entropy(logits, ahead, reduction="none").double().cpu())
                best.append((logits.argmax(dim=-1) == ahead).cpu())
        if not (every := torch.cat(nats)).isfinite().all():
            raise UserError("the model's output is not a number: its training diverged. Use an earlier checkpoint.")
        pairs = zip(every.split(lengths), torch.cat(best).split(lengths), strict=True)
        return [(-float(row.sum()), bool(hits.all())) for row, hits in pairs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows of the context, each token predicted once, with as much before it as fits."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, the end-of-text token or the length asked."""
        texts = []
        for context, settings in with_progress((request.args for request in requests), len(requests)):
            texts.append(self._write(context, settings))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
        return texts

    def _write(self, context: str, settings: dict[str, Any]) -> str:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        sampled, temperature = asked.pop("do_sample"), float(asked.pop("temperature", 0.0))
        stops, new_tokens = [*asked.pop("until"), self._name_of(self.eot_token_id)], asked.pop("max_gen_toks")
        top_k, top_p = asked.pop("top_k", 50), float(asked.pop("top_p", 1.0))
        if asked.pop("num_beams", 1) != 1 or asked:
            raise UserError(
                f"a task asks for generation_kwargs {settings}; expected some of until, max_gen_toks, do_sample,"
                " temperature, top_k, top_p."
            )
        if not 0 < new_tokens < self.max_length:
            raise UserError(
                f"a task asks for {new_tokens:,} new tokens (max_gen_toks), but context and answer have room for"
                f" {self.max_length:,} together. Give a longer --max-seq-length, or a task with a smaller"
                " generation_kwargs: max_gen_toks."
            )
        prompt = self.tok_encode(context)[-(self.max_length - new_tokens) :] or [self.prefix_token_id]
        stream, text = TextStream(self._tokens), ""
        with self._autocast:
            for token in generate_tokens(
                self.gpt,
                torch.tensor(prompt, device=self._device),
                max_new_tokens=new_tokens,
                temperature=temperature if sampled else 0.0,
                top_k=top_k,
                top_p=top_p,
                eos_id=self.eot_token_id,
                generator=self._generator,
            ):
                if int(token) == self.eot_token_id:
                    break
                text += stream.push(int(token))
                if any(stop in text for stop in stops if stop):
                    break
        written: str = postprocess_generated_text(text + stream.flush(), stop=stops, think_end_token=None)
        return written

    def _name_of(self, token: int) -> str:
        name: str = self._tokens.processor.decode([token], skip_special_tokens=False)
        return name


def batches_by_length(lengths: Iterable[int]) -> list[list[int]]:
    """Places of rows of like length together, the longest first, so that too little memory shows at once."""
    batches: list[list[int]] = []
    longest = 0
    for index, length in sorted(enumerate(lengths), key=lambda item: -item[1]):
        if batches and (len(batches[-1]) + 1) * longest <= _TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = length
    return batches
