"""Every departure from stock LitGPT, in one place: applied by an explicit call, undone afterwards.

``litgpt.model.LLaMAMoE`` and ``.Block`` by ``custom_moe``'s: speed, balance losses, expert load.

``litgpt.pretrain.choose_logger`` by ``recipe.training.logs``: several loggers at once, one CSV file that a resumed run
goes on with, the W&B run id kept in ``out_dir``.

``litgpt.pretrain.FSDPStrategy`` by DDP: the models of this project fit on each device, and FSDP does not run on a CPU.

``litgpt.pretrain.capture_hparams`` by a line that says where the settings stand: LitGPT prints all of them each time.

``litgpt.pretrain.main`` (and so ``fit``, ``validate``, ``get_lr``, ``save_checkpoint``, ``validate_args``) by
``recipe.training.pretrain.main``, because LitGPT's

- compiles the model without a choice, which ends the program on Windows without Triton or without a C++ compiler;
- hands the optimizer parameters without groups, so norms, embeddings and routers decay; ``fit`` then writes one
  learning rate over all groups, 0 at the first update, and never reaches ``min_lr``;
- initializes the output projection of ``GptNeoxMLP`` like any other matrix, where GPT-2 and GPT-NeoX (and LitGPT in its
  other layers) make it smaller with depth;
- measures FLOPs by running the model on the meta device, which dies in ``LLaMAMoE``, or counts every expert for every
  token; here they come from the config by formula (``recipe.flops``);
- calls ``save_hyperparameters`` at each checkpoint, which parses ``sys.argv`` of the running script anew and ends the
  program; and a killed save leaves half a file under the final name;
- ignores ``max_steps``, ``max_time`` and ``epochs``, drops the micro batches that do not fill a last step, logs the
  last accumulation window in place of the interval, does not average validation over devices, and dies without
  validation data;
- divides tokens by a timestamp in its closing tokens-per-second line.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import litgpt.pretrain
import torch
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info

from custom_moe import use_custom_moe

# The names that are replaced and the parameters that LitGPT calls them with.
_EXPECTED = {
    "main": (
        *("fabric", "devices", "seed", "initial_checkpoint_dir", "resume", "config", "data", "out_dir"),
        *("tokenizer_dir", "tokenizer", "train", "eval", "optimizer", "num_nodes"),
    ),
    "choose_logger": ("logger_name", "out_dir", "name", "log_interval", "log_args", "resume", "kwargs"),
    "capture_hparams": (),
    "FSDPStrategy": None,
    # Called, not replaced.
    "setup": None,
    "initialize_weights": ("fabric", "model", "n_layer", "n_embd"),
    "get_dataloaders": ("fabric", "data", "tokenizer", "train", "block_size"),
}


class _DataParallel:
    """Stands where LitGPT builds its FSDP strategy; not a subclass, so that LitGPT's ``isinstance`` checks say no."""

    def __new__(cls, *args: Any, **kwargs: Any) -> DDPStrategy:  # type: ignore[misc]
        if torch.cuda.is_available() and not torch.distributed.is_nccl_available():  # Windows
            rank_zero_info("This torch has no NCCL, so the GPUs exchange gradients by gloo, which is slower.")
            return DDPStrategy(process_group_backend="gloo")
        return DDPStrategy()


@contextmanager
def patched_litgpt(*, main: Callable, choose_logger: Callable, summary: dict[str, Any]) -> Iterator[None]:
    """While open, ``litgpt.pretrain.setup`` runs with this project's parts; afterwards LitGPT is as it was.

    Args:
        main: takes what ``litgpt.pretrain.main`` takes.
        choose_logger: takes what ``litgpt.utils.choose_logger`` takes.
        summary: what LitGPT prints at the start in place of all settings.

    Raises:
        RuntimeError: where the installed LitGPT does not have the names and signatures that this replaces.
    """
    _check_litgpt()
    replacements = {
        "main": main,
        "choose_logger": choose_logger,
        "capture_hparams": lambda: summary,
        "FSDPStrategy": _DataParallel,
    }
    originals = {name: getattr(litgpt.pretrain, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(litgpt.pretrain, name, replacement)
        with use_custom_moe():
            yield
    finally:
        for name, original in originals.items():
            setattr(litgpt.pretrain, name, original)


def _check_litgpt() -> None:
    problems = []
    for name, parameters in _EXPECTED.items():
        found = getattr(litgpt.pretrain, name, None)
        if found is None:
            problems.append(f"litgpt.pretrain.{name} is missing")
        elif parameters is not None and set(inspect.signature(found).parameters) != set(parameters):
            problems.append(
                f"litgpt.pretrain.{name} takes ({', '.join(inspect.signature(found).parameters)}),"
                f" expected ({', '.join(parameters)})"
            )
    if problems:
        raise RuntimeError(
            f"this project does not fit the installed litgpt {version('litgpt')}: {'; '.join(problems)}. "
            "Install the version that pyproject.toml pins."
        )
