"""The settings of a training run: one dataclass, YAML files and flags into it, and every check in one place."""

import inspect
import json
import logging
import math
import os
import pydoc
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import litgpt.args
import torch
import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser
from litgpt import Config
from litgpt.args import LogArgs, TrainArgs
from litgpt.data import DataModule

from custom_moe import weights_are_constant
from litmoe import checkpoints
from litmoe.cli import (
    UserError,
    current_class_path,
    explain,
    known_flags,
    make_parser,
    underscored,
    with_bare_switches,
    with_current_class_paths,
)
from litmoe.forward import Recomputed
from litmoe.upcycling import upcycled_model

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_RUN = PROJECT / "train_config.yaml"
DEFAULT_FINETUNING = PROJECT / "configs" / "finetune.yaml"

LoggerName = Literal["csv", "tensorboard", "wandb"]
Precision = Literal["bf16-mixed", "bf16-true", "16-mixed", "32-true"]

SHORT_FLAGS = {
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "max_seq_length": "train.max_seq_length",
}
"""Flags that people reach for most, and the settings that they stand for."""

FINETUNE_SHORT_FLAGS = SHORT_FLAGS | {
    "data_dir": "data.init_args.data_dir",
    "prompt_style": "data.init_args.prompt_style",
    "lr": "optimizer.init_args.lr",
    "epochs": "train.epochs",
}
"""The same for ``finetune.py``."""


@dataclass
class EvalArgs(litgpt.args.EvalArgs):
    """LitGPT's, told anew so that `--help` explains them, and HellaSwag"""

    interval: int = 600
    """Optimizer steps between evaluations"""
    max_new_tokens: int | None = None
    """Length of the sample in tokens; null: `sample.max_new_tokens`"""
    max_iters: int = 100
    """Validation batches at most"""
    initial_validation: bool = False
    """Whether to evaluate before the first step"""
    final_validation: bool = True
    """Whether to evaluate after the last step"""
    evaluate_example: str | int = "first"
    """LitGPT's; means nothing here"""
    hellaswag: str | None = None
    """HellaSwag's questions to score: a file in its JSONL, or a name on the Hub (Rowan/hellaswag); null for none"""
    hellaswag_interval: int | None = None
    """Optimizer steps between two scores; null: those of `interval`"""
    hellaswag_limit: int | None = None
    """Only the first so many questions"""


@dataclass
class MoESettings:
    """How the experts are computed and balanced; the layer itself is described by the model's config."""

    load_balancing_loss: float = 0.01
    """Weight of the load-balancing loss, a mean over layers (Switch Transformer, arXiv 2101.03961); 0 turns it off"""
    z_loss: float = 0.001
    """Weight of the router z-loss, a mean over layers (ST-MoE, arXiv 2202.08906); 0 turns it off"""
    bias_update_rate: float = 0.0
    """How far the selection bias of a sigmoid router (model.n_expert_groups) moves at each step towards an even load
    (DeepSeek-V3, arXiv 2408.15664); usual is 0.001 with a small load_balancing_loss, or none"""
    backend: Literal["auto", "grouped_mm", "triton", "loop"] = "auto"
    """What computes the experts (custom_moe/backends.py); auto goes by card, type and widths. A checkpoint is
    the same for all"""


@dataclass
class ScheduleSettings:
    """The learning rate after its warm-up (`train.lr_warmup_steps`), from the optimizer's lr to `train.min_lr`."""

    name: Literal["cosine", "wsd"] = "cosine"
    """cosine: half a cosine down. wsd (warmup-stable-decay; MiniCPM, arXiv 2404.06395): lr itself, then linearly down
    at the end (arXiv 2405.18392), so that a longer run can go on from any checkpoint before that"""
    decay_fraction: float = 0.2
    """The part of all optimizer steps in which wsd goes down"""


@dataclass
class CheckpointSettings:
    """When a run saves, beside `train.save_interval` (in optimizer steps), and what it keeps."""

    every_minutes: float | None = 10.0
    """Minutes between two saves at most, and so what a power cut may cost; null saves by `train.save_interval` alone"""
    keep_last: int | None = 3
    """How many checkpoints stay, the newest; an older one is deleted when its successor is whole. null keeps all"""
    keep_every: int | None = None
    """Those whose step is a multiple of this stay, too (a multiple of `train.save_interval`)"""


@dataclass
class SampleSettings:
    """The text that the model writes at each evaluation."""

    prompt: str | None = "Once upon a time"
    """What it continues; null for no samples"""
    max_new_tokens: int = 64
    """Tokens at most; it stops by itself at the end-of-text token (`eval.max_new_tokens` overrides it)"""
    temperature: float = 0.8
    """0 takes the most probable token each time"""
    top_k: int | None = 50
    """Only the k most probable tokens may be drawn"""
    seed: int = 1234
    """The sample has a random generator of its own, so that the run's random state stays as it is"""


