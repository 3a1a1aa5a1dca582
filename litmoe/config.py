"""The settings of a training run: dataclasses, and the YAML files and flags that fill them.

This module imports neither torch nor all of LitGPT, which takes seconds. ``--help`` and mistakes in flags or YAML files
need only the first of two passes (``check_quickly``); the second one knows the classes of ``data`` and ``optimizer``.
"""

import inspect
import pydoc
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace

from litmoe import fast_imports
from litmoe.checksummed_json import known_fields
from litmoe.cli import (
    UserError,
    asks_for_help,
    current_class_path,
    explain,
    known_flags,
    make_parser,
    read_yaml,
    underscored,
    with_bare_switches,
)

# At run time only these two files of LitGPT are imported. A type checker reads the same classes in the usual way.
if TYPE_CHECKING:
    import litgpt.args as litgpt_args
    from litgpt.config import Config

    # As in LitGPT: `auto` becomes a number before anything computes with it.
    MicroBatchSize = int
else:
    litgpt_args = fast_imports.import_litgpt_module("args")
    Config = fast_imports.import_litgpt_module("config").Config
    MicroBatchSize = int | Literal["auto"]

PROJECT = Path(__file__).resolve().parent.parent
# Next to the package, so that scripts work in any folder.
DEFAULT_RUN = PROJECT / "train_config.yaml"

LoggerName = Literal["csv", "tensorboard", "wandb"]
Precision = Literal["bf16-mixed", "bf16-true", "16-mixed", "32-true"]
Recomputed = Literal["none", "block", "moe"]
Accelerator = Literal["auto", "cpu", "cuda", "mps"]

SHORT_FLAGS = {
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "max_seq_length": "train.max_seq_length",
}
"""Short flags, and the settings that they set."""

RUN_FILES = {"--config": "a YAML file", "--model": "a YAML file", "--upcycle": "a checkpoint folder"}
"""Flags of `run_train.py` with files that are read before the other flags, and what each expects."""

# LitGPT's classes under names of this module: jsonargparse imports the package of each class that it meets.


@dataclass
class ModelConfig(Config):
    """LitGPT's model config, unchanged"""


@dataclass
class TrainArgs(litgpt_args.TrainArgs):
    """LitGPT's, with explanations of what they do here"""

    save_interval: int | None = 1000
    """Optimizer steps between checkpoints; null: only by `checkpoint.every_minutes`"""
    log_interval: int = 1
    """Optimizer steps between log lines"""
    global_batch_size: int = 64
    """Sequences in an optimizer step, over all devices"""
    micro_batch_size: MicroBatchSize = 4
    """Sequences in one forward and backward of one device; auto: as many as fit into its memory (pretraining)"""
    lr_warmup_steps: int | None = 100
    """Optimizer steps with a rising learning rate"""
    lr_warmup_fraction: float | None = None
    """The same as a fraction of an epoch; set only one of the two"""
    epochs: int | None = None
    """End after so many passes over the training set"""
    max_tokens: int | None = None
    """End after so many tokens, over all devices"""
    max_steps: int | None = None
    """End after so many optimizer steps"""
    max_time: float | None = None
    """End after so many seconds; the run can be resumed"""
    max_seq_length: int | None = None
    """Tokens in a sequence; null: the model's block_size"""
    tie_embeddings: bool | None = None
    """Whether embedding and output layer share one matrix"""
    max_norm: float | None = None
    """Gradients with a larger norm are scaled down to it; null: no clipping"""
    min_lr: float = 6e-5
    """Learning rate of the last step"""


@dataclass
class LogArgs(litgpt_args.LogArgs):
    """LitGPT's, unchanged"""


@dataclass
class EvalArgs(litgpt_args.EvalArgs):
    """LitGPT's, explained for `--help`, and HellaSwag"""

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
    """LitGPT's; not used here"""
    hellaswag: str | None = None
    """HellaSwag questions to score: a JSONL file, or a name on the Hub (Rowan/hellaswag); null for none"""
    hellaswag_interval: int | None = None
    """Optimizer steps between two scores; null: `interval`"""
    hellaswag_limit: int | None = None
    """Score only the first N questions"""


