"""What a training run is made of, how it is saved, and how it is put back to where it was saved."""

import random
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from litgpt import GPT, Tokenizer
from litgpt.args import TrainArgs
from litgpt.prompts import PromptStyle
from torch import Tensor
from torch.utils.data import DataLoader

from litmoe import checkpoints
from litmoe.checksummed_json import known_fields
from litmoe.cli import UserError, quoted
from litmoe.config import FinetuneSettings, RunSettings, is_sharded
from litmoe.data.manifest import SPLITS, manifest_path, read_file
from litmoe.data.reader import TokenLoader
from litmoe.evaluation import hellaswag
from litmoe.train.interval import Interval, mean_over_devices
from litmoe.train.logs import Loggers
from litmoe.train.lora import divide_weights
from litmoe.train.optimizers import load_optimizer_state
from litmoe.train.saving import CheckpointWriter
from litmoe.train.schedule import Plan, plan_run
from litmoe.train.sharding import gathered_state, gathered_weights, sharded_state


@dataclass
class Progress:
    """How far a run is; saved with each checkpoint."""

    step: int = 0
    """Optimizer steps done"""
    tokens: int = 0
    """Trained on, over all devices"""
    epoch: int = 0
    """Passes over the training set that are complete"""
    seconds: float = 0.0
    """Spent, over all sessions of a run that was resumed"""


@dataclass
class TrainingRun:
    """What ``run_training`` builds and ``fit`` works with."""

    settings: RunSettings
    hyperparameters: dict[str, Any]
    model: _FabricModule
    compiled: bool
    optimizer: _FabricOptimizer
    loggers: Loggers
    train_dataloader: DataLoader
    val_dataloader: DataLoader | None
    tokenizer: Tokenizer | None
    plan: Plan
    flops_per_token: int
    """Forward and backward, causal attention counted by half"""
    peak_flops: float | None
    """Of one device, from its datasheet; None where it is not known"""
    questions: hellaswag.Encoded | None
    """HellaSwag's; None where it is not scored"""
    sample_prompt: str | None
    """What the sample at each evaluation continues; None for no samples"""
    expert_counts: Tensor
    """``(MoE layers, n_expert)``: what each expert got in the last step, over all micro batches and devices"""
    writer: CheckpointWriter
    """Of this run's checkpoints; the first process's works"""
    prompt_style: PromptStyle | None = None
    """What prompts look like to a model that is tuned to answer"""
    made_from: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what else must be the same when the run is resumed, by what it is"""
    progress: Progress = field(default_factory=Progress)
    interval: Interval = field(default_factory=Interval)
    """Since the last log line"""
    moment: dict[str, Any] | None = None
    """What ``moment_of`` said when the last step was complete; None while an update makes it another. Its ``row`` is
    that step's for the metrics, as long as it has not been evaluated and logged, else None"""

    @property
    def gpt(self) -> GPT:
        """LitGPT's model inside the wrappers, for saving and sampling."""
        return gpt_of(self.model)


def moment_of(fabric: L.Fabric, run: TrainingRun) -> dict[str, Any]:
    """What a save needs besides weights and optimizer and that the next step changes before it changes those."""
    device = fabric.device
    generator: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = generator
    return {
        "row": None,
        "train_dataloader": with_position(run.train_dataloader).state_dict(),
        "interval": run.interval.state_dict(),
        "random": {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), *rest],
        },
    }


def save_checkpoint(fabric: L.Fabric, run: TrainingRun, folder: Path, *, last: bool = False) -> None:
    """Saves everything that resuming needs as of the last complete step; one process writes.

    Args:
        last: the run ends with it: it is written before this returns, and a failure is raised.
    """
    assert run.moment is not None, "a save within an update"
    if (sums := run.moment["interval"]["sums"]) is not None and fabric.world_size > 1:
        run.moment["interval"]["sums"] = [mean_over_devices(fabric, value) for value in sums]
    if fabric.global_rank == 0 or is_sharded(run.settings):  # then all take part
        fabric.print(f"Saving {folder}")
        run.loggers.save()  # no checkpoint without the metrics before it
        content = checkpoint_content(fabric, run)
    if fabric.global_rank == 0 and last:
        run.writer.write_now(folder, content)
    elif fabric.global_rank == 0:
        run.writer.write(folder, content, copy=not is_sharded(run.settings))  # gathered from all, nobody else has it
    if last:
        fabric.barrier()


