"""``run_train.py --plan``: what a run needs and how long it would take, and what to change where it won't fit."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from litgpt import GPT

from custom_moe import use_custom_moe
from custom_moe.backends import Hardware
from litmoe.cli import UserError, command, nearest, underscored
from litmoe.config import FinetuneSettings, ParsedRun, RunSettings, parse_run
from litmoe.flops import count_parameters, training_flops_per_token
from litmoe.hardware import choose_precision, processes
from litmoe.train.gpus import GIB, NAMES, Card, found_card, named_card
from litmoe.train.memory import TrainingMemory, training_memory
from litmoe.train.optimizers import optimizer_traits
from litmoe.train.schedule import plan_run
from litmoe.validation import check

SHARE_OF_PEAK = {"dense": 0.30, "mixture": 0.22}
"""How much of the peak training is assumed to reach: with GPT-2 124M, nanoGPT on A100s and plain PyTorch on an H100
report 30% of the data sheet's; nanochat's mixture reached three quarters of what its dense model did."""
GAPS = 1.05
"""What the allocator takes for each byte that is used"""
COMPUTED = {"none": 1.0, "moe": 1.2, "block": 4 / 3}
"""How much is computed under activation checkpointing"""


def show_plan(argv: Sequence[str]) -> None:
    """Prints the plan of a run; reads and writes nothing but settings.

    Args:
        argv: as ``parse_run``, with ``--plan`` or ``--plan CARD`` among it.

    Raises:
        UserError: for a card that is not known, and as ``parse_run`` and ``check``.
    """
    flags, name = _without_plan(underscored(argv))
    if name is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # its `devices` are not held against this machine's
    run = _parsed(flags)
    card = found_card() if name is None else _known(name)
    precision, note = _precision(run.settings, card)
    memory = _memory(run, card)
    print(f"{describe_size(run.settings)}\n{_length(run, card)}")
    if optimizer_traits(run.optimizer).update_flops:
        print(_optimizer_share(run, card))
    print(f"On {_describe(card)} in {precision}{f' ({note})' if note else ''}, as it is without torch.compile:\n")
    print("\n".join(_table(run, memory, card)))
    if card is None or _fits(memory, card):
        print(f"\n{'It fits. ' if card else ''}{_duration(run, card, precision)}")
        return
    print("\nIt does not fit. What to change, the cheapest first, each line with those above it:\n")
    for line in _ways_to_fit(flags, run, card):
        print(line, flush=True)


def describe_size(settings: RunSettings) -> str:
    """Parameters; and operations for each token, causal attention by half and in full."""
    config = settings.model
    sizes = count_parameters(config, tie_embeddings=bool(settings.train.tie_embeddings))
    size = f"{config.name}: {sizes.total / 1e6:,.1f} M parameters, {sizes.active / 1e6:,.1f} M active for each token."
    if isinstance(settings, FinetuneSettings):
        return size  # rows of different lengths, and weights that are not trained
    causal, full = (_flop(training_flops_per_token(config, _context(settings), causal)) for causal in (True, False))
    return f"{size} A token takes {causal} of training ({full} with attention in full)."


def describe_needs(run: ParsedRun, precision: str, hardware: Hardware, card: Card | None = None) -> Iterator[str]:
    """What a step needs; and for a card, where that is more than it has left, and how long the run may take.

    Args:
        card: this machine's; of what is taken, this process's part does not count.
    """
    try:
        memory = training_memory(run, precision, hardware)
    except Exception as error:  # an optimizer of somebody's own need not run on tensors without contents
        yield f"How much memory it needs can't be worked out beforehand ({type(error).__name__}: {error})."
        return
    parts = ", ".join(f"{name} {_bytes(part)}" for name, part in memory._asdict().items())
    yield f"Memory by plan, without torch.compile: {_bytes(memory.peak)} ({parts})."
    if card is None:
        return
    if not _fits(memory, card):
        room = _bytes((card.memory - card.taken) / GAPS * GIB)
        yield f"That is more than the {room} which are left on this card: --plan says what to change."
    if isinstance(run.settings, FinetuneSettings):  # whose rows are of different lengths
        return
    if optimizer_traits(run.optimizer).update_flops:
        yield _optimizer_share(run, card)
    yield _duration(run, card, precision)


def _without_plan(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments that remain, and the card's name."""
    index = next(i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--plan")
    name = arguments[index].partition("=")[2]
    after = index + 1
    if not name and after < len(arguments) and not arguments[after].startswith("-"):
        name, after = arguments[after], after + 1
    return arguments[:index] + arguments[after:], name or None


def _parsed(flags: Sequence[str]) -> ParsedRun:
    run = parse_run(flags)
    check(run.settings, run.optimizer)
    return run


def _known(name: str) -> Card:
    if card := named_card(name):
        return card
    guess = nearest(name.lower(), NAMES)
    raise UserError(
        f"no card {name!r} is known{f'; the nearest is {guess}' if guess else ''}. Known are {', '.join(NAMES)}."
        " `--plan` alone takes the card of this machine."
    )


def _precision(settings: RunSettings, card: Card | None) -> tuple[str, str | None]:
    """What it would compute in, and why not in what was asked for."""
    asked = settings.precision
    if card is None or not card.named:
        precision, note = choose_precision(asked)
        return precision, note and f"{asked} needs other hardware"
    if card.capability < (8, 0) and (asked is None or asked.startswith("bf16")):
        return "16-mixed", "it has no bf16"
    return asked or "bf16-mixed", None


def _memory(run: ParsedRun, card: Card | None) -> TrainingMemory:
    hardware = None if card is None else Hardware(card.capability, triton=True)
    try:
        return training_memory(run, _precision(run.settings, card)[0], hardware)
    except Exception as error:  # an optimizer of somebody's own need not run on tensors without contents
        raise UserError(
            f"how much memory {run.optimizer['class_path']} needs can't be worked out beforehand"
            f" ({type(error).__name__}: {error}). Without --plan the run says at its end what it took."
        ) from None


def _fits(memory: TrainingMemory, card: Card) -> bool:
    return memory.peak * GAPS <= (card.memory - card.taken) * GIB


def _context(settings: RunSettings) -> int:
    return settings.train.max_seq_length or settings.model.block_size


def _devices(settings: RunSettings, card: Card | None) -> int:
    devices, nodes = processes(settings)
    return nodes * (1 if card is not None and card.named and settings.devices == "auto" else devices)


def _tokens(run: ParsedRun, card: Card | None) -> tuple[int, int, str] | None:
    """Steps, tokens and what ends the run; None where the data alone can tell."""
    train = run.settings.train
    if not (train.max_tokens or train.max_steps):
        return None
    plan = plan_run(
        replace(train, epochs=None),
        devices=_devices(run.settings, card),
        seq_length=_context(run.settings),
        epoch_sequences=train.global_batch_size,  # matters to epochs alone
    )
    return plan.steps, plan.tokens, plan.ended_by


def _length(run: ParsedRun, card: Card | None) -> str:
    train, found = run.settings.train, _tokens(run, card)
    per_step = train.global_batch_size * _context(run.settings)
    if found is None:
        return f"{train.epochs} epochs in steps of {per_step:,} tokens; how many steps, the data decide."
    steps, tokens, ended_by = found
    flops = tokens * training_flops_per_token(run.settings.model, _context(run.settings))
    return (
        f"{steps:,} steps of {per_step:,} tokens, {tokens:,} tokens in all, {_flop(flops)};"
        f" it ends by {ended_by}{f' or {train.epochs} epochs' if train.epochs else ''}."
    )


def _flops_of_a_step(run: ParsedRun, card: Card | None) -> tuple[float, int]:
    """Return the operations of a step over all devices: forward and backward, and the optimizer's update.

    Each device does the complete update. It is 0 for optimizers whose update is negligible.
    """
    settings = run.settings
    tokens = settings.train.global_batch_size * _context(settings)
    per_token = training_flops_per_token(settings.model, _context(settings))
    flops = tokens * per_token * COMPUTED[settings.activation_checkpointing]
    traits = optimizer_traits(run.optimizer)
    if traits.update_flops is None:
        return flops, 0
    with torch.device("meta"), use_custom_moe():
        groups = traits.parameter_groups(GPT(settings.model))
    return flops, traits.update_flops(groups) * _devices(settings, card)


def _optimizer_share(run: ParsedRun, card: Card | None) -> str:
    forward_and_backward, update = _flops_of_a_step(run, card)
    devices = _devices(run.settings, card)
    on = f" on {devices} devices" if devices > 1 else ""
    name = run.optimizer["class_path"].rpartition(".")[2]
    return (
        f"{name}'s update adds {_flop(update)} to each step{on}, {update / (forward_and_backward + update):.0%} of the"
        " step's operations; a larger global batch reduces that share."
    )


def _describe(card: Card | None) -> str:
    if card is None:
        return f"the CPU ({torch.get_num_threads()} threads)"
    return f"{card.name} ({card.memory:.0f} GiB)"


def _table(run: ParsedRun, memory: TrainingMemory, card: Card | None) -> Iterator[str]:
    train = run.settings.train
    notes = {
        "gradients": "" if memory.gradients else "not there yet when the most is",
        "optimizer": f"the state of {run.optimizer['class_path']}",
        "activations": f"kept for the backward, {train.micro_batch_size} x {_context(run.settings):,} tokens at once",
        "logits": f"scores of {run.settings.model.padded_vocab_size:,} tokens at each place",
        "workspace": "weights cast to 16 bits, temporary results",
    }
    for name, part in memory._asdict().items():
        yield f"  {name:<12}{_bytes(part):>12}   {notes.get(name, '')}".rstrip()
    yield f"  {'peak':<12}{_bytes(memory.peak):>12}   all together, at the moment of a step when the most is there"
    if card is not None:
        others = "CUDA and the display" if card.display else "CUDA"
        taken = f"{card.taken:.1f} for {others}" if card.named else f"{card.taken:.1f} are taken now"
        yield (
            f"  {'room':<12}{_bytes((card.memory - card.taken) / GAPS * GIB):>12}   of {card.memory:.1f}: {taken},"
            f" {GAPS - 1:.0%} for the allocator's gaps"
        )


def _duration(run: ParsedRun, card: Card | None, precision: str) -> str:
    peak = _cpu_peak() if card is None else card.peak
    if peak is None:
        return "This card's speed is not on record, so there is no estimate of the time."
    if precision != "32-true" if card is None else precision == "32-true":
        return f"There is no estimate of the time for {precision} here."
    counts_update = optimizer_traits(run.optimizer).update_flops is not None
    if counts_update and card is not None and card.capability < (8, 0):
        return "There is no estimate of the time for this optimizer on a GPU without bf16: its update uses fp32 there."
    settings = run.settings
    share = SHARE_OF_PEAK["mixture" if settings.model.mlp_class_name == "LLaMAMoE" else "dense"]
    devices = _devices(settings, card)
    seconds = sum(_flops_of_a_step(run, card)) / (peak * share * (devices if card else 1))
    rate = settings.train.global_batch_size * _context(settings) / seconds
    found = _tokens(run, card)
    time_needed = f", {_readable(found[1] / rate)}" if found else ""
    source = "measured on this CPU just now" if card is None else "by NVIDIA's product pages"
    if card and "laptop" in card.name:
        source += ", at the lowest clock of its power limits"
    on = f" on {devices} cards" if card and devices > 1 else ""
    counted = ["forward", "backward"]
    if settings.activation_checkpointing != "none":
        counted.append("recomputed activations")
    if counts_update:
        counted.append("the optimizer's update")
    return (
        f"Estimated: {rate:,.0f} tokens/s{on}{time_needed}. That is {share:.0%} of {peak / 1e12:,.3g} TFLOP/s"
        f" ({source}), the share that others\nreport of models of this size; not measured here, and small batches"
        f" reach less. Counted: {', '.join(counted)};\nnot counted: validation, HellaSwag, samples, saving,"
        " compiling."
    )


def _cpu_peak() -> float:
    """FLOP/s of one fp32 product, by the clock."""
    x = torch.rand(1024, 1024)
    x @ x
    start, times = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 0.2:
        x @ x
        times += 1
    return times * 2 * 1024**3 / seconds


def _readable(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} seconds"
    hours = seconds / 3600
    if hours < 2:
        return f"{seconds / 60:,.0f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _ways_to_fit(flags: list[str], run: ParsedRun, card: Card) -> Iterator[str]:
    """Tries one change after the other until the run fits, then leaves away what it fits without."""
    taken: list[tuple[str, ...]] = []
    strengths: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for choices, cost in _changes(run.settings, run.optimizer, card):
        for change in choices:
            memory = _memory(_parsed([*flags, *_joined([*taken, change])]), card)
            if _fits(memory, card):
                break
        taken.append(change)
        strengths[change] = choices
        yield f"  {_bytes(memory.peak):>12}   {' '.join(change)}\n{'':17}{cost}"
        if _fits(memory, card):
            break
    else:
        yield "\nNothing of this is enough; take a smaller model (configs/models) or another card."
        return
    for change in reversed(taken[:-1]):  # perhaps without it, or with less of it
        weaker = [[], *([other] for other in strengths[change] if other != change)]
        for instead in weaker:
            others = [new for old in taken for new in (instead if old is change else [old])]
            fewer = _memory(_parsed([*flags, *_joined(others)]), card)
            if _fits(fewer, card):
                taken, memory = others, fewer
                break
    final = [*flags, *_joined(taken)]
    yield f"\nThe least of it that fits, with {_bytes(memory.peak)}:\n"
    yield f"  {command('run_train.py', *final)}\n"
    changed = _parsed(final)
    yield _duration(changed, card, _precision(changed.settings, card)[0])


def _changes(
    settings: RunSettings, optimizer: dict[str, Any], card: Card
) -> Iterator[tuple[list[tuple[str, ...]], str]]:
    """What could be changed, each in its own strengths, and what it costs."""
    train, config = settings.train, settings.model
    if sizes := [size for size in range(train.micro_batch_size - 1, 0, -1) if train.micro_batch_size % size == 0]:
        yield (
            [("--micro_batch_size", str(size)) for size in sizes],
            "no change of the result (more micro batches are summed up); a little slower",
        )
    if settings.activation_checkpointing == "none" and config.mlp_class_name == "LLaMAMoE":
        yield [("--activation_checkpointing", "moe")], "the same result; the experts are computed once more, about +20%"
    if settings.activation_checkpointing != "block":
        yield [("--activation_checkpointing", "block")], "the same result; each block is computed once more, about +33%"
    if not optimizer_traits(optimizer).compiles_step and card.capability >= (8, 0):
        yield (
            [_eight_bit(optimizer)],
            "weights in 16 bits, rounded by chance, and moments in 8: the loss is close, not the same",
        )
    if sizes := _halves(_context(settings), 256):
        yield [("--max_seq_length", str(size)) for size in sizes], "a shorter context: another training"
    if layers := _halves(config.n_layer, 1):
        yield [("--model.n_layer", str(size)) for size in layers], "a smaller model"


def _eight_bit(optimizer: dict[str, Any]) -> tuple[str, ...]:
    """The flags of 8-bit Adam in place of another optimizer, whose rate it keeps; of Muon the rate of its Adam."""
    flags = (
        *("--precision", "bf16-true", "--optimizer.class_path", "torchao.optim.AdamW8bit"),
        *("--optimizer.init_args.bf16_stochastic_round", "true"),
    )
    if "adamw_lr" not in (arguments := optimizer.get("init_args") or {}):
        return flags
    return (
        *flags,
        *("--optimizer.init_args.lr", str(arguments["adamw_lr"])),
        *("--optimizer.init_args.weight_decay", str(arguments["weight_decay"])),
        *("--optimizer.init_args.betas", str(arguments["betas"]).replace(" ", "")),
    )


def _halves(number: int, least: int) -> list[int]:
    halves = []
    while number % 2 == 0 and number // 2 >= least:
        number //= 2
        halves.append(number)
    return halves


def _joined(changes: Sequence[tuple[str, ...]]) -> list[str]:
    """All flags; of two changes of one setting the later."""
    return [flag for change in {change[0]: change for change in changes}.values() for flag in change]


def _flop(number: float) -> str:
    units = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
    name = next((name for name, unit in units.items() if number >= unit), "M")
    return f"{number / units[name]:,.2f} {name}FLOP"


def _bytes(number: float) -> str:
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.1f} MiB"
