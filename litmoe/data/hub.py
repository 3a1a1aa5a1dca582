"""Find the files of a dataset of the Hugging Face Hub, or of a local folder with the layout of one."""

import os
import re
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from litmoe.cli import UserError, quoted
from litmoe.data import manifest
from litmoe.data.files import HUB, Location, in_short, is_compressed, suffix
from litmoe.data.manifest import FileRecord
from litmoe.data.tokenizers import OFFLINE_WAYS

HUB_NAME = re.compile(r"hf:(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?")
PARQUET_BRANCH = "refs/convert/parquet"
"""The branch of a Hub dataset with the Hub's own conversion."""
# The Hub converts only the beginning of large datasets, into partial-train.
CONVERTED_FILE = re.compile(r"(?P<config>[^/]+)/(?:partial-)?(?P<split>[^/]+)/[^/]+\.parquet")
# Publishers use all of these names for the same split.
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


def _is_streamable(file: Location) -> bool:
    """Return whether a file has one of the formats that are streamed from the Hub."""
    return suffix(file) in (".parquet", ".jsonl") and not is_compressed(file)


class HubFiles(NamedTuple):
    """The files of a dataset at one revision."""

    files: dict[str, list[Location]]
    """``train``, and ``val`` if the dataset has its own validation rows."""
    records: dict[str, tuple[FileRecord, ...]]
    """The same files as the manifest stores them."""
    location: str
    """Dataset and commit, or the name of the folder."""
    revision: str | None
    """Given to ``Dataset.find``, finds the same files again."""


