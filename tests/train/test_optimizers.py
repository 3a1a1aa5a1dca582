import re
from copy import deepcopy

import lightning as L
import litgpt.lora
import pytest
import torch
import torch._inductor.config
from litgpt import GPT, Config
from torch import nn
from torch.utils._pytree import tree_leaves

from custom_moe import use_custom_moe
from custom_moe.experts import Experts
from custom_moe.router import TopKRouter
from litmoe.cli import UserError
from litmoe.train.muon import Muon
from litmoe.train.optimizers import (
    can_skip_step,
    check_optimizer,
    load_optimizer_state,
    make_optimizer,
    optimizer_traits,
    parameter_groups,
    parameter_uses,
    rounding_note,
    set_learning_rate,
    step_unless,
)

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3, "weight_decay": 0.1, "fused": None}}


def build(fields, **changes) -> GPT:
    with use_custom_moe():
        return GPT(Config(**{**fields, **changes}))


def test_only_matrices_decay(moe_fields):
    gpt = build(moe_fields, bias=True, norm_class_name="LayerNorm")
    decayed, kept = parameter_groups(gpt)
    names = {id(p): re.sub(r"transformer\.h\.\d+\.", "", name) for name, p in gpt.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert {names[id(p)] for p in decayed["params"]} == {
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.experts.fc_weight",
        "mlp.experts.proj_weight",
        "lm_head.weight",
    }
    assert kept["weight_decay"] == 0.0
    assert {"mlp.gate.weight", "mlp.experts.fc_bias", "mlp.experts.proj_bias", "norm_1.weight", "attn.qkv.bias"} <= {
        names[id(p)] for p in kept["params"]
    }


def test_tied_head_counts_as_embedding(moe_fields):
    gpt = build(moe_fields)
    gpt.transformer.wte.weight = gpt.lm_head.weight
    decayed, kept = parameter_groups(gpt)
    assert sum(p is gpt.lm_head.weight for p in kept["params"]) == 1
    assert not any(p is gpt.lm_head.weight for p in decayed["params"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("class_path", ["torch.optim.AdamW", "litmoe.train.muon.Muon"])
def test_input_embedding_has_its_own_rate(moe_fields, class_path, tied):
    gpt = build(moe_fields)
    if tied:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    settings = {"class_path": class_path, "init_args": {"lr": 1.0e-3}}
    plain = make_optimizer(settings, gpt, fused=False)
    scaled = make_optimizer(settings, gpt, fused=False, embedding_lr_factor=10.0)
    assert len(scaled.param_groups) == len(plain.param_groups) + 1

    def rates(optimizer):
        return {p: (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}

    expected = rates(plain)
    rate, decay = expected[gpt.transformer.wte.weight]
    expected[gpt.transformer.wte.weight] = (rate * 10, decay)
    assert rates(scaled) == expected
    # The schedule scales all of them.
    set_learning_rate(scaled, 0.5)
    assert {p: g["lr"] for g in scaled.param_groups for p in g["params"]} == {
        parameter: rate / 2 for parameter, (rate, _) in expected.items()
    }


def names_by_parts(gpt: GPT) -> dict[tuple[int, ...] | None, set[str]]:
    names = {id(p): re.sub(r"transformer\.h\.\d+\.", "", name) for name, p in gpt.named_parameters()}
    groups = Muon.parameter_groups(gpt)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in gpt.parameters())
    found: dict[tuple[int, ...] | None, set[str]] = {}
    for group in groups:
        found.setdefault(group.get("parts"), set()).update(names[id(p)] for p in group["params"])
    return found


def test_muon_groups_of_block_matrices(moe_fields):
    found = names_by_parts(build(moe_fields, n_head=4, n_query_groups=2))
    assert found[4, 2, 2] == {"attn.qkv.weight"}
    assert found[1, 1] == {"mlp.experts.fc_weight"}
    assert found[1,] == {"attn.proj.weight", "mlp.experts.proj_weight"}
    assert {"transformer.wte.weight", "lm_head.weight", "mlp.gate.weight", "norm_1.weight"} <= found[None]


def test_muon_splits_lora_updates_like_experts(moe_fields):
    with use_custom_moe():
        config = litgpt.lora.Config(**moe_fields, lora_r=4, lora_query=True, lora_value=True, lora_mlp=True)
        gpt = litgpt.lora.GPT(config)
    litgpt.lora.mark_only_lora_as_trainable(gpt)
    found = names_by_parts(gpt)
    assert found[1, 1] == {"mlp.experts.fc_lora_A", "mlp.experts.fc_lora_B"}
    assert {"attn.qkv.lora_A", "mlp.experts.proj_lora_B"} <= found[1,]


def test_optimizer_does_not_change_settings(moe_fields):
    """LitGPT writes `fused` into the mapping that is later saved with the run."""
    optimizer = make_optimizer(ADAMW, build(moe_fields), fused=True)
    assert ADAMW["init_args"] == {"lr": 1.0e-3, "weight_decay": 0.1, "fused": None}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_groups_keep_the_ratio_of_their_rates(moe_fields):
    optimizer = make_optimizer(ADAMW, build(moe_fields), fused=False)
    optimizer.param_groups[1]["initial_lr"] = 5.0e-3
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5e-3, 2.5e-3]


def test_failing_optimizer_gives_one_message(moe_fields):
    with pytest.raises(UserError, match=r"torch\.optim\.Muon rejects.*muon\.Muon trains complete models"):
        make_optimizer({"class_path": "torch.optim.Muon", "init_args": {"lr": 0.1}}, build(moe_fields), fused=False)


def test_resume_keeps_new_settings(moe_fields):
    """A resumed run used to keep the weight decay and betas of the checkpoint, but not its learning rate."""
    gpt = build(moe_fields)
    optimizer = make_optimizer(ADAMW, gpt, fused=False)
    for parameter in gpt.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    changed = {**ADAMW, "init_args": {"lr": 2.0e-3, "weight_decay": 0.3}}
    resumed = make_optimizer(changed, gpt, fused=False)
    load_optimizer_state(resumed, optimizer.state_dict())
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.3, 0.0]
    assert [group["initial_lr"] for group in resumed.param_groups] == [2.0e-3, 2.0e-3]
    some = next(gpt.parameters())
    assert torch.equal(resumed.state[some]["exp_avg"], optimizer.state[some]["exp_avg"])


EIGHT_BITS = {
    "class_path": "torchao.optim.AdamW8bit",
    "init_args": {"lr": 1.0e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "bf16_stochastic_round": True},
}


@pytest.fixture
def experts() -> nn.ModuleDict:
    """Stacked bf16 matrices and a norm, of the smallest size with 8-bit state."""
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": Experts(4, 32, 64, 1, bias=False), "norm": nn.LayerNorm(32, bias=False)}).bfloat16()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request):
    """The backend of ``torch.compile``: inductor takes up to a minute, aot_eager generates no code."""
    torch.compiler.reset()
    with torch.compiler.set_stance("default", force_backend=request.param):
        yield
    torch.compiler.reset()


def test_8_bit_adam_does_not_recompile(experts, backend):
    """A learning rate as a number would be compiled in, or recompile in each step. torchao refuses numbers."""
    optimizer = make_optimizer(EIGHT_BITS, experts, fused=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    graphs, moved = [], []
    for step in range(4):
        before = experts["norm"].weight.detach().float()
        for parameter in experts.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_learning_rate(optimizer, 0.0 if step == 3 else 1 / (step + 1))
        optimizer.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        moved.append(float((before - experts["norm"].weight.detach().float()).mean()))
    assert len(set(graphs)) == 1 and graphs[0] >= 3
    # Adam moves each weight by about the rate; rounding by chance keeps that on average, and 0 is 0.
    assert moved == pytest.approx([1.0e-2, 0.5e-2, 0.33e-2, 0], abs=1.5e-3)


def test_stochastic_rounding_keeps_small_updates(experts):
    """1 and 0.9995 are equal in bf16: without stochastic rounding, small updates would never change a weight of 1."""
    means = []
    for by_chance in (True, False):
        specification = {**EIGHT_BITS, "init_args": {"lr": 5.0e-4, "bf16_stochastic_round": by_chance}}
        weight = nn.ParameterDict({"weight": torch.ones(64, 64, dtype=torch.bfloat16)})
        optimizer = make_optimizer(specification, weight, fused=False)
        weight["weight"].grad = torch.ones_like(weight["weight"])
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        means.append(float(weight["weight"].float().mean()))
    assert means == pytest.approx([1 - 5.0e-4, 1.0], abs=1e-4)


def test_8_bit_adam_needs_a_compiler(experts, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    # CXX is read when this module is imported, perhaps by another test.
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    message = r"torchao\.optim\.AdamW8bit compiles its step, but there is no C\+\+ compiler"
    with no_compiler, pytest.raises(UserError, match=message):
        check_optimizer(EIGHT_BITS, "cpu")
    make_optimizer(EIGHT_BITS, experts, fused=False)  # a plan only looks at it


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_warns_of_lost_small_updates(precision):
    """The warning suggests optimizers that this run can use: FSDP supports neither Muon nor 8-bit Adam."""
    eight_bit = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"bf16_stochastic_round": True}}
    muon = {"class_path": "litmoe.train.muon.Muon", "init_args": {}}
    nearest = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"bf16_stochastic_round": False}}
    assert rounding_note(eight_bit, precision) is None and rounding_note(muon, precision) is None
    for optimizer in (ADAMW, nearest, {"class_path": "torch.optim.SGD"}):
        note = rounding_note(optimizer, precision)
        assert (note is not None) == (precision == "bf16-true")
        assert note is None or (optimizer["class_path"] in note and "bf16_stochastic_round true" in note)
        assert "stochastic" not in (rounding_note(optimizer, precision, sharded=True) or "")