@dataclass
class PrepareSettings:
    """What `prepare_data.py` is told where the run's data folder is still empty (the same names as its flags)."""

    source: str | None = None
    """A corpus by name, or a file or folder of text; null: the text that lies in the data folder"""
    tokenizer: str | None = None
    """A name on the Hugging Face Hub, a folder, or `train`; null: the one that lies in tokenizer_dir, else gpt2"""
    vocab_size: int | None = None
    """Vocabulary size for `tokenizer: train`"""


@dataclass
class RunSettings:
    """Everything that `run_train.py` can be told. Names and meanings up to `seed` are `litgpt.pretrain.setup`'s."""

    model: Config
    """The model, in LitGPT's fields; in a run file also the path of a YAML file with them"""
    train: TrainArgs
    """Batches, limits, learning-rate schedule, clipping"""
    eval: EvalArgs
    """Validation and HellaSwag during training"""
    data: DataModule
    """Where the batches come from; `litgpt.data.TextFiles` works too"""
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]
    """Any optimizer by class_path; it gets one parameter group with and one without weight decay.
    litmoe.train.muon.Muon is for whole models; torchao.optim.AdamW8bit takes the least memory"""
    log: LogArgs = field(default_factory=LogArgs)
    """Names for the loggers that want them"""
    out_dir: Path = Path("checkpoints")
    """Where checkpoints and metrics go"""
    precision: Precision | None = None
    """Numbers that the model computes in; null picks what the hardware does well"""
    initial_checkpoint_dir: Path | None = None
    """A checkpoint folder whose weights the run starts from"""
    upcycle: Path | None = None
    """A dense (SwiGLU) checkpoint folder: each expert starts as a copy of its feed-forward. Without --model the run's
    model is that checkpoint's with 8 experts, 2 for each token"""
    resume: bool | Literal["auto"] | Path = False
    """`auto` goes on with the run in out_dir, or starts it where there is none; a checkpoint folder goes on from it"""
    devices: int | str = "auto"
    """How many GPUs (or CPU processes); `auto` takes all GPUs, or one CPU process"""
    num_nodes: int = 1
    """How many machines"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: ddp (auto, too) keeps the whole model on each; fsdp keeps a part of each
    parameter, gradient and moment, for models too large for one. Checkpoints are the same"""
    tokenizer_dir: Path = Path("data/tokenizer")
    """Folder of the tokenizer"""
    logger_name: LoggerName = "csv"
    """One more logger beside the CSV file"""
    seed: int = 42
    """Seed of weights and data order"""
    loggers: list[LoggerName] | None = None
    """Several loggers at once; the CSV file is always written"""
    run_name: str | None = None
    """Name of the run for W&B and in the settings that are saved"""
    compile: bool | None = None
    """torch.compile; null turns it on where a CUDA GPU and a compiler are there"""
    activation_checkpointing: Recomputed = "none"
    """What is computed twice to save memory, with the same results: nothing, whole blocks, or their feed-forwards"""
    progress: bool | None = None
    """A progress bar; null shows one in a terminal and plain lines elsewhere"""
    overwrite: bool = False
    """Delete the run that lies in out_dir and start anew"""
    moe: MoESettings = field(default_factory=MoESettings)
    """Balance of the experts"""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """The learning rate's curve; optimizer groups with rates of their own keep their ratio to the first"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """When the run saves and which checkpoints it keeps"""
    sample: SampleSettings = field(default_factory=SampleSettings)
    """Text that is generated at each evaluation"""
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    """Where text and tokenizer come from when they are not there yet"""
    wandb_dataset: str | None = None
    """A W&B dataset artifact to train on: `entity/project/name:alias`, or `project/name:alias` with WANDB_ENTITY"""
    wandb_artifacts_dir: Path = Path("data/wandb_artifacts")
    """Where W&B dataset artifacts are kept"""


@dataclass
class FinetuneSettings(RunSettings):
    """Everything that `finetune.py` can be told; the LoRA fields are `litgpt.finetune.lora.setup`'s."""

    compile: bool | None = False
    """torch.compile; conversations of all lengths share their graphs"""
    checkpoint_dir: Path = Path("checkpoints")
    """The checkpoint that is tuned; model and tokenizer are its own. `checkpoints`: the newest one there"""
    lora_r: int = 0
    """Rank of the LoRA updates (arXiv 2106.09685), on a GPU best a multiple of 8; 0 trains all weights instead"""
    lora_alpha: int = 16
    """LoRA updates are scaled by lora_alpha / lora_r"""
    lora_dropout: float = 0.05
    """Dropout on what goes into the LoRA updates"""
    lora_query: bool = True
    """LoRA on the queries"""
    lora_key: bool = False
    """LoRA on the keys"""
    lora_value: bool = True
    """LoRA on the values"""
    lora_projection: bool = False
    """LoRA on the attention's output projection"""
    lora_mlp: bool = False
    """LoRA on the feed-forwards: each expert's and the router's, too"""
    lora_head: bool = False
    """LoRA on the output head"""


