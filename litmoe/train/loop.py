"""The training loop of pretraining and finetuning: ``train`` takes steps until the end, ``train_step`` is one of them.

Both replace ``litgpt.pretrain.fit``.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple, cast

import lightning as L
import torch
from litgpt.utils import CycleIterator
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from litmoe.cli import UserError
from litmoe.config import MoESettings
from litmoe.train.cross_entropy import IGNORE_INDEX
from litmoe.train.distributed import any_rank, sum_over_ranks
from litmoe.train.evaluate import compile_evaluation, evaluate_and_log, evaluations_due
from litmoe.train.fitting import regroup, rehearse, with_less_memory
from litmoe.train.logs import RunDisplay
from litmoe.train.metrics import MetricAccumulator, training_row
from litmoe.train.model import (
    Accumulation,
    Batch,
    Losses,
    as_batch,
    cast_matrices,
    find_first_nonfinite,
    find_nonfinite_weights,
    update_selection_biases,
)
from litmoe.train.optimizers import can_skip_step, set_learning_rate, step_unless
from litmoe.train.reporting import record_state
from litmoe.train.saving import StopSignals
from litmoe.train.schedule import learning_rate
from litmoe.train.state import (
    Progress,
    TrainingRun,
    plan_from,
    save_after_error,
    save_checkpoint,
    scaler_of,
    take_snapshot,
)
from litmoe.train.timing import seconds_since_start

Ending = Literal["finished", "out of time", "stopped"]


class Requests(NamedTuple):
    """What the loop does after a step if any rank asks for it."""

    stop: bool
    """A signal was received"""
    end: bool
    """``train.max_time`` is used up"""
    save: bool
    """A checkpoint is due by the clock"""
    choose: bool
    """A run with a time budget has measured its speed"""


class StepResult(NamedTuple):
    """What one optimizer step reports to the loop."""

    tokens: int
    """Over all ranks"""
    learning_rate: float
    gradient_norm: Tensor
    """Before clipping"""
    requests: Requests
    """Of all ranks together"""


class NonFiniteError(UserError):
    """The loss or the gradient of a step is NaN or infinite. Raised on all ranks, before the update."""


class _Session:
    """Where and when this session of the run began: time and steps of earlier sessions do not count for its speed."""

    def __init__(self, progress: Progress) -> None:
        self.first_step = progress.step
        self.earlier_seconds = progress.seconds
        self.start = time.perf_counter()
        self.loop_start = self.start
        """Set again after an evaluation before the first step"""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def elapsed(self) -> float:
        """Seconds of the complete run: earlier sessions, and this one from the start of its command."""
        return self.earlier_seconds + seconds_since_start()


def train(fabric: L.Fabric, run: TrainingRun, signals: StopSignals, display: RunDisplay) -> Ending:
    """Train from ``run.progress`` to the end of ``run.plan``.

    Returns:
        Why it ended: the plan is fulfilled, ``train.max_time`` is used up, or a rank received a signal.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
    """
    progress = run.progress
    session = _Session(progress)
    # Starts the next epoch when one ends.
    batches = CycleIterator(run.train_dataloader)
    batches.epoch = progress.epoch

    if not _evaluate_before_first_step(fabric, run, display, signals):
        return "stopped"
    # Not earlier: an evaluation is no training time.
    run.metrics.start_clock()
    session.loop_start = time.perf_counter()
    # Not a local plan: a time budget becomes a number of steps on the way.
    while progress.step < run.plan.steps:
        step_start = time.perf_counter()
        # The last step may have fewer micro batches.
        taken = [next(batches) for _ in range(run.plan.micro_batches_in(progress.step))]
        micro_batches = [as_batch(batch, run.gpt.max_seq_length) for batch in taken]
        result = train_step(fabric, run, micro_batches, partial(_own_requests, fabric, run, signals, session))

        # The step is complete: count it, log it, and take the snapshot that a save needs.
        progress.step += 1
        progress.tokens += result.tokens
        progress.epoch = batches.epoch
        progress.seconds = session.earlier_seconds + session.seconds
        # Before the snapshot: a step that is saved must not be logged again by the resumed run.
        log_step(fabric, run, result, display, session)
        run.snapshot = take_snapshot(fabric, run)
        run.timing.add_step(time.perf_counter() - step_start)

        # A stop request does not wait for an evaluation, which can take minutes.
        ending = _ending_of(fabric, run, signals, result.requests)
        if ending is not None:
            return ending
        if result.requests.choose and not _choose_length(fabric, run, display, signals, session):
            return "stopped"
        if not _evaluate_if_due(fabric, run, display, signals):
            return "stopped"
        # After the evaluation, so that the checkpoint says that it was done.
        _save_if_due(fabric, run, result.requests)
    return "finished"


def train_step(
    fabric: L.Fabric, run: TrainingRun, micro_batches: Sequence[Batch], own_requests: Callable[[], Requests]
) -> StepResult:
    """Take one optimizer step: forward and backward of each micro batch, clipping, NaN check, update, expert balance.

    Args:
        micro_batches: this rank's; their gradients are accumulated.
        own_requests: returns this rank's requests. They are exchanged together with the NaN check, because each
            exchange makes the CPU wait.

    Raises:
        NonFiniteError: the loss or gradient is not finite. Weights and optimizer are unchanged.
    """
    settings, model, optimizer = run.settings, run.model, run.optimizer
    rate = _set_learning_rate(run)

    # The second step needs more memory than the first one, which has no moments yet; all others are like it.
    if fabric.world_size > 1 and not run.sharded and run.timing.all_steps < 2:
        rehearse(fabric, run, partial(_rehearsal, fabric, run, micro_batches), undo=optimizer.zero_grad)
    # Forward and backward. The sums stay on the device: reading one would make the CPU wait for it.
    all_losses, tokens = with_less_memory(
        fabric, run, partial(_accumulate_gradients, fabric, run, micro_batches), undo=optimizer.zero_grad
    )
    expert_counts = torch.zeros_like(run.expert_counts)
    step_loss = torch.zeros((), device=fabric.device)
    for losses in all_losses:
        run.metrics.add(losses)
        expert_counts += losses.expert_counts
        step_loss += losses.cross_entropy
    run.metrics.tokens += tokens

    # Clip. Without max_norm the norm is still measured: clipping at infinity changes nothing.
    max_norm = settings.train.max_norm or math.inf
    norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
    norm = cast(Tensor, norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # With a GradScaler, infinite gradients are expected while it adjusts its scale, so check the loss instead.
    checked = norm if scaler_of(fabric) is None else step_loss
    is_bad, requests = _update_if_finite(fabric, run, checked, own_requests())
    if is_bad:
        # The search for the cause computes new gradients.
        optimizer.zero_grad()
        message = _describe_nonfinite(fabric, run, micro_batches)
        # The snapshot is still that of the step before. All ranks raise, so all can take part in the save.
        save_after_error(fabric, run, on_all_ranks=True)
        raise NonFiniteError(message)
    optimizer.zero_grad()
    update_expert_balance(fabric, run, expert_counts, norm)
    return StepResult(tokens, rate, norm, requests)


def _rehearsal(fabric: L.Fabric, run: TrainingRun, micro_batches: Sequence[Batch]) -> None:
    """Do forward and backward of the first parts of a step, without communication."""
    with fabric.no_backward_sync(run.model):
        weights = cast_matrices(run.matrices_to_cast, fabric._precision.precision)
        # Two, because the gradients of the first one exist during the second.
        for batch in islice(regroup(micro_batches, run.rows), 2):
            losses: Losses = functional_call(run.model, weights, (*batch, run.expert_counts), tie_weights=False)
            fabric.backward(total_loss(losses, run.settings.moe))


def _accumulate_gradients(
    fabric: L.Fabric, run: TrainingRun, micro_batches: Sequence[Batch]
) -> tuple[list[Losses], int]:
    """Do forward and backward of each micro batch. Return their losses, and the tokens of the step over all ranks."""
    batches = list(regroup(micro_batches, run.rows))
    weights, tokens = micro_batch_weights(fabric, batches)
    all_losses = []
    # Once for all micro batches; freed before the update, which needs memory of its own.
    accumulation = Accumulation()
    cast_weights = cast_matrices(run.matrices_to_cast, fabric._precision.precision, accumulation)
    for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        is_accumulating = index < len(batches) - 1
        accumulation.in_place = is_accumulating or fabric.world_size == 1
        # FSDP shards gradients after each micro batch, so there is nothing to postpone.
        with fabric.no_backward_sync(run.model, enabled=is_accumulating and not run.sharded):
            # The load of the step before, so that it is the same for all micro batches and ranks.
            losses: Losses = functional_call(run.model, cast_weights, (*batch, run.expert_counts), tie_weights=False)
            losses = losses._replace(cross_entropy=losses.cross_entropy * weight)
            fabric.backward(total_loss(losses, run.settings.moe) / len(batches))
        all_losses.append(Losses(*(value.detach() for value in losses)))
    return all_losses, tokens


def _update_if_finite(
    fabric: L.Fabric, run: TrainingRun, checked: Tensor, own_requests: Requests
) -> tuple[bool, Requests]:
    """Update the weights if ``checked`` is finite on all ranks, and collect the requests of all ranks.

    Returns:
        Whether it is not finite on some rank, in which case nothing was changed, and the requests.
    """
    is_bad = ~torch.isfinite(checked)
    # An error in the middle of an update leaves weights of no step. So there is no snapshot, and no save, during it.
    if fabric.world_size == 1 and can_skip_step(run.optimizer.optimizer) and not run.sharded:
        # The flag is on its way before the update, so the CPU reads it while the GPU is updating, and launches the next
        # forward before the GPU runs out of work.
        read_flag = _start_reading(is_bad)
        snapshot, run.snapshot = run.snapshot, None
        step_unless(run.optimizer, is_bad)
        is_skipped = read_flag()
        if is_skipped:
            run.snapshot = snapshot
        return is_skipped, own_requests
    # This exchange makes the CPU wait for the device, so the requests go along. A request of one rank becomes one of
    # all: ranks that save or stop after different steps would wait for each other forever.
    is_bad_anywhere, *requests = any_rank(fabric, is_bad, *own_requests)
    if not is_bad_anywhere:
        run.snapshot = None
        run.optimizer.step()
    return is_bad_anywhere, Requests(*requests)


def _start_reading(flag: Tensor) -> Callable[[], bool]:
    """Return a function that returns the flag. It waits for the device's work up to now, not for later work."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    on_cpu = flag.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(on_cpu)

    return read


