"""Datasets on Weights & Biases: a prepared data folder as one artifact, and an artifact back as a prepared data folder.

An artifact holds what training needs and no more: the tokens with their manifest, the tokenizer that made them (in
``tokenizer/``), and the text, under the names that they have in the data folder. A fetched folder is trained on as it
lies; nothing is tokenized again.
"""

import json
import os
import re
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from litmoe.checksummed_json import write_json
from litmoe.cli import UserError, command, quoted
from litmoe.data import manifest
from litmoe.data.manifest import Manifest

if TYPE_CHECKING:
    import wandb

DEFAULT_PROJECT = "litmoe"
DEFAULT_TOKENIZER = Path("data/tokenizer")
TOKENIZER = "tokenizer"
"""Folder of the tokenizer inside an artifact."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
RECORD = "wandb_artifact.json"
"""Written last into a fetched folder: which version it is and the size of each of its files."""
MAX_FILES_IN_METADATA = 100
CONNECT_SECONDS = 10
API_SECONDS = 30


# --- logging ---


def log_dataset(
    data_dir: Path,
    *,
    tokenizer_dir: Path | None = None,
    name: str | None = None,
    project: str | None = None,
    entity: str | None = None,
) -> str:
    """Logs the tokens, the tokenizer and the text of a prepared folder as one dataset artifact.

    With ``WANDB_MODE=offline`` it needs neither network nor account and keeps the run on this machine.

    Args:
        data_dir: a folder that ``prepare_data.py`` completed.
        tokenizer_dir: the tokenizer that made its tokens; None: ``data_dir/tokenizer`` or ``data/tokenizer``, whichever
            that is.
        name: of the artifact; None: ``dataset-`` and the folder's name.
        project: None: ``WANDB_PROJECT``, else ``litmoe``.
        entity: user or team; None: ``WANDB_ENTITY``, else the account's own.

    Returns:
        ``entity/project/name:version``, or offline the folder of the run.

    Raises:
        UserError: for tokens that are missing, incomplete, stale or damaged, another tokenizer, a bad name, a missing
            key or network, or when W&B refuses.
    """
    from litmoe.data.text_data import checked_manifest

    found = checked_manifest(data_dir)
    manifest.verify(data_dir, found.splits)
    files = _files(data_dir, found, tokenizer_dir)
    name = name or "dataset-" + re.sub(r"[^\w.-]", "-", data_dir.resolve().name, flags=re.ASCII)
    if not re.fullmatch(r"[\w.-]{1,128}", name, flags=re.ASCII):
        raise UserError(f"{name!r} is no artifact name; letters, digits, '-', '_' and '.' make one (--wandb-artifact).")
    project = project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    entity = entity or os.environ.get("WANDB_ENTITY") or None

    import wandb

    mode = wandb.setup().settings.mode
    if mode == "disabled":
        raise UserError(f"W&B is disabled (WANDB_MODE), so {name} was not logged; use WANDB_MODE=online or offline.")
    if mode != "offline":
        _require_connection()
    artifact = wandb.Artifact(name, type="dataset", description=_description(found), metadata=_metadata(found))
    for entry, path in files.items():
        # Not copied anywhere: the files are whole and nothing writes to them in place.
        artifact.add_file(str(path.absolute()), entry, policy="immutable", skip_cache=True)
    settings = wandb.Settings(console="off", x_disable_stats=True, disable_code=True, disable_git=True)
    with _wandb_errors(f"W&B did not take {name} into the project {project!r}"):
        run = wandb.init(entity=entity, project=project, job_type="dataset", name=f"log-{name}", settings=settings)
        folder, failed = Path(run.dir).parent, True
        try:
            logged = run.log_artifact(artifact)
            if mode != "offline":
                logged.wait()
            failed = False
        finally:  # not `with run`: that prints a traceback
            run.finish(exit_code=int(failed))
        if mode == "offline":
            print(
                f"Logged {name} ({len(files)} files) offline, in {folder}. It refers to the files as they lie; while "
                f"they stay as they are, this sends it: uv run wandb sync {quoted(folder)}"
            )
            return str(folder)
        reference = str(logged.qualified_name)
    print(
        f"Logged {reference} ({len(files)} files). Train on it: "
        + command("run_train.py", "--wandb-dataset", reference)
    )
    return reference


def _files(data_dir: Path, found: Manifest, tokenizer_dir: Path | None) -> dict[str, Path]:
    """Name in the artifact to file, of all that is logged."""
    paths = [manifest.manifest_path(data_dir)]
    for split, entry in found.splits.items():
        folder = manifest.tokens_dir(data_dir, split)
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        paths += [folder / "index.json", folder / "split.json"]
        paths += [folder / chunk["filename"] for chunk in index["chunks"]]
        paths += [data_dir / record.path for record in entry.text]
    paths.append(data_dir / "source.json")
    files = {path.relative_to(data_dir).as_posix(): path for path in paths if path.is_file()}
    tokenizer = _tokenizer(data_dir, found, tokenizer_dir)
    files |= {f"{TOKENIZER}/{name}": tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
    return files


def _tokenizer(data_dir: Path, found: Manifest, tokenizer_dir: Path | None) -> Path:
    """The folder of the tokenizer that made the tokens."""
    candidates = [tokenizer_dir] if tokenizer_dir else [data_dir / TOKENIZER, DEFAULT_TOKENIZER]
    for folder in candidates:
        if (folder / "tokenizer.json").is_file() and manifest.tokenizer_fingerprint(folder) == found.tokenizer.sha256:
            return folder
    raise UserError(
        f"the tokenizer that made the tokens of {data_dir} ({found.tokenizer.name}, {found.tokenizer.vocab_size} "
        f"tokens) does not lie in {' or '.join(map(str, candidates))}; name its folder with --tokenizer-dir."
    )


def _metadata(found: Manifest) -> dict[str, Any]:
    """The manifest, without the lists of files where those are long (they are in tokens/manifest.json anyway)."""
    values = asdict(found)
    for split in values["splits"].values():
        for name in ("text", "files"):
            if len(split[name]) > MAX_FILES_IN_METADATA:
                split[name] = f"{len(split[name])} files, see tokens/manifest.json"
    return values


def _description(found: Manifest) -> str:
    counts = "; ".join(
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes / 1e6:,.1f} MB"
        for name, split in found.splits.items()
    )
    return f"Text and tokens for LitMoE. {counts}. Tokenizer: {found.tokenizer.name}."


# --- fetching ---


@dataclass(frozen=True)
class Reference:
    """Which artifact, of whom, which version."""

    entity: str
    project: str
    name: str
    alias: str
    """A version such as ``v3``, which never changes, or a name such as ``latest``, which moves."""

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"

    @property
    def is_version(self) -> bool:
        return re.fullmatch(r"v\d+", self.alias) is not None

    def folder(self, into: Path) -> Path:
        """Where this version lies below ``into``."""
        return into / self.entity / self.project / self.name / self.alias


def parse_reference(reference: str) -> Reference:
    """Reads ``entity/project/name:alias``; entity and project may be left to ``WANDB_ENTITY`` and ``WANDB_PROJECT``.

    Raises:
        UserError: for anything else.
    """
    path, _, alias = reference.partition(":")
    parts = path.split("/")
    # They become names of folders, so they must be that and nothing more.
    fit = all(re.fullmatch(r"[\w-][\w .+@()-]*", part) and not part.endswith((".", " ")) for part in parts)
    if len(parts) > 3 or not fit or not re.fullmatch(r"[\w-][\w.-]*", alias or "latest"):
        raise UserError(
            f"{reference!r} names no W&B dataset; expected entity/project/name:alias, like me/litmoe/dataset-texts:v0."
        )
    for variable in ("WANDB_PROJECT", "WANDB_ENTITY")[len(parts) - 1 :]:
        if not os.environ.get(variable):
            what = variable.removeprefix("WANDB_").lower()
            raise UserError(f"{reference!r} names no {what}; write entity/project/name:alias, or set {variable}.")
    defaults = [os.environ.get("WANDB_ENTITY", ""), os.environ.get("WANDB_PROJECT", "")]
    entity, project, name = defaults[: 3 - len(parts)] + parts
    return Reference(entity, project, name, alias or "latest")


def fetch_dataset(reference: str, into: Path) -> Path:
    """Fetches a dataset artifact that ``log_dataset`` logged, unless that very version lies there whole already.

    A version (``:v3``) that lies there needs no network. Several processes may call it at once: one fetches, the others
    wait and find it.

    Args:
        reference: ``entity/project/name:alias``, see ``parse_reference``.
        into: the folder of all fetched datasets.

    Returns:
        The data folder, whole: ``tokens/``, ``tokenizer/`` and, where it was logged, the text.

    Raises:
        UserError: for a bad reference, a missing project or artifact, one that is no dataset of ours or would write
            outside of its folder, a missing key or network, a full disk. Nothing half-fetched is left behind.
    """
    wanted = parse_reference(reference)
    if wanted.is_version and _is_whole(wanted.folder(into), wanted):
        print(f"Dataset {wanted} lies in {wanted.folder(into)}")
        return wanted.folder(into)

    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        raise UserError(f"W&B is offline (WANDB_MODE) and {wanted} is not in {into}.{_versions_there(wanted, into)}")
    try:
        _require_connection()
    except UserError as error:
        raise UserError(f"{error}{_versions_there(wanted, into)}") from None
    artifact = _find(wanted)
    found = Reference(wanted.entity, wanted.project, wanted.name, str(artifact.version))
    target = found.folder(into)

    with _locked(target):
        if _is_whole(target, found, str(artifact.digest)):
            print(f"Dataset {found} lies in {target}")
        else:
            _download(artifact, found, target)
    return target


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds a version's folder; where nothing came of it, the lock and the empty folders above it go again."""
    from filelock import FileLock

    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        with lock:
            yield
    finally:
        if not target.exists():
            with suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()


