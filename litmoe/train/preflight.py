"""Checks before the first step: data, a tokenizer that fits the model, a folder to write to, a checkpoint."""

import glob
import json
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from litgpt import Config, Tokenizer

from litmoe import checkpoints
from litmoe.cli import UserError, command, quoted
from litmoe.config import LORA_FIELDS, FinetuneSettings, ParsedRun, RunSettings
from litmoe.data import InstructionData, TokenizedText, conversations
from litmoe.data.conversations import Message
from litmoe.data.data_dir import check_placed_text
from litmoe.data.files import text_files
from litmoe.data.instructions import conversations as read_conversations
from litmoe.data.manifest import SPLITS, flags_to_repeat, manifest_path, tokenizer_fingerprint
from litmoe.data.manifest import read as read_manifest
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.data.sft_data import longer_context
from litmoe.data.tokenizers import litgpt_tokenizer
from litmoe.evaluation.hellaswag import read_questions
from litmoe.inference.generate import check_sampling, encode_prompt
from litmoe.train.logs import METRICS_FILE, run_files
from litmoe.train.resume import new_run_flags, tokens_provenance
from litmoe.upcycling import MOE_FIELDS, check_experts, check_same_tokenizer
from litmoe.validation import check


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
    resume_from = find_checkpoint(settings)
    if settings.resume and resume_from is None:  # `auto` starts a new run, which has stricter checks
        check(replace(settings, resume=False), run.optimizer)
    _check_start(settings, resume_from)
    if settings.eval.hellaswag is not None and main_process():
        read_questions(settings.eval.hellaswag, settings.eval.hellaswag_limit)  # before hours of tokenizing
    if resume_from is not None:
        run = _with_moved_data(run, resume_from)
        settings = run.settings
    prepare_data(settings)
    tokenizer = check_vocabulary(settings.tokenizer_dir, settings.model)
    start = settings.initial_checkpoint_dir or settings.upcycle
    if start is not None:
        check_same_tokenizer(start, settings.tokenizer_dir)
    check_sample(settings, tokenizer)
    if main_process():
        check_writable(settings.out_dir)
    return run, resume_from


def _check_start(settings: RunSettings, resume_from: Path | None) -> None:
    """Check that the checkpoints that a run starts or resumes from have its model."""
    if settings.initial_checkpoint_dir is not None:
        refuse_openai_gpt2(settings.initial_checkpoint_dir)
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


def ready_to_finetune(settings: RunSettings) -> Path | None:
    """Prepare everything that finetuning needs, and return the checkpoint folder to resume from, or None.

    Raises:
        UserError: something is missing or does not fit. Nothing is lost then.
    """
    assert isinstance(settings, FinetuneSettings)
    if not isinstance(settings.data, InstructionData):
        raise UserError(
            f"finetuning needs conversations, and the run's data is {type(settings.data).__name__}; expected"
            " litmoe.data.InstructionData."
        )
    checkpoints.check_router(settings.checkpoint_dir, settings.moe.router, "--moe.router")
    resume_from = find_checkpoint(settings)
    if resume_from is not None:
        check_same_router(resume_from, settings)
        check_same_model(resume_from, settings.model)
        check_same_tuning(resume_from, settings)
        _find_moved_instructions(settings, resume_from)
    tokenizer = check_vocabulary(settings.tokenizer_dir, settings.model)
    settings.data.connect(tokenizer, settings.train.micro_batch_size, settings.model.block_size)
    settings.data.prepare_data()
    check_sampling(1, settings.sample.max_new_tokens, settings.sample.temperature, settings.sample.top_k, 1.0)
    question(settings, tokenizer)
    if main_process():
        check_writable(settings.out_dir)
    return resume_from


def _find_moved_instructions(settings: FinetuneSettings, resume_from: Path) -> None:
    """Point ``data_dir`` to where the conversations of the checkpoint are now, if they were moved nearby.

    Otherwise ``prepare_data`` reports that there are none.
    """
    data = settings.data
    saved = resume_from / checkpoints.INSTRUCTIONS
    if data.manifest_path.is_file() or not saved.is_file():
        return
    content, name = saved.read_bytes(), data.manifest_path.name
    moved_to = _moved_to(data.data_dir, lambda folder: (folder / name).read_bytes() == content)
    if moved_to is not None:
        data.data_dir = moved_to