LORA_FIELDS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_query", "lora_key", "lora_value"),
    *("lora_projection", "lora_mlp", "lora_head"),
)
"""What makes up LoRA, as LitGPT calls it."""

OF_THE_CHECKPOINT: set[str | int] = {
    *("model", "initial_checkpoint_dir", "tokenizer_dir"),  # taken from it
    *("upcycle", "prepare", "wandb_dataset", "wandb_artifacts_dir"),  # for pretraining alone
}
"""Settings that `finetune.py` has no flags for."""


@dataclass(frozen=True)
class ParsedRun:
    """Settings as objects, and the same settings as plain values that a YAML file can hold."""

    settings: RunSettings
    optimizer: dict[str, Any]
    """`class_path` and `init_args`"""
    resolved: dict[str, Any]
    """Everything, as it is saved with each checkpoint; a valid run file"""


def parse_run(argv: Sequence[str]) -> ParsedRun:
    """Reads the run file and the flags; a flag beats the run file, which beats the defaults.

    Args:
        argv: command-line arguments. ``--config FILE`` names the run file (default: the project's
            ``train_config.yaml``), ``--model FILE`` a model file in place of the run file's; without one,
            ``--upcycle CHECKPOINT`` brings the model too.

    Raises:
        UserError: for an unknown key, a value of the wrong type, or a file that is missing or no YAML mapping.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    files, flags = _split_files_off(underscored(argv), ("config", "model", "upcycle"), SHORT_FLAGS)
    run_file = files["config"] or DEFAULT_RUN
    run = read_run_file(run_file, files["model"])
    dense = files["upcycle"]
    if dense is not None:
        flags.append(f"--upcycle={dense}")
    elif not run.get("model") and isinstance(run.get("upcycle"), str):
        dense = Path(run["upcycle"])
    if dense is not None and files["model"] is None:
        run["model"] = upcycled_model(dense)
    resolved, values = _parse(run_parser(), RunSettings, run_file, run, flags)
    settings = RunSettings(**{field.name: values[field.name] for field in fields(RunSettings)})
    return ParsedRun(settings=settings, optimizer=resolved["optimizer"], resolved=resolved)


def parse_finetuning(argv: Sequence[str]) -> ParsedRun:
    """Reads the run file and the flags of ``finetune.py``; model and tokenizer are those of the checkpoint.

    Args:
        argv: command-line arguments. The checkpoint may stand first without its flag; without one the newest is taken.
            ``--config FILE`` names the run file (default: ``configs/finetune.yaml``).

    Raises:
        UserError, SystemExit: as ``parse_run``; and where there is no such checkpoint.
    """
    if argv and not argv[0].startswith("-"):
        argv = [f"--checkpoint_dir={argv[0]}", *argv[1:]]
    files, flags = _split_files_off(underscored(argv), ("config",), FINETUNE_SHORT_FLAGS)
    run_file = files["config"] or DEFAULT_FINETUNING
    resolved, values = _parse(finetuning_parser(), FinetuneSettings, run_file, _read_yaml(run_file), flags)
    folder = _find_base(values["checkpoint_dir"], values["out_dir"], bool(values["resume"]))
    resolved["checkpoint_dir"] = str(folder)
    if resolved["train"]["max_seq_length"] is None:  # positions beyond it were never trained
        values["train"].max_seq_length = resolved["train"]["max_seq_length"] = checkpoints.context_of(folder)
    settings = FinetuneSettings(
        **{field.name: values[field.name] for field in fields(FinetuneSettings) if field.name in values}
        | {"model": checkpoints.load_config(folder), "checkpoint_dir": folder}
        | {"initial_checkpoint_dir": folder, "tokenizer_dir": folder},
    )
    return ParsedRun(settings=settings, optimizer=resolved["optimizer"], resolved=resolved)


def _find_base(given: Path, out_dir: Path, resume: bool) -> Path:
    """The checkpoint to tune; where none is named, a resumed run's own, else the newest."""
    if given != FinetuneSettings.checkpoint_dir:
        return checkpoints.resolve(given)
    run_file = out_dir / "run_config.yaml"
    if resume and run_file.is_file() and (of_the_run := _read_yaml(run_file).get("checkpoint_dir")):
        return checkpoints.resolve(Path(str(of_the_run)))
    return checkpoints.resolve(None)


