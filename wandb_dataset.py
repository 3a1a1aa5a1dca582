"""Logs a prepared data folder (text, tokens and tokenizer) as one dataset artifact on Weights & Biases.

uv run python wandb_dataset.py --data-dir data/custom_text --wandb-artifact dataset-custom_text
WANDB_MODE=offline uv run python wandb_dataset.py            # no network, no account: `wandb sync` sends it later
uv run python run_train.py --wandb-dataset ENTITY/PROJECT/dataset-custom_text:latest    # trains on it, anywhere
"""

from pathlib import Path

from litmoe.cli import run_door


def main(
    data_dir: Path = Path("data/custom_text"),
    tokenizer_dir: Path | None = None,
    wandb_artifact: str | None = None,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
) -> None:
    """Logs a prepared data folder (text, tokens and tokenizer) as one dataset artifact on Weights & Biases.

    Args:
        data_dir: Folder of the corpus, as prepare_data.py made it.
        tokenizer_dir: The tokenizer that made its tokens (default: DATA_DIR/tokenizer or data/tokenizer).
        wandb_artifact: Name of the artifact (default: dataset-FOLDER).
        wandb_project: Its project (default: WANDB_PROJECT, else litmoe).
        wandb_entity: Its user or team (default: WANDB_ENTITY, else the account's own).
    """
    from litmoe.data.artifacts import log_dataset

    log_dataset(data_dir, tokenizer_dir=tokenizer_dir, name=wandb_artifact, project=wandb_project, entity=wandb_entity)


if __name__ == "__main__":
    run_door(main)
