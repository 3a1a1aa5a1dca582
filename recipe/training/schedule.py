"""How long a run is and which learning rate each step has: pure functions of the settings."""

import math
from dataclasses import dataclass

from litgpt.args import TrainArgs

from recipe.cli import UserError
from recipe.settings import ScheduleSettings


@dataclass(frozen=True)
class Plan:
    """The length of a run, counted for one device in micro batches (one forward and backward each)."""

    micro_batches: int
    """In the whole run"""
    accumulation: int
    """In one optimizer step; the last step takes what is left over"""
    warmup_steps: int
    tokens_per_micro_batch: int
    """Over all devices"""
    ended_by: str
    """The setting that ends the run, in words"""

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole run."""
        return math.ceil(self.micro_batches / self.accumulation)

    @property
    def tokens(self) -> int:
        """Tokens in the whole run, over all devices."""
        return self.micro_batches * self.tokens_per_micro_batch

    def micro_batches_in(self, step: int) -> int:
        """Micro batches of optimizer step ``step``, counted from 0."""
        return min(self.accumulation, self.micro_batches - step * self.accumulation)


def plan_run(train: TrainArgs, *, devices: int, seq_length: int, epoch_micro_batches: int) -> Plan:
    """Turns ``max_tokens``, ``max_steps`` and ``epochs`` into a number of micro batches; the smallest wins.

    Args:
        devices: over all machines.
        seq_length: tokens that one sequence trains on.
        epoch_micro_batches: micro batches that one device gets from one pass over the training set.

    Raises:
        UserError: where the run would be shorter than one micro batch.
    """
    accumulation = train.gradient_accumulation_iters(devices)
    tokens_per_micro_batch = train.micro_batch_size * seq_length * devices
    limits: dict[str, int] = {}
    if train.max_tokens:
        limits[f"max_tokens {train.max_tokens:,}"] = train.max_tokens // tokens_per_micro_batch
    if train.max_steps:
        limits[f"max_steps {train.max_steps:,}"] = train.max_steps * accumulation
    if train.epochs:
        limits[f"epochs {train.epochs}"] = train.epochs * epoch_micro_batches
    ended_by = min(limits, key=lambda name: limits[name])
    micro_batches = limits[ended_by]
    if micro_batches < 1:
        raise UserError(
            f"{ended_by} is less than one micro batch of {tokens_per_micro_batch:,} tokens"
            f" (micro_batch_size x sequence length x devices); expected at least that."
        )
    steps = math.ceil(micro_batches / accumulation)
    return Plan(
        micro_batches=micro_batches,
        accumulation=accumulation,
        warmup_steps=min(_warmup_steps(train, epoch_micro_batches, accumulation), steps - 1),
        tokens_per_micro_batch=tokens_per_micro_batch,
        ended_by=ended_by,
    )


def _warmup_steps(train: TrainArgs, epoch_micro_batches: int, accumulation: int) -> int:
    if train.lr_warmup_fraction:
        return math.ceil(train.lr_warmup_fraction * epoch_micro_batches / accumulation)
    return train.lr_warmup_steps or 0


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
