"""The training loop, the same for pretraining and finetuning: ``run_training → fit → validate``."""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import litgpt.pretrain
import torch
import yaml
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from litgpt import GPT, Tokenizer
from litgpt.args import TrainArgs
from litgpt.data import DataModule
from litgpt.prompts import PromptStyle
from litgpt.utils import CycleIterator
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from custom_moe import load_statistics, set_backend
from custom_moe.backends import hardware_of
from litmoe import checkpoints
from litmoe.cli import UserError, command, harmless
from litmoe.config import FinetuneSettings, MoESettings, ParsedRun, RunSettings, constant_weights_note, is_sharded
from litmoe.data.instruction_module import IGNORED, InstructionData
from litmoe.data.reader import TokenLoader
from litmoe.evaluation import hellaswag
from litmoe.flops import training_flops_per_token
from litmoe.inference.generate import sample_text
from litmoe.train.compiling import compiler_settings, should_compile
from litmoe.train.gpus import found_card, peak_flops
from litmoe.train.interval import Interval, sum_over_devices
from litmoe.train.logs import METRICS_FILE, Loggers, RunDisplay, remove_run
from litmoe.train.model import (
    Batch,
    Losses,
    PretrainingModel,
    cast_matrices,
    even_counts,
    matrices_to_cast,
    moe_layers,
    update_selection_biases,
)
from litmoe.train.nonfinite import first_not_finite, weights_not_finite
from litmoe.train.optimizers import check_optimizer, make_optimizer, rounding_note, set_learning_rate
from litmoe.train.plan import describe_needs, describe_size
from litmoe.train.saving import CheckpointWriter, StopSignals, lasting_output
from litmoe.train.schedule import Plan, learning_rate
from litmoe.train.state import (
    Progress,
    TrainingRun,
    check_same_on_all_machines,
    gpt_of,
    make_plan,
    moment_of,
    resume_training,
    save_checkpoint,
    save_what_is_whole,
    scaler_of,
    with_position,
)

Ending = Literal["finished", "out of time", "stopped"]


