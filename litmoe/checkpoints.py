"""Checkpoint folders: saved atomically, verified when they are loaded, readable by every `litgpt` command.

```
step-00000010/            or final/
    lit_model.pth         LitGPT's state dict, not wrapped
    training_state.pth    for resuming only: optimizer, data position, counters, random states
    model_config.yaml     litgpt.Config
    hyperparameters.yaml  the settings of the run
    prompt_style.yaml     how LitGPT formats a prompt: unchanged, unless the model was finetuned to answer
    lit_model.pth.lora    the LoRA parameters, if it was finetuned with LoRA (lit_model.pth has them merged)
    tokenizer.json ...    the tokenizer's files
    config.json           the model in the format of transformers, for `litgpt evaluate` (if it has one)
    manifest.json         describes the training tokens
    instructions.json     describes the conversations of finetuning
    complete.json         written last: step, tokens, time, versions, size and SHA-256 of every file above, its own
```

Folders that LitGPT's own commands wrote have no ``complete.json``. They are loaded after a warning, but never resumed.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import yaml

from litmoe.checksummed_json import file_sha256, known_fields, read_checksummed, write_checksummed
from litmoe.cli import DISK_FULL, UserError, quoted, read_yaml
from litmoe.hf_config import converted_by_litgpt, huggingface_config, without_counterpart
from litmoe.renaming import rename

# Functions import torch and litgpt when they need them: that takes seconds, and a wrong path is reported before.
if TYPE_CHECKING:
    import torch
    from litgpt import GPT, Config, Tokenizer
    from litgpt.prompts import PromptStyle
    from torch import Tensor

WEIGHTS = "lit_model.pth"
LORA_WEIGHTS = "lit_model.pth.lora"
TRAINING_STATE = "training_state.pth"
MODEL_CONFIG = "model_config.yaml"
HYPERPARAMETERS = "hyperparameters.yaml"
MANIFEST = "manifest.json"
INSTRUCTIONS = "instructions.json"
COMPLETE_FILE = "complete.json"
# What no command of LitGPT writes: files, and settings in hyperparameters.yaml.
_OUR_FILES = (TRAINING_STATE, MANIFEST, INSTRUCTIONS)
_OUR_SETTINGS = {"moe", "sample", "overwrite", "imported_from"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file when it was saved."""

    size: int
    """Bytes"""
    sha256: str
    """Empty for a file that a command of LitGPT wrote"""


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of ``complete.json``."""

    step: int
    """Optimizer steps done"""
    tokens: int
    """Tokens trained on, over all devices"""
    time: str
    """When it was saved: ISO 8601 in UTC, so that text order is time order"""
    versions: dict[str, str]
    """Of the packages that wrote it"""
    files: dict[str, FileRecord]


class DamagedCheckpointError(UserError):
    """The folder is no complete checkpoint; the message says why."""


# --- Save


def save(
    folder: Path,
    *,
    weights: "dict[str, Tensor]",
    config: "Config",
    hyperparameters: dict[str, Any],
    step: int,
    tokens: int,
    tokenizer_dir: Path | None = None,
    training_state: dict[str, Any] | None = None,
    manifest_path: Path | None = None,
    prompt_style: "PromptStyle | None" = None,
    instructions_path: Path | None = None,
    lora_weights: "dict[str, Tensor] | None" = None,
) -> None:
    """Save a checkpoint atomically: write it under a hidden name, then rename it. Only one process may call this.

    If the process is killed at any point, an older checkpoint at ``folder`` remains complete, there or under a hidden
    name that `newest` and `newest_undamaged` find.

    Args:
        weights: the complete state dict in LitGPT's keys, on any device. Tied embeddings are under both their keys.
        hyperparameters: the settings of the run, as plain values that YAML can hold.
        step, tokens: optimizer steps done, and tokens trained on over all devices.
        tokenizer_dir: its tokenizer files are copied.
        training_state: tensors, numbers, strings, lists, tuples and dicts only (`torch.load(weights_only=True)`).
        manifest_path: the manifest of the training tokens, copied as ``manifest.json``.
        prompt_style: one of LitGPT's, for a model that was finetuned to answer.
        instructions_path: the manifest of the conversations, copied as ``instructions.json``.
        lora_weights: the LoRA parameters in LitGPT's keys; ``weights`` have them merged.

    Raises:
        UserError: the disk is full, or the folder can't be written. An older checkpoint there is unchanged.
        TypeError: ``training_state`` holds other objects.
    """
    folder = Path(folder)
    # Before anything is written: torch.save accepts objects that a resume would refuse to load.
    _check_loadable(training_state)
    partial, old = _hidden(folder, "partial"), _hidden(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Before anything is written: a killed save may have left the newest complete checkpoint under a hidden name.
        finish_interrupted_saves(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        checksums = _write_tensors(partial, weights, training_state, lora_weights)
        _write_descriptions(partial, config, hyperparameters, prompt_style)
        _copy_files(partial, tokenizer_dir, manifest_path, instructions_path)
        _write_huggingface_config(partial, config, hyperparameters, weights, tokenizer_dir)
        # From here on the folder is a complete checkpoint, only its name is missing.
        _write_metadata(partial, step, tokens, checksums)
        # First the names of the files, then the rename: after a power cut the new name implies all files.
        _sync(partial)
        _move_into_place(partial, folder)
        _sync(folder.parent)
    except BaseException as error:
        # Also after Ctrl-C nothing incomplete remains, and the older checkpoint gets its name back.
        if old.exists() and not folder.exists():
            rename(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise UserError(_save_error(folder, cause, weights, training_state)) from error
    shutil.rmtree(old, ignore_errors=True)


def _hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _move_into_place(partial: Path, folder: Path) -> None:
    # Windows can't rename a folder over another one, so the old one is renamed first. Both are complete meanwhile.
    if folder.exists():
        old = _hidden(folder, "old")
        if old.exists():
            shutil.rmtree(old)
        rename(folder, old)
    rename(partial, folder)


def _write_tensors(
    folder: Path,
    weights: "dict[str, Tensor]",
    training_state: dict[str, Any] | None,
    lora_weights: "dict[str, Tensor] | None",
) -> dict[str, str]:
    """Return the checksum of each file as it was written."""
    saved_weights = _own_storages(weights)
    if is_tied(weights):
        # Copies from a GPU would be two tensors; torch.save stores one tensor under two keys once.
        saved_weights["lm_head.weight"] = saved_weights["transformer.wte.weight"]
    contents = {
        WEIGHTS: saved_weights,
        TRAINING_STATE: training_state,
        LORA_WEIGHTS: None if lora_weights is None else _own_storages(lora_weights),
    }
    return {name: _write_torch(folder / name, content) for name, content in contents.items() if content is not None}


def _own_storages(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return the tensors on the CPU, each in a storage of exactly its size.

    A view of a stacked parameter (one expert of many) would be saved with the storage of the complete stack, and
    LitGPT's lazy loading would read that storage once per expert.
    """
    return {name: _own_storage(tensor) for name, tensor in tensors.items()}


