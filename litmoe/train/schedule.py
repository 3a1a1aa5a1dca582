"""How long a run is and which learning rate each step has: pure functions of the settings."""

import math
from dataclasses import dataclass

from litgpt.args import TrainArgs

from litmoe.cli import UserError
from litmoe.config import ScheduleSettings


@dataclass(frozen=True)
class Plan:
    """The length of a run, from its beginning or from the checkpoint that it goes on from; one device's micro batches
    (one forward and backward each)."""

    micro_batches: int
    """Still to come"""
    accumulation: int
    """In one optimizer step; the last step takes what is left over"""
    warmup_steps: int
    tokens_per_micro_batch: int
    """Over all devices"""
    epochs: float
    """Passes over the training set at the end of the run"""
    ended_by: str
    """The setting that ends the run, in words"""
    first_step: int = 0
    """Steps that are done"""
    first_tokens: int = 0
    """Tokens of those, over all devices"""

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.first_step + math.ceil(self.micro_batches / self.accumulation)

    @property
    def tokens(self) -> int:
        """Tokens in the whole run, over all devices."""
        return self.first_tokens + self.micro_batches * self.tokens_per_micro_batch

    def micro_batches_in(self, step: int) -> int:
        """Micro batches of optimizer step ``step``, counted from 0."""
        return min(self.accumulation, self.micro_batches - (step - self.first_step) * self.accumulation)


def plan_run(
    train: TrainArgs,
    *,
    devices: int,
    seq_length: int,
    epoch_sequences: int,
    step: int = 0,
    tokens: int = 0,
    position: tuple[int, int] = (0, 0),
) -> Plan:
    """Turns ``max_tokens``, ``max_steps`` and ``epochs`` into a number of micro batches; the smallest wins.

    Args:
        devices: over all machines.
        seq_length: tokens that one sequence trains on.
        epoch_sequences: in the training set.
        step, tokens: what is done; a run that goes on trains on what is missing, whatever its micro batches were.
        position: the epoch, and the sequences of it that were given out.

    Raises:
        UserError: where the run would be shorter than one micro batch.
    """
    accumulation = train.gradient_accumulation_iters(devices)
    tokens_per_micro_batch = train.micro_batch_size * seq_length * devices
    epoch, taken = position
    per_epoch = epoch_sequences // train.micro_batch_size  # of all devices, which share the epochs' sequence
    in_this_epoch = (epoch_sequences - taken) // train.micro_batch_size
    limits: dict[str, int] = {}
    if train.max_tokens:
        limits[f"max_tokens {train.max_tokens:,}"] = (train.max_tokens - tokens) // tokens_per_micro_batch
    if train.max_steps:
        limits[f"max_steps {train.max_steps:,}"] = (train.max_steps - step) * accumulation
    if train.epochs:
        limits[f"epochs {train.epochs}"] = (in_this_epoch + (train.epochs - epoch - 1) * per_epoch) // devices
    ended_by = min(limits, key=lambda name: limits[name])
    micro_batches = max(limits[ended_by], 0)
    if micro_batches < 1 and not step:
        raise UserError(
            f"{ended_by} is less than one micro batch of {tokens_per_micro_batch:,} tokens"
            f" (micro_batch_size x sequence length x devices); expected at least that."
        )
    steps = step + math.ceil(micro_batches / accumulation)
    warmup_steps = train.lr_warmup_steps or 0
    if train.lr_warmup_fraction:
        warmup_steps = math.ceil(train.lr_warmup_fraction * epoch_sequences / train.global_batch_size)
    return Plan(
        micro_batches=micro_batches,
        accumulation=accumulation,
        warmup_steps=min(warmup_steps, steps - 1),
        tokens_per_micro_batch=tokens_per_micro_batch,
        epochs=epoch + 1 + (micro_batches * devices - in_this_epoch) / per_epoch,
        ended_by=ended_by,
        first_step=step,
        first_tokens=tokens,
    )


def learning_rate(
    step: int, *, peak: float, minimum: float, warmup_steps: int, steps: int, schedule: ScheduleSettings
) -> float:
    """The rate of update ``step``, counted from 0: linear warm-up, then as ``schedule`` says down to ``minimum``.

    LitGPT's ``get_lr`` sets the first update's rate to 0 and never reaches ``min_lr``; here update 0 has
    ``peak / warmup_steps``, update ``warmup_steps - 1`` has ``peak``, and the last one has ``minimum``. Under ``wsd``
    all up to the last ``decay_fraction`` of the run's updates have ``peak``, and those go down by equal steps.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    falling = steps - warmup_steps
    if schedule.name == "wsd":
        falling = min(max(round(schedule.decay_fraction * steps), 1), falling)
    fallen = min(1.0, (step + 1 - (steps - falling)) / falling)
    if fallen <= 0:
        return peak
    left = 1.0 - fallen if schedule.name == "wsd" else 0.5 * (1.0 + math.cos(math.pi * fallen))
    return minimum + left * (peak - minimum)
