"""Resuming: the checks that a checkpoint continues this run, then ``load_training_state``."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from litmoe import checkpoints
from litmoe.checksummed_json import known_fields
from litmoe.cli import UserError, quoted
from litmoe.config import RunSettings
from litmoe.data.loader import TrainLoader
from litmoe.data.manifest import SPLITS, read_file
from litmoe.train.fitting import restore_measures
from litmoe.train.schedule import Plan
from litmoe.train.state import (
    Measures,
    TrainingRun,
    batch_layout,
    load_training_state,
    plan_from,
    stateful_loader,
    tokens_manifest,
    unwrap_loader,
)


def resume_training(fabric: L.Fabric, run: TrainingRun, folder: Path) -> None:
    """Continue from the checkpoint ``folder``: optimizer, data position, random states and counters.

    Raises:
        UserError: the checkpoint belongs to another run, so that batches or optimizer would not be the same.
    """
    # First, because the state of another optimizer may need a package to be loaded that is not installed.
    check_same_optimizer(folder, run)
    state = checkpoints.load_training_state(folder)
    changes = check_same_batches(folder, state["layout"], batch_layout(fabric, run), run)
    check_same_provenance(fabric, folder, state.get("made_from", {}), run)
    check_same_tokens(folder, run.settings)
    # After all checks, so that a refused checkpoint changes nothing.
    restore_measures(fabric, run, Measures(**known_fields(Measures, state.get("measures", {}))))
    load_training_state(fabric, run, state)
    if changes:
        fabric.print(f"{'; '.join(changes)}: {_describe_effects(run, state['layout'])}.")


def refusal(folder: Path, settings: RunSettings, problem: str, fix: str) -> UserError:
    """Return the error for a checkpoint that can't be resumed: ``problem``, ``fix``, or a new run from its weights."""
    if settings.is_finetuning:
        flags = f"finetune.py {quoted(folder)} --out_dir NEW"
    else:
        flags = f"--initial_checkpoint_dir {quoted(folder)} --out_dir NEW"
    return UserError(f"{problem}. {fix}, or start a new run from its weights: {flags}")


def check_same_optimizer(folder: Path, run: TrainingRun) -> None:
    """Raise ``UserError`` if ``folder`` has the state of another optimizer, or none."""
    saved = checkpoints.load_hyperparameters(folder)
    # Only the settings of a run name an optimizer.
    if "optimizer" not in saved:
        problem = f"{folder} has no training state (an imported checkpoint, for example)"
        raise refusal(folder, run.settings, problem, "Resume from another checkpoint")
    saved_class = saved["optimizer"]["class_path"]
    present_class = run.hyperparameters["optimizer"]["class_path"]
    if saved_class != present_class:
        problem = f"{folder} was trained with {saved_class}, and {present_class} can't use its state"
        raise refusal(folder, run.settings, problem, f"Resume with --optimizer {quoted(saved_class)}")


def check_same_batches(folder: Path, saved: dict[str, int], present: dict[str, int], run: TrainingRun) -> list[str]:
    """Compare the layout of a checkpoint's batches with this run's.

    Returns:
        A description for each accepted difference: number of devices, micro-batch size.

    Raises:
        UserError: batches would differ in another way.
    """
    changes = described_changes(saved, present)
    # The position of our own loaders does not depend on how a batch is divided.
    accepted: list[str] = []
    if isinstance(stateful_loader(run.train_dataloader), TrainLoader):
        accepted = [changes.pop(name) for name in ("devices", "micro_batch_size") if name in changes]
    if changes:
        problem = f"{folder} can't be resumed with other batches: {'; '.join(changes.values())}"
        raise refusal(folder, run.settings, problem, "Resume with the old values")
    return accepted


def described_changes(saved: dict[str, Any], present: dict[str, Any]) -> dict[str, str]:
    """Return a description of each value that differs. Values that an older version did not save are not compared."""
    changes = {}
    for name, value in present.items():
        if name in saved and saved[name] != value:
            changes[name] = f"{name} was {saved[name]} and is now {value}"
    return changes


def check_same_provenance(fabric: L.Fabric, folder: Path, saved: dict[str, str], run: TrainingRun) -> None:
    """Raise ``UserError`` if an input of the run (the conversations, the base checkpoint) changed."""
    for name, fingerprint in run.provenance.items():
        if name not in saved:
            # An older version did not record this input.
            fabric.print(f"{folder} has no record of {name}, so changes there can't be detected.")
        elif saved[name] != fingerprint:
            raise refusal(folder, run.settings, f"{name} changed since {folder} was saved", "Restore the old version")