def _own_storage(tensor: "Tensor") -> "Tensor":
    tensor = tensor.detach().cpu()
    owns_storage = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if owns_storage else tensor.contiguous().clone()


def is_tied(weights: "dict[str, Tensor]") -> bool:
    """Return whether embedding and output head are the same matrix."""
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    # Tensors without storage all have the address 0.
    return head.data_ptr() == embedding.data_ptr() and head.numel() > 0


class _HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write_torch(path: Path, content: Any) -> str:
    import torch

    # torch's own writer reports a full disk without its cause, a Python file does not.
    with open(path, "wb") as file:
        # The hash is of what was to be written. `_write_metadata` compares what is on the disk with it.
        hashing_file = _HashingFile(file)
        torch.save(content, cast(BinaryIO, hashing_file))
    return hashing_file.sha256.hexdigest()


def _write_descriptions(
    folder: Path, config: "Config", hyperparameters: dict[str, Any], prompt_style: "PromptStyle | None"
) -> None:
    from litgpt.prompts import Default, save_prompt_style
    from litgpt.utils import save_config

    # LitGPT's own writers, so that its commands read these files.
    save_config(config, folder)
    # Without a saved style LitGPT chooses a chat format by the model's name ("Llama-3-small-Instruct", "R1").
    save_prompt_style(prompt_style or Default(), folder)
    with open(folder / HYPERPARAMETERS, "w", encoding="utf-8", newline="\n") as file:
        yaml.safe_dump(hyperparameters, file, sort_keys=False)