def _parse(
    parser: ArgumentParser, kind: type[RunSettings], run_file: Path, run: dict[str, Any], flags: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings as plain values, the same as objects of ``kind``) of a run file and the flags that beat it."""
    # What torchao's import has to say to torch's developers, where an optimizer of its is named.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        # First the file alone, so that a complaint about a key can say where the key stands.
        parser.parse_object(run)
    except Exception as error:
        raise UserError(f"in {run_file}: {explain(str(error), _known_names(parser, run))}") from None
    try:
        namespace = parser.parse_args(["--config", yaml.safe_dump(run), *with_bare_switches(parser, flags)])
        resolved = yaml.safe_load(parser.dump(namespace, skip_none=False))
        _check_nulls(kind, resolved)
        with warnings.catch_warnings():
            # LitGPT warns of a warm-up as long as the run; here it is shortened, and the run says so.
            warnings.filterwarnings("ignore", message="`--train.lr_warmup_steps` should be less")
            values = vars(parser.instantiate_classes(namespace))
    except ArgumentError as error:
        raise UserError(explain(str(error), _known_names(parser, run))) from None
    except UserError:
        raise
    except Exception as error:  # LitGPT's dataclasses check some fields themselves, and classes that are named theirs
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        reason = f"{type(error).__name__} in `{failed}`" if isinstance(error, ArithmeticError | LookupError) else error
        raise UserError(
            f"these settings do not fit together: {str(reason) or f'LitGPT holds that `{failed}`'}"
        ) from None
    _check_nulls(kind, values)
    return resolved, values


def _check_nulls(kind: type, values: dict[str, Any]) -> None:
    """Raises ``UserError`` for settings that are null and may not be: jsonargparse takes null for anything."""
    if nulls := list(_nulls(kind, values)):
        raise UserError(f"{', '.join(nulls)} can't be null; expected a value, or no such line for the default.")


def _nulls(kind: type, values: dict[str, Any], path: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for setting in fields(kind):
        name, value = setting.name, values.get(setting.name)
        if value is None and name in values and setting.default is not None and not _takes_null(hints[name]):
            yield path + name
        elif is_dataclass(value):
            yield from _nulls(type(value), vars(value), f"{path}{name}.")


def _takes_null(hint: Any) -> bool:
    return hint is Any or type(None) in get_args(hint)


def run_parser() -> ArgumentParser:
    """The parser of ``run_train.py``: a flag for each field of ``RunSettings`` and of what lies in it."""
    parser = make_parser(description="Pretrain a model with LitGPT.")
    parser.add_argument("--config", action="config", help="The run file (YAML); default: train_config.yaml")
    # Optimizers of other packages (torchao) give their parameters no types.
    parser.add_class_arguments(RunSettings, sub_configs=True, fail_untyped=False)
    parser.add_argument(
        "--plan",
        default=SUPPRESS,
        metavar="CARD",
        help="Show what the run needs on this machine or a card by name (rtx3060), and train nothing",
    )
    _add_short_flags(parser, SHORT_FLAGS)
    parser.set_defaults(
        {
            "data": {
                "class_path": "litmoe.data.TokenizedText",
                "init_args": {"train_data_path": "data/custom_text/train", "val_data_path": "data/custom_text/val"},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-4, "weight_decay": 0.01}},
        }
    )
    return parser


def finetuning_parser() -> ArgumentParser:
    """The parser of ``finetune.py``."""
    parser = make_parser(description="Tune a checkpoint to follow instructions, with LitGPT.")
    parser.add_argument("--config", action="config", help="The run file (YAML); default: configs/finetune.yaml")
    parser.add_class_arguments(FinetuneSettings, sub_configs=True, fail_untyped=False, skip=OF_THE_CHECKPOINT)
    _add_short_flags(parser, FINETUNE_SHORT_FLAGS)
    return parser


def _add_short_flags(parser: ArgumentParser, short_flags: dict[str, str]) -> None:
    """They are written in full before anything is parsed; here they stand for ``--help``."""
    shortcuts = parser.add_argument_group("Short forms")
    for short, target in short_flags.items():
        shortcuts.add_argument(f"--{short}", default=SUPPRESS, help=f"the same as --{target}")


def read_run_file(path: Path, model_file: Path | None = None) -> dict[str, Any]:
    """The run file as plain values, its model file (or ``model_file``) read in.

    A path under ``model:`` is looked for beside the run file, then from the working directory.
    """
    run = _read_yaml(path)
    model: Any = model_file or run.get("model")
    if isinstance(model, (str, Path)):
        beside = path.parent / model
        run["model"] = _read_yaml(beside if model_file is None and beside.is_file() else Path(model))
    return run


def _known_names(parser: ArgumentParser, run: dict[str, Any]) -> list[str]:
    """All flags of the parser and the parameters of the classes that the run file names."""
    names = known_flags(parser)
    for group in ("data", "optimizer"):
        chosen = run.get(group) or {}
        class_path = chosen.get("class_path") if isinstance(chosen, dict) else chosen
        with suppress(Exception):  # whatever the import of a module, or a name that is none, leads to
            chosen_class: Any = pydoc.locate(class_path or parser.get_default(group)["class_path"])
            parameters = inspect.signature(chosen_class).parameters
            names += [f"{group}.init_args.{name}" for name in parameters if name != "params"]
    return names


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no config file at {path}; expected a YAML file. The shipped ones lie under configs/.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(content, default=str, skipkeys=True)  # refuses what holds itself, which no parser comes to an end of
    except OSError:
        raise
    except Exception as error:  # not YAML's own alone: 2026-99-99, `!!int x` and ten thousand `[` have others
        raise UserError(f"{path} is not valid YAML: {str(error)[:500] or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a YAML mapping of settings.")
    return with_current_class_paths(content)


def _split_files_off(
    arguments: list[str], names: tuple[str, ...], short_flags: dict[str, str]
) -> tuple[dict[str, Path | None], list[str]]:
    """Takes the flags that name files out, wherever they stand, and writes the short ones in full."""
    files: dict[str, Path | None] = dict.fromkeys(names)
    flags: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in files:
            value = value if equals else next(remaining, "")
            if not value:
                expected = "a checkpoint folder" if name == "upcycle" else "a YAML file"
                raise UserError(f"--{name} expects the path of {expected}.")
            files[name] = Path(value)
        elif argument.startswith("--") and name in short_flags:
            flags.append(f"--{short_flags[name]}{equals}{value}")
        else:
            flags.append(current_class_path(argument))
    return files, flags


def processes(settings: RunSettings) -> tuple[int, int]:
    """(devices per machine, machines): what torchrun started, else what the settings ask for.

    Raises:
        UserError: for a number of devices that is not there.
    """
    gpus = torch.cuda.device_count()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if gpus and local > gpus:
            raise UserError(f"torchrun started {local} processes, but this machine has {gpus} GPU(s); start no more.")
        return local, int(os.environ["WORLD_SIZE"]) // local
    if settings.devices == "auto":
        return max(gpus, 1), settings.num_nodes
    try:
        devices = int(settings.devices)
    except ValueError:
        devices = 0
    if devices < 1 or (gpus and devices > gpus):
        there = f"this machine has {gpus} GPU(s)" if gpus else "this machine has no GPU, so devices are CPU processes"
        raise UserError(f"--devices {settings.devices}: {there}; expected `auto` or a number from 1.")
    return devices, settings.num_nodes


def is_sharded(settings: RunSettings) -> bool:
    """Whether parameters are divided over the devices; one alone has nothing to divide."""
    devices, num_nodes = processes(settings)
    return settings.strategy == "fsdp" and devices * num_nodes > 1


def cpu_has_bf16() -> bool:
    """Whether torch multiplies bf16 matrices on this CPU by oneDNN's kernels, which need AVX-512 on x86; without them
    a large product takes about a hundred times as long as in fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(asked: str | None) -> tuple[str, str | None]:
    """(precision, a line that says why it is not the one asked for or what it costs here, or None).

    bf16 needs a GPU with it. A GPU without it gets fp16 with a gradient scaler; a CPU gets fp32, which is the fastest
    there for small models and the same on every machine; `bf16-true` on a CPU is taken at its word.
    """
    if not torch.cuda.is_available():
        if asked == "bf16-true" and not cpu_has_bf16():
            return asked, "this CPU has no instructions for bf16: 32-true is many times faster on it than bf16-true."
        if asked in (None, "32-true", "bf16-true"):
            return asked or "32-true", None
        return "32-true", f"precision {asked} needs a GPU; this run computes in 32-true on the CPU."
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked is None:
        return ("bf16-mixed" if bf16 else "16-mixed"), None
    if asked.startswith("bf16") and not bf16:
        name = torch.cuda.get_device_name()
        return "16-mixed", f"{name} has no bf16, so this run computes in 16-mixed in place of {asked}."
    return asked, None