class Signs(torch.optim.Optimizer):
    """An optimizer as users write it: one class with its own parameter groups."""

    supports_fsdp = True
    rounds_stochastically = True

    @classmethod
    def parameter_groups(cls, model):
        return [{"params": [use.parameter for use in parameter_uses(model)], "note": "all"}]

    @staticmethod
    def update_flops(groups):
        return sum(parameter.numel() for group in groups for parameter in group["params"])

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())


def test_class_path_with_its_own_groups(moe_fields):
    specification = {"class_path": f"{__name__}.Signs", "init_args": {"lr": 0.5}}
    gpt = build(moe_fields)
    optimizer = make_optimizer(specification, gpt, fused=True)
    assert [group["note"] for group in optimizer.param_groups] == ["all"]
    traits = optimizer_traits(specification)
    assert traits.supports_fsdp and rounding_note(specification, "bf16-true") is None
    assert traits.update_flops(optimizer.param_groups) == sum(parameter.numel() for parameter in gpt.parameters())
    assert not optimizer_traits({"class_path": "litmoe.train.muon.Muon"}).supports_fsdp
    assert not optimizer_traits({"class_path": "torch.optim.Muon"}).supports_fsdp
    assert optimizer_traits(ADAMW).supports_fsdp


def test_resume_restores_counters_in_groups(moe_fields):
    optimizer = make_optimizer(ADAMW, build(moe_fields), fused=False)
    resumed = make_optimizer(ADAMW, build(moe_fields), fused=False)
    optimizer.param_groups[0]["steps"] = 5
    load_optimizer_state(resumed, optimizer.state_dict())
    assert resumed.param_groups[0]["steps"] == 5