def save_what_is_whole(fabric: L.Fabric, run: TrainingRun, *, by_all: bool = False) -> None:
    """After an error within the loop: waits for the checkpoint that is being written, and saves the last complete step
    where it is not saved yet and nothing is half.

    Args:
        by_all: all processes call this at the same step, so that a sharded model can be saved, and all wait for it: a
            launcher kills the others soon after one process has ended.
    """
    folder = run.settings.out_dir / f"step-{run.progress.step:08d}"
    whole = run.moment is not None and (by_all or not is_sharded(run.settings))
    try:
        if whole and is_sharded(run.settings):
            content = checkpoint_content(fabric, run)
        if fabric.global_rank == 0:
            run.writer.tell_failure(wait=True)
            if whole and run.writer.saved != folder:
                run.loggers.save()  # no checkpoint without the metrics before it
                run.writer.write_now(folder, content if is_sharded(run.settings) else checkpoint_content(fabric, run))
                fabric.print(f"Saved {folder}")
    except Exception as error:  # what ended the run is what is to be shown; and a terminal may be gone
        with suppress(OSError):
            fabric.print(f"warning: {error}")
    if by_all:
        fabric.barrier()


def checkpoint_content(fabric: L.Fabric, run: TrainingRun) -> dict[str, Any]:
    """The arguments of ``checkpoints.save``; weights and optimizer are the run's own tensors, or gathered by all."""
    progress, settings = run.progress, run.settings
    assert run.moment is not None
    optimizer = run.optimizer.state_dict()
    if is_sharded(settings):
        weights, lora_weights, optimizer = gathered_weights(run.gpt), None, gathered_state(optimizer)
    else:
        weights, lora_weights = divide_weights(run.gpt)
    return {
        "weights": weights,
        "lora_weights": lora_weights,
        "config": settings.model,
        "prompt_style": run.prompt_style,
        "instructions_path": settings.data.manifest_path if isinstance(settings, FinetuneSettings) else None,
        "hyperparameters": run.hyperparameters,
        "step": progress.step,
        "tokens": progress.tokens,
        "tokenizer_dir": settings.tokenizer_dir,
        "manifest_path": tokens_manifest(settings),
        "training_state": {
            "progress": asdict(progress),
            "layout": _layout(fabric, run),
            "made_from": run.made_from,
            "optimizer": optimizer,
            "expert_counts": run.expert_counts,
            "scaler": scaler.state_dict() if (scaler := scaler_of(fabric)) else {},
            **run.moment,
        },
    }