def total_loss(losses: Losses, moe: MoESettings) -> Tensor:
    """Return the loss that is differentiated: cross-entropy plus weighted balance losses."""
    return losses.cross_entropy + moe.load_balancing_loss * losses.load_balancing + moe.z_loss * losses.z_loss


def update_expert_balance(fabric: L.Fabric, run: TrainingRun, expert_counts: Tensor, norm: Tensor) -> None:
    """Record the experts' load of a step for the next step's load-balancing loss, and update selection biases.

    The load is that of the global batch (arXiv 2501.11873). It is taken from the step before instead of, as in
    Megatron, the sum so far within the step: such a sum depends on how many ranks compute at once.

    Args:
        expert_counts: ``(MoE layers, n_expert)`` of this rank; summed over all ranks in place.
        norm: of the gradient. If it is not finite, a GradScaler skipped the step, and the biases stay.
    """
    if fabric.world_size > 1:
        # Not Fabric's all_reduce, which would also make the device wait at a barrier.
        torch.distributed.all_reduce(expert_counts)
    run.expert_counts = expert_counts
    rate = run.settings.moe.bias_update_rate
    if rate:
        update_selection_biases(run.gpt, expert_counts, rate * torch.isfinite(norm))


def micro_batch_weights(fabric: L.Fabric, batches: Sequence[Batch]) -> tuple[list[float], int]:
    """Return the weight of each micro batch's mean loss (1 on average), and the tokens of the step over all ranks.

    The loss of a step is the mean over its target tokens. Micro batches of conversations have different numbers of
    targets, so a mean of their means would weight tokens of short answers more.
    """
    if batches[0].lengths is None:  # windows of text, each with equally many targets; all ranks have equally many
        sizes = [batch.input_ids.numel() for batch in batches]
        return [size * len(sizes) / sum(sizes) for size in sizes], sum(sizes) * fabric.world_size
    targets = [int((batch.targets != IGNORE_INDEX).sum()) for batch in batches]
    tokens = sum(int(batch.lengths.sum()) for batch in batches if batch.lengths is not None)
    # Gradients are averaged over all micro batches of all ranks, so the weights must have the mean 1 there.
    counts = torch.tensor([sum(targets), tokens, len(targets)], device=fabric.device)
    all_targets, all_tokens, all_batches = sum_over_ranks(fabric, counts).tolist()
    return [count * all_batches / all_targets for count in targets], all_tokens


