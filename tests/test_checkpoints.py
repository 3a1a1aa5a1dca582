"""Checkpoint folders: atomic saves, LitGPT's layout, damage detection, recovery of killed saves."""

import json
import os
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.prompts import Default, load_prompt_style, save_prompt_style
from litgpt.utils import check_valid_checkpoint_dir, copy_config_files
from torch.profiler import ProfilerActivity, profile

from custom_moe import use_custom_moe
from litmoe import checkpoints, load
from litmoe.checksummed_json import read_checksummed, write_checksummed
from litmoe.cli import UserError
from tests.helpers import save_tiny, tiny_gpt


@pytest.fixture
def run(tmp_path: Path, gpt: GPT, tokenizer_dir: Path) -> Path:
    """The folder of a run with two checkpoints; the second one is newer."""
    for step in (1, 2):
        save_tiny(tmp_path / "run" / f"step-{step:08d}", gpt, tokenizer_dir, step=step)
    return tmp_path / "run"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- Save and load


def test_round_trip(run: Path, gpt: GPT, moe_fields: dict) -> None:
    folder = run / "step-00000002"
    metadata = checkpoints.verify(folder)
    assert (metadata.step, metadata.tokens) == (2, 256)
    assert metadata.versions["torch"] == torch.__version__.split("+")[0]
    assert set(metadata.files) == names(folder) - {"complete.json"}
    assert checkpoints.load_config(folder) == Config(**moe_fields)
    assert checkpoints.load_hyperparameters(folder) == {"seed": 1}
    state = checkpoints.load_training_state(folder)
    assert state["step"] == 2 and torch.equal(state["moments"][0], torch.ones(4))
    weights = checkpoints.load_weights(folder)
    assert weights.keys() == gpt.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in gpt.state_dict().items())
    loaded = checkpoints.load_model(folder, torch.device("cpu"), torch.float32)
    ids = torch.arange(30).view(2, 15)
    torch.testing.assert_close(loaded(ids), gpt(ids))


def test_selection_bias_stays_fp32_in_bf16_model(tmp_path: Path, moe_fields: dict) -> None:
    """Rounded to bf16, the bias would select other experts than in training."""
    sigmoid = {"n_expert_groups": 2, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
    gpt = tiny_gpt(moe_fields | sigmoid)
    bias = gpt.transformer.h[1].mlp.gate.e_score_correction_bias
    bias += 1 + 0.001 * torch.arange(4)
    loaded = checkpoints.load_model(save_tiny(tmp_path / "final", gpt, None), torch.device("cpu"), torch.bfloat16)
    gate = loaded.transformer.h[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.e_score_correction_bias, bias)


def test_a_model_is_in_memory_once_while_it_loads(tmp_path: Path, moe_fields: dict) -> None:
    """The file is mapped, so a device needs no more than the model: an OLMoE-7B of 13.8 GB has to load into 16 GB."""
    folder = save_tiny(tmp_path / "final", tiny_gpt(moe_fields), None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loaded = checkpoints.load_model(folder, torch.device("cpu"), torch.bfloat16)
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    # The profiler counts the mapped file like memory.
    peak = max(accumulate(event.self_cpu_memory_usage for event in events)) - (folder / "lit_model.pth").stat().st_size
    size = sum(parameter.nbytes for parameter in loaded.parameters()) + loaded.cos.nbytes + loaded.sin.nbytes
    assert size <= peak <= 1.1 * size


def test_litgpt_reads_the_folder(run: Path, gpt: GPT, moe_fields: dict) -> None:
    folder = run / "step-00000002"
    check_valid_checkpoint_dir(folder, raise_error=True)
    assert type(load_prompt_style(folder)) is Default
    fresh = GPT(Config.from_file(folder / "model_config.yaml"))
    fresh.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True), strict=True)


def test_stacked_experts_are_saved_separately(tmp_path: Path, moe_fields: dict) -> None:
    """A view would be saved with the complete stack, and lazy loading would read the stack once per expert."""
    with use_custom_moe():
        gpt = GPT(Config(**moe_fields))
    weights = checkpoints.load_weights(save_tiny(tmp_path / "final", gpt, None))
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in weights.values())
    assert len({tensor.data_ptr() for tensor in weights.values()}) == len(weights)
    GPT(Config(**moe_fields)).load_state_dict(weights, strict=True)


