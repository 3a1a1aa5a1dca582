"""Every replacement in LitGPT, in one file: applied by one ``with`` statement and undone after it.

========================================================  ==============================================================
name in LitGPT                                            replaced by, and why
========================================================  ==============================================================
``litgpt.model.LLaMAMoE``, ``Block``                      ``custom_moe``: speed, balance losses, expert load
``litgpt.model.CausalSelfAttention``, ``RMSNorm``         ``litmoe.layers``: fewer passes over memory
``pretrain.choose_logger`` (and finetune's)               ``litmoe.train.logs``: several loggers, one CSV file that a
                                                          resumed run continues, the W&B run id kept in ``out_dir``
``pretrain.FSDPStrategy`` (and finetune's)                ``litmoe.train.distributed``: DDP or torch's FSDP2, which runs
                                                          on CPUs too and supports stacked experts
``pretrain.capture_hparams``, ``pprint``                  one line with the file of the settings, not all of them
``pretrain.main`` (and with it ``fit``, ``validate``,     ``litmoe.train.pretrain.main``, see below
``get_lr``, ``save_checkpoint``, ``validate_args``)
``finetune.full.main``, ``finetune.lora.main``            ``litmoe.train.finetune.main``, see below
========================================================  ==============================================================

``litgpt.pretrain.main``

- always compiles the model, which ends the program on Windows without Triton or without a C++ compiler;
- passes parameters to the optimizer without groups, so norms, embeddings and routers decay. ``fit`` sets one learning
  rate for all groups, 0 at the first update, and never reaches ``min_lr``;
- initializes the output projection of ``GptNeoxMLP`` like any other matrix. GPT-2, GPT-NeoX, and LitGPT in its other
  layers make it smaller with depth;
- measures FLOPs by running the model on the meta device, which fails in ``LLaMAMoE``, or counts every expert for every
  token. Here they are computed from the config (``litmoe.flops``);
- calls ``save_hyperparameters`` at each checkpoint, which parses ``sys.argv`` of the running script again and ends the
  program. A killed save leaves a partial file under the final name;
- ignores ``max_steps``, ``max_time`` and ``epochs``, drops micro batches that do not fill a last step, logs the last
  accumulation window instead of the interval, does not average validation over devices, and fails without validation
  data;
- divides tokens by a timestamp in its last line, tokens per second.

``litgpt.finetune.full.main`` and ``litgpt.finetune.lora.main``

- cannot resume LoRA at all, and full finetuning only by reading all batches again, with other random states;
- average the losses of micro batches, so that tokens of short answers are weighted more;
- do not balance experts, loop over the experts with a wait for the device each, and their LoRA layer omits shared
  experts.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import litgpt.finetune.full
import litgpt.finetune.lora
import litgpt.pretrain
from lightning.fabric.strategies import Strategy

from litmoe.layers import use_our_layers

# The names that are replaced, and the parameters that LitGPT passes to them.
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
        "pprint": None,
        # None: the name must exist, with any signature.
        "FSDPStrategy": None,
        # Called, not replaced.
        "setup": None,
        "initialize_weights": ("fabric", "model", "n_layer", "n_embd"),
        "get_dataloaders": ("fabric", "data", "tokenizer", "train", "block_size"),
    },
    litgpt.finetune.full: {
        # The first ten parameters are those that pretraining and finetuning share.
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
    """Return a class that makes ``strategy`` when called.

    LitGPT skips the initialization of weights for instances of its FSDP strategy, so this is not a subclass of it.
    """
    # `__new__` returns an object of another class, so Python does not call `__init__` with LitGPT's arguments.
    return type("ChosenStrategy", (), {"__new__": lambda cls, *args, **kwargs: strategy()})


def patched_pretraining(
    *, main: Callable, choose_logger: Callable, strategy: Callable[[], Strategy], summary: str, router: str | None
) -> AbstractContextManager[None]:
    """Let ``litgpt.pretrain.setup`` run with this project's parts while the context is open.

    Args:
        main: takes the arguments of ``litgpt.pretrain.main``.
        choose_logger: takes the arguments of ``litgpt.utils.choose_logger``.
        strategy: makes Fabric's strategy for several processes.
        summary: the line that is printed at the start instead of all settings.
        router: ``moe.router`` of the run.

    Raises:
        RuntimeError: the installed LitGPT lacks the names and signatures that this replaces.
    """
    return _replaced(
        litgpt.pretrain,
        {
            "main": main,
            "choose_logger": choose_logger,
            # LitGPT passes what this returns to pprint.pformat, and prints the text at every start.
            "capture_hparams": lambda: {},
            "pprint": SimpleNamespace(pformat=lambda settings: summary),
            # LitGPT makes one if a run has more than one device.
            "FSDPStrategy": _class_that_makes(strategy),
        },
        router,
    )


def patched_finetuning(
    module: ModuleType,
    *,
    main: Callable,
    choose_logger: Callable,
    strategy: Callable[[], Strategy],
    router: str | None,
) -> AbstractContextManager[None]:
    """Let the ``setup`` of ``litgpt.finetune.full`` or ``litgpt.finetune.lora`` run with this project's parts."""
    # LitGPT's LoRA finetuning uses another class of Fabric than its full finetuning.
    theirs = "ModelParallelStrategy" if module is litgpt.finetune.lora else "FSDPStrategy"
    return _replaced(
        module,
        {
            "main": main,
            "choose_logger": choose_logger,
            # Finetuning calls pprint with all of its arguments. The run prints its own summary.
            "pprint": lambda *_: None,
            theirs: _class_that_makes(strategy),
        },
        router,
    )


@contextmanager
def _replaced(module: ModuleType, replacements: dict[str, Any], router: str | None) -> Iterator[None]:
    # Checked first: after an update of LitGPT a replaced name could be ignored silently.
    _check_litgpt(module)
    originals = {name: getattr(module, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(module, name, replacement)
        # litgpt.GPT looks its layers up in litgpt.model when it is built, which happens inside.
        with use_our_layers(router):
            yield
    finally:
        # Also after an error: other code of the process uses LitGPT as it is.
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
            f"this project does not support the installed litgpt {version('litgpt')}: {'; '.join(problems)}. "
            "Install the version that pyproject.toml pins."
        )