def constant_weights_note(config: Config) -> str | None:
    """A line about a model that was trained elsewhere and whose routers the loss can't train; None for other models."""
    if config.mlp_class_name != "LLaMAMoE" or not weights_are_constant(config):
        return None
    return (
        "warning: this model sends each token to 1 expert, with a weight that is always 1. The loss gives its routers"
        " no gradient: training improves the experts, but not which of them a token goes to."
    )


def check(settings: RunSettings, optimizer: dict[str, Any]) -> None:
    """All that can be known to be wrong before anything is read or written, in one message.

    Raises:
        UserError: with a line for each problem.
    """
    problems = [
        *_check_seed(settings),
        *_check_paths(settings),
        *_check_model(settings.model),
        *_check_router_learns(settings),
        *_check_balance(settings),
        *_check_batches(settings),
        *_check_sharding(settings, optimizer),
        *_check_schedule(settings, optimizer),
        *_check_checkpoints(settings),
        *_check_evaluation(settings),
        *_check_log(settings),
    ]
    if settings.initial_checkpoint_dir and settings.upcycle:
        problems.append(
            "both `initial_checkpoint_dir` and `upcycle` are set; choose one: the first takes weights as they are, the"
            " second makes experts of them."
        )
    if isinstance(settings, FinetuneSettings):
        problems += _check_finetuning(settings)
    elif settings.initial_checkpoint_dir and settings.resume:
        problems.append(
            "both `initial_checkpoint_dir` and `resume` are set; choose one: the first starts a new run from weights,"
            " the second continues an old one."
        )
    if problems:
        raise UserError("\n  ".join(["the settings do not fit together:", *problems]))


