"""The checkpoint folder: saved whole or not at all, checked before it is read, readable by every `litgpt` command.

```
step-00000010/            or final/
    lit_model.pth         LitGPT's state dict, plain, so that every stock command reads it
    training_state.pth    what only resuming needs: optimizer, data position, counters, random states
    model_config.yaml     litgpt.Config
    hyperparameters.yaml  the settings of the run
    prompt_style.yaml     how a prompt is handed to the model: as it was typed, unless it was tuned to answer
    lit_model.pth.lora    the LoRA updates by themselves, where it was tuned with LoRA (lit_model.pth has them added)
    tokenizer.json ...    the tokenizer's files
    config.json           the same model as transformers describes it, for `litgpt evaluate` (where one exists)
    manifest.json         what the training tokens were made of
    instructions.json     what it was tuned on, where it was
    complete.json         written last: step, tokens, time, versions, the size and sha256 of every file above, its own
```
"""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import yaml

from litmoe.checksummed_json import file_sha256, known_fields, read_sealed, write_sealed
from litmoe.cli import UserError, with_current_class_paths
from litmoe.hf_config import converted_by_litgpt, huggingface_config, without_counterpart

if TYPE_CHECKING:  # torch and litgpt are imported where they are used, so that a wrong path is told at once
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
MARK = "complete.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

_DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_PACKAGES = ("torch", "litgpt", "lightning", "litdata")


@dataclass(frozen=True)
class FileMark:
    """A file as it was saved."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class CheckpointMark:
    """What ``complete.json`` says of its folder."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on, over all devices."""
    time: str
    """When it was saved: ISO 8601 in UTC, so that text order is time order."""
    versions: dict[str, str]
    files: dict[str, FileMark]


class _Damaged(Exception):
    """Why a folder is no whole checkpoint."""


