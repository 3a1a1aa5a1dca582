"""Parameter groups, and the optimizer that a run file names by its class path.

Any ``torch.optim.Optimizer`` works. A class can declare what the rest of the program should know about it:

- ``parameter_groups(model)``, a class method: its own groups. Without it, it gets two: with and without weight decay.
- ``rounds_stochastically = True``: it can train 16-bit weights without losing small updates.
- ``supports_fsdp = False``: it needs complete matrices, which FSDP shards.
- ``update_flops(groups)``, a static method: operations of one step, for ``--plan``, if they are worth counting.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pydoc import locate
from typing import Any, NamedTuple

import torch
from lightning.fabric.wrappers import _FabricOptimizer
from litgpt.utils import instantiate_torch_optimizer
from torch import Tensor, nn

from litmoe.cli import UserError
from litmoe.hardware import missing_for_compile

# torch's own Muon takes matrices only.
REPLACEMENTS = {"torch.optim.Muon": "; litmoe.train.muon.Muon trains complete models"}
# Weights in 16 bits need stochastic rounding: an update is often smaller than half of their precision.
EIGHT_BIT_ADAM = (
    *("--precision", "bf16-true", "--optimizer.class_path", "torchao.optim.AdamW8bit"),
    *("--optimizer.init_args.bf16_stochastic_round", "true"),
)
"""Flags for the optimizer that needs the least memory"""


@dataclass(frozen=True)
class OptimizerTraits:
    """What is known about an optimizer class, see the module's docstring."""

    parameter_groups: Callable[[nn.Module], list[dict[str, Any]]]
    rounds_stochastically: bool
    supports_fsdp: bool
    update_flops: Callable[[Iterable[dict[str, Any]]], int] | None
    compiles_step: bool = False
    """``step`` needs torch.compile, and its state is 8-bit (torchao)"""


def optimizer_traits(optimizer: dict[str, Any]) -> OptimizerTraits:
    """Return the traits of a run file's optimizer.

    Args:
        optimizer: ``class_path`` and ``init_args``.
    """
    class_path = optimizer["class_path"]
    optimizer_class: Any = locate(class_path)
    # Classes of other packages can't declare anything for us; these are the known exceptions.
    is_torchao = class_path.startswith("torchao.")
    needs_matrices = is_torchao or class_path == "torch.optim.Muon"
    init_args = optimizer.get("init_args") or {}
    # torchao rounds stochastically only if the run file asks for it.
    torchao_rounds = bool(init_args.get("bf16_stochastic_round"))
    return OptimizerTraits(
        parameter_groups=getattr(optimizer_class, "parameter_groups", parameter_groups),
        rounds_stochastically=getattr(optimizer_class, "rounds_stochastically", torchao_rounds),
        supports_fsdp=getattr(optimizer_class, "supports_fsdp", not needs_matrices),
        update_flops=getattr(optimizer_class, "update_flops", None),
        compiles_step=is_torchao,
    )


class ParameterUse(NamedTuple):
    """A trainable parameter and its place in the model."""

    parameter: nn.Parameter
    name: str
    """Within its module: ``weight``"""
    module: nn.Module
    path: str
    """Of the module, such as ``gpt.transformer.h.0.attn.qkv``; without ``gpt.`` for a bare ``GPT``, as in ``--plan``"""
    decays: bool
    """Whether weight decay applies"""


def parameter_uses(model: nn.Module) -> Iterator[ParameterUse]:
    """Yield each trainable parameter once.

    Weight decay applies to matrices. It does not apply to norms, biases, embeddings (also not to an output head that is
    tied to them) and routers.
    """
    seen: set[nn.Parameter] = set()
    # Embeddings first, so that a matrix shared with the output head counts as an embedding.
    modules = sorted(model.named_modules(), key=lambda item: not isinstance(item[1], nn.Embedding))
    for path, module in modules:
        # Routers are called `gate` in LitGPT's models. One of the user's own may have modules inside.
        is_exempt = isinstance(module, nn.Embedding) or "gate" in path.split(".")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                # Stacked biases of experts have two dimensions.
                is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
                yield ParameterUse(parameter, name, module, path, decays=is_matrix and not is_exempt)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups: parameters with weight decay, and those without (``weight_decay`` 0). None is empty."""
    uses = list(parameter_uses(model))
    decayed = [use.parameter for use in uses if use.decays]
    not_decayed = [use.parameter for use in uses if not use.decays]
    return without_empty_groups({"params": decayed}, {"params": not_decayed, "weight_decay": 0.0})


def without_empty_groups(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups that have parameters: a model may have none of a kind."""
    return [group for group in groups if group["params"]]


