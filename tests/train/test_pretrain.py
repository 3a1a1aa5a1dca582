"""Complete runs of a tiny model through ``litgpt.pretrain.setup``."""

import math
import re
import shutil
import sys
from pathlib import Path

import lightning as L
import litgpt.pretrain
import pytest
import torch
from litgpt import GPT, Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.config import parse_run
from litmoe.data.loader import TokenWindows
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.train import loop
from litmoe.train.preflight import ready
from litmoe.train.pretrain import pretrain, scale_gelu_projections, zero_projections
from tests.helpers import SIGMOID_FLAGS, column, metric_rows, save_tiny, tiny_gpt, training_steps


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = checkpoints.load_weights(a), checkpoints.load_weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_complete_run(train):
    out = train("--train.max_steps", "40")
    losses = column(out, "train_loss")
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1
    assert losses[0] == pytest.approx(math.log(384), abs=0.5)
    assert training_steps(out) == list(range(1, 41))
    assert column(out, "total_tokens") == [64 * step for step in range(1, 41)]
    assert set(column(out, "iter_tokens")) == {64}
    rates = column(out, "learning_rate")
    assert (rates[0], rates[1], rates[-1]) == (pytest.approx(5e-3), pytest.approx(1e-2), pytest.approx(1e-4))
    assert len(column(out, "val_loss")) == 10
    assert column(out, "val_loss")[-1] < 4
    assert column(out, "time") == sorted(column(out, "time"))
    assert all(value > 0 for value in column(out, "grad_norm"))
    for layer in (0, 1):
        assert all(1 <= load <= 4 for load in column(out, f"expert_load_max/layer_{layer}"))
        assert all(0 <= load <= 1 for load in column(out, f"expert_load_min/layer_{layer}"))
        assert all(0.7 < entropy <= 1 for entropy in column(out, f"expert_load_entropy/layer_{layer}"))
        assert all(0.25 < probability < 1 for probability in column(out, f"router_confidence/layer_{layer}"))
        assert set(column(out, f"dead_experts/layer_{layer}")) == {0}
    balancing = column(out, "load_balancing_loss")
    assert balancing[0] == pytest.approx(1, abs=1e-6), "by an even load: there is no step before it"
    assert all(1 < value < 4 for value in balancing[1:])
    assert sorted(path.name for path in out.glob("step-*")) == ["step-00000032", "step-00000036"], (
        "3 with the final one"
    )
    assert checkpoints.read_metadata(out / "final").step == 40


