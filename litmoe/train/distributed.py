"""Several ranks in one run: strategy, reductions, FSDP sharding, and the errors that follow a lost rank.

FSDP is torch's own (``fully_shard``, called FSDP2) through Fabric's ``ModelParallelStrategy``. It also runs on CPUs. A
sharded parameter keeps its name and shape (a ``DTensor``), so that parameter groups, clipping and elementwise
optimizers are the same as on one device. Checkpoints are gathered into the layout of one device.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning as L
import psutil
import torch
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from litmoe.cli import UserError
from litmoe.config import RunSettings
from litmoe.hardware import is_sharded, processes
from litmoe.train.model import moe_layers


def make_strategy(settings: RunSettings, precision: str) -> DDPStrategy | ModelParallelStrategy:
    """Return Fabric's strategy for a run of several ranks.

    Args:
        precision: in Fabric's names, such as ``bf16-mixed``.
    """
    backend = None
    if torch.cuda.is_available() and not torch.distributed.is_nccl_available():  # Windows
        rank_zero_info("This torch has no NCCL. The GPUs communicate through gloo, which is slower.")
        backend = "gloo"
    if is_sharded(settings):
        devices, num_nodes = processes(settings)
        return ModelParallelStrategy(
            partial(shard, precision=precision),
            data_parallel_size=devices * num_nodes,
            tensor_parallel_size=1,
            process_group_backend=backend,
        )
    # The replacement of this argument does not exist in torch 2.10.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # Buffers are equal on all ranks, so broadcasting them before each forward would only cost time.
    # Gradients as views of the buckets that are exchanged: otherwise they would be in memory twice.
    return DDPStrategy(process_group_backend=backend, broadcast_buffers=False, gradient_as_bucket_view=True)


# --- Reductions


def sum_over_ranks(fabric: L.Fabric, value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op="sum"))


def mean_over_ranks(fabric: L.Fabric, value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, in floating point."""
    if not value.is_floating_point():
        # Apple's GPUs have no fp64.
        value = value.float() if value.device.type == "mps" else value.double()
    return cast(Tensor, fabric.all_reduce(value, reduce_op="mean"))


def any_rank(fabric: L.Fabric, *conditions: bool | Tensor) -> list[bool]:
    """Return for each condition whether it is true on any rank.

    Clocks, losses and signals differ between ranks, but all ranks must take the same decision. The CPU waits for the
    device once, however many conditions there are.
    """
    if fabric.world_size == 1:
        return [bool(condition) for condition in conditions]
    values = torch.stack([torch.as_tensor(condition, device=fabric.device).float() for condition in conditions])
    # Not Fabric's all_reduce, which would also make the device wait at a barrier.
    torch.distributed.all_reduce(values)
    return [bool(value) for value in values.tolist()]


# --- FSDP


def shard(model: nn.Module, mesh: DeviceMesh, *, precision: str) -> nn.Module:
    """Shard a ``PretrainingModel`` over all ranks, block by block. ``ModelParallelStrategy`` calls this.

    Load the weights before.
    """
    data_parallel = mesh["data_parallel"]
    # Autocast would keep a bf16 copy of every weight until the backward, so the blocks' weights are gathered as bf16.
    # Activations between blocks, embedding and output layer keep their type; gradients are summed in fp32.
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = mixed if precision == "bf16-mixed" else MixedPrecisionPolicy()
    # Nothing changes the output of a block or router in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    gpt = cast(GPT, model.gpt)
    for layer in moe_layers(gpt):
        # Routers compute in fp32, so their weights are not rounded to bf16. They are small enough to stay gathered.
        fully_shard(layer.gate, mesh=data_parallel, reshard_after_forward=False)
    for block in gpt.transformer.h:
        fully_shard(block, mesh=data_parallel, mp_policy=policy)
    fully_shard(model, mesh=data_parallel)
    return model


