"""How long the parts of a run take: for the time that is left, and for the length of a run with a time budget."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from litmoe.config import EvalArgs

FIRST_STEPS = 3
"""Steps at the start of a session that are not measured: the first ones compile, allocate and fill caches"""
MEASURED_STEPS = 10
"""The fewest steps that the speed of a run is computed from"""
MEASURED_SHARE = 0.1
"""The share of a time budget after which the number of steps is chosen. The rest has their speed only if the machine
does not change: a laptop, for example, becomes slower in the first minutes"""
SAVING_SPEED = 500e6
"""Assumed bytes per second of the last save, which no earlier save of the session may have measured"""


def seconds_since_start() -> float:
    """Return how long this command has been running, its imports included."""
    return time.time() - psutil.Process().create_time()


@dataclass
class Timing:
    """Seconds of the parts of a run, measured in this session."""

    steps: int = 0
    """Steps that were measured"""
    step_seconds: float = 0.0
    """Their sum, with data loading and logging, without evaluation and saving"""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The last validation with its sample, the last scores of HellaSwag, and the last report. Reports between the
    steps take so little time that only the one at the end counts"""
    all_steps: int = 0
    """Steps of this session"""

    def add_step(self, seconds: float) -> None:
        """Count a step."""
        self.all_steps += 1
        if self.all_steps > FIRST_STEPS:
            self.steps += 1
            self.step_seconds += seconds

    @contextmanager
    def measure(self, evaluation: str) -> Iterator[None]:
        """Measure an evaluation, ``validation`` or ``hellaswag``."""
        start = time.perf_counter()
        yield
        self.evaluation[evaluation] = time.perf_counter() - start

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of the measured steps; None before the first one."""
        return self.step_seconds / self.steps if self.steps else None

    def per_step(self, settings: EvalArgs) -> float:
        """Return the seconds of a step with its share of the evaluations. There must be measured steps."""
        assert self.seconds_per_step is not None
        shares = self.evaluation.get("validation", 0) / settings.interval
        shares += self.evaluation.get("hellaswag", 0) / (settings.hellaswag_interval or settings.interval)
        return self.seconds_per_step + shares

    def at_the_end(self, settings: EvalArgs, saved_bytes: int) -> float:
        """Return the seconds of the last evaluation and the last save.

        Args:
            settings: of the evaluations.
            saved_bytes: size of a checkpoint.
        """
        evaluations = sum(self.evaluation.values()) if settings.final_validation else 0
        return evaluations + saved_bytes / SAVING_SPEED

    def is_measured(self, budget: float, elapsed: float) -> bool:
        """Return whether enough of a time budget has passed, in seconds, to choose the number of steps."""
        return elapsed >= MEASURED_SHARE * budget and self.steps >= MEASURED_STEPS
