"""What a training run consists of, and the one dictionary that is saved and restored of it.

``training_state`` is what ``training_state.pth`` of a checkpoint contains; ``load_training_state`` puts it back. The
weights are a file of their own, which every LitGPT command reads.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from litgpt import GPT, Tokenizer
from litgpt.prompts import PromptStyle
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from litmoe import checkpoints
from litmoe.checksummed_json import known_fields
from litmoe.cli import UserError
from litmoe.config import Recomputed, RunSettings
from litmoe.data.loader import TrainLoader
from litmoe.data.manifest import manifest_path
from litmoe.evaluation.hellaswag import Encoded
from litmoe.report.live import RunReport
from litmoe.train.distributed import gather_state, gather_weights, mean_over_ranks, shard_state
from litmoe.train.logs import Loggers
from litmoe.train.metrics import MetricAccumulator
from litmoe.train.model import PretrainingModel
from litmoe.train.optimizers import load_optimizer_state
from litmoe.train.saving import CheckpointWriter
from litmoe.train.schedule import UNKNOWN, Plan, plan_run
from litmoe.train.timing import Timing


@dataclass
class Progress:
    """How far a run is; saved with each checkpoint."""

    step: int = 0
    """Optimizer steps done"""
    tokens: int = 0
    """Tokens trained on, over all ranks"""
    epoch: int = 0
    """Complete passes over the training set"""
    seconds: float = 0.0
    """Time spent, over all sessions of a resumed run"""
    chosen_steps: int | None = None
    """Length of a run with a time budget, once it has measured its speed"""
    chosen_for: float | None = None
    """The budget of ``chosen_steps``, in seconds"""
    evaluated_step: int = 0
    """Step of the last evaluation; a resumed run makes up for one that a stop request left out"""


@dataclass
class Measures:
    """What was done after out-of-memory errors; saved, so that a resumed run does not need them again."""

    rows: int | None = None
    """Sequences in one forward and backward, if fewer than ``train.micro_batch_size``"""
    recomputed: Recomputed | None = None
    """What is recomputed, if more than ``activation_checkpointing``"""


@dataclass(frozen=True)
class Snapshot:
    """What the next step changes before it changes weights and optimizer, as of the last complete step.

    An error in the middle of a step can then still save the step before it.
    """

    train_dataloader: dict[str, Any]
    """Position in the training data"""
    metrics: dict[str, Any]
    """Sums since the last log line"""
    random: dict[str, Any]
    """States of all random generators"""


@dataclass(frozen=True)
class Finetuning:
    """What finetuning adds to a run."""

    prompt_style: PromptStyle
    """Format of the prompts, saved with each checkpoint"""
    provenance: dict[str, str]
    """Fingerprints of further inputs that a resumed run must share, by their name in messages"""
    instructions_path: Path
    """Metadata file of the conversations"""
    merge_weights: Callable[[GPT], tuple[dict[str, Tensor], dict[str, Tensor] | None]]
    """Returns the complete weights, with LoRA's updates merged, and the LoRA parameters or None"""


