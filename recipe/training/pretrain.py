"""Pretraining: LitGPT's ``main → fit → validate`` with this project's loop in them, and the call that runs them.

``pretrain`` readies a run and calls ``litgpt.pretrain.setup``, which resolves devices, builds tokenizer, loggers and
Fabric, launches the processes and calls ``main`` here.
"""

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import litgpt.pretrain
import torch
import yaml
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from litgpt import GPT, Config, Tokenizer
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.model import GptNeoxMLP
from litgpt.utils import CycleIterator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipe import checkpoints
from recipe.cli import UserError
from recipe.data.manifest import SPLITS, from_dict, manifest_path, text_fingerprint
from recipe.data.reader import TokenLoader
from recipe.evaluation import hellaswag
from recipe.flops import count_parameters, training_flops_per_token
from recipe.inference.generate import sample_text
from recipe.settings import MoESettings, ParsedRun, RunSettings, choose_precision, processes
from recipe.training.compiling import should_compile
from recipe.training.logs import METRICS_FILE, Loggers, RunDisplay, logger_factory, remove_run
from recipe.training.model import Losses, PretrainingModel
from recipe.training.optimizers import load_optimizer_state, make_optimizer, set_learning_rate
from recipe.training.patches import patched_litgpt
from recipe.training.schedule import Plan, learning_rate, plan_run
from recipe.upcycling import upcycle


def pretrain(run: ParsedRun, *, resume_from: Path | None) -> None:
    """Trains as the settings say and leaves checkpoints and metrics in ``settings.out_dir``.

    Args:
        run: parsed and checked settings; text and tokens are there.
        resume_from: a whole checkpoint folder to continue from.

    Raises:
        UserError: for what only shows now: a resumed run that does not fit, a data set that is too small, W&B without
            a login.
    """
    settings = run.settings
    precision, note = choose_precision(settings.precision)
    devices, num_nodes = processes(settings)
    out_dir = settings.out_dir
    resume_step = checkpoints.read_mark(resume_from).step if resume_from else None
    with patched_litgpt(
        main=partial(main, run=run, resume_from=resume_from, precision_note=note),
        choose_logger=logger_factory(
            settings.loggers or [settings.logger_name], run_name=settings.run_name, resume_step=resume_step
        ),
        summary={"settings": str(out_dir / "run_config.yaml")},
    ):
        litgpt.pretrain.setup(
            model_name=settings.model.name,
            model_config=settings.model,
            out_dir=out_dir,
            precision=precision,
            initial_checkpoint_dir=settings.initial_checkpoint_dir,
            resume=resume_from or False,
            data=settings.data,
            train=settings.train,
            eval=settings.eval,
            log=settings.log,
            optimizer=run.optimizer,
            devices=devices,
            num_nodes=num_nodes,
            tokenizer_dir=settings.tokenizer_dir,
            logger_name="csv",
            seed=settings.seed,
        )


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
    """What ``main`` builds and ``fit`` works with."""

    settings: RunSettings
    hyperparameters: dict[str, Any]
    model: _FabricModule
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
    progress: Progress = field(default_factory=Progress)

    @property
    def gpt(self) -> GPT:
        """LitGPT's model inside the wrappers, for saving and sampling."""
        return gpt_of(self.model)