def _copy_files(
    folder: Path, tokenizer_dir: Path | None, manifest_path: Path | None, instructions_path: Path | None
) -> None:
    sources = {MANIFEST: manifest_path, INSTRUCTIONS: instructions_path}
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            path = Path(tokenizer_dir) / name
            sources[name] = path if path.is_file() else None
    for name, source in sources.items():
        if source is not None:
            shutil.copyfile(source, folder / name)


def _write_huggingface_config(
    folder: Path,
    config: "Config",
    hyperparameters: dict[str, Any],
    weights: "dict[str, Tensor]",
    tokenizer_dir: Path | None,
) -> None:
    """Write ``config.json``, if transformers has an equivalent model."""
    # A config.json that does not describe exactly this model would make other programs compute something else.
    if not converted_by_litgpt(config) or without_counterpart(config) or setting(hyperparameters, "moe.router"):
        return
    bos_id = eos_id = None
    if tokenizer_dir is not None:
        from litgpt import Tokenizer

        tokenizer = Tokenizer(tokenizer_dir)
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    content = huggingface_config(
        # Other programs use the block size as the context, and the model only knows positions it was trained on.
        replace(config, block_size=_trained_context(hyperparameters, config.block_size)),
        tied=is_tied(weights),
        dtype=str(weights["lm_head.weight"].dtype).removeprefix("torch."),
        bos_id=bos_id,
        eos_id=eos_id,
    )
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8", newline="\n")