@dataclass
class MoESettings:
    """How the experts are computed and balanced; the model's config describes the layer itself."""

    load_balancing_loss: float = 0.01
    """Weight of the load-balancing loss, a mean over layers (Switch Transformer, arXiv 2101.03961); 0 turns it off"""
    z_loss: float = 0.001
    """Weight of the router z-loss, a mean over layers (ST-MoE, arXiv 2202.08906); 0 turns it off"""
    bias_update_rate: float = 0.0
    """Step size of the selection bias of a sigmoid router (model.n_expert_groups) towards an even load (DeepSeek-V3,
    arXiv 2408.15664); usual: 0.001, with a small load_balancing_loss or none"""
    backend: Literal["auto", "grouped_mm", "triton", "loop"] = "auto"
    """What computes the experts (custom_moe/backends.py); auto chooses by GPU, type and widths. Checkpoints do not
    depend on it"""
    router: str | None = None
    """A router of your own by its class path, such as my_routers.ExpertChoice: a subclass of custom_moe.Router, which
    is imported and called. Other programs can't compute such a model. null: the router that the model's config
    describes"""


@dataclass
class ScheduleSettings:
    """The learning rate after its warm-up (`train.lr_warmup_steps`), from the optimizer's lr to `train.min_lr`."""

    name: Literal["cosine", "wsd"] = "cosine"
    """cosine: half a cosine down. wsd (warmup-stable-decay; MiniCPM, arXiv 2404.06395): constant, then linearly down
    at the end (arXiv 2405.18392), so that a longer run can continue from any checkpoint before the decay"""
    decay_fraction: float = 0.2
    """Fraction of all optimizer steps in which wsd decays"""


@dataclass
class CheckpointSettings:
    """When a run saves, in addition to `train.save_interval` (optimizer steps), and what it keeps."""

    every_minutes: float | None = 10.0
    """Most minutes between two saves, so the most that a power cut costs; null: only by `train.save_interval`"""
    keep_last: int | None = 3
    """Number of newest checkpoints to keep; an older one is deleted when the new one is complete. null keeps all"""
    keep_every: int | None = None
    """Also keep checkpoints with a step that is a multiple of this (a multiple of `train.save_interval`)"""


@dataclass
class SampleSettings:
    """The text that the model writes at each evaluation."""

    prompt: str | None = "Once upon a time"
    """The text to continue; null for no samples"""
    max_new_tokens: int = 64
    """Most tokens; a sample ends earlier at the end-of-text token (`eval.max_new_tokens` overrides this)"""
    temperature: float = 0.8
    """0 always takes the most probable token"""
    top_k: int | None = 50
    """Draw from the k most probable tokens"""
    seed: int = 1234
    """Seed of the sample's own random generator; the random state of the run does not change"""


@dataclass
class PrepareSettings:
    """Flags of `prepare_data.py` for a data folder that is still empty."""

    source: str | None = None
    """A corpus by name, or a file or folder of text; null: the text in the data folder"""
    tokenizer: str | None = None
    """A name on the Hugging Face Hub, a folder, or `train`; null: the one in tokenizer_dir, else gpt2"""
    vocab_size: int | None = None
    """Vocabulary size for `tokenizer: train`"""