def main(
    fabric: L.Fabric,
    devices: int,
    seed: int,
    initial_checkpoint_dir: Path | None,
    resume: bool | Literal["auto"] | Path,
    config: Config,
    data: DataModule,
    out_dir: Path,
    tokenizer_dir: Path | None,
    tokenizer: Tokenizer | None,
    train: TrainArgs,
    eval: EvalArgs,
    optimizer: str | dict,
    num_nodes: int = 1,
    *,
    run: ParsedRun,
    resume_from: Path | None,
    precision_note: str | None,
) -> None:
    """Replaces ``litgpt.pretrain.main``: builds model, optimizer and batches, trains, saves ``final/``."""
    settings = run.settings
    fabric.seed_everything(seed, verbose=False)  # the same in every process, so that all start from the same weights
    say = fabric.print
    compiled, compile_note = should_compile(settings.compile, fabric.device.type)

    with fabric.init_module(empty_init=True):
        gpt = GPT(config)
    litgpt.pretrain.initialize_weights(fabric, gpt, n_layer=config.n_layer, n_embd=config.n_embd)
    scale_gelu_projections(gpt)
    if train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    gpt.max_seq_length = train.max_seq_length or config.block_size
    if initial_checkpoint_dir:
        gpt.load_state_dict(checkpoints.load_weights(initial_checkpoint_dir))
    elif resume_from:
        gpt.load_state_dict(checkpoints.load_weights(resume_from))
    elif settings.upcycle:
        gpt.load_state_dict(upcycle(checkpoints.load_weights(settings.upcycle), gpt.state_dict()))

    module: nn.Module = PretrainingModel(gpt)
    model = fabric.setup(cast(nn.Module, torch.compile(module)) if compiled else module)
    # Fused optimizers unscale gradients themselves, so that Fabric could not clip them under a gradient scaler.
    fused = fabric.device.type == "cuda" and _scaler(fabric) is None
    optimizer_in_fabric = cast(
        _FabricOptimizer, fabric.setup_optimizers(make_optimizer(run.optimizer, model, fused=fused))
    )
    loggers = cast(Loggers, fabric.logger)  # what `logger_factory` made
    train_dataloader, val_dataloader = make_dataloaders(fabric, data, tokenizer, train, gpt.max_seq_length)

    plan = plan_run(
        train,
        devices=fabric.world_size,
        seq_length=gpt.max_seq_length,
        epoch_micro_batches=len(train_dataloader),
    )
    training = TrainingRun(
        settings=settings,
        hyperparameters=run.resolved,
        model=model,
        optimizer=optimizer_in_fabric,
        loggers=loggers,
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        tokenizer=tokenizer,
        plan=plan,
        flops_per_token=training_flops_per_token(config, gpt.max_seq_length),
        peak_flops=_peak_flops(fabric),
        questions=encode_hellaswag(settings, tokenizer, gpt),
    )
    if resume_from:
        resume_training(fabric, training, resume_from)
    check_same_on_all_machines(fabric, training)
    if resume_from and training.progress.step >= plan.steps:
        say(
            f"This run is finished: {resume_from} is step {training.progress.step:,} of {plan.steps:,}"
            f" ({training.progress.tokens:,} tokens). To train it further, raise what ends it ({plan.ended_by})."
        )
        return
    if fabric.global_rank == 0:
        if settings.overwrite and not resume_from:  # all that could be wrong with the new run is known by now
            remove_run(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(run.resolved, sort_keys=False)
        (out_dir / "run_config.yaml").write_text(text, encoding="utf-8")
    loggers.log_hyperparams(run.resolved)

    sizes = count_parameters(config, tie_embeddings=bool(train.tie_embeddings))
    say(f"{config.name}: {sizes.total / 1e6:,.1f} M parameters, {sizes.active / 1e6:,.1f} M active for each token.")
    say(
        f"{plan.steps:,} steps of {plan.accumulation * plan.tokens_per_micro_batch:,} tokens, {plan.tokens:,} tokens in"
        f" all, {plan.tokens / (len(train_dataloader) * plan.tokens_per_micro_batch):.2f} epochs;"
        f" it ends by {plan.ended_by}{f' or after {train.max_time:g} s' if train.max_time else ''}."
    )
    where = f"{fabric.world_size} x {_device_name(fabric)}" if fabric.world_size > 1 else _device_name(fabric)
    say(f"On {where} in {fabric._precision.precision}, {'compiled' if compiled else 'not compiled'}.")
    warmup_note = None
    if plan.warmup_steps < (train.lr_warmup_steps or 0):
        warmup_note = f"The run is shorter than its warm-up, which ends at step {plan.warmup_steps:,} instead."
    for note in (precision_note, compile_note, warmup_note):
        if note:
            say(note)
    if resume_from:
        say(f"Resuming from {resume_from}: step {training.progress.step:,} of {plan.steps:,}.")
    elif settings.upcycle:
        say(f"Each of {config.n_expert} experts starts as a copy of the feed-forward of {settings.upcycle}.")

    tokens_before, start = training.progress.tokens, time.perf_counter()
    try:
        finished = fit(fabric, training)
    except KeyboardInterrupt:
        newest = checkpoints.newest_step(out_dir)
        say(
            f"\nStopped after step {training.progress.step:,} of {plan.steps:,}. "
            + (f"--resume auto goes on from {newest}." if newest else "Nothing was saved yet (train.save_interval).")
        )
        raise
    save_checkpoint(fabric, training, out_dir / ("final" if finished else f"step-{training.progress.step:08d}"))
    loggers.finalize("success")
    _report(fabric, training, time.perf_counter() - start, training.progress.tokens - tokens_before)


def fit(fabric: L.Fabric, run: TrainingRun) -> bool:
    """Replaces ``litgpt.pretrain.fit``: trains from ``run.progress`` to the end of ``run.plan``.

    Returns:
        True at the end of the plan, False when ``train.max_time`` came first.

    Raises:
        UserError: for a loss or gradient that is no longer finite, before the update.
    """
    settings, plan, progress, model, optimizer = run.settings, run.plan, run.progress, run.model, run.optimizer
    train, evaluation, out_dir = settings.train, settings.eval, settings.out_dir
    batches = CycleIterator(run.train_dataloader)
    batches.epoch = progress.epoch
    peak = optimizer.param_groups[0]["initial_lr"]
    hellaswag_interval = settings.eval.hellaswag_interval or evaluation.interval
    interval = Interval()
    first_step, seconds_before, start = progress.step, progress.seconds, time.perf_counter()

    with RunDisplay(
        enabled=fabric.global_rank == 0, bar=settings.progress, steps=plan.steps, first_step=first_step
    ) as display:
        if evaluation.initial_validation and first_step == 0:
            fabric.log_dict(evaluate(fabric, run, display) | score_hellaswag(fabric, run, display), step=0)

        while progress.step < plan.steps:
            rate = learning_rate(
                progress.step, peak=peak, minimum=train.min_lr, warmup_steps=plan.warmup_steps, steps=plan.steps
            )
            set_learning_rate(optimizer.optimizer, rate / peak)
            micro_batches = plan.micro_batches_in(progress.step)
            for index in range(micro_batches):
                input_ids, targets = split_batch(next(batches), run.gpt.max_seq_length)
                with fabric.no_backward_sync(model, enabled=index < micro_batches - 1):
                    losses: Losses = model(input_ids, targets)
                    fabric.backward(total_loss(losses, settings.moe) / micro_batches)
                interval.add(losses)
            # Without max_norm the norm is still measured: clipping at infinity changes nothing.
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=train.max_norm or math.inf, error_if_nonfinite=False
            )
            assert norm is not None
            # Under a scaler a norm that is not finite is part of its search; the loss tells there.
            finite = torch.isfinite(norm if _scaler(fabric) is None else losses.cross_entropy)
            if _any_rank(fabric, not finite):
                raise UserError(_not_finite(progress.step + 1, out_dir))
            optimizer.step()
            optimizer.zero_grad()

            progress.step += 1
            progress.tokens += micro_batches * plan.tokens_per_micro_batch
            progress.epoch = batches.epoch
            last = progress.step == plan.steps
            row: dict[str, Any] = {}
            if progress.step % train.log_interval == 0 or last:
                row = training_row(fabric, run, interval, norm, rate, micro_batches * plan.tokens_per_micro_batch)
                interval = Interval()
            session = time.perf_counter() - start
            progress.seconds = seconds_before + session
            display.step(progress.step, row, session / (progress.step - first_step) * (plan.steps - progress.step))

            if progress.step % evaluation.interval == 0 or (last and evaluation.final_validation):
                with interval.paused():
                    row |= evaluate(fabric, run, display)
            if progress.step % hellaswag_interval == 0 or (last and evaluation.final_validation):
                with interval.paused():
                    row |= score_hellaswag(fabric, run, display)
            if row:
                fabric.log_dict({**row, "time": round(progress.seconds, 3)}, step=progress.step)
            if train.save_interval and progress.step % train.save_interval == 0 and not last:
                with interval.paused():
                    save_checkpoint(fabric, run, out_dir / f"step-{progress.step:08d}")
            if train.max_time and not last and _any_rank(fabric, session >= train.max_time):
                return False
    return True


