"""``run_train.py --plan``: memory and duration of a run before it starts, and what to change if it does not fit."""

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain

import torch
from litgpt import GPT

from custom_moe.backends import Hardware
from litmoe.cli import UserError, command, nearest, read_yaml, underscored
from litmoe.config import ParsedRun, parse_run
from litmoe.flops import count_parameters, describe_size, format_flops, training_flops_per_token
from litmoe.hardware import (
    ALLOCATOR_OVERHEAD,
    GIB,
    NAMES,
    GPUSpec,
    choose_precision,
    detect_gpu,
    gpu_by_name,
    processes,
    select_accelerator,
)
from litmoe.layers import use_our_layers
from litmoe.run_files import METRICS_FILE, RUN_CONFIG
from litmoe.train.memory import TrainingMemory, largest_micro_batch, rows_on_cpu, training_memory
from litmoe.train.optimizers import EIGHT_BIT_ADAM, optimizer_traits
from litmoe.train.schedule import Plan, plan_run
from litmoe.validation import check

SHARE_OF_PEAK = {"dense": 0.30, "mixture": 0.22}
"""The assumed share of the peak FLOP/s. nanoGPT on A100s and plain PyTorch on an H100 report 30% of the data sheet's
peak for GPT-2 124M; nanochat's mixture reached three quarters of what its dense model did."""
RECOMPUTATION = {"none": 1.0, "moe": 1.2, "block": 4 / 3}
"""Factor on forward and backward with activation checkpointing"""