# ---------------------------------------------------------------------------------------------------------------- save


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
    """Writes a checkpoint beside ``folder``, marks it complete and moves it into place; to be called by one process.

    At every moment either no ``folder`` of this name was ever whole, or a whole one lies at ``folder`` or beside it
    under a hidden name that `newest` and `newest_undamaged` find. An older ``folder`` is replaced.

    Args:
        weights: the full state dict in LitGPT's keys, on any device. Tied embeddings stand under both their keys.
        hyperparameters: the settings of the run; paths and dataclasses are written as text and mappings.
        step, tokens: optimizer steps done, and tokens trained on over all devices.
        tokenizer_dir: its tokenizer files are copied.
        training_state: tensors, numbers, strings, lists, tuples and dicts only (`torch.load(weights_only=True)`).
        manifest_path: the manifest of the tokens that it was trained on; copied as ``manifest.json``.
        prompt_style: one of LitGPT's, of a model that was tuned to answer.
        instructions_path: the manifest of the conversations that it was tuned on; copied as ``instructions.json``.
        lora_weights: the LoRA parameters in LitGPT's keys; ``weights`` have them added.

    Raises:
        UserError: the disk is full or the folder can't be written. What was there before is still whole.
        ValueError, TypeError: ``weights`` is not the model of ``config``, or ``training_state`` holds other objects.
    """
    folder = Path(folder)
    _check_weights(weights, config)
    _check_plain(training_state, "training_state")
    partial, old = _hidden(folder, "partial"), _hidden(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        finish_interrupted_saves(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        written = _write_files(partial, weights, config, hyperparameters, tokenizer_dir, training_state)
        written |= _write_tuning(partial, prompt_style, lora_weights)
        for source, name in ((manifest_path, MANIFEST), (instructions_path, INSTRUCTIONS)):
            if source is not None:
                shutil.copyfile(source, partial / name)
        _write_mark(partial, step, tokens, written)
        _sync(partial)
        _move_into_place(partial, folder, old)
        _sync(folder.parent)
    except BaseException as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        cause = _os_error(error) if isinstance(error, Exception) else None
        if cause is None:
            raise
        raise UserError(_cannot_save(folder, cause, weights, training_state)) from error
    shutil.rmtree(old, ignore_errors=True)


def _hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def leftovers(out_dir: Path) -> list[Path]:
    """The hidden folders that killed saves left among the checkpoints of a run."""
    names = ("final", "step-*")
    return sorted(path for name in names for suffix in ("partial", "old") for path in out_dir.glob(f".{name}.{suffix}"))


def finish_interrupted_saves(out_dir: Path) -> None:
    """Puts right what killed saves left: whole checkpoints take their places, halves are removed."""
    for leftover in leftovers(out_dir):
        folder = out_dir / leftover.stem.removeprefix(".")
        if leftover.suffix == ".partial" and is_whole(leftover):
            _move_into_place(leftover, folder, _hidden(folder, "old"))
        elif leftover.suffix == ".old" and not folder.exists():
            os.rename(leftover, folder)
    for leftover in leftovers(out_dir):
        # A file of it may be open elsewhere (Windows, NFS); what is left is no checkpoint, and goes another time.
        shutil.rmtree(leftover, ignore_errors=True)


def remove_old(newest: Path, *, keep_last: int | None, keep_every: int | None) -> None:
    """Removes checkpoints of a run that are not to be kept, now that ``newest`` is whole. ``final/`` stays.

    Those of later steps go too: ``newest`` went on before them, because they were damaged.

    Args:
        keep_last: how many stay with ``newest``; None: all.
        keep_every: those whose step is a multiple of it stay.

    Raises:
        OSError: one can't be removed. It is no checkpoint any longer.
    """
    if keep_last is None:
        return
    step = _read_mark(newest).step
    others = {folder: mark.step for folder, mark in _step_folders(newest.parent) if folder != newest}
    before = sorted(
        (folder for folder in others if others[folder] <= step and is_whole(folder)), key=others.__getitem__
    )
    kept = before[max(0, len(before) + 1 - keep_last) :]
    for folder, its_step in others.items():
        if folder not in kept and not (keep_every and its_step <= step and its_step % keep_every == 0):
            _remove(folder)


def remove_newer(checkpoint: Path) -> None:
    """Removes the checkpoints of the same run that were saved after it."""
    for folder in newer(checkpoint):
        _remove(folder)


def newer(checkpoint: Path) -> list[Path]:
    """The checkpoints of the same run of later steps."""
    step, out_dir = read_mark(checkpoint).step, checkpoint.parent
    marked = [*_step_folders(out_dir), *_marked(out_dir.glob(f"final/{MARK}"))]
    return sorted(folder for folder, mark in marked if mark.step > step)


def _step_folders(out_dir: Path) -> Iterator[tuple[Path, CheckpointMark]]:
    return _marked(out_dir.glob(f"step-*/{MARK}"))


def _remove(folder: Path) -> None:
    """Under a name that the next save cleans up, should this process die meanwhile."""
    doomed = _hidden(folder, "partial")
    os.rename(folder, doomed)
    (doomed / MARK).unlink()
    shutil.rmtree(doomed)


def _move_into_place(partial: Path, folder: Path, old: Path) -> None:
    # Windows moves no folder over another, so the older one steps aside: in this moment both are whole.
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(folder, old)
    os.rename(partial, folder)


def _write_files(
    folder: Path,
    weights: "dict[str, Tensor]",
    config: "Config",
    hyperparameters: dict[str, Any],
    tokenizer_dir: Path | None,
    training_state: dict[str, Any] | None,
) -> dict[str, str]:
    """Returns the checksums of what went into the large files."""
    from litgpt.utils import save_config

    on_cpu = {name: _own_storage(tensor) for name, tensor in weights.items()}
    if tied := is_tied(weights):
        on_cpu["lm_head.weight"] = on_cpu["transformer.wte.weight"]  # stored once, from a GPU too
    written = {WEIGHTS: _write_torch(folder / WEIGHTS, on_cpu)}
    if training_state is not None:
        written[TRAINING_STATE] = _write_torch(folder / TRAINING_STATE, training_state)
    save_config(config, folder)
    with open(folder / HYPERPARAMETERS, "w", encoding="utf-8", newline="\n") as file:
        yaml.safe_dump(_plain(hyperparameters), file, sort_keys=False)
    if tokenizer_dir is not None:
        for path in (Path(tokenizer_dir) / name for name in TOKENIZER_FILES):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    if converted_by_litgpt(config) and not without_counterpart(config):
        ids = _special_ids(tokenizer_dir)
        trained = replace(config, block_size=_trained_context(hyperparameters, config.block_size))
        described = huggingface_config(trained, tied=tied, dtype=_dtype_name(weights), **ids)
        _write_json(folder / "config.json", described)
    return written


def _write_tuning(
    folder: Path, prompt_style: "PromptStyle | None", lora_weights: "dict[str, Tensor] | None"
) -> dict[str, str]:
    from litgpt.prompts import Default, save_prompt_style

    # Without a style LitGPT picks a chat format by the model's name ("Llama-3-small-Instruct", "R1").
    save_prompt_style(prompt_style or Default(), folder)
    if lora_weights is None:
        return {}
    content = {name: _own_storage(tensor) for name, tensor in lora_weights.items()}
    return {LORA_WEIGHTS: _write_torch(folder / LORA_WEIGHTS, content)}


def _own_storage(tensor: "Tensor") -> "Tensor":
    """The tensor on the CPU in a storage of exactly its size.

    A view of a stacked parameter (one expert of many) would otherwise be saved with the whole storage behind it, and
    LitGPT's lazy loading would read that storage once per expert.
    """
    tensor = tensor.detach().cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.contiguous().clone()


def is_tied(weights: "dict[str, Tensor]") -> bool:
    """Whether embedding and output head are one matrix."""
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    return head.data_ptr() == embedding.data_ptr() and head.numel() > 0


def _dtype_name(weights: "dict[str, Tensor]") -> str:
    return str(weights["lm_head.weight"].dtype).removeprefix("torch.")


def _special_ids(tokenizer_dir: Path | None) -> dict[str, int | None]:
    if tokenizer_dir is None:
        return {"bos_id": None, "eos_id": None}
    from litgpt import Tokenizer

    tokenizer = Tokenizer(tokenizer_dir)
    return {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


class _HashedFile:
    """A file of Python's, whose contents are hashed as they are written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write_torch(path: Path, content: Any) -> str:
    """Returns the checksum of what was written."""
    import torch

    # Through a file of Python's: torch's own writer turns a full disk into an error without its cause.
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        torch.save(content, cast(BinaryIO, hashed))
    return hashed.sha256.hexdigest()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def _write_mark(folder: Path, step: int, tokens: int, written: dict[str, str]) -> None:
    """Reads all files back; ``written`` are checksums that they must have."""
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = FileMark(path.stat().st_size, file_sha256(path))
    for name, checksum in written.items():
        if files[name].sha256 != checksum:
            raise OSError(errno.EIO, "what was written is not what is read back", str(folder / name))
    mark = CheckpointMark(step, tokens, datetime.now(UTC).isoformat(), _versions(), files)
    write_sealed(folder / MARK, asdict(mark))
    _sync(folder / MARK)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, has reached the disk."""
    if path.is_dir():
        if os.name == "nt":  # Windows opens no folder, and keeps its list of names in a journal
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Any:
    """Settings as YAML can hold them."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_weights(weights: "dict[str, Tensor]", config: "Config") -> None:
    """Raises ValueError unless LitGPT's own GPT of this config would load ``weights`` strictly."""
    import torch
    from litgpt.model import GPT

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"weights are not those of the model config {config.name!r}; they differ in {different[:5]}")


def _check_plain(value: Any, place: str) -> None:
    """Raises TypeError for what `torch.load(weights_only=True)` would refuse: better now than when resuming."""
    from torch import Tensor

    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"{place}'s keys")
            _check_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif value is not None and not isinstance(value, Tensor) and type(value) not in (bool, int, float, str, bytes):
        raise TypeError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}; expected plain values")


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind ``error`` (torch.save raises a RuntimeError on top of it), if any."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _cannot_save(folder: Path, cause: OSError, weights: "dict[str, Tensor]", training_state: Any) -> str:
    kept = _last_saved(folder.parent.glob(f"*/{MARK}"))
    kept_text = f"the newest whole checkpoint is {kept}" if kept else "no older checkpoint is there"
    if cause.errno in _DISK_FULL:
        needed = _bytes(weights) + _bytes(training_state)
        free = shutil.disk_usage(folder.parent).free
        return (
            f"the disk is full: the checkpoint {folder} needs about {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB "
            f"are free; {kept_text}. Free some space, or choose another --out_dir, and continue with `--resume auto`."
        )
    reason = cause.strerror or str(cause)
    place = cause.filename or folder
    return (
        f"cannot write the checkpoint {folder}: {reason} ({place}); {kept_text}. Choose a folder that can be written "
        "with --out_dir, or change its permissions."
    )


