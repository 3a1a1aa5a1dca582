"""Stock LitGPT pretraining of one of this project's run files: what benchmarks/train_step.py compares with.

    uv run python benchmarks/stock_pretrain.py --config configs/quickstart.yaml --train.max_tokens 300000

Takes run_train.py's flags. LitGPT's own `setup`, `main`, `fit`, model, and loss run, and its `torch.compile` of the
model, which TORCH_COMPILE_DISABLE=1 in the environment turns off. Changed is only what ends the program otherwise.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import litgpt.pretrain
import torch
from litgpt.model import Config

from litmoe.config import parse_run
from litmoe.hardware import choose_precision, processes


def main() -> None:
    """One run, and the allocator's peak on a GPU."""
    torch.set_float32_matmul_precision("high")  # as LitGPT's command line does first of all
    run = parse_run(sys.argv[1:])
    settings = run.settings
    replace_what_ends_the_program(settings.model)
    devices, num_nodes = processes(settings)
    litgpt.pretrain.setup(
        model_name=settings.model.name,
        model_config=settings.model,
        out_dir=settings.out_dir,
        precision=choose_precision(settings.precision)[0],
        # In place of litgpt.data.TextFiles, which loses the ends of documents: the same tokens in the same order.
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


def replace_what_ends_the_program(config: Config) -> None:
    """The changes, each beside its reason."""
    # It parses sys.argv anew at each checkpoint, as `litgpt pretrain`'s, and ends the program.
    litgpt.pretrain.save_hyperparameters = lambda *_: None
    if config.mlp_class_name == "LLaMAMoE":
        # It runs the model on the meta device, where LLaMAMoE asks which tokens an expert got (`nonzero`) and dies.
        litgpt.pretrain.measure_flops = lambda *_: 0


if __name__ == "__main__":
    main()
