"""Muon for the matrices within the blocks and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalizes the momentum of each matrix's
gradient: all its singular values become nearly 1. ``torch.optim.Muon`` accepts only parameters of two dimensions, so it
can train neither a complete model nor stacked experts. For a single matrix both give the same (tested).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from litgpt.model import CausalSelfAttention
from torch import Tensor, nn
from torch.optim.adamw import adamw

from custom_moe.experts import Experts
from litmoe.train.optimizers import ParameterUse, parameter_uses, without_empty_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step, steepest at 0: singular values end between about 0.7 and 1.2"""
ITERATIONS = 5
RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates, relative to its learning rate"""
MOMENTS = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``parts``, which say how their parameters divide into matrices; AdamW for the others.

    The ranks of a run divide the orthogonalization among themselves, matrix by matrix, and send each other the results.
    All else they compute alike from the same gradients, so all have the complete state.

    Parameters in bf16 (precision bf16-true) are updated in fp32, with moments in fp32, and rounded stochastically: bf16
    has 8 bits, so rounding to the nearest would drop every change of less than 0.2% of a weight, such as weight decay.
    The random numbers depend only on the parameter and the number of its updates, which is part of the state. So all
    ranks round alike, and a resumed run gives the same bits.

    Args:
        params: groups as ``parameter_groups`` makes them. ``parts`` are the relative heights of the matrices that are
            stacked in a parameter: ``(1,)`` one matrix, ``(1, 1)`` two of equal height. A parameter of three dimensions
            is a batch of such.
        lr: of both. The update of a matrix is scaled by ``0.2 * sqrt(max(rows, columns))``, which gives it the root
            mean square that AdamW's updates usually have, so AdamW's rate fits it (Moonlight, arXiv 2502.16982, eq. 4).
        momentum: Nesterov's.
        weight_decay: of both, decoupled; of the groups that have none of their own.
        betas, eps: AdamW's.
        fused: torch's fused kernel for AdamW.
    """

    rounds_stochastically = True
    supports_fsdp = False

    @classmethod
    def parameter_groups(cls, model: nn.Module) -> list[dict[str, Any]]:
        """Return groups with ``parts`` for the matrices within the blocks, and two groups for AdamW.

        The gate and up projections of an expert are stacked in one parameter, and so are queries, keys and values,
        which train better separately (https://kellerjordan.github.io/posts/muon/).
        """
        by_parts: defaultdict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for_adamw: list[nn.Parameter] = []
        not_decayed: list[nn.Parameter] = []
        for use in parameter_uses(model):
            if not use.decays:
                not_decayed.append(use.parameter)
            elif use.path.rpartition(".")[2] == "lm_head":
                # Its rows belong to tokens, not to a hidden layer; Jordan et al. leave it to AdamW as well.
                for_adamw.append(use.parameter)
            else:
                by_parts[_stacked_parts(model, use)].append(use.parameter)
        return without_empty_groups(
            *({"params": by_parts[parts], "parts": parts} for parts in sorted(by_parts, reverse=True)),
            {"params": for_adamw},
            {"params": not_decayed, "weight_decay": 0.0},
        )

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 2.0e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1.0e-8,
        fused: bool | None = None,
    ) -> None:
        # Written with `not`, so that NaN is refused too.
        if not lr > 0:
            raise ValueError(f"lr is {lr}; expected a rate above 0")
        if not all(0 <= beta < 1 for beta in (momentum, *betas)):
            raise ValueError(f"momentum is {momentum} and betas {betas}; expected numbers from 0 to below 1")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; expected 0 or more")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "fused": fused, "parts": None})

    @staticmethod
    def update_flops(groups: Iterable[dict[str, Any]]) -> int:
        """Return the floating-point operations of Newton-Schulz in one step, two for each multiply-add.

        They do not depend on the batch. The devices of a run divide them among themselves.

        Args:
            groups: as ``parameter_groups`` returns them; parameters on the meta device are enough.
        """
        flops = 0
        for group in groups:
            if not group.get("parts"):
                continue
            for parameter in group["params"]:
                for height in matrix_heights(parameter, group["parts"]):
                    # (short, long) @ (long, short), (short, short) squared, (short, short) @ (short, long)
                    short, long = sorted((height, parameter.size(-1)))
                    products = 2 * short * short * (long + short + long)
                    flops += ITERATIONS * products * parameter.shape[:-2].numel()
        return flops

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["parts"]:
                self._step_by_muon(parameters, group)
            else:
                # One after the other, because each parameter in bf16 needs copies in fp32.
                for parameter in parameters:
                    weight = _wide(parameter)
                    self._update_by_adamw(weight, _wide(parameter.grad), self.state[parameter], group)
                    self._store(weight, parameter)

    def _step_by_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices. Every rank must call it with the same parameters."""
        ranks, rank = 1, 0
        if torch.distributed.is_initialized():
            ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        # One parameter for each rank at a time. Those of one shape take equally long, so they are neighbors.
        parameters = sorted(parameters, key=lambda parameter: parameter.shape)
        for start in range(0, len(parameters), ranks):
            by_owner = parameters[start : start + ranks]
            directions = [self._direction(parameter, group) for parameter in by_owner]
            if rank < len(by_owner):
                directions[rank] = orthogonalized_parts(directions[rank], group["parts"])
            for owner, (parameter, direction) in enumerate(zip(by_owner, directions, strict=True)):
                if ranks > 1:
                    torch.distributed.broadcast(direction, owner)
                weight = _wide(parameter)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"])
                self._store(weight, parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the moments of bf16 parameters in fp32: torch would cast them to bf16."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        # The state numbers the parameters in the order of the groups.
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, parameter in zip(indices, self._parameters(), strict=True):
            if parameter.dtype == torch.bfloat16:
                for name in saved.get(index, {}).keys() & MOMENTS:
                    moment = saved[index][name].to(parameter.device, torch.float32, copy=True)
                    self.state[parameter][name] = moment

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _store(self, weight: Tensor, parameter: Tensor) -> None:
        """Copy an updated weight into its parameter, unless they are the same tensor."""
        if weight is parameter:
            return
        state, parameters = self.state[parameter], self._parameters()
        # The seed depends on saved state only, so that all ranks and a resumed run round alike.
        state["updates"] = state.get("updates", 0) + 1
        # By identity: list.index would compare the elements of tensors.
        number = next(index for index, other in enumerate(parameters) if other is parameter)
        generator = torch.Generator(parameter.device)
        generator.manual_seed((state["updates"] * len(parameters) + number) % 2**32)
        parameter.copy_(stochastically_rounded(weight, generator))

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Add the gradient of a parameter to its momentum, and return the direction before it is orthogonalized."""
        assert parameter.grad is not None
        gradient, state = _wide(parameter.grad), self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        # An average of gradients, as in torch.optim.Muon: m = momentum * m + (1 - momentum) * gradient.
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"])  # Nesterov

    @staticmethod
    def _update_by_adamw(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            # The fused kernel counts steps on the device.
            state["step"] = torch.tensor(0.0, device=weight.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        adamw(
            [weight],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            # No max_exp_avg_sqs: only AMSGrad has them.
            [],
            [state["step"]],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _stacked_parts(model: nn.Module, use: ParameterUse) -> tuple[int, ...]:
    """Return the relative heights of the matrices that are stacked in a parameter."""
    if isinstance(use.module, Experts) and use.name.startswith("fc_"):
        return 1, 1
    parent = model.get_submodule(use.path.rpartition(".")[0])
    if isinstance(parent, CausalSelfAttention) and use.module is parent.qkv and use.name == "weight":
        # All heads have the same size, so their numbers are the relative heights of queries, keys and values.
        return parent.config.n_head, parent.config.n_query_groups, parent.config.n_query_groups
    return (1,)


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy in fp32 if it is bf16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that keep the mean at ``x`` (arXiv 2010.06192).

    A bf16 number is the upper half of an fp32 number's bits. A random lower half is added before the lower half is cut
    off. The sum carries over into the upper half with a probability that is proportional to what is cut off.
    """
    noise = torch.randint(2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16))
    return bits.view(torch.float32).to(torch.bfloat16)


def matrix_heights(parameter: Tensor, parts: tuple[int, ...]) -> list[int]:
    """Return the number of rows of each matrix that is stacked in a parameter."""
    rows = parameter.size(-2)
    return [rows * part // sum(parts) for part in parts]


def orthogonalized_parts(direction: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Return the update of a parameter for a learning rate of 1: each stacked matrix is orthogonalized on its own."""
    updates = []
    for matrix in direction.split(matrix_heights(direction, parts), -2):
        scale = RMS_OF_ADAMW * max(matrix.size(-2), matrix.size(-1)) ** 0.5
        updates.append(orthogonalized(matrix).to(direction.dtype) * scale)
    return torch.cat(updates, -2)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return the matrices ``(..., rows, columns)`` with all singular values near 1, by Newton-Schulz iterations.

    They are computed in bf16 if the device multiplies fast in it, which is exact enough for a direction, else in fp32.
    """
    a, b, c = COEFFICIENTS
    # Then the transpose has the smaller Gram matrix.
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(products_dtype(matrices.device))
    # baddbmm takes exactly three dimensions.
    x = x.reshape(-1, *x.shape[-2:])
    # So that no singular value is above 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        # X = a X + (b G + c G G) X with G = X X^T
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def products_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which a device multiplies matrices fastest: bf16 or fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