@dataclass
class TrainingRun:
    """What ``run_training`` builds and the training loop works with."""

    settings: RunSettings
    hyperparameters: dict[str, Any]
    model: _FabricModule
    compiled: bool
    sharded: bool
    """FSDP shards parameters and optimizer state"""
    optimizer: _FabricOptimizer
    loggers: Loggers
    train_dataloader: DataLoader
    val_dataloader: DataLoader | None
    tokenizer: Tokenizer | None
    plan: Plan
    flops_per_token: int
    """Forward and backward; causal attention counts half"""
    peak_flops: float | None
    """Of one device, from its datasheet; None where unknown"""
    questions: Encoded | None
    """HellaSwag's questions; None where they are not scored"""
    expert_counts: Tensor
    """``(MoE layers, n_expert)``: assignments to each expert in the last step, over all micro batches and ranks"""
    matrices_to_cast: dict[str, nn.Parameter]
    """Parameters that are cast once per step in mixed precision, by name"""
    writer: CheckpointWriter
    """Writes this run's checkpoints on rank 0"""
    report: RunReport
    """Kept up to date on rank 0"""
    sample_prompt: str | None = None
    """The prompt of the sample at each evaluation; None for no samples"""
    finetuning: Finetuning | None = None
    """None for pretraining"""
    progress: Progress = field(default_factory=Progress)
    measures: Measures = field(default_factory=Measures)
    timing: Timing = field(default_factory=Timing)
    """How long steps and evaluations of this session take"""
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)
    """Sums since the last log line"""
    train_loss: float | None = None
    """Of the last log line of this session"""
    val_loss: float | None = None
    """Of the last validation of this session"""
    snapshot: Snapshot | None = None
    """Taken after each step; None before the first one and during an update, when nothing may be saved"""

    @cached_property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: the weights and the state of the optimizer, which exists after a step."""
        # DTensors of FSDP have the size of the complete tensor.
        tensors = [*self.gpt.parameters(), *tree_leaves(list(self.optimizer.optimizer.state.values()))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))

    @property
    def rows(self) -> int:
        """Sequences in one forward and backward."""
        return self.measures.rows or self.settings.train.micro_batch_size

    @property
    def provenance(self) -> dict[str, str]:
        """Fingerprints of the inputs of finetuning; a resumed run must have the same. Empty for pretraining."""
        return self.finetuning.provenance if self.finetuning else {}

    @property
    def pretraining_model(self) -> PretrainingModel:
        """The model inside the wrappers of Fabric and the strategy."""
        return cast(PretrainingModel, self.model.module)

    @property
    def gpt(self) -> GPT:
        """LitGPT's model inside of it."""
        return self.pretraining_model.gpt


def take_snapshot(fabric: L.Fabric, run: TrainingRun) -> Snapshot:
    """Record the state that the next step changes first."""
    return Snapshot(
        train_dataloader=stateful_loader(run.train_dataloader).state_dict(),
        metrics=run.metrics.state_dict(),
        random=random_state(fabric.device),
    )


def training_state(fabric: L.Fabric, run: TrainingRun, optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """Return everything that resuming needs in addition to the weights.

    Args:
        optimizer_state: the optimizer's ``state_dict``, gathered if it is sharded.
    """
    assert run.snapshot is not None, "a save during an update"
    scaler = scaler_of(fabric)
    return {
        "progress": asdict(run.progress),
        "measures": asdict(run.measures),
        "layout": batch_layout(fabric, run),
        "made_from": run.provenance,
        "optimizer": optimizer_state,
        "scaler": scaler.state_dict() if scaler else {},
        "expert_counts": run.expert_counts,
        "train_dataloader": run.snapshot.train_dataloader,
        "interval": run.snapshot.metrics,
        "random": run.snapshot.random,
    }


def load_training_state(fabric: L.Fabric, run: TrainingRun, state: dict[str, Any]) -> None:
    """Restore what ``training_state`` returned, also on another number of ranks or with another micro batch.

    The order matters: the plan needs the progress and the position in the data, and random states come last.
    """
    saved_layout, layout = state["layout"], batch_layout(fabric, run)
    # 0.1.0 did not save evaluated_step. Its checkpoints contain a row if the evaluation of their step is missing.
    saved_progress = known_fields(Progress, state["progress"])
    saved_progress.setdefault("evaluated_step", state["progress"]["step"])
    run.progress = Progress(**saved_progress)
    # With more time than before, the run chooses again.
    if run.progress.chosen_for != run.settings.time_budget:
        run.progress.chosen_steps = run.progress.chosen_for = None
    _load_unlogged_row(run, state)

    # The optimizer and what decides the next update: the scale of fp16 losses, and the load of the last step.
    optimizer = run.optimizer.optimizer
    # Checkpoints have the complete state, whatever number of ranks saved them.
    if run.sharded:
        state["optimizer"]["state"] = shard_state(state["optimizer"]["state"], optimizer)
    load_optimizer_state(optimizer, state["optimizer"])
    # A checkpoint of another precision has no state of a scaler.
    scaler = scaler_of(fabric)
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    # In place, so that the counts stay on the device of the run.
    run.expert_counts.copy_(state["expert_counts"])

    # The position in the data, and the length of the run from there.
    loader = stateful_loader(run.train_dataloader)
    loader.load_state_dict(state["train_dataloader"])
    if isinstance(loader, TrainLoader):
        # A checkpoint at the end of an epoch continues with the next one, which no pass over the loader announces.
        run.progress.epoch = loader.batch_sampler.next_epoch
    # The steps that remain depend on the position in the data, which is now the saved one.
    run.plan = plan_from(run.settings, run.train_dataloader, run.gpt.max_seq_length, fabric.world_size, run.progress)
    # The sums since the last log line count micro batches of the old size on the old number of ranks. The ratios
    # convert them to those of this run.
    saved_rows = state.get("measures", {}).get("rows") or saved_layout["micro_batch_size"]
    run.metrics.load_state_dict(
        state["interval"],
        fabric.device,
        rank_ratio=saved_layout["devices"] / layout["devices"],
        micro_batch_ratio=saved_rows / run.rows,
    )
    # Last: a random number drawn after this line would shift all that follow.
    load_random_state(state["random"], fabric.device)


def _load_unlogged_row(run: TrainingRun, state: dict[str, Any]) -> None:
    """Log the row that 0.1.0 kept in a checkpoint until the evaluation of its step."""
    row = state.get("row")
    if row is None:
        return
    # The resumed run evaluates this step.
    run.progress.evaluated_step = 0
    if row:
        run.loggers.log_metrics({**row, "time": round(run.progress.seconds, 3)}, run.progress.step)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's, Python's and NumPy's generators in types that ``weights_only`` loads."""
    # NumPy's state holds an array, which torch.load(weights_only=True) refuses, so it becomes a list.
    numpy_state: Any = np.random.get_state(legacy=True)
    algorithm, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "mps": [torch.mps.get_rng_state()] if device.type == "mps" else [],
        "python": random.getstate(),
        "numpy": [algorithm, keys.tolist(), *rest],
    }


