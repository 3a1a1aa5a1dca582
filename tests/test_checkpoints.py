"""The checkpoint folder: whole or not there, readable by LitGPT, and every kind of damage told in one message."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from litgpt.prompts import Default, load_prompt_style
from litgpt.utils import check_valid_checkpoint_dir

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.checksummed_json import read_sealed, write_sealed
from litmoe.cli import UserError
from tests.tiny_checkpoint import save_tiny, tiny_gpt


@pytest.fixture
def gpt(moe_fields: dict) -> GPT:
    return tiny_gpt(moe_fields)


@pytest.fixture
def run(tmp_path: Path, gpt: GPT, tokenizer_dir: Path) -> Path:
    """A run's folder with two steps, the second one newer."""
    for step in (1, 2):
        save_tiny(tmp_path / "run" / f"step-{step:08d}", gpt, tokenizer_dir, step=step)
    return tmp_path / "run"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- round trip


def test_everything_comes_back(run: Path, gpt: GPT, moe_fields: dict) -> None:
    folder = run / "step-00000002"
    mark = checkpoints.verify(folder)
    assert (mark.step, mark.tokens, mark.versions["torch"]) == (2, 256, torch.__version__.split("+")[0])
    assert set(mark.files) == names(folder) - {"complete.json"}
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


def test_a_selection_bias_stays_fp32_in_a_model_in_bf16(tmp_path: Path, moe_fields: dict) -> None:
    """Rounded to bf16 it would choose other experts than those it was trained with."""
    sigmoid = {"n_expert_groups": 2, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
    gpt = tiny_gpt(moe_fields | sigmoid)
    bias = gpt.transformer.h[1].mlp.gate.e_score_correction_bias
    bias += 1 + 0.001 * torch.arange(4)
    loaded = checkpoints.load_model(save_tiny(tmp_path / "final", gpt, None), torch.device("cpu"), torch.bfloat16)
    gate = loaded.transformer.h[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.e_score_correction_bias, bias)


def test_litgpt_reads_the_folder(run: Path, gpt: GPT, moe_fields: dict) -> None:
    folder = run / "step-00000002"
    check_valid_checkpoint_dir(folder, raise_error=True)
    assert type(load_prompt_style(folder)) is Default
    fresh = GPT(Config.from_file(folder / "model_config.yaml"))
    fresh.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True), strict=True)


def test_weights_of_stacked_experts_are_saved_apart(tmp_path: Path, moe_fields: dict) -> None:
    """A view would carry the whole stack along, and LitGPT's lazy loading would read the stack once per expert."""
    with use_custom_moe():
        gpt = GPT(Config(**moe_fields))
    weights = checkpoints.load_weights(save_tiny(tmp_path / "final", gpt, None))
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in weights.values())
    assert len({tensor.data_ptr() for tensor in weights.values()}) == len(weights)
    GPT(Config(**moe_fields)).load_state_dict(weights, strict=True)


def test_tied_embeddings_stand_under_both_keys_and_are_stored_once(tmp_path: Path, gpt: GPT, moe_fields: dict) -> None:
    untied_size = (save_tiny(tmp_path / "untied", gpt, None) / "lit_model.pth").stat().st_size
    gpt.transformer.wte.weight = gpt.lm_head.weight
    folder = save_tiny(tmp_path / "tied", gpt, None)
    fresh = GPT(Config(**moe_fields))
    fresh.load_state_dict(checkpoints.load_weights(folder), strict=True)
    assert torch.equal(fresh.transformer.wte.weight, gpt.lm_head.weight)
    assert untied_size - (folder / "lit_model.pth").stat().st_size > 4 * 384 * 32 * 0.95
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True