def total_loss(losses: Losses, moe: MoESettings) -> Tensor:
    """What is differentiated: the cross-entropy and the weighted balance losses."""
    return losses.cross_entropy + moe.load_balancing_loss * losses.load_balancing + moe.z_loss * losses.z_loss


def evaluate(fabric: L.Fabric, run: TrainingRun, display: RunDisplay) -> dict[str, float]:
    """Validation loss and a sample, printed and logged; nothing where there is no validation data."""
    if run.val_dataloader is None:
        return {}
    step = run.progress.step
    loss = validate(fabric, run.model, run.val_dataloader, max_iters=run.settings.eval.max_iters)
    display.print(f"step {step}/{run.plan.steps} | val loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
    if fabric.global_rank == 0 and (text := write_sample(fabric, run)) is not None:
        display.print(f"step {step}/{run.plan.steps} | sample: {text}")
        run.loggers.log_text("sample", text, step)
    fabric.barrier()
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}


def score_hellaswag(fabric: L.Fabric, run: TrainingRun, display: RunDisplay) -> dict[str, float]:
    """HellaSwag's accuracies, printed and logged; each process computes its share of the questions."""
    if run.questions is None:
        return {}
    start = time.perf_counter()
    share = run.questions.batches[fabric.global_rank :: fabric.world_size]
    with fabric.autocast():
        scores = hellaswag.log_probabilities(run.gpt, share, run.questions)
    if fabric.world_size > 1:
        scores = cast(Tensor, fabric.all_reduce(scores, reduce_op="sum")).cpu()
    score = hellaswag.accuracy(run.questions.questions, scores)
    display.print(
        f"step {run.progress.step}/{run.plan.steps} | hellaswag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}"
        f" ({score.protocol}, {score.questions:,} questions, {time.perf_counter() - start:,.0f} s)"
    )
    return {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}