def _write_metadata(folder: Path, step: int, tokens: int, checksums: dict[str, str]) -> None:
    """Write ``complete.json``: all files are on the disk, read back, and equal to ``checksums`` where those are known.

    Raises:
        OSError: a file read back differs from what was written.
    """
    files = {}
    # All files are on the disk before the metadata: after a power cut, metadata implies complete files.
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = FileRecord(path.stat().st_size, file_sha256(path))
        if files[path.name].sha256 != checksums.get(path.name, files[path.name].sha256):
            raise OSError(errno.EIO, "the file read back differs from what was written", str(path))
    versions = {package: version(package) for package in ("torch", "litgpt", "lightning", "litdata")}
    metadata = CheckpointMetadata(step, tokens, datetime.now(UTC).isoformat(), versions, files)
    write_checksummed(folder / COMPLETE_FILE, asdict(metadata))
    _sync(folder / COMPLETE_FILE)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if not path.is_dir():
        # Windows can sync a file only if it is open for writing.
        flags = os.O_RDWR
    elif os.name == "nt":  # Windows can't open folders; its journal protects their lists of names
        return
    else:
        flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_loadable(training_state: Any) -> None:
    """Raise TypeError for objects that `torch.load(weights_only=True)` would refuse when the run is resumed."""
    from torch import Tensor
    from torch.utils._pytree import keystr, tree_flatten_with_path

    plain_types = (bool, int, float, str, bytes, type(None))
    for path, value in tree_flatten_with_path(training_state)[0]:
        # The exact type: a NumPy float is a float, but loading would refuse it.
        if not isinstance(value, Tensor) and type(value) not in plain_types:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"training_state{keystr(path)} is a {kind}; expected tensors and plain values")


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that caused ``error`` (torch.save raises a RuntimeError from it), if any."""
    while isinstance(error, Exception) and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None


def _save_error(folder: Path, cause: OSError, weights: "dict[str, Tensor]", training_state: Any) -> str:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    kept = _last_saved(_readable(folder.parent, "*"))
    kept_text = f"the newest complete checkpoint is {kept}" if kept else "there is no older checkpoint"
    if cause.errno in DISK_FULL:
        leaves = tree_leaves((weights, training_state))
        needed = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)) / 1e6
        free = shutil.disk_usage(folder.parent).free / 1e6
        return (
            f"the disk is full: the checkpoint {folder} needs about {needed:,.1f} MB and {free:,.1f} MB are free;"
            f" {kept_text}. Free some space, or choose another --out_dir, and continue with `--resume auto`."
        )
    return (
        f"cannot write the checkpoint {folder}: {cause}; {kept_text}."
        " Choose a writable folder with --out_dir, or change the permissions."
    )


# --- Clean up


def leftovers(out_dir: Path) -> list[Path]:
    """Return the hidden folders that killed saves left in the folder of a run."""
    patterns = (".final.partial", ".final.old", ".step-*.partial", ".step-*.old")
    return sorted(path for pattern in patterns for path in out_dir.glob(pattern))


def finish_interrupted_saves(out_dir: Path) -> None:
    """Rename the complete checkpoints that killed saves left to their final names, and delete the incomplete ones."""
    for leftover in leftovers(out_dir):
        # Killed before the last rename (.partial), or between the two renames of `_move_into_place` (.old).
        folder = out_dir / leftover.stem.removeprefix(".")
        if leftover.suffix == ".partial" and is_complete(leftover):
            _move_into_place(leftover, folder)
        elif leftover.suffix == ".old" and not folder.exists():
            rename(leftover, folder)
    for leftover in leftovers(out_dir):
        # Another process may have a file of it open (Windows, NFS). Then a later call deletes it.
        shutil.rmtree(leftover, ignore_errors=True)


def remove_old(newest: Path, *, keep_last: int | None, keep_every: int | None) -> None:
    """Remove checkpoints of a run that need not be kept, now that ``newest`` is complete. ``final/`` is kept.

    Args:
        newest: the checkpoint just saved. Checkpoints of later steps are removed too: they were damaged, so the run
            was resumed from an earlier one.
        keep_last: number of checkpoints to keep, including ``newest``; None for all.
        keep_every: keep those with a step that is a multiple of it.

    Raises:
        OSError: a checkpoint can't be deleted. It does not count as a checkpoint any more.
    """
    if keep_last is None:
        return
    last_step = read_metadata(newest).step
    # Checkpoints without readable metadata are not counted and not deleted.
    others = _readable(newest.parent, "step-*")
    others.pop(newest, None)
    steps = {folder: metadata.step for folder, metadata in others.items()}
    earlier = {folder: step for folder, step in steps.items() if step <= last_step}
    # The newest one is one of the keep_last.
    for folder in steps.keys() - _checkpoints_to_keep(earlier, keep_last - 1, keep_every):
        _remove(folder)


def _checkpoints_to_keep(steps: dict[Path, int], keep_last: int, keep_every: int | None) -> set[Path]:
    # Incomplete ones do not count, so that `keep_last` of them can be resumed from.
    complete = [folder for folder in sorted(steps, key=steps.__getitem__) if is_complete(folder)]
    kept = set(complete[max(0, len(complete) - keep_last) :])
    if keep_every:
        kept |= {folder for folder, step in steps.items() if step % keep_every == 0}
    return kept


def remove_newer(checkpoint: Path) -> None:
    """Remove the checkpoints of the same run with later steps."""
    for folder in newer(checkpoint):
        _remove(folder)


def newer(checkpoint: Path) -> list[Path]:
    """Return the checkpoints of the same run with later steps."""
    step = read_metadata(checkpoint).step
    of_run = _readable(checkpoint.parent, "step-*", "final")
    return sorted(folder for folder, metadata in of_run.items() if metadata.step > step)


def _remove(folder: Path) -> None:
    # Renamed first: if the process is killed meanwhile, the next save deletes the rest. The metadata goes before the
    # other files, so that a partly deleted folder never looks complete.
    partial = _hidden(folder, "partial")
    rename(folder, partial)
    (partial / COMPLETE_FILE).unlink()
    shutil.rmtree(partial)


# --- Verify


def verify(folder: Path, files: Collection[str] | None = None) -> CheckpointMetadata:
    """Compare the sizes and checksums of a checkpoint's files with its metadata.

    Args:
        folder: the checkpoint folder, or its ``lit_model.pth``.
        files: names of the files that will be used, so that generating does not read the optimizer state; None: all.
            For a folder of LitGPT's own commands, which has no checksums, they only have to exist.

    Raises:
        UserError: not a checkpoint, incomplete or damaged, or all files of a folder of LitGPT's own commands are
            requested. The message names the file and another checkpoint.
    """
    folder = as_folder(folder)
    try:
        return _check_files(folder, files, checksums=True)
    except DamagedCheckpointError as error:
        raise UserError(f"{error} {_alternative(folder)}") from None


def as_folder(checkpoint: Path) -> Path:
    """Return the checkpoint folder: the parent of a ``.pth`` file, else ``checkpoint`` itself."""
    checkpoint = Path(checkpoint)
    return checkpoint.parent if checkpoint.suffix == ".pth" and not checkpoint.is_dir() else checkpoint


def is_complete(folder: Path, files: Collection[str] | None = None) -> bool:
    """Return whether ``folder`` has metadata and files of the recorded sizes. Reads no contents, so it is fast."""
    try:
        _check_files(Path(folder), files, checksums=False)
    except DamagedCheckpointError:
        return False
    return True


def is_of_litgpt(folder: Path) -> bool:
    """Return whether a command of LitGPT, such as `litgpt finetune_full` or `litgpt merge_lora`, wrote the folder.

    Saves here write into a folder with a hidden name, and rename it when it has its metadata. So without metadata a
    folder was written by LitGPT, or it is an incomplete copy of ours. A copy is recognized by what LitGPT never writes.
    """
    if (folder / COMPLETE_FILE).exists() or folder.name.startswith("."):
        return False
    if not (folder / WEIGHTS).is_file() or not (folder / MODEL_CONFIG).is_file():
        return False
    if any((folder / name).exists() for name in _OUR_FILES):
        return False
    # `litgpt download` writes no settings.
    if not (folder / HYPERPARAMETERS).exists():
        return True
    try:
        return not _OUR_SETTINGS & read_yaml(folder / HYPERPARAMETERS).keys()
    except (OSError, UserError):
        return False


def read_metadata(folder: Path) -> CheckpointMetadata:
    """Return the metadata of a checkpoint folder, without checking its files.

    For a folder of LitGPT's own commands: the sizes of its files, without checksums, and step 0.

    Raises:
        DamagedCheckpointError: there is none, or it can't be read.
    """
    folder = as_folder(folder)
    if not is_of_litgpt(folder):
        return _read_own_metadata(folder)
    files = {path.name: FileRecord(path.stat().st_size, "") for path in folder.iterdir() if path.is_file()}
    return CheckpointMetadata(step=0, tokens=0, time="", versions={}, files=files)


def _read_own_metadata(folder: Path) -> CheckpointMetadata:
    """Return the content of ``complete.json``; errors as `read_metadata`."""
    path = folder / COMPLETE_FILE
    if not folder.is_dir():
        raise DamagedCheckpointError(f"found no checkpoint at {folder}; expected a folder with {COMPLETE_FILE}.")
    if not path.is_file():
        raise DamagedCheckpointError(_without_metadata(folder))
    try:
        content = read_checksummed(path)
        files = {name: FileRecord(**known_fields(FileRecord, record)) for name, record in content["files"].items()}
        metadata = CheckpointMetadata(**{**known_fields(CheckpointMetadata, content), "files": files})
        # Checkpoints are sorted by these values, so they must be comparable.
        if (type(metadata.step), type(metadata.tokens), type(metadata.time)) != (int, int, str):
            raise TypeError("step and tokens are integers, the time is a string")
        # Metadata from elsewhere must not make us read files of other folders.
        if not all(re.fullmatch(r"\w[\w.-]*", name) for name in files):
            raise ValueError("a name is no file of this folder")
        return metadata
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpointError(f"{path} is damaged: it can't be read.") from None


def _without_metadata(folder: Path) -> str:
    """Return what is wrong with a folder without ``complete.json``."""
    if is_of_litgpt(folder):
        return f"{folder} was written by LitGPT: it has no {COMPLETE_FILE}, so it can't be verified or resumed."
    if (folder / LORA_WEIGHTS).is_file() and not (folder / WEIGHTS).exists():
        return (
            f"{folder} has LoRA parameters but no {WEIGHTS}. Merge them with the weights of their base:"
            f" `uv run litgpt merge_lora {quoted(folder)}`."
        )
    return (
        f"{folder} is no complete checkpoint: it has no {COMPLETE_FILE}, and not the files of a checkpoint of LitGPT"
        f" alone ({WEIGHTS} and {MODEL_CONFIG})."
    )


def _check_files(folder: Path, files: Collection[str] | None, *, checksums: bool) -> CheckpointMetadata:
    # Without metadata, it is unknown which files belong to a complete checkpoint.
    metadata = _read_own_metadata(folder) if files is None else read_metadata(folder)
    for name in metadata.files if files is None else files:
        path, record = folder / name, metadata.files.get(name)
        if record is None:
            raise DamagedCheckpointError(f"{folder} was saved without {name}.")
        try:
            size = path.stat().st_size
            # A file of another size need not be read.
            if size != record.size:
                raise DamagedCheckpointError(f"{path} is truncated: {size:,} bytes instead of {record.size:,}.")
            if checksums and record.sha256 and file_sha256(path) != record.sha256:
                reason = f"its checksum differs from the one in {COMPLETE_FILE}"
                raise DamagedCheckpointError(f"{path} is damaged: {reason}.")
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
            raise DamagedCheckpointError(f"{path} {reason}.") from None
    return metadata


# --- Find


def newest(root: Path) -> Path | None:
    """Return the complete checkpoint under ``root`` that was saved last, or None. File contents are not read."""
    return _last_saved(_readable(Path(root), "**"))


def newest_undamaged(out_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint of a run to resume from, and the damages found in others.

    It is the one of the highest step with a training state and correct checksums, or None.
    """
    out_dir = Path(out_dir)
    # An incomplete folder that a killed save left under a hidden name is no damage.
    folders = [*out_dir.glob("step-*/"), *out_dir.glob("final/"), *filter(is_complete, leftovers(out_dir))]
    candidates: list[tuple[int, str, Path]] = []
    damages: list[str] = []
    for folder in folders:
        try:
            metadata = _read_own_metadata(folder)
            candidates.append((metadata.step, metadata.time, folder))
        except DamagedCheckpointError as error:
            damages.append(str(error).removesuffix("."))
    # Newest first. Reading stops at the first good one, so usually only one checkpoint is read.
    # The step decides, not the time: a clock may have been set back.
    for _, _, folder in sorted(candidates, reverse=True):
        try:
            if TRAINING_STATE in _check_files(folder, None, checksums=True).files:
                return folder, damages
        except DamagedCheckpointError as error:
            damages.append(str(error).removesuffix("."))
    return None, damages


