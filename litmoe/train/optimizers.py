"""Parameter groups, and the optimizer that a run file names."""

from copy import deepcopy
from typing import Any

import torch
from litgpt.model import CausalSelfAttention
from litgpt.utils import instantiate_torch_optimizer
from torch import Tensor, nn

from custom_moe import MoE
from custom_moe.experts import Experts
from litmoe.cli import UserError
from litmoe.train.compiling import missing_for_compile
from litmoe.train.muon import Muon


def parameter_groups(model: nn.Module, *, muon: bool = False) -> list[dict[str, Any]]:
    """What each trainable parameter is; it stands in exactly one group.

    Matrices decay; norms, embeddings, biases and routers do not, nor a tied output head, which is the embedding. For
    Muon the matrices within the blocks are apart, in groups that say how a parameter divides into matrices (``parts``):
    the experts' gate above up, and queries, keys and values, which LitGPT keeps in one matrix and which were found to
    train better each by itself (https://kellerjordan.github.io/posts/muon/).

    Returns:
        Groups for the optimizer, none empty: the matrices, then the rest with ``weight_decay`` 0.
    """
    decayed: dict[tuple[int, ...], list[nn.Parameter]] = {}  # by parts; () for AdamW
    not_decayed: list[nn.Parameter] = []
    routers = {id(module.gate) for module in model.modules() if isinstance(module, MoE)}
    qkv_parts = {
        id(module.qkv): (module.config.n_head, module.config.n_query_groups, module.config.n_query_groups)
        for module in model.modules()
        if isinstance(module, CausalSelfAttention)
    }
    seen: set[int] = set()
    # Embeddings first: a parameter that is shared with the output head belongs to them.
    for path, module in sorted(model.named_modules(), key=lambda item: not isinstance(item[1], nn.Embedding)):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if (
                isinstance(module, nn.Embedding)
                or id(module) in routers
                or parameter.ndim < 2  # norms, and biases of linear layers
                or name.endswith("bias")  # biases of experts are stacked, so they have two dimensions
            ):
                not_decayed.append(parameter)
                continue
            parts: tuple[int, ...] = ()
            if muon and path.rpartition(".")[2] != "lm_head":
                gate_above_up = isinstance(module, Experts) and name.startswith("fc_")
                parts = (1, 1) if gate_above_up else qkv_parts.get(id(module), (1,)) if name == "weight" else (1,)
            decayed.setdefault(parts, []).append(parameter)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    groups: list[dict[str, Any]] = [
        {"params": decayed[parts], **({"parts": parts} if parts else {})} for parts in sorted(decayed, reverse=True)
    ]
    groups += [{"params": not_decayed, "weight_decay": 0.0}] if not_decayed else []
    assert total == sum(parameter.numel() for group in groups for parameter in group["params"])
    return groups


def is_muon(optimizer: dict[str, Any]) -> bool:
    """Whether a run file's optimizer (``class_path`` and ``init_args``) is our Muon."""
    return bool(optimizer["class_path"] == f"{Muon.__module__}.{Muon.__name__}")


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
    class_path = optimizer["class_path"]
    groups = parameter_groups(model, muon=is_muon(optimizer))
    try:
        result: torch.optim.Optimizer = instantiate_torch_optimizer(specification, groups, fused=fused)
    except (TypeError, ValueError) as error:
        hint = ""
        if class_path == "torch.optim.Muon":
            hint = f"; {Muon.__module__}.{Muon.__name__} takes whole models"
        raise UserError(f"the optimizer {class_path} refuses these settings or this model: {error}{hint}") from None
    for group in result.param_groups:
        group["initial_lr"] = float(group["lr"])
    return result


def check_optimizer(class_path: str, device_type: str) -> None:
    """Raises ``UserError`` for an optimizer that lacks a compiler here: torchao's compile their step."""
    if class_path.startswith("torchao.") and (missing := missing_for_compile(device_type)):
        raise UserError(
            f"{class_path} compiles its step, but {missing}. Install that, or take"
            " --optimizer torch.optim.AdamW, which needs 4 times the memory for its state."
        )


def rounding_note(optimizer: dict[str, Any], precision: str, *, sharded: bool = False) -> str | None:
    """A line for a run whose optimizer rounds each update of 16-bit weights to the nearest; None for others.

    Args:
        optimizer: ``class_path`` and ``init_args``.
        precision: that the run computes in, in Fabric's names.
        sharded: whether by FSDP, which takes none of the optimizers that round stochastically.
    """
    rounds_stochastically = (optimizer.get("init_args") or {}).get("bf16_stochastic_round")
    if precision not in ("bf16-true", "16-true") or is_muon(optimizer) or rounds_stochastically:
        return None
    stochastic = (
        " --optimizer torchao.optim.AdamW8bit --optimizer.init_args.bf16_stochastic_round true, or --optimizer"
        " litmoe.train.muon.Muon --optimizer.init_args.lr 0.02, rounds stochastically, which keeps them on average."
    )
    return (
        f"warning: in {precision}, {optimizer['class_path']} loses weight decay and small steps: each update is rounded"
        " to 16 bits, and a change of less than about 0.3% of a weight is dropped. --precision bf16-mixed keeps the"
        f" weights in fp32.{'' if sharded else stochastic}"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Gives each group ``factor`` times its own rate, so that groups with different rates keep their ratio."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao compiles its step: a number would be a constant in it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
