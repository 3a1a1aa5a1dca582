"""FSDP: each process keeps a part of every parameter, and whole ones only while their block computes.

Torch's own (``fully_shard``, called FSDP2), by Fabric's ``ModelParallelStrategy``: it runs on CPUs too, and a parameter
stays a tensor of its own name and shape (a ``DTensor``), so that parameter groups, clipping and elementwise optimizers
are those of one device. What is saved is gathered here, in one device's layout. Weights are loaded before sharding.
"""

from typing import Any

import torch
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from litmoe.train.model import PretrainingModel


def shard(model: PretrainingModel, mesh: DeviceMesh, *, precision: str) -> nn.Module:
    """Divides a model over all processes, block by block; what ``ModelParallelStrategy`` calls."""
    data_parallel = mesh["data_parallel"]
    # Autocast would keep a bf16 copy of every weight until the backward. So the blocks' weights travel as bf16;
    # activations between blocks, embedding and output layer stay as they are, and gradients are summed in fp32.
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = mixed if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for block in model.gpt.transformer.h:
        fully_shard(block, mesh=data_parallel, mp_policy=policy)
    fully_shard(model, mesh=data_parallel)
    return model


@torch.no_grad()
def gathered_weights(gpt: GPT) -> dict[str, Tensor]:
    """The state dict of a sharded model in LitGPT's keys, on the CPU; each process must call this.

    Returns:
        The weights in the first process, nothing in the others.
    """
    for module in gpt.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what validation has left whole
    with torch.device("meta"):
        whole = type(gpt)(gpt.config)  # its hooks write LitGPT's keys
    copies: dict[int, nn.Parameter] = {}  # tied embeddings are one parameter under two names
    for name, parameter in gpt.named_parameters(remove_duplicate=False):
        if id(parameter) not in copies:
            copies[id(parameter)] = nn.Parameter(_gathered(parameter), requires_grad=False)
        owner, _, last = name.rpartition(".")
        setattr(whole.get_submodule(owner), last, copies[id(parameter)])
    if torch.distributed.get_rank() != 0:
        return {}
    buffers = dict(gpt.named_buffers())
    return {key: _gathered(buffers[key]) if key in buffers else value for key, value in whole.state_dict().items()}


def gathered_state(state: Any) -> Any:
    """What an optimizer's ``state_dict`` holds, with whole tensors in the first process; each must call this."""
    if isinstance(state, dict):
        return {key: gathered_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered_state(value) for value in state)
    return _gathered(state) if isinstance(state, Tensor) else state


def sharded_state(state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The ``state`` of an optimizer as one device saved it, each process with its part of what is sharded."""
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(parameter: Tensor, value: Any) -> Any:
        if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
            return value
        value = value.to(parameter.device)
        mine = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return mine.clone()  # a view would keep the whole alive

    return {
        index: {name: part(parameters[index], value) for name, value in values.items()}
        for index, values in state.items()
    }


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not, on the CPU in the first process; an empty one in the others.

    It is always new memory: the checkpoint is written in the background, while training changes in place what every
    process has whole (an optimizer's step counters, the routers' selection biases).
    """
    whole = tensor.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    return whole.to("cpu", copy=True) if torch.distributed.get_rank() == 0 else whole.new_empty(0)