@dataclass
class RunSettings:
    """All settings of `run_train.py`. Names and meanings up to `seed` are those of `litgpt.pretrain.setup`."""

    model: ModelConfig
    """The model, in LitGPT's fields; in a run file also the path of a YAML file with them"""
    train: TrainArgs
    """Batches, limits, learning-rate schedule, clipping"""
    eval: EvalArgs
    """Validation and HellaSwag during training"""
    # Any, because importing the types of these two fields imports torch.
    data: Any
    """A LitGPT data module; see `CLASS_SETTINGS`"""
    optimizer: Any
    """A function from parameter groups to an optimizer; see `CLASS_SETTINGS`"""
    log: LogArgs = field(default_factory=LogArgs)
    """Names for W&B"""
    out_dir: Path = Path("checkpoints")
    """Folder for checkpoints and metrics"""
    precision: Precision | None = None
    """Number format of the computation; null picks a fast one for this hardware"""
    initial_checkpoint_dir: Path | None = None
    """Start from the weights of this checkpoint folder"""
    upcycle: Path | None = None
    """A dense (SwiGLU) checkpoint folder: each expert starts as a copy of its feed-forward. Without --model the model
    is that of the checkpoint with 8 experts, 2 per token"""
    resume: bool | Literal["auto"] | Path = False
    """`auto` resumes the run in out_dir, or starts it if there is none; a checkpoint folder resumes from it"""
    devices: int | str = "auto"
    """Number of GPUs (or CPU processes); `auto`: all GPUs, or one CPU process"""
    num_nodes: int = 1
    """Number of machines"""
    accelerator: Accelerator = "auto"
    """The kind of device; auto: NVIDIA or AMD GPUs (cuda), else the CPU. mps, the GPU of a Mac, is only used on
    request"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: ddp (and auto) keeps the complete model on each; fsdp shards parameters,
    gradients and moments, for models too large for one device. Checkpoints are the same"""
    tokenizer_dir: Path = Path("data/tokenizer")
    """Folder of the tokenizer"""
    logger_name: LoggerName = "csv"
    """One logger in addition to the CSV file"""
    seed: int = 42
    """Seed of weights and data order"""
    loggers: list[LoggerName] | None = None
    """Several loggers at once; the CSV file is always written"""
    run_name: str | None = None
    """Name of the run for W&B and in the settings that are saved"""
    compile: bool | None = None
    """torch.compile; null turns it on if there is a CUDA GPU and a compiler"""
    document_masking: bool = False
    """Whether tokens attend only to their own document, in training and its validation, and not to other documents of
    the same window"""
    activation_checkpointing: Recomputed = "none"
    """What is computed twice to save memory, with the same results: nothing, complete blocks, or their experts"""
    progress: bool | None = None
    """Show a progress bar; null: in a terminal, and plain lines elsewhere"""
    overwrite: bool = False
    """Delete the existing run in out_dir and start a new one"""
    moe: MoESettings = field(default_factory=MoESettings)
    """Balance of the experts"""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """Learning-rate curve; optimizer groups with their own rates keep their ratio to the first group"""
    embedding_lr_factor: float = 1.0
    """Learning rate of the input embedding, as a multiple of what the optimizer gives it; also if the output layer
    shares the matrix"""
    zero_init_projections: bool = False
    """Whether the output projections of attention and feed-forward (of each expert) start at zero, so that each block
    at first passes its input on unchanged (muP, arXiv 2203.03466, appendix D.2); otherwise as LitGPT draws them"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """When the run saves and which checkpoints it keeps"""
    sample: SampleSettings = field(default_factory=SampleSettings)
    """Text generated at each evaluation"""
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    """Where text and tokenizer come from if the folders are empty"""
    hours: float | None = None
    """Length of the run by the clock, with everything from start-up to the last save, in place of train.max_tokens,
    max_steps and epochs: the run measures its speed and chooses the number of steps"""
    minutes: float | None = None
    """The same in minutes; with both, their sum"""
    wandb_dataset: str | None = None
    """A W&B dataset artifact to train on: `entity/project/name:alias`, or `project/name:alias` with WANDB_ENTITY"""
    wandb_artifacts_dir: Path = Path("data/wandb_artifacts")
    """Folder for W&B dataset artifacts"""

    @property
    def time_budget(self) -> float | None:
        """Length of the run in seconds; None: it has a number of tokens, steps or epochs."""
        if self.hours is None and self.minutes is None:
            return None
        return 3600 * (self.hours or 0) + 60 * (self.minutes or 0)

    @property
    def is_finetuning(self) -> bool:
        """Whether these are the settings of `finetune.py`."""
        return False

    @property
    def uses_lora(self) -> bool:
        """Whether the run trains LoRA updates instead of the weights."""
        return False


CLASS_SETTINGS = {
    "data": "Where the batches come from; `litgpt.data.TextFiles` works too",
    "optimizer": (
        "Any optimizer by class_path; it gets one parameter group with and one without weight decay."
        " litmoe.train.muon.Muon is for complete models; torchao.optim.AdamW8bit needs the least memory"
    ),
}
"""Settings that name a class (``class_path``, ``init_args``), with their help texts."""


@dataclass(frozen=True)
class ParsedRun:
    """Settings as objects, and the same settings as plain values that a YAML file can hold."""

    settings: RunSettings
    optimizer: dict[str, Any]
    """`class_path` and `init_args`"""
    resolved: dict[str, Any]
    """All settings, as they are saved with each checkpoint; a valid run file"""

    @property
    def has_auto_micro_batch(self) -> bool:
        """Whether the run chooses the size of its micro batches."""
        return bool(self.resolved["train"]["micro_batch_size"] == "auto")


def parse_run(argv: Sequence[str]) -> ParsedRun:
    """Read the run file and the flags. A flag overrides the run file, which overrides the defaults.

    Args:
        argv: command-line arguments. ``--config FILE`` names the run file (default: the project's
            ``train_config.yaml``), ``--model FILE`` a model file instead of the run file's. Without a model,
            ``--upcycle CHECKPOINT`` provides it.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing file, or a file that is no YAML mapping.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    # Flags that name files come first, because the contents of these files decide the defaults of all others.
    files, flags = extract_files(underscored(argv), RUN_FILES, SHORT_FLAGS)
    run_file = files["--config"] or DEFAULT_RUN
    run = read_run_file(run_file, files["--model"])
    if files["--upcycle"]:
        run["upcycle"] = str(files["--upcycle"])
        # The model is that of the checkpoint, unless a flag names another one.
        if not files["--model"]:
            run.pop("model", None)
    new_parser = partial(run_parser, with_help=asks_for_help(flags))
    check_quickly(new_parser, run_file, run, flags)
    if run.get("upcycle") and not run.get("model"):
        # Reading the config of a checkpoint imports LitGPT, so the quick check comes before.
        from litmoe.upcycling import upcycled_model

        run["model"] = upcycled_model(Path(str(run["upcycle"])))
    resolved, values = parse_settings(new_parser(), RunSettings, run_file, run, flags)
    # LitGPT's own class, so that it equals the config of a checkpoint.
    values["model"] = Config(**asdict(values["model"]))
    settings = RunSettings(**known_fields(RunSettings, values))
    return ParsedRun(settings=settings, optimizer=resolved["optimizer"], resolved=resolved)


