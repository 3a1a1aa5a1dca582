"""Checks before the first step: data, a tokenizer that fits the model, a folder to write to, a checkpoint."""

import glob
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from litgpt import Config, Tokenizer

from litmoe import checkpoints
from litmoe.cli import UserError, command, quoted
from litmoe.config import ParsedRun, RunSettings
from litmoe.data.files import text_files
from litmoe.data.manifest import SPLITS, TEXT, find_tokenizer, flags_to_repeat, manifest_path
from litmoe.data.manifest import read as read_manifest
from litmoe.data.prepare import PrepareArgs, check_placed_text, prepare
from litmoe.data.text_data import TokenizedText
from litmoe.data.tokenizers import litgpt_tokenizer
from litmoe.evaluation.hellaswag import read_questions
from litmoe.hardware import processes
from litmoe.inference.generate import check_sampling, encode_prompt
from litmoe.run_files import METRICS_FILE, RUN_CONFIG
from litmoe.train.logs import run_files
from litmoe.train.memory import divisors
from litmoe.train.resume import refusal, tokens_provenance
from litmoe.train.saving import main_process
from litmoe.upcycling import MOE_FIELDS, check_experts, check_same_tokenizer
from litmoe.validation import check

LOADED_AT_ONCE = 4
"""Sequences in a micro batch of the loader if ``train.micro_batch_size`` is auto; LitGPT's default"""


def ready(run: ParsedRun) -> tuple[ParsedRun, Path | None]:
    """Prepare everything that pretraining needs. Every rank of a run may call it.

    Returns:
        The run, with the data paths of its W&B dataset or of moved data, and the checkpoint folder to resume from (None
        for a new run).

    Raises:
        UserError: something is missing or does not fit. Nothing is lost then.
    """
    run = _with_wandb_dataset(run)
    settings = run.settings
    if run.has_auto_micro_batch:
        devices, num_nodes = processes(settings)
        per_rank = settings.train.global_batch_size // (devices * num_nodes)
        # What the loader and eval.max_iters count. A step groups them into what fits (see fitting.py).
        settings.train.micro_batch_size = max(size for size in divisors(per_rank) if size <= LOADED_AT_ONCE)
    # What can fail in seconds comes first, because tokenizing can take hours.
    resume_from = find_checkpoint(settings)
    # `auto` starts a new run, which has stricter checks. Any other new run was checked when its settings were read.
    if settings.resume and resume_from is None:
        check(replace(settings, resume=False), run.optimizer)
    _check_start(settings, resume_from)
    if settings.eval.hellaswag is not None and main_process():
        # The run reads them again. Here only a mistake is found before the text is tokenized.
        read_questions(settings.eval.hellaswag, settings.eval.hellaswag_limit)

    if resume_from is not None:
        run = _with_moved_data(run, resume_from)
        settings = run.settings
    prepare_data(settings)

    # These need the tokenizer, which may have been trained just now.
    tokenizer = check_vocabulary(settings.tokenizer_dir, settings.model)
    start = settings.initial_checkpoint_dir or settings.upcycle
    if start is not None:
        check_same_tokenizer(start, settings.tokenizer_dir)
    check_sample(settings, tokenizer)
    return run, resume_from


def _check_start(settings: RunSettings, resume_from: Path | None) -> None:
    """Check that the checkpoints that a run starts or resumes from have its model."""
    if settings.initial_checkpoint_dir is not None:
        check_same_model(settings.initial_checkpoint_dir, settings.model)
        checkpoints.check_router(settings.initial_checkpoint_dir, settings.moe.router, "--moe.router")
    if resume_from is not None:
        check_same_router(resume_from, settings)
        if settings.upcycle is not None:
            check_same_start(resume_from, settings.upcycle)
        check_same_model(resume_from, settings.model)
    elif settings.upcycle is not None:
        check_experts(settings.upcycle, settings.model, tie_embeddings=bool(settings.train.tie_embeddings))
        check_same_model(settings.upcycle, settings.model, apart_from=MOE_FIELDS)