def test_saving_leaves_the_random_state_alone(tmp_path: Path, gpt: GPT) -> None:
    before = torch.get_rng_state()
    save_tiny(tmp_path / "final", gpt, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_with_paths_and_dataclasses_are_plain_yaml(tmp_path: Path, gpt: GPT) -> None:
    from litgpt.args import EvalArgs

    settings = {"out_dir": tmp_path, "eval": EvalArgs(interval=3), "betas": (0.9, 0.95)}
    loaded = checkpoints.load_hyperparameters(save_tiny(tmp_path / "final", gpt, None, hyperparameters=settings))
    assert loaded["out_dir"] == str(tmp_path)
    assert loaded["eval"]["interval"] == 3
    assert loaded["betas"] == [0.9, 0.95]


def test_refuses_weights_of_another_model_and_state_that_could_not_be_loaded(tmp_path: Path, gpt: GPT) -> None:
    weights = gpt.state_dict()
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        checkpoints.save(tmp_path / "a", weights=weights, config=gpt.config, hyperparameters={}, step=1, tokens=1)
    with pytest.raises(TypeError, match=r"training_state\['data'\]\[0\] is a pathlib"):
        save_tiny(tmp_path / "a", gpt, None, training_state={"data": [tmp_path]})
    assert names(tmp_path) == set()


# ------------------------------------------------------------------------------------------------------ whole or not


def test_an_older_folder_of_the_same_name_is_replaced(tmp_path: Path, gpt: GPT) -> None:
    final = save_tiny(tmp_path / "final", gpt, None, step=1)
    (final / "evaluate").mkdir()  # what `litgpt evaluate` converted is stale with the weights
    save_tiny(final, gpt, None, step=2)
    assert checkpoints.verify(final).step == 2
    assert names(tmp_path) == {"final"}
    assert not (final / "evaluate").exists()


def exit_code_in_child(function: Callable[[], None]) -> int:
    """Runs ``function`` in a copy of this process (a new one would import torch for ten seconds)."""
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
def test_killed_while_replacing(tmp_path: Path, gpt: GPT, at: int) -> None:
    """Between any two moves a whole checkpoint can be found, and the next save puts the folder right."""
    final = save_tiny(tmp_path / "final", gpt, None, step=1)

    def killed() -> None:
        rename, calls = os.rename, []

        def die_at(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == at:
                os._exit(9)  # as a power cut would
            rename(source, target)

        os.rename = die_at  # type: ignore[assignment]
        save_tiny(final, gpt, None, step=2)

    assert exit_code_in_child(killed) == 9
    found = checkpoints.newest_undamaged(tmp_path)[0]
    assert found is not None and checkpoints.verify(found).step == 2  # whole in both cases, though not yet in place
    assert {checkpoints.verify(folder).step for folder in tmp_path.iterdir()} == {1, 2}
    with pytest.raises(UserError):
        save_tiny(final, gpt, None, step=3, manifest_path=tmp_path / "nowhere")
    assert checkpoints.verify(final).step == 2, "a save that fails takes nothing away"
    save_tiny(final, gpt, None, step=3)
    assert checkpoints.verify(final).step == 3
    assert names(tmp_path) == {"final"}


def test_half_a_checkpoint_is_never_found(tmp_path: Path, gpt: GPT) -> None:
    """What a run killed while saving leaves is removed when the next one saves; what is whole takes its place."""
    for step in (1, 2, 3):
        save_tiny(tmp_path / f"step-{step:08d}", gpt, None, step=step)
    half = (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.partial")
    whole = (tmp_path / "step-00000003").rename(tmp_path / ".step-00000003.partial")
    (half / "complete.json").unlink()
    assert checkpoints.newest(tmp_path) == checkpoints.newest_undamaged(tmp_path)[0] == whole
    assert checkpoints.leftovers(tmp_path) == [half, whole]
    save_tiny(tmp_path / "final", gpt, None, step=4)
    assert names(tmp_path) == {"step-00000001", "step-00000003", "final"}
    assert checkpoints.verify(tmp_path / "step-00000003").step == 3


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_a_full_disk_leaves_the_older_checkpoints_and_no_debris(run: Path, gpt: GPT) -> None:
    def full() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the weights need 280 kB
        for name in ("step-00000003", "step-00000002"):
            with pytest.raises(UserError) as error:
                save_tiny(run / name, gpt, None, step=3)
            assert "disk is full" in str(error.value)
            assert f"the newest whole checkpoint is {run / 'step-00000002'}" in str(error.value)

    assert exit_code_in_child(full) == 0
    assert names(run) == {"step-00000001", "step-00000002"}
    assert [checkpoints.verify(folder).step for folder in sorted(run.iterdir())] == [1, 2]


def test_an_unwritable_folder(tmp_path: Path, gpt: GPT) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*--out_dir"):
        save_tiny(tmp_path / "file" / "final", gpt, None)
    assert names(tmp_path) == {"file"}


# ------------------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "told"),
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
def test_damage_is_told_with_the_file_and_the_newest_whole_checkpoint(run: Path, damage, file: str, told: str) -> None:
    folder = run / "step-00000002"
    damage(folder / file)
    with pytest.raises(UserError) as error:
        checkpoints.verify(folder)
    assert told in str(error.value)
    assert file in str(error.value)
    assert f"newest whole checkpoint beside it is {run / 'step-00000001'}" in str(error.value)


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("lit_model.pth", checkpoints.load_weights),
        ("training_state.pth", checkpoints.load_training_state),
        ("model_config.yaml", checkpoints.load_config),
        ("hyperparameters.yaml", checkpoints.load_hyperparameters),
    ],
)
def test_loading_checks_what_it_reads(run: Path, file: str, load) -> None:
    folder = run / "step-00000002"
    flip_a_byte(folder / file)
    with pytest.raises(UserError, match="damaged"):
        load(folder)
    checkpoints.verify(folder, checkpoints.read_mark(folder).files.keys() - {file})


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no checkpoint at"):
        checkpoints.verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoints.verify(tmp_path)


def test_mark_of_a_newer_version_is_read(run: Path) -> None:
    """With fields that are not known here the checkpoint counted as damaged, and training went on from an older one."""
    newest = run / "step-00000002"
    values = read_sealed(newest / checkpoints.MARK)
    values["run"] = "one"
    for file in values["files"].values():
        file["blake3"] = "0"
    write_sealed(newest / checkpoints.MARK, values)
    assert checkpoints.verify(newest).step == 2
    assert checkpoints.newest_undamaged(run) == (newest, [])


def test_the_weights_file_stands_for_its_folder(run: Path) -> None:
    assert checkpoints.verify(run / "step-00000001" / "lit_model.pth").step == 1
    assert checkpoints.resolve(run / "step-00000001" / "lit_model.pth") == run / "step-00000001"


def test_a_folder_that_litgpt_wrote(tmp_path: Path, gpt: GPT) -> None:
    """`--initial_checkpoint_dir` reads it, wrapped or not; as one of ours it is refused."""
    from litgpt.utils import save_config

    save_config(gpt.config, tmp_path)
    torch.save({"model": gpt.state_dict()}, tmp_path / "lit_model.pth")
    assert checkpoints.load_weights(tmp_path).keys() == gpt.state_dict().keys()
    assert checkpoints.load_config(tmp_path) == gpt.config
    with pytest.raises(UserError, match="litgpt generate"):
        checkpoints.verify(tmp_path)
    truncate(tmp_path / "lit_model.pth")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load_weights(tmp_path)


# --------------------------------------------------------------------------------------------------------------- find


def test_the_newest_is_the_one_saved_last_not_the_one_of_the_highest_step(run: Path, gpt: GPT) -> None:
    final = save_tiny(run / "other" / "final", gpt, None, step=1)
    assert checkpoints.newest(run) == final
    assert checkpoints.resolve(None, run) == final
    assert checkpoints.newest_undamaged(run)[0] == run / "step-00000002"
    truncate(final / "lit_model.pth")
    assert checkpoints.newest(run) == run / "step-00000002"


def test_removing_the_training_state_hinders_resuming_alone(run: Path) -> None:
    (run / "step-00000002" / "training_state.pth").unlink()
    assert checkpoints.newest(run) == run / "step-00000002"
    assert checkpoints.newest_undamaged(run)[0] == run / "step-00000001"
    with pytest.raises(UserError, match=r"training_state\.pth is missing"):
        checkpoints.load_training_state(run / "step-00000002")


def test_nothing_to_find(tmp_path: Path, run: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere") is None
    assert checkpoints.newest_undamaged(tmp_path / "nowhere")[0] is None
    with pytest.raises(UserError, match=r"run_train\.py"):
        checkpoints.resolve(None, tmp_path / "nowhere")
    with pytest.raises(UserError, match=re.escape(f"in it is {run / 'step-00000002'}")):
        checkpoints.resolve(run)
    with pytest.raises(UserError, match=re.escape(f"beside it is {run / 'step-00000002'}")):
        checkpoints.resolve(run / "step-00000003")
    with pytest.raises(UserError, match=re.escape(f"is {run / 'step-00000002'}")):
        checkpoints.resolve(tmp_path / "rum" / "final", root=run)