def resolve(checkpoint: Path | None, root: Path = Path("checkpoints")) -> Path:
    """Return the checkpoint folder a script uses: ``checkpoint``, or the newest complete one under ``root``.

    Prints a warning to stderr if a command of LitGPT wrote ``checkpoint``.

    Raises:
        UserError: ``checkpoint`` is not complete; or it is None and there is none.
    """
    if checkpoint is not None:
        folder = as_folder(checkpoint)
        try:
            read_metadata(folder)
        except DamagedCheckpointError as error:
            raise UserError(f"{error} {_alternative(folder, root)}") from None
        if is_of_litgpt(folder):
            _warn_of_litgpt(folder)
        return folder
    last_saved = newest(root)
    if last_saved is None:
        raise UserError(
            f"found no complete checkpoint under {root}; expected one that `uv run python run_train.py` wrote. "
            "Train a model first (`make quickstart`), or name the checkpoint folder."
        )
    return last_saved


@cache
def _warn_of_litgpt(folder: Path) -> None:
    """Print the warning once per folder, because a script may find its checkpoint several times."""
    print(
        f"warning: {folder} was written by LitGPT. It has no {COMPLETE_FILE} with checksums, so damage to its files may"
        " not be noticed.",
        file=sys.stderr,
    )


def _alternative(folder: Path, root: Path | None = None) -> str:
    """Return a hint for an error message: the newest complete checkpoint near ``folder``, or else under ``root``."""
    # Few levels only: searching a large disk would delay the message.
    nearby = _readable(folder, "*", "*/*") | _readable(folder.parent, "*")
    nearby.pop(folder, None)
    last_saved = _last_saved(nearby)
    if last_saved is None and root is not None:
        last_saved = newest(root)
    if last_saved is None:
        return "There is no complete checkpoint near it."
    return f"The newest complete checkpoint near it is {last_saved}."


