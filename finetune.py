"""Tunes a checkpoint to follow instructions.

uv run python prepare_data.py --instruct stories --data_dir data/instruct
uv run python finetune.py checkpoints/quickstart/final --config configs/finetune-quickstart.yaml
uv run python finetune.py checkpoints/final --data_dir data/instruct --epochs 3 --lr 1.0e-4
uv run python finetune.py checkpoints/final --lora_r 8                    # LoRA: few weights are trained
uv run python finetune.py checkpoints/final --prompt_style alpaca --micro-batch-size 1 --max-seq-length 512
uv run python finetune.py checkpoints/final --resume auto                 # go on where the last one stopped
uv run python finetune.py --print_config                                  # what would run
uv run torchrun --standalone --nproc_per_node=2 finetune.py checkpoints/final
"""

import sys

from litmoe.cli import exit_with_message


def main() -> None:
    """Read the settings, find conversations and checkpoint, train."""
    from litmoe.finetune_config import parse_finetuning

    run = parse_finetuning(sys.argv[1:])  # before the imports below, which take seconds

    from litmoe.hardware import select_accelerator
    from litmoe.train.finetune import finetune, ready_to_finetune
    from litmoe.train.saving import locked
    from litmoe.validation import check

    select_accelerator(run.settings.accelerator)
    check(run.settings, run.optimizer)
    with locked(run.settings.out_dir):
        finetune(run, resume_from=ready_to_finetune(run.settings))


if __name__ == "__main__":
    exit_with_message(main)