@torch.no_grad()
def validate(fabric: L.Fabric, model: _FabricModule, val_dataloader: DataLoader, max_iters: int) -> float:
    """Replaces ``litgpt.pretrain.validate``: the mean cross-entropy in nats per token, over all devices.

    Takes the first ``max_iters`` batches of all devices together, which are the same at each call where the loader's
    order is fixed. Each device takes as many as the others: where they do not divide ``max_iters``, it is rounded up,
    and where they do not divide the validation set, its last batches are left out.
    """
    max_iters = math.ceil(max_iters / fabric.world_size)
    model.eval()
    losses = []
    for index, batch in enumerate(val_dataloader):
        if index >= max_iters:
            break
        input_ids, targets = split_batch(batch, gpt_of(model).max_seq_length)
        losses.append(model(input_ids, targets).cross_entropy)
    model.train()
    return float(mean_over_devices(fabric, torch.stack(losses).mean()))


class Interval:
    """Sums over the micro batches since the last log line, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: Losses | None = None
        self.micro_batches = 0
        self._start = time.perf_counter()

    def add(self, losses: Losses) -> None:
        detached = Losses(*(value.detach() for value in losses))
        self._sums = (
            detached if self._sums is None else Losses(*(a + b for a, b in zip(self._sums, detached, strict=True)))
        )
        self.micro_batches += 1

    def means(self, fabric: L.Fabric) -> Losses:
        """Means over micro batches and devices; waits for the device."""
        assert self._sums is not None
        return Losses(*(mean_over_devices(fabric, value / self.micro_batches) for value in self._sums))

    @property
    def seconds(self) -> float:
        """Since the interval began, without the pauses."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and saving are no training time."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def training_row(
    fabric: L.Fabric, run: TrainingRun, interval: Interval, norm: Tensor, rate: float, step_tokens: int
) -> dict[str, Any]:
    """The numbers of one log line; columns as in ``recipe.training.logs.COLUMNS``."""
    means = interval.means(fabric)
    cross_entropy = float(means.cross_entropy)  # waits for the device, so the seconds below are true
    tokens_per_second = interval.micro_batches * run.plan.tokens_per_micro_batch / interval.seconds
    row: dict[str, Any] = {
        "train_loss": cross_entropy,
        "learning_rate": rate,
        "epoch": run.progress.epoch,
        "iter_tokens": step_tokens,
        "total_tokens": run.progress.tokens,
        "tokens_per_second": tokens_per_second,
        "grad_norm": float(norm),
    }
    if run.peak_flops:
        row["mfu"] = run.flops_per_token * tokens_per_second / (run.peak_flops * fabric.world_size)
    if means.expert_load.numel():
        row |= {"load_balancing_loss": float(means.load_balancing), "z_loss": float(means.z_loss)}
        for layer, load in enumerate(means.expert_load.tolist()):
            # Of the mean load: 1 is even. An expert near 0 is dead, one near n_expert / n_expert_per_token gets all.
            row[f"expert_load_max/layer_{layer}"] = max(load) * len(load)
            row[f"expert_load_min/layer_{layer}"] = min(load) * len(load)
    return row


