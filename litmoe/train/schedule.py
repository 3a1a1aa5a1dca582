"""The length of a run and the learning rate of each step: pure functions of the settings."""

import math
from dataclasses import dataclass

from litgpt.args import TrainArgs

from litmoe.cli import UserError
from litmoe.config import ScheduleSettings

UNKNOWN = 2**40
"""Steps of a run with a time budget before it has measured its speed: so many that the learning rate does not decay"""


@dataclass(frozen=True)
class Plan:
    """The length of a run from its start, or from the checkpoint it was resumed from."""

    micro_batches: int
    """Number of micro batches per device that remain. Each is one forward and backward."""
    accumulation: int
    """Micro batches per device in an optimizer step. The last step may have fewer."""
    warmup_steps: int
    tokens_per_micro_batch: int
    """Over all devices"""
    epochs: float
    """Passes over the training set at the end of the run"""
    ended_by: str
    """The setting that limits the run, with its value"""
    first_step: int = 0
    """Optimizer steps done before"""
    first_tokens: int = 0
    """Tokens of those steps, over all devices"""

    @property
    def steps(self) -> int:
        """Optimizer steps of the complete run; ``UNKNOWN`` until a time budget has become a number of steps."""
        return self.first_step + math.ceil(self.micro_batches / self.accumulation)

    @property
    def is_known(self) -> bool:
        """Whether the number of steps is known."""
        return self.steps < UNKNOWN

    def steps_text(self, form: str = "") -> str:
        """Return the number of steps for messages, in a format such as ``,``."""
        return format(self.steps, form) if self.is_known else "?"

    @property
    def tokens(self) -> int:
        """Tokens of the complete run, over all devices."""
        return self.first_tokens + self.micro_batches * self.tokens_per_micro_batch

    def micro_batches_in(self, step: int) -> int:
        """Return the number of micro batches of optimizer step ``step``, counted from 0."""
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
    chosen_steps: int | None = None,
) -> Plan:
    """Convert ``max_tokens``, ``max_steps`` and ``epochs`` into a number of micro batches. The smallest limit wins.

    Args:
        train: LitGPT's training settings.
        devices: number of devices over all machines.
        seq_length: tokens per sequence that have a target.
        epoch_sequences: number of sequences in the training set.
        step, tokens: optimizer steps and tokens done before. A resumed run trains on the remaining tokens, also with
            another size of micro batches.
        position: the current epoch, and the number of its sequences that were used.
        chosen_steps: length of a run with a time budget, in place of the limits in ``train``; see ``UNKNOWN``.

    Raises:
        UserError: the run is shorter than one micro batch.
    """
    accumulation = train.gradient_accumulation_iters(devices)
    tokens_per_micro_batch = train.micro_batch_size * seq_length * devices
    epoch, used_sequences = position
    # Micro batches over all devices: they share one sequence of micro batches, which an epoch ends for all of them.
    per_epoch = epoch_sequences // train.micro_batch_size
    in_this_epoch = (epoch_sequences - used_sequences) // train.micro_batch_size
    # The number of micro batches that remain under each limit.
    limits: dict[str, int] = {}
    if chosen_steps:
        limits["its time"] = (chosen_steps - step) * accumulation
    if train.max_tokens and not chosen_steps:
        limits[f"max_tokens {train.max_tokens:,}"] = (train.max_tokens - tokens) // tokens_per_micro_batch
    if train.max_steps and not chosen_steps:
        limits[f"max_steps {train.max_steps:,}"] = (train.max_steps - step) * accumulation
    if train.epochs and not chosen_steps:
        limits[f"epochs {train.epochs}"] = (in_this_epoch + (train.epochs - epoch - 1) * per_epoch) // devices
    ended_by = min(limits, key=lambda name: limits[name])
    micro_batches = max(limits[ended_by], 0)
    # A resumed run may be at its end already.
    if micro_batches < 1 and not step:
        raise UserError(
            f"{ended_by} is less than one micro batch of {tokens_per_micro_batch:,} tokens"
            f" (micro_batch_size x sequence length x devices); expected at least that many tokens."
        )
    # The last step may have fewer micro batches.
    steps = step + math.ceil(micro_batches / accumulation)
    warmup_steps = train.lr_warmup_steps or 0
    if train.lr_warmup_fraction:
        # LitGPT's: a fraction of an epoch.
        warmup_steps = math.ceil(train.lr_warmup_fraction * epoch_sequences / train.global_batch_size)
    return Plan(
        micro_batches=micro_batches,
        accumulation=accumulation,
        # The last step has the minimum.
        warmup_steps=min(warmup_steps, steps - 1),
        tokens_per_micro_batch=tokens_per_micro_batch,
        # The current epoch is complete, epoch + 1, after in_this_epoch micro batches.
        epochs=epoch + 1 + (micro_batches * devices - in_this_epoch) / per_epoch,
        ended_by=ended_by,
        first_step=step,
        first_tokens=tokens,
    )


def learning_rate(
    step: int, *, peak: float, minimum: float, warmup_steps: int, steps: int, schedule: ScheduleSettings
) -> float:
    """Return the learning rate of update ``step``, counted from 0: linear warm-up, then decay to ``minimum``.

    LitGPT's ``get_lr`` starts at 0 and never reaches ``min_lr``. Here update 0 has ``peak / warmup_steps``, update
    ``warmup_steps - 1`` has ``peak``, and the last one has ``minimum``. With ``wsd`` the rate stays at ``peak``, and
    then decreases linearly in the last ``decay_fraction`` of the updates.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    # A cosine decays in all steps after the warm-up.
    decay_steps = steps - warmup_steps
    if schedule.name == "wsd":
        # At least one step, so that the run ends at the minimum, and at most those after the warm-up.
        decay_steps = min(max(round(schedule.decay_fraction * steps), 1), decay_steps)
    progress = min(1.0, (step + 1 - (steps - decay_steps)) / decay_steps)
    if progress <= 0:
        return peak
    if schedule.name == "wsd":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return minimum + remaining * (peak - minimum)
