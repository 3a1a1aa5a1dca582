"""Evaluation during training: validation loss, a sample and HellaSwag."""

import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
import torch
from litgpt import GPT, Tokenizer
from torch import Tensor

from litmoe.config import RunSettings
from litmoe.evaluation import hellaswag
from litmoe.hardware import is_out_of_memory
from litmoe.inference.generate import sample_text
from litmoe.train.cross_entropy import IGNORE_INDEX
from litmoe.train.distributed import sum_over_ranks
from litmoe.train.fitting import regroup, with_less_memory
from litmoe.train.logs import RunDisplay
from litmoe.train.model import Batch, as_batch
from litmoe.train.saving import StopSignals
from litmoe.train.state import TrainingRun


class EvaluationStopped(Exception):
    """A signal asked the run to stop during an evaluation."""


def evaluations_due(run: TrainingRun) -> tuple[bool, bool]:
    """Return whether validation and HellaSwag are due after the last step, and not done yet."""
    step, settings = run.progress.step, run.settings.eval
    # A resumed run must not repeat the evaluation of its checkpoint's step.
    if step == 0 or step == run.progress.evaluated_step:
        return False, False
    # The last step is evaluated even if no interval ends there.
    at_the_end = step == run.plan.steps and settings.final_validation
    hellaswag_interval = settings.hellaswag_interval or settings.interval
    return step % settings.interval == 0 or at_the_end, step % hellaswag_interval == 0 or at_the_end


def evaluate_and_log(
    fabric: L.Fabric,
    run: TrainingRun,
    display: RunDisplay,
    signals: StopSignals,
    *,
    with_validation: bool = True,
    with_hellaswag: bool = True,
) -> bool:
    """Evaluate the model and log the results as a row of their own.

    Returns:
        False if a signal stopped it; then nothing is logged, and a resumed run evaluates first. Only a run of one rank
        stops, because ranks do not learn of each other's signals in time; and neither before the first step nor after
        the last one, where no resumed run would evaluate.
    """
    stop_on = _stopping(fabric, run, signals)
    row: dict[str, float] = {}
    try:
        with run.metrics.paused():
            if with_validation:
                with run.timing.measure("validation"):
                    row |= evaluate(fabric, run, display, stop_on)
            if with_hellaswag:
                with run.timing.measure("hellaswag"):
                    row |= score_hellaswag(fabric, run, display, stop_on)
    except EvaluationStopped:
        # The resumed run repeats it from its beginning.
        return False
    if row:
        fabric.log_dict({**row, "time": round(run.progress.seconds, 3)}, step=run.progress.step)
    with run.metrics.paused():
        run.report.write_if_due()
    run.timing.evaluation["report"] = run.report.seconds
    # Saved with the next checkpoint, so that a resumed run does not log this evaluation again.
    run.progress.evaluated_step = run.progress.step
    return True


def compile_evaluation(fabric: L.Fabric, run: TrainingRun, signals: StopSignals) -> bool:
    """Evaluate without measuring or logging: the first evaluation of a compiled run takes longer than all others.

    Returns:
        As ``evaluate_and_log``.
    """
    if run.val_dataloader is None:
        return True
    try:
        with run.metrics.paused():
            validate(fabric, run, _until_signal(_stopping(fabric, run, signals), run.val_dataloader))
            if fabric.global_rank == 0:
                write_sample(fabric, run)
            fabric.barrier()
    except EvaluationStopped:
        return False
    return True


def _stopping(fabric: L.Fabric, run: TrainingRun, signals: StopSignals) -> StopSignals | None:
    """Return the signals if they may stop an evaluation, else None; see ``evaluate_and_log``."""
    can_resume = 0 < run.progress.step < run.plan.steps
    return signals if can_resume and fabric.world_size == 1 else None


def evaluate(
    fabric: L.Fabric, run: TrainingRun, display: RunDisplay, stop_on: StopSignals | None = None
) -> dict[str, float]:
    """Return validation loss and perplexity, and write a sample. Does nothing without validation data."""
    if run.val_dataloader is None:
        return {}
    step = run.progress.step
    loss = validate(fabric, run, _until_signal(stop_on, run.val_dataloader))
    run.val_loss = loss
    # exp overflows above 709.
    perplexity = math.exp(min(loss, 700))
    display.print(f"step {step}/{run.plan.steps_text()} | val loss {loss:.4f}, perplexity {perplexity:.2f}")
    # One sample of rank 0 is enough. The others wait, so that they do not time out in the next exchange.
    text = write_sample(fabric, run) if fabric.global_rank == 0 else None
    if text is not None:
        display.print(f"step {step}/{run.plan.steps_text()} | sample: {text}")
        run.loggers.log_text("sample", text, step)
        run.report.journal.sample(step, text)
    fabric.barrier()
    return {"val_loss": loss, "val_perplexity": perplexity}