def log_step(fabric: L.Fabric, run: TrainingRun, result: StepResult, display: RunDisplay, session: _Session) -> None:
    """Show the step. At a log interval also log the means since the last log line, and start the next interval."""
    progress, plan = run.progress, run.plan
    session_steps = progress.step - session.first_step
    seconds_left = _seconds_left(run, session)
    is_due = progress.step % run.settings.train.log_interval == 0 or progress.step == plan.steps
    # Compilation takes longer than many steps and would spoil the throughput of the first log line.
    is_compilation_step = run.compiled and session_steps == 1
    if is_compilation_step:
        seconds = time.perf_counter() - session.loop_start
        display.print(f"The first step took {seconds:,.0f} s, including compilation.")
    if not is_due:
        if is_compilation_step:
            run.metrics.reset_throughput()
        display.step(progress.step, {}, seconds_left)
        return
    row = training_row(
        fabric,
        run.metrics,
        learning_rate=result.learning_rate,
        gradient_norm=result.gradient_norm,
        step_tokens=result.tokens,
        total_tokens=progress.tokens,
        epoch=progress.epoch,
        flops_per_token=run.flops_per_token,
        peak_flops=run.peak_flops,
    )
    run.metrics = MetricAccumulator()
    run.train_loss = row["train_loss"]
    record_state(fabric, run, seconds_left)
    display.step(progress.step, row, seconds_left)
    fabric.log_dict({**row, "time": round(progress.seconds, 3)}, step=progress.step)