def check_same_tokens(folder: Path, settings: RunSettings) -> None:
    """Raise ``UserError`` if the data position saved in ``folder`` would point to other tokens."""
    saved, present = folder / checkpoints.MANIFEST, tokens_manifest(settings)
    # Data modules of LitGPT have no metadata, and neither have checkpoints of old versions.
    if present is None or not saved.is_file():
        return
    if tokens_provenance(saved, "train") != tokens_provenance(present, "train"):
        problem = (
            f"{folder} was trained on other tokens than those in {present.parent.parent}: the text, its split into"
            f" documents or {settings.tokenizer_dir / 'tokenizer.json'} changed"
        )
        raise refusal(folder, settings, problem, "Restore the old ones")


def check_same_on_all_machines(fabric: L.Fabric, run: TrainingRun) -> None:
    """Raise ``UserError`` on every rank if the ranks start from different checkpoints or tokens.

    They would train different runs and average their gradients.
    """
    if fabric.world_size == 1:
        return
    path = tokens_manifest(run.settings)
    # A checkpoint may exist on one machine only, and data may have been prepared on each with other settings.
    own: dict[str, Any] = {
        "the step that it starts from": run.progress.step,
        "the tokens": tokens_provenance(path, *SPLITS) if path else None,
        **run.provenance,
    }
    # Every rank gets the values of all, so that all raise the same error.
    by_rank: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(by_rank, own)
    different = [name for name in own if any(other[name] != by_rank[0][name] for other in by_rank)]
    if different:
        raise UserError(
            f"the machines of this run do not agree on {' and '.join(different)}: process {fabric.global_rank} of"
            f" {fabric.world_size} starts from step {run.progress.step:,}. Put --out_dir and the data on a disk that"
            " all of them share, or copy both to each."
        )


def tokens_provenance(path: Path, *splits: str) -> tuple[Any, ...]:
    """Return what the tokens of a metadata file were made from: text, document rule, tokenizer.

    Raises:
        UserError: the file is damaged or from an unknown version.
    """
    manifest = read_file(path)
    if manifest is None:
        raise UserError(
            f"{path} is damaged, or from another version, so the tokens that the run continues on are unknown."
            " Start a new run from the checkpoint's weights (--initial_checkpoint_dir), on newly prepared tokens."
        )
    return manifest.made_from(*splits)


def _describe_effects(run: TrainingRun, saved: dict[str, int]) -> str:
    """Describe the effects of resuming with another number of devices or micro-batch size."""
    effects = ["training continues on the same tokens; sums differ in their last digits by their order"]
    train, items = run.settings.train, stateful_loader(run.train_dataloader).items
    micro_batch, saved_micro_batch = train.micro_batch_size, saved["micro_batch_size"]
    is_finetuning = run.finetuning is not None

    dropped, dropped_before = items % micro_batch, items % saved_micro_batch
    if dropped != dropped_before:
        effects.append(
            f"{dropped} of an epoch's {items:,} sequences fill no micro batch and are dropped ({dropped_before} before)"
        )
    if is_finetuning:
        # Micro batches of conversations differ in length.
        effects.append("balance losses and LoRA's dropout are computed per micro batch")
    if run.val_dataloader is not None and micro_batch != saved_micro_batch:
        # Both read the same windows only if both read the complete set.
        read_by_both = run.settings.eval.max_iters * min(micro_batch, saved_micro_batch)
        if read_by_both < unwrap_loader(run.val_dataloader).items:
            effects.append("validation reads other windows (eval.max_iters counts micro batches)")

    # The end of the run is a complete micro batch, so another size can move it.
    # A copy, because the settings of the run must not change.
    old_train = copy(train)
    old_train.micro_batch_size = saved_micro_batch
    old_settings = replace(run.settings, train=old_train)
    old_plan = plan_from(old_settings, run.train_dataloader, saved["max_seq_length"], saved["devices"], run.progress)
    end, old_end = _describe_end(run.plan, is_finetuning), _describe_end(old_plan, is_finetuning)
    if end != old_end:
        effects.append(f"the run ends at {end} instead of {old_end}")
    return "; ".join(effects)


def _describe_end(plan: Plan, is_finetuning: bool) -> str:
    # Conversations differ in length, so the tokens of a finetuning run are not known in advance.
    return f"step {plan.steps:,}" if is_finetuning else f"step {plan.steps:,}, {plan.tokens:,} tokens"