def write_sample(fabric: L.Fabric, run: TrainingRun) -> str | None:
    """The text that the model writes now; leaves its mode and every random state as they are."""
    sample = run.settings.sample
    if run.tokenizer is None or sample.prompt is None:
        return None
    with fabric.autocast():
        texts = sample_text(
            run.gpt,
            run.tokenizer,
            sample.prompt,
            max_new_tokens=run.settings.eval.max_new_tokens or sample.max_new_tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            seed=sample.seed,
        )
    return texts[0]


def save_checkpoint(fabric: L.Fabric, run: TrainingRun, folder: Path) -> None:
    """Saves everything that resuming needs; one process writes."""
    progress = run.progress
    if fabric.global_rank == 0:
        fabric.print(f"Saving {folder}")
        checkpoints.save(
            folder,
            weights=run.gpt.state_dict(),
            config=run.gpt.config,
            hyperparameters=run.hyperparameters,
            step=progress.step,
            tokens=progress.tokens,
            tokenizer_dir=run.settings.tokenizer_dir,
            training_state={
                "progress": asdict(progress),
                "layout": _layout(fabric, run),
                "optimizer": run.optimizer.state_dict(),
                "train_dataloader": _streaming(run.train_dataloader).state_dict(),
                "random": {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
                "scaler": scaler.state_dict() if (scaler := _scaler(fabric)) else {},
            },
            manifest_path=_manifest_path(run.settings),
        )
    fabric.barrier()


def resume_training(fabric: L.Fabric, run: TrainingRun, folder: Path) -> None:
    """Puts optimizer, data position, random states and counters back to where ``folder`` was saved.

    Raises:
        UserError: where the batches would not be the same ones.
    """
    state = checkpoints.load_training_state(folder)
    then, now = state["layout"], _layout(fabric, run)
    loader = _streaming(run.train_dataloader)
    changed = {name: f"{name} was {then[name]} and is now {now[name]}" for name in now if then[name] != now[name]}
    other_devices = changed.pop("devices", None) if isinstance(loader, TokenLoader) else None
    if changed:
        raise UserError(
            f"{folder} can't be resumed with other batches: {'; '.join(changed.values())}. Resume with the old values,"
            f" or start a new run from its weights: --initial_checkpoint_dir {folder} --out_dir NEW"
        )
    run.progress = Progress(**state["progress"])
    check_same_tokens(folder, run.settings)
    load_optimizer_state(run.optimizer.optimizer, state["optimizer"])
    loader.load_state_dict(state["train_dataloader"])
    if other_devices:
        fabric.print(f"{other_devices}: the same batches go on; sums differ in their last digits by their order.")
    torch.set_rng_state(state["random"]["torch"])
    if len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    if (scaler := _scaler(fabric)) and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def check_same_tokens(folder: Path, settings: RunSettings) -> None:
    """Raises ``UserError`` where the position that ``folder`` saved would mean other tokens."""
    then, now = folder / "manifest.json", _manifest_path(settings)
    if now is None or not then.is_file():
        return
    if _made_from(then, "train") != _made_from(now, "train"):
        raise UserError(
            f"{folder} was trained on other tokens than those of {now.parent.parent}: the text or the tokenizer"
            f" changed. Bring the old ones back, or start a new run from its weights: --initial_checkpoint_dir {folder}"
            " --out_dir NEW"
        )


def check_same_on_all_machines(fabric: L.Fabric, run: TrainingRun) -> None:
    """Raises ``UserError``, in every process, where they have not all the same checkpoint and tokens: they would train
    different runs and average their gradients."""
    if fabric.world_size == 1:
        return
    path = _manifest_path(run.settings)
    tokens = _made_from(path, *SPLITS) if path else None
    mine = {"the step that it starts from": run.progress.step, "the tokens": tokens}
    everyone: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everyone, mine)
    if different := [name for name in mine if any(other[name] != everyone[0][name] for other in everyone)]:
        raise UserError(
            f"the machines of this run do not agree on {' and '.join(different)}: process {fabric.global_rank} of"
            f" {fabric.world_size} starts from step {run.progress.step:,}. Put --out_dir and the data on a disk that"
            " all of them share, or copy both to each."
        )


