"""Find the files of a dataset of the Hugging Face Hub, or of a local folder with the layout of one."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from litmoe.cli import UserError, quoted
from litmoe.data import manifest
from litmoe.data.files import HUB, Location, connection_errors, in_short, is_compressed, is_remote, suffix
from litmoe.data.manifest import FileRecord
from litmoe.data.tokenizers import OFFLINE_WAYS

HUB_NAME = re.compile(r"hf:(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?")
PARQUET_BRANCH = "refs/convert/parquet"
"""The branch of a Hub dataset with the Hub's own conversion."""


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
        sha = None
        if Path(self.path).is_dir():
            splits, location = self._find_in_folder(), Path(self.path).name
        else:
            # A branch may change between two requests, so all of them name one commit.
            splits, sha, revision = self._find_on_hub(revision)
            location = f"{self.path}@{sha}"
        files = self._splits(splits)
        with connection_errors(f"{HUB}datasets/{self.path}" if sha else Path(self.path)):
            records = {split: self._records(paths, sha) for split, paths in files.items()}
        return HubFiles(files, records, location, revision)

    def _find_in_folder(self) -> dict[str, list[Location]]:
        splits = self._find_files(None)
        if splits is None:
            raise UserError(
                f"{self.path} is a local folder without .parquet or plain .jsonl files, the only ones that hf: "
                f"reads. Name the folder without hf: {self.flag} {quoted(self.path)}"
            )
        return splits

    def _find_on_hub(self, revision: str | None) -> tuple[dict[str, list[Location]], str, str]:
        """Return the files of each split, their commit, and the revision that finds them again."""
        if revision is None or not revision.startswith(PARQUET_BRANCH):
            sha = self._commit(revision)
            splits = self._find_files(sha)
            if splits is not None:
                return splits, sha, sha
            revision = PARQUET_BRANCH
        # A dataset with a loading script or in another format: the Hub has converted it to parquet.
        sha = self._commit(revision)
        with connection_errors(f"{HUB}datasets/{self.path}"):
            return self._find_converted_files(sha), sha, f"{PARQUET_BRANCH}@{sha}"

    def _commit(self, revision: str | None) -> str:
        """Return the commit of a branch, or check a commit of an earlier call; None is the main branch."""
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        # "BRANCH@COMMIT" pins a commit of the Hub's own conversion.
        branch, _, pinned = (revision or "").rpartition("@")
        try:
            wanted = pinned or branch or None
            return str(huggingface_hub.HfApi().dataset_info(self.path, revision=wanted, timeout=10).sha)
        except RevisionNotFoundError:
            if revision and revision != PARQUET_BRANCH:
                # The history was rewritten since the earlier call: take the newest files.
                return self._commit(branch or None)
            raise UserError(self._unreadable()) from None
        except GatedRepoError:
            raise UserError(f"{self.path} is gated: accept its terms on the Hub and `uv run hf auth login`.") from None
        except RepositoryNotFoundError:
            raise UserError(
                f"the Hub has no dataset {self.path}, or it is private (then: `uv run hf auth login`)."
            ) from None
        except Exception as error:  # the transport raises many kinds of errors without a network
            raise UserError(
                f"{self.path} is not available from the Hugging Face Hub ({in_short(error)}).\n{OFFLINE_WAYS}"
            ) from None

    def _unreadable(self) -> str:
        return (
            f"{self.path} contains neither .parquet nor plain .jsonl files, and the Hub has no parquet of it. Name "
            f"another dataset, or convert its rows and name the files: {self.flag} PATH."
        )

    def _find_files(self, sha: str | None) -> dict[str, list[Location]] | None:
        """Return the files of each split by the dataset's card and the Hub's conventions; None if not readable."""
        data_files = self._load_data_files(sha)
        if not data_files:
            return None
        files: dict[str, list[Location]] = {}
        for split, names in data_files.items():
            # The library's split names are objects of its own.
            files[str(split)] = [name if is_remote(name) else Path(name) for name in map(str, names)]
        every = [file for names in files.values() for file in names]
        return files if every and all(map(_is_streamable, every)) else None

    def _load_data_files(self, sha: str | None) -> Mapping[Any, Iterable[Any]] | None:
        """Return the files of each split as the datasets library lists them; None for a dataset that it can't load.

        The library knows the conventions of the Hub. It takes 0.9 s to import, so only this method imports it.
        """
        import datasets
        from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

        datasets.disable_progress_bars()
        try:
            # The builder only lists the files; it downloads no rows.
            builder = datasets.load_dataset_builder(self.path, self.config, revision=sha)
            data_files: Mapping[Any, Iterable[Any]] | None = builder.config.data_files
            return data_files
        except (RuntimeError, DatasetNotFoundError, DataFilesNotFoundError):
            # RuntimeError: a loading script, which the library no longer runs.
            return None
        except Exception as error:
            raise self._load_error(error) from None

    def _load_error(self, error: Exception) -> UserError:
        # The message of a missing config contains the list of configs.
        configs = re.search(r"\[.*?\]", str(error))
        if isinstance(error, ValueError) and configs and "onfig" in str(error):
            return self._wrong_config(configs.group())
        if isinstance(error, ValueError):
            return UserError(f"{self.path} cannot be read ({in_short(error)}).")
        return UserError(f"{self.path} is not available ({in_short(error)}).\n{OFFLINE_WAYS}")

    def _wrong_config(self, configs: str) -> UserError:
        problem = f"but no {self.config!r}" if self.config else "and none is named"
        return UserError(
            f"{self.path} has the configs {configs}, {problem}; name one: {self.flag} hf:{self.path}:CONFIG"
        )

    def _find_converted_files(self, sha: str) -> dict[str, list[Location]]:
        """Return the files of each split in the Hub's own conversion to parquet: ``CONFIG/SPLIT/NNNN.parquet``."""
        configs = self._list_converted_files(sha)
        if not configs:
            raise UserError(self._unreadable())
        wanted = self.config
        if wanted is None:
            # The only config, or the one that is called default. With several others, the error lists them.
            wanted = next(iter(configs)) if len(configs) == 1 else "default"
        if wanted not in configs:
            raise self._wrong_config(f"[{', '.join(configs)}]")
        return configs[wanted]

    def _list_converted_files(self, sha: str) -> dict[str, dict[str, list[Location]]]:
        """Return the files in the Hub's own conversion by config and split."""
        from huggingface_hub import HfApi

        configs: dict[str, dict[str, list[Location]]] = {}
        for entry in sorted(HfApi().list_repo_files(self.path, revision=sha, repo_type="dataset")):
            config, *folders, name = entry.split("/")
            if len(folders) != 1 or suffix(name) != ".parquet":
                continue
            # The Hub converts only the beginning of large datasets, into partial-train.
            split = folders[0].removeprefix("partial-")
            # Print this once per split: at its first file.
            if split == "train" and folders[0] != split and name.startswith("0000."):
                print(f"The Hub has only the beginning of {self.path} as parquet ({config}/{folders[0]}).")
            configs.setdefault(config, {}).setdefault(split, []).append(f"{HUB}datasets/{self.path}@{sha}/{entry}")
        return configs

    def _splits(self, splits: dict[str, list[Location]]) -> dict[str, list[Location]]:
        """Return the files of train and val under these names. A test split is never used."""
        if "train" not in splits:
            raise UserError(f"{self.path} has no split called train, but {', '.join(splits)}; name another dataset.")
        # Publishers use all of these names for the same split.
        validation = next((name for name in ("validation", "valid", "val", "dev") if name in splits), None)
        unused = [name for name in splits if name not in ("train", validation)]
        if unused:
            print(f"Splits of {self.path} that are not used: {', '.join(unused)}")
        files = {"train": splits["train"]}
        if validation:
            files["val"] = splits[validation]
        return files

    def _records(self, files: list[Location], sha: str | None) -> tuple[FileRecord, ...]:
        if sha is None:
            # Without times: only the content of a file identifies it, as on the Hub.
            folder = Path(self.path).resolve()
            records = [manifest.record(Path(file).resolve(), folder) for file in files]
            return tuple(replace(entry, path=f"{folder.name}/{entry.path}", mtime_ns=0) for entry in records)
        from huggingface_hub import HfApi

        prefix = f"{HUB}datasets/{self.path}@{sha}/"
        # The Hub answers for at most 500 files at once.
        names = [str(file).removeprefix(prefix) for file in files]
        sizes: dict[str, int] = {}
        for start in range(0, len(names), 500):
            some = names[start : start + 500]
            for entry in HfApi().get_paths_info(self.path, some, revision=sha, repo_type="dataset"):
                sizes[entry.path] = getattr(entry, "size", 0)
        # A commit names the content of its files, so they are not read for a checksum.
        paths = {name: f"{self.path}@{sha}/{name}" for name in names}
        return tuple(
            FileRecord(path, sizes[name], 0, sha256(path.encode()).hexdigest()) for name, path in paths.items()
        )