def test_tied_embeddings_are_stored_once(tmp_path: Path, gpt: GPT, moe_fields: dict) -> None:
    untied_size = (save_tiny(tmp_path / "untied", gpt, None) / "lit_model.pth").stat().st_size
    gpt.transformer.wte.weight = gpt.lm_head.weight
    folder = save_tiny(tmp_path / "tied", gpt, None)
    fresh = GPT(Config(**moe_fields))
    fresh.load_state_dict(checkpoints.load_weights(folder), strict=True)
    assert torch.equal(fresh.transformer.wte.weight, gpt.lm_head.weight)
    assert untied_size - (folder / "lit_model.pth").stat().st_size > 4 * 384 * 32 * 0.95
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True


def test_save_keeps_the_random_state(tmp_path: Path, gpt: GPT) -> None:
    before = torch.get_rng_state()
    save_tiny(tmp_path / "final", gpt, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_rejects_state_that_cannot_be_loaded(tmp_path: Path, gpt: GPT) -> None:
    with pytest.raises(TypeError, match=r"training_state\['data'\]\[0\] is a pathlib"):
        save_tiny(tmp_path / "a", gpt, None, training_state={"data": [tmp_path]})
    assert names(tmp_path) == set()


# --- Atomic saves


def test_save_replaces_an_older_checkpoint(tmp_path: Path, gpt: GPT) -> None:
    final = save_tiny(tmp_path / "final", gpt, None, step=1)
    (final / "evaluate").mkdir()  # `litgpt evaluate` converts the weights into it
    save_tiny(final, gpt, None, step=2)
    assert checkpoints.verify(final).step == 2
    assert names(tmp_path) == {"final"}
    assert not (final / "evaluate").exists()


def exit_code_in_child(function: Callable[[], None]) -> int:
    """Run ``function`` in a fork of this process: a new process would import torch for ten seconds."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(error)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
@pytest.mark.parametrize("at", [1, 2])
def test_kill_while_replacing(tmp_path: Path, gpt: GPT, at: int) -> None:
    """A complete checkpoint is found after a kill before any rename. The next save cleans up."""
    final = save_tiny(tmp_path / "final", gpt, None, step=1)

    def killed() -> None:
        rename, calls = checkpoints.rename, []

        def die_at(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == at:
                os._exit(9)  # as a power cut would
            rename(source, target)

        checkpoints.rename = die_at
        save_tiny(final, gpt, None, step=2)

    assert exit_code_in_child(killed) == 9
    newest = checkpoints.newest_undamaged(tmp_path)[0]
    assert newest is not None and checkpoints.verify(newest).step == 2, "complete, but under a hidden name"
    assert {checkpoints.verify(folder).step for folder in tmp_path.iterdir()} == {1, 2}
    with pytest.raises(UserError):
        save_tiny(final, gpt, None, step=3, manifest_path=tmp_path / "nowhere")
    assert checkpoints.verify(final).step == 2, "a failed save deletes nothing"
    save_tiny(final, gpt, None, step=3)
    assert checkpoints.verify(final).step == 3
    assert names(tmp_path) == {"final"}


def test_leftovers_of_killed_saves(tmp_path: Path, gpt: GPT) -> None:
    """The next save deletes incomplete folders and renames complete ones to their final names."""
    for step in (1, 2, 3):
        save_tiny(tmp_path / f"step-{step:08d}", gpt, None, step=step)
    incomplete = (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.partial")
    complete = (tmp_path / "step-00000003").rename(tmp_path / ".step-00000003.partial")
    (incomplete / "complete.json").unlink()
    assert checkpoints.newest(tmp_path) == checkpoints.newest_undamaged(tmp_path)[0] == complete
    assert checkpoints.leftovers(tmp_path) == [incomplete, complete]
    save_tiny(tmp_path / "final", gpt, None, step=4)
    assert names(tmp_path) == {"step-00000001", "step-00000003", "final"}
    assert checkpoints.verify(tmp_path / "step-00000003").step == 3


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_full_disk_keeps_older_checkpoints(run: Path, gpt: GPT) -> None:
    def save_on_full_disk() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the weights need 280 kB
        for name in ("step-00000003", "step-00000002"):
            with pytest.raises(UserError) as error:
                save_tiny(run / name, gpt, None, step=3)
            assert "disk is full" in str(error.value)
            assert f"the newest complete checkpoint is {run / 'step-00000002'}" in str(error.value)

    assert exit_code_in_child(save_on_full_disk) == 0
    assert names(run) == {"step-00000001", "step-00000002"}
    assert [checkpoints.verify(folder).step for folder in sorted(run.iterdir())] == [1, 2]


def test_unwritable_folder(tmp_path: Path, gpt: GPT) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*--out_dir"):
        save_tiny(tmp_path / "file" / "final", gpt, None)
    assert names(tmp_path) == {"file"}


# --- Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (truncate, "lit_model.pth", "truncated"),
        (truncate, "training_state.pth", "truncated"),
        (flip_a_byte, "lit_model.pth", "checksum"),
        (flip_a_byte, "model_config.yaml", "checksum"),
        (Path.unlink, "tokenizer.json", "missing"),
        (Path.unlink, "complete.json", "complete.json"),
        (truncate, "complete.json", "can't be read"),
    ],
)
def test_damage_message(run: Path, damage: Callable, file: str, message: str) -> None:
    """It names the damaged file and the newest complete checkpoint."""
    folder = run / "step-00000002"
    damage(folder / file)
    with pytest.raises(UserError) as error:
        checkpoints.verify(folder)
    assert message in str(error.value)
    assert file in str(error.value)
    assert f"The newest complete checkpoint near it is {run / 'step-00000001'}" in str(error.value)


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("lit_model.pth", checkpoints.load_weights),
        ("training_state.pth", checkpoints.load_training_state),
        ("model_config.yaml", checkpoints.load_config),
        ("hyperparameters.yaml", checkpoints.load_hyperparameters),
    ],
)
def test_load_verifies_the_file(run: Path, file: str, load: Callable) -> None:
    folder = run / "step-00000002"
    flip_a_byte(folder / file)
    with pytest.raises(UserError, match="damaged"):
        load(folder)
    checkpoints.verify(folder, checkpoints.read_metadata(folder).files.keys() - {file})


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no checkpoint at"):
        checkpoints.verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no complete checkpoint"):
        checkpoints.verify(tmp_path)


def test_metadata_of_a_newer_version_is_read(run: Path) -> None:
    newest = run / "step-00000002"
    values = read_checksummed(newest / checkpoints.COMPLETE_FILE)
    values["run"] = "one"
    for file in values["files"].values():
        file["blake3"] = "0"
    write_checksummed(newest / checkpoints.COMPLETE_FILE, values)
    assert checkpoints.verify(newest).step == 2
    assert checkpoints.newest_undamaged(run) == (newest, [])


def test_weights_file_as_checkpoint(run: Path) -> None:
    assert checkpoints.verify(run / "step-00000001" / "lit_model.pth").step == 1
    assert checkpoints.resolve(run / "step-00000001" / "lit_model.pth") == run / "step-00000001"


@pytest.fixture
def of_litgpt(run: Path, gpt: GPT, tmp_path: Path) -> Path:
    """What `litgpt finetune_full` writes for a checkpoint of ours: LitGPT's own functions, its wrapped state dict."""
    folder = tmp_path / "litgpt" / "final"
    folder.mkdir(parents=True)
    copy_config_files(run / "step-00000002", folder)
    save_prompt_style("alpaca", folder)
    settings = {"checkpoint_dir": "checkpoints/x", "data": {"class_path": "litgpt.data.JSON"}}
    settings |= {"train": {"max_seq_length": 32}, "seed": 1}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    torch.save({"model": gpt.state_dict()}, folder / "lit_model.pth")
    return folder


def test_reads_a_checkpoint_of_litgpt(of_litgpt: Path, gpt: GPT, tmp_path: Path, run: Path, capsys) -> None:
    """With one warning on stderr. It can't be resumed or verified, and is not found by itself."""
    model = load(of_litgpt, device="cpu")
    assert model.gpt.max_seq_length == 32
    ids = torch.arange(30).view(2, 15)
    torch.testing.assert_close(model.gpt(ids), gpt(ids))
    assert checkpoints.resolve(of_litgpt / "lit_model.pth") == of_litgpt
    captured = capsys.readouterr()
    assert captured.err.count("warning: ") == 1 and f"{of_litgpt} was written by LitGPT" in captured.err
    assert captured.out == ""
    assert checkpoints.read_metadata(of_litgpt).step == 0
    with pytest.raises(UserError, match="can't be verified or resumed"):
        checkpoints.verify(of_litgpt)
    assert checkpoints.newest(tmp_path) == run / "step-00000002"
    assert "can't be verified or resumed" in checkpoints.newest_undamaged(of_litgpt.parent)[1][0]


def test_finds_a_truncated_file_of_litgpt(of_litgpt: Path) -> None:
    (of_litgpt / "hyperparameters.yaml").unlink()  # as in a folder of `litgpt download`
    assert checkpoints.load_hyperparameters(of_litgpt) == {}
    assert checkpoints.context_of(of_litgpt) == 64
    truncate(of_litgpt / "lit_model.pth")
    with pytest.raises(UserError, match="damaged"):
        load(of_litgpt, device="cpu")


def test_lora_parameters_alone_name_the_merge(of_litgpt: Path) -> None:
    (of_litgpt / "lit_model.pth").rename(of_litgpt / "lit_model.pth.lora")
    with pytest.raises(UserError, match="uv run litgpt merge_lora"):
        checkpoints.resolve(of_litgpt)


@pytest.mark.parametrize("left", ["training_state.pth", "manifest.json", "hyperparameters.yaml", "a hidden name"])
def test_refuses_an_incomplete_copy_of_ours(left: str, tmp_path: Path, gpt: GPT, tokenizer_dir: Path) -> None:
    """Each of these shows that LitGPT did not write the folder; all others are removed."""
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    settings = {"moe": {"backend": "auto"}, "sample": {}}
    files = {"manifest_path": tmp_path / "manifest.json", "hyperparameters": settings}
    folder = save_tiny(tmp_path / "run" / "final", gpt, tokenizer_dir, **files)
    for name in {"training_state.pth", "manifest.json", "hyperparameters.yaml", "complete.json"} - {left}:
        (folder / name).unlink()
    if left == "a hidden name":
        assert checkpoints.is_of_litgpt(folder)
        folder = folder.rename(tmp_path / "run" / ".final.partial")
    with pytest.raises(UserError, match=r"no complete checkpoint: it has no complete\.json"):
        checkpoints.resolve(folder, tmp_path)


# --- Find


def test_newest_is_the_last_saved(run: Path, gpt: GPT) -> None:
    final = save_tiny(run / "other" / "final", gpt, None, step=1)
    assert checkpoints.newest(run) == final
    assert checkpoints.resolve(None, run) == final
    assert checkpoints.newest_undamaged(run)[0] == run / "step-00000002"
    truncate(final / "lit_model.pth")
    assert checkpoints.newest(run) == run / "step-00000002"


def test_deleted_training_state_prevents_resuming_only(run: Path) -> None:
    (run / "step-00000002" / "training_state.pth").unlink()
    assert checkpoints.newest(run) == run / "step-00000002"
    assert checkpoints.newest_undamaged(run)[0] == run / "step-00000001"
    with pytest.raises(UserError, match=r"training_state\.pth is missing"):
        checkpoints.load_training_state(run / "step-00000002")


def test_resolve_suggests_a_checkpoint(tmp_path: Path, run: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere") is None
    assert checkpoints.newest_undamaged(tmp_path / "nowhere")[0] is None
    with pytest.raises(UserError, match=r"run_train\.py"):
        checkpoints.resolve(None, tmp_path / "nowhere")
    suggestion = re.escape(f"is {run / 'step-00000002'}.")
    for folder in (run, run / "step-00000003", tmp_path / "rum" / "final"):
        with pytest.raises(UserError, match=suggestion):
            checkpoints.resolve(folder, root=run)
