"""What is summed up between two log lines, over micro batches and over devices."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from litmoe.train.model import Losses


class Interval:
    """Sums over the micro batches since the last log line, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: Losses | None = None
        self.micro_batches: float = 0
        self.tokens = 0
        """Trained on, over all devices"""
        self._before = 0.0
        self._start = time.perf_counter()

    def begin(self) -> None:
        """Starts the clock, after what it showed when it was saved."""
        self._start = time.perf_counter() - self._before

    def add(self, losses: Losses) -> None:
        """Adds one micro batch's. Makes new tensors, so that a ``state_dict`` stays what it was."""
        detached = Losses(*(value.detach() for value in losses))
        self._sums = (
            detached if self._sums is None else Losses(*(a + b for a, b in zip(self._sums, detached, strict=True)))
        )
        self.micro_batches += 1

    def means(self, fabric: L.Fabric) -> Losses:
        """Means over micro batches and devices; waits for the device."""
        assert self._sums is not None
        return Losses(*(mean_over_devices(fabric, value / self.micro_batches) for value in self._sums))

    @property
    def seconds(self) -> float:
        """Since the interval began, without the pauses."""
        return time.perf_counter() - self._start

    def leave_out(self) -> None:
        """What was so far is no measure of the speed; its losses count."""
        self.tokens, self._start = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and saving are no training time."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def state_dict(self) -> dict[str, Any]:
        """For a run that is resumed between two log lines."""
        return {
            "sums": None if self._sums is None else list(self._sums),
            "micro_batches": self.micro_batches,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def load_state_dict(
        self, state: dict[str, Any], device: torch.device, *, devices: float = 1, micro_batch: float = 1
    ) -> None:
        """Goes on from ``state``, of any number of devices: each then has the first one's sums.

        Args:
            devices: how many times as many there were.
            micro_batch: how many times as large it was.
        """
        self._sums = None if state["sums"] is None else Losses(*(value.to(device) for value in state["sums"]))
        self.micro_batches, self.tokens = state["micro_batches"], state["tokens"]
        if (share := devices * micro_batch) != 1:  # what is summed up counts for as many of the present micro batches
            self.micro_batches *= share
            if self._sums is not None:
                counts = self._sums.expert_counts * devices
                self._sums = Losses(*(value * share for value in self._sums))._replace(expert_counts=counts)
        self._before = state["seconds"]


def sum_over_devices(fabric: L.Fabric, value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op="sum"))


def mean_over_devices(fabric: L.Fabric, value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; of whole numbers in floating point."""
    value = value if value.is_floating_point() else value.double()
    return cast(Tensor, fabric.all_reduce(value, reduce_op="mean"))
