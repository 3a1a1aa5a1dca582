"""Pretrain with stock LitGPT from one of this project's run files. benchmarks/train_step.py compares with it.

    uv run python benchmarks/stock_pretrain.py --config configs/quickstart.yaml --train.max_tokens 300000

Takes the flags of run_train.py. LitGPT's own `setup`, `main`, `fit`, model and loss run, and its `torch.compile` of the
model, which TORCH_COMPILE_DISABLE=1 in the environment turns off. Only what would crash is replaced.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import litgpt.pretrain
import torch

from litmoe.config import parse_run
from litmoe.hardware import choose_precision, processes


def main() -> None:
    """Train, and print the allocator's peak on a GPU."""
    torch.set_float32_matmul_precision("high")  # as LitGPT's command line does
    run = parse_run(sys.argv[1:])
    settings = run.settings
    # LitGPT parses sys.argv again at each checkpoint and would exit, because the flags are not its own.
    litgpt.pretrain.save_hyperparameters = lambda *_: None
    if settings.model.mlp_class_name == "LLaMAMoE":
        # It runs the model on the meta device, where LLaMAMoE calls `nonzero` and crashes.
        litgpt.pretrain.measure_flops = lambda *_: 0

    devices, num_nodes = processes(settings)
    litgpt.pretrain.setup(
        model_name=settings.model.name,
        model_config=settings.model,
        out_dir=settings.out_dir,
        precision=choose_precision(settings.precision)[0],
        # Not litgpt.data.TextFiles, which loses the ends of documents: the same tokens in the same order.
        data=settings.data,
        train=settings.train,
        eval=settings.eval,
        log=settings.log,
        optimizer=run.optimizer,
        devices=devices,
        num_nodes=num_nodes,
        tokenizer_dir=settings.tokenizer_dir,
        logger_name="csv",
        seed=settings.seed,
    )
    if torch.cuda.is_available():
        print(f"Peak memory {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB.")


if __name__ == "__main__":
    main()
