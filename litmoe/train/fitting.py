"""Fit a step into memory: the size of the micro batches before the run, and smaller ones after an out-of-memory error.

The loader's micro batches stay what they are. A step regroups them into parts of ``TrainingRun.rows`` sequences, so
data, order and global batch do not depend on the memory, and the result is that of a run with such micro batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import lightning as L
import torch

from custom_moe.backends import hardware_of
from litmoe.config import ParsedRun, Recomputed
from litmoe.hardware import GIB, detect_gpu, is_out_of_memory
from litmoe.train.distributed import any_rank
from litmoe.train.memory import divisors, largest_micro_batch, rows_on_cpu, training_memory
from litmoe.train.model import Batch, matrices_to_cast, moe_layers
from litmoe.train.state import Measures, TrainingRun, load_random_state, random_state

T = TypeVar("T")


def choose_rows(fabric: L.Fabric, run: TrainingRun, parsed: ParsedRun) -> str:
    """Choose how many sequences a step processes at a time (``train.micro_batch_size: auto``). Every rank must call it.

    Returns:
        A line about the choice and its reason.
    """
    sequences = run.settings.train.global_batch_size // fabric.world_size
    if fabric.device.type != "cuda":
        _set_rows(run, rows_on_cpu(sequences, run.gpt.max_seq_length))
        if run.rows == sequences:
            return f"All {sequences} sequences of a step at a time."
        return f"{run.rows} of a step's {sequences} sequences at a time: more are not faster on a CPU."
    gpu = detect_gpu()
    assert gpu is not None
    precision, hardware, available = fabric._precision.precision, hardware_of(fabric.device), gpu.available
    try:
        if run.sharded:
            # Each rank has its part of the weights, gradients and moments: there is room for the parts of the others.
            complete = training_memory(parsed, precision, hardware)
            states = complete.weights + complete.gradients + complete.optimizer
            available += states * (1 - 1 / fabric.world_size)
        rows, needed = largest_micro_batch(parsed, precision, hardware, available, fabric.world_size)
    except Exception:  # optimizers of other packages can do anything
        optimizer = run.hyperparameters["optimizer"]["class_path"]
        return f"{run.rows} sequences at a time: the memory that {optimizer} needs can't be computed in advance."
    # The smallest device decides for all.
    by_rank: list[Any] = [rows]
    if fabric.world_size > 1:
        by_rank = [None] * fabric.world_size
        torch.distributed.all_gather_object(by_rank, rows)
    _set_rows(run, min(by_rank))
    return (
        f"{run.rows} of a device's {sequences} sequences at a time: {rows} need {needed / GIB:.1f} GiB by the plan,"
        f" {gpu.available / GIB:.1f} of {gpu.memory:.1f} GiB are available."
    )


def with_less_memory(
    fabric: L.Fabric, run: TrainingRun, compute: Callable[[], T], undo: Callable[[], None] = lambda: None
) -> T:
    """Call ``compute``, and after each out-of-memory error again, with measures that need less memory.

    Args:
        compute: forward passes, and backward passes in training, that divide their batches by ``run.rows``.
        undo: takes back what an interrupted call has done.

    Raises:
        torch.OutOfMemoryError, RuntimeError: there is no further measure, or the run has several ranks: the others wait
            in the middle of the step.
    """
    random_states = random_state(fabric.device)
    while True:
        try:
            return compute()
        except RuntimeError as error:
            if not is_out_of_memory(error) or fabric.world_size > 1 or not _has_measure(run):
                raise
            reason = str(error).splitlines()[0]
        # Not in the handler: the traceback keeps the tensors of the interrupted call.
        undo()
        fabric.print(f"Out of memory ({reason}): {_take_measure(fabric, run)}.")
        _prepare_repetition(fabric, random_states)


def rehearse(fabric: L.Fabric, run: TrainingRun, compute: Callable[[], Any], undo: Callable[[], None]) -> None:
    """Let several ranks find measures with which a step fits, before one that they do together.

    In a step the others would wait forever for a rank that ran out of memory.

    Args:
        compute: forward and backward of a part of the step, without communication.
        undo: as for ``with_less_memory``.

    Raises:
        torch.OutOfMemoryError: on all ranks, if there is no further measure.
    """
    random_states = random_state(fabric.device)
    while True:
        reason = ""
        try:
            compute()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        undo()
        # All ranks take the same measures, because their gradients are sums over equal parts.
        (is_short,) = any_rank(fabric, bool(reason))
        if is_short and not _has_measure(run):
            raise torch.OutOfMemoryError(reason or "on another device")
        if is_short:
            measure = _take_measure(fabric, run)
            fabric.print(f"Out of memory ({reason or 'on another device'}): {measure}.")
        _prepare_repetition(fabric, random_states)
        if not is_short:
            return


def regroup(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """Yield the sequences of some micro batches in parts of ``rows``; the last one may be smaller.

    Rows of conversations are only divided, because their length differs from micro batch to micro batch.
    """
    waiting: list[Batch] = []
    for batch in batches:
        if batch.lengths is not None:
            yield from _divide(batch, rows)
            continue
        waiting.append(batch)
        if sum(len(other.input_ids) for other in waiting) >= rows:
            *complete, rest = _divide(_join(waiting), rows)
            yield from complete
            waiting = [rest]
            if len(rest.input_ids) == rows:
                yield rest
                waiting = []
    if waiting:
        yield _join(waiting)


def _join(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(*(torch.cat(fields) for fields in ([b.input_ids for b in batches], [b.targets for b in batches])))


def _divide(batch: Batch, rows: int) -> list[Batch]:
    if len(batch.input_ids) <= rows:
        return [batch]
    n_parts = -(-len(batch.input_ids) // rows)
    columns = [[None] * n_parts if field is None else field.split(rows) for field in batch]
    return [Batch(*fields) for fields in zip(*columns, strict=True)]


def _prepare_repetition(fabric: L.Fabric, random_states: dict[str, Any]) -> None:
    """Give a repeated step the same dropout, and the allocator the memory of the interrupted one."""
    load_random_state(random_states, fabric.device)
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    elif fabric.device.type == "mps":
        torch.mps.empty_cache()


def _set_rows(run: TrainingRun, rows: int) -> None:
    # The sums since the last log line count the old micro batches.
    run.metrics.convert(micro_batch_ratio=run.rows / rows)
    run.measures.rows = rows


def _has_measure(run: TrainingRun) -> bool:
    return run.rows > 1 or _next_recomputation(run) is not None


def _take_measure(fabric: L.Fabric, run: TrainingRun) -> str:
    """Let the following steps need less memory, and return what was done. None of it changes the result."""
    if run.compiled:
        # Otherwise the new size would be compiled for all sizes, which is slower.
        torch._dynamo.reset()
    if run.rows > 1:
        old = run.rows
        _set_rows(run, divisors(old)[-2])
        return f"this step again, and all others, with {run.rows} instead of {old} sequences at a time"
    recomputed = _next_recomputation(run)
    assert recomputed is not None
    _recompute(fabric, run, recomputed)
    return f"this step again, and all others, as with --activation_checkpointing {recomputed}"


def _next_recomputation(run: TrainingRun) -> Recomputed | None:
    present = run.pretraining_model.recomputed
    if present == "none" and moe_layers(run.gpt):
        return "moe"
    return "block" if present != "block" else None


def _recompute(fabric: L.Fabric, run: TrainingRun, recomputed: Recomputed) -> None:
    run.measures.recomputed = run.pretraining_model.recomputed = recomputed
    run.matrices_to_cast = matrices_to_cast(run.model, fabric._precision.precision, recomputed)


def restore_measures(fabric: L.Fabric, run: TrainingRun, saved: Measures) -> None:
    """Take the measures of a checkpoint, unless the settings need even less memory."""
    sequences = run.settings.train.global_batch_size // fabric.world_size
    is_auto = run.hyperparameters["train"]["micro_batch_size"] == "auto"
    if saved.rows is not None and (is_auto or saved.rows < run.rows) and sequences % saved.rows == 0:
        _set_rows(run, saved.rows)
    if saved.recomputed == "block" or (saved.recomputed == "moe" and run.settings.activation_checkpointing == "none"):
        _recompute(fabric, run, saved.recomputed)