def scale_gelu_projections(gpt: GPT) -> None:
    """Initializes the output projection of ``GptNeoxMLP`` as LitGPT does those of other layers, smaller with depth.

    Without it a dense GPT-2 would begin with feed-forward outputs several times those of its mixture of experts.
    """
    for module in gpt.modules():
        if isinstance(module, GptNeoxMLP):
            nn.init.normal_(module.proj.weight, std=1 / math.sqrt(gpt.config.n_embd) / gpt.config.n_layer)


def make_dataloaders(
    fabric: L.Fabric, data: DataModule, tokenizer: Tokenizer | None, train: TrainArgs, seq_length: int
) -> tuple[DataLoader, DataLoader | None]:
    """``litgpt.pretrain.get_dataloaders``, and a clear message where a set is too small to give one batch.

    Raises:
        UserError: the training or validation set is shorter than one batch.
    """
    loaders = litgpt.pretrain.get_dataloaders(fabric, data, tokenizer, train, seq_length)
    for name, loader in zip(("training", "validation"), loaders, strict=True):
        if loader is not None and len(loader) == 0:
            raise UserError(
                f"the {name} set has less than one batch: micro_batch_size {train.micro_batch_size} sequences of"
                f" {seq_length + 1} tokens for each of {fabric.world_size} device(s); lower --micro-batch-size or"
                " --max-seq-length, or bring more text."
            )
    _streaming(loaders[0])  # known now, not at the first save
    # TokenizedText divides the batches over the devices itself.
    train_dataloader, val_dataloader = (
        loader and fabric.setup_dataloaders(loader, use_distributed_sampler=not isinstance(loader, TokenLoader))
        for loader in loaders
    )
    return cast(DataLoader, train_dataloader), cast(DataLoader | None, val_dataloader)


def encode_hellaswag(settings: RunSettings, tokenizer: Tokenizer | None, gpt: GPT) -> hellaswag.Encoded | None:
    """HellaSwag's questions, ready for this model and context; None where the run scores none."""
    if settings.eval.hellaswag is None or tokenizer is None:
        return None
    questions = hellaswag.read_questions(settings.eval.hellaswag, settings.eval.hellaswag_limit)
    return hellaswag.encode(questions, tokenizer, gpt.config, gpt.max_seq_length)


def split_batch(batch: Tensor, seq_length: int) -> tuple[Tensor, Tensor]:
    """``(B, T + 1)`` tokens into inputs and targets, each ``(B, T)`` int64."""
    tokens = batch[:, : seq_length + 1].long()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def mean_over_devices(fabric: L.Fabric, value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op="mean"))


def gpt_of(model: _FabricModule) -> GPT:
    """LitGPT's model inside Fabric's, the strategy's and the compiler's wrappers."""
    module = model.module
    return getattr(module, "_orig_mod", module).gpt