@dataclass(frozen=True)
class PlannedRun:
    """A run on a GPU or on the CPU."""

    run: ParsedRun
    gpu: GPUSpec | None
    """None for the CPU"""
    precision: str

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.run.settings.train.max_seq_length or self.run.settings.model.block_size

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, over all devices."""
        return self.run.settings.train.global_batch_size * self.context

    @property
    def devices(self) -> int:
        """Devices over all machines."""
        # As many as torchrun started, or as the settings ask for.
        devices, num_nodes = processes(self.run.settings)
        if self.gpu is not None and not self.gpu.is_local and self.run.settings.devices == "auto":
            # The GPUs of this machine say nothing about another one.
            devices = 1
        return devices * num_nodes

    def model_flops(self) -> float:
        """Operations of forward and backward of a step, over all devices."""
        settings = self.run.settings
        per_token = training_flops_per_token(settings.model, self.context)
        return self.step_tokens * per_token * RECOMPUTATION[settings.activation_checkpointing]

    @cached_property
    def update_flops(self) -> float:
        """Operations of the optimizer's update of a step, over all devices; 0 if they are negligible."""
        traits = optimizer_traits(self.run.optimizer)
        if traits.update_flops is None:
            return 0
        # The operations depend on the shapes only, so the model needs no storage.
        with torch.device("meta"), use_our_layers(self.run.settings.moe.router):
            gpt = GPT(self.run.settings.model)
        if self.run.settings.train.tie_embeddings:
            gpt.transformer.wte.weight = gpt.lm_head.weight
        return traits.update_flops(traits.parameter_groups(gpt))

    def length(self) -> Plan | None:
        """The steps of the run; None if they depend on the size of the data."""
        train = self.run.settings.train
        if self.run.settings.time_budget or not (train.max_tokens or train.max_steps):
            return None
        # The number of sequences only matters for epochs.
        return plan_run(
            replace(train, epochs=None),
            devices=self.devices,
            seq_length=self.context,
            epoch_sequences=train.global_batch_size,
        )

    @property
    def _hardware(self) -> Hardware | None:
        # As if Triton were installed, because the GPU may be in another machine.
        return None if self.gpu is None else Hardware(self.gpu.capability, triton=True)

    def fit(self) -> None:
        """Replace ``train.micro_batch_size: auto`` by the number of sequences that the run would choose."""
        train = self.run.settings.train
        if self.gpu is None:
            train.micro_batch_size = rows_on_cpu(train.global_batch_size // self.devices, self.context)
            return
        # The simulation needs a number in its place.
        train.micro_batch_size = 1
        train.micro_batch_size, _ = largest_micro_batch(
            self.run, self.precision, self._hardware, self.gpu.available, self.devices
        )

    def memory(self) -> TrainingMemory:
        """The memory of a step on one device.

        Raises:
            UserError: the optimizer can't run on tensors without contents.
        """
        try:
            return training_memory(self.run, self.precision, self._hardware)
        except Exception as error:
            # Optimizers of other packages can do anything.
            raise UserError(
                f"the memory that {self.run.optimizer['class_path']} needs can't be computed in advance"
                f" ({type(error).__name__}: {error}). Without --plan, the run reports its memory at the end."
            ) from None


def show_plan(argv: Sequence[str]) -> None:
    """Print the plan of a run. Only reads settings, and writes nothing.

    Args:
        argv: as for ``parse_run``, with ``--plan`` or ``--plan GPU``.

    Raises:
        UserError: the GPU is unknown, or as ``parse_run`` and ``check``.
    """
    flags, name = _split_off_plan(underscored(argv))
    if name is None:
        # As in the run: without this, a plan for the CPU would find the GPU.
        select_accelerator(parse_run(flags).settings.accelerator)
        gpu = detect_gpu()
    else:
        gpu = _find_gpu(name)
        # `devices` of another machine must not be compared with the GPUs of this one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    planned, note = _plan(flags, gpu)
    memory = planned.memory()
    settings = planned.run.settings
    print(describe_size(settings.model, planned.context, tie_embeddings=bool(settings.train.tie_embeddings)))
    print(_describe_length(planned))
    if planned.update_flops:
        print(_describe_update(planned))
    place = f"the CPU ({torch.get_num_threads()} threads)" if gpu is None else f"{gpu.name} ({gpu.memory:.0f} GiB)"
    print(f"On {place} in {planned.precision}{note}, without torch.compile:\n")
    print("\n".join(_memory_table(planned, memory)))
    if gpu is None:
        print(f"\n{_describe_time(planned)}")
    elif _fits(memory, gpu):
        print(f"\nIt fits. {_describe_time(planned)}")
    if gpu is None or _fits(memory, gpu):
        for line in _earlier_runs(planned):
            print(line)
    else:
        print("\nIt does not fit. Possible changes, cheapest first; each line includes the changes above it:\n")
        for line in _ways_to_fit(flags, gpu):
            # Each line takes seconds, so it is shown at once.
            print(line, flush=True)


def _split_off_plan(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return the other arguments, and the name of the GPU if one is given."""
    # `--plan` is no setting of the run, so it has a parser of its own.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", nargs="?")
    known, other_arguments = parser.parse_known_args(arguments)
    return other_arguments, known.plan or None


def _find_gpu(name: str) -> GPUSpec:
    gpu = gpu_by_name(name)
    if gpu is not None:
        return gpu
    similar = nearest(name.lower(), NAMES)
    hint = f" The nearest name is {similar}." if similar else ""
    raise UserError(
        f"no GPU {name!r} is known.{hint} Known are {', '.join(NAMES)}. `--plan` alone plans for this machine."
    )


def _plan(flags: Sequence[str], gpu: GPUSpec | None) -> tuple[PlannedRun, str]:
    """Parse and check the settings. Return the run, and a note if its precision is not the requested one."""
    run = parse_run(flags)
    check(run.settings, run.optimizer)
    requested = run.settings.precision
    # The same choice as in training; for another machine's GPU it can only depend on the compute capability.
    if gpu is None or gpu.is_local:
        precision, other_precision = choose_precision(requested, run.settings.accelerator)
        note = f" ({requested} needs other hardware)" if other_precision else ""
    elif gpu.capability < (8, 0) and (requested is None or requested.startswith("bf16")):
        precision, note = "16-mixed", " (it has no bf16)"
    else:
        precision, note = requested or "bf16-mixed", ""
    planned = PlannedRun(run, gpu, precision)
    if run.has_auto_micro_batch:
        planned.fit()
    return planned, note


def _fits(memory: TrainingMemory, gpu: GPUSpec) -> bool:
    return memory.peak <= gpu.available


# --- What is printed


def _describe_length(planned: PlannedRun) -> str:
    train, length, budget = planned.run.settings.train, planned.length(), planned.run.settings.time_budget
    if budget is not None:
        return f"Steps of {planned.step_tokens:,} tokens for {_format_seconds(budget)}."
    if length is None:
        return f"{train.epochs} epochs of steps of {planned.step_tokens:,} tokens. Their number depends on the data."
    flops = length.tokens * training_flops_per_token(planned.run.settings.model, planned.context)
    or_epochs = f" or {train.epochs} epochs" if train.epochs else ""
    return (
        f"{length.steps:,} steps of {planned.step_tokens:,} tokens, {length.tokens:,} tokens in all,"
        f" {format_flops(flops)}; limited by {length.ended_by}{or_epochs}."
    )


def _describe_update(planned: PlannedRun) -> str:
    update = planned.update_flops
    share = update / (planned.model_flops() + update)
    optimizer_name = planned.run.optimizer["class_path"].rpartition(".")[2]
    return (
        f"{optimizer_name}'s update adds {format_flops(update)} to each step, {share:.0%} of the step's"
        " operations. A larger global batch reduces that share."
    )


def _memory_table(planned: PlannedRun, memory: TrainingMemory) -> Iterator[str]:
    settings = planned.run.settings
    notes = {
        # Without accumulation, the peak may be in the forward.
        "gradients": "" if memory.gradients else "do not exist yet at the peak",
        "optimizer": f"the state of {planned.run.optimizer['class_path']}",
        "activations": f"kept for the backward of {settings.train.micro_batch_size} x {planned.context:,} tokens",
        "logits": f"scores of {settings.model.padded_vocab_size:,} tokens at each position",
        "workspace": "weights cast to 16 bits, temporary results",
        "peak": "the sum, at the point of a step where it is largest",
    }
    for name, size in {**memory._asdict(), "peak": memory.peak}.items():
        yield f"  {name:<12}{_format_bytes(size):>12}   {notes.get(name, '')}".rstrip()
    gpu = planned.gpu
    if gpu is None:
        return
    if gpu.is_local:
        taken = f"{gpu.taken:.1f} are taken now"
    elif gpu.has_display:
        taken = f"{gpu.taken:.1f} for CUDA and the display"
    else:
        taken = f"{gpu.taken:.1f} for CUDA"
    yield (
        f"  {'available':<12}{_format_bytes(gpu.available):>12}   of {gpu.memory:.1f}: {taken},"
        f" {ALLOCATOR_OVERHEAD - 1:.0%} for gaps in the allocator"
    )


def _describe_time(planned: PlannedRun) -> str:
    """Return an estimate of speed and duration, or why there is none."""
    gpu = planned.gpu
    if gpu is None:
        # The processes of a CPU run share its cores.
        peak = _measure_cpu_peak(torch.float32 if planned.precision == "32-true" else torch.bfloat16)
        return _describe_speed(planned, peak, "measured on this CPU just now", devices=1)
    # The data sheets list the speed in 16 bits.
    if planned.precision == "32-true":
        return f"There is no estimate of the time for {planned.precision} here."
    if gpu.peak is None:
        return "The speed of this GPU is unknown, so there is no estimate of the time."
    if planned.update_flops and gpu.capability < (8, 0):
        return "There is no estimate of the time for this optimizer on a GPU without bf16: its update uses fp32 there."
    return _describe_speed(planned, gpu.peak, "from NVIDIA's product pages", planned.devices)


def _describe_speed(planned: PlannedRun, peak: float, source: str, devices: int) -> str:
    settings = planned.run.settings
    share = SHARE_OF_PEAK["mixture" if settings.model.mlp_class_name == "LLaMAMoE" else "dense"]
    seconds = (planned.model_flops() + planned.update_flops) / (peak * share * devices)
    rate = planned.step_tokens / seconds

    where = f" on {devices} GPUs" if devices > 1 else ""
    length, budget = planned.length(), settings.time_budget
    duration = f", {_format_seconds(length.tokens / rate)}" if length else ""
    if budget is not None:
        duration = f", {_describe_purchase(planned, rate * budget)} in {_format_seconds(budget)}"
    counted = ["forward", "backward"]
    if settings.activation_checkpointing != "none":
        counted.append("recomputed activations")
    if planned.update_flops:
        counted.append("the optimizer's update")
    return (
        f"Estimated: {rate:,.0f} tokens/s{where}{duration}. That is {share:.0%} of {peak / 1e12:,.3g} TFLOP/s"
        f" ({source}), a share that others\nreport for models of this size. It is not measured, and small batches"
        f" reach less. Counted: {', '.join(counted)};\nnot counted: validation, HellaSwag, samples, saving, compiling."
    )


def _describe_purchase(planned: PlannedRun, tokens: float) -> str:
    settings = planned.run.settings
    active = count_parameters(settings.model, tie_embeddings=bool(settings.train.tie_embeddings)).active
    return f"{tokens / 1e6:,.1f} M tokens ({tokens / active:,.1f} per active parameter)"


def _earlier_runs(planned: PlannedRun) -> Iterator[str]:
    """Yield the final losses of runs next to ``out_dir`` with the same model and data: what to expect of this one."""
    resolved = planned.run.resolved
    for path in sorted(planned.run.settings.out_dir.parent.glob(f"*/{RUN_CONFIG}")):
        saved = read_yaml(path)
        metrics, final = path.with_name(METRICS_FILE), path.with_name("final")
        if not (metrics.is_file() and final.is_dir()):
            continue
        if any(saved.get(name) != resolved[name] for name in ("model", "data")):
            continue
        with open(metrics, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [row["val_loss"] for row in rows if row["val_loss"]]
        tokens = [row["total_tokens"] for row in rows if row["total_tokens"]]
        if losses and tokens:
            yield f"Earlier: {path.parent}, validation loss {float(losses[-1]):.4f} after {int(tokens[-1]):,} tokens"


def _measure_cpu_peak(dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products."""
    x = torch.rand(1024, 1024, dtype=dtype)
    # The first product starts the threads.
    x @ x
    start, n_products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        x @ x
        n_products += 1
    return n_products * 2 * 1024**3 / (time.perf_counter() - start)


def _format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} minutes"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 86400:,.1f} days"


def _format_bytes(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


# --- What to change


@dataclass(frozen=True)
class _Change:
    """A change of the settings that saves memory."""

    flags: tuple[str, ...]
    cost: str


def _ways_to_fit(flags: list[str], gpu: GPUSpec) -> Iterator[str]:
    """Yield lines: changes until the run fits, and the command with those of them that are needed."""

    # A later change of a setting replaces an earlier one, so different lists have the same flags.
    @cache
    def memory_with(changed_flags: tuple[str, ...]) -> TrainingMemory:
        return _plan([*flags, *changed_flags], gpu)[0].memory()

    changes: list[_Change] = []
    for change in _possible_changes(_plan(flags, gpu)[0], gpu):
        changes.append(change)
        memory = memory_with(_flags_of(changes))
        yield f"  {_format_bytes(memory.peak):>12}   {' '.join(change.flags)}\n{'':17}{change.cost}"
        if _fits(memory, gpu):
            break
    else:
        # The loop ended without a break.
        yield "\nThese changes are not enough. Take a smaller model (configs/models) or another GPU."
        return
    # The last change may make earlier ones unnecessary. Drop the most expensive ones first.
    for change in reversed(changes[:-1]):
        fewer = changes.copy()
        fewer.remove(change)
        if _fits(memory_with(_flags_of(fewer)), gpu):
            changes = fewer
    final_flags = [*flags, *_flags_of(changes)]
    yield f"\nThe changes needed to fit, with {_format_bytes(memory_with(_flags_of(changes)).peak)}:\n"
    yield f"  {command('run_train.py', *final_flags)}\n"
    yield _describe_time(_plan(final_flags, gpu)[0])


def _possible_changes(planned: PlannedRun, gpu: GPUSpec) -> Iterator[_Change]:
    """Yield changes from the cheapest to the most expensive; a later one of a setting replaces an earlier one."""
    settings, optimizer = planned.run.settings, planned.run.optimizer
    micro_batch = settings.train.micro_batch_size
    # Largest first, because small micro batches are slower. Divisors, so that the global batch stays the same.
    for size in range(micro_batch - 1, 0, -1):
        if micro_batch % size == 0:
            cost = "the same result (more micro batches are accumulated), a little slower"
            yield _Change(("--micro_batch_size", str(size)), cost)
    # Recomputation keeps the results and costs time.
    checkpointing = settings.activation_checkpointing
    if checkpointing == "none":
        cost = "the same result; the feed-forwards are computed once more, about +20%"
        yield _Change(("--activation_checkpointing", "moe"), cost)
    if checkpointing != "block":
        cost = "the same result; each block is computed once more, about +33%"
        yield _Change(("--activation_checkpointing", "block"), cost)
    # The 8-bit optimizer compiles its step, which needs bf16.
    if gpu.capability >= (8, 0) and not optimizer_traits(optimizer).compiles_step:
        cost = "16-bit weights with stochastic rounding, 8-bit moments: a similar loss, not the same"
        yield _Change(EIGHT_BIT_ADAM, cost)
    # Everything from here on changes the result.
    for size in _halves(planned.context, minimum=256):
        yield _Change(("--max_seq_length", str(size)), "a shorter context, so a different model")
    for size in _halves(settings.model.n_layer, minimum=1):
        yield _Change(("--model.n_layer", str(size)), "a smaller model")


def _halves(number: int, minimum: int) -> list[int]:
    halves = []
    while number % 2 == 0 and number // 2 >= minimum:
        number //= 2
        halves.append(number)
    return halves


def _flags_of(changes: Sequence[_Change]) -> tuple[str, ...]:
    """Return all flags; the last change of a setting wins."""
    by_setting = {change.flags[0]: change.flags for change in changes}
    return tuple(chain.from_iterable(by_setting.values()))