class RouterWithLayer(TopKRouter):
    """A router with parameters in a module of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(config.n_embd, config.n_expert)


def test_modules_inside_a_router_do_not_decay(moe_fields):
    with use_custom_moe(router=RouterWithLayer):
        gpt = GPT(Config(**moe_fields))
    _, not_decayed = parameter_groups(gpt)
    extra = [parameter for name, parameter in gpt.named_parameters() if ".gate.extra." in name]
    assert extra and all(any(parameter is other for other in not_decayed["params"]) for parameter in extra)


def test_step_unless(moe_fields):
    """A skipped step changes neither weights nor moments nor the counter of steps."""
    gpt, fabric = build(moe_fields), L.Fabric(accelerator="cpu", devices=1)
    optimizer = fabric.setup_optimizers(make_optimizer(ADAMW, gpt, fused=True))
    assert can_skip_step(optimizer.optimizer)

    def step(skip):
        for parameter in gpt.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if skip else 0.1)
        before = deepcopy((gpt.state_dict(), optimizer.state_dict()["state"]))
        step_unless(optimizer, torch.tensor(skip))
        return before, (gpt.state_dict(), optimizer.state_dict()["state"])

    def equal(one, other):
        pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
        return [torch.equal(left, right) for left, right in pairs]

    step(False)
    assert all(equal(*step(True)))
    assert not any(equal(*step(False)))
    assert not hasattr(optimizer.optimizer, "found_inf"), "it would decide the next step, too"


def test_only_fused_steps_can_be_skipped(moe_fields):
    muon = {"class_path": "litmoe.train.muon.Muon", "init_args": {"lr": 1.0e-3}}
    assert not can_skip_step(make_optimizer(ADAMW, build(moe_fields), fused=False))
    assert not can_skip_step(make_optimizer(muon, build(moe_fields), fused=True))
