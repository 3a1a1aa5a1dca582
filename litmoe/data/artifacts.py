"""Log a prepared data folder as a dataset artifact on Weights & Biases, and fetch one to train on.

An artifact holds the tokens with their metadata, the tokenizer that made them (in ``tokenizer/``) and, if the data
folder has it, the text. A fetched folder is used unchanged; nothing is tokenized again.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litmoe.cli import UserError, command, quoted
from litmoe.data import manifest
from litmoe.data.manifest import DEFAULT_TOKENIZER_DIR, Manifest, checked_manifest
from litmoe.data.tokenizers import FILES as TOKENIZER_FILES
from litmoe.renaming import rename

if TYPE_CHECKING:
    import wandb

DEFAULT_PROJECT = "litmoe"
# Folder of the tokenizer inside an artifact.
TOKENIZER = "tokenizer"
API_SECONDS = 30
# The parts of a reference become folder names, so ".." and the like are not allowed.
PART = r"[\w-](?:[\w .+@()-]*[\w+@()-])?"
REFERENCE = re.compile(
    rf"(?:(?:(?P<entity>{PART})/)?(?P<project>{PART})/)?(?P<name>{PART})(?::(?P<alias>[\w-][\w.-]*))?"
)


# --- logging ---


def log_dataset(
    data_dir: Path,
    *,
    tokenizer_dir: Path | None = None,
    name: str | None = None,
    project: str | None = None,
    entity: str | None = None,
) -> str:
    """Log the tokens, the tokenizer and the text of a prepared folder as one dataset artifact.

    With ``WANDB_MODE=offline`` this needs neither network nor account, and the run stays on this machine.

    Args:
        data_dir: a folder that ``prepare_data.py`` completed.
        tokenizer_dir: the tokenizer that made its tokens; None for ``data_dir/tokenizer`` or ``data/tokenizer``.
        name: name of the artifact; None for ``dataset-FOLDER``.
        project: None for ``WANDB_PROJECT``, else ``litmoe``.
        entity: user or team; None for ``WANDB_ENTITY``, else the account's default.

    Returns:
        ``entity/project/name:version``, or offline the folder of the run.

    Raises:
        UserError: the tokens are incomplete, stale or damaged, the tokenizer is another one, or W&B refuses.
    """
    metadata = checked_manifest(data_dir)
    manifest.verify(data_dir)
    tokenizer = _tokenizer_folder(data_dir, metadata, tokenizer_dir)
    # W&B allows these characters in names.
    name = name or "dataset-" + re.sub(r"[^\w.-]", "-", data_dir.resolve().name, flags=re.ASCII)
    project = project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT

    import wandb

    mode = wandb.setup().settings.mode
    if mode == "disabled":
        raise UserError(f"W&B is disabled (WANDB_MODE), so {name} was not logged; use WANDB_MODE=online or offline.")
    is_offline = mode == "offline"
    # The run exists only to log the artifact, so it needs no output, statistics or code.
    settings = wandb.Settings(console="off", x_disable_stats=True, disable_code=True, disable_git=True)
    with _wandb_errors(f"W&B did not accept {name} in the project {project!r}"):
        artifact = _artifact(data_dir, metadata, tokenizer, name)
        run = wandb.init(entity=entity, project=project, job_type="dataset", name=f"log-{name}", settings=settings)
        exit_code = 1
        try:
            logged = run.log_artifact(artifact)
            if not is_offline:
                logged.wait()
            exit_code = 0
        finally:
            # Not `with run`, which prints a traceback for every error.
            run.finish(exit_code=exit_code)
        # The version is known only after the upload.
        if not is_offline:
            reference = str(logged.qualified_name)
            print(f"Logged {reference}. Train on it: {command('run_train.py', '--wandb-dataset', reference)}")
            return reference
    folder = Path(run.dir).parent
    print(
        f"Logged {name} offline in {folder}, which refers to the files in {data_dir}. Upload it while they are "
        f"unchanged: uv run wandb sync {quoted(folder)}"
    )
    return str(folder)


def _artifact(data_dir: Path, metadata: Manifest, tokenizer: Path, name: str) -> "wandb.Artifact":
    import wandb

    counts = {
        split: {"documents": entry.documents, "tokens": entry.tokens, "bytes": entry.bytes}
        for split, entry in metadata.splits.items()
    }
    artifact = wandb.Artifact(
        name,
        type="dataset",
        description=f"Text and tokens for LitMoE. Tokenizer: {metadata.tokenizer.name}.",
        metadata={"source": metadata.source.name, "tokenizer": metadata.tokenizer.name, "splits": counts},
    )
    # "immutable" and skip_cache: W&B reads the files where they are instead of copying them twice.
    # Other text in these folders does not belong to the tokens.
    text = manifest.SPLITS if metadata.source.name == manifest.TEXT else ()
    for folder in ("tokens", *text):
        if (data_dir / folder).is_dir():
            artifact.add_dir(str((data_dir / folder).absolute()), folder, policy="immutable", skip_cache=True)
    # Single files, because the folder of a tokenizer may be a checkpoint.
    files = {f"{TOKENIZER}/{file}": tokenizer / file for file in TOKENIZER_FILES}
    for entry, path in files.items():
        if path.is_file():
            artifact.add_file(str(path.absolute()), entry, policy="immutable", skip_cache=True)
    return artifact


def _tokenizer_folder(data_dir: Path, metadata: Manifest, tokenizer_dir: Path | None) -> Path:
    """Return the folder of the tokenizer that made the tokens."""
    places = [tokenizer_dir] if tokenizer_dir else [data_dir / TOKENIZER, DEFAULT_TOKENIZER_DIR]
    folder = manifest.find_tokenizer(places, metadata.tokenizer.sha256)
    if folder is not None:
        return folder
    raise UserError(
        f"the tokenizer that made the tokens of {data_dir} ({metadata.tokenizer.name}, "
        f"{metadata.tokenizer.vocab_size} tokens) is not in {' or '.join(map(str, places))}; name its folder with "
        "--tokenizer-dir."
    )


# --- fetching ---


@dataclass(frozen=True)
class Reference:
    """The name of an artifact."""

    entity: str
    project: str
    name: str
    alias: str
    """A version such as ``v3``, which never changes, or an alias such as ``latest``, which moves"""

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"


def parse_reference(reference: str) -> Reference:
    """Parse ``entity/project/name:alias``; entity and project default to ``WANDB_ENTITY`` and ``WANDB_PROJECT``.

    Raises:
        UserError: the reference has another form.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"{reference!r} names no W&B dataset; expected entity/project/name:alias, like me/litmoe/dataset-texts:v0."
        )
    parts = match.groupdict(default="")
    for part in ("project", "entity"):
        variable = f"WANDB_{part.upper()}"
        parts[part] = parts[part] or os.environ.get(variable, "")
        if not parts[part]:
            raise UserError(f"{reference!r} names no {part}; write entity/project/name:alias, or set {variable}.")
    return Reference(parts["entity"], parts["project"], parts["name"], parts["alias"] or "latest")