def resume_training(fabric: L.Fabric, run: TrainingRun, folder: Path) -> None:
    """Puts optimizer, data position, random states and counters back to where ``folder`` was saved, and plans the rest.

    Raises:
        UserError: where the batches would not be the same ones.
    """
    check_same_optimizer(folder, run)  # first: its state may be of tensors that only its own package can read
    state = checkpoints.load_training_state(folder)
    then, now = state["layout"], _layout(fabric, run)
    loader = with_position(run.train_dataloader)
    ours = isinstance(loader, TokenLoader)  # its position does not depend on who reads how much at once
    compared = [name for name in now if name in then]  # an older version may not have noted all of it
    changed = {name: f"{name} was {then[name]} and is now {now[name]}" for name in compared if then[name] != now[name]}
    divided = [changed.pop(name) for name in ("devices", "micro_batch_size") if name in changed and ours]
    if changed:
        raise UserError(
            f"{folder} can't be resumed with other batches: {'; '.join(changed.values())}. Resume with the old values,"
            f" or start a new run from its weights: {anew_from(folder, run.settings)}"
        )
    noted = state.get("made_from", {})
    for name, fingerprint in run.made_from.items():
        if name not in noted:
            fabric.print(f"{folder} has no record of {name}; whether something changed there can't be checked.")
        elif noted[name] != fingerprint:
            raise UserError(
                f"{name} changed since {folder} was saved. Bring back what was there, or start a new run from its"
                f" weights: {anew_from(folder, run.settings)}"
            )
    run.progress = Progress(**known_fields(Progress, state["progress"]))
    check_same_tokens(folder, run.settings)
    optimizer = run.optimizer.optimizer
    if is_sharded(run.settings):
        state["optimizer"]["state"] = sharded_state(state["optimizer"]["state"], optimizer)
    load_optimizer_state(optimizer, state["optimizer"])
    if "expert_counts" in state:  # checkpoints from before it was kept begin evenly, as a first step does
        run.expert_counts.copy_(state["expert_counts"])
    if ours:
        loader.load_state_dict(state["train_dataloader"], then["micro_batch_size"])
        run.progress.epoch = loader.position[0]  # the last device's: the first may have been in the one before
    else:
        loader.load_state_dict(state["train_dataloader"])
    run.plan = make_plan(
        run.settings.train,
        run.train_dataloader,
        run.gpt.max_seq_length,
        devices=fabric.world_size,
        progress=run.progress,
    )
    if divided:
        fabric.print(f"{'; '.join(divided)}: {_what_differs(run, then)}.")
    if "interval" in state:
        devices, micro_batch = (then[name] / now[name] for name in ("devices", "micro_batch_size"))
        run.interval.load_state_dict(state["interval"], fabric.device, devices=devices, micro_batch=micro_batch)
    torch.set_rng_state(state["random"]["torch"])
    if "python" in state["random"]:
        version, keys, gauss = state["random"]["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(state["random"]["numpy"]))
    if fabric.device.type == "cuda" and state["random"]["cuda"]:
        # All processes take the first one's: an optimizer that rounds by chance must do so alike everywhere.
        torch.cuda.set_rng_state(state["random"]["cuda"][0], fabric.device)
    if (scaler := scaler_of(fabric)) and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    if state.get("row") is not None:
        run.moment = {**moment_of(fabric, run), "row": state["row"]}


def make_plan(train: TrainArgs, loader: DataLoader, seq_length: int, *, devices: int, progress: Progress) -> Plan:
    """The plan of a run from where its progress and its data are."""
    loader = with_position(loader)
    if isinstance(loader, TokenLoader):
        sequences, position = loader.items, loader.position
    else:
        sequences = len(loader) * train.micro_batch_size * devices
        position = 0, progress.step * train.global_batch_size
    return plan_run(
        train,
        devices=devices,
        seq_length=seq_length,
        epoch_sequences=sequences,
        step=progress.step,
        tokens=progress.tokens,
        position=position,
    )


def _what_differs(run: TrainingRun, then: dict[str, int]) -> str:
    """What becomes of a run whose layout was ``then``, where only devices and micro batch are others."""
    found = ["the same tokens go on; sums differ in their last digits by their order"]
    train, items, progress = run.settings.train, with_position(run.train_dataloader).items, run.progress
    left_out, before = (items % size for size in (train.micro_batch_size, then["micro_batch_size"]))
    if left_out != before:
        found.append(f"{left_out} of an epoch's {items:,} fill no micro batch and are left out, {before} were")
    finetuning = isinstance(run.settings, FinetuneSettings)
    if finetuning:
        found.append("balance losses and LoRA's dropout go by micro batches")  # of unequal lengths
    val, sizes = run.val_dataloader, {train.micro_batch_size, then["micro_batch_size"]}
    if val is not None and len(sizes) > 1 and run.settings.eval.max_iters * min(sizes) < with_position(val).items:
        found.append("validation reads other windows (eval.max_iters counts micro batches)")
    train = copy(train)
    train.micro_batch_size = then["micro_batch_size"]
    old = make_plan(train, run.train_dataloader, then["max_seq_length"], devices=then["devices"], progress=progress)
    plans = (run.plan, old)
    ends = [f"step {plan.steps:,}" + ("" if finetuning else f", {plan.tokens:,} tokens") for plan in plans]
    if ends[0] != ends[1]:
        found.append(f"the run ends at {ends[0]}; it would have at {ends[1]}")
    return "; ".join(found)


def anew_from(folder: Path, settings: RunSettings) -> str:
    """The flags that start a new run from a checkpoint's weights."""
    if isinstance(settings, FinetuneSettings):
        return f"finetune.py {quoted(folder)} --out_dir NEW"
    return f"--initial_checkpoint_dir {quoted(folder)} --out_dir NEW"


def check_same_optimizer(folder: Path, run: TrainingRun) -> None:
    """Raises ``UserError`` where the state that ``folder`` saved is another optimizer's."""
    saved = checkpoints.load_hyperparameters(folder)
    if "optimizer" not in saved:
        raise UserError(
            f"{folder} holds no run that could be resumed (an imported checkpoint, say); start a new one from its"
            f" weights: {anew_from(folder, run.settings)}"
        )
    then, now = (settings["optimizer"]["class_path"] for settings in (saved, run.hyperparameters))
    if then != now:
        raise UserError(
            f"{folder} was trained with {then}, whose state {now} can't go on from. Resume with --optimizer"
            f" {quoted(then)}, or start a new run from its weights: {anew_from(folder, run.settings)}"
        )


def check_same_tokens(folder: Path, settings: RunSettings) -> None:
    """Raises ``UserError`` where the position that ``folder`` saved would mean other tokens."""
    then, now = folder / "manifest.json", tokens_manifest(settings)
    if now is None or not then.is_file():
        return
    if made_from(then, "train") != made_from(now, "train"):
        raise UserError(
            f"{folder} was trained on other tokens than those of {now.parent.parent}: the text, how it is divided,"
            " or the tokenizer changed. Bring the old ones back, or start a new run from its weights:"
            f" {anew_from(folder, settings)}"
        )


def check_same_on_all_machines(fabric: L.Fabric, run: TrainingRun) -> None:
    """Raises ``UserError``, in every process, where they have not all the same checkpoint and tokens: they would train
    different runs and average their gradients."""
    if fabric.world_size == 1:
        return
    path = tokens_manifest(run.settings)
    tokens = made_from(path, *SPLITS) if path else None
    mine = {"the step that it starts from": run.progress.step, "the tokens": tokens, **run.made_from}
    everyone: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everyone, mine)
    if different := [name for name in mine if any(other[name] != everyone[0][name] for other in everyone)]:
        raise UserError(
            f"the machines of this run do not agree on {' and '.join(different)}: process {fabric.global_rank} of"
            f" {fabric.world_size} starts from step {run.progress.step:,}. Put --out_dir and the data on a disk that"
            " all of them share, or copy both to each."
        )