@dataclass(frozen=True)
class Dataset:
    """The address of a dataset."""

    path: str
    """``owner/name`` on the Hub, or a local folder."""
    config: str | None = None
    flag: str = "--source"
    """The command-line flag that named it, for messages."""

    def find(self, revision: str | None = None) -> HubFiles:
        """Find the files. The first request is a short one, so that a missing network shows at once.

        Args:
            revision: ``HubFiles.revision`` of an earlier call, to find the same files.

        Raises:
            UserError: without a network, or for a dataset that does not exist or cannot be read.
        """
        # huggingface_hub reads this variable when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if Path(self.path).is_dir():
            return self._find_in_folder()
        try:
            return self._find_on_hub(revision)
        except UserError:
            raise
        except Exception as error:  # the transport raises many kinds of errors without a network
            raise UserError(
                f"{self.path} is not available from the Hugging Face Hub ({in_short(error)}).\n{OFFLINE_WAYS}"
            ) from None

    def _find_in_folder(self) -> HubFiles:
        splits = self._find_files(None)
        if splits is None:
            raise UserError(
                f"{self.path} is a local folder without .parquet or plain .jsonl files, the only ones that hf: "
                f"reads. Name the folder without hf: {self.flag} {quoted(self.path)}"
            )
        files = self._splits(splits)
        records = {split: self._local_records(paths) for split, paths in files.items()}
        return HubFiles(files, records, Path(self.path).name, None)

    def _find_on_hub(self, revision: str | None) -> HubFiles:
        # "COMMIT" finds files of the main branch again, "BRANCH@COMMIT" those of the Hub's own conversion.
        branch, _, commit = (revision or "").rpartition("@")
        splits = None
        if branch != PARQUET_BRANCH:
            # A branch may change between two requests, so all of them name one commit.
            sha = revision = self._commit("main", commit)
            splits, commit = self._find_files(sha), ""
        if splits is None:
            # A dataset with a loading script or in another format: the Hub has converted it to parquet.
            sha = self._commit(PARQUET_BRANCH, commit)
            splits, revision = self._find_converted_files(sha), f"{PARQUET_BRANCH}@{sha}"
        files = self._splits(splits)
        records = {split: self._hub_records(paths, sha) for split, paths in files.items()}
        return HubFiles(files, records, f"{self.path}@{sha}", revision)

    def _commit(self, branch: str, pinned: str) -> str:
        """Return the commit to read: the pinned one of an earlier call, or without one the newest of the branch."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return str(HfApi().dataset_info(self.path, revision=pinned or branch, timeout=10).sha)
        except RevisionNotFoundError:
            if pinned:
                # The history was rewritten since the earlier call: take the newest files.
                return self._commit(branch, "")
            raise UserError(self._unreadable()) from None
        except GatedRepoError:
            raise UserError(f"{self.path} is gated: accept its terms on the Hub and `uv run hf auth login`.") from None
        except RepositoryNotFoundError:
            raise UserError(
                f"the Hub has no dataset {self.path}, or it is private (then: `uv run hf auth login`)."
            ) from None

    def _unreadable(self) -> str:
        return (
            f"{self.path} contains neither .parquet nor plain .jsonl files, and the Hub has no parquet of it. Name "
            f"another dataset, or convert its rows and name the files: {self.flag} PATH."
        )

    def _find_files(self, sha: str | None) -> dict[str, list[Location]] | None:
        """Return the files of each split by the dataset's card and the Hub's conventions; None if not readable.

        The datasets library knows both. It takes 0.9 s to import, so only this method imports it.
        """
        import datasets
        from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

        datasets.disable_progress_bars()
        try:
            # The builder only lists the files; it downloads no rows.
            data_files = datasets.load_dataset_builder(self.path, self.config, revision=sha).config.data_files
        except (RuntimeError, DatasetNotFoundError, DataFilesNotFoundError):
            # RuntimeError: a loading script, which the library no longer runs.
            return None
        except ValueError as error:
            # The message of a missing config contains the list of configs.
            configs = re.search(r"onfig.*?(\[.*?\])", str(error), re.DOTALL)
            if configs:
                raise self._wrong_config(configs[1]) from None
            raise UserError(f"{self.path} cannot be read ({in_short(error)}).") from None
        # The library's split names are objects of its own.
        splits: dict[str, list[Location]] = {str(split): [*names] for split, names in data_files.items()}
        files = list(chain.from_iterable(splits.values()))
        return splits if files and all(map(_is_streamable, files)) else None

    def _wrong_config(self, configs: str) -> UserError:
        problem = f"but no {self.config!r}" if self.config else "and none is named"
        return UserError(
            f"{self.path} has the configs {configs}, {problem}; name one: {self.flag} hf:{self.path}:CONFIG"
        )

    def _find_converted_files(self, sha: str) -> dict[str, list[Location]]:
        """Return the files of each split in the Hub's own conversion to parquet: ``CONFIG/SPLIT/NNNN.parquet``."""
        from huggingface_hub import HfApi

        configs: dict[str, dict[str, list[Location]]] = {}
        names = sorted(HfApi().list_repo_files(self.path, revision=sha, repo_type="dataset"))
        for match in filter(None, map(CONVERTED_FILE.fullmatch, names)):
            files = configs.setdefault(match["config"], {}).setdefault(match["split"], [])
            files.append(f"{HUB}datasets/{self.path}@{sha}/{match.string}")
        # The only config, or the one that is called default. With several others, the error lists them.
        config = self.config or (next(iter(configs)) if len(configs) == 1 else "default")
        if config not in configs:
            raise self._wrong_config(f"[{', '.join(configs)}]")
        splits = configs[config]
        if any("/partial-train/" in str(file) for file in splits.get("train", [])):
            print(f"The Hub has only the beginning of {self.path} as parquet ({config}/partial-train).")
        return splits

    def _splits(self, splits: dict[str, list[Location]]) -> dict[str, list[Location]]:
        """Return the files of train and val under these names. A test split is never used."""
        if "train" not in splits:
            raise UserError(f"{self.path} has no split called train, but {', '.join(splits)}; name another dataset.")
        names = {"train": "train", "val": next((name for name in VALIDATION_SPLITS if name in splits), "")}
        unused = [name for name in splits if name not in names.values()]
        if unused:
            print(f"Splits of {self.path} that are not used: {', '.join(unused)}")
        return {split: splits[name] for split, name in names.items() if name}

    def _local_records(self, files: list[Location]) -> tuple[FileRecord, ...]:
        # Without times: only the content of a file identifies it, as on the Hub.
        folder = Path(self.path).resolve()
        records = [manifest.record(Path(file).resolve(), folder) for file in files]
        return tuple(replace(entry, path=f"{folder.name}/{entry.path}", mtime_ns=0) for entry in records)

    def _hub_records(self, files: list[Location], sha: str) -> tuple[FileRecord, ...]:
        from huggingface_hub import HfApi

        names = [str(file).removeprefix(f"{HUB}datasets/{self.path}@{sha}/") for file in files]
        sizes: dict[str, int] = {}
        # The Hub answers for at most 500 files at once.
        for start in range(0, len(names), 500):
            entries = HfApi().get_paths_info(self.path, names[start : start + 500], revision=sha, repo_type="dataset")
            sizes |= {entry.path: getattr(entry, "size", 0) for entry in entries}
        # A commit names the content of its files, so they are not read for a checksum.
        paths = {f"{self.path}@{sha}/{name}": sizes[name] for name in names}
        return tuple(FileRecord(path, size, 0, sha256(path.encode()).hexdigest()) for path, size in paths.items())