@lasting_output()
def run_training(
    fabric: L.Fabric,
    gpt: GPT,
    *,
    run: ParsedRun,
    data: DataModule,
    tokenizer: Tokenizer | None,
    resume_from: Path | None,
    precision_note: str | None,
    sample_prompt: str | None,
    prompt_style: PromptStyle | None = None,
    made_from: dict[str, str] | None = None,
) -> None:
    """Trains ``gpt`` as the settings say, from its weights as they are, and saves ``final/``.

    Args:
        gpt: its weights loaded, ``max_seq_length`` set, on the device; what is not to be trained needs no gradient.
        resume_from: the checkpoint that its weights are of, whose optimizer, position and counters are taken too.
        precision_note: a line for the user, or None.
        sample_prompt, prompt_style, made_from: see ``TrainingRun``.
    """
    settings, say = run.settings, fabric.print
    train, out_dir = settings.train, settings.out_dir
    experts_note = choose_experts_backend(fabric, gpt, settings.moe)
    sharded = is_sharded(settings)
    compiled, compile_note = should_compile(False if sharded else settings.compile, fabric.device.type)
    if fabric.device.type == "cuda" and fabric._precision.precision == "32-true":
        torch.set_float32_matmul_precision("high")  # TF32, as LitGPT's commands; routers stay exact in mixed precision
    # What the compiler can't take ends the run, and never runs uncompiled unsaid.
    compiler = partial(torch.compile, fullgraph=True) if compiled else None
    model = fabric.setup(PretrainingModel(gpt, settings.activation_checkpointing, compiler))
    # bf16-true has just rounded the rotations along with the weights; generation has them in fp32.
    gpt.cos, gpt.sin = gpt.rope_cache(device=fabric.device)
    check_optimizer(run.optimizer["class_path"], fabric.device.type)
    # Fused optimizers unscale gradients themselves, so that Fabric could not clip them under a gradient scaler.
    fused = fabric.device.type in ("cpu", "cuda") and scaler_of(fabric) is None
    optimizer_in_fabric = cast(
        _FabricOptimizer, fabric.setup_optimizers(make_optimizer(run.optimizer, model, fused=fused))
    )
    loggers = cast(Loggers, fabric.logger)  # what `logger_factory` made
    train_dataloader, val_dataloader = make_dataloaders(fabric, data, tokenizer, train, gpt.max_seq_length)

    plan = make_plan(train, train_dataloader, gpt.max_seq_length, devices=fabric.world_size, progress=Progress())
    training = TrainingRun(
        settings=settings,
        hyperparameters=run.resolved,
        model=model,
        compiled=compiled,
        optimizer=optimizer_in_fabric,
        loggers=loggers,
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        tokenizer=tokenizer,
        plan=plan,
        flops_per_token=training_flops_per_token(gpt.config, gpt.max_seq_length),
        # Rows of different lengths, and weights that are not trained: no formula tells how busy a card was.
        peak_flops=None if isinstance(settings, FinetuneSettings) else _peak_flops(fabric),
        questions=encode_hellaswag(settings, tokenizer, gpt),
        sample_prompt=None if sharded else sample_prompt,
        expert_counts=even_counts(gpt, fabric.device),
        prompt_style=prompt_style,
        made_from=made_from or {},
        writer=CheckpointWriter(settings.checkpoint, say),
    )
    if resume_from:
        resume_training(fabric, training, resume_from)
        plan = training.plan
    check_same_on_all_machines(fabric, training)
    own = resume_from if resume_from and resume_from.resolve().parent == out_dir.resolve() else None
    if resume_from and training.progress.step >= plan.steps:
        say(
            f"This run is finished: {resume_from} is step {training.progress.step:,} of {plan.steps:,}"
            f" ({training.progress.tokens:,} tokens). To train it further, raise what ends it ({plan.ended_by})."
        )
        if own and fabric.global_rank == 0:  # a kill may have come after the last save
            checkpoints.finish_interrupted_saves(out_dir)
            if own.exists():
                training.writer.remove_old(own)
        return
    if fabric.global_rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.finish_interrupted_saves(out_dir)
        if settings.overwrite:  # all that could be wrong with the new run is known by now
            if own is None:
                remove_run(out_dir)
            elif own.exists():  # an interrupted save that was resumed from has just got its name, and is the newest
                checkpoints.remove_newer(own)
        written = out_dir / ".run_config.yaml.partial"
        written.write_text(yaml.safe_dump(run.resolved, sort_keys=False), encoding="utf-8")
        os.replace(written, out_dir / "run_config.yaml")  # a kill leaves the old one or the new one
    loggers.log_hyperparams(run.resolved)

    for line in describe_run(fabric, gpt, run, plan):
        say(line)
    where = f"{fabric.world_size} x {_device_name(fabric)}" if fabric.world_size > 1 else _device_name(fabric)
    say(f"On {where} in {fabric._precision.precision}, {'compiled' if compiled else 'not compiled'}{experts_note}.")
    warmup_note = None
    if plan.warmup_steps < (train.lr_warmup_steps or 0):
        warmup_note = f"The run is shorter than its warm-up, which ends at step {plan.warmup_steps:,} instead."
    conversations = data.summary() if isinstance(data, InstructionData) else None
    sharded_note = "Sharded by FSDP: no samples are written while it trains." if sharded else None
    frozen_routers = isinstance(settings, FinetuneSettings) and settings.lora_r and not settings.lora_mlp
    router_note = None if frozen_routers else constant_weights_note(gpt.config)
    lost_updates = rounding_note(run.optimizer, fabric._precision.precision, sharded=sharded)
    for note in (precision_note, lost_updates, compile_note, warmup_note, sharded_note, router_note, conversations):
        if note:
            say(note)
    if resume_from:
        say(f"Resuming from {resume_from}: step {training.progress.step:,} of {plan.steps:,}.")

    tokens_before, start = training.progress.tokens, time.perf_counter()
    with StopSignals(say) as signals, compiler_settings():
        try:
            ending = fit(fabric, training, signals)
        except Exception as error:
            save_what_is_whole(fabric, training)
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise UserError(
                    f"out of memory: {str(error).splitlines()[0]}\nThe same command with --plan says what to change,"
                    " the cheapest first: smaller micro batches (--micro_batch_size), recomputed activations"
                    " (--activation_checkpointing block), 8-bit Adam. --resume auto goes on from the last checkpoint."
                ) from None
            if isinstance(error, TorchDynamoException):
                raise UserError(
                    f"torch.compile can't take this model: {error}\nIt trains uncompiled: --compile false"
                ) from None
            raise
        name = "final" if ending == "finished" else f"step-{training.progress.step:08d}"
        training.writer.tell_failure(wait=True)
        if _any_process(fabric, training.writer.saved != out_dir / name and fabric.global_rank == 0):
            save_checkpoint(fabric, training, out_dir / name, last=True)
    loggers.finalize("success")
    if ending == "stopped":
        say(
            f"Stopped after step {training.progress.step:,} of {plan.steps:,}. The same command with --resume auto goes"
            f" on from {out_dir / name}."
        )
        if fabric.global_rank == 0:  # one process tells: launchers take another's code for a failure
            sys.exit(signals.exit_code)
        return
    _report(fabric, training, time.perf_counter() - start, training.progress.tokens - tokens_before)


