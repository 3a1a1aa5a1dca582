"""A sharded model saves and loads the state of one device. (Training in two processes: tests/test_run_train.py.)"""

from collections.abc import Iterator
from copy import deepcopy

import lightning as L
import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from custom_moe import use_custom_moe
from litmoe.layers import use_fast_layers
from litmoe.train.distributed import gather_state, gather_weights, shard, shard_state
from litmoe.train.model import PretrainingModel, moe_layers, update_selection_biases
from litmoe.train.optimizers import load_optimizer_state, make_optimizer
from tests.train.test_model import MODELS

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2, "weight_decay": 0.1}}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of one process: parameters are DTensors, and gathering uses gloo."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def own_layers() -> Iterator[None]:
    with use_custom_moe(), use_fast_layers():
        yield


def build(name: str, tied: bool = False) -> PretrainingModel:
    torch.manual_seed(0)
    gpt = GPT(Config(**MODELS[name]))
    if tied:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    return PretrainingModel(gpt)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(seed))
    losses = model(tokens[:, :-1], tokens[:, 1:])
    (losses.cross_entropy + 0.01 * losses.load_balancing).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize(("name", "tied"), [("moe", False), ("moe", True), ("deepseek", False), ("pythia", False)])
def test_gathered_state_equals_one_device(mesh, name, tied):
    full, sharded = build(name, tied), shard(build(name, tied), mesh, precision="32-true")
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    optimizers = [make_optimizer(ADAMW, model, fused=True) for model in (full, sharded)]
    for seed in range(2):
        for model, optimizer in zip((full, sharded), optimizers, strict=True):
            step(model, optimizer, seed)
    with torch.no_grad():  # validation leaves the outermost parameters unsharded
        sharded(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    weights = gather_weights(sharded.gpt)
    assert_same(weights, full.gpt.state_dict())
    assert (weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()) == tied
    state, expected = gather_state(optimizers[1].state_dict()), optimizers[0].state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for index, moments in expected["state"].items():
        assert_same(state["state"][index], moments)


def test_gathered_state_is_a_copy(mesh):
    """It is saved in the background, while the next steps change the tensors of the run in place."""
    sharded = shard(build("deepseek"), mesh, precision="32-true")
    optimizer = make_optimizer(ADAMW, sharded, fused=False)  # on a CPU its `step` is a plain tensor either way
    step(sharded, optimizer, 0)
    gathered = {"weights": gather_weights(sharded.gpt), "optimizer": gather_state(optimizer.state_dict())}
    expected = deepcopy(gathered)
    step(sharded, optimizer, 1)
    update_selection_biases(sharded.gpt, torch.tensor([[5, 1, 1, 1]] * len(moe_layers(sharded.gpt))), rate=0.1)
    assert_same(gathered["weights"], expected["weights"])
    for index, moments in expected["optimizer"]["state"].items():
        assert_same(gathered["optimizer"]["state"][index], moments)


def test_resumes_from_state_of_one_device(mesh):
    full = build("moe")
    optimizer = make_optimizer(ADAMW, full, fused=True)
    step(full, optimizer, 0)
    copy = build("moe")
    copy.gpt.load_state_dict(full.gpt.state_dict())
    sharded = shard(copy, mesh, precision="32-true")
    its_optimizer = make_optimizer(ADAMW, sharded, fused=True)
    saved = deepcopy(optimizer.state_dict())  # as from a file
    load_optimizer_state(its_optimizer, {**saved, "state": shard_state(saved["state"], its_optimizer)})
    assert isinstance(its_optimizer.state[next(iter(sharded.parameters()))]["exp_avg"], DTensor)
    for model, each in ((full, optimizer), (sharded, its_optimizer)):
        step(model, each, 1)
    assert_same(gather_weights(sharded.gpt), full.gpt.state_dict())


def test_each_process_keeps_only_its_part():
    """A view of the complete moments would keep all of them on each device."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)  # without other processes
    try:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        sharded = shard(build("moe"), mesh, precision="32-true")
        parameter = sharded.gpt.transformer.h[0].mlp.experts.fc_weight
        optimizer = torch.optim.AdamW([parameter])
        full = torch.randn(parameter.shape)
        state = shard_state({0: {"step": torch.tensor(3.0), "exp_avg": full}}, optimizer)[0]
        mine = state["exp_avg"].to_local()
        assert torch.equal(mine, full.chunk(2)[1])
        assert mine.untyped_storage().nbytes() == full.nbytes // 2
        assert state["step"] == 3
    finally:
        torch.distributed.destroy_process_group()


def test_mixed_precision_equals_autocast(mesh):
    """Activations between blocks, embedding, routers and output layer stay in fp32; gradients are summed in fp32."""
    plain, sharded = build("moe"), shard(build("moe"), mesh, precision="bf16-mixed")
    seen: dict[str, torch.dtype] = {}
    block = sharded.gpt.transformer.h[1]
    block.attn.register_forward_pre_hook(lambda module, _: seen.update(weights=module.qkv.weight.dtype))
    block.mlp.gate.register_forward_pre_hook(lambda module, _: seen.update(router=module.weight.dtype))
    block.register_forward_pre_hook(lambda _, inputs: seen.update(activations=inputs[0].dtype))
    sharded.gpt.transformer.wte.register_forward_hook(lambda module, *_: seen.update(embedding=module.weight.dtype))
    tokens = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    found = []
    for model in (plain, sharded):
        with fabric.autocast():
            losses = model(tokens[:, :-1], tokens[:, 1:])
        losses.cross_entropy.backward()
        found.append(losses.cross_entropy.detach())
    kept = dict.fromkeys(["activations", "embedding", "router"], torch.float32)
    assert seen == {"weights": torch.bfloat16, **kept}
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)
    for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert one.grad is not None and isinstance(other.grad, DTensor)
        assert other.grad.dtype == torch.float32
        distance = float((other.grad.full_tensor() - one.grad).norm() / one.grad.norm())
        assert distance < 0.03