def prepare_data(settings: RunSettings) -> None:
    """Tokenize the text if that was not done yet, and get the text first if the run file names a source."""
    if not isinstance(settings.data, TokenizedText):
        return
    data_dir = settings.data.data_dir
    manifest = read_manifest(data_dir)
    has_text = bool(text_files(data_dir / "train"))
    flags: dict[str, Any]
    if manifest is not None:
        # Other sources are elsewhere, or their text was removed to save space. Their tokens are used as they are.
        sources_at_hand = ("sample", TEXT) if has_text else ("sample",)
        if manifest.source.name not in sources_at_hand:
            return
        # Existing tokens keep their settings.
        flags = flags_to_repeat(manifest)
    elif has_text:
        # No source: the text in the folder itself.
        flags = {"source": None}
    else:
        # The `prepare` section of the run file only fills an empty folder.
        check_placed_text(data_dir)
        if settings.prepare.source is None:
            raise UserError(
                f"no data: there is no text in {settings.data.train_data_path}."
                f" `{command('prepare_data.py', '--data_dir', data_dir)}` downloads TinyStories. Add --source PATH for"
                " your own text, or --source sample for the built-in stories."
            )
        flags = {"source": settings.prepare.source}
    if not (settings.tokenizer_dir / "tokenizer.json").is_file():
        flags |= {"tokenizer": settings.prepare.tokenizer, "vocab_size": settings.prepare.vocab_size}
    prepare(PrepareArgs(data_dir=data_dir, tokenizer_dir=settings.tokenizer_dir, **flags))


def check_vocabulary(tokenizer_dir: Path, config: Config) -> Tokenizer:
    """Return the run's tokenizer.

    Raises:
        UserError: there is none, or it has ids beyond the model's embedding. Those would raise an IndexError at some
            step, or read other memory on a GPU.
    """
    try:
        tokenizer = litgpt_tokenizer(tokenizer_dir)
    except Exception as error:
        # Any error of the tokenizers library for a broken file.
        download = command("prepare_data.py", "--tokenizer", "gpt2", "--tokenizer_dir", tokenizer_dir)
        raise UserError(
            f"no usable tokenizer in {tokenizer_dir} ({error or type(error).__name__}); expected a tokenizer.json."
            f" `{download}` downloads one."
        ) from None
    size = tokenizer.vocab_size
    if tokenizer.backend == "huggingface":
        # Ids may have gaps.
        size = max(tokenizer.processor.get_vocab().values()) + 1
    if size > (config.padded_vocab_size or 0):
        raise UserError(
            f"the tokenizer in {tokenizer_dir} has {size:,} tokens, but the model's vocabulary holds"
            f" {config.padded_vocab_size:,}; enlarge it: --model.vocab_size {size} --model.padded_vocab_size {size}"
        )
    return tokenizer


def check_sample(settings: RunSettings, tokenizer: Tokenizer) -> None:
    """Check the settings of the samples now, not at the first evaluation."""
    sample = settings.sample
    if sample.prompt is None:
        return
    new_tokens = settings.eval.max_new_tokens or sample.max_new_tokens
    check_sampling(1, new_tokens, sample.temperature, sample.top_k, 1.0)
    context = settings.train.max_seq_length or settings.model.block_size
    length = len(encode_prompt(tokenizer, sample.prompt))
    if length >= context:
        raise UserError(
            f"sample.prompt has {length} tokens, but the context has {context}; use a shorter --sample.prompt, or null"
            " for no samples."
        )


def find_checkpoint(settings: RunSettings) -> Path | None:
    """Return the verified checkpoint folder that ``resume`` names, or None for a new run.

    Raises:
        UserError: there is none, it is damaged, or the run would replace other checkpoints.
    """
    if isinstance(settings.resume, Path):
        return _named_checkpoint(settings, settings.resume)
    if settings.resume:
        return _newest_checkpoint(settings)
    check_unoccupied(settings)
    return None


def _named_checkpoint(settings: RunSettings, path: Path) -> Path:
    folder = checkpoints.resolve(path)
    checkpoints.verify(folder)
    # A checkpoint of another run, which this run does not write into.
    if folder.resolve().parent != settings.out_dir.resolve():
        check_unoccupied(settings)
        return folder
    # The run would write checkpoints of the same steps again, next to those of the old one.
    newer = checkpoints.newer(folder)
    if newer and not settings.overwrite:
        raise UserError(
            f"{settings.out_dir} holds checkpoints of later steps than {folder.name}:"
            f" {', '.join(path.name for path in newer[:4])}. Delete them with --overwrite, or keep them and continue"
            " from this one elsewhere with --out_dir."
        )
    return folder


