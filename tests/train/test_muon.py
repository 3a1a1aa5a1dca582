"""Muon equals torch's for single matrices, and AdamW for all other parameters."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from custom_moe import use_custom_moe
from litmoe.config import PROJECT
from litmoe.flops import training_flops_per_token
from litmoe.train import muon
from litmoe.train.muon import MOMENTS, Muon, orthogonalized, stochastically_rounded
from litmoe.train.optimizers import load_optimizer_state, make_optimizer, parameter_groups

SPECIFICATION = {
    "class_path": "litmoe.train.muon.Muon",
    "init_args": {"lr": 2.0e-3, "momentum": 0.95, "weight_decay": 0.1, "betas": [0.9, 0.95]},
}


@pytest.fixture
def gpt(moe_fields: dict) -> GPT:
    torch.manual_seed(0)
    with use_custom_moe():
        return GPT(Config(**{**moe_fields, "bias": True}))


@pytest.fixture
def in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in the dtype of torch.optim.Muon."""
    monkeypatch.setattr(muon, "products_dtype", lambda device: torch.bfloat16)


def matrix(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 3) -> None:
    """Take steps with the same gradients, for any split of the parameters into tensors."""
    for step in range(count):
        random = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        optimizer.step()


AS_OURS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_matrix_update_equals_torch_muon(shape: tuple[int, int], in_bf16: None) -> None:
    ours, theirs = matrix(*shape), matrix(*shape)
    steps(Muon([{"params": [ours], "parts": (1,)}], lr=0.02, weight_decay=0.1), [ours])
    steps(torch.optim.Muon([theirs], **AS_OURS), [theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("parts", [(1,), (1, 1), (4, 2, 2)])
def test_stacked_update_equals_single_updates(parts: tuple[int, ...], in_bf16: None) -> None:
    stacked = matrix(3, 48, 16)
    heights = [48 * part // sum(parts) for part in parts]
    single = [nn.Parameter(m.detach().clone()) for expert in stacked for m in expert.split(heights)]
    steps(Muon([{"params": [stacked], "parts": parts}], lr=0.02), [stacked])
    steps(torch.optim.Muon(single, **AS_OURS), single)
    torch.testing.assert_close(stacked.reshape(-1, 16), torch.cat(single), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_share_the_update(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two ranks end with the same bits as one alone: weights and moments."""
    alone = two_steps(dtype)
    torch.multiprocessing.spawn(save_two_steps, (dtype, tmp_path), nprocs=2)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for tensor, expected in zip(shared, alone, strict=True):
            assert torch.equal(tensor, expected)


def two_steps(dtype: torch.dtype) -> list[Tensor]:
    """Return weights and moments of three parameters with matrices, of two shapes, and one without."""
    weights = [nn.Parameter(matrix(*shape).to(dtype)) for shape in ((2, 16, 8), (8, 8), (2, 16, 8), (4,))]
    optimizer = Muon([{"params": weights[:3], "parts": (1, 1)}, {"params": weights[3:]}], lr=0.02)
    steps(optimizer, weights, count=2)
    moments = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    return [weight.detach() for weight in weights] + moments


def save_two_steps(rank: int, dtype: torch.dtype, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=2)
    torch.save(two_steps(dtype), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_singular_values_end_near_one_in_fp32_too() -> None:
    values = torch.linalg.svdvals(orthogonalized(matrix(4, 64, 32).detach()).float())
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalized(torch.zeros(2, 8, 4)).any()  # experts that got no token


def test_flops_equal_a_counted_step(gpt: GPT) -> None:
    optimizer = make_optimizer(SPECIFICATION, gpt, fused=False)
    with FlopCounterMode(display=False) as counter:
        steps(optimizer, list(gpt.parameters()), count=1)
    assert counter.get_total_flops() == Muon.update_flops(Muon.parameter_groups(gpt)) > 0
    assert Muon.update_flops(parameter_groups(gpt)) == 0


def test_flops_of_moe_200m() -> None:
    """8.6 TFLOP a step: 46% of forward and backward with 16,384 tokens a step, 23% with 32,768."""
    config = Config.from_file(PROJECT / "configs/models/moe-200m.yaml")
    with torch.device("meta"), use_custom_moe():
        update = Muon.update_flops(Muon.parameter_groups(GPT(config)))
    per_token = training_flops_per_token(config, 2048)
    assert round(update / 1e12, 2) == 8.62
    assert [round(update / (tokens * per_token), 2) for tokens in (16384, 32768)] == [0.46, 0.23]


def test_other_parameters_equal_adamw(gpt: GPT, moe_fields: dict) -> None:
    with use_custom_moe():
        other = GPT(gpt.config)
    other.load_state_dict(gpt.state_dict())
    groups = Muon.parameter_groups(other)
    rest = [{**group, "lr": 2.0e-3} for group in groups if "parts" not in group]
    steps(make_optimizer(SPECIFICATION, gpt, fused=False), list(gpt.parameters()))
    steps(torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1), list(other.parameters()))
    by_muon = {id(p) for group in groups for p in group["params"] if "parts" in group}
    for mine, theirs in zip(gpt.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs) != (id(theirs) in by_muon)


def test_resumes_from_its_state(gpt: GPT, moe_fields: dict) -> None:
    with use_custom_moe():
        other = GPT(gpt.config)
    first = make_optimizer(SPECIFICATION, gpt, fused=False)
    steps(first, list(gpt.parameters()))
    other.load_state_dict(gpt.state_dict())
    resumed = make_optimizer(SPECIFICATION, other, fused=False)
    load_optimizer_state(resumed, deepcopy(first.state_dict()))
    for optimizer, model in ((first, gpt), (resumed, other)):
        steps(optimizer, list(model.parameters()))
    for mine, theirs in zip(gpt.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---------------------------------------------------------------------------------------------------------------- bf16


def matrix_and_rest(dtype: torch.dtype, **settings: float) -> tuple[Muon, list[nn.Parameter]]:
    """Two parameters of typical size: one for Muon, one for AdamW."""
    parameters = [nn.Parameter((matrix(64, 64) * 0.02).detach().to(dtype)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "parts": (1,)}, {"params": [parameters[1]]}]
    return Muon(groups, **settings), parameters


def test_decay_reaches_bf16_weights() -> None:
    """Rounding to nearest would not change the norm."""
    optimizer, parameters = matrix_and_rest(torch.bfloat16, lr=3e-4, weight_decay=0.1)
    before = [parameter.detach().float().norm() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2000):
        optimizer.step()
    for parameter, norm in zip(parameters, before, strict=True):
        assert float(parameter.detach().float().norm() / norm) == pytest.approx((1 - 3e-5) ** 2000, rel=2e-3)  # 0.9418


def test_small_steps_reach_bf16_weights() -> None:
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        optimizer, parameters = matrix_and_rest(dtype, lr=3e-5, weight_decay=0.0)
        with torch.no_grad():  # both begin at numbers that bf16 has
            for parameter in parameters:
                parameter.copy_(parameter.bfloat16())
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = matrix(64, 64, seed=1).detach().to(dtype)
        for _ in range(200):
            optimizer.step()
        moved.append([(now - then).double().flatten() for now, then in zip(parameters, before, strict=True)])
    for exact, rounded in zip(*moved, strict=True):
        assert float(rounded @ exact / (exact @ exact)) == pytest.approx(1, abs=0.03)


def test_rounding_is_reproducible() -> None:
    runs = []
    for seed in range(3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        optimizer, parameters = matrix_and_rest(torch.bfloat16)
        steps(optimizer, parameters)
        if seed == 2:
            saved, weights = deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
            optimizer, parameters = matrix_and_rest(torch.bfloat16)
            load_optimizer_state(optimizer, saved)
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
        steps(optimizer, parameters)
        runs.append(parameters)
        assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers"
        moments = [value for state in optimizer.state.values() for name, value in state.items() if name in MOMENTS]
        assert len(moments) == 3 and all(moment.dtype == torch.float32 for moment in moments)
    for one, *others in zip(*runs, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_rounding_is_unbiased() -> None:
    x = torch.tensor([0.0, 1.0, -2.5, 1e-40, 1 + 2**-9, -(1 + 2**-9), float("inf"), -float("inf"), float("nan")])
    rounded = stochastically_rounded(x.expand(20000, -1), torch.Generator().manual_seed(0)).float()
    exact = [0, 1, 2, 6, 7]
    assert torch.equal(rounded[:, exact], x[exact].expand(20000, -1))
    assert rounded[:, 8].isnan().all()
    assert set(rounded[:, 4].tolist()) == {1.0, 1 + 2**-7}
    torch.testing.assert_close(rounded[:, 4:6].mean(0), x[4:6], rtol=0, atol=1e-4)


def test_invalid_arguments_are_refused(gpt: GPT) -> None:
    with pytest.raises(ValueError, match=r"lr is -1.*expected a rate above 0"):
        Muon([{"params": [matrix(2, 2)], "parts": (1,)}], lr=-1)