def load_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if device.type == "cuda" and state["cuda"]:
        # Every rank takes the state of rank 0: an optimizer that rounds stochastically must round alike on all.
        torch.cuda.set_rng_state(state["cuda"][0], device)
    if device.type == "mps" and state.get("mps"):
        torch.mps.set_rng_state(state["mps"][0])


def save_checkpoint(
    fabric: L.Fabric, run: TrainingRun, folder: Path, *, last: bool = False, on_all_ranks: bool = True
) -> None:
    """Save the last complete step. Rank 0 writes.

    Args:
        last: write before returning and raise a failure, because the run ends. Otherwise write in the background.
        on_all_ranks: every rank calls this at the same step. Otherwise the sums of the metrics are those of rank 0.
    """
    assert run.snapshot is not None, "a save during an update"
    if on_all_ranks:
        _average_sums(fabric, run.snapshot)
    if fabric.global_rank != 0:
        if run.sharded:
            # Sends the shards of this rank to rank 0.
            checkpoint_content(fabric, run)
        return
    fabric.print(f"Saving {folder}")
    # Metrics up to this step must be on disk before the checkpoint.
    run.loggers.save()
    content = checkpoint_content(fabric, run)
    if last:
        run.writer.write_now(folder, content)
    else:
        # Gathered tensors are copies already.
        run.writer.write(folder, content, copy=not run.sharded)


def _average_sums(fabric: L.Fabric, snapshot: Snapshot) -> None:
    """Replace the sums of the metrics by those of all ranks, because rank 0 writes. Every rank must call this."""
    sums = snapshot.metrics["sums"]
    if sums is not None and fabric.world_size > 1:
        snapshot.metrics["sums"] = {name: mean_over_ranks(fabric, value) for name, value in sums.items()}


def save_after_error(fabric: L.Fabric, run: TrainingRun, *, on_all_ranks: bool = False) -> None:
    """Save the last complete step after an error in the loop.

    Never raises: the error that ended the run is the one to show.

    Args:
        on_all_ranks: every rank calls this at the same step, so that a sharded model can be gathered. All wait for the
            save, because a launcher kills the other ranks soon after one ends.
    """
    # A step, never final/: an unfinished run must not look finished.
    folder = run.settings.out_dir / f"step-{run.progress.step:08d}"
    # There is no snapshot before the first step and during an update. One rank alone can't gather a sharded model.
    can_save = run.snapshot is not None and (on_all_ranks or not run.sharded)
    try:
        # The save in progress may be the last one.
        run.writer.report_failure(wait=True)
        # Only rank 0 knows what was written, and ranks that save together must all take part.
        if can_save and (on_all_ranks or run.writer.saved != folder):
            save_checkpoint(fabric, run, folder, last=True, on_all_ranks=on_all_ranks)
    except Exception as error:
        fabric.print(f"warning: {error}")
    if on_all_ranks:
        fabric.barrier()