def _last_saved(candidates: dict[Path, CheckpointMetadata]) -> Path | None:
    """Return the last saved one of the checkpoints that are complete, or None."""
    complete = []
    # The time decides: steps of different runs can't be compared.
    for folder, metadata in candidates.items():
        # Users delete the training state to save space. Only resuming needs it.
        if is_complete(folder, metadata.files.keys() - {TRAINING_STATE}):
            complete.append((metadata.time, metadata.step, folder))
    return max(complete)[-1] if complete else None


def _readable(root: Path, *patterns: str) -> dict[Path, CheckpointMetadata]:
    """Return the metadata of the folders under ``root`` that match a pattern and have readable metadata."""
    result = {}
    for pattern in patterns:
        for path in root.glob(f"{pattern}/{COMPLETE_FILE}"):
            with suppress(DamagedCheckpointError):
                result[path.parent] = read_metadata(path.parent)
    return result


# --- Load


def load_config(folder: Path) -> "Config":
    """Return the model config of a checkpoint folder.

    Raises:
        UserError: it is missing or damaged.
    """
    from litgpt import Config

    path = as_folder(folder) / MODEL_CONFIG
    _verify_file(path)
    try:
        config = Config.from_file(path)
        _ = config.mlp_class, config.norm_class  # properties that fail for unknown names
        if not all(isinstance(getattr(config, size), int) for size in ("n_layer", "n_embd", "n_head", "block_size")):
            raise TypeError("n_layer, n_embd, n_head and block_size are integers")
        return config
    except Exception as error:  # YAML errors, wrong values, LitGPT's own checks
        raise UserError(f"{path} is no LitGPT model config: {type(error).__name__}: {error}.") from None