def _newest_checkpoint(settings: RunSettings) -> Path | None:
    out_dir = settings.out_dir
    folder, damages = checkpoints.newest_undamaged(out_dir)
    for damage in damages:
        _print_once(f"warning: {damage}; it is skipped.")
    if folder is not None:
        return folder
    if damages:
        raise UserError(
            f"no checkpoint in {out_dir} is complete. Start again with --overwrite instead of --resume, or elsewhere"
            " with --out_dir."
        )
    if settings.resume is True:  # else it is `auto`
        raise UserError(f"no checkpoint to resume in {out_dir}; --resume auto starts a new run if there is none.")
    not_resumable = [path.parent.name for path in out_dir.glob(f"*/{checkpoints.COMPLETE_FILE}")]
    if not_resumable:
        raise UserError(
            f"{out_dir} holds {not_resumable[0]}, which can't be resumed (an imported checkpoint, for example) and"
            " which a new run would replace. Put the run elsewhere with --out_dir, or start with --overwrite instead of"
            " --resume."
        )
    _print_once(f"Nothing to resume in {out_dir}: this is a new run.")
    return None


def _print_once(line: str) -> None:
    """Print on the main process only."""
    if main_process():
        print(line)


def check_unoccupied(settings: RunSettings) -> None:
    """Raise ``UserError`` if ``out_dir`` holds another run that must not be deleted."""
    _check_not_in_checkpoint(settings.out_dir)
    if not main_process():
        # Rank 0 of this run may have written there already.
        return
    # A settings file alone is not worth protecting.
    files = run_files(settings.out_dir)
    old_run = {path.resolve() for path in files if path.name == METRICS_FILE or path.is_dir()}
    if old_run and not settings.overwrite:
        names = ", ".join(sorted(path.name for path in old_run)[:4])
        raise UserError(
            f"{settings.out_dir} holds a run already ({names}). Continue it with --resume auto, put this one elsewhere"
            " with --out_dir, or delete the old one with --overwrite."
        )
    start = settings.initial_checkpoint_dir or settings.upcycle
    if start is not None and old_run.intersection([start.resolve(), *start.resolve().parents]):
        raise UserError(f"--overwrite would delete {start}, which this run starts from; choose another --out_dir.")


def _check_not_in_checkpoint(out_dir: Path) -> None:
    # The next save of the checkpoint's own run would delete a run inside it.
    for folder in (out_dir, *out_dir.parents):
        if (folder / checkpoints.COMPLETE_FILE).is_file():
            elsewhere = quoted(f"{folder.parent}-2")
            raise UserError(f"{folder} is a checkpoint; put the run elsewhere: --out_dir {elsewhere}")


def check_same_model(folder: Path, config: Config, apart_from: Collection[str] = ()) -> None:
    """Raise ``UserError`` with the fields in which the checkpoint's model differs from the run's."""
    saved, wanted = asdict(checkpoints.load_config(folder)), asdict(config)
    # These fields change neither weights nor computation.
    ignored = {"name", "hf_config", "vocab_size", "padding_multiple", *apart_from}
    names = sorted(name for name in wanted.keys() - ignored if saved[name] != wanted[name])
    if not names:
        return
    different = [f"{name}: {saved[name]} there, {wanted[name]} here" for name in names]
    if apart_from:
        advice = "Omit --model to use its own config."
    else:
        advice = f"Use its own config: --model {quoted(folder / 'model_config.yaml')}"
    raise UserError(f"{folder} holds another model than this run's: {'; '.join(different)}. {advice}")


def check_same_router(folder: Path, settings: RunSettings) -> None:
    """Raise ``UserError`` if a resumed run would have another router."""
    checkpoints.check_router(folder, settings.moe.router, "--moe.router")
    if settings.moe.router is not None and checkpoints.recorded_router(folder) is None:
        problem = f"{folder} was trained with the router that its model config describes"
        raise refusal(folder, settings, problem, "Resume without --moe.router")


