"""Where a loss or a gradient that is not finite came from."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litmoe.forward import Recomputed
from litmoe.train.model import Batch, Losses, PretrainingModel


def find_nonfinite_weights(gpt: GPT) -> str | None:
    """The name of the first parameter that is not finite, or None. Of a sharded model, within this process's part."""
    return next((name for name, parameter in gpt.named_parameters() if not _is_finite(_local(parameter))), None)


def find_first_nonfinite(
    fabric: L.Fabric,
    gpt: GPT,
    batches: Sequence[Batch],
    loss_of: Callable[[Losses], Tensor],
    recomputed: Recomputed = "none",
) -> str:
    """Computes the batches of a step again, uncompiled, until something is not finite, and says in words what it was:
    the output of a layer, or a gradient. Gradients are zero before and anything after.

    All processes must call it; each looks at its own batches, and all get the same words.
    """
    try:
        mine = _first_of(fabric, PretrainingModel(gpt, recomputed), batches, loss_of)
    except torch.OutOfMemoryError:
        mine = "there was no memory to find out where"
    if fabric.world_size == 1:
        return mine or _NOT_FOUND
    everyone: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everyone, mine)
    found = [f"{words} (process {rank})" for rank, words in enumerate(everyone) if words]
    return found[0] if found else _NOT_FOUND


_NOT_FOUND = "computed again step by step, everything was finite, so only all micro batches or devices together are not"


def _first_of(
    fabric: L.Fabric, model: PretrainingModel, batches: Sequence[Batch], loss_of: Callable[[Losses], Tensor]
) -> str | None:
    for number, batch in enumerate(batches, 1):
        where = f"in micro batch {number} of {len(batches)}"
        found: list[str] = []
        hooks = [
            module.register_forward_hook(_looks_at(name, found))
            for name, module in model.gpt.named_modules()
            if not isinstance(module, GPT | nn.ModuleDict | nn.ModuleList)
        ]
        try:
            with fabric.autocast():
                loss = loss_of(model(*batch))
        finally:
            for hook in hooks:
                hook.remove()
        if found:
            return f"the first output that went bad was that of {found[0]}, {where}"
        if not _is_finite(loss):
            return f"all layers' outputs are finite, but not the loss of them, {where}"
        loss.backward()
        # The backward goes from the last layer to the first.
        for name, parameter in reversed(list(model.gpt.named_parameters())):
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return f"the first gradient that went bad was that of {name}, {where}"
    return None


def _looks_at(name: str, found: list[str]) -> Callable[..., None]:
    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        if not found and not all(_is_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
            found.append(name)

    return look


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
