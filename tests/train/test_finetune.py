"""Finetuning as ``finetune.py`` does it: losses, saved checkpoints, LoRA, refusals. (Exact resume: test_resume.py.)"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import litgpt.lora
import litgpt.prompts
import pytest
import torch
from litgpt import GPT, Config, Tokenizer
from litgpt.scripts.merge_lora import merge_lora

import finetune
from custom_moe import use_custom_moe
from custom_moe.router import TopKRouter
from litmoe import checkpoints
from litmoe.cli import UserError, exit_with_message
from litmoe.data.conversations import encode_conversation, load_prompt_style
from litmoe.data.instructions import InstructArgs, conversations, prepare_instructions
from litmoe.finetune_config import parse_finetuning
from litmoe.train.finetune import merge_weights
from litmoe.train.saving import locked
from tests.helpers import column, save_tiny, tiny_gpt

SIGMOID = {"n_expert_groups": 2, "n_topk_groups": 2, "n_topk_scores_per_group": 2, "norm_topk_prob": True}


def answer_loss(folder: Path, data_dir: Path, split: str = "val", style: str = "phi-2") -> float:
    """Return nats per answer token, computed by stock LitGPT one conversation at a time."""
    gpt = GPT(checkpoints.load_config(folder))
    gpt.load_state_dict(checkpoints.load_weights(folder))
    tokenizer, total, tokens = Tokenizer(folder), 0.0, 0
    for messages in conversations(data_dir, split):
        encoded = encode_conversation(messages, tokenizer, litgpt.prompts.PromptStyle.from_name(style))
        ids = torch.tensor(encoded.input_ids)[: gpt.max_seq_length + 1]
        is_answer = torch.tensor(encoded.is_answer)[: len(ids)]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(gpt(ids[None, :-1])[0], ids[1:], reduction="none")
        total += float(losses[is_answer[1:]].sum())
        tokens += int(is_answer[1:].sum())
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--lora_r", "4", "--lora_dropout", "0")], ids=["full", "lora"])
def test_compiled_run_equals_eager_run(tune, roomy_base, tmp_path, flags):
    """For any numbers and lengths of rows: a graph for each shape would raise after some steps."""
    flags = ("--checkpoint_dir", str(roomy_base), *flags, "--train.max_steps", "24", "--micro-batch-size", "4")
    plain, compiled = (
        tune("--out_dir", str(tmp_path / value), "--compile", value, *flags) for value in ("false", "true")
    )
    for name in ("train_loss", "val_loss"):
        assert column(compiled, name) == pytest.approx(column(plain, name), rel=1e-3)


@pytest.mark.parametrize("flags", [(), ("--lora_r", "4", "--lora_mlp", "true")], ids=["full", "lora"])
def test_validation_loss_decreases(tune, base, instructions, flags):
    out = tune(*flags)
    losses = column(out, "val_loss")
    assert losses[0] == pytest.approx(answer_loss(base, instructions), rel=1e-5)
    assert losses[-1] == pytest.approx(answer_loss(out / "final", instructions), rel=1e-5)
    assert losses[-1] < losses[0] - 0.3
    assert type(load_prompt_style(out / "final")) is litgpt.prompts.Phi2
    model = checkpoints.load_model(out / "final", torch.device("cpu"), torch.float32)
    stock = GPT(checkpoints.load_config(out / "final"))
    stock.load_state_dict(checkpoints.load_weights(out / "final"))
    ids = torch.randint(0, 384, (1, 16))
    torch.testing.assert_close(model(ids), stock(ids), rtol=1e-4, atol=1e-4)


def test_step_loss_is_mean_over_answer_tokens(tune, tmp_path):
    """Two micro batches of different lengths equal one large batch. A mean of their means would not."""
    flags = ("--moe.load_balancing_loss", "0.0", "--moe.z_loss", "0.0", "--train.max_steps", "2")
    accumulated = tune(*flags, "--out_dir", str(tmp_path / "a"))
    at_once = tune(*flags, "--out_dir", str(tmp_path / "b"), "--micro-batch-size", "4")
    for name in ("train_loss", "grad_norm"):
        assert column(accumulated, name) == pytest.approx(column(at_once, name), rel=1e-5)
    assert column(accumulated, "total_tokens") == column(at_once, "total_tokens")


LORA_ALL = ("--lora_r", "4", "--lora_mlp", "true", "--lora_dropout", "0")


@pytest.mark.parametrize("flags", [(), LORA_ALL], ids=["full", "lora"])
def test_packed_run_equals_one_by_one(tune, roomy_base, instructions, tmp_path, flags):
    """Micro batches of 4 are packed, and micro batches of 1 cannot be.

    Without the losses of the routers, which are means over the micro batches and not over tokens.
    """
    flags = ("--checkpoint_dir", str(roomy_base), "--train.max_steps", "6", *flags)
    flags += ("--moe.load_balancing_loss", "0.0", "--moe.z_loss", "0.0")
    packed, alone = (tune(*flags, "--out_dir", str(tmp_path / n), "--micro-batch-size", n) for n in ("4", "1"))
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(packed, name) == pytest.approx(column(alone, name), rel=1e-4)
    assert column(packed, "total_tokens") == column(alone, "total_tokens")
    assert column(packed, "val_loss")[-1] == pytest.approx(answer_loss(packed / "final", instructions), rel=1e-5)


@pytest.mark.parametrize("flags", [(), ("--lora_r", "4")], ids=["full", "lora"])
def test_sliding_windows_get_one_conversation_per_row(tune, tmp_path, moe_fields, tokenizer_dir, instructions, flags):
    """LitGPT's attention with a window ignores masks, so a packed row would mix conversations."""
    fields = {**moe_fields, "block_size": 144, "sliding_window_size": 40, "sliding_window_indices": [1, 0]}
    base = save_tiny(tmp_path / "windows", tiny_gpt(fields), tokenizer_dir)
    out = tune("--checkpoint_dir", str(base), "--micro-batch-size", "4", "--train.max_steps", "2", *flags)
    assert column(out, "val_loss")[0] == pytest.approx(answer_loss(base, instructions), rel=1e-5)
    assert column(out, "val_loss")[-1] == pytest.approx(answer_loss(out / "final", instructions), rel=1e-5)