def fetch_dataset(reference: str, into: Path) -> Path:
    """Download a dataset artifact that ``log_dataset`` logged, unless this version is there already.

    A version (``:v3``) that was downloaded before needs no network. Several processes may call this at once: one
    downloads, the others wait.

    Args:
        reference: ``entity/project/name:alias``, see ``parse_reference``.
        into: the folder of all downloaded datasets.

    Returns:
        The data folder with ``tokens/``, ``tokenizer/`` and, if it was logged, the text.

    Raises:
        UserError: the reference is invalid, the artifact is missing or not a dataset of LitMoE, or the download failed.
            Nothing incomplete is left behind.
    """
    wanted = parse_reference(reference)
    versions = into / wanted.entity / wanted.project / wanted.name
    if re.fullmatch(r"v\d+", wanted.alias) and manifest.read(versions / wanted.alias) is not None:
        return versions / wanted.alias

    import wandb
    from filelock import FileLock

    if wandb.setup().settings.mode in ("offline", "disabled"):
        raise UserError(f"W&B is offline (WANDB_MODE) and {wanted} is not in {into}; set WANDB_MODE=online.")
    with _wandb_errors(f"{wanted} could not be fetched"):
        api = wandb.Api(overrides={"entity": wanted.entity, "project": wanted.project}, timeout=API_SECONDS)
        # Only the metadata and the list of files; the files follow if they are not there yet.
        artifact = api.artifact(str(wanted))
        _check_entries(wanted, artifact)
    target = versions / str(artifact.version)
    versions.mkdir(parents=True, exist_ok=True)
    # The ranks of a run ask for the same dataset at the same time.
    with FileLock(versions / f".{target.name}.lock"):
        if manifest.read(target) is None:
            _download(wanted, artifact, target)
    return target


def _check_entries(reference: Reference, artifact: "wandb.Artifact") -> None:
    entries = artifact.manifest.entries
    if "tokens/manifest.json" not in entries:
        raise UserError(
            f"{reference} is not a dataset to train on (type {artifact.type}, without tokens/manifest.json). Log one: "
            f"`{command('wandb_dataset.py')}`"
        )
    # Whoever can write the artifact must not be able to write elsewhere here, or to make this machine read its files.
    for name, entry in entries.items():
        is_inside = manifest.lies_inside(name) and manifest.lies_inside(str(entry.path))
        if entry.ref is not None or not is_inside:
            raise UserError(f"{reference} is refused: its entry {name!r} is outside of the artifact.")


def _download(reference: Reference, artifact: "wandb.Artifact", target: Path) -> None:
    print(f"Fetching dataset {reference} into {target}")
    # Next to the target, so that the last step is a rename on the same disk.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, "data")
        with _wandb_errors(f"{reference} could not be fetched completely"), _cache_in(temporary):
            artifact.download(root=str(folder))
            artifact.verify(root=str(folder))  # the checksum of every file, and no other files
        metadata = manifest.read(folder)
        if metadata is None:
            raise UserError(f"the tokens in {reference} are incomplete; log them again with wandb_dataset.py.")
        for text in metadata.text:
            if (folder / text.path).is_file():
                # With its old time, the text counts as unchanged without reading it at each start of a run.
                os.utime(folder / text.path, ns=(text.mtime_ns, text.mtime_ns))
        shutil.rmtree(target, ignore_errors=True)  # a damaged copy
        rename(folder, target)


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Keep W&B's second copy of every download in ``folder``.

    ``skip_cache`` does not help: its threads share one attribute that says where the next file goes.
    """
    previous = os.environ.get("WANDB_CACHE_DIR")
    os.environ["WANDB_CACHE_DIR"] = str(Path(folder, "cache"))
    try:
        yield
    finally:
        if previous is None:
            del os.environ["WANDB_CACHE_DIR"]
        else:
            os.environ["WANDB_CACHE_DIR"] = previous


@contextmanager
def _wandb_errors(what: str) -> Iterator[None]:
    """Turn the errors of W&B's client into one message."""
    import requests
    import wandb

    try:
        yield
    except UserError:
        raise
    except (wandb.errors.Error, requests.RequestException, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what}: {reason}. Check the names, the network and the account (`uv run wandb login`, or WANDB_API_KEY); "
            "without an account, WANDB_MODE=offline logs datasets on this machine."
        ) from None