def test_final_checkpoint_loads_in_stock_litgpt(trained):
    """LitGPT's own GPT loads it strictly and computes the logged validation loss."""
    gpt = GPT(Config.from_file(trained / "final" / "model_config.yaml"))
    assert type(gpt.transformer.h[0].mlp) is litgpt.model.LLaMAMoE
    gpt.load_state_dict(torch.load(trained / "final" / "lit_model.pth", weights_only=True))
    run = parse_run(["--config", str(trained / "run_config.yaml")])
    windows = TokenWindows(Path(run.settings.data.data_dir), "val", 16)
    tokens = torch.stack([windows[index].long() for index in range(6)])  # 3 batches of 2
    with torch.no_grad():
        logits = gpt(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(column(trained, "val_loss")[-1], rel=1e-5)


EIGHT_BITS = (
    *("--optimizer", "torchao.optim.AdamW8bit", "--optimizer.init_args.lr", "1.0e-2"),
    *("--optimizer.init_args.bf16_stochastic_round", "true"),
)


def test_8_bit_adam_resumes(train, tmp_path):
    """A low-memory run with stochastic rounding. The optimizer state of torchao has its own tensor classes."""
    flags = (*("--precision", "bf16-true", "--activation_checkpointing", "block"), *EIGHT_BITS)
    # Compiling each shape would take a minute; tests/train/test_optimizers.py has the compiled step.
    with torch.compiler.set_stance("force_eager"):
        full = train(*flags, "--out_dir", str(tmp_path / "full"))
        cut = shutil.copytree(full, tmp_path / "cut")
        train(*flags, "--out_dir", str(cut), "--resume", str(cut / "step-00000004"), "--overwrite")
    assert_same_weights(full / "final", cut / "final")
    weights, rounded = checkpoints.load_weights(full / "final"), checkpoints.load_weights(full / "step-00000004")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert not torch.equal(weights["lm_head.weight"], rounded["lm_head.weight"])
    moments = [
        state["exp_avg"] for state in checkpoints.load_training_state(cut / "final")["optimizer"]["state"].values()
    ]
    assert {moment.codes.dtype for moment in moments if hasattr(moment, "codes")} == {torch.uint8}
    with pytest.raises(UserError, match=r"trained with torchao\.optim\.AdamW8bit.*Resume with --optimizer torchao"):
        train("--out_dir", str(cut), "--resume", str(cut / "step-00000004"), "--overwrite")


def test_resume_auto(train, capsys):
    out = train("--resume", "auto")
    assert "this is a new run" in capsys.readouterr().out
    before = checkpoints.read_metadata(out / "final").files["lit_model.pth"].sha256
    train("--resume", "auto")
    assert "This run is finished" in capsys.readouterr().out
    assert checkpoints.read_metadata(out / "final").files["lit_model.pth"].sha256 == before
    train("--resume", "auto", "--train.max_steps", "16")
    assert "step 12 of 16" in capsys.readouterr().out
    assert training_steps(out) == list(range(1, 17))
    assert checkpoints.read_metadata(out / "final").step == 16


def test_resume_with_another_backend(train, tmp_path, capsys):
    """Checkpoints do not depend on the backend. Sums differ in their last digits."""
    full = train("--moe.backend", "loop", "--out_dir", str(tmp_path / "full"))
    cut = shutil.copytree(full, tmp_path / "cut")
    resumed = train(
        *("--moe.backend", "grouped_mm", "--out_dir", str(cut), "--resume", str(cut / "step-00000004"), "--overwrite"),
    )
    printed = capsys.readouterr().out
    assert printed.count("experts by loop.") == 1 and printed.count("experts by grouped_mm.") == 1
    assert training_steps(resumed) == training_steps(full) == list(range(1, 13))
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert column(resumed, name) == pytest.approx(column(full, name), rel=1e-4)


def test_unavailable_backend_is_refused(train, capsys):
    with pytest.raises(UserError, match=r"--moe.backend triton: .* needs a GPU.*\(--moe.backend auto\)"):
        train("--moe.backend", "triton")
    with pytest.raises(UserError, match=r"--moe.backend grouped_mm: .* needs widths of a multiple of 4"):
        train("--moe.backend", "grouped_mm", "--model.moe_intermediate_size", "18")
    train("--train.max_steps", "1")
    assert "experts by loop." in capsys.readouterr().out


def test_max_time_leaves_a_checkpoint(train, capsys):
    out = train("--train.max_time", "0.001")
    assert not (out / "final").exists()
    assert checkpoints.read_metadata(out / "step-00000001").step == 1
    assert "--resume auto" in capsys.readouterr().out
    train("--resume", "auto")
    assert training_steps(out) == list(range(1, 13))


def test_leftover_micro_batches_are_used(train):
    out = train("--train.max_steps", "null", "--train.max_tokens", "240")  # 7 micro batches of 32, two a step
    assert column(out, "iter_tokens") == [64, 64, 64, 32]
    assert column(out, "total_tokens")[-1] == 224


def test_accumulation_equals_one_large_batch(train, tmp_path):
    """Two micro batches of 2 equal one of 4. The balance losses too: they use the load of the last complete step."""
    flags = ("--moe.load_balancing_loss", "1.0", "--moe.z_loss", "0.1", "--train.max_steps", "3")
    accumulated = train(*flags, "--out_dir", str(tmp_path / "a"))
    at_once = train(*flags, "--out_dir", str(tmp_path / "b"), "--micro-batch-size", "4")
    for name in ("train_loss", "grad_norm", "load_balancing_loss", "expert_load_max/layer_0"):
        assert column(accumulated, name) == pytest.approx(column(at_once, name), rel=1e-5)


def test_bias_update_alone_evens_the_load(train, tmp_path):
    """Compared with the same run without bias updates. Neither run has a balance loss."""
    losses_off = ("--moe.load_balancing_loss", "0.0", "--moe.z_loss", "0.0")
    flags = (*SIGMOID_FLAGS, *losses_off, "--train.max_steps", "40", "--eval.interval", "100")
    unevenness = []
    for rate in ("0.0", "0.01"):
        out = train(*flags, "--moe.bias_update_rate", rate, "--out_dir", str(tmp_path / rate))
        of_last_steps = {
            (name, layer): sum(column(out, f"expert_load_{name}/layer_{layer}")[-20:]) / 20
            for name in ("max", "min")
            for layer in (0, 1)
        }
        unevenness.append({key: abs(load - 1) for key, load in of_last_steps.items()})
        bias = checkpoints.load_weights(out / "final")["transformer.h.0.mlp.gate.e_score_correction_bias"]
        assert bias.dtype == torch.float32
        assert bool(bias.any()) == (rate != "0.0")
        assert float(bias.abs().max()) <= 40 * float(rate) + 1e-6
    without, with_it = unevenness
    assert all(value > 0.4 for value in without.values())
    assert all(with_it[key] < without[key] / 2 for key in without)


def test_evaluation_keeps_selection_biases(train, tmp_path):
    flags = (*SIGMOID_FLAGS, "--moe.bias_update_rate", "0.01", "--train.max_steps", "4")
    often = train(*flags, "--eval.interval", "1", "--eval.initial_validation", "true", "--out_dir", str(tmp_path / "a"))
    never = train(
        *flags, "--eval.interval", "100", "--eval.final_validation", "false", "--out_dir", str(tmp_path / "b")
    )
    assert len(column(often, "val_loss")) == 5
    assert not column(never, "val_loss")
    assert_same_weights(often / "final", never / "final")


def test_logged_loss_is_mean_of_interval(train, trained):
    each = column(trained, "train_loss")
    third = column(train("--train.log_interval", "3"), "train_loss")
    # Rows of steps 4 and 8 hold a validation loss alone.
    assert third == pytest.approx([sum(each[i : i + 3]) / 3 for i in range(0, 12, 3)], rel=1e-6)


def test_samples_do_not_change_the_run(train, trained):
    """The default samples are random: they have a temperature."""
    without = train("--sample.prompt", "null")
    assert_same_weights(trained / "final", without / "final")


def test_tied_embeddings_are_one_matrix(train):
    out = train("--train.tie_embeddings", "true", "--train.max_steps", "3")
    weights = checkpoints.load_weights(out / "final")
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    train("--train.tie_embeddings", "true", "--resume", "auto", "--train.max_steps", "4")


def test_run_from_other_weights(train, trained):
    second = train("--initial_checkpoint_dir", str(trained / "final"), "--train.max_steps", "4")
    assert column(second, "train_loss")[0] < column(trained, "train_loss")[0] - 0.5


def test_several_loggers(train):
    out = train("--loggers", "[csv,tensorboard,wandb]")
    assert list((out / "logs" / "tensorboard").glob("events.*"))
    assert list((out / "wandb").glob("offline-run-*"))
    run_id = (out / "wandb_run_id").read_text(encoding="utf-8")
    train("--loggers", "[csv,tensorboard,wandb]", "--resume", "auto", "--train.max_steps", "14")
    assert (out / "wandb_run_id").read_text(encoding="utf-8") == run_id
    assert {path.name.rsplit("-", 1)[1] for path in (out / "wandb").glob("offline-run-*")} == {run_id.strip()}
    assert training_steps(out) == list(range(1, 15))
    board = EventAccumulator(str(out / "logs" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train_loss")] == list(range(1, 15))
    assert "hp_metric" not in board.Tags()["scalars"]


@pytest.mark.slow
def test_litgpt_text_files(train, tmp_path, stories, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.txt").write_text("\n".join(stories * 2), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_train.py"])
    out = train(
        *("--data.class_path", "litgpt.data.TextFiles", "--data.init_args.train_data_path", str(folder)),
        *("--data.init_args.val_data_path", "null", "--data.init_args.num_workers", "0", "--train.max_steps", "3"),
    )
    assert len(column(out, "train_loss")) == 3


def test_muon_in_bf16_resumes_exactly(train, tmp_path, capsys):
    """Its moments are fp32, and its rounding depends on the number of updates."""
    flags = ("--precision", "bf16-true", "--optimizer", "litmoe.train.muon.Muon", "--optimizer.init_args.lr", "0.01")
    full = train(*flags, "--out_dir", str(tmp_path / "full"), "--train.max_steps", "6")
    assert "loses weight decay" not in capsys.readouterr().out
    cut = shutil.copytree(full, tmp_path / "cut")
    train(*flags, "--out_dir", str(cut), "--resume", str(cut / "step-00000004"), "--overwrite", "--train.max_steps=6")
    assert_same_weights(full / "final", cut / "final")
    states = checkpoints.load_training_state(cut / "final")["optimizer"]["state"].values()
    moments = [state.get("momentum_buffer", state.get("exp_avg_sq")) for state in states]
    assert all(moment.dtype == torch.float32 for moment in moments)
    assert {state["updates"] for state in states} == {6}


def test_bf16_true_trains(train, capsys):
    """Selection biases move in steps that bf16 can't represent, and load as they were saved."""
    flags = ("--precision", "bf16-true", *SIGMOID_FLAGS, "--moe.bias_update_rate", "0.001", "--train.max_steps", "4")
    out = train(*flags)
    assert "warning: in bf16-true, torch.optim.AdamW loses weight decay and small steps" in capsys.readouterr().out
    weights = checkpoints.load_weights(out / "final")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    bias = weights["transformer.h.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    torch.testing.assert_close(1000 * bias, (1000 * bias).round(), rtol=0, atol=1e-3)
    assert 1 <= round(1000 * float(bias.abs().max())) <= 4
    GPT(Config.from_file(out / "final" / "model_config.yaml")).load_state_dict(weights)
    assert all(math.isfinite(loss) for loss in column(out, "train_loss"))


def test_bf16_true_keeps_fp32_rotations(train, monkeypatch):
    """Fabric converts them with the weights, and generation would use other angles."""
    rotations, train_step = [], loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *args: rotations.extend((args[1].gpt.cos, args[1].gpt.sin)) or train_step(*args)
    )
    train("--precision", "bf16-true", "--train.max_steps", "1")
    assert [rotation.dtype for rotation in rotations] == [torch.float32] * 2


def test_nonfinite_loss_stops_the_run(train, tmp_path):
    """Also between log lines. Earlier steps are kept."""
    found = r"no longer finite at step 2: the first non-finite (output|gradient) was that of \w+.*, in micro batch 1"
    with pytest.raises(UserError, match=found):
        train("--optimizer.init_args.lr", "1.0e+30", "--train.max_norm", "null", "--train.log_interval", "100")
    out = tmp_path / "out"
    assert not (out / "final").exists()
    assert checkpoints.newest_undamaged(out)[0] == out / "step-00000001"


def test_resume_rejects_other_tokens(train, tmp_path, prepared):
    shutil.copytree(prepared, tmp_path / "own")
    own = tmp_path / "own"
    paths = [f"--data.init_args.{split}_data_path={own / 'data' / split}" for split in ("train", "val")]
    out = train(*paths)
    shutil.move(own / "data", own / "moved")
    moved = [f"--data.init_args.{split}_data_path={own / 'moved' / split}" for split in ("train", "val")]
    train(*moved, "--resume", str(out / "step-00000004"), "--overwrite")  # elsewhere, but the same tokens
    with open(own / "moved" / "train" / "stories.txt", "a", encoding="utf-8") as file:
        file.write("\n<|endoftext|>\nA new story.")
    with pytest.raises(UserError, match="was trained on other tokens"):
        train(*moved, "--resume", str(out / "step-00000004"), "--overwrite")


def test_resume_rejects_another_split(tmp_path, stories, tokenizer_dir, run_file):
    """The text has the same fingerprint, but documents moved from training to validation."""
    data_dir = tmp_path / "own"
    (data_dir / "train").mkdir(parents=True)
    text = "\n<|endoftext|>\n".join(stories)
    (data_dir / "train" / "stories.txt").write_text(text, encoding="utf-8", newline="\n")
    paths = [f"--data.init_args.{split}_data_path={data_dir / split}" for split in ("train", "val")]

    def train(*flags):
        run = parse_run(["--config", str(run_file), *paths, "--train.max_steps", "4", *flags])
        run, resume_from = ready(run)
        pretrain(run, resume_from=resume_from)
        return run.settings.out_dir

    def divide(fraction):
        prepare(PrepareArgs(data_dir=data_dir, tokenizer_dir=tokenizer_dir, num_workers=0, val_fraction=fraction))

    divide(0.2)
    out = train("--train.save_interval", "2")
    divide(0.4)
    with pytest.raises(UserError, match="was trained on other tokens"):
        train("--resume", str(out / "step-00000002"), "--overwrite")


def test_failed_start_deletes_nothing(train, trained_copy):
    out = trained_copy
    for mistake in (("--micro-batch-size", "200", "--global-batch-size", "200"), ("--sample.temperature", "-1")):
        with pytest.raises(UserError):
            train("--overwrite", *mistake)
    with pytest.raises(UserError, match="which this run starts from"):
        train("--overwrite", "--initial_checkpoint_dir", str(out / "final"))
    assert checkpoints.read_metadata(out / "final").step == 12


def test_overwrite_keeps_runs_in_other_folders(train, trained, tmp_path):
    """The start of a run may be in a folder below ``out_dir`` that ``--overwrite`` does not delete."""
    start = shutil.copytree(trained, tmp_path / "out" / "first") / "final"
    train("--train.max_steps", "1")
    train("--overwrite", "--initial_checkpoint_dir", str(start), "--train.max_steps", "1")
    assert checkpoints.read_metadata(start).step == 12


def test_resume_rejects_folder_of_another_run(train, trained, trained_copy):
    with pytest.raises(UserError, match="holds a run already"):
        train("--resume", str(trained / "step-00000004"))


def test_new_run_does_not_overwrite_a_run(train, trained_copy):
    out = trained_copy
    mark = (out / "final" / "complete.json").read_bytes()
    with pytest.raises(UserError, match=r"--resume auto.*--out_dir.*--overwrite"):
        train()
    assert (out / "final" / "complete.json").read_bytes() == mark
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    train("--overwrite", "true", "--train.max_steps", "2")
    assert training_steps(out) == [1, 2]
    assert not list(out.glob("step-*"))
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_gpt2_projections_shrink_with_depth():
    """LitGPT skips GptNeoxMLP: a dense GPT-2 started with feed-forward outputs 7 times as large as the mixture's."""
    config = Config(
        n_layer=6, n_embd=128, n_head=4, block_size=16, padded_vocab_size=64, mlp_class_name="GptNeoxMLP", bias=True
    )
    gpt = GPT(config)
    litgpt.pretrain.initialize_weights(L.Fabric(accelerator="cpu", devices=1), gpt, n_layer=6, n_embd=128)
    scale_gelu_projections(gpt)
    for block in gpt.transformer.h:
        assert float(block.mlp.proj.weight.std()) == pytest.approx(128**-0.5 / 6, rel=0.05)
        assert float(block.mlp.proj.weight.std()) == pytest.approx(float(block.attn.proj.weight.std()), rel=0.05)
        assert float(block.mlp.fc.weight.std()) == pytest.approx((2 / 5 / 128) ** 0.5, rel=0.05)
        assert not block.mlp.proj.bias.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_shared_expert": 1, "first_k_dense_replace": 1, "intermediate_size": 48},
        {"mlp_class_name": "GptNeoxMLP", "n_expert": 0, "intermediate_size": 48, "bias": True},
        {"parallel_residual": True, "shared_attention_norm": True},
    ],
    ids=["shared experts, a dense layer", "GPT-2", "parallel"],
)
def test_blocks_without_projections_pass_their_input_on(moe_fields, changes):
    gpt = tiny_gpt(moe_fields | changes)
    zero_projections(gpt)
    tokens = torch.randint(0, 90, (2, 16))
    with torch.no_grad():
        x = gpt.transformer.wte(tokens)
        torch.testing.assert_close(gpt(tokens), gpt.lm_head(gpt.transformer.ln_f(x)))
    others = [p for name, p in gpt.named_parameters() if "proj" not in name and p.ndim > 1]
    assert all(p.any() for p in others)