def _bytes(content: Any) -> int:
    from torch import Tensor

    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(_bytes(item) for item in content.values())
    return sum(_bytes(item) for item in content) if isinstance(content, list | tuple) else 0


# ------------------------------------------------------------------------------------------------------------- verify


def verify(folder: Path, files: Collection[str] | None = None) -> CheckpointMark:
    """Reads ``files`` of a checkpoint (all when None) and compares their sizes and checksums with its mark.

    Args:
        folder: the checkpoint folder; its ``lit_model.pth`` is taken for it too.
        files: what will be used, so that generating from a checkpoint does not read its optimizer state.

    Raises:
        UserError: not a checkpoint, not complete, or damaged: names the file and the newest whole one beside it.
    """
    folder = as_folder(folder)
    try:
        return _checked(folder, files, checksums=True)
    except _Damaged as damage:
        found = _beside(folder)
        hint = f"the newest whole checkpoint beside it is {found}" if found else "no whole checkpoint lies beside it"
        raise UserError(f"{damage}; {hint}.") from None


def as_folder(checkpoint: Path) -> Path:
    """The checkpoint folder that is meant: ``checkpoint``, or its parent where a ``.pth`` file is named."""
    checkpoint = Path(checkpoint)
    return checkpoint.parent if checkpoint.suffix == ".pth" and not checkpoint.is_dir() else checkpoint