def check_same_tuning(folder: Path, settings: FinetuneSettings) -> None:
    """Raise ``UserError`` if a resumed run would have other LoRA weights or another prompt style."""
    saved = checkpoints.load_hyperparameters(folder)
    if "lora_r" not in saved:
        raise UserError(
            f"{folder} is from a pretraining run, which finetuning can't resume; start from its weights:"
            f" {new_run_flags(folder, settings)}"
        )
    saved |= saved["data"].get("init_args", {})
    present = {name: getattr(settings, name) for name in LORA_FIELDS}
    has_lora = saved["lora_r"] or present["lora_r"]
    present = (present if has_lora else {}) | {"prompt_style": settings.data.prompt_style}
    changed = []
    for name, value in present.items():
        if name in saved and saved[name] != value:  # older versions did not have all of these settings
            changed.append(f"{name} was {saved[name]} and is now {value}")
    if changed:
        raise UserError(
            f"{folder} can't be resumed with other settings: {'; '.join(changed)}. Resume with the old ones, or start a"
            f" new run from its weights: {new_run_flags(folder, settings)}"
        )


def question(settings: FinetuneSettings, tokenizer: Tokenizer) -> str:
    """Return the prompt of the sample at each evaluation, in the run's style.

    It is ``sample.prompt``, or the first validation question that leaves room for an answer.

    Raises:
        UserError: the prompt is too long, or all validation questions are.
    """
    data = settings.data
    style = conversations.prompt_style(data.prompt_style)
    context = settings.train.max_seq_length or settings.model.block_size
    if settings.sample.prompt is None:
        prompts = []
        for conversation in read_conversations(data.data_dir, "val"):
            prompts.append(list(takewhile(lambda message: message["role"] != "assistant", conversation)))
    else:
        prompts = [[Message(role="user", content=settings.sample.prompt)]]
    lengths = []
    for messages in prompts:
        messages = [conversations.without_special_tokens(message, tokenizer) for message in messages]
        lengths.append(len(conversations.encode_prompt(messages, tokenizer, style)))
        if lengths[-1] < context:
            return conversations.prompt_text(messages, style)
    if settings.sample.prompt is not None:
        raise UserError(
            f"the sample's prompt has {lengths[0]} tokens, but the context has {context};"
            " give a shorter one with --sample.prompt."
        )
    raise UserError(
        f"none of the {len(lengths):,} held-out conversations of {data.data_dir} fits: {min(lengths):,} to"
        f" {max(lengths):,} tokens come before their first answer, and the context has {context:,}."
        f" {longer_context(context, settings.model.block_size)}"
    )


def prepare_data(settings: RunSettings) -> None:
    """Tokenize the text if that was not done yet, and get the text first if the run file names a source."""
    data = settings.data
    if not isinstance(data, TokenizedText):
        return
    data_dir = Path(data.train_data_path).parent
    source = settings.prepare.source
    has_text = _has_text(data)
    if not has_text and manifest_path(data_dir).is_file():
        return  # the text was removed to save space
    if not has_text:
        # Otherwise the run file's source would replace it.
        check_placed_text(data_dir)
    if not has_text and source is None:
        raise UserError(
            f"no data: there is no text in {data.train_data_path}."
            f" `{command('prepare_data.py', '--data_dir', data_dir)}` fetches TinyStories;"
            " with --source PATH it takes your own text, with --source sample the built-in stories."
        )
    # The run file's `prepare` only fills what is empty. Existing text is tokenized with the settings of its tokens.
    found = read_manifest(data_dir)
    flags = flags_to_repeat(data_dir, found) if has_text and found else {"source": source if not has_text else None}
    if not (settings.tokenizer_dir / "tokenizer.json").is_file():
        flags |= {"tokenizer": settings.prepare.tokenizer, "vocab_size": settings.prepare.vocab_size}
    prepare(PrepareArgs(data_dir=data_dir, tokenizer_dir=settings.tokenizer_dir, **flags))


def _has_text(data: TokenizedText) -> bool:
    return bool(text_files(data.train_data_path))