@torch.no_grad()
def gather_weights(gpt: GPT) -> dict[str, Tensor]:
    """Gather the state dict of a sharded model in LitGPT's keys. Every rank must call this.

    Returns:
        The weights on the CPU on rank 0, an empty dict on the other ranks.
    """
    for module in gpt.modules():
        if isinstance(module, FSDPModule):
            # Validation leaves gathered parameters behind.
            module.reshard()
    # A model without memory takes the gathered parameters, because its state-dict hooks write LitGPT's keys.
    with torch.device("meta"):
        target = type(gpt)(gpt.config)
    gathered: dict[int, nn.Parameter] = {}
    for name, parameter in gpt.named_parameters(remove_duplicate=False):
        # Tied embeddings are one parameter under two names.
        if id(parameter) not in gathered:
            gathered[id(parameter)] = nn.Parameter(_gather(parameter), requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        setattr(target.get_submodule(owner), attribute, gathered[id(parameter)])
    if torch.distributed.get_rank() != 0:
        return {}
    buffers = dict(gpt.named_buffers())
    weights = target.state_dict()
    for key in weights.keys() & buffers.keys():
        weights[key] = _gather(buffers[key])
    return weights


def gather_state(state: Any) -> Any:
    """Replace sharded tensors in an optimizer's ``state_dict`` by full ones on rank 0. Every rank must call this."""
    return tree_map_only(Tensor, _gather, state)


def shard_state(state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Shard the ``state`` of an optimizer, as one device saved it, like the parameters it belongs to."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]

    result: dict[int, dict[str, Any]] = {}
    for index, values in state.items():
        result[index] = {name: _shard_like(parameters[index], value) for name, value in values.items()}
    return result


def _shard_like(parameter: Tensor, value: Any) -> Any:
    # Step counters and unsharded parameters stay complete on every rank.
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    # A view would keep the full tensor alive.
    return sharded.clone()


def _gather(tensor: Tensor) -> Tensor:
    """Return the full tensor on the CPU on rank 0, and an empty one on the other ranks.

    The result is always new memory: the checkpoint is written in the background, while training changes unsharded
    tensors in place (step counters of the optimizer, selection biases of routers).
    """
    full = tensor.detach()
    if isinstance(full, DTensor):
        full = full.full_tensor()
    if torch.distributed.get_rank() == 0:
        return full.to("cpu", copy=True)
    return full.new_empty(0)


# --- A lost rank


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turn torch's errors about a lost rank into one message.

    A closed connection raises an error in the next exchange; it is translated here. A GPU that waits for a lost rank
    raises nothing: torchrun ends all processes of its machine, and Fabric's launcher does so when one of its children
    fails. Children that outlive their launcher end themselves.

    Raises:
        UserError: on the ranks that are left.
    """
    is_child_of_fabric = os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ
    if is_child_of_fabric:
        threading.Thread(target=_exit_if_launcher_died, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise UserError(f"{_lost_rank_message()}\n(torch says: {str(error).splitlines()[0]})") from None


def _is_lost_connection(error: RuntimeError) -> bool:
    # Torch has exception classes for NCCL and the store. Errors of gloo are known by their text only.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "by peer" in str(error)


def _lost_rank_message() -> str:
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    return (
        f"rank {rank} of {os.environ.get('WORLD_SIZE', 1)} lost the connection to another rank of this run: that"
        " rank crashed, or its machine is unreachable. See the log above for the cause. The same command with"
        " --resume auto continues from the newest checkpoint, also on another number of devices."
    )


def _exit_if_launcher_died(launcher: int) -> None:
    # The parent id changes on POSIX when the parent ends; Windows keeps it, so look the process up as well.
    while os.getppid() == launcher and psutil.pid_exists(launcher):
        time.sleep(5)
    # The run may be finished, or a closed connection may report the cause.
    time.sleep(10)
    print(f"error: {_lost_rank_message()}", file=sys.stderr, flush=True)
    os._exit(1)
