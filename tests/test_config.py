"""Every setting works or is refused by name, and every mistake gives one message."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import litgpt.args
import pytest
import yaml
from litgpt import Config

import litmoe.config
from litmoe.cli import UserError
from litmoe.config import PROJECT, SHORT_FLAGS, EvalArgs, LogArgs, RunSettings, TrainArgs, parse_run, run_parser
from litmoe.hardware import choose_precision, cpu_has_bf16
from litmoe.validation import check
from tests.helpers import MOE_200M

RUN_FILES = [PROJECT / "train_config.yaml", *sorted(PROJECT.glob("configs/*.yaml"))]


NORMALIZED = "--model.norm_topk_prob=true"


@pytest.fixture
def accepted(tmp_path: Path, moe_fields: dict):
    """``accepted("--flag", "value")`` parses and checks a run of the tiny model."""
    run_file = tmp_path / "run.yaml"
    settings = {"model": moe_fields, "train": {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}}
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def call(*flags: str) -> None:
        run = parse_run(["--config", str(run_file), *flags])
        check(run.settings, run.optimizer)

    return call


@pytest.fixture
def refusal(accepted):
    """Return ``refusal("--flag", "value")``: the error message of parsing or checking."""

    def call(*flags: str) -> str:
        with pytest.raises(UserError) as caught:
            accepted(*flags)
        return str(caught.value)

    return call


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_run_files_are_valid(path):
    run = parse_run(["--config", str(path)])
    check(run.settings, run.optimizer)


def test_default_run_values():
    run = parse_run([])
    settings = run.settings
    assert settings.model == Config.from_file(PROJECT / "model_config.yaml")
    assert {name: getattr(settings.model, name) for name in MOE_200M} == MOE_200M
    assert (settings.out_dir, settings.tokenizer_dir) == (Path("checkpoints"), Path("data/tokenizer"))
    assert settings.train == TrainArgs(
        global_batch_size=8,
        micro_batch_size="auto",
        log_interval=1,
        max_tokens=320000,
        lr_warmup_steps=5,
        save_interval=10,
        max_norm=1.0,
        min_lr=3.0e-5,
    )
    assert (settings.eval.interval, settings.eval.max_iters, settings.logger_name) == (10, 5, "csv")
    assert run.optimizer["class_path"] == "torch.optim.AdamW"
    assert (run.optimizer["init_args"]["lr"], run.optimizer["init_args"]["weight_decay"]) == (3.0e-4, 0.01)
    assert settings.data.num_workers == 2


def test_flags_override_the_run_file(tmp_path):
    run = parse_run(
        ["--micro-batch-size", "2", "--train.max-tokens=99", "--model.n_layer", "3", "--optimizer.init_args.lr", "1e-2"]
    )
    assert run.settings.train.micro_batch_size == 2
    assert run.settings.train.max_tokens == 99
    assert (run.settings.model.n_layer, run.settings.model.n_embd) == (3, 768)
    assert run.optimizer["init_args"]["lr"] == 0.01
    first = parse_run(["--seed", "7", "--config", str(PROJECT / "configs/quickstart.yaml")])
    assert (first.settings.seed, first.settings.model.name) == (7, "quickstart")


def test_switch_needs_no_value():
    settings = parse_run(["--overwrite", "--progress", "--compile", "--seed", "3"]).settings
    assert (settings.overwrite, settings.progress, settings.compile, settings.seed) == (True, True, True, 3)
    assert parse_run(["--compile", "false", "--progress=null"]).settings.compile is False


def test_model_file_replaces_the_model(tmp_path):
    (tmp_path / "dense.yaml").write_text(
        "name: dense\nn_layer: 1\nn_embd: 32\nn_head: 2\nmlp_class_name: LLaMAMLP\nintermediate_size: 64\n"
    )
    model = parse_run(["--model", str(tmp_path / "dense.yaml"), "--model.n_layer", "2"]).settings.model
    assert (model.name, model.n_layer, model.n_expert) == ("dense", 2, 0)


@pytest.mark.parametrize("name", ["EvalArgs", "TrainArgs", "LogArgs"])
def test_defaults_are_those_of_litgpt(name: str) -> None:
    ours, theirs = getattr(litmoe.config, name), getattr(litgpt.args, name)
    assert issubclass(ours, theirs)
    defaults = {field.name: field.default for field in fields(theirs)}
    assert {field.name: field.default for field in fields(ours)}.items() >= defaults.items()


def run_python(*lines: str) -> str:
    """Return the output of a program in a new process."""
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    return result.stdout


@pytest.mark.parametrize("script", ["run_train", "finetune"])
def test_mistakes_are_reported_without_torch(script: str) -> None:
    printed = run_python(
        "import sys",
        f"import {script}",
        "for flag in ('--help', '--train.max_stepz=1', '--train.max_steps=x', '--config=missing.yaml'):",
        f"    sys.argv = ['{script}.py', flag]",
        "    try:",
        f"        {script}.main()",
        "    except (SystemExit, ValueError):",
        "        print('ended', flag, sorted({'torch', 'litgpt', 'lightning'} & sys.modules.keys()))",
    )
    imported = [line.rpartition(" ")[2] for line in printed.splitlines() if line.startswith("ended")]
    assert imported == ["[]"] * 4


def test_litgpt_import_skips_metric_packages() -> None:
    printed = run_python(
        "import litmoe.config, litgpt.pretrain, litgpt.args, sys",
        "assert litgpt.args.TrainArgs is litmoe.config.litgpt_args.TrainArgs",
        "print(sorted({'torchvision', 'transformers', 'scipy', 'sklearn'} & sys.modules.keys()))",
    )
    assert printed == "[]\n"


def test_saved_settings_are_a_run_file(tmp_path):
    flags = ("--train.max_steps", "5", "--eval.hellaswag", "Rowan/hellaswag", "--eval.hellaswag_limit", "9")
    run = parse_run(["--config", str(PROJECT / "configs/quickstart.yaml"), *flags])
    assert (run.settings.eval.hellaswag, run.settings.eval.hellaswag_limit) == ("Rowan/hellaswag", 9)
    saved = tmp_path / "hyperparameters.yaml"
    saved.write_text(yaml.safe_dump(run.resolved), encoding="utf-8")
    again = parse_run(["--config", str(saved)])
    assert again.resolved == run.resolved
    assert (again.settings.train, again.settings.eval) == (run.settings.train, run.settings.eval)


def test_print_config_and_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_run(["--print_config", "--train.max_steps", "5"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["max_steps"] == 5
    with pytest.raises(SystemExit):
        parse_run(["--help"])
    text = capsys.readouterr().out
    for owner, prefix in ((TrainArgs, "train."), (EvalArgs, "eval."), (LogArgs, "log."), (RunSettings, "")):
        for field in fields(owner):
            assert f"--{prefix}{field.name}" in text
    assert all(f"--{short}" in text for short in SHORT_FLAGS)


def test_flags_have_help_texts():
    parser = run_parser()
    ours = {field.name for field in fields(RunSettings)}
    for action in parser._actions:
        name = action.dest
        if name in ours or name.split(".")[0] in ("eval", "moe", "sample", "prepare"):
            assert action.help, name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.max_tokns", "4"], "'train.max_tokns'; the nearest known one is 'train.max_tokens'"),
        (["--micro-batch-sise", "4"], "nearest known one is 'micro_batch_size'"),
        (["--optimizer.init_args.weight_decy", "1"], "nearest known one is 'optimizer.init_args.weight_decay'"),
        (["--data.init_args.num_wrkers", "1"], "nearest known one is 'data.init_args.num_workers'"),
        (["--optimizer.class_path", "torch.optim.Nope"], "has no attribute 'Nope'"),
        (["--seed", "x"], "seed is x; expected a whole number"),
        (["--moe.backend=x"], "moe.backend is x; expected auto, grouped_mm, triton, loop"),
        (["--precision", "x"], "precision is x; expected bf16-mixed, bf16-true, 16-mixed, 32-true or null"),
        (["--loggers", "[x]"], "loggers is ['x']; expected a list of csv, tensorboard, wandb or null"),
        (["--config"], "--config expects the path"),
        (["--model", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["--model.n_head", "5"], "self.n_embd % self.n_head == 0"),
        (["--train.max_norm", "-1"], "train.max_norm is -1.0; expected more than 0, or null for no clipping"),
        (["--model.n_expert", "0"], "n_expert is 0, which would build a model without feed-forward"),
        (["--model.n_expert_per_token", "9"], "expected a number from 1 to n_expert (4)"),
        (
            ["--moe.bias_update_rate", "0.001"],
            "only a sigmoid router has a selection bias and this model has none; --moe.bias_update_rate 0",
        ),
        (["--moe.bias_update_rate", "-0.001"], "moe.bias_update_rate is -0.001; expected 0"),
        (["--model.mlp_class_name", "LLaMAMLP", "--model.intermediate_size", "8"], "which has no experts"),
        (
            ["--micro-batch-size", "3"],
            "global_batch_size 4 is no multiple of micro_batch_size 3; --global-batch-size 6",
        ),
        (["--global-batch-size", "1"], "--global-batch-size 2 would fit"),
        (["--max-seq-length", "65"], "max_seq_length is 65 but the model's block_size is 64"),
        (["--train.max_steps", "null"], "no end is set"),
        (["--train.max_steps", "-1"], "train.max_steps is -1"),
        (["--train.min_lr", "1.0"], "--train.min_lr 3.0e-05"),
        (["--schedule.name", "wsd", "--schedule.decay_fraction", "1.5"], "above 0 and at most 1"),
        (["--schedule.decay_fraction", "0.5"], "--schedule.name wsd"),
        (["--schedule.name", "linear"], "schedule.name"),
        (["--optimizer.init_args.lr", "0.0"], "the optimizer's lr is 0.0"),
        (["--embedding_lr_factor", "0"], "embedding_lr_factor is 0.0; expected more than 0"),
        (["--document_masking", "true", "--model.sliding_window_size", "16"], "document_masking has no effect"),
        (["--train.log_interval", "0"], "train.log_interval is 0"),
        (["--log.teamspace", "x"], "log.teamspace belongs to a logger that is not offered"),
        (["--log.project", "x"], "log.project is only used by W&B"),
        (["--eval.interval", "0"], "eval.interval is 0"),
        (["--eval.hellaswag_interval", "0"], "eval.hellaswag_interval is 0; expected at least 1, or null"),
        (["--eval.hellaswag_limit", "9"], "eval.hellaswag_limit is set, but no questions are scored"),
        (["--eval.hellaswag_limit", "-1"], "eval.hellaswag_limit is -1; expected at least 1, or null"),
        (["--eval.evaluate_example", "random"], "eval.evaluate_example has no effect here"),
        (["--devices", "none"], "expected `auto` or a number"),
        (["--resume", "auto", "--initial_checkpoint_dir", "x"], "both `initial_checkpoint_dir` and `resume`"),
        (["--data.init_args.val_data_path", "elsewhere/val"], "folders train and val of one prepared corpus"),
    ],
)
def test_mistakes_give_one_message(refusal, flags, message):
    assert message in refusal(*flags)


GROUPS = ("--model.n_expert_groups=2", "--model.n_topk_groups=2", "--model.n_topk_scores_per_group=1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.n_expert_per_token=1"], "the one weight is always 1"),
        ([*GROUPS, "--model.n_expert_per_token=1", "--model.norm_topk_prob=true"], "--model.norm_topk_prob false"),
        ([*GROUPS, "--model.n_topk_groups=1", "--model.n_expert_per_token=3"], "at least --model.n_topk_groups 2"),
        ([*GROUPS, "--model.n_topk_groups=0"], "n_topk_groups is 0; expected a number from 1 to n_expert_groups (2)"),
        ([*GROUPS, "--model.n_topk_groups=3"], "n_topk_groups is 3"),
        ([*GROUPS, "--model.n_topk_scores_per_group=0"], "n_topk_scores_per_group is 0"),
        ([*GROUPS, "--model.n_topk_scores_per_group=3"], "n_topk_scores_per_group <= experts_per_group"),
        ([*GROUPS, "--model.n_expert=5"], "n_expert % self.n_expert_groups == 0"),
        (["--model.n_topk_groups=1"], "n_topk_groups would have no effect: n_expert_groups is not set"),
        (["--model.n_topk_scores_per_group=1"], "n_topk_scores_per_group would have no effect"),
        (["--model.routed_scaling_factor=0.0"], "routed_scaling_factor is 0.0"),
        (["--model.routed_scaling_factor=.nan"], "routed_scaling_factor is nan"),
        (["--model.n_shared_expert=-1"], "n_shared_expert is -1"),
        (["--model.moe_intermediate_size=0"], "moe_intermediate_size is 0"),
        (["--model.first_k_dense_replace=2"], "first_k_dense_replace is 2; expected a number from 0 to 1"),
        (["--model.first_k_dense_replace=-1"], "first_k_dense_replace is -1"),
    ],
    ids=str,
)
def test_invalid_routing_is_refused(refusal, flags, message):
    assert message in refusal(*flags)


@pytest.mark.parametrize("flags", [(), ("--model.n_expert=9",), ("--model.n_expert=7",), (*GROUPS, NORMALIZED)])
def test_suggested_alternatives_are_valid(refusal, accepted, flags):
    one = (*flags, "--model.n_expert_per_token", "1")
    alternatives = refusal(*one).partition("send a token. ")[2]
    for alternative in alternatives.removesuffix(".").split(", or "):
        accepted(*one, *alternative.split())


def test_single_expert_is_accepted(accepted):
    accepted("--model.n_expert", "1", "--model.n_expert_per_token", "1")


def test_all_problems_are_reported_together(refusal):
    message = refusal("--micro-batch-size", "3", "--model.n_expert", "0", "--eval.interval", "0")
    assert message.count("\n") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {max_tokns: 4}", "'train.max_tokns'; the nearest known one is 'train.max_tokens'"),
        ("trian: {max_tokens: 4}", "unknown setting 'trian"),
        ("model: {n_layr: 3}", "nearest known one is 'model.n_layer'"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 3}}", "'optimizer.lrr'"),
        ("- a list", "expected a YAML mapping"),
        ("a: [1", "is not valid YAML"),
        ("", "holds NoneType"),
        ("model: other.yaml", "no config file at other.yaml: "),
    ],
)
def test_mistake_in_file_names_file_or_key(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_run(["--config", str(path)])
    assert message in str(caught.value)


@pytest.mark.parametrize("has_instructions", [False, True])
def test_precision_without_a_gpu(monkeypatch, has_instructions):
    """Also on a machine with a GPU, if the GPU is hidden."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("litmoe.hardware.cpu_multiplies_bf16", lambda: has_instructions)
    assert choose_precision("32-true") == ("32-true", None)
    precision, note = choose_precision("bf16-true")
    assert precision == "bf16-true"
    assert "no instructions for bf16" in str(note) if not cpu_has_bf16() else note is None
    precision, note = choose_precision("16-mixed")
    assert precision == "32-true"
    assert "16-mixed needs a GPU;" in str(note)
    precision, note = choose_precision("bf16-mixed")
    if has_instructions:
        assert choose_precision(None) == (precision, note) == ("bf16-mixed", None)
    else:
        assert choose_precision(None) == ("32-true", None)
        assert precision == "32-true"
        assert "bf16-mixed needs a GPU or a CPU that multiplies bf16" in str(note)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizer", "litmoe.train.muon.Muon"), "litmoe.train.muon.Muon needs complete ones"),
        (("--eval.hellaswag", "questions.jsonl"), "can't score HellaSwag during training"),
        (("--compile", "true"), "does not support torch.compile"),
    ],
)
def test_fsdp_limits_are_refused(refusal, flags, message):
    assert message in refusal("--strategy", "fsdp", "--devices", "2", *flags)