def test_warns_of_constant_routers(tune, tmp_path, moe_fields, tokenizer_dir, capsys):
    fields = moe_fields | {"block_size": 48, "n_expert_per_token": 1}
    base = save_tiny(tmp_path / "other", tiny_gpt(fields), tokenizer_dir)
    flags = ("--checkpoint_dir", str(base), "--train.max_steps", "1")
    tune(*flags)
    assert "warning: this model sends each token to 1 expert" in capsys.readouterr().out
    tune(*flags, "--lora_r", "4", "--out_dir", str(tmp_path / "lora"))  # which leaves routers as they are
    assert "warning" not in capsys.readouterr().out


def test_lora_refuses_bias_updates(tune, tmp_path, moe_fields, tokenizer_dir):
    """Selection biases are not part of the LoRA updates, so changing them would change the base."""
    base = save_tiny(tmp_path / "other", tiny_gpt(moe_fields | {"block_size": 48} | SIGMOID), tokenizer_dir)
    with pytest.raises(UserError, match=r"LoRA does not change the routers' selection bias.*--lora_r 0"):
        tune("--checkpoint_dir", str(base), "--lora_r", "4", "--moe.bias_update_rate", "0.01")


def test_lora_updates_are_read_by_litgpt(tune, base, tmp_path):
    out = tune("--lora_r", "4", "--lora_mlp", "true", "--lora_alpha", "8")
    before, after = checkpoints.load_weights(base), checkpoints.load_weights(out / "final")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "qkv" in name or ".mlp." in name}
    (out / "final" / "lit_model.pth").rename(tmp_path / "ours.pth")
    # LitGPT's script wants its own layer's keys, so the base goes through its model once.
    merge_lora(out / "final")
    litgpts = torch.load(out / "final" / "lit_model.pth", weights_only=True)
    litgpts = litgpts.get("model", litgpts)
    for name, weight in torch.load(tmp_path / "ours.pth", weights_only=True).items():
        torch.testing.assert_close(litgpts[name], weight, msg=name)