def is_whole(folder: Path, files: Collection[str] | None = None) -> bool:
    """Whether ``folder`` is marked complete and its files have the sizes of the mark: quick, reads no contents."""
    try:
        _checked(Path(folder), files, checksums=False)
    except _Damaged:
        return False
    return True


def read_mark(folder: Path) -> CheckpointMark:
    """The mark of a checkpoint folder, unchecked against its files.

    Raises:
        UserError: there is none, or it can't be read.
    """
    try:
        return _read_mark(as_folder(folder))
    except _Damaged as damage:
        raise UserError(f"{damage}.") from None


def _read_mark(folder: Path) -> CheckpointMark:
    if not folder.is_dir():
        raise _Damaged(f"found no checkpoint at {folder}; expected a folder with {WEIGHTS} and {MARK}")
    path = folder / MARK
    if not path.is_file():
        if (folder / WEIGHTS).is_file():
            raise _Damaged(
                f"{folder} has no {MARK}: it is half a checkpoint, or was not written here "
                "(`litgpt generate` and `litgpt chat` read LitGPT's own checkpoints)"
            )
        raise _Damaged(f"{folder} is no checkpoint: it holds neither {WEIGHTS} nor {MARK}")
    try:
        content = read_sealed(path)
        files = {name: FileMark(**known_fields(FileMark, file)) for name, file in content["files"].items()}
        if outside := [name for name in files if name in ("", "..") or PureWindowsPath(name).name != name]:
            raise ValueError(f"{outside[0]!r} is no file of this folder")
        mark = CheckpointMark(**{**known_fields(CheckpointMark, content), "files": files})
        if (type(mark.step), type(mark.tokens), type(mark.time)) != (int, int, str):
            raise TypeError("step and tokens are whole numbers, the time is a text")
        return mark
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise _Damaged(f"{path} is damaged: it can't be read") from None


def _checked(folder: Path, files: Collection[str] | None, *, checksums: bool) -> CheckpointMark:
    mark = _read_mark(folder)
    for name in mark.files if files is None else files:
        path = folder / name
        if name not in mark.files:
            raise _Damaged(f"{folder} was saved without {name}")
        try:
            size = path.stat().st_size
            if size != mark.files[name].size:
                raise _Damaged(f"{path} is truncated or changed: {size:,} bytes instead of {mark.files[name].size:,}")
            if checksums and file_sha256(path) != mark.files[name].sha256:
                raise _Damaged(f"{path} is damaged: its checksum is not the one that {MARK} names")
        except FileNotFoundError:
            raise _Damaged(f"{path} is missing") from None
        except OSError as error:
            raise _Damaged(f"{path} can't be read: {error.strerror or error}") from None
    return mark


# --------------------------------------------------------------------------------------------------------------- find


def newest(root: Path) -> Path | None:
    """The whole checkpoint that was saved last anywhere under ``root`` (judged by marks and sizes), or None.

    Its training state may have been removed to save space: generating and evaluating need none.
    """
    return _last_saved(Path(root).rglob(MARK))


def _in_or_below(folder: Path) -> Path | None:
    """As `newest`, two levels deep: for a hint, nobody waits until a whole disk is searched."""
    return _last_saved(path for pattern in ("*/", "*/*/") for path in folder.glob(f"{pattern}{MARK}"))


