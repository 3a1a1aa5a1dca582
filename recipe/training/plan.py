"""``run_train.py --plan``: what a run would need and how long it would take, and what to change where it won't fit."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from custom_moe.backends import Hardware
from recipe.cli import UserError, nearest, underscored
from recipe.flops import count_parameters, training_flops_per_token
from recipe.settings import ParsedRun, RunSettings, check, choose_precision, parse_run, processes
from recipe.training.cards import CUDA_CONTEXT, GIB, NAMES, Card, named_card, peak_flops
from recipe.training.memory import TrainingMemory, training_memory
from recipe.training.schedule import Plan, plan_run

SHARE_OF_PEAK = {"dense": 0.30, "mixture": 0.22}
"""What training reaches of the data sheet's peak, assumed: nanoGPT on A100s and plain PyTorch on an H100 report 30% for
GPT-2 124M; nanochat's mixture reached 35% where its dense model reached 46%."""
GAPS = 1.05
"""What the allocator takes for each byte that is used"""
RECOMPUTED = {"none": 1.0, "moe": 1.2, "block": 4 / 3}
"""How much more is computed under activation checkpointing"""
NOTES = {
    "weights": "all {total:,.1f} M parameters",
    "gradients": "",
    "optimizer": "the state of {optimizer}",
    "activations": "kept for the backward, {micro_batch} x {context:,} tokens at once",
    "logits": "as wide as the vocabulary",
    "workspace": "weights cast to 16 bits, temporary results",
}


class Change(NamedTuple):
    """Something that needs less memory."""

    flags: tuple[str, ...]
    cost: str


def show_plan(argv: Sequence[str]) -> None:
    """Prints the plan of a run; reads and writes nothing but the settings.

    Args:
        argv: as ``parse_run``, with ``--plan`` or ``--plan CARD`` among it.

    Raises:
        UserError: for a card that is not known, and as ``parse_run`` and ``check``.
    """
    flags, name = _without_plan(underscored(argv))
    card = _found_card() if name is None else _known_card(name)
    run = _parsed(flags)
    precision, note = _precision(run.settings, card)
    memory = _memory(run, card)
    print("\n".join(_size(run)))
    print(f"On {_describe(card)} in {precision}{f' ({note})' if note else ''}:\n")
    print("\n".join(_table(run, memory, card)))
    if card is not None and not _fits(memory, card):
        print(f"\nIt does not fit. What to change, the cheapest first, each with those above it:\n")
        for line in _ways_to_fit(flags, run, card):
            print(line)
        return
    print("\n".join(_duration(run, card, precision)))


def _without_plan(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments that remain, and the card's name."""
    index = next(i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--plan")
    _, _, name = arguments[index].partition("=")
    following = arguments[index + 1 : index + 2]
    if not name and following and not following[0].startswith("-"):
        return arguments[:index] + arguments[index + 2 :], following[0]
    return arguments[:index] + arguments[index + 1 :], name or None


def _parsed(flags: Sequence[str]) -> ParsedRun:
    run = parse_run(flags)
    check(run.settings, run.optimizer)
    return run


def _known_card(name: str) -> Card:
    if card := named_card(name):
        return card
    guess = nearest(name.lower(), NAMES)
    raise UserError(
        f"no card {name!r} is known{f'; did you mean {guess!r}?' if guess else '.'} Known are {', '.join(NAMES)}."
        " `--plan` alone takes the card of this machine."
    )


def _found_card() -> Card | None:
    """This machine's, with the memory that is free now; None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()  # after this call the context is there, so it is not free any more
    name = torch.cuda.get_device_name()
    return Card(name, total / GIB, (total - free) / GIB, torch.cuda.get_device_capability(), peak_flops(name))


def _precision(settings: RunSettings, card: Card | None) -> tuple[str, str | None]:
    """What it would compute in, and why not in what was asked for."""
    asked = settings.precision
    if card is None or card.name not in NAMES:
        precision, note = choose_precision(asked)
        return precision, note and f"{asked} is not for this machine"
    if asked is not None and (card.capability >= (8, 0) or not asked.startswith("bf16")):
        return asked, None
    if card.capability >= (8, 0):
        return "bf16-mixed", None
    return "16-mixed", "it has no bf16"


def _memory(run: ParsedRun, card: Card | None) -> TrainingMemory:
    hardware = None if card is None else Hardware(card.capability, triton=True)
    return training_memory(run, _precision(run.settings, card)[0], hardware)


def _fits(memory: TrainingMemory, card: Card) -> bool:
    return memory.peak * GAPS <= (card.memory - card.taken) * GIB


def _devices(settings: RunSettings, card: Card | None) -> int:
    if card is not None and card.name in NAMES and settings.devices == "auto":
        return settings.num_nodes
    devices, nodes = processes(settings)
    return devices * nodes


def _length(run: ParsedRun, devices: int) -> Plan | None:
    """How long the run is; None where only the data can tell."""
    train = run.settings.train
    if not (train.max_tokens or train.max_steps):
        return None
    context = train.max_seq_length or run.settings.model.block_size
    return plan_run(replace(train, epochs=None), devices=devices, seq_length=context, epoch_micro_batches=1)


def describe_size(config: Config, tied: bool, seq_length: int) -> str:
    sizes = count_parameters(config, tie_embeddings=tied)