class RouterWithLinear(TopKRouter):
    """A router with a layer that has the name of the one inside LitGPT's LoRA layers."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.n_embd, config.n_expert)


def test_merged_weights_have_the_keys_of_the_model(moe_fields):
    with use_custom_moe(router=RouterWithLinear):
        expected = GPT(Config(**moe_fields)).state_dict()
        gpt = litgpt.lora.GPT(litgpt.lora.Config(**moe_fields, lora_r=2, lora_query=True, lora_mlp=True))
    assert merge_weights(gpt)[0].keys() == expected.keys()


def test_tied_embeddings_stay_tied(tune, tmp_path, moe_fields, tokenizer_dir):
    gpt = tiny_gpt({**moe_fields, "block_size": 48})
    gpt.transformer.wte.weight = gpt.lm_head.weight
    tied = save_tiny(tmp_path / "tied", gpt, tokenizer_dir)
    out = tune("--checkpoint_dir", str(tied), "--train.max_steps", "2")
    assert checkpoints.is_tied(checkpoints.load_weights(out / "final"))
    out = tune("--checkpoint_dir", str(tied), "--resume", "auto", "--train.max_steps", "3")
    assert checkpoints.is_tied(checkpoints.load_weights(out / "final"))


@pytest.mark.parametrize("head", ["false", "true"])
def test_lora_on_tied_embeddings(tune, tmp_path, moe_fields, tokenizer_dir, head):
    """Tied weights stay tied unless the head has its own LoRA updates."""
    gpt = tiny_gpt({**moe_fields, "block_size": 48})
    gpt.transformer.wte.weight = gpt.lm_head.weight
    tied = save_tiny(tmp_path / "tied", gpt, tokenizer_dir)
    out = tune("--checkpoint_dir", str(tied), "--lora_r", "4", "--lora_head", head, "--train.max_steps", "2")
    weights = checkpoints.load_weights(out / "final")
    assert checkpoints.is_tied(weights) == (head == "false")
    assert torch.equal(weights["transformer.wte.weight"], gpt.transformer.wte.weight)
    assert torch.equal(weights["lm_head.weight"], gpt.lm_head.weight) == (head == "false")


@pytest.mark.parametrize(
    "fields",
    [
        {"mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "n_expert": 0},
        {"mlp_class_name": "GptNeoxMLP", "intermediate_size": 48, "n_expert": 0, "bias": True},
    ],
    ids=["swiglu", "gelu"],
)
def test_dense_models(tune, tmp_path, moe_fields, tokenizer_dir, fields):
    dense = {**moe_fields, "block_size": 48, **fields}
    folder = save_tiny(tmp_path / "dense", tiny_gpt(dense), tokenizer_dir)
    for flags in ((), ("--lora_r", "2", "--lora_mlp", "true", "--lora_head", "true", "--overwrite", "true")):
        losses = column(tune("--checkpoint_dir", str(folder), *flags), "val_loss")
        assert math.isfinite(losses[-1]) and losses[-1] < losses[0]


def test_resume_rejects_other_lora_settings(tune):
    tune("--lora_r", "4", "--train.max_steps", "1")
    for flags, message in (
        (("--lora_r", "8"), "lora_r was 4 and is now 8"),
        (("--lora_r", "4", "--lora_mlp", "true"), "lora_mlp was False and is now True"),
        ((), "lora_r was 4 and is now 0"),
    ):
        with pytest.raises(UserError, match=rf"{message}.*finetune.py .* --out_dir NEW"):
            tune(*flags, "--resume", "auto", "--train.max_steps", "10")


def test_resume_rejects_pretraining_runs(tune, base):
    """It raised KeyError: 'prompt_style'."""
    with pytest.raises(UserError, match=r"is from a pretraining run.*finetune\.py .* --out_dir NEW"):
        tune("--resume", str(base))


def test_resume_finds_its_base_checkpoint(tune, base, tmp_path, monkeypatch):
    out = tune("--train.max_steps", "1")
    flags = ["--config", str(tmp_path / "finetune.yaml"), "--out_dir", str(out)]
    assert parse_finetuning([*flags, "--resume", "auto"]).settings.checkpoint_dir == base
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "checkpoints" / "newer" / "final")
    assert parse_finetuning(flags).settings.checkpoint_dir == Path("checkpoints/newer/final")
    with pytest.raises(UserError, match=r"complete\.json|no checkpoint"):
        parse_finetuning([".", *flags])


def test_out_dir_must_not_be_a_checkpoint(tune, base):
    for place in (base, base / "deeper"):
        with pytest.raises(UserError, match="is a checkpoint; put the run elsewhere"):
            tune("--out_dir", str(place))


def test_finetuning_locks_its_out_dir(base, tmp_path, monkeypatch, capsys):
    """The lock comes first: the data folder of the flags does not exist."""
    flags = ["--data_dir", str(tmp_path / "nowhere"), "--out_dir", str(tmp_path / "out"), "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(base), *flags])
    with locked(tmp_path / "out"), pytest.raises(SystemExit, match="1"):
        exit_with_message(finetune.main)
    assert f"{tmp_path / 'out'} is used by another run (process {os.getpid()} on" in capsys.readouterr().err


def test_resume_rejects_other_prompt_style(tune):
    tune("--train.max_steps", "1")
    with pytest.raises(UserError, match="prompt_style was phi-2 and is now falcon"):
        tune("--resume", "auto", "--prompt_style", "falcon", "--train.max_steps", "10")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data_dir", "nowhere"), "nowhere.instructions.json does not exist"),
        (("--prompt_style", "alpacca"), "did you mean alpaca"),
        (("--train.max_tokens", "1000"), "train.max_tokens counts tokens of a text"),
        (("--lora_r", "4", "--lora_query", "false", "--lora_value", "false"), "no part of the model gets LoRA"),
        (("--sample.prompt", "Where? " * 60), "leaves no room|has .* tokens, but the context has"),
        (("--lora_rank", "4"), "the nearest known one is 'lora_r'"),
        (("--data.class_path", "litgpt.data.Alpaca2k"), "expected litmoe.data.InstructionData"),
    ],
)
def test_mistakes_give_one_message(tune, flags, message):
    with pytest.raises(UserError, match=message):
        tune(*flags)


def test_long_questions_are_skipped(tune, tmp_path):
    """The sample uses the first validation question that fits the context. If none fits, the message says so."""
    short = [{"prompt": f"Where is {name}?", "response": "At the sea."} for name in ("Mia", "Tom", "Lily", "Ben")]
    long = [{"prompt": f"Where is {row['prompt']}? " * 30, "response": "At the sea."} for row in short]

    def tune_on(train, val, *flags):
        for name, rows in (("train", train), ("val", val)):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        prepare_instructions(InstructArgs(str(tmp_path / "in"), tmp_path / "data", overwrite=True))
        flags = ("--data_dir", str(tmp_path / "data"), "--train.max_steps", "2", "--overwrite", "true", *flags)
        return tune(*flags)

    assert math.isfinite(column(tune_on(short[:3], [*long, short[3]]), "val_loss")[-1])
    none_fits = r"none of the 4 held-out conversations of .* fits: \d+ to \d+ tokens come before their first answer"
    with pytest.raises(UserError, match=f"{none_fits}, and the context has 48.*can read no more"):
        tune_on(short, long)
    with pytest.raises(UserError, match=f"{none_fits}, and the context has 40.*--max_seq_length.*read 48 tokens"):
        tune_on(short, long, "--max_seq_length", "40")
    with pytest.raises(UserError, match=r"train has 0 conversations that fit \(4 do not: .*--max_seq_length"):
        tune_on(long, short)


def test_saved_settings_repeat_the_run(tune, tmp_path):
    out = tune("--lora_r", "2", "--train.max_steps", "2")
    again = tune("--config", str(out / "final" / "hyperparameters.yaml"), "--out_dir", str(tmp_path / "again"))
    one, other = (checkpoints.read_metadata(path / "final").files["lit_model.pth"] for path in (out, again))
    assert one == other


def test_finetuning_keeps_the_trained_context(tmp_path, moe_fields, tokenizer_dir):
    base = save_tiny(
        tmp_path / "final", tiny_gpt(moe_fields), tokenizer_dir, hyperparameters={"train": {"max_seq_length": 48}}
    )
    run = parse_finetuning([str(base)])
    assert run.settings.train.max_seq_length == run.resolved["train"]["max_seq_length"] == 48
    assert parse_finetuning([str(base), "--max_seq_length", "64"]).settings.train.max_seq_length == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [(), ("--lora_r", "4", "--lora_mlp", "true"), ("--strategy", "fsdp")],
    ids=["full", "lora", "full by fsdp"],
)
def test_two_processes_equal_one(tune, roomy_base, tmp_path, flags):
    """With both conversations of a micro batch in one row."""
    flags = ("--checkpoint_dir", str(roomy_base), "--lora_dropout", "0.0", *flags)
    one = tune(*flags, "--out_dir", str(tmp_path / "one"))
    door = Path(__file__).resolve().parents[2] / "finetune.py"
    command = [sys.executable, str(door), "--config", str(tmp_path / "finetune.yaml"), *flags]
    two = tmp_path / "two"
    subprocess.run([*command, "--devices", "2", "--out_dir", str(two)], check=True, timeout=280)
    for name in ("train_loss", "val_loss", "total_tokens", "load_balancing_loss"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-6)
    expected, found = (checkpoints.load_weights(out / "final") for out in (one, two))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)