def _check_seed(settings: RunSettings) -> list[str]:
    return [] if 0 <= settings.seed < 2**32 else ["seed is out of range; expected 0 to 2**32 - 1, as Lightning takes."]


def _check_paths(settings: RunSettings) -> list[str]:
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    paths = {name: value for name, value in values.items() if isinstance(value, str | Path)}
    return [f"{name} holds a zero byte; no file can have such a name." for name, p in paths.items() if "\0" in str(p)]


def _check_model(config: Config) -> list[str]:
    sizes = ("n_layer", "n_embd", "n_head", "block_size", "padded_vocab_size")
    problems = [f"{name} is {size}; expected at least 1." for name in sizes if (size := getattr(config, name)) < 1]
    if config.latent_attention:
        problems.append("the model has latent_attention (DeepSeek's), which is not covered here; expected none.")
    if config.mlp_class_name == "LLaMAMoE":
        if config.n_expert < 1:
            problems.append(
                "mlp_class_name is LLaMAMoE but n_expert is 0, which would build a model without feed-forward layers;"
                " set n_expert (8, say), or mlp_class_name: LLaMAMLP for a dense model."
            )
        elif not 1 <= config.n_expert_per_token <= config.n_expert:
            problems.append(
                f"n_expert_per_token is {config.n_expert_per_token}; expected a number from 1 to n_expert"
                f" ({config.n_expert})."
            )
        else:
            problems += _check_routing(config)
        if config.moe_intermediate_size is None:
            problems.append("moe_intermediate_size is not set; expected the width of one expert, such as 2048.")
    elif config.n_expert:
        problems.append(
            f"n_expert is {config.n_expert} but mlp_class_name is {config.mlp_class_name}, which has no experts;"
            " set mlp_class_name: LLaMAMoE, or n_expert: 0."
        )
    return problems


def _check_routing(config: Config) -> list[str]:
    """What LitGPT's config accepts, and what then crashes in the first step or routes otherwise than it says."""
    problems = []
    dense, width, shared = config.first_k_dense_replace, config.moe_intermediate_size, config.n_shared_expert
    if dense is not None and not 0 <= dense < config.n_layer:
        problems.append(
            f"first_k_dense_replace is {dense}; expected a number from 0 to {config.n_layer - 1}, so that at least one"
            f" of the {config.n_layer} layers has experts."
        )
    if width is not None and width < 1:
        problems.append(f"moe_intermediate_size is {width}; expected the width of one expert, such as 2048.")
    if shared is not None and shared < 0:
        problems.append(f"n_shared_expert is {shared}; expected a number from 0.")
    if not 0 < config.routed_scaling_factor < math.inf:
        problems.append(
            f"routed_scaling_factor is {config.routed_scaling_factor}, which the weight of every expert is multiplied"
            " by; expected more than 0, such as 1.0."
        )
    groups, chosen = config.n_expert_groups, config.n_topk_groups
    if groups is None:
        unused = [name for name in ("n_topk_groups", "n_topk_scores_per_group") if getattr(config, name) is not None]
        if unused:
            problems.append(
                f"{' and '.join(unused)} would have no effect: n_expert_groups is not set. Set it, or leave"
                f" {'it' if len(unused) == 1 else 'them'} null."
            )
        return problems
    group_size = config.n_expert // groups
    if not 1 <= chosen <= groups:
        problems.append(f"n_topk_groups is {chosen}; expected a number from 1 to n_expert_groups ({groups}).")
    elif chosen * group_size < config.n_expert_per_token:
        problems.append(
            f"n_topk_groups is {chosen}, and {chosen} of the {groups} groups hold {chosen * group_size} experts, fewer"
            f" than n_expert_per_token ({config.n_expert_per_token}): experts outside of the chosen groups would be"
            f" taken. Expected at least --model.n_topk_groups {-(-config.n_expert_per_token // group_size)}."
        )
    if config.n_topk_scores_per_group < 1:
        problems.append(
            f"n_topk_scores_per_group is {config.n_topk_scores_per_group}, so that all groups would have the same"
            f" score; expected a number from 1 to {group_size}, the size of a group."
        )
    return problems


def _check_router_learns(settings: RunSettings) -> list[str]:
    """For a new model. One that was trained before is taken as it is, and the run says the same in a line
    (``constant_weights_note``)."""
    config = settings.model
    if settings.initial_checkpoint_dir or settings.resume or constant_weights_note(config) is None:
        return []
    if config.n_expert_groups:
        kind, alternative = "a sigmoid router with norm_topk_prob", "--model.norm_topk_prob false"
    else:
        kind, alternative = "a softmax router", _sigmoid_router(config)
    otherwise = "" if settings.upcycle else f", or {alternative}"  # an upcycled model has softmax routers
    return [
        f"n_expert_per_token is 1 with {kind}, which divides the weights of a token's experts by their sum: the one"
        " weight is always 1, so the loss would give the router no gradient, and it would not learn where to send a"
        f" token. --model.n_expert_per_token 2{otherwise}."
    ]