def _is_whole(folder: Path, reference: Reference, digest: str | None = None) -> bool:
    """Whether a folder holds this version of an artifact, each file in its size, its tokens complete."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = record["artifact"] == str(reference) and digest in (None, record["digest"])
        sizes = all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False
    return same and sizes and manifest.read(folder) is not None


def _versions_there(wanted: Reference, into: Path) -> str:
    """A hint at versions that were fetched before, for someone without a network."""
    folders = sorted(wanted.folder(into).parent.glob("v*"))
    versions = [Reference(wanted.entity, wanted.project, wanted.name, folder.name) for folder in folders]
    whole = [str(version) for version in versions if _is_whole(version.folder(into), version)]
    return f" Fetched before, usable without a network: {', '.join(whole)}" if whole else ""


def _find(wanted: Reference) -> "wandb.Artifact":
    """Asks W&B for an artifact."""
    import wandb

    with _wandb_errors(f"{wanted} could not be fetched"):
        api = wandb.Api(overrides={"entity": wanted.entity, "project": wanted.project}, timeout=API_SECONDS)
        try:
            artifact = api.artifact(str(wanted))
        except (ValueError, wandb.errors.CommError) as error:
            if "project" in str(error) and "not found under entity" in str(error):
                raise UserError(
                    f"W&B knows no project {wanted.entity}/{wanted.project}, or this account may not see it; check the "
                    "name, WANDB_ENTITY, and `uv run wandb login`."
                ) from None
            if "not found" in str(error):
                raise UserError(
                    f"W&B has no artifact {wanted.name}:{wanted.alias} in {wanted.entity}/{wanted.project}; its page "
                    "there lists names and versions, and `uv run python wandb_dataset.py` logs one."
                ) from None
            raise
        if f"tokens/{manifest.manifest_path(Path()).name}" not in artifact.manifest.entries:
            raise UserError(
                f"{wanted} is no dataset that can be trained on (type {artifact.type}, without tokens/manifest.json); "
                "`uv run python wandb_dataset.py` logs such a dataset."
            )
    return artifact


def _download(artifact: "wandb.Artifact", found: Reference, target: Path) -> None:
    """Fetches into a temporary folder beside ``target``, checks everything, and renames."""
    entries = artifact.manifest.entries
    for name, entry in entries.items():
        if entry.ref is not None or not (manifest.lies_inside(name) and manifest.lies_inside(str(entry.path))):
            raise UserError(f"{found} is refused: its entry {name!r} lies outside of it. Nothing was written.")
    size = sum(entry.size or 0 for entry in entries.values())
    free = shutil.disk_usage(target.parent).free
    if 2 * size > free:  # W&B's client keeps a second copy of each file while it downloads
        raise UserError(
            f"{found} needs {2 * size / 1e9:.1f} GB of disk space to be fetched, and {free / 1e9:.1f} GB are free "
            f"at {target.parent}; free some, or choose another --wandb-artifacts-dir."
        )
    prefix = f".{target.name}.fetching-"
    for left_behind in target.parent.glob(f"{prefix}*"):  # by a process that was killed: nobody else holds the lock
        shutil.rmtree(left_behind, ignore_errors=True)
    print(f"Fetching dataset {found} ({len(entries)} files, {size / 1e6:,.1f} MB) into {target}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, "data")
        with _wandb_errors(f"{found} could not be fetched whole, and nothing of it was kept"), _cache_in(temporary):
            artifact.download(root=str(folder))
            artifact.verify(root=str(folder))  # every file's checksum, and no file beside them
        whole = manifest.read(folder)
        if whole is None:
            raise UserError(
                f"the tokens in {found} are not whole; log the dataset anew: uv run python wandb_dataset.py"
            )
        for text in (text for split in whole.splits.values() for text in split.text):
            if (folder / text.path).is_file():
                # With its time of then, the manifest knows the text without reading all of it at each start.
                os.utime(folder / text.path, ns=(text.mtime_ns, text.mtime_ns))
        files = {str(entry.path): (folder / entry.path).stat().st_size for entry in entries.values()}
        record = {"artifact": str(found), "digest": str(artifact.digest), "files": files}
        write_json(folder / RECORD, record)
        manifest.replace_folder(folder, target)


# --- W&B's client ---


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """W&B's client keeps a second copy of every file in its cache, for good; this way it goes with ``folder``.

    (Its ``skip_cache`` is no way out: one attribute that its threads share says where the next file goes.)
    """
    before = os.environ.get("WANDB_CACHE_DIR")
    os.environ["WANDB_CACHE_DIR"] = str(Path(folder, "cache"))
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_CACHE_DIR"]
        else:
            os.environ["WANDB_CACHE_DIR"] = before


@contextmanager
def _wandb_errors(what: str) -> Iterator[None]:
    """Turns what W&B's client raises into one message."""
    import requests
    import wandb

    try:
        yield
    except UserError:
        raise
    except (wandb.errors.Error, requests.RequestException, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason}") from None


def _require_connection() -> None:
    """Says at once that there is no key or no network; W&B's client takes half a minute and blames the key."""
    import wandb
    from wandb.sdk.lib import wbauth

    url = wandb.setup().settings.base_url
    host = urlsplit(url)
    without = "without an account, datasets are logged on this machine with WANDB_MODE=offline"
    try:
        key = wbauth.authenticate_session(host=url, source="LitMoE", prompt=False, update_session=False)
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"the W&B key is not valid: {error}. Mend WANDB_API_KEY, or: uv run wandb login") from None
    if key is None:
        raise UserError(f"no W&B key for {url}: `uv run wandb login` saves one, or set WANDB_API_KEY; {without}.")
    if urllib.request.getproxies().get(host.scheme) and not urllib.request.proxy_bypass(str(host.hostname)):
        return
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((str(host.hostname), port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"W&B cannot be reached at {url} ({error}); check the network, or WANDB_BASE_URL; {without}."
        ) from None