def check_vocabulary(tokenizer_dir: Path, config: Config) -> Tokenizer:
    """Return the run's tokenizer.

    Raises:
        UserError: there is none, or it has ids beyond the model's embedding. Those would raise an IndexError at some
            step, or read other memory on a GPU.
    """
    try:
        tokenizer = litgpt_tokenizer(tokenizer_dir)
    except Exception as error:  # any error of the tokenizers library for a broken file
        brings_one = command("prepare_data.py", "--tokenizer", "gpt2", "--tokenizer_dir", tokenizer_dir)
        raise UserError(
            f"no usable tokenizer in {tokenizer_dir} ({error or type(error).__name__}); expected a tokenizer.json:"
            f" `{brings_one}` brings one."
        ) from None
    if tokenizer.backend == "huggingface":
        size = max(tokenizer.processor.get_vocab().values()) + 1  # ids may have gaps
    else:
        size = tokenizer.vocab_size
    if size > (config.padded_vocab_size or 0):
        raise UserError(
            f"the tokenizer in {tokenizer_dir} has {size:,} tokens, but the model's vocabulary holds"
            f" {config.padded_vocab_size:,}; give it room: --model.vocab_size {size} --model.padded_vocab_size {size}"
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
            f"sample.prompt has {length} tokens, but the context has {context};"
            " give a shorter one, or --sample.prompt null."
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
    if folder.resolve().parent != settings.out_dir.resolve():
        check_unoccupied(settings)
        return folder
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
        _warn(f"warning: {damage}; it is skipped.")
    if folder is not None:
        return folder
    if damages:
        raise UserError(
            f"no checkpoint in {out_dir} is complete. Start again with --overwrite instead of --resume, or elsewhere"
            " with --out_dir."
        )
    if settings.resume is True:
        raise UserError(f"no checkpoint to resume in {out_dir}; --resume auto starts a new run if there is none.")
    not_resumable = [path.parent.name for path in out_dir.glob(f"*/{checkpoints.COMPLETE_FILE}")]
    if not_resumable:
        raise UserError(
            f"{out_dir} holds {not_resumable[0]}, which can't be resumed (an imported checkpoint, for example) and"
            " which a new run would replace. Put the run elsewhere with --out_dir, or start with --overwrite instead of"
            " --resume."
        )
    _warn(f"Nothing to resume in {out_dir}: this is a new run.")
    return None


def _warn(line: str) -> None:
    if main_process():
        print(line)


def check_unoccupied(settings: RunSettings) -> None:
    """Raise ``UserError`` if ``out_dir`` holds another run that must not be deleted."""
    out_dir, initial = settings.out_dir, settings.initial_checkpoint_dir or settings.upcycle
    inside = [path for path in (out_dir, *out_dir.parents) if (path / checkpoints.COMPLETE_FILE).is_file()]
    if inside:
        elsewhere = quoted(f"{inside[0].parent}-2")
        raise UserError(f"{inside[0]} is a checkpoint; put the run elsewhere: --out_dir {elsewhere}")
    occupied = [path for path in run_files(out_dir) if path.name == METRICS_FILE or path.is_dir()]
    if not occupied or not main_process():
        return
    if not settings.overwrite:
        raise UserError(
            f"{out_dir} holds a run already ({', '.join(path.name for path in occupied[:4])}). Continue it with"
            " --resume auto, put this one elsewhere with --out_dir, or delete the old one with --overwrite."
        )
    if initial is not None and initial.resolve().is_relative_to(out_dir.resolve()):
        raise UserError(f"--overwrite would delete {initial}, which this run starts from; choose another --out_dir.")


def check_same_model(folder: Path, config: Config, apart_from: Collection[str] = ()) -> None:
    """Raise ``UserError`` with the fields in which the checkpoint's model differs from the run's."""
    saved, wanted = asdict(checkpoints.load_config(folder)), asdict(config)
    ignored = ("name", "hf_config", "vocab_size", "padding_multiple")  # they change neither weights nor computation
    different = []
    for name in wanted.keys() - {*ignored, *apart_from}:
        if saved[name] != wanted[name]:
            different.append(f"{name}: {saved[name]} there, {wanted[name]} here")
    if not different:
        return
    if apart_from:
        advice = "Omit --model to use its own config."
    else:
        advice = f"Use its own config: --model {quoted(folder / 'model_config.yaml')}"
    raise UserError(f"{folder} holds another model than this run's: {'; '.join(sorted(different))}. {advice}")


def check_same_router(folder: Path, settings: RunSettings) -> None:
    """Raise ``UserError`` if a resumed run would have another router."""
    checkpoints.check_router(folder, settings.moe.router, "--moe.router")
    if settings.moe.router is not None and checkpoints.recorded_router(folder) is None:
        raise UserError(
            f"{folder} was trained with the router that its model config describes. Resume without --moe.router, or"
            f" start a new run from its weights: {new_run_flags(folder, settings)}"
        )


def check_same_start(folder: Path, upcycle: Path) -> None:
    """Raise ``UserError`` if the run of a checkpoint to resume started from another dense checkpoint."""
    start = checkpoints.load_hyperparameters(folder).get("upcycle")
    if start is not None and Path(start).resolve() == upcycle.resolve():
        return
    raise UserError(
        f"{folder} is from a run that started {f'from {start}' if start else 'without --upcycle'}, not from {upcycle}."
        f" Omit --upcycle to continue it (--config {quoted(folder.parent / 'run_config.yaml')}), or start another run"
        " with another --out_dir."
    )


def refuse_openai_gpt2(folder: Path) -> None:
    """Raise ``UserError`` for OpenAI's GPT-2 from the Hub, by name or as a folder: LitGPT has no such model."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    named = not folder.exists() and re.fullmatch(
        r"((openai-community|openai)/)?gpt2(-(medium|large|xl))?", folder.as_posix()
    )
    if kind == "gpt2" or named:
        raise UserError(
            f"--initial_checkpoint_dir {folder}: OpenAI's gpt2 weights can't be used. They come with learned positions,"
            " which LitGPT does not have; the gpt2 models here have rotary ones. Train one from scratch"
            " (configs/runs/fineweb-edu-gpt2-124m.yaml), or start from a checkpoint of this project."
        )


def _with_wandb_dataset(run: ParsedRun) -> ParsedRun:
    settings = run.settings
    if settings.wandb_dataset is None:
        return run
    from litmoe.data.artifacts import fetch_dataset

    if not isinstance(settings.data, TokenizedText):
        raise UserError("--wandb_dataset brings tokens, so the run's data must be litmoe.data.TokenizedText.")
    data_dir = fetch_dataset(settings.wandb_dataset, settings.wandb_artifacts_dir)
    return _with_data(run, data_dir, data_dir / "tokenizer")


def _with_moved_data(run: ParsedRun, resume_from: Path) -> ParsedRun:
    """Return the run with the paths where the tokens of its checkpoint are now, if they were moved nearby.

    Raises:
        UserError: they are not nearby, and there is nothing to make them from.
    """
    settings, data = run.settings, run.settings.data
    saved = resume_from / checkpoints.MANIFEST
    if not isinstance(data, TokenizedText) or not saved.is_file() or manifest_path(data.data_dir).is_file():
        return run
    if _has_text(data):
        return run
    provenance = tokens_provenance(saved, *SPLITS)
    data_dir = _moved_to(
        data.data_dir,
        lambda folder: (found := read_manifest(folder)) is not None and found.made_from(*SPLITS) == provenance,
    )
    if data_dir is not None:
        tokenizer_dir = settings.tokenizer_dir
        for folder in (tokenizer_dir, data_dir / tokenizer_dir.name, data_dir.parent / tokenizer_dir.name):
            if (folder / "tokenizer.json").is_file() and tokenizer_fingerprint(folder) == provenance[0]:
                return _with_data(run, data_dir, folder)
        return _with_data(run, data_dir, tokenizer_dir)
    if settings.prepare.source is not None:
        return run
    raise UserError(
        f"{resume_from} was trained on tokens in {data.data_dir}, which is gone. The same tokens are not in a folder"
        " next to it, next to its parent, or in data/. Give their place:"
        " --data.init_args.train_data_path FOLDER/train --data.init_args.val_data_path FOLDER/val"
    )


def _moved_to(old: Path, same: Callable[[Path], bool]) -> Path | None:
    """Return the folder near ``old`` that contains the same data now, and print that; None if there is none."""
    parent, outer = old.absolute().parent, old.absolute().parent.parent
    places = ((parent, "*"), (outer, "*"), (outer, f"*/{glob.escape(old.name)}"), (Path("data"), "*"))
    for folder in (folder for place, pattern in places for folder in sorted(place.glob(pattern))):
        with suppress(OSError, UserError):  # tokens of a newer version
            if same(folder):
                if main_process():
                    print(f"The data of {old} is in {folder} now and is used from there.")
                return folder
    return None


def _with_data(run: ParsedRun, data_dir: Path, tokenizer_dir: Path) -> ParsedRun:
    """Return the run with the tokens and the tokenizer of these folders."""
    settings = run.settings
    assert isinstance(settings.data, TokenizedText)
    paths = {"train_data_path": data_dir / "train", "val_data_path": data_dir / "val"}
    data = replace(settings.data, **paths)
    resolved: dict[str, Any] = {**run.resolved, "tokenizer_dir": str(tokenizer_dir)}
    texts = {name: str(path) for name, path in paths.items()}
    resolved["data"] = {**resolved["data"], "init_args": {**resolved["data"]["init_args"], **texts}}
    return replace(run, settings=replace(settings, data=data, tokenizer_dir=tokenizer_dir), resolved=resolved)


def check_writable(out_dir: Path) -> None:
    """Create ``out_dir``. Raise ``UserError`` if it can't be written to."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        probe = out_dir / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"can't write to {out_dir} ({error.strerror}); choose a folder that can be written to with --out_dir."
        ) from None


def main_process() -> bool:
    """Return whether this is rank 0 of the processes that torchrun, srun or Fabric started.

    A single process has none of these environment variables.
    """
    names = ["NODE_RANK", "LOCAL_RANK"]
    if "RANK" in os.environ:
        names = ["RANK"]
    elif SLURMEnvironment.detect():
        names = ["SLURM_PROCID"]
    return all(os.environ.get(name, "0") == "0" for name in names)