def _sigmoid_router(config: Config) -> str:
    """The flags that give a model with a softmax router one with sigmoid scores, which chooses among all experts."""
    groups = next(number for number in range(2, config.n_expert + 1) if config.n_expert % number == 0)
    scores, normalized = min(2, config.n_expert // groups), config.n_expert_per_token > 1
    return (
        f"--model.n_expert_groups {groups} --model.n_topk_groups {groups} --model.n_topk_scores_per_group {scores}"
        f" --model.norm_topk_prob {str(normalized).lower()}"
    )


def _check_balance(settings: RunSettings) -> list[str]:
    rate, config = settings.moe.bias_update_rate, settings.model
    if settings.moe.backend != "auto" and config.mlp_class_name != "LLaMAMoE":
        return [f"moe.backend is {settings.moe.backend}, but this model has no experts; --moe.backend auto"]
    if rate < 0:
        return [f"moe.bias_update_rate is {rate}; expected 0 for none, or a small step such as 0.001."]
    if rate and (config.mlp_class_name != "LLaMAMoE" or not config.n_expert_groups):
        problem = (
            f"moe.bias_update_rate is {rate}, but only a sigmoid router has a selection bias and this model has none;"
        )
        if config.mlp_class_name != "LLaMAMoE" or config.n_expert < 2 or isinstance(settings, FinetuneSettings):
            return [f"{problem} --moe.bias_update_rate 0"]
        return [f"{problem} --moe.bias_update_rate 0, or train a model with sigmoid routers: {_sigmoid_router(config)}"]
    if rate and isinstance(settings, FinetuneSettings) and settings.lora_r:
        return [
            f"moe.bias_update_rate is {rate}, but LoRA leaves the routers' selection bias as the checkpoint has it;"
            " --moe.bias_update_rate 0, or train all weights: --lora_r 0"
        ]
    return []


def _check_batches(settings: RunSettings) -> list[str]:
    if settings.num_nodes < 1:
        return [f"num_nodes is {settings.num_nodes}; expected at least 1."]
    problems = []
    train, (devices, num_nodes) = settings.train, processes(settings)
    ranks = devices * num_nodes
    smallest = train.micro_batch_size * ranks
    if train.micro_batch_size < 1 or train.global_batch_size < smallest or train.global_batch_size % smallest:
        per_step = f"micro_batch_size {train.micro_batch_size}" + (f" x {ranks} devices" if ranks > 1 else "")
        upper = max(smallest, -(-train.global_batch_size // max(smallest, 1)) * smallest)
        problems.append(
            f"global_batch_size {train.global_batch_size} is no multiple of {per_step};"
            f" --global-batch-size {upper} would fit."
        )
    context = train.max_seq_length
    if context is not None and not 1 <= context <= settings.model.block_size:
        larger = "" if isinstance(settings, FinetuneSettings) else ", or a larger --model.block_size"
        problems.append(
            f"max_seq_length is {context} but the model's block_size is {settings.model.block_size}; expected at most"
            f" that: --max-seq-length {settings.model.block_size}{larger}."
        )
    for name in ("log_interval", "save_interval"):
        if (interval := getattr(train, name)) is not None and interval < 1:
            problems.append(f"train.{name} is {interval}; expected at least 1.")
    return problems


def _check_sharding(settings: RunSettings, optimizer: dict[str, Any]) -> list[str]:
    """What needs whole matrices in one process can't be had with FSDP."""
    if not is_sharded(settings):
        return []
    problems = []
    elementwise = ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD")
    if optimizer["class_path"] not in elementwise:
        problems.append(
            f"strategy fsdp gives each device a part of every matrix, and {optimizer['class_path']} is not known to"
            " work on parts; --optimizer torch.optim.AdamW, or --strategy ddp."
        )
    if settings.eval.hellaswag is not None:
        problems.append("strategy fsdp scores no HellaSwag while it trains; --eval.hellaswag null, then evaluate.py.")
    if settings.compile:
        problems.append("strategy fsdp runs uncompiled; --compile false, or --strategy ddp.")
    if isinstance(settings, FinetuneSettings) and settings.lora_r:
        problems.append("strategy fsdp has no LoRA, which trains little enough for --strategy ddp; or --lora_r 0.")
    if choose_precision(settings.precision)[0] == "16-mixed":
        problems.append("strategy fsdp has no gradient scaler, so no fp16; --precision 32-true, or --strategy ddp.")
    return problems


def _check_schedule(settings: RunSettings, optimizer: dict[str, Any]) -> list[str]:
    problems, train, fraction = [], settings.train, settings.schedule.decay_fraction
    if not 0 < fraction <= 1:
        problems.append(
            f"schedule.decay_fraction is {fraction}; expected a part of the run, above 0 and at most 1, such as 0.2."
        )
    elif settings.schedule.name != "wsd" and fraction != ScheduleSettings.decay_fraction:
        problems.append(
            f"schedule.decay_fraction is {fraction}, but the schedule is {settings.schedule.name}, which goes down all"
            " the way; --schedule.name wsd"
        )
    limits = {name: getattr(train, name) for name in ("max_tokens", "max_steps", "epochs")}
    if not any(limits.values()):
        problems.append(
            "no end is set; expected train.max_tokens, train.max_steps or train.epochs"
            " (train.max_time alone gives the learning-rate schedule no length)."
        )
    for name, limit in {**limits, "max_time": train.max_time}.items():
        if limit is not None and not 0 < limit <= 2**62:  # also where it is not a number
            problems.append(f"train.{name} is {str(limit)[:30]}; expected more than 0, and at most 2**62.")
    if train.max_norm is not None and not train.max_norm > 0:
        problems.append(f"train.max_norm is {train.max_norm}; expected more than 0, or null for no clipping.")
    learning_rate = (optimizer.get("init_args") or {}).get("lr")
    if isinstance(learning_rate, float) and not 0 < learning_rate < math.inf:
        problems.append(f"the optimizer's lr is {learning_rate}; expected more than 0, such as 3.0e-4.")
    elif isinstance(learning_rate, float) and not 0 <= train.min_lr <= learning_rate:
        problems.append(
            f"train.min_lr is {train.min_lr} but the optimizer's lr is {learning_rate}; expected a min_lr from 0 to lr:"
            f" --train.min_lr {learning_rate / 10:.1e}"
        )
    return problems


def _check_checkpoints(settings: RunSettings) -> list[str]:
    problems = []
    checkpoint, interval = settings.checkpoint, settings.train.save_interval
    if checkpoint.every_minutes is not None and not 0 < checkpoint.every_minutes < math.inf:
        problems.append(f"checkpoint.every_minutes is {checkpoint.every_minutes}; expected more than 0, or null.")
    if checkpoint.keep_last is not None and checkpoint.keep_last < 2:
        problems.append(
            f"checkpoint.keep_last is {checkpoint.keep_last}; expected at least 2, so that one is there when another"
            " turns out to be damaged, or null to keep all."
        )
    if checkpoint.keep_every is not None and (
        not interval or checkpoint.keep_every < 1 or checkpoint.keep_every % interval
    ):
        problems.append(
            f"checkpoint.keep_every is {checkpoint.keep_every}, but the run saves every {interval} steps"
            " (train.save_interval); expected a multiple of that."
        )
    return problems


def _check_evaluation(settings: RunSettings) -> list[str]:
    problems = []
    if settings.eval.interval < 1 or settings.eval.max_iters < 1:
        problems.append(
            f"eval.interval is {settings.eval.interval} and eval.max_iters {settings.eval.max_iters};"
            " expected at least 1 each."
        )
    for name in ("hellaswag_interval", "hellaswag_limit"):
        value = getattr(settings.eval, name)
        if value is not None and value < 1:
            problems.append(f"eval.{name} is {value}; expected at least 1, or null.")
        if value is not None and settings.eval.hellaswag is None:
            problems.append(
                f"eval.{name} is set but nothing is scored; name the questions: --eval.hellaswag FILE_OR_HUB"
            )
    if settings.eval.evaluate_example != "first":
        problems.append("eval.evaluate_example means nothing here; the sample's prompt is --sample.prompt.")
    return problems


def _check_finetuning(settings: FinetuneSettings) -> list[str]:
    problems = []
    if settings.train.max_tokens:
        problems.append("train.max_tokens counts tokens of a text; expected train.epochs or train.max_steps.")
    if settings.lora_r < 0 or settings.lora_alpha < 1 or not 0 <= settings.lora_dropout < 1:
        problems.append(
            f"lora_r is {settings.lora_r}, lora_alpha {settings.lora_alpha}, lora_dropout {settings.lora_dropout};"
            " expected a rank from 0, an alpha from 1, and a dropout from 0 to below 1."
        )
    parts = ("query", "key", "value", "projection", "mlp", "head")
    if settings.lora_r and not any(getattr(settings, f"lora_{part}") for part in parts):
        problems.append("lora_r is set but no part of the model gets LoRA; turn one on: --lora_query true")
    return problems


def _check_log(settings: RunSettings) -> list[str]:
    """LogArgs of LitGPT are W&B's and those of a logger that is not here."""
    given = {field.name for field in fields(LogArgs) if getattr(settings.log, field.name) != field.default}
    read_by_wandb = {"project", "run", "group"}
    problems = [f"log.{name} belongs to a logger that is not offered here." for name in sorted(given - read_by_wandb)]
    if given & read_by_wandb and "wandb" not in (settings.loggers or [settings.logger_name]):
        names = ", ".join(f"log.{name}" for name in sorted(given & read_by_wandb))
        problems.append(f"{names} is read by W&B alone; add it: --loggers '[csv,wandb]'")
    return problems