def check_quickly(
    new_parser: Callable[..., ArgumentParser], run_file: Path, run: dict[str, Any], flags: list[str]
) -> None:
    """Report mistakes, ``--help`` included, before anything imports torch.

    Args:
        new_parser: such as ``run_parser``. Its parser without the settings ``data`` and ``optimizer`` is used, because
            their classes would have to be imported.

    Raises:
        UserError: as ``parse_run``.
    """
    if any(flag.split("=")[0] in ("--data.help", "--optimizer.help", "--print_config") for flag in flags):
        return  # these show the classes
    if "torch" in sys.modules:
        return  # the complete parse reports the same mistakes, and there is no import left to wait for
    # Checking `data` and `optimizer` would import their classes, and with them torch.
    without_classes = dict(run)
    for name in CLASS_SETTINGS:
        without_classes.pop(name, None)
    _parse_file_and_flags(new_parser(with_classes=False), run_file, without_classes, _without_class_flags(flags))


def _without_class_flags(flags: list[str]) -> list[str]:
    """Remove ``--data...`` and ``--optimizer...`` with their values."""
    remaining, is_class_flag = [], False
    for argument in flags:
        # A value belongs to the flag before it.
        if argument.startswith("--"):
            # --data.init_args.seed=1 belongs to data.
            is_class_flag = re.split("[.=]", argument[2:])[0] in CLASS_SETTINGS
        if not is_class_flag:
            remaining.append(argument)
    return remaining