def describe_run(fabric: L.Fabric, gpt: GPT, run: ParsedRun, plan: Plan) -> Iterator[str]:
    """How large the run is, much of it as ``run_train.py --plan`` has it."""
    settings, train = run.settings, run.settings.train
    yield describe_size(settings)
    if isinstance(settings, FinetuneSettings):
        trained = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
        if settings.lora_r:
            yield f"{trained / 1e6:,.3f} M parameters are trained (LoRA)."
        size = f"{plan.steps:,} steps of {train.global_batch_size:,} conversations"
    else:
        # It takes seconds, as compiling does; and it knows no FSDP.
        if fabric.device.type == "cuda" and fabric.global_rank == 0 and not is_sharded(settings):
            yield from describe_needs(run, str(fabric._precision.precision), hardware_of(fabric.device), found_card())
        size = (
            f"{plan.steps:,} steps of {plan.accumulation * plan.tokens_per_micro_batch:,} tokens,"
            f" {plan.tokens:,} tokens in all"
        )
    limit = f" or after {train.max_time:g} s" if train.max_time else ""
    yield f"{size}, {plan.epochs:.2f} epochs; it ends by {plan.ended_by}{limit}."


def fit(fabric: L.Fabric, run: TrainingRun, signals: StopSignals) -> Ending:
    """Replaces ``litgpt.pretrain.fit``: trains from ``run.progress`` to the end of ``run.plan``.

    Returns:
        What ended it: the plan, ``train.max_time``, or a signal to any of the processes.

    Raises:
        UserError: for a loss or gradient that is no longer finite, before the update.
    """
    settings, plan, progress, model, optimizer = run.settings, run.plan, run.progress, run.model, run.optimizer
    train, evaluation, out_dir = settings.train, settings.eval, settings.out_dir
    batches = CycleIterator(run.train_dataloader)
    batches.epoch = progress.epoch
    peak = optimizer.param_groups[0]["initial_lr"]
    # FSDP casts on its own, and keeps no whole gradients between micro batches.
    sharded = is_sharded(settings)
    matrices = (
        {} if sharded else matrices_to_cast(model, fabric._precision.precision, settings.activation_checkpointing)
    )
    first_step, seconds_before, start = progress.step, progress.seconds, time.perf_counter()

    with RunDisplay(
        enabled=fabric.global_rank == 0, bar=settings.progress, steps=plan.steps, first_step=first_step
    ) as display:
        if evaluation.initial_validation and first_step == 0:
            fabric.log_dict(evaluate(fabric, run, display) | score_hellaswag(fabric, run, display), step=0)

        resumed_before_an_evaluation = run.moment is not None
        if resumed_before_an_evaluation and not finish_row(fabric, run, display, signals):
            return "stopped"
        begun = time.perf_counter()
        run.interval.begin()
        while progress.step < plan.steps:
            rate = learning_rate(
                progress.step,
                peak=peak,
                minimum=train.min_lr,
                warmup_steps=plan.warmup_steps,
                steps=plan.steps,
                schedule=settings.schedule,
            )
            set_learning_rate(optimizer.optimizer, rate / peak)
            micro_batches = plan.micro_batches_in(progress.step)
            taken = [as_batch(next(batches), run.gpt.max_seq_length) for _ in range(micro_batches)]
            shares, tokens = loss_shares(fabric, taken)
            counts, step_loss = torch.zeros_like(run.expert_counts), torch.zeros((), device=fabric.device)
            weights = cast_matrices(matrices, fabric._precision.precision)
            for index, (batch, share) in enumerate(zip(taken, shares, strict=True)):
                with fabric.no_backward_sync(model, enabled=index < micro_batches - 1 and not sharded):
                    losses: Losses = functional_call(model, weights, (*batch, run.expert_counts), tie_weights=False)
                    losses = losses._replace(cross_entropy=losses.cross_entropy * share)
                    fabric.backward(total_loss(losses, settings.moe) / micro_batches)
                run.interval.add(losses)
                counts += losses.expert_counts
                step_loss += losses.cross_entropy.detach()
            del weights
            run.interval.tokens += tokens
            # Without max_norm the norm is still measured: clipping at infinity changes nothing.
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=train.max_norm or math.inf, error_if_nonfinite=False
            )
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            assert norm is not None
            # Under a scaler a norm that is not finite is part of its search; the loss tells there.
            measure = norm if scaler_of(fabric) is None else step_loss
            out_of_time = bool(train.max_time) and time.perf_counter() - start >= train.max_time
            save_due = fabric.global_rank == 0 and run.writer.is_due()
            bad, out_of_time, stopped, save_due = in_any_process(
                fabric, ~torch.isfinite(measure), out_of_time, signals.received is not None, save_due
            )
            if bad:
                optimizer.zero_grad()
                message = _not_finite(fabric, run, taken)
                save_what_is_whole(fabric, run, by_all=True)
                raise UserError(message)
            run.moment = None
            optimizer.step()
            optimizer.zero_grad()
            balance(fabric, run, counts, norm)

            progress.step += 1
            progress.tokens += tokens
            progress.epoch = batches.epoch
            session = time.perf_counter() - start
            progress.seconds = seconds_before + session
            last = progress.step == plan.steps
            compiling = run.compiled and progress.step == first_step + 1
            if compiling:
                display.print(f"The first step took {time.perf_counter() - begun:,.0f} s, with compiling.")
            row: dict[str, Any] = {}
            if progress.step % train.log_interval == 0 or last:
                row = training_row(fabric, run, norm, rate, tokens)
                run.interval = Interval()
            elif compiling:
                run.interval.leave_out()
            run.moment = moment_of(fabric, run)
            display.step(progress.step, row, session / (progress.step - first_step) * (plan.steps - progress.step))

            run.moment["row"] = row
            # What asks to stop may not wait for an evaluation: the resumed run begins with it.
            row_can_wait = not last and (stopped or out_of_time) and any(evaluations_due(run))
            if not row_can_wait and not finish_row(fabric, run, display, signals):
                return "stopped"
            if last:
                break
            if stopped or (fabric.world_size == 1 and signals.received is not None):
                return "stopped"
            if out_of_time:
                return "out of time"
            if save_due or (train.save_interval and progress.step % train.save_interval == 0):
                with run.interval.paused():
                    save_checkpoint(fabric, run, out_dir / f"step-{progress.step:08d}")
            run.writer.tell_failure()
    return "finished"


