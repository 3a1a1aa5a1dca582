"""Upcycling: the mixture computes the same as the dense model, can be trained, and other models are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.config import parse_run
from litmoe.evaluation.loss import evaluate
from litmoe.upcycling import upcycle, upcycled_model
from tests.helpers import column, save_tiny, tiny_gpt

DENSE = ("--model.mlp_class_name=LLaMAMLP", "--model.intermediate_size=48", "--model.moe_intermediate_size=null")
DENSE_FLAGS = (*DENSE, "--model.n_expert=0", "--model.n_expert_per_token=0", "--model.name=tiny-dense")


@pytest.fixture
def dense_fields(moe_fields: dict) -> dict:
    changes = dict(mlp_class_name="LLaMAMLP", intermediate_size=40, n_expert=0, n_expert_per_token=0)
    return moe_fields | changes | {"moe_intermediate_size": None, "name": "tiny-dense"}


@pytest.fixture
def dense(tmp_path: Path, dense_fields: dict, prepared: Path) -> Path:
    return save_tiny(tmp_path / "dense", tiny_gpt(dense_fields), prepared / "tokenizer")


def mixture_of(folder: Path, **changes: object) -> GPT:
    torch.manual_seed(1)
    with use_custom_moe():
        mixture = GPT(Config(**upcycled_model(folder) | changes)).eval()
    mixture.load_state_dict(upcycle(checkpoints.load_weights(folder), mixture.state_dict()))
    return mixture


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_expert": 5, "n_expert_per_token": 3},
        {"n_expert": 4, "n_expert_per_token": 1, "first_k_dense_replace": 1},
    ],
    ids=["default", "other numbers", "dense first layer"],
)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_mixture_computes_the_same(tmp_path: Path, dense_fields: dict, changes: dict, bias: bool) -> None:
    gpt = tiny_gpt(dense_fields | {"bias": bias})
    mixture = mixture_of(save_tiny(tmp_path / "dense", gpt, None), **changes)
    ids = torch.randint(384, (3, 50), generator=torch.Generator().manual_seed(0))
    expected = gpt(ids)
    torch.testing.assert_close(mixture(ids), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.5
    mlp = mixture.transformer.h[-1].mlp
    assert len(mlp.experts.fc_weight) == mixture.config.n_expert
    assert mlp.gate.weight.std() > 0.01, "a router of zeros would send all tokens to the same experts"
    mlp.experts.proj_weight[0] += 1.0
    assert not torch.allclose(mixture(ids), expected, atol=1e-3), "each expert has its own weights"


@torch.no_grad()
def test_stock_litgpt_computes_the_same(dense: Path) -> None:
    mixture = mixture_of(dense)
    stock = GPT(mixture.config)
    stock.load_state_dict(mixture.state_dict())
    ids = torch.arange(60)[None]
    torch.testing.assert_close(stock(ids), checkpoints.load_model(dense, torch.device("cpu"), torch.float32)(ids))


def test_upcycle_copies_nothing(dense: Path) -> None:
    weights = checkpoints.load_weights(dense)
    with torch.device("meta"):
        mixture = GPT(Config(**upcycled_model(dense)))
    upcycled = upcycle(weights, mixture.state_dict())
    own = {tensor.data_ptr() for tensor in weights.values()}
    assert {tensor.data_ptr() for name, tensor in upcycled.items() if "gate" not in name} == own


def test_the_model_is_the_dense_one_with_experts(dense: Path, run_file: Path, dense_fields: dict) -> None:
    config = parse_run(["--config", str(run_file), "--upcycle", str(dense)]).settings.model
    experts = dict(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, moe_intermediate_size=40)
    assert config == Config(**dense_fields | experts | {"name": "tiny-dense-upcycled"})
    flags = ["--config", str(run_file), f"--upcycle={dense}", "--model.n_expert", "4"]
    assert parse_run(flags).settings.model.n_expert == 4


@pytest.mark.parametrize("tied", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_run_continues_from_the_dense_model(train, tmp_path: Path, run_file: Path, tied: str) -> None:
    """Its first loss equals that of the dense model, training reduces it, and the run can be resumed."""
    tie = ("--train.tie_embeddings", tied)
    first = train(*DENSE_FLAGS, *tie, "--out_dir", str(tmp_path / "first"))
    flags = (*tie, "--upcycle", str(first / "final"), "--eval.initial_validation", "true")
    out = train(*flags, "--train.max_steps", "12", "--optimizer.init_args.lr", "3.0e-3")
    assert column(out, "val_loss")[0] == pytest.approx(column(first, "val_loss")[-1], rel=1e-5)
    assert column(out, "val_loss")[-1] < column(out, "val_loss")[0]
    assert evaluate(out / "final").loss < evaluate(first / "final").loss
    weights = checkpoints.load_weights(out / "final")
    one, other = (weights[f"transformer.h.0.mlp.experts.{expert}.proj.weight"] for expert in (0, 1))
    assert not torch.equal(one, other), "the experts become different"

    same = ("--resume", "auto", "--optimizer.init_args.lr", "3.0e-3", "--train.max_steps", "14")
    train(*flags, *same)
    assert checkpoints.read_metadata(out / "final").step == 14
    shutil.rmtree(first)
    again = parse_run(["--config", str(out / "run_config.yaml"), "--train.max_steps", "16"])
    assert again.settings.model == checkpoints.load_config(out / "final"), "the settings of a run contain its model"
    with pytest.raises(UserError, match=r"dense|first"):
        train(*flags, "--out_dir", str(tmp_path / "missing"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_dense_model_in_bf16(train, tmp_path: Path, dense_fields: dict, prepared: Path, precision: str) -> None:
    gpt = tiny_gpt(dense_fields).bfloat16()
    folder = save_tiny(tmp_path / "dense", gpt, prepared / "tokenizer")
    mixture = mixture_of(folder)
    assert all(parameter.dtype == torch.float32 for parameter in mixture.parameters())
    ids = torch.arange(60)[None]
    expected = checkpoints.load_model(folder, torch.device("cpu"), torch.float32)(ids)
    torch.testing.assert_close(mixture(ids), expected, atol=1e-5, rtol=1e-5)
    out = train("--upcycle", str(folder), "--precision", precision, "--train.max_steps", "3")
    kept = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    assert {tensor.dtype for tensor in checkpoints.load_weights(out / "final").values()} == {kept}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_class_name": "GptNeoxMLP"}, "feed-forward GptNeoxMLP .GELU without a gate"),
        ({"mlp_class_name": "GemmaMLP"}, "feed-forward GemmaMLP .a gate with GELU"),
        (
            {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
            "a mixture of 4 experts already.*--initial_checkpoint_dir",
        ),
    ],
)
def test_refuses_other_models(train, tmp_path: Path, dense_fields: dict, changes: dict, message: str) -> None:
    folder = save_tiny(tmp_path / "dense", tiny_gpt(dense_fields | changes), None)
    with pytest.raises(UserError, match=message):
        train("--upcycle", str(folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.moe_intermediate_size", "48"], "moe_intermediate_size is 48, expected 40, the width of the dense"),
        (["--model.n_shared_expert", "1"], "n_shared_expert is 1, which would add"),
        (["--model.routed_scaling_factor", "2.5"], "routed_scaling_factor is 2.5, expected 1.0"),
        (
            [f"--model.{name}=2" for name in ("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group")],
            "n_expert_groups selects a sigmoid router",
        ),
        (["--model.mlp_class_name=LLaMAMLP", "--model.n_expert=0"], "mlp_class_name is LLaMAMLP, expected LLaMAMoE"),
        (["--model.n_layer", "3"], "n_layer: 2 there, 3 here. Omit --model"),
        (["--model.first_k_dense_replace=1", "--model.intermediate_size=32"], "intermediate_size is 32, expected 40"),
        (["--train.tie_embeddings", "true"], "its embedding and output matrix differ"),
        (["--initial_checkpoint_dir", "x"], "both `initial_checkpoint_dir` and `upcycle` are set"),
        (["--model.n_expert", "0"], "n_expert is 0"),
        (["--model.n_expert_per_token", "1"], r"does not learn .* --model\.n_expert_per_token 2\.$"),
    ],
)
def test_refuses_flags_that_change_the_model(train, dense: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train("--upcycle", str(dense), *flags)


def test_model_file_must_fit_the_dense_model(train, tmp_path: Path, dense: Path, moe_fields: dict) -> None:
    import yaml

    file = tmp_path / "model.yaml"
    flags = ("--upcycle", str(dense), "--model", str(file), "--train.max_steps", "1")
    file.write_text(yaml.safe_dump(moe_fields | {"moe_intermediate_size": 40, "norm_eps": 1e-6}), encoding="utf-8")
    with pytest.raises(UserError, match=r"another model than this run's: norm_eps: 1e-05 there, 1e-06 here\."):
        train(*flags)
    file.write_text(yaml.safe_dump(moe_fields | {"moe_intermediate_size": 40}), encoding="utf-8")
    assert checkpoints.load_config(train(*flags) / "final").n_expert == 4


def test_refuses_another_tokenizer(train, tmp_path: Path, dense: Path, dense_fields: dict, prepared: Path) -> None:
    tokenizer = shutil.copytree(prepared / "tokenizer", tmp_path / "tokenizer")
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    other = save_tiny(tmp_path / "other", tiny_gpt(dense_fields), tokenizer)
    with pytest.raises(UserError, match=r"is not the one of .*other, which the run starts from"):
        train("--upcycle", str(other))
    with pytest.raises(UserError, match="is not the one of"):
        train("--initial_checkpoint_dir", str(other), *DENSE_FLAGS, "--model.intermediate_size=40")
    train("--upcycle", str(save_tiny(tmp_path / "without", tiny_gpt(dense_fields), None)), "--train.max_steps", "1")


def test_does_not_resume_another_run(train, tmp_path: Path, dense: Path, dense_fields: dict) -> None:
    shape = ("--train.max_steps", "5")
    out = train("--upcycle", str(dense), *shape)
    other = save_tiny(tmp_path / "other", tiny_gpt(dense_fields, seed=1), None)
    with pytest.raises(UserError, match=r"is from a run that started from .*dense, not from .*other"):
        train("--upcycle", str(other), *shape, "--resume", "auto")
    train("--upcycle", str(dense), *shape, "--resume", str(out / "step-00000004"), "--overwrite")
    with pytest.raises(UserError, match="--overwrite would delete"):
        train("--upcycle", str(save_tiny(out / "step-00000004", tiny_gpt(dense_fields), None)), "--overwrite")


def test_does_not_resume_a_run_from_scratch(train, dense: Path) -> None:
    scratch = ("--model.moe_intermediate_size", "40", "--model.n_expert", "8")
    out = train(*scratch, "--train.max_steps", "5")
    with pytest.raises(UserError, match=r"started without --upcycle, not from .*dense\. Omit --upcycle"):
        train("--upcycle", str(dense), "--resume", str(out / "step-00000004"), "--overwrite")
