"""Pretrain a model with LitGPT.

uv run python run_train.py                                                # MoE-200M by train_config.yaml
uv run python run_train.py --config configs/quickstart.yaml               # minutes on a CPU, brings its own text
uv run python run_train.py --train.max_tokens 1000000000 --optimizer.init_args.lr 6.0e-4 --model.n_layer 6
uv run python run_train.py --hours 8                                      # as many steps as fit
uv run python run_train.py --resume auto                                  # go on where the last one stopped
uv run python run_train.py --upcycle checkpoints/dense/final --out_dir checkpoints/moe    # a dense model's mixture
uv run python run_train.py --print_config                                 # what would run
uv run python run_train.py --plan rtx3060-laptop                          # what it needs there; --plan: on this machine
uv run torchrun --standalone --nproc_per_node=2 run_train.py              # two GPUs
"""

import sys

from litmoe.cli import exit_with_message


def main() -> None:
    """Read the settings, prepare data and checkpoint, train."""
    from litmoe.config import parse_run

    wants_plan = any(argument.partition("=")[0] == "--plan" for argument in sys.argv)
    if wants_plan:
        from litmoe.train.plan import show_plan

        return show_plan(sys.argv[1:])
    run = parse_run(sys.argv[1:])  # before the imports below, which take seconds

    from litmoe.hardware import select_accelerator
    from litmoe.train.preflight import ready
    from litmoe.train.pretrain import pretrain
    from litmoe.train.saving import locked
    from litmoe.validation import check

    select_accelerator(run.settings.accelerator)
    check(run.settings, run.optimizer)
    with locked(run.settings.out_dir):
        run, resume_from = ready(run)
        pretrain(run, resume_from=resume_from)


if __name__ == "__main__":
    exit_with_message(main)