def _own_requests(fabric: L.Fabric, run: TrainingRun, signals: StopSignals, session: _Session) -> Requests:
    max_time, budget = run.settings.train.max_time or math.inf, run.settings.time_budget
    is_main = fabric.global_rank == 0
    return Requests(
        stop=signals.received is not None,
        end=session.seconds >= max_time,
        # Only rank 0 writes and chooses, so its clock decides.
        save=is_main and run.writer.is_due(),
        choose=is_main
        and budget is not None
        and not run.plan.is_known
        and run.timing.is_measured(budget, session.elapsed),
    )


def _choose_length(
    fabric: L.Fabric, run: TrainingRun, display: RunDisplay, signals: StopSignals, session: _Session
) -> bool:
    """Choose the steps of a run with a time budget, after its speed was measured. Returns False if a signal came.

    The number is saved with each checkpoint, so a resumed run keeps it.
    """
    # An evaluation now tells how long the others will take, unless it is the one that compiles.
    if run.compiled and not run.timing.evaluation and not compile_evaluation(fabric, run, signals):
        return False
    if not evaluate_and_log(fabric, run, display, signals):
        return False
    budget, progress, timing = run.settings.time_budget, run.progress, run.timing
    assert budget is not None
    at_the_end = timing.at_the_end(run.settings.eval, run.checkpoint_bytes)
    seconds_left = budget - session.elapsed - at_the_end
    steps = progress.step + max(1, round(seconds_left / timing.per_step(run.settings.eval)))
    # All ranks end after the same step.
    progress.chosen_steps, progress.chosen_for = fabric.broadcast(steps), budget
    run.plan = plan_from(run.settings, run.train_dataloader, run.gpt.max_seq_length, fabric.world_size, progress)
    display.set_steps(run.plan.steps)
    display.print(
        f"{run.plan.steps:,} steps ({run.plan.tokens:,} tokens, {run.plan.epochs:.2f} epochs) fit into"
        f" {budget / 60:g} minutes: {timing.seconds_per_step:.3g} s per step, {at_the_end:.3g} s at the end,"
        f" {session.elapsed:,.0f} s so far."
    )
    return True


def _seconds_left(run: TrainingRun, session: _Session) -> float:
    """Return an estimate with evaluations and the last save."""
    if not run.plan.is_known:
        assert run.settings.time_budget is not None
        return max(0, run.settings.time_budget - session.elapsed)
    steps = run.plan.steps - run.progress.step
    if not run.timing.steps:
        return session.seconds / (run.progress.step - session.first_step) * steps
    settings = run.settings.eval
    return run.timing.per_step(settings) * steps + run.timing.at_the_end(settings, run.checkpoint_bytes)


