"""Check the tokens of a data folder before they are used. This file does not import torch or LitGPT."""

from pathlib import Path

from litmoe.cli import UserError, command
from litmoe.data import manifest
from litmoe.data.files import text_files
from litmoe.data.manifest import Manifest


def complete_manifest(data_dir: Path) -> Manifest:
    """Return the metadata of complete tokens.

    Raises:
        UserError: the tokens are missing or incomplete.
    """
    metadata = manifest.read(data_dir)
    if metadata is None:
        state = "are not complete" if manifest.tokens_dir(data_dir).is_dir() else "do not exist"
        raise UserError(
            f"the tokens of {data_dir} {state}. Make them: `{command('prepare_data.py', '--data_dir', data_dir)}`"
        )
    return metadata


def checked_manifest(data_dir: Path) -> Manifest:
    """Return the metadata of tokens that are complete and were made from the text as it is now.

    Text that was removed to save space is not an error.

    Raises:
        UserError: the tokens are missing, incomplete or stale.
    """
    metadata = complete_manifest(data_dir)
    for split, counts in metadata.splits.items():
        # The validation split may have been made from files of the training folder.
        folders = {record.path.split("/")[0] for record in counts.text} | {split}
        files = [file for name in sorted(folders) for file in text_files(data_dir / name)]
        # The text was removed, or never written (a corpus that was streamed from the Hub).
        if not files:
            continue
        changes = manifest.changed_files(counts.text, manifest.refresh(files, data_dir, counts.text))
        if changes:
            raise UserError(
                f"the text of {data_dir} changed since it was tokenized ({'; '.join(changes[:3])}). Tokenize it again: "
                f"`{command('prepare_data.py', '--data_dir', data_dir)}`"
            )
    return metadata