def checkpoint_content(fabric: L.Fabric, run: TrainingRun) -> dict[str, Any]:
    """Return the arguments of ``checkpoints.save``, with the run's own tensors or gathered copies."""
    settings, finetuning = run.settings, run.finetuning
    # References, no copies: the writer copies them, unless the run waits for the save.
    optimizer_state = run.optimizer.state_dict()
    lora_weights = None
    # Collective: all ranks must be here, although only rank 0 receives something.
    if run.sharded:
        weights, optimizer_state = gather_weights(run.gpt), gather_state(optimizer_state)
    elif finetuning is not None:
        # Merged weights work in every LitGPT command; the LoRA parameters are what a resumed run needs.
        weights, lora_weights = finetuning.merge_weights(run.gpt)
    else:
        weights = run.gpt.state_dict()
    return {
        "weights": weights,
        "lora_weights": lora_weights,
        "config": settings.model,
        "prompt_style": finetuning.prompt_style if finetuning else None,
        "instructions_path": finetuning.instructions_path if finetuning else None,
        "hyperparameters": run.hyperparameters,
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "tokenizer_dir": settings.tokenizer_dir,
        "manifest_path": tokens_manifest(settings),
        "training_state": training_state(fabric, run, optimizer_state),
    }


def plan_from(settings: RunSettings, loader: DataLoader, seq_length: int, devices: int, progress: Progress) -> Plan:
    """Plan a run from ``progress`` and the position of its loader."""
    loader, train = stateful_loader(loader), settings.train
    if isinstance(loader, TrainLoader):
        sequences, position = loader.items, loader.position
    else:  # a loader of LitGPT: full micro batches on each device, and no position
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
        chosen_steps=None if settings.time_budget is None else progress.chosen_steps or UNKNOWN,
    )


def batch_layout(fabric: L.Fabric, run: TrainingRun) -> dict[str, int]:
    """Return what decides which tokens are in which batch."""
    return {
        "micro_batch_size": run.settings.train.micro_batch_size,
        "global_batch_size": run.settings.train.global_batch_size,
        "max_seq_length": run.gpt.max_seq_length,
        "devices": fabric.world_size,
        "data_seed": getattr(run.settings.data, "seed", 0),
    }


def stateful_loader(loader: DataLoader) -> Any:
    """Return the loader inside Fabric's wrapper, which has a ``state_dict``.

    Raises:
        UserError: it has none.
    """
    loader = unwrap_loader(loader)
    if not hasattr(loader, "state_dict"):
        raise UserError(
            f"{type(loader).__name__} has no state_dict, so a run on it could not be resumed; use"
            " litmoe.data.TokenizedText or a LitGPT data module based on litdata."
        )
    return loader


def unwrap_loader(loader: DataLoader) -> Any:
    """Return the loader inside Fabric's wrapper."""
    return getattr(loader, "_dataloader", loader)


def tokens_manifest(settings: RunSettings) -> Path | None:
    """Return the metadata file of the tokens that the model was pretrained on; None where there is none."""
    # Conversations have metadata of their own. This is about the text of the pretraining.
    if settings.is_finetuning and settings.initial_checkpoint_dir is not None:
        path = settings.initial_checkpoint_dir / checkpoints.MANIFEST
    else:
        # Data modules of LitGPT have no metadata file.
        train_data_path = getattr(settings.data, "train_data_path", None)
        if train_data_path is None:
            return None
        path = manifest_path(Path(train_data_path).parent)
    return path if path.is_file() else None


def scaler_of(fabric: L.Fabric) -> Any:
    """Return the gradient scaler of 16-mixed, else None."""
    return getattr(fabric._precision, "scaler", None)