class _Interrupted(Exception):
    """A signal asked the run to stop during an evaluation."""


def evaluations_due(run: TrainingRun) -> tuple[bool, bool]:
    """Whether validation and HellaSwag belong to the last step."""
    step, evaluation = run.progress.step, run.settings.eval
    at_the_end = step == run.plan.steps and evaluation.final_validation
    every = evaluation.interval, evaluation.hellaswag_interval or evaluation.interval
    return step % every[0] == 0 or at_the_end, step % every[1] == 0 or at_the_end


def finish_row(fabric: L.Fabric, run: TrainingRun, display: RunDisplay, signals: StopSignals) -> bool:
    """Evaluates where the last step is one to do so, and logs that step's row.

    Returns:
        False where a signal came before the end of an evaluation. The row stays in ``run.moment``, so that a resumed
        run begins here. Not in several processes, which do not know of each other's signals in time, nor at the last
        step, after which there is nothing to resume.
    """
    assert run.moment is not None
    row, last = dict(run.moment["row"]), run.progress.step == run.plan.steps
    until = None if last or fabric.world_size > 1 else signals
    validation_is_due, hellaswag_is_due = evaluations_due(run)
    try:
        with run.interval.paused():
            row |= evaluate(fabric, run, display, until) if validation_is_due else {}
            row |= score_hellaswag(fabric, run, display, until) if hellaswag_is_due else {}
    except _Interrupted:
        return False
    if row:
        fabric.log_dict({**row, "time": round(run.progress.seconds, 3)}, step=run.progress.step)
    run.moment["row"] = None
    return True


