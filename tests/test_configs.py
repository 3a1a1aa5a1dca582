"""Each shipped model and run: its comment is true, it can be built, and it trains."""

import json
import re
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config

from benchmarks.ablations import CHOICES
from custom_moe import MoE, use_custom_moe
from litmoe.config import PROJECT, parse_run
from litmoe.data.corpora import CORPORA
from litmoe.flops import count_parameters, training_flops_per_token
from litmoe.validation import check
from tests.helpers import training_steps

MODELS = sorted((PROJECT / "configs/models").glob("*.yaml"))
RUNS = [PROJECT / "configs/quickstart.yaml", *sorted((PROJECT / "configs/runs").glob("*.yaml"))]


def by_name(path: Path) -> str:
    return path.stem


def shrunken(config: Config) -> list[str]:
    """Return flags that make a model tiny without changing its architecture."""
    fields = {
        "block_size": 64,
        "padded_vocab_size": 384,
        "vocab_size": 384,
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_query_groups": 4 if config.n_query_groups == config.n_head else 2,
        "intermediate_size": 64,
    }
    if config.mlp_class_name == "LLaMAMoE":
        fields["moe_intermediate_size"] = 16
    return [text for name, value in fields.items() for text in (f"--model.{name}", str(value))]


def tiny_run(prepared: Path, out_dir: Path) -> list[str]:
    """Return flags for three steps on the tests' corpus."""
    flags = {
        "out_dir": out_dir,
        "precision": "32-true",
        "tokenizer_dir": prepared / "tokenizer",
        "data.init_args.train_data_path": prepared / "data" / "train",
        "data.init_args.val_data_path": prepared / "data" / "val",
        "data.init_args.num_workers": 0,
        "train.max_seq_length": 16,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.max_steps": 3,
        "train.log_interval": 1,
        "eval.interval": 3,
        "eval.max_iters": 1,
        "sample.prompt": "Mia",  # in a context of 16 tokens there is no room for a long one
        "sample.max_new_tokens": 4,
        "progress": "false",
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def comment(path: Path) -> str:
    """Return the comment before a file's first setting as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


@pytest.mark.parametrize("path", MODELS, ids=by_name)
def test_stated_sizes_equal_the_built_model(path: Path) -> None:
    config = Config.from_file(path)
    tied = "train.tie_embeddings" in comment(path)
    with use_custom_moe(), torch.device("meta"):
        model = GPT(config)
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    total = sum(parameter.numel() for parameter in model.parameters())
    of_one_expert = {
        module: sum(p.numel() for p in module.experts.parameters()) // config.n_expert
        for module in model.modules()
        if isinstance(module, MoE)
    }
    active = total - sum((config.n_expert - config.n_expert_per_token) * size for size in of_one_expert.values())
    assert f"{total / 1e6:.1f} M parameters in all, {active / 1e6:.1f} M active for each token" in comment(path)
    assert count_parameters(config, tie_embeddings=tied)[:2] == (total, active)


def test_default_model_is_listed() -> None:
    assert Config.from_file(PROJECT / "configs/models/moe-200m.yaml") == Config.from_file(PROJECT / "model_config.yaml")


def test_gpt2_models_have_its_shape() -> None:
    """The sizes of OpenAI's models without their 1,024 learned positions, and with a vocabulary padded by 47."""
    for name, width, openai in (("gpt2-124m", 768, 124_439_808), ("gpt2-350m", 1024, 354_823_168)):
        config = Config.from_file(PROJECT / f"configs/models/{name}.yaml")
        assert count_parameters(config, tie_embeddings=True).total == openai - 1024 * width + 47 * width


@pytest.mark.parametrize("path", RUNS, ids=by_name)
def test_run_comments_are_true(path: Path) -> None:
    run = parse_run(["--config", str(path)])
    settings, text = run.settings, comment(path)
    check(settings, run.optimizer)
    assert f"uv run python run_train.py --config {path.relative_to(PROJECT).as_posix()}" in text
    assert settings.prepare.source in CORPORA
    assert settings.out_dir == Path("checkpoints", path.stem)  # runs never meet in one folder
    if path.parent.name != "runs":
        return
    context = settings.train.max_seq_length
    tokens = settings.train.max_tokens or settings.train.max_steps * settings.train.global_batch_size * context
    flops = tokens * training_flops_per_token(settings.model, context)
    number, unit, petaflop = re.search(r"Cost: ([\d.]+) ([MB]) tokens, ([\d.,]+) PFLOP", text).groups()
    assert number == f"{tokens / {'M': 1e6, 'B': 1e9}[unit]:.2f}"
    assert petaflop in (f"{flops / 1e15:,.0f}", f"{flops / 1e15:.2f}")
    if rate := re.search(r"\(([\d.]+) h on one GPU that reaches (\d+) TFLOP/s\)", text):
        assert float(rate[1]) == round(flops / (float(rate[2]) * 1e12) / 3600, 1)
    assert "Not run here" in text or "Measured" in text


def test_rows_named_by_the_quickstart_are_measured() -> None:
    """The comment behind a default names a row of benchmarks/ablations.py, and the committed table has it."""
    table = json.loads((PROJECT / "benchmarks/results/ablations_cpu.json").read_text(encoding="utf-8"))["rows"]
    for name in ("configs/quickstart.yaml", "configs/models/quickstart.yaml"):
        comments = re.findall(r"# .*\brows? (\".*)", (PROJECT / name).read_text(encoding="utf-8"))
        rows = [row for line in comments for row in re.findall(r'"([^"]+)"', line)]
        assert rows
        for row in rows:
            assert table[row]["flags"] == list(CHOICES[row].flags)


def test_gpt2_run_values() -> None:
    for name, steps in (
        ("fineweb-edu-gpt2-124m", 19073),
        ("fineweb-edu-gpt2-moe", 19073),
        ("openwebtext-gpt2-124m", 17234),
    ):
        run = parse_run(["--config", str(PROJECT / f"configs/runs/{name}.yaml")])
        train, evaluation, sample = run.settings.train, run.settings.eval, run.settings.sample
        assert train.global_batch_size * train.max_seq_length == 524_288
        assert (train.max_steps, train.lr_warmup_steps, train.max_norm) == (steps, 715, 1.0)
        assert (run.optimizer["init_args"]["lr"], train.min_lr) == (6.0e-4, 6.0e-5)
        assert run.optimizer["init_args"]["weight_decay"] == 0.1
        assert (evaluation.interval, train.save_interval, train.tie_embeddings) == (250, 5000, True)
        assert sample.prompt == "Hello, I'm a language model,"
        assert run.has_auto_micro_batch


@pytest.mark.parametrize("path", RUNS, ids=by_name)
def test_runs_train_at_a_small_size(path: Path, train, prepared: Path, tmp_path: Path) -> None:
    config = parse_run(["--config", str(path)]).settings.model
    # torchao compiles the update of each shape, which takes a minute (tests/train/test_optimizers.py does it).
    with torch.compiler.set_stance("force_eager"):
        out_dir = train(*tiny_run(prepared, tmp_path / "run"), *shrunken(config), "--config", str(path))
    assert training_steps(out_dir) == [1, 2, 3] and (out_dir / "final" / "lit_model.pth").is_file()


@pytest.mark.parametrize("path", MODELS, ids=by_name)
def test_models_train_at_a_small_size(path: Path, train, prepared: Path, tmp_path: Path) -> None:
    flags = shrunken(Config.from_file(path))
    out_dir = train(*tiny_run(prepared, tmp_path / "run"), "--model", str(path), *flags)
    assert (out_dir / "final" / "lit_model.pth").is_file()
