"""A training run from a built model to its report: set up, resume, train, save. Used by pretraining and finetuning."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import lightning as L
import litgpt.pretrain
import torch
import yaml
from lightning.fabric.wrappers import _FabricOptimizer
from litgpt import GPT, Tokenizer
from litgpt.data import DataModule
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import DataLoader

from custom_moe import set_backend
from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.config import MoESettings, ParsedRun
from litmoe.data.loader import TokenLoader
from litmoe.flops import describe_size, training_flops_per_token
from litmoe.hardware import (
    compiler_settings,
    is_out_of_memory,
    is_sharded,
    missing_cuda_note,
    peak_flops,
    should_compile,
)
from litmoe.report.live import RunReport
from litmoe.run_files import RUN_CONFIG, write_atomically
from litmoe.train.distributed import any_rank
from litmoe.train.evaluate import encode_hellaswag
from litmoe.train.fitting import choose_rows
from litmoe.train.logs import Loggers, RunDisplay, remove_run
from litmoe.train.loop import Ending, train
from litmoe.train.model import PretrainingModel, even_counts, matrices_to_cast, moe_layers
from litmoe.train.optimizers import EIGHT_BIT_ADAM, check_optimizer, make_optimizer, optimizer_traits, rounding_note
from litmoe.train.reporting import describe_session, end_table
from litmoe.train.resume import check_same_on_all_machines, resume_training
from litmoe.train.saving import CheckpointWriter, StopSignals, tolerate_closed_stdout
from litmoe.train.state import (
    Finetuning,
    Progress,
    TrainingRun,
    plan_from,
    save_after_error,
    save_checkpoint,
    scaler_of,
    stateful_loader,
)
from litmoe.validation import constant_weights_note


@tolerate_closed_stdout()
def run_training(
    fabric: L.Fabric,
    gpt: GPT,
    *,
    parsed: ParsedRun,
    data: DataModule,
    tokenizer: Tokenizer | None,
    resume_from: Path | None,
    precision_note: str | None,
    sample_prompt: str | None,
    finetuning: Finetuning | None = None,
) -> None:
    """Train ``gpt`` as the settings say and save ``final/``.

    Args:
        gpt: on the device, with its initial weights and ``max_seq_length``. Frozen parameters require no gradient.
        resume_from: the checkpoint of its weights, to restore optimizer, position and counters from as well.
        precision_note: a line for the user, or None.
        sample_prompt, finetuning: see ``TrainingRun``.
    """
    settings = parsed.settings
    # Set up. FSDP supports neither compilation nor generation in the middle of a run.
    experts_backend = choose_experts_backend(fabric, gpt, settings.moe)
    sharded = is_sharded(settings)
    compiled, compile_note = should_compile(False if sharded else settings.compile, fabric.device.type)
    run = _build_run(fabric, gpt, parsed, data, tokenizer, compiled, sharded)
    run.sample_prompt = None if sharded else sample_prompt
    run.finetuning = finetuning

    # Resume.
    if resume_from:
        resume_training(fabric, run, resume_from)
    rows_note = None
    if parsed.has_auto_micro_batch and run.measures.rows is None:
        rows_note = choose_rows(fabric, run, parsed)
    # Also for a new run: its data may have been prepared on each machine, with other settings.
    check_same_on_all_machines(fabric, run)
    if resume_from and run.progress.step >= run.plan.steps:
        _report_finished(fabric, run, resume_from)
        return

    # From here on the run changes out_dir. Everything that can be refused was checked before.
    _prepare_out_dir(fabric, run, resume_from)
    run.loggers.log_hyperparams(run.hyperparameters)
    lines = [
        *_describe_run(run),
        _describe_hardware(fabric, compiled, experts_backend),
        missing_cuda_note(),
        precision_note,
        compile_note,
        rows_note,
        *_notes(fabric, run),
    ]
    notes = [line for line in lines if line]
    for line in notes:
        fabric.print(line)
    run.report.journal.start(run.progress.step, describe_session(run, notes), resumed=resume_from is not None)
    if resume_from:
        fabric.print(f"Resuming from {resume_from}: step {run.progress.step:,} of {run.plan.steps_text(',')}.")

    # Train, and save the last step, whatever ends the loop.
    tokens_before, start = run.progress.tokens, time.perf_counter()
    is_main = fabric.global_rank == 0
    steps = run.plan.steps if run.plan.is_known else None
    display = RunDisplay(enabled=is_main, bar=settings.progress, steps=steps, first_step=run.progress.step)
    # A signal during the final save must not interrupt it, so the save is inside as well.
    with StopSignals(fabric.print) as signals, compiler_settings():
        # The display ends first, so that no progress bar is drawn over the messages about the error.
        with _save_after_errors(fabric, run), display:
            ending = train(fabric, run, signals, display)
        _save_final(fabric, run, ending)
    seconds = time.perf_counter() - start

    # Report.
    run.loggers.finalize("success")
    run.report.journal.end(run.progress.step, ending)
    run.report.write()
    # A rank that ends while rank 0 writes would look like a lost one.
    fabric.barrier()
    if ending == "stopped":
        fabric.print(
            f"Stopped after step {run.progress.step:,} of {run.plan.steps_text(',')}. The same command with"
            f" --resume auto continues from {_final_folder(run, ending)}."
        )
        # Rank 0 alone: launchers report the exit code of another rank as a failure.
        if is_main:
            sys.exit(signals.exit_code)
        return
    for line in end_table(fabric, run, seconds, run.progress.tokens - tokens_before):
        fabric.print(line)
    if ending == "out of time":
        fabric.print(
            f"The time limit of {settings.train.max_time:g} s was reached at step {run.progress.step:,} of"
            f" {run.plan.steps_text(',')}. The same command with --resume auto continues from this step."
        )


def choose_experts_backend(fabric: L.Fabric, gpt: GPT, moe: MoESettings) -> str | None:
    """Set the backend of all MoE layers and return its name; None for a model without experts.

    Raises:
        UserError: the requested backend is not available.
    """
    layers = moe_layers(gpt)
    if not layers:
        return None
    set_backend(gpt, None if moe.backend == "auto" else moe.backend)
    # The choice depends on the type of the products, which autocast decides.
    with fabric.autocast():
        try:
            return layers[0].experts.backend_on(fabric.device)
        except ValueError as error:
            raise UserError(f"--moe.backend {moe.backend}: {error} (--moe.backend auto)") from None


def make_dataloaders(
    fabric: L.Fabric, parsed: ParsedRun, data: DataModule, tokenizer: Tokenizer | None, seq_length: int
) -> tuple[DataLoader, DataLoader | None]:
    """Return the training and validation loaders, as ``litgpt.pretrain.get_dataloaders`` does.

    Raises:
        UserError: a set is shorter than one batch.
    """
    train_settings = parsed.settings.train
    loaders = litgpt.pretrain.get_dataloaders(fabric, data, tokenizer, train_settings, seq_length)
    for name, loader in zip(("training", "validation"), loaders, strict=True):
        if loader is not None and len(loader) == 0:
            raise UserError(
                f"the {name} set has less than one batch: micro_batch_size {train_settings.micro_batch_size} sequences"
                f" of {seq_length + 1} tokens for each of {fabric.world_size} device(s); lower --micro-batch-size or"
                " --max-seq-length, or add more text."
            )
    # Raises now instead of at the first save.
    stateful_loader(loaders[0])
    prepared = []
    for loader in loaders:
        # TokenizedText divides the batches over the ranks on its own.
        divides_itself = isinstance(loader, TokenLoader)
        prepared.append(loader and fabric.setup_dataloaders(loader, use_distributed_sampler=not divides_itself))
    return cast(DataLoader, prepared[0]), cast(DataLoader | None, prepared[1])


def _build_run(
    fabric: L.Fabric,
    gpt: GPT,
    parsed: ParsedRun,
    data: DataModule,
    tokenizer: Tokenizer | None,
    compiled: bool,
    sharded: bool,
) -> TrainingRun:
    """Wrap the model, and make optimizer, loaders and plan of a new run."""
    settings = parsed.settings
    precision = fabric._precision.precision
    if fabric.device.type == "cuda" and precision == "32-true":
        # TF32, as in LitGPT's commands.
        torch.set_float32_matmul_precision("high")
    # fullgraph: fail on graph breaks instead of silently running eager.
    compiler = partial(torch.compile, fullgraph=True) if compiled else None
    # Before the optimizer is made, because FSDP replaces the parameters.
    document_end = None
    if settings.document_masking:
        assert tokenizer is not None, "pretraining always has one"
        document_end = tokenizer.eos_id
    model = fabric.setup(PretrainingModel(gpt, settings.activation_checkpointing, compiler, document_end))
    # bf16-true rounded the rotary embeddings along with the weights. Generation has them in fp32.
    gpt.cos, gpt.sin = gpt.rope_cache(device=fabric.device)

    check_optimizer(parsed.optimizer, fabric.device.type)
    # Fused optimizers unscale gradients themselves, so Fabric could not clip them under a gradient scaler.
    fused = fabric.device.type in ("cpu", "cuda") and scaler_of(fabric) is None
    optimizer = fabric.setup_optimizers(
        make_optimizer(parsed.optimizer, model, fused=fused, embedding_lr_factor=settings.embedding_lr_factor)
    )
    train_dataloader, val_dataloader = make_dataloaders(fabric, parsed, data, tokenizer, gpt.max_seq_length)
    # FSDP casts parameters on its own.
    cast_once = {} if sharded else matrices_to_cast(model, precision, settings.activation_checkpointing)
    # Conversations differ in length, and frozen weights skip part of the backward: no formula for their FLOPs.
    has_mfu = not settings.is_finetuning
    return TrainingRun(
        settings=settings,
        hyperparameters=parsed.resolved,
        model=model,
        compiled=compiled,
        sharded=sharded,
        optimizer=cast(_FabricOptimizer, optimizer),
        # Made by `logger_factory`.
        loggers=cast(Loggers, fabric.logger),
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        tokenizer=tokenizer,
        plan=plan_from(settings, train_dataloader, gpt.max_seq_length, fabric.world_size, Progress()),
        flops_per_token=training_flops_per_token(gpt.config, gpt.max_seq_length),
        peak_flops=_peak_flops(fabric) if has_mfu else None,
        questions=encode_hellaswag(settings, tokenizer, gpt),
        expert_counts=even_counts(gpt, fabric.device),
        matrices_to_cast=cast_once,
        writer=CheckpointWriter(settings.checkpoint, fabric.print),
        report=RunReport(settings.out_dir, enabled=fabric.global_rank == 0),
    )


def _prepare_out_dir(fabric: L.Fabric, run: TrainingRun, resume_from: Path | None) -> None:
    """Remove what ``--overwrite`` allows, and write the settings of the run. Rank 0 does it.

    Called when everything that could be wrong with the new run is checked.
    """
    if fabric.global_rank != 0:
        return
    settings = run.settings
    out_dir = settings.out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    # A killed save may have left the newest checkpoint under a hidden name.
    checkpoints.finish_interrupted_saves(out_dir)
    if settings.overwrite:
        if resume_from is None or resume_from.resolve().parent != out_dir.resolve():
            # Here and not earlier: a mistake found by then would have destroyed the old run for nothing.
            remove_run(out_dir)
        elif resume_from.exists():
            # If it does not exist, it was an interrupted save that has just got its final name. Nothing is newer then.
            checkpoints.remove_newer(resume_from)
    write_atomically(out_dir / RUN_CONFIG, yaml.safe_dump(run.hyperparameters, sort_keys=False))


@contextmanager
def _save_after_errors(fabric: L.Fabric, run: TrainingRun) -> Iterator[None]:
    """Save the last complete step if an error ends the loop.

    Raises:
        UserError: memory was exhausted, or the model cannot be compiled.
    """
    try:
        yield
    except Exception as error:
        save_after_error(fabric, run)
        # If another rank is lost, the launcher soon kills this one, and the message must come before.
        if fabric.world_size == 1:
            run.report.write()
        if is_out_of_memory(error):
            raise UserError(_advice(fabric, run, str(error).splitlines()[0])) from None
        if isinstance(error, TorchDynamoException):
            raise UserError(
                f"torch.compile can't compile this model: {error}\nTrain it without: --compile false"
            ) from None
        raise


def _advice(fabric: L.Fabric, run: TrainingRun, reason: str) -> str:
    """Return the message about an out-of-memory error, with the flags that need less memory, cheapest first."""
    context, ways = run.gpt.max_seq_length, []
    if fabric.world_size > 1:
        # One rank alone can't change its steps while the others wait for it.
        ways.append("--micro_batch_size 1 --resume auto: the same result")
        ways.append("--activation_checkpointing block --resume auto: the same result, slower")
    if not optimizer_traits(run.hyperparameters["optimizer"]).compiles_step:
        ways.append(f"{' '.join(EIGHT_BIT_ADAM)}: 16-bit weights and 8-bit moments")
    ways.append(f"--max_seq_length {max(1, context // 2)}: a shorter context")
    lines = "\n  ".join(ways)
    return f"out of memory: {reason}\nThe same command with one of these lines needs less, see --plan:\n  {lines}"


def _final_folder(run: TrainingRun, ending: Ending) -> Path:
    name = "final" if ending == "finished" else f"step-{run.progress.step:08d}"
    return run.settings.out_dir / name


def _save_final(fabric: L.Fabric, run: TrainingRun, ending: Ending) -> None:
    """Save the last step, unless the loop has just done so."""
    folder = _final_folder(run, ending)
    run.writer.report_failure(wait=True)
    # Only rank 0 knows what was written.
    is_missing = fabric.global_rank == 0 and run.writer.saved != folder
    if any_rank(fabric, is_missing)[0]:
        save_checkpoint(fabric, run, folder, last=True)
        # A rank that ends early would look like a lost one.
        fabric.barrier()


# --- What is printed


def _describe_run(run: TrainingRun) -> Iterator[str]:
    """Yield the size of the run, as ``run_train.py --plan`` prints it."""
    gpt, train, plan = run.gpt, run.settings.train, run.plan
    if run.settings.is_finetuning:
        # Conversations differ in length.
        seq_length = None
        steps = f"steps of {train.global_batch_size:,} conversations"
    else:
        seq_length = gpt.max_seq_length
        step_tokens = plan.accumulation * plan.tokens_per_micro_batch
        steps = f"steps of {step_tokens:,} tokens"
    yield describe_size(gpt.config, seq_length, bool(train.tie_embeddings))
    if run.settings.uses_lora:
        trained = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
        yield f"{trained / 1e6:,.3f} M parameters are trained (LoRA)."
    limit = f" or after {train.max_time:g} s" if train.max_time else ""
    if not plan.is_known:
        assert run.settings.time_budget is not None
        minutes = run.settings.time_budget / 60
        yield f"{steps.capitalize()} for {minutes:g} minutes{limit}; their number follows from the first ones' speed."
        return
    tokens = "" if run.settings.is_finetuning else f", {plan.tokens:,} tokens in all"
    yield f"{plan.steps:,} {steps}{tokens}, {plan.epochs:.2f} epochs; limited by {plan.ended_by}{limit}."


def _describe_hardware(fabric: L.Fabric, compiled: bool, experts_backend: str | None) -> str:
    if fabric.device.type == "cuda":
        device = torch.cuda.get_device_name(fabric.device)
    elif fabric.device.type == "cpu":
        threads = torch.get_num_threads()
        device = f"the CPU ({threads} thread{'s' if threads > 1 else ''})"
    else:
        device = f"the {fabric.device.type} device"
    if fabric.world_size > 1:
        device = f"{fabric.world_size} x {device}"
    experts = f", experts by {experts_backend}" if experts_backend else ""
    return f"On {device} in {fabric._precision.precision}, {'compiled' if compiled else 'not compiled'}{experts}."


def _notes(fabric: L.Fabric, run: TrainingRun) -> Iterator[str | None]:
    """Yield what the user should know about the settings before the run starts."""
    settings = run.settings
    yield rounding_note(run.hyperparameters["optimizer"], fabric._precision.precision, sharded=run.sharded)
    if run.plan.warmup_steps < (settings.train.lr_warmup_steps or 0):
        steps = run.plan.warmup_steps
        yield f"The run is shorter than its warm-up (train.lr_warmup_steps), so the warm-up ends at step {steps:,}."
    if run.sharded:
        yield "Sharded by FSDP: no samples are written during training."
    routers = [parameter for layer in moe_layers(run.gpt) for parameter in layer.gate.parameters()]
    if any(parameter.requires_grad for parameter in routers):
        yield constant_weights_note(run.gpt.config)
    if settings.is_finetuning:
        yield settings.data.summary()


def _report_finished(fabric: L.Fabric, run: TrainingRun, resume_from: Path) -> None:
    """Say that there is nothing to resume, and finish the clean-up that a kill may have interrupted."""
    progress, out_dir = run.progress, run.settings.out_dir
    fabric.print(
        f"This run is finished: {resume_from} is step {progress.step:,} of {run.plan.steps:,} ({progress.tokens:,}"
        f" tokens). To train it further, raise its limit ({run.plan.ended_by})."
    )
    if fabric.global_rank == 0 and resume_from.resolve().parent == out_dir.resolve():
        checkpoints.finish_interrupted_saves(out_dir)
        if resume_from.exists():
            run.writer.remove_old(resume_from)


def _peak_flops(fabric: L.Fabric) -> float | None:
    if fabric.device.type != "cuda" or fabric._precision.precision == "32-true":
        return None
    return peak_flops(torch.cuda.get_device_name(fabric.device))