def _parse_file_and_flags(parser: ArgumentParser, run_file: Path, run: dict[str, Any], flags: list[str]) -> Namespace:
    """Parse the contents of the run file, and the flags that override it.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    try:
        # The file is given as a first argument, so that the flags after it override it.
        return parser.parse_args(["--config", yaml.safe_dump(run), *with_bare_switches(parser, flags)])
    except Exception as error:
        # Only now the file alone, because each parse takes some tenths of a second.
        mistake = _mistake_in_file(parser, run)
        if mistake is not None:
            raise UserError(f"in {run_file}: {explain(mistake, parser, _known_names(parser, run))}") from None
        if not isinstance(error, ArgumentError):
            raise
        raise UserError(explain(str(error), parser, _known_names(parser, run), flags)) from None


def _mistake_in_file(parser: ArgumentParser, run: dict[str, Any]) -> str | None:
    """Return the error message about the contents of a run file, None without a mistake."""
    try:
        parser.parse_object(run)
    except Exception as error:
        return str(error)
    return None


def parse_settings(
    parser: ArgumentParser, kind: type[RunSettings], run_file: Path, run: dict[str, Any], flags: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings as plain values, and as objects for the fields of ``kind``."""
    try:
        namespace = _parse_file_and_flags(parser, run_file, run, flags)
        # Plain values before the classes are instantiated: these are saved with each checkpoint.
        resolved = yaml.safe_load(parser.dump(namespace, skip_none=False))
        # Top-level nulls now, because they would fail while the classes are instantiated.
        _check_nulls(kind, resolved)
        with warnings.catch_warnings():
            # LitGPT warns of a warm-up as long as the run. Ours is shortened then, and the run says so.
            warnings.filterwarnings("ignore", message="`--train.lr_warmup_steps` should be less")
            values = vars(parser.instantiate_classes(namespace))
    except ArgumentError as error:
        raise UserError(explain(str(error), parser, _known_names(parser, run), flags)) from None
    except UserError:
        # Already a message with a fix, for example of a data module.
        raise
    except Exception as error:  # checks of LitGPT's dataclasses, and of the classes that the settings name
        raise UserError(f"these settings do not fit together: {_describe_failed_check(error)}") from None
    # Nested ones here: only now the groups of settings are objects with known types.
    _check_nulls(kind, values)
    return resolved, values


def _describe_failed_check(error: Exception) -> str:
    # LitGPT checks some values with a bare assert, or not at all. Then the line of code says what failed.
    failed_line = traceback.extract_tb(error.__traceback__)[-1].line
    # The message of such an error, for example a missing key, means nothing without its type.
    if isinstance(error, ArithmeticError | LookupError):
        return f"{type(error).__name__} in `{failed_line}`"
    return str(error) or f"LitGPT requires `{failed_line}`"  # an assert has no message


def _check_nulls(kind: type, values: dict[str, Any]) -> None:
    """Raise ``UserError`` for settings that must not be null, because jsonargparse accepts null for anything."""
    nulls = list(_find_nulls(kind, values))
    if nulls:
        raise UserError(f"{', '.join(nulls)} must not be null: set a value, or delete the line to use the default.")


def _find_nulls(kind: type, values: dict[str, Any], path: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for setting in fields(kind):
        value = values.get(setting.name)
        hint = hints[setting.name]
        is_optional = setting.default is None or hint is Any or type(None) in get_args(hint)
        # Settings that name a class have the type Any, but can't be null.
        accepts_null = is_optional and setting.name not in CLASS_SETTINGS
        if value is None and setting.name in values and not accepts_null:
            yield path + setting.name
        elif is_dataclass(value):
            yield from _find_nulls(type(value), vars(value), f"{path}{setting.name}.")


def run_parser(*, with_classes: bool = True, with_help: bool = True) -> ArgumentParser:
    """Return the parser of ``run_train.py``: a flag for each field of ``RunSettings``, nested ones included.

    Args:
        with_classes: also parse ``data`` and ``optimizer``, which imports torch. Otherwise they are only listed in the
            help.
        with_help: as in ``make_parser``.
    """
    parser = make_parser(with_help=with_help, description="Pretrain a model with LitGPT.")
    parser.add_argument("--config", action="config", help="The run file (YAML); default: train_config.yaml")
    add_settings(parser, RunSettings, set(), with_classes)
    # SUPPRESS: a flag that is not given leaves no entry in the settings that are saved.
    parser.add_argument(
        "--plan",
        default=SUPPRESS,
        metavar="GPU",
        help="Show what the run needs on this machine or on a GPU by name (rtx3060), without training",
    )
    add_short_flags(parser, SHORT_FLAGS)
    if with_classes:
        paths = {"train_data_path": "data/custom_text/train", "val_data_path": "data/custom_text/val"}
        # Only here, because parsing these defaults imports the classes.
        parser.set_defaults(
            {
                "data": {"class_path": "litmoe.data.TokenizedText", "init_args": paths},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-4, "weight_decay": 0.01}},
            }
        )
    return parser


