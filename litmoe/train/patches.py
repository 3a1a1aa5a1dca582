"""Every departure from stock LitGPT, in one place: applied by an explicit call, undone afterwards.

``litgpt.model.LLaMAMoE`` and ``.Block`` by ``custom_moe``'s: speed, balance losses, expert load.

``litgpt.model.CausalSelfAttention`` and ``.RMSNorm`` by ``litmoe.layers``': fewer passes over memory.

``litgpt.pretrain.choose_logger`` by ``litmoe.train.logs``: several loggers at once, one CSV file that a resumed run
goes on with, the W&B run id kept in ``out_dir``.

``litgpt.pretrain.FSDPStrategy`` by the run's own choice (``litmoe.train.distributed``): DDP, or torch's second FSDP,
which also runs on CPUs and knows stacked experts.

``litgpt.pretrain.capture_hparams`` by a line that says where the settings stand: LitGPT prints all of them each time.

``litgpt.pretrain.main`` (and so ``fit``, ``validate``, ``get_lr``, ``save_checkpoint``, ``validate_args``) by
``litmoe.train.pretrain.main``, because LitGPT's

- compiles the model without a choice, which ends the program on Windows without Triton or without a C++ compiler;
- hands the optimizer parameters without groups, so norms, embeddings and routers decay; ``fit`` then writes one
  learning rate over all groups, 0 at the first update, and never reaches ``min_lr``;
- initializes the output projection of ``GptNeoxMLP`` like any other matrix, where GPT-2 and GPT-NeoX (and LitGPT in its
  other layers) make it smaller with depth;
- measures FLOPs by running the model on the meta device, which dies in ``LLaMAMoE``, or counts every expert for every
  token; here they come from the config by formula (``litmoe.flops``);
- calls ``save_hyperparameters`` at each checkpoint, which parses ``sys.argv`` of the running script anew and ends the
  program; and a killed save leaves half a file under the final name;
- ignores ``max_steps``, ``max_time`` and ``epochs``, drops the micro batches that do not fill a last step, logs the
  last accumulation window in place of the interval, does not average validation over devices, and dies without
  validation data;
- divides tokens by a timestamp in its closing tokens-per-second line.

``litgpt.finetune.full.main`` and ``litgpt.finetune.lora.main`` by ``litmoe.train.finetune.main``, which trains by
the same loop as pretraining, because theirs

- can't resume LoRA at all, and the other only by reading all batches again, with other random states;
- average the losses of micro batches, so that the tokens of short answers count for more;
- know no balance of experts, loop over the experts with a wait for the device each, and LoRA's layer leaves shared
  experts out.

Their ``choose_logger`` and strategies as above, their ``pprint`` by nothing: it prints all settings.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

import litgpt.finetune.full
import litgpt.finetune.lora
import litgpt.pretrain
from lightning.fabric.strategies import Strategy

from custom_moe import use_custom_moe
from litmoe.layers import use_fast_layers

# The names that are replaced and the parameters that LitGPT calls them with.
_MAIN = (
    *("fabric", "devices", "seed", "config", "data", "out_dir", "train", "eval", "optimizer", "num_nodes"),
    *("initial_checkpoint_dir", "resume", "tokenizer_dir", "tokenizer"),
)
_LOGGER = ("logger_name", "out_dir", "name", "log_interval", "log_args", "resume", "kwargs")
_EXPECTED: dict[ModuleType, dict[str, tuple[str, ...] | None]] = {
    litgpt.pretrain: {
        "main": _MAIN,
        "choose_logger": _LOGGER,
        "capture_hparams": (),
        "FSDPStrategy": None,
        # Called, not replaced.
        "setup": None,
        "initialize_weights": ("fabric", "model", "n_layer", "n_embd"),
        "get_dataloaders": ("fabric", "data", "tokenizer", "train", "block_size"),
    },
    litgpt.finetune.full: {
        "main": (*_MAIN[:10], "resume", "checkpoint_dir"),
        "choose_logger": _LOGGER,
        "pprint": None,
        "FSDPStrategy": None,
        "setup": None,
    },
    litgpt.finetune.lora: {
        "main": (*_MAIN[:10], "checkpoint_dir", "precision"),
        "choose_logger": _LOGGER,
        "pprint": None,
        "ModelParallelStrategy": None,
        "setup": None,
    },
}


def _class_that_makes(strategy: Callable[[], Strategy]) -> type:
    """What stands where LitGPT builds its strategy; not a subclass, so that LitGPT's ``isinstance`` checks say no."""
    return type("ChosenStrategy", (), {"__new__": lambda cls, *args, **kwargs: strategy()})


def patched_pretraining(
    *, main: Callable, choose_logger: Callable, strategy: Callable[[], Strategy], summary: dict[str, Any]
) -> AbstractContextManager[None]:
    """While open, ``litgpt.pretrain.setup`` runs with this project's parts; afterwards LitGPT is as it was.

    Args:
        main: takes what ``litgpt.pretrain.main`` takes.
        choose_logger: takes what ``litgpt.utils.choose_logger`` takes.
        strategy: makes Fabric's for several processes.
        summary: what LitGPT prints at the start in place of all settings.

    Raises:
        RuntimeError: where the installed LitGPT does not have the names and signatures that this replaces.
    """
    return _replaced(
        litgpt.pretrain,
        {
            "main": main,
            "choose_logger": choose_logger,
            "capture_hparams": lambda: summary,
            "FSDPStrategy": _class_that_makes(strategy),
        },
    )


def patched_finetuning(
    module: ModuleType, *, main: Callable, choose_logger: Callable, strategy: Callable[[], Strategy]
) -> AbstractContextManager[None]:
    """The same for ``litgpt.finetune.full`` or ``litgpt.finetune.lora``."""
    theirs = "ModelParallelStrategy" if module is litgpt.finetune.lora else "FSDPStrategy"
    return _replaced(
        module,
        {
            "main": main,
            "choose_logger": choose_logger,
            "pprint": lambda *_: None,
            theirs: _class_that_makes(strategy),
        },
    )


@contextmanager
def _replaced(module: ModuleType, replacements: dict[str, Any]) -> Iterator[None]:
    _check_litgpt(module)
    originals = {name: getattr(module, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(module, name, replacement)
        with use_custom_moe(), use_fast_layers():
            yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def _check_litgpt(module: ModuleType) -> None:
    problems = []
    for name, parameters in _EXPECTED[module].items():
        found = getattr(module, name, None)
        if found is None:
            problems.append(f"{module.__name__}.{name} is missing")
        elif parameters is not None and set(inspect.signature(found).parameters) != set(parameters):
            problems.append(
                f"{module.__name__}.{name} takes ({', '.join(inspect.signature(found).parameters)}),"
                f" expected ({', '.join(parameters)})"
            )
    if problems:
        raise RuntimeError(
            f"this project does not fit the installed litgpt {version('litgpt')}: {'; '.join(problems)}. "
            "Install the version that pyproject.toml pins."
        )
