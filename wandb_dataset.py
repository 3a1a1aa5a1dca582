"""Log a prepared data folder (text, tokens and tokenizer) as one dataset artifact on Weights & Biases.

uv run python wandb_dataset.py --data-dir data/custom_text --wandb-artifact dataset-custom_text
WANDB_MODE=offline uv run python wandb_dataset.py            # no network, no account: `wandb sync` uploads it later
uv run python run_train.py --wandb-dataset ENTITY/PROJECT/dataset-custom_text:latest    # train on it
"""

from pathlib import Path

from litmoe.cli import run_cli


def main(
    data_dir: Path = Path("data/custom_text"),
    tokenizer_dir: Path | None = None,
    wandb_artifact: str | None = None,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
) -> None:
    """Log a prepared data folder (text, tokens and tokenizer) as one dataset artifact on Weights & Biases.

    Args:
        data_dir: Folder of the corpus, prepared by prepare_data.py.
        tokenizer_dir: Tokenizer of its tokens (default: DATA_DIR/tokenizer or data/tokenizer).
        wandb_artifact: Artifact name (default: dataset-FOLDER).
        wandb_project: W&B project (default: WANDB_PROJECT, else litmoe).
        wandb_entity: W&B user or team (default: WANDB_ENTITY, else the account's default).
    """
    from litmoe.data.artifacts import log_dataset

    log_dataset(data_dir, tokenizer_dir=tokenizer_dir, name=wandb_artifact, project=wandb_project, entity=wandb_entity)


if __name__ == "__main__":
    run_cli(main)