def test_recipe_of_the_run_reaches_the_model(train):
    """Zero projections: the first loss is that of embedding and output layer alone. Masked documents: another loss."""
    flags = ("--train.max_steps", "3", "--train.log_interval", "1", "--overwrite")
    settings = {
        "plain": (),
        "zero": ("--zero_init_projections", "true"),
        "rate": ("--zero_init_projections", "true", "--embedding_lr_factor", "20"),
        "masked": ("--document_masking", "true"),
    }
    losses = {name: column(train(*flags, *added), "train_loss") for name, added in settings.items()}
    assert losses["zero"][0] == losses["rate"][0] != losses["plain"][0]
    assert losses["zero"][1] != losses["rate"][1]
    assert losses["masked"][0] != losses["plain"][0]


@pytest.mark.slow
def test_compiled_run_equals_eager_run(train, capsys):
    """A graph break, or a new graph in each step, would raise (fullgraph)."""
    flags = ("--train.max_steps", "4", "--eval.interval", "2", "--train.log_interval", "1")
    losses = []
    for compiled in ("true", "false"):
        out_dir = train(*flags, "--compile", compiled, "--overwrite")
        losses.append([float(row["train_loss"]) for row in metric_rows(out_dir) if row["train_loss"]])
    said = re.search(r"The first step took ([0-9,]+) s, including compilation", capsys.readouterr().out)
    assert said and int(said[1]) >= 1
    bf16 = torch.cuda.is_available()  # the compiler may leave out roundings to bf16
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if bf16 else 1e-4)


def test_constant_router_needs_trained_weights(train, tmp_path, moe_fields, prepared, capsys):
    """A new run is refused; a model that was trained before is accepted with a warning."""
    one = ("--model.n_expert_per_token", "1", "--train.max_steps", "1")
    with pytest.raises(UserError, match="does not learn where to send a token"):
        train(*one, "--resume", "auto")
    assert not (tmp_path / "out").exists()
    start = save_tiny(tmp_path / "start", tiny_gpt(moe_fields | {"n_expert_per_token": 1}), prepared / "tokenizer")
    train(*one, "--initial_checkpoint_dir", str(start))
    assert "warning: this model sends each token to 1 expert" in capsys.readouterr().out
    train(*one, "--resume", "auto", "--train.max_steps", "2")
    assert "Resuming from" in capsys.readouterr().out


def test_text_may_be_removed_after_tokenizing(train, prepared, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "data" / split)
    flags = [f"--data.init_args.{split}_data_path={tmp_path / 'data' / split}" for split in ("train", "val")]
    out = train(*flags, "--train.max_steps", "1", "--train.lr_warmup_steps", "0")
    assert (out / "final" / "lit_model.pth").is_file()