def score_hellaswag(
    fabric: L.Fabric, run: TrainingRun, display: RunDisplay, stop_on: StopSignals | None = None
) -> dict[str, float]:
    """Return HellaSwag's accuracies. Does nothing if the run has no questions."""
    if run.questions is None:
        return {}
    start = time.perf_counter()
    # The ranks share the questions.
    own_batches = run.questions.batches[fabric.global_rank :: fabric.world_size]
    # Fabric's wrapper turns autocast on, but this is the model inside of it.
    with fabric.autocast():
        scores = hellaswag.log_probabilities(run.gpt, _until_signal(stop_on, own_batches), run.questions)
    if fabric.world_size > 1:
        # Questions of other ranks have the score 0.
        scores = sum_over_ranks(fabric, scores).cpu()
    score = hellaswag.accuracy(run.questions.questions, scores)
    step = run.progress.step
    display.print(
        f"step {step}/{run.plan.steps_text()} | hellaswag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}"
        f" ({score.protocol}, {score.questions:,} questions, {time.perf_counter() - start:,.0f} s)"
    )
    return {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}


@torch.no_grad()
def validate(fabric: L.Fabric, run: TrainingRun, batches: Iterable[Any]) -> float:
    """Return the mean cross-entropy in nats per token, over all ranks. Replaces ``litgpt.pretrain.validate``.

    The first ``eval.max_iters`` batches of all ranks together are used, the same ones at each call if the loader's
    order is fixed. Every rank takes equally many: the number is rounded up, and if the validation set does not divide
    evenly over the ranks, its last batches are skipped.
    """
    max_iters = math.ceil(run.settings.eval.max_iters / fabric.world_size)
    run.model.eval()
    losses, tokens = [], []
    used = (as_batch(batch, run.gpt.max_seq_length) for batch in islice(batches, max_iters))
    for part in regroup(used, run.rows):
        for loss, n_targets in with_less_memory(fabric, run, partial(_validation_losses, run, part)):
            losses.append(loss)
            tokens.append(n_targets)
    run.model.train()
    # Weighted by tokens, because batches of conversations have different numbers of targets.
    loss_B = torch.stack(losses)
    tokens_B = torch.stack(tokens).to(loss_B.dtype)
    total_loss, total_tokens = sum_over_ranks(fabric, torch.stack([(loss_B * tokens_B).sum(), tokens_B.sum()]))
    return float(total_loss / total_tokens)


def _validation_losses(run: TrainingRun, micro_batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return the mean loss and the number of targets of each part. They stay on the device, so nothing waits for it."""
    parts = regroup([micro_batch], run.rows)
    return [(run.model(*part).cross_entropy, (part.targets != IGNORE_INDEX).sum()) for part in parts]


def write_sample(fabric: L.Fabric, run: TrainingRun) -> str | None:
    """Generate the sample text. The mode of the model and all random states stay as they are."""
    sample = run.settings.sample
    if run.tokenizer is None or run.sample_prompt is None:
        return None
    try:
        with fabric.autocast():
            texts = sample_text(
                run.gpt,
                run.tokenizer,
                run.sample_prompt,
                max_new_tokens=run.settings.eval.max_new_tokens or sample.max_new_tokens,
                temperature=sample.temperature,
                top_k=sample.top_k,
                seed=sample.seed,
            )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The run is worth more than its sample.
        return "(none: out of memory)"
    return texts[0]


def encode_hellaswag(settings: RunSettings, tokenizer: Tokenizer | None, gpt: GPT) -> hellaswag.Encoded | None:
    """Return HellaSwag's questions for this model and context; None if the run does not score them."""
    if settings.eval.hellaswag is None or tokenizer is None:
        return None
    questions = hellaswag.read_questions(settings.eval.hellaswag, settings.eval.hellaswag_limit)
    return hellaswag.encode(questions, tokenizer, gpt.config, gpt.max_seq_length)


def _until_signal(signals: StopSignals | None, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches.

    Raises:
        EvaluationStopped: a signal was received.
    """
    for batch in batches:
        if signals is not None and signals.received is not None:
            raise EvaluationStopped
        yield batch