def check_same_start(folder: Path, upcycle: Path) -> None:
    """Raise ``UserError`` if the run of a checkpoint to resume started from another dense checkpoint."""
    start = checkpoints.load_hyperparameters(folder).get("upcycle")
    if start is not None and Path(start).resolve() == upcycle.resolve():
        return
    raise UserError(
        f"{folder} is from a run that started {f'from {start}' if start else 'without --upcycle'}, not from {upcycle}."
        f" Omit --upcycle to continue it (--config {quoted(folder.parent / RUN_CONFIG)}), or start another run"
        " with another --out_dir."
    )


def _with_wandb_dataset(run: ParsedRun) -> ParsedRun:
    settings = run.settings
    if settings.wandb_dataset is None:
        return run
    from litmoe.data.artifacts import fetch_dataset

    if not isinstance(settings.data, TokenizedText):
        raise UserError("--wandb_dataset downloads tokens, which only litmoe.data.TokenizedText reads; omit --data.")
    data_dir = fetch_dataset(settings.wandb_dataset, settings.wandb_artifacts_dir)
    return _with_data(run, data_dir, data_dir / "tokenizer")


def _with_moved_data(run: ParsedRun, resume_from: Path) -> ParsedRun:
    """Return the run with the paths where the tokens of its checkpoint are now, if they were moved nearby.

    Raises:
        UserError: they are not nearby, and there is nothing to make them from.
    """
    data = run.settings.data
    if not isinstance(data, TokenizedText):
        return run
    if manifest_path(data.data_dir).is_file() or text_files(data.data_dir / "train"):
        # The tokens are in their place, or can be made again there.
        return run
    provenance = tokens_provenance(resume_from / checkpoints.MANIFEST, *SPLITS)

    def has_same_tokens(folder: Path) -> bool:
        manifest = read_manifest(folder)
        return manifest is not None and manifest.made_from(*SPLITS) == provenance

    data_dir = find_moved_data(data.data_dir, has_same_tokens)
    if data_dir is None:
        if run.settings.prepare.source is not None:
            # The tokens can be made from the source.
            return run
        raise UserError(
            f"{resume_from} was trained on tokens in {data.data_dir}, which does not exist. No folder next to it, next"
            " to its parent or in data/ contains the same tokens. Give their place:"
            " --data.init_args.train_data_path FOLDER/train --data.init_args.val_data_path FOLDER/val"
        )
    # The tokenizer was usually moved together with the data.
    tokenizer_dir = run.settings.tokenizer_dir
    places = (tokenizer_dir, data_dir / tokenizer_dir.name, data_dir.parent / tokenizer_dir.name)
    return _with_data(run, data_dir, find_tokenizer(places, provenance[0]) or tokenizer_dir)


def find_moved_data(old: Path, is_same: Callable[[Path], bool]) -> Path | None:
    """Return the folder near ``old`` that contains the same data now, and print that; None if there is none.

    Args:
        old: where the data was.
        is_same: whether a folder contains the same data.
    """
    parent, outer = old.absolute().parent, old.absolute().parent.parent
    candidates = [
        *sorted(parent.glob("*")),  # renamed
        *sorted(outer.glob("*")),  # moved one level up
        *sorted(outer.glob(f"*/{glob.escape(old.name)}")),  # moved to a folder next to its parent
        *sorted(Path("data").glob("*")),
    ]
    for folder in candidates:
        # Errors mean: not a data folder, or one of a newer version.
        with suppress(OSError, UserError):
            if is_same(folder):
                _print_once(f"The data of {old} is in {folder} now and is used from there.")
                return folder
    return None


def _with_data(run: ParsedRun, data_dir: Path, tokenizer_dir: Path) -> ParsedRun:
    """Return the run with the tokens and the tokenizer of these folders."""
    settings = run.settings
    assert isinstance(settings.data, TokenizedText)
    paths: dict[str, Any] = {"train_data_path": data_dir / "train", "val_data_path": data_dir / "val"}
    data = replace(settings.data, **paths)
    resolved: dict[str, Any] = {**run.resolved, "tokenizer_dir": str(tokenizer_dir)}
    # The settings are saved as YAML, which has no paths.
    texts = {name: str(path) for name, path in paths.items()}
    resolved["data"] = {**resolved["data"], "init_args": {**resolved["data"]["init_args"], **texts}}
    return replace(run, settings=replace(settings, data=data, tokenizer_dir=tokenizer_dir), resolved=resolved)
