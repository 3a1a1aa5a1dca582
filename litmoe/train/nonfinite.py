"""Finds the layer that produced a loss or gradient that is NaN or infinite."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from litmoe.forward import Recomputed
from litmoe.train.model import Batch, Losses, PretrainingModel

_NOT_FOUND = "computed again, each micro batch alone is finite; only their sum, or the sum over devices, is not"


def find_nonfinite_weights(gpt: GPT) -> str | None:
    """Return the name of the first parameter that is not finite, or None. Only checks this rank's shards."""
    for name, parameter in gpt.named_parameters():
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not _is_finite(shard):
            return name
    return None


def find_first_nonfinite(
    fabric: L.Fabric,
    gpt: GPT,
    batches: Sequence[Batch],
    loss_of: Callable[[Losses], Tensor],
    recomputed: Recomputed = "none",
) -> str:
    """Compute the batches of a step again until something is not finite, and describe it for an error message.

    All ranks must call it. Each one checks its own batches, and all return the same text.

    Args:
        fabric: for autocast and communication.
        gpt: not compiled, with zero gradients. Afterwards its gradients are undefined.
        batches: the micro batches of this rank.
        loss_of: combines the losses of a micro batch.
        recomputed: the activation checkpointing of the run.
    """
    try:
        # A compiled model would hide the outputs of its layers.
        result = _first_nonfinite_here(fabric, PretrainingModel(gpt, recomputed), batches, loss_of)
    except torch.OutOfMemoryError:
        result = "there was not enough memory to find out where"
    # All ranks raise the same error, whichever of them has the cause.
    if fabric.world_size > 1:
        results: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(results, result)
        described = [f"{text} (process {rank})" for rank, text in enumerate(results) if text]
        result = described[0] if described else None
    return result or _NOT_FOUND


def _first_nonfinite_here(
    fabric: L.Fabric, model: PretrainingModel, batches: Sequence[Batch], loss_of: Callable[[Losses], Tensor]
) -> str | None:
    for number, batch in enumerate(batches, 1):
        place = f"in micro batch {number} of {len(batches)}"
        with _OutputCheck(model.gpt) as outputs, fabric.autocast():
            loss = loss_of(model(*batch))
        # Checked before the loss, because it names the layer.
        if outputs.first_nonfinite:
            return f"the first output that went bad was that of {outputs.first_nonfinite}, {place}"
        if not _is_finite(loss):
            return f"the outputs of all layers are finite, but the loss is not, {place}"
        loss.backward()
        # The backward runs from the last layer to the first.
        for name, parameter in reversed(list(model.gpt.named_parameters())):
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return f"the first gradient that went bad was that of {name}, {place}"
    return None


class _OutputCheck:
    """Context manager that records the name of the first layer with an output that is not finite."""

    def __init__(self, gpt: GPT) -> None:
        self.first_nonfinite: str | None = None
        self._gpt = gpt
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "_OutputCheck":
        for name, module in self._gpt.named_modules():
            # Containers are not called, and the output of the model itself is that of its last layer.
            if not isinstance(module, GPT | nn.ModuleDict | nn.ModuleList):
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.first_nonfinite is not None:
                return
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, Tensor) and not _is_finite(tensor):
                    self.first_nonfinite = name

        return check


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