def load_weights(folder: Path) -> "dict[str, Tensor]":
    """Return the state dict in LitGPT's keys, on the CPU. Reads LitGPT's own checkpoints too (in the key ``model``).

    The file is mapped: its pages take no memory of the process, and the system drops them when it needs them.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = as_folder(folder) / WEIGHTS
    # While mapped tensors exist, Windows can't replace the folder.
    content = _load_torch(path, mmap=os.name != "nt")
    # LitGPT's pretraining and finetuning wrap the state dict.
    weights: dict[str, Tensor] = content.get("model", content)
    if not isinstance(weights, dict) or not all(hasattr(value, "is_floating_point") for value in weights.values()):
        raise UserError(f"{path} holds no state dict; expected tensors by their names.")
    return weights


def load_lora_weights(folder: Path) -> "dict[str, Tensor]":
    """Return the LoRA parameters in LitGPT's keys, on the CPU. Raises as ``load_weights``."""
    return _load_torch(Path(folder) / LORA_WEIGHTS)


def load_training_state(folder: Path) -> dict[str, Any]:
    """Return the ``training_state`` that was saved, on the CPU.

    Raises:
        UserError: the checkpoint was saved without it, or it is missing or damaged.
    """
    return _load_torch(as_folder(folder) / TRAINING_STATE)