def _beside(folder: Path) -> Path | None:
    """As `newest`, among the folders beside ``folder``."""
    return _last_saved(path for path in folder.parent.glob(f"*/{MARK}") if path.parent != folder)


def _last_saved(marks: Iterable[Path]) -> Path | None:
    found = []
    for folder, mark in _marked(marks):
        if is_whole(folder, mark.files.keys() - {TRAINING_STATE}):
            found.append((mark.time, mark.step, folder))
    return max(found)[-1] if found else None


def newest_undamaged(out_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that training can go on from, among those of one run, its contents read and
    compared, or None; and what is wrong with those of higher steps."""
    found: list[tuple[float, str, Path]] = []
    for folder in (*Path(out_dir).glob("step-*"), Path(out_dir) / "final", *leftovers(Path(out_dir))):
        try:
            mark = _read_mark(folder)
            found.append((mark.step, mark.time, folder))
        except _Damaged:
            step = folder.name.removeprefix("step-")
            if folder.is_dir() and not folder.name.startswith("."):  # of a final one, the step is not known
                found.append((int(step) if step.isdigit() else math.inf, "", folder))
    damages: list[str] = []
    for _, _, folder in sorted(found, reverse=True):
        try:
            if TRAINING_STATE not in _checked(folder, None, checksums=True).files:
                continue
            return folder, damages
        except _Damaged as damage:
            if not folder.name.startswith("."):
                damages.append(str(damage))
    return None, damages


def _marked(marks: Iterable[Path]) -> Iterator[tuple[Path, CheckpointMark]]:
    for path in marks:
        try:
            yield path.parent, _read_mark(path.parent)
        except _Damaged:
            continue


def resolve(checkpoint: Path | None, root: Path = Path("checkpoints")) -> Path:
    """The folder that a script works on: the one named, or the newest whole one under ``root``.

    Raises:
        UserError: none is named and none is there; or the named one is no whole checkpoint.
    """
    if checkpoint is not None:
        folder = as_folder(checkpoint)
        try:
            _read_mark(folder)
        except _Damaged as damage:
            below = _in_or_below(folder) if folder.is_dir() else None
            if found := below or _beside(folder) or newest(root):
                where = "in it" if below else "beside it" if found.parent == folder.parent else f"under {root}"
                hint = f"the newest whole checkpoint {where} is {found}"
            else:
                hint = f"no whole checkpoint lies beside it or under {root}"
            raise UserError(f"{damage}; {hint}.") from None
        return folder
    found = newest(root)
    if found is None:
        raise UserError(
            f"found no whole checkpoint under {root}; expected one that `uv run python run_train.py` wrote. "
            "Train a model first (`make quickstart`), or name the checkpoint folder."
        )
    return found


# --------------------------------------------------------------------------------------------------------------- load


def load_config(folder: Path) -> "Config":
    """The model config of a checkpoint folder.

    Raises:
        UserError: it is missing or damaged.
    """
    from litgpt import Config

    path = as_folder(folder) / MODEL_CONFIG
    _verify_if_marked(path)
    try:
        config = Config.from_file(path)
        _ = config.mlp_class, config.norm_class  # found in litgpt.model and torch.nn by their names
        if not all(isinstance(getattr(config, size), int) for size in ("n_layer", "n_embd", "n_head", "block_size")):
            raise TypeError("n_layer, n_embd, n_head and block_size are whole numbers")
        return config
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected a checkpoint folder with its model config.") from None
    except Exception as error:  # of YAML, of its values, or of LitGPT's checks
        raise UserError(f"{path} is no LitGPT model config: {type(error).__name__}: {error}.") from None


def load_weights(folder: Path, *, mmap: bool = False) -> "dict[str, Tensor]":
    """The state dict in LitGPT's keys, on the CPU. Also of a folder that LitGPT wrote (no mark, key ``model``).

    Args:
        mmap: map the file instead of reading it. While the tensors live, Windows can't replace the folder.

    Raises:
        UserError: it is missing or damaged.
    """
    weights = _load_torch(as_folder(folder) / WEIGHTS, mmap=mmap)
    inner: dict[str, Tensor] = weights.get("model", weights)
    if not isinstance(inner, dict) or not all(hasattr(value, "is_floating_point") for value in inner.values()):
        raise UserError(f"{as_folder(folder) / WEIGHTS} holds no state dict; expected tensors by their names.")
    return inner


def load_lora_weights(folder: Path) -> "dict[str, Tensor]":
    """The LoRA parameters in LitGPT's keys, on the CPU. Raises as ``load_weights``."""
    return _load_torch(Path(folder) / LORA_WEIGHTS)


def load_training_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as ``training_state``, on the CPU.

    Raises:
        UserError: the checkpoint was saved without it, or it is missing or damaged.
    """
    return _load_torch(as_folder(folder) / TRAINING_STATE)


def load_hyperparameters(folder: Path) -> dict[str, Any]:
    """The settings of the run that wrote the checkpoint.

    Raises:
        UserError: they are missing or damaged.
    """
    path = as_folder(folder) / HYPERPARAMETERS
    _verify_if_marked(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except Exception as error:  # of YAML, or of its values
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a YAML mapping of settings.")
    return with_current_class_paths(content)


def context_of(folder: Path, max_seq_length: int | None = None) -> int:
    """Return how many tokens a checkpoint's model is given at once.

    Positions beyond the length that a model was trained at are noise to it, even where its block size allows them.

    Args:
        folder: the checkpoint.
        max_seq_length: what the user asks for; None for the ``train.max_seq_length`` of the run that wrote the
            checkpoint, or the model's block size where no run is known, as for an imported model.

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
    train = _plain(hyperparameters.get("train"))
    trained = train.get("max_seq_length") if isinstance(train, dict) else None
    return trained if isinstance(trained, int) and 1 <= trained <= block_size else block_size


def load_model(folder: Path, device: "torch.device", dtype: "torch.dtype", max_seq_length: int | None = None) -> "GPT":
    """The model of a checkpoint, in evaluation mode, with the layers of ``custom_moe``.

    Args:
        max_seq_length: its context, as in `context_of`.

    Raises:
        UserError: the checkpoint is damaged, or the context is too long.
    """
    import torch
    from litgpt import GPT

    from custom_moe import use_custom_moe
    from litmoe.layers import use_fast_layers

    config, context = load_config(folder), context_of(folder, max_seq_length)
    # Mapped, the weights are in memory once; but Windows could not replace the folder while the model lives.
    weights = load_weights(folder, mmap=os.name != "nt")
    try:
        with use_custom_moe(), use_fast_layers(), torch.device("meta"):
            gpt = GPT(config)
    except Exception as error:
        raise UserError(f"{as_folder(folder) / MODEL_CONFIG} describes no model that can be built: {error}.") from error

    def dtype_of(name: str, tensor: "torch.Tensor") -> "torch.dtype | None":
        if name.endswith("e_score_correction_bias"):  # a router's selection bias is fp32 in any model
            return torch.float32
        return dtype if tensor.is_floating_point() else None

    weights = {name: tensor.to(device, dtype_of(name, tensor)) for name, tensor in weights.items()}
    try:
        gpt.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {as_folder(folder)} are not those of its {MODEL_CONFIG}: {error}") from None
    gpt.max_seq_length = context
    gpt.cos, gpt.sin = gpt.rope_cache(device=device)  # not in the state dict
    return gpt.eval()


def load_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint.

    Raises:
        UserError: the checkpoint was saved without one, or its files are damaged.
    """
    from litmoe.data.tokenizers import litgpt_tokenizer

    files = read_mark(folder).files.keys() & set(TOKENIZER_FILES)
    if not files:
        raise UserError(f"{folder} holds no tokenizer: it was trained without a tokenizer_dir. Use `litgpt generate`.")
    verify(folder, files)
    return litgpt_tokenizer(folder)


def choose_device(device: str) -> "torch.device":
    """The device of that name; "auto" is a GPU where there is one (CUDA, then Apple's), else the CPU.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot use the device {device!r}: {reason}. `--device cpu` works everywhere.") from None


def _verify_if_marked(path: Path) -> None:
    if (path.parent / MARK).exists() or not path.exists():
        verify(path.parent, [path.name])


def _load_torch(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    import torch

    _verify_if_marked(path)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} is refused, and nothing in it was run: it is damaged, or holds more than tensors and plain values"
            f"{f' ({found.group(1)})' if found else ''}, which could be code. Get these weights from somebody who saves"
            " tensors alone, or as safetensors: `uv run python export_hf.py --import HF_FOLDER CHECKPOINT`."
        ) from None
    except Exception as error:  # torch raises many kinds for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a mapping of names to tensors.")
    return content