def _ending_of(fabric: L.Fabric, run: TrainingRun, signals: StopSignals, requests: Requests) -> Ending | None:
    """Return why the run ends after this step; None to continue. The last step ends it in any case."""
    if run.progress.step == run.plan.steps:
        return None
    # One rank can act on a signal that came during the step. Several ranks must agree, at the next step.
    came_during_step = fabric.world_size == 1 and signals.received is not None
    if requests.stop or came_during_step:
        return "stopped"
    return "out of time" if requests.end else None


def _save_if_due(fabric: L.Fabric, run: TrainingRun, requests: Requests) -> None:
    """Save in the background. After the last step ``final/`` is saved instead."""
    step, settings = run.progress.step, run.settings
    if step == run.plan.steps:
        return
    save_interval = settings.train.save_interval
    is_interval = save_interval is not None and step % save_interval == 0
    # So that a resumed run keeps the length that was chosen.
    is_chosen = requests.choose and (save_interval or settings.checkpoint.every_minutes) is not None
    if requests.save or is_interval or is_chosen:
        # Copying to CPU memory is no training time.
        with run.metrics.paused():
            save_checkpoint(fabric, run, settings.out_dir / f"step-{step:08d}")
    run.writer.report_failure()


def _evaluate_before_first_step(fabric: L.Fabric, run: TrainingRun, display: RunDisplay, signals: StopSignals) -> bool:
    """Do the evaluations that come before the first step of this session. Returns False if a signal stopped one.

    There are two of them: that of a new run, if the settings say so, and that of the last step before a stop, which did
    not wait for it.
    """
    # A new run. A signal does not stop this evaluation: there is no checkpoint yet, so no resumed run could repeat it.
    if run.progress.step == 0 and run.settings.eval.initial_validation:
        evaluate_and_log(fabric, run, display, signals)
    # A resumed run. Its snapshot is otherwise taken after its first step, but a signal during this evaluation saves the
    # step that it was resumed from.
    if any(evaluations_due(run)):
        run.snapshot = take_snapshot(fabric, run)
    # At step 0 nothing is due, so this does not evaluate a new run twice.
    return _evaluate_if_due(fabric, run, display, signals)


def _evaluate_if_due(fabric: L.Fabric, run: TrainingRun, display: RunDisplay, signals: StopSignals) -> bool:
    """Evaluate if it is due. Returns False if a signal stopped the evaluation."""
    validation, hellaswag = evaluations_due(run)
    if not (validation or hellaswag):
        return True
    return evaluate_and_log(fabric, run, display, signals, with_validation=validation, with_hellaswag=hellaswag)


def _set_learning_rate(run: TrainingRun) -> float:
    """Set the learning rate of the coming step and return that of the first parameter group."""
    peak = run.optimizer.param_groups[0]["initial_lr"]
    rate = learning_rate(
        run.progress.step,
        peak=peak,
        minimum=run.settings.train.min_lr,
        warmup_steps=run.plan.warmup_steps,
        steps=run.plan.steps,
        schedule=run.settings.schedule,
    )
    # As a factor, because groups may have rates of their own, such as the input embedding.
    set_learning_rate(run.optimizer.optimizer, rate / peak)
    return rate


def _describe_nonfinite(fabric: L.Fabric, run: TrainingRun, batches: Sequence[Batch]) -> str:
    """Build the error message. If the weights already contain NaN, the step is not saved."""
    settings = run.settings
    # Weights first: if they are not finite, every layer's output is not, and no layer is the cause.
    bad_weights = find_nonfinite_weights(run.gpt)
    advice = "keeps what was trained so far. Continue with --resume auto, or from an older checkpoint"
    if any_rank(fabric, bad_weights is not None)[0]:
        # The last complete step has these weights already, so saving it would only store NaN.
        run.snapshot = None
        cause = f"the weights{f' of {bad_weights}' if bad_weights else ''} were already not finite before this step"
        advice = "saves nothing. Continue from a checkpoint that was saved before"
    elif run.sharded:
        cause = "the layer can't be found in a sharded model"
    else:
        cause = find_first_nonfinite(
            fabric, run.pretraining_model, batches, lambda losses: total_loss(losses, settings.moe)
        )
    return (
        f"the loss or its gradient is no longer finite at step {run.progress.step + 1:,}: {cause}. The run stops before"
        f" this update and {advice} (--resume FOLDER --overwrite), and a lower --optimizer.init_args.lr, a longer"
        " --train.lr_warmup_steps, or --precision 32-true."
    )