def load_hyperparameters(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote the checkpoint; empty for one of `litgpt download`.

    Raises:
        UserError: they are missing or damaged.
    """
    path = as_folder(folder) / HYPERPARAMETERS
    if not path.exists() and is_of_litgpt(path.parent):
        return {}
    _verify_file(path)
    return read_yaml(path)


def setting(hyperparameters: dict[str, Any], name: str) -> Any:
    """Return a setting of a run by its dotted name, such as ``train.max_seq_length``; None if it is not set.

    Hyperparameters may come from elsewhere, so they can contain anything.
    """
    value: Any = hyperparameters
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def context_of(folder: Path, max_seq_length: int | None = None) -> int:
    """Return the context of a checkpoint's model in tokens.

    A model was not trained for positions beyond its training length, even if its block size allows them.

    Args:
        folder: the checkpoint.
        max_seq_length: what the user asks for; None for the ``train.max_seq_length`` of the run that wrote the
            checkpoint, or the model's block size if no run is known, as for an imported model.

    Raises:
        UserError: the model's block size is smaller than that, or the checkpoint is damaged.
    """
    block_size = load_config(folder).block_size
    if max_seq_length is None:
        return _trained_context(load_hyperparameters(folder), block_size)
    if not 1 <= max_seq_length <= block_size:
        raise UserError(
            f"max_seq_length is {max_seq_length:,}; expected 1 to {block_size:,}, the model's block size. Choose a"
            " smaller --max_seq_length."
        )
    return max_seq_length


def _trained_context(hyperparameters: dict[str, Any], block_size: int) -> int:
    length = setting(hyperparameters, "train.max_seq_length")
    if isinstance(length, int) and 1 <= length <= block_size:
        return length
    return block_size


def recorded_router(folder: Path) -> str | None:
    """Return the class path of the router that a checkpoint was trained with; None for one that its config describes.

    This is text from the checkpoint: it is shown and compared, but never imported.
    """
    if not (as_folder(folder) / HYPERPARAMETERS).exists():  # written by `litgpt download`, for example
        return None
    router = setting(load_hyperparameters(folder), "moe.router")
    return None if router is None else str(router)


def check_router(folder: Path, router: str | None, flag: str = "--router") -> str | None:
    """Return the router of the user's own that a checkpoint was trained with; None for the router of its config.

    Args:
        folder: the checkpoint.
        router: class path that the user names; it has no effect on a checkpoint with the router of its config.
        flag: the flag for it, for the message.

    Raises:
        UserError: there is one, and the user did not name it.
    """
    recorded = recorded_router(folder)
    if recorded is not None and recorded != router:
        raise UserError(
            f"{folder} was trained with the router {recorded}. Its code is not part of the checkpoint; to import it,"
            f" add {flag} {quoted(recorded)}."
        )
    return recorded


def load_model(
    folder: Path,
    device: "torch.device",
    dtype: "torch.dtype",
    max_seq_length: int | None = None,
    router: str | None = None,
) -> "GPT":
    """Return the model of a checkpoint, in evaluation mode, with the layers of ``custom_moe``.

    Args:
        folder: the checkpoint.
        device: where the weights go.
        dtype: of the weights.
        max_seq_length: its context, as in `context_of`.
        router: class path that is imported if the checkpoint was trained with it.

    Raises:
        UserError: the checkpoint is damaged, the context is too long, or it was trained with another router.
    """
    import torch
    from litgpt import GPT

    from litmoe.layers import use_our_layers

    config, context = load_config(folder), context_of(folder, max_seq_length)
    router = check_router(folder, router)
    weights = load_weights(folder)
    try:
        with use_our_layers(router), torch.device("meta"):
            gpt = GPT(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"no model can be built from {as_folder(folder) / MODEL_CONFIG}: {error}.") from error
    # Each tensor is copied from the file to its place. To move them first would need the device's memory twice, because
    # the experts' are then copied once more into their stacked parameters.
    gpt.to(dtype).to_empty(device=device)
    try:
        gpt.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {as_folder(folder)} do not fit its {MODEL_CONFIG}: {error}") from None
    gpt.max_seq_length = context
    gpt.cos, gpt.sin = gpt.rope_cache(device=device)  # not in the state dict
    return gpt.eval()


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Return the tokenizer of a checkpoint.

    Raises:
        UserError: the checkpoint was saved without one, or its files are damaged.
    """
    from litmoe.data.tokenizers import litgpt_tokenizer

    # Only files that the metadata lists: others were added later and have no checksum.
    files = read_metadata(folder).files.keys() & set(TOKENIZER_FILES)
    if not files:
        raise UserError(f"{folder} holds no tokenizer: it was trained without a tokenizer_dir. Use `litgpt generate`.")
    verify(folder, files)
    return litgpt_tokenizer(folder)


def choose_device(device: str) -> "torch.device":
    """Return a torch device by its name. "auto" is a GPU if there is one (CUDA, then Apple's), else the CPU.

    Raises:
        UserError: torch does not know the device, or this machine does not have it.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    # Only an allocation shows whether the device works.
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot use the device {device!r}: {reason}. `--device cpu` works everywhere.") from None


def _verify_file(path: Path) -> None:
    # A folder that LitGPT wrote has no checksums.
    if (path.parent / COMPLETE_FILE).exists() or not path.exists():
        verify(path.parent, [path.name])


def _load_torch(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    import torch

    _verify_file(path)
    # weights_only: pickles of strangers could run code.
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's own message names the way to disable the check, so it is not shown.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} is refused, and nothing in it was run: it is damaged, or holds more than tensors and plain values"
            f"{f' ({refused.group(1)})' if refused else ''}, which could be code. Get these weights as a file of"
            " tensors only, or as safetensors: `uv run python export_hf.py --import HF_FOLDER CHECKPOINT`."
        ) from None
    except Exception as error:  # torch raises many kinds of errors for a file in another format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a mapping of names to tensors.")
    return content