def _layout(fabric: L.Fabric, run: TrainingRun) -> dict[str, int]:
    """What decides which tokens stand in which batch."""
    return {
        "micro_batch_size": run.settings.train.micro_batch_size,
        "global_batch_size": run.settings.train.global_batch_size,
        "max_seq_length": run.gpt.max_seq_length,
        "devices": fabric.world_size,
        "data_seed": getattr(run.settings.data, "seed", 0),
    }


def with_position(loader: DataLoader) -> Any:
    """The loader inside Fabric's: it knows its position."""
    loader = getattr(loader, "_dataloader", loader)
    if not hasattr(loader, "state_dict"):
        raise UserError(
            f"{type(loader).__name__} can't tell its position, so a run on it can't be saved to be resumed; use"
            " litmoe.data.TokenizedText or a LitGPT data module on litdata."
        )
    return loader


def tokens_manifest(settings: RunSettings) -> Path | None:
    """The manifest of the tokens that the model was trained on first; None where there is none."""
    if isinstance(settings, FinetuneSettings):
        path = settings.checkpoint_dir / checkpoints.MANIFEST
    elif (text := getattr(settings.data, "train_data_path", None)) is not None:
        path = manifest_path(Path(text).parent)
    else:
        return None
    return path if path.is_file() else None


def made_from(path: Path, *splits: str) -> tuple[Any, ...]:
    """What tokens follow from, by their manifest; raises ``UserError`` where it is none that can be read."""
    if (found := read_file(path)) is None:
        raise UserError(
            f"{path} is damaged, or no manifest of this version, so it can't be told on which tokens the run goes on."
            " Start a new run from the checkpoint's weights (--initial_checkpoint_dir), on tokens made anew."
        )
    return found.made_from(*splits)


def gpt_of(model: _FabricModule) -> GPT:
    """LitGPT's model inside Fabric's and the strategy's wrappers."""
    return model.module.gpt


def scaler_of(fabric: L.Fabric) -> Any:
    """The gradient scaler of 16-mixed, else None."""
    return getattr(fabric._precision, "scaler", None)