def add_settings(parser: ArgumentParser, kind: type[RunSettings], skip: set[str], with_classes: bool) -> None:
    # Optimizers of other packages (torchao) declare no types for their parameters.
    parser.add_class_arguments(kind, sub_configs=True, fail_untyped=False, skip={*skip, *CLASS_SETTINGS})
    if with_classes:
        import torch
        from litgpt.data import DataModule

        optimizer_type = Callable[[Iterable[Any]], torch.optim.Optimizer]
        # A class made here, because the types of its fields need torch and LitGPT.
        classes = make_dataclass("ClassSettings", [("data", DataModule), ("optimizer", optimizer_type)])
        parser.add_class_arguments(classes, sub_configs=True, fail_untyped=False)
        # Such a class has no docstrings for its fields, so the help texts are set afterwards.
        for action in parser._actions:
            action.help = CLASS_SETTINGS.get(action.dest, action.help)
        return
    # For --help only: the second pass parses these settings.
    for name, description in CLASS_SETTINGS.items():
        parser.add_argument(
            f"--{name}.help", default=SUPPRESS, metavar="CLASS", help=f"Show the parameters of a {name} class"
        )
        parser.add_argument(f"--{name}", default=SUPPRESS, metavar="CLASS", help=description)


def add_short_flags(parser: ArgumentParser, short_flags: dict[str, str]) -> None:
    """List the short flags in the help. ``extract_files`` replaces them before anything is parsed."""
    group = parser.add_argument_group("Short forms")
    for short, target in short_flags.items():
        group.add_argument(f"--{short}", default=SUPPRESS, help=f"the same as --{target}")


def read_run_file(path: Path, model_file: Path | None = None) -> dict[str, Any]:
    """Return the run file as plain values, with the contents of its model file (or of ``model_file``).

    A path under ``model:`` is looked up next to the run file, then in the working directory.
    """
    run = read_yaml(path)
    if model_file is None and isinstance(run.get("model"), str):
        # A run file and its model file can be moved together.
        next_to_run_file = path.parent / run["model"]
        model_file = next_to_run_file if next_to_run_file.is_file() else Path(run["model"])
        if not model_file.is_file():
            raise UserError(
                f"no config file at {run['model']}: {path} names it under `model:`, but it is neither in {path.parent}"
                " nor in the working directory. Correct the line, or give the file with --model."
            )
    if model_file is not None:
        run["model"] = read_yaml(model_file)
    return run


def _known_names(parser: ArgumentParser, run: dict[str, Any]) -> list[str]:
    """Return all flags of the parser and the parameters of the classes that the run file names."""
    names = known_flags(parser)
    for group in CLASS_SETTINGS:
        chosen = run.get(group) or {}
        class_path = chosen.get("class_path") if isinstance(chosen, dict) else chosen
        with suppress(Exception):  # an import error, or a name that does not exist
            chosen_class: Any = pydoc.locate(class_path or parser.get_default(group)["class_path"])
            parameters = inspect.signature(chosen_class).parameters
            # params is what the training loop gives to an optimizer, not a setting.
            names += [f"{group}.init_args.{name}" for name in parameters if name != "params"]
    return names


def extract_files(
    arguments: list[str], expected: dict[str, str], short_flags: dict[str, str]
) -> tuple[dict[str, Path | None], list[str]]:
    """Split the flags that name files from the others, and replace short flags by full ones.

    Args:
        arguments: from the command line.
        expected: the flags that name files, and what each expects.
        short_flags: names of short flags, and of the full ones.
    """
    files: dict[str, Path | None] = dict.fromkeys(expected)
    full_flags = {f"--{short}": f"--{full}" for short, full in short_flags.items()}
    flags: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag not in files:
            # Commands written for 0.1.0 may name classes by its paths.
            flags.append(current_class_path(full_flags.get(flag, flag) + equals + value))
            continue
        # Both --config=FILE and --config FILE are allowed.
        value = value if equals else next(remaining, "")
        if not value:
            raise UserError(f"{flag} expects the path of {expected[flag]}.")
        files[flag] = Path(value)
    return files, flags
