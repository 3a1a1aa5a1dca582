"""The numbers of a log line: sums between two log lines, over micro batches and ranks, and the row made of them.

To add a metric, add an entry to the dictionary in ``training_row``. It becomes a column of ``metrics.csv`` and a curve
in every other logger; metrics files without the column stay readable.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from custom_moe import load_statistics
from litmoe.train.distributed import mean_over_ranks
from litmoe.train.model import Losses


class MetricAccumulator:
    """Sums over the micro batches since the last log line. They stay on the device until ``means`` reads them."""

    def __init__(self) -> None:
        self._sums: Losses | None = None
        # Of this rank. A float, because a resumed run may count fractions of its own micro batches.
        self.micro_batches: float = 0
        self.tokens = 0
        """Tokens trained on, over all ranks"""
        self._seconds_before_resume = 0.0
        self._start = time.perf_counter()

    def start_clock(self) -> None:
        """Start to measure throughput. A resumed run adds the seconds from its checkpoint."""
        self._start = time.perf_counter() - self._seconds_before_resume

    def add(self, losses: Losses) -> None:
        """Add one micro batch."""
        # New tensors instead of in-place sums, so that a `state_dict` taken earlier keeps its values.
        detached = [value.detach() for value in losses]
        if self._sums is not None:
            detached = [total + value for total, value in zip(self._sums, detached, strict=True)]
        self._sums = Losses(*detached)
        self.micro_batches += 1

    def means(self, fabric: L.Fabric) -> Losses:
        """Return means over micro batches and ranks. The CPU waits for the device."""
        assert self._sums is not None
        # All ranks must call this together, with equally many micro batches each.
        return Losses(*(mean_over_ranks(fabric, value / self.micro_batches) for value in self._sums))

    @property
    def seconds(self) -> float:
        """Seconds since the last log line, without pauses."""
        return time.perf_counter() - self._start

    def reset_throughput(self) -> None:
        """Exclude the time so far (compilation) from throughput; keep the losses."""
        self.tokens = 0
        self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: evaluation and saving do not count as training time."""
        # Moving the start is enough: `seconds` is the distance to it.
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, so that a run that is resumed between two log lines logs the same numbers."""
        return {
            "sums": None if self._sums is None else self._sums._asdict(),
            "micro_batches": self.micro_batches,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def load_state_dict(
        self, state: dict[str, Any], device: torch.device, *, rank_ratio: float, micro_batch_ratio: float
    ) -> None:
        """Restore the sums of ``state`` on every rank.

        Args:
            state: what ``state_dict`` returned, with sums averaged over its ranks.
            rank_ratio: number of ranks of the saved run, divided by the present number.
            micro_batch_ratio: micro-batch size of the saved run, divided by the present size.
        """
        self.micro_batches = state["micro_batches"]
        self.tokens = state["tokens"]
        self._seconds_before_resume = state["seconds"]
        if state["sums"] is None:
            return
        saved = state["sums"]
        if not isinstance(saved, dict):
            # 0.1.0 saved a list of the first five fields.
            saved = dict(zip(Losses._fields[:5], saved, strict=True))
        # A checkpoint of another version may lack a field. The first mean after the resume is then too small.
        zero = torch.zeros_like(saved["cross_entropy"])
        self._sums = Losses(*(saved.get(name, zero).to(device) for name in Losses._fields))
        self.convert(rank_ratio=rank_ratio, micro_batch_ratio=micro_batch_ratio)

    def convert(self, *, rank_ratio: float = 1, micro_batch_ratio: float = 1) -> None:
        """Convert the sums to another number of ranks and another size of micro batches.

        An example: 10 micro batches of 8 sequences on each of 2 ranks are 160 sequences. One rank with micro batches of
        4 needs 40 for them, so 1 old micro batch equals 2 * 2 = 4 present ones: ``micro_batches`` and the sums of
        losses (means over a micro batch) are multiplied by 4. Expert counts are sums over sequences, so a smaller micro
        batch changes nothing; they are multiplied by the 2 ranks only.

        Args:
            rank_ratio: old number of ranks, divided by the present one.
            micro_batch_ratio: old size of a micro batch, divided by the present one.
        """
        present_per_old = rank_ratio * micro_batch_ratio
        if self._sums is None or present_per_old == 1:
            return
        self.micro_batches *= present_per_old
        expert_counts = self._sums.expert_counts * rank_ratio
        sums = Losses(*(value * present_per_old for value in self._sums))
        self._sums = sums._replace(expert_counts=expert_counts)


def training_row(
    fabric: L.Fabric,
    metrics: MetricAccumulator,
    *,
    learning_rate: float,
    gradient_norm: Tensor,
    step_tokens: int,
    total_tokens: int,
    epoch: int,
    flops_per_token: int,
    peak_flops: float | None,
) -> dict[str, Any]:
    """Return the numbers of one log line, by column.

    Args:
        step_tokens: tokens of the last step, over all ranks.
        flops_per_token: forward and backward.
        peak_flops: of one device; None where unknown, then there is no MFU.
    """
    means = metrics.means(fabric)
    # Reading the loss waits for the device, so that the seconds are those of finished work.
    train_loss = float(means.cross_entropy)
    tokens_per_second = metrics.tokens / metrics.seconds
    row: dict[str, Any] = {
        "train_loss": train_loss,
        "learning_rate": learning_rate,
        "epoch": epoch,
        "iter_tokens": step_tokens,
        "total_tokens": total_tokens,
        "tokens_per_second": tokens_per_second,
        "grad_norm": float(gradient_norm),
    }
    # The share of the devices' peak that went into the model, without recomputed activations.
    if peak_flops is not None:
        row["mfu"] = flops_per_token * tokens_per_second / (peak_flops * fabric.world_size)
    has_experts = means.expert_counts.numel() > 0
    if has_experts:
        row["load_balancing_loss"] = float(means.load_balancing)
        row["z_loss"] = float(means.z_loss)
        row |= _expert_columns(means)
    return row


def _expert_columns(means: Losses) -> dict[str, float]:
    """Return ``NAME/layer_N`` for each statistic and MoE layer."""
    load = load_statistics(means.expert_counts)
    statistics = {
        "expert_load_max": load.max_over_mean,
        "expert_load_min": load.min_over_mean,
        "expert_load_entropy": load.entropy,
        "dead_experts": load.dead,
        "router_confidence": means.router_confidence,
    }
    # One column for each layer, because a mean over layers would hide a layer with dead experts.
    # One transfer from the device.
    by_layer = torch.stack(list(statistics.values()), dim=1).tolist()
    columns = {}
    for layer, values in enumerate(by_layer):
        for name, value in zip(statistics, values, strict=True):
            columns[f"{name}/layer_{layer}"] = value
    return columns