def _streaming(loader: DataLoader) -> Any:
    """The loader inside Fabric's: it knows its position."""
    loader = getattr(loader, "_dataloader", loader)
    if not hasattr(loader, "state_dict"):
        raise UserError(
            f"{type(loader).__name__} can't tell its position, so a run on it can't be saved to be resumed; use"
            " recipe.data.TokenizedText or a LitGPT data module on litdata."
        )
    return loader


def _layout(fabric: L.Fabric, run: TrainingRun) -> dict[str, int]:
    """What decides which tokens stand in which batch."""
    return {
        "micro_batch_size": run.settings.train.micro_batch_size,
        "global_batch_size": run.settings.train.global_batch_size,
        "max_seq_length": run.gpt.max_seq_length,
        "devices": fabric.world_size,
        "data_seed": getattr(run.settings.data, "seed", 0),
    }


def _scaler(fabric: L.Fabric) -> Any:
    """The gradient scaler of 16-mixed, else None."""
    return getattr(fabric._precision, "scaler", None)


def _any_rank(fabric: L.Fabric, condition: bool) -> bool:
    """Whether it holds in any process: clocks and losses differ, and all must leave the loop at the same step."""
    if fabric.world_size == 1:
        return condition
    return bool(fabric.all_reduce(torch.tensor(float(condition), device=fabric.device), reduce_op="sum"))


def _manifest_path(settings: RunSettings) -> Path | None:
    if (text := getattr(settings.data, "train_data_path", None)) is None:
        return None
    path = manifest_path(Path(text).parent)
    return path if path.is_file() else None


def _made_from(path: Path, *splits: str) -> tuple[str, ...]:
    """What the tokens of a manifest follow from: fingerprints of the tokenizer and of each split's text."""
    found = from_dict(json.loads(path.read_text(encoding="utf-8")))
    return found.tokenizer.sha256, *(text_fingerprint(found.splits[split].text) for split in splits)


def _not_finite(step: int, out_dir: Path) -> str:
    newest = checkpoints.newest_step(out_dir)
    start = f"--resume {newest}" if newest else "--overwrite"
    return (
        f"the loss or its gradient is no longer finite at step {step:,}, so the run stops before this update;"
        f" start again with {start} and a lower --optimizer.init_args.lr, a longer --train.lr_warmup_steps,"
        " or --precision 32-true."
    )


def _peak_flops(fabric: L.Fabric) -> float | None:
    if fabric.device.type != "cuda":
        return None
    dtype = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where it does not know the card, and then MFU stays empty
        return get_available_flops(fabric.device, dtype.get(fabric._precision.precision, torch.float32))


def _device_name(fabric: L.Fabric) -> str:
    if fabric.device.type == "cuda":
        return torch.cuda.get_device_name(fabric.device)
    if fabric.device.type != "cpu":
        return f"the {fabric.device.type} device"
    return f"the CPU ({torch.get_num_threads()} threads)"


def _report(fabric: L.Fabric, run: TrainingRun, seconds: float, tokens: int) -> None:
    """What was done in this session, where it lies, and what one does with it."""
    say, out_dir = fabric.print, run.settings.out_dir
    say(f"{tokens:,} tokens in {seconds:,.0f} s, {tokens / seconds:,.0f} tokens/s with validation and saving.")
    if fabric.device.type == "cuda":
        say(f"Peak memory {torch.cuda.max_memory_reserved(fabric.device) / 2**30:.2f} GiB.")
    if run.progress.step < run.plan.steps:
        say(
            f"The time of {run.settings.train.max_time:g} s is used up at step {run.progress.step:,} of"
            f" {run.plan.steps:,}. The same command with --resume auto goes on from here."
        )
        return
    say(f"Checkpoint  {out_dir / 'final'}")
    say(f"Metrics     {out_dir / METRICS_FILE}")
    prompt = json.dumps(run.settings.sample.prompt or "Once upon a time", ensure_ascii=False)
    say(f"Write       uv run python generate.py {out_dir / 'final'} --prompt {prompt}")
    say(f"Evaluate    uv run python evaluate.py {out_dir / 'final'}")
    say(f"Chat        uv run litgpt chat {out_dir / 'final'}")
