"""The settings of ``finetune.py``: those of a training run, and LoRA. Like ``config.py``, this imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from litmoe import checkpoints
from litmoe.checksummed_json import known_fields
from litmoe.cli import asks_for_help, make_parser, read_yaml, underscored
from litmoe.config import (
    PROJECT,
    SHORT_FLAGS,
    ParsedRun,
    RunSettings,
    add_settings,
    add_short_flags,
    check_quickly,
    extract_files,
    parse_settings,
)

DEFAULT_FINETUNING = PROJECT / "configs" / "finetune.yaml"

FINETUNE_SHORT_FLAGS = SHORT_FLAGS | {
    "data_dir": "data.init_args.data_dir",
    "prompt_style": "data.init_args.prompt_style",
    "lr": "optimizer.init_args.lr",
    "epochs": "train.epochs",
}
"""Short flags, and the settings that they set."""

LORA_FIELDS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_query", "lora_key", "lora_value"),
    *("lora_projection", "lora_mlp", "lora_head"),
)
"""The LoRA settings, in LitGPT's names."""

OF_THE_CHECKPOINT: set[str] = {
    *("model", "initial_checkpoint_dir", "tokenizer_dir"),  # taken from it
    # only for pretraining
    *("upcycle", "prepare", "wandb_dataset", "wandb_artifacts_dir", "zero_init_projections", "document_masking"),
}
"""Settings that `finetune.py` has no flags for."""


@dataclass
class FinetuneSettings(RunSettings):
    """All settings of `finetune.py`; the LoRA fields are those of `litgpt.finetune.lora.setup`."""

    compile: bool | None = False
    """torch.compile; rows of all numbers and lengths share their graphs"""
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

    @property
    def is_finetuning(self) -> bool:
        """Whether these are the settings of `finetune.py`."""
        return True

    @property
    def uses_lora(self) -> bool:
        """Whether the run trains LoRA updates instead of the weights."""
        return self.lora_r > 0


def parse_finetuning(argv: Sequence[str]) -> ParsedRun:
    """Read the run file and the flags of ``finetune.py``. Model and tokenizer are those of the checkpoint.

    Args:
        argv: command-line arguments. The checkpoint may come first, without its flag; the default is the newest one.
            ``--config FILE`` names the run file (default: ``configs/finetune.yaml``).

    Raises:
        UserError, SystemExit: as ``parse_run``; also if there is no such checkpoint.
    """
    # The checkpoint may be given without its flag, as for the other scripts that read one.
    if argv and not argv[0].startswith("-"):
        argv = [f"--checkpoint_dir={argv[0]}", *argv[1:]]
    files, flags = extract_files(underscored(argv), {"--config": "a YAML file"}, FINETUNE_SHORT_FLAGS)
    run_file = files["--config"] or DEFAULT_FINETUNING
    run = read_yaml(run_file)
    # Mistakes in the settings are reported before torch is imported and before a checkpoint is searched for.
    new_parser = partial(finetuning_parser, with_help=asks_for_help(flags))
    check_quickly(new_parser, run_file, run, flags)
    resolved, values = parse_settings(new_parser(), FinetuneSettings, run_file, run, flags)
    folder = _find_base(values["checkpoint_dir"], values["out_dir"], bool(values["resume"]))
    # The folder that was found is stored, because another one may be the newest when the run is resumed.
    resolved["checkpoint_dir"] = str(folder)
    if resolved["train"]["max_seq_length"] is None:  # positions beyond it were never trained
        values["train"].max_seq_length = resolved["train"]["max_seq_length"] = checkpoints.context_of(folder)
    # Settings that the checkpoint decides have no flags, so they have no value yet.
    given = known_fields(FinetuneSettings, values)
    from_checkpoint = {
        "model": checkpoints.load_config(folder),
        "checkpoint_dir": folder,
        "initial_checkpoint_dir": folder,
        "tokenizer_dir": folder,
    }
    settings = FinetuneSettings(**given | from_checkpoint)
    return ParsedRun(settings=settings, optimizer=resolved["optimizer"], resolved=resolved)


def _find_base(given: Path, out_dir: Path, resume: bool) -> Path:
    """Return the checkpoint to tune: the one given, or that of the run to resume, or the newest."""
    if given != FinetuneSettings.checkpoint_dir:
        return checkpoints.resolve(given)
    # A resumed run keeps its base. The newest checkpoint may be one of the run itself.
    run_file = out_dir / "run_config.yaml"
    base = read_yaml(run_file).get("checkpoint_dir") if resume and run_file.is_file() else None
    return checkpoints.resolve(Path(str(base)) if base else None)


def finetuning_parser(*, with_classes: bool = True, with_help: bool = True) -> ArgumentParser:
    """Return the parser of ``finetune.py``; see ``run_parser``."""
    parser = make_parser(with_help=with_help, description="Tune a checkpoint to follow instructions, with LitGPT.")
    parser.add_argument("--config", action="config", help="The run file (YAML); default: configs/finetune.yaml")
    add_settings(parser, FinetuneSettings, OF_THE_CHECKPOINT, with_classes)
    add_short_flags(parser, FINETUNE_SHORT_FLAGS)
    return parser
