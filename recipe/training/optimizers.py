"""Parameter groups, and the optimizer that a run file names."""

from copy import deepcopy
from typing import Any

import torch
from litgpt.utils import instantiate_torch_optimizer
from torch import nn

from custom_moe import MoE
from recipe.cli import UserError


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and the rest, which do not (norms, embeddings, biases, routers).

    A tied output head is the embedding, so it does not decay. Each trainable parameter stands in exactly one group.

    Returns:
        ``[{"params": [...]}, {"params": [...], "weight_decay": 0.0}]``, without empty groups.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    routers = {id(module.gate) for module in model.modules() if isinstance(module, MoE)}
    seen: set[int] = set()
    # Embeddings first: a parameter that is shared with the output head belongs to them.
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            keep = (
                isinstance(module, nn.Embedding)
                or id(module) in routers
                or parameter.ndim < 2  # norms, and biases of linear layers
                or name.endswith("bias")  # biases of experts are stacked, so they have two dimensions
            )
            (not_decayed if keep else decayed).append(parameter)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert total == sum(parameter.numel() for parameter in decayed + not_decayed)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(optimizer: dict[str, Any], model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of a run file over the model's parameter groups.

    Args:
        optimizer: ``class_path`` and ``init_args``, as ``litgpt.utils.instantiate_torch_optimizer`` takes them.
        fused: use the fused kernel where the optimizer has one.

    Raises:
        UserError: for an optimizer that refuses its arguments or these parameters.
    """
    specification = deepcopy(optimizer)  # LitGPT writes `fused` into it, and it is saved with the run
    specification["init_args"] = {k: v for k, v in (specification.get("init_args") or {}).items() if v is not None}
    groups = parameter_groups(model)
    try:
        result: torch.optim.Optimizer = instantiate_torch_optimizer(specification, groups, fused=fused)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the optimizer {optimizer['class_path']} refuses these settings or this model: {error}"
        ) from None
    for group in result.param_groups:
        group["initial_lr"] = group["lr"]
    return result


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Gives each group ``factor`` times its own rate, so that groups with different rates keep their ratio."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the moments but keeps this run's settings: LitGPT's resume took weight decay and betas from the
    checkpoint while the learning rate came from the run file, so a changed setting was half in force."""
    current = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in current] != [len(group["params"]) for group in state["param_groups"]]:
        raise UserError(
            "the checkpoint's optimizer state belongs to another set of parameters; resume with the model and the"
            " optimizer that the run was started with."
        )
    optimizer.load_state_dict({"state": state["state"], "param_groups": current})