def make_optimizer(
    optimizer: dict[str, Any], model: nn.Module, *, fused: bool, embedding_lr_factor: float = 1.0
) -> torch.optim.Optimizer:
    """Return the optimizer of a run file over the model's parameter groups.

    Args:
        optimizer: ``class_path`` and ``init_args``, as ``litgpt.utils.instantiate_torch_optimizer`` takes them.
        fused: use the fused kernel if the optimizer has one.
        embedding_lr_factor: learning rate of the input embedding, as a multiple of what its group has.

    Raises:
        UserError: the optimizer rejects its arguments or these parameters.
    """
    # LitGPT writes `fused` into it, and it is saved with the run.
    specification = deepcopy(optimizer)
    init_args = specification.get("init_args") or {}
    # jsonargparse lists all arguments of the class; null means its own default.
    specification["init_args"] = {name: value for name, value in init_args.items() if value is not None}
    groups = optimizer_traits(optimizer).parameter_groups(model)
    groups = with_own_embedding_rate(groups, model, embedding_lr_factor)
    try:
        result: torch.optim.Optimizer = instantiate_torch_optimizer(specification, groups, fused=fused)
    except (TypeError, ValueError) as error:
        class_path = optimizer["class_path"]
        hint = REPLACEMENTS.get(class_path, "")
        raise UserError(f"the optimizer {class_path} rejects these settings or this model: {error}{hint}") from None
    # The schedule scales these rates.
    for group in result.param_groups:
        group["initial_lr"] = float(group["lr"]) * group.pop("lr_factor", 1.0)
    return result


def with_own_embedding_rate(groups: list[dict[str, Any]], model: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Move the input embedding into a group of its own with ``lr_factor``, unless the factor is 1."""
    if factor == 1:
        return groups
    embeddings = {use.parameter for use in parameter_uses(model) if isinstance(use.module, nn.Embedding)}
    result = []
    for group in groups:
        own = [parameter for parameter in group["params"] if parameter in embeddings]
        rest = [parameter for parameter in group["params"] if parameter not in embeddings]
        result += without_empty_groups({**group, "params": rest}, {**group, "params": own, "lr_factor": factor})
    return result


def check_optimizer(optimizer: dict[str, Any], device_type: str) -> None:
    """Raise ``UserError`` for an optimizer that compiles its step on a machine without a compiler."""
    if not optimizer_traits(optimizer).compiles_step:
        return
    missing = missing_for_compile(device_type)
    if missing:
        raise UserError(
            f"{optimizer['class_path']} compiles its step, but {missing}. Install that, or use"
            " --optimizer torch.optim.AdamW, which needs 4 times the memory for its state."
        )


def rounding_note(optimizer: dict[str, Any], precision: str, *, sharded: bool = False) -> str | None:
    """Return a warning if the optimizer rounds each update of 16-bit weights to the nearest value; else None.

    Args:
        optimizer: ``class_path`` and ``init_args``.
        precision: of the run, in Fabric's names.
        sharded: by FSDP, which the optimizers with stochastic rounding do not support.
    """
    if precision not in ("bf16-true", "16-true") or optimizer_traits(optimizer).rounds_stochastically:
        return None
    alternatives = (
        " --optimizer torchao.optim.AdamW8bit --optimizer.init_args.bf16_stochastic_round true, or --optimizer"
        " litmoe.train.muon.Muon, rounds stochastically, which keeps small steps on average."
    )
    return (
        f"warning: in {precision}, {optimizer['class_path']} loses weight decay and small steps: each update is rounded"
        " to 16 bits, and a change of less than about 0.3% of a weight is dropped. --precision bf16-mixed keeps the"
        f" weights in fp32.{'' if sharded else alternatives}"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to ``factor`` times its own, so that groups with different rates keep their ratio."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            # torchao compiles its step, where a number would be a constant.
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_skip_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether ``step_unless`` works: with torch's fused optimizers, which have it for gradient scalers."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def step_unless(optimizer: _FabricOptimizer, skip: Tensor) -> None:
    """Do the optimizer's step, unless a flag on the device is set. The CPU does not wait for the flag."""
    own = optimizer.optimizer
    # The attributes through which torch.amp.GradScaler tells a fused optimizer the same.
    own.grad_scale, own.found_inf = None, skip.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del own.grad_scale, own.found_inf  # type: ignore[attr-defined]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the moments, but keep the settings of this run (learning rate, weight decay, betas).

    Entries of a group that are no argument of the optimizer, such as a counter of its steps, are restored.

    Raises:
        UserError: the state belongs to other parameters.
    """
    # `initial_lr` is added by `make_optimizer`.
    names_of_settings = {*optimizer.defaults, "initial_lr"}
    groups = []
    try:
        for group, saved in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
            settings = {name: group[name] for name in group.keys() & names_of_settings}
            # Later ones win: entries that an older version did not save, the checkpoint, the settings of this run.
            groups.append({**group, **saved, **settings})
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    except ValueError:
        # Another number of groups, or of parameters in a group.
        raise UserError(
            "the checkpoint's optimizer state belongs to another set of parameters; resume with the model and the"
            " optimizer that the run was started with."
        ) from None