def _until(signals: StopSignals | None, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, as long as no signal came."""
    for batch in batches:
        if signals is not None and signals.received is not None:
            raise _Interrupted
        yield batch


def total_loss(losses: Losses, moe: MoESettings) -> Tensor:
    """What is differentiated: the cross-entropy and the weighted balance losses."""
    return losses.cross_entropy + moe.load_balancing_loss * losses.load_balancing + moe.z_loss * losses.z_loss


def choose_experts_backend(fabric: L.Fabric, gpt: GPT, moe: MoESettings) -> str:
    """Sets what computes the experts of all layers, and says what it is.

    Raises:
        UserError: where the one that is asked for can't be had.
    """
    layers = moe_layers(gpt)
    if not layers:
        return ""
    wanted = None if moe.backend == "auto" else moe.backend
    set_backend(gpt, wanted)
    with fabric.autocast():
        try:
            return f", experts by {layers[0].experts.backend_on(fabric.device)}"
        except ValueError as error:
            raise UserError(f"--moe.backend {moe.backend}: {error} (--moe.backend auto)") from None


def balance(fabric: L.Fabric, run: TrainingRun, counts: Tensor, norm: Tensor) -> None:
    """What follows from how often each expert was chosen in a step: the load by which the load-balancing loss of the
    next step goes, and the selection biases.

    The load of the step before and not, as in Megatron, the sum so far within the step (both count the global batch,
    arXiv 2501.11873): such a sum depends on how many devices computed at once, and the losses here do not.

    Args:
        counts: of this device's micro batches; summed over all devices in place.
        norm: of the gradient: where it is not finite, a scaler skipped the step, and the biases stay.
    """
    if fabric.world_size > 1:
        torch.distributed.all_reduce(counts)  # Fabric's would make the device wait at a barrier
    run.expert_counts = counts
    if rate := run.settings.moe.bias_update_rate:
        update_selection_biases(run.gpt, counts, rate * torch.isfinite(norm))


def evaluate(
    fabric: L.Fabric, run: TrainingRun, display: RunDisplay, until: StopSignals | None = None
) -> dict[str, float]:
    """Validation loss and a sample, printed and logged; nothing where there is no validation data."""
    if run.val_dataloader is None:
        return {}
    step = run.progress.step
    batches = _until(until, run.val_dataloader)
    loss = validate(fabric, run.model, batches, max_iters=run.settings.eval.max_iters)
    display.print(f"step {step}/{run.plan.steps} | val loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
    if fabric.global_rank == 0 and (text := write_sample(fabric, run)) is not None:
        display.print(f"step {step}/{run.plan.steps} | sample: {text}")
        run.loggers.log_text("sample", text, step)
    fabric.barrier()
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}


def score_hellaswag(
    fabric: L.Fabric, run: TrainingRun, display: RunDisplay, until: StopSignals | None = None
) -> dict[str, float]:
    """HellaSwag's accuracies, printed and logged; each process computes its share of the questions."""
    if run.questions is None:
        return {}
    start = time.perf_counter()
    share = run.questions.batches[fabric.global_rank :: fabric.world_size]
    with fabric.autocast():
        scores = hellaswag.log_probabilities(run.gpt, _until(until, share), run.questions)
    if fabric.world_size > 1:
        scores = cast(Tensor, fabric.all_reduce(scores, reduce_op="sum")).cpu()
    score = hellaswag.accuracy(run.questions.questions, scores)
    display.print(
        f"step {run.progress.step}/{run.plan.steps} | hellaswag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}"
        f" ({score.protocol}, {score.questions:,} questions, {time.perf_counter() - start:,.0f} s)"
    )
    return {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}


@torch.no_grad()
def validate(fabric: L.Fabric, model: _FabricModule, batches: Iterable[Any], max_iters: int) -> float:
    """Replaces ``litgpt.pretrain.validate``: the mean cross-entropy in nats per token, over all devices.

    Takes the first ``max_iters`` batches of all devices together, which are the same at each call where the loader's
    order is fixed. Each device takes as many as the others: where they do not divide ``max_iters``, it is rounded up,
    and where they do not divide the validation set, its last batches are left out.
    """
    max_iters = math.ceil(max_iters / fabric.world_size)
    model.eval()
    losses, tokens = [], []
    for index, batch in enumerate(batches):
        if index >= max_iters:
            break
        part = as_batch(batch, gpt_of(model).max_seq_length)
        losses.append(model(*part).cross_entropy)
        tokens.append((part.targets != IGNORED).sum())
    model.train()
    weights = torch.stack(tokens).to(losses[0].dtype)
    total = sum_over_devices(fabric, torch.stack([(torch.stack(losses) * weights).sum(), weights.sum()]))
    return float(total[0] / total[1])


def training_row(fabric: L.Fabric, run: TrainingRun, norm: Tensor, rate: float, step_tokens: int) -> dict[str, Any]:
    """The numbers of one log line; columns as in ``litmoe.train.logs.COLUMNS``."""
    interval = run.interval
    means = interval.means(fabric)
    cross_entropy = float(means.cross_entropy)  # waits for the device, so the seconds below are true
    tokens_per_second = interval.tokens / interval.seconds
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
    if means.expert_counts.numel():
        row |= {"load_balancing_loss": float(means.load_balancing), "z_loss": float(means.z_loss)}
        load = load_statistics(means.expert_counts)
        columns = {
            "expert_load_max": load.max_over_mean,
            "expert_load_min": load.min_over_mean,
            "expert_load_entropy": load.entropy,
            "dead_experts": load.dead,
            "router_confidence": means.router_confidence,
        }
        for layer, values in enumerate(torch.stack(list(columns.values()), dim=1).tolist()):
            row |= {f"{name}/layer_{layer}": value for name, value in zip(columns, values, strict=True)}
    return row


def write_sample(fabric: L.Fabric, run: TrainingRun) -> str | None:
    """The text that the model writes now; leaves its mode and every random state as they are."""
    sample = run.settings.sample
    if run.tokenizer is None or run.sample_prompt is None:
        return None
    with fabric.autocast():
        texts = sample_text(
            run.gpt,
            run.tokenizer,
            run.sample_prompt,
            max_new_tokens=run.settings.eval.max_new_tokens or sample.max_new_tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            seed=sample.seed,
        )
    return texts[0]


def as_batch(batch: Tensor | tuple[Tensor, ...], seq_length: int) -> Batch:
    """What a data module's loader gives: windows ``(B, T + 1)`` of one text, or rows that are divided already."""
    if not isinstance(batch, Tensor):
        return Batch(*batch)
    tokens = batch[:, : seq_length + 1].long()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def loss_shares(fabric: L.Fabric, batches: Sequence[Batch]) -> tuple[list[float], int]:
    """What each micro batch counts in its step's loss, on average 1, and the step's tokens over all devices.

    A step's loss is the mean over its target tokens. Micro batches of windows have equally many; those of conversations
    have not, and a mean of their means would count the tokens of short answers for more.
    """
    if batches[0].lengths is None:
        return [1.0] * len(batches), sum(batch.input_ids.numel() for batch in batches) * fabric.world_size
    targets = [int((batch.targets != IGNORED).sum()) for batch in batches]
    tokens = sum(int(batch.lengths.sum()) for batch in batches if batch.lengths is not None)
    counts = torch.tensor([sum(targets), tokens, len(targets)], device=fabric.device)
    all_targets, all_tokens, all_batches = sum_over_devices(fabric, counts).tolist()
    return [count * all_batches / all_targets for count in targets], all_tokens


def in_any_process(fabric: L.Fabric, not_finite: Tensor, *conditions: bool) -> list[bool]:
    """Which of the conditions hold in any process: clocks, losses and signals differ, and all must do the same. Waits
    for the device, once."""
    if fabric.world_size == 1:
        return [bool(not_finite), *conditions]
    values = torch.tensor([False, *conditions], dtype=torch.float32, device=fabric.device)
    values[0] = not_finite
    torch.distributed.all_reduce(values)  # Fabric's would make the device wait at a barrier
    return [bool(value) for value in values.tolist()]


def _any_process(fabric: L.Fabric, condition: bool) -> bool:
    return in_any_process(fabric, torch.tensor(condition, device=fabric.device))[0]


def _not_finite(fabric: L.Fabric, run: TrainingRun, batches: Sequence[Batch]) -> str:
    """What is said of it. Where the weights themselves are not finite, this step is not to be saved."""
    settings = run.settings
    kept = "keeps what was trained so far. Go on with --resume auto, or from an older checkpoint"
    name = weights_not_finite(run.gpt)
    if _any_process(fabric, name is not None):
        found, run.moment = f"the weights{f' of {name}' if name else ''} were not before it", None
        kept = "saves nothing. Go on from a checkpoint that was saved before"
    elif is_sharded(settings):
        found = "where it began, a sharded model does not tell"
    else:
        found = first_not_finite(
            fabric, run.gpt, batches, lambda losses: total_loss(losses, settings.moe), settings.activation_checkpointing
        )
    return (
        f"the loss or its gradient is no longer finite at step {run.progress.step + 1:,}: {found}. The run stops before"
        f" this update and {kept} (--resume FOLDER --overwrite), and a lower --optimizer.init_args.lr, a longer"
        " --train.lr_warmup_steps, or --precision 32-true."
    )


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
    with_position(loaders[0])  # known now, not at the first save
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


def _peak_flops(fabric: L.Fabric) -> float | None:
    if fabric.device.type != "cuda" or fabric._precision.precision == "32-true":
        return None
    return peak_flops(torch.cuda.get_device_name(fabric.device))


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
    final = out_dir / "final"
    say(f"Checkpoint  {final}")
    say(f"Metrics     {out_dir / METRICS_FILE}")
    if isinstance(run.settings, FinetuneSettings):
        say(f"Chat        {command('chat.py', final)}")
        return
    prompt = run.settings.sample.prompt or "Once upon a time"
    say(f"Write       {harmless(command('generate.py', final, '--prompt', prompt))}")
    say(f"Evaluate    {command('evaluate.py', final)}")
    say(f"Chat        {command('chat.py', final)}")
