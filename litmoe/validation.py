"""Checks of the settings before anything is read or written. All problems are reported in one message."""

import math
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from litgpt import Config
from litgpt.args import LogArgs

from custom_moe import weights_are_constant
from litmoe.cli import UserError
from litmoe.config import FinetuneSettings, RunSettings, ScheduleSettings
from litmoe.hardware import choose_precision, is_sharded, processes
from litmoe.layers import import_router
from litmoe.train.optimizers import optimizer_traits


class Rule(NamedTuple):
    """The valid values of a setting. A setting that is null is not checked."""

    name: str
    """Dotted, as its flag"""
    is_valid: Callable[[Any], bool]
    expected: str
    """Completes the message "... is 0; expected ..." """


# Comparisons are written so that NaN fails them.
AT_LEAST_1 = (
    *("num_nodes", "model.n_layer", "model.n_embd", "model.n_head", "model.block_size", "model.padded_vocab_size"),
    *("train.log_interval", "train.save_interval", "eval.interval", "eval.max_iters"),
)
# Larger limits overflow in the learning-rate schedule.
LIMITS = ("train.max_tokens", "train.max_steps", "train.epochs", "train.max_time")
RULES = (
    *(Rule(name, lambda value: value >= 1, "at least 1") for name in AT_LEAST_1),
    *(Rule(name, lambda value: 0 < value <= 2**62, "more than 0, and at most 2**62") for name in LIMITS),
    Rule("seed", lambda value: 0 <= value < 2**32, "0 to 2**32 - 1, the range of Lightning"),
    Rule("model.moe_intermediate_size", lambda value: value >= 1, "the width of one expert, such as 2048"),
    Rule("model.n_shared_expert", lambda value: value >= 0, "a number from 0"),
    Rule("model.routed_scaling_factor", lambda value: 0 < value < math.inf, "more than 0, such as 1.0"),
    Rule("moe.bias_update_rate", lambda value: value >= 0, "0 for none, or a small step such as 0.001"),
    Rule("train.max_norm", lambda value: value > 0, "more than 0, or null for no clipping"),
    Rule("schedule.decay_fraction", lambda value: 0 < value <= 1, "a fraction above 0 and at most 1, such as 0.2"),
    Rule("checkpoint.every_minutes", lambda value: 0 < value < math.inf, "more than 0, or null"),
    # If one of two is damaged, the other one is left.
    Rule("checkpoint.keep_last", lambda value: value >= 2, "at least 2, or null to keep all"),
    Rule("eval.hellaswag_interval", lambda value: value >= 1, "at least 1, or null"),
    Rule("eval.hellaswag_limit", lambda value: value >= 1, "at least 1, or null"),
)
FINETUNE_RULES = (
    Rule("lora_r", lambda value: value >= 0, "a rank from 1, or 0 to train all weights"),
    Rule("lora_alpha", lambda value: value >= 1, "at least 1"),
    Rule("lora_dropout", lambda value: 0 <= value < 1, "a probability from 0 to below 1"),
)


def check(settings: RunSettings, optimizer: dict[str, Any]) -> None:
    """Check the settings of a run.

    Args:
        settings: the parsed settings.
        optimizer: ``class_path`` and ``init_args``.

    Raises:
        UserError: with a line for each problem.
    """
    # Each check also runs if others fail: users see all problems at once.
    problems = [
        *_check_rules(settings, RULES),
        *_check_paths(settings),
        *_check_model(settings.model),
        *_check_routing(settings.model),
        *_check_router_learns(settings),
        *_check_moe(settings),
        *_check_batches(settings),
        *_check_sharding(settings, optimizer),
        *_check_schedule(settings),
        *_check_learning_rate(settings, optimizer),
        *_check_checkpoints(settings),
        *_check_evaluation(settings),
        *_check_start(settings),
        *_check_log(settings),
    ]
    if isinstance(settings, FinetuneSettings):
        problems += _check_finetuning(settings)
    if problems:
        raise UserError("\n  ".join(["the settings do not fit together:", *problems]))


def constant_weights_note(config: Config) -> str | None:
    """Return a warning for a trained model with routers that get no gradient from the loss; None for other models."""
    if config.mlp_class_name != "LLaMAMoE" or not weights_are_constant(config):
        return None
    return (
        "warning: this model sends each token to 1 expert, with a weight that is always 1. The loss gives its routers"
        " no gradient: training improves the experts, but not the choice of the expert for a token."
    )


def _check_rules(settings: RunSettings, rules: tuple[Rule, ...]) -> list[str]:
    problems = []
    for rule in rules:
        value = attrgetter(rule.name)(settings)
        if value is not None and not rule.is_valid(value):
            problems.append(f"{rule.name} is {str(value)[:30]}; expected {rule.expected}.")
    return problems


def _check_paths(settings: RunSettings) -> list[str]:
    problems = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str | Path) and "\0" in str(value):
            problems.append(f"{field.name} contains a zero byte, which no file name can have.")
    return problems


# --- Model


def _check_model(config: Config) -> list[str]:
    problems = []
    # Training, decoding and export replace LitGPT's standard attention only.
    if config.latent_attention:
        problems.append("the model has latent_attention (DeepSeek's), which is not supported; expected none.")
    if config.mlp_class_name != "LLaMAMoE":
        if config.n_expert:
            problems.append(
                f"n_expert is {config.n_expert} but mlp_class_name is {config.mlp_class_name}, which has no experts;"
                " set mlp_class_name: LLaMAMoE, or n_expert: 0."
            )
        return problems
    if config.n_expert < 1:
        problems.append(
            "mlp_class_name is LLaMAMoE but n_expert is 0, which would build a model without feed-forward layers;"
            " set n_expert (8, say), or mlp_class_name: LLaMAMLP for a dense model."
        )
    elif not 1 <= config.n_expert_per_token <= config.n_expert:
        problems.append(
            f"n_expert_per_token is {config.n_expert_per_token}; expected a number from 1 to n_expert"
            f" ({config.n_expert})."
        )
    if config.moe_intermediate_size is None:
        problems.append("moe_intermediate_size is not set; expected the width of one expert, such as 2048.")
    dense_layers = config.first_k_dense_replace
    if dense_layers is not None and not 0 <= dense_layers < config.n_layer:
        problems.append(
            f"first_k_dense_replace is {dense_layers}; expected a number from 0 to {config.n_layer - 1}, so that at"
            f" least one of the {config.n_layer} layers has experts."
        )
    return problems


def _check_routing(config: Config) -> list[str]:
    """Check groups of experts: LitGPT accepts values that crash in the first step or route in another way."""
    if config.mlp_class_name != "LLaMAMoE" or not 1 <= config.n_expert_per_token <= config.n_expert:
        return []
    problems = []
    groups, chosen = config.n_expert_groups, config.n_topk_groups
    # Without groups the router is a softmax router, and LitGPT ignores the other two fields.
    if groups is None:
        for name in ("n_topk_groups", "n_topk_scores_per_group"):
            if getattr(config, name) is not None:
                problems.append(
                    f"{name} would have no effect: n_expert_groups is not set. Set it, or leave {name} null."
                )
        return problems
    group_size = config.n_expert // groups
    if not 1 <= chosen <= groups:
        problems.append(f"n_topk_groups is {chosen}; expected a number from 1 to n_expert_groups ({groups}).")
    elif chosen * group_size < config.n_expert_per_token:
        problems.append(
            f"n_topk_groups is {chosen}, and {chosen} of the {groups} groups have {chosen * group_size} experts, fewer"
            f" than n_expert_per_token ({config.n_expert_per_token}), so experts of other groups would be chosen too."
            f" Expected at least --model.n_topk_groups {-(-config.n_expert_per_token // group_size)}."
        )
    if config.n_topk_scores_per_group < 1:
        problems.append(
            f"n_topk_scores_per_group is {config.n_topk_scores_per_group}, so all groups would have the same score;"
            f" expected a number from 1 to {group_size}, the size of a group."
        )
    return problems


def _check_router_learns(settings: RunSettings) -> list[str]:
    """Check that a new model's routers get a gradient. A trained model only gets ``constant_weights_note``."""
    config = settings.model
    if settings.moe.router or settings.initial_checkpoint_dir or settings.resume or not constant_weights_note(config):
        return []
    if config.n_expert_groups:
        kind, alternative = "a sigmoid router with norm_topk_prob", "--model.norm_topk_prob false"
    else:
        kind, alternative = "a softmax router", _sigmoid_router_flags(config)
    # An upcycled model always has softmax routers.
    flags = "--model.n_expert_per_token 2" if settings.upcycle else f"--model.n_expert_per_token 2, or {alternative}"
    return [
        f"n_expert_per_token is 1 with {kind}, which divides the weights of a token's experts by their sum: the one"
        " weight is always 1, so the loss gives the router no gradient, and it does not learn where to send a token."
        f" {flags}."
    ]


def _sigmoid_router_flags(config: Config) -> str:
    """Return the flags that replace a softmax router with a sigmoid router that chooses among all experts."""
    groups = next(number for number in range(2, config.n_expert + 1) if config.n_expert % number == 0)
    scores = min(2, config.n_expert // groups)
    normalized = str(config.n_expert_per_token > 1).lower()
    return (
        f"--model.n_expert_groups {groups} --model.n_topk_groups {groups} --model.n_topk_scores_per_group {scores}"
        f" --model.norm_topk_prob {normalized}"
    )


def _check_moe(settings: RunSettings) -> list[str]:
    config, moe, problems = settings.model, settings.moe, []
    is_moe = config.mlp_class_name == "LLaMAMoE"
    # The setting would have no effect, and users set it to compare backends.
    if moe.backend != "auto" and not is_moe:
        problems.append(f"moe.backend is {moe.backend}, but this model has no experts; --moe.backend auto")
    if moe.router is not None:
        # A router of the user's own may use the rate in any way.
        return problems + _check_own_router(moe.router, settings)
    if not moe.bias_update_rate > 0:
        return problems
    finetunes = isinstance(settings, FinetuneSettings)
    if not is_moe or not config.n_expert_groups:
        # Finetuning can't change the router, and a single expert has nothing to route.
        flags = "--moe.bias_update_rate 0"
        if is_moe and config.n_expert >= 2 and not finetunes:
            flags += f", or train a model with sigmoid routers: {_sigmoid_router_flags(config)}"
        problems.append(
            f"moe.bias_update_rate is {moe.bias_update_rate}, but only a sigmoid router has a selection bias and this"
            f" model has none; {flags}"
        )
    elif isinstance(settings, FinetuneSettings) and settings.lora_r:
        problems.append(
            f"moe.bias_update_rate is {moe.bias_update_rate}, but LoRA does not change the routers' selection bias;"
            " --moe.bias_update_rate 0, or train all weights: --lora_r 0"
        )
    return problems


def _check_own_router(router: str, settings: RunSettings) -> list[str]:
    if settings.model.mlp_class_name != "LLaMAMoE":
        return [f"moe.router is {router}, but this model has no experts; --moe.router null"]
    if settings.upcycle:
        return [
            f"moe.router is {router}, but a mixture computes the same as its dense checkpoint only if the weights of a"
            " token sum to 1, as those of the softmax router; --moe.router null"
        ]
    try:
        import_router(router)
    except UserError as error:
        return [f"moe.router: {error}"]
    return []


# --- Run


def _check_batches(settings: RunSettings) -> list[str]:
    if settings.num_nodes < 1:  # reported by its rule
        return []
    problems = []
    train, block_size = settings.train, settings.model.block_size
    devices, num_nodes = processes(settings)
    ranks = devices * num_nodes
    # All ranks have the same number of micro batches in a step, so the smallest batch is one of each.
    smallest = train.micro_batch_size * ranks
    if train.micro_batch_size < 1 or train.global_batch_size < smallest or train.global_batch_size % smallest:
        per_device = f"micro_batch_size {train.micro_batch_size}"
        product = f"{per_device} x {ranks} devices" if ranks > 1 else per_device
        next_multiple = max(smallest, -(-train.global_batch_size // max(smallest, 1)) * smallest)
        problems.append(
            f"global_batch_size {train.global_batch_size} is no multiple of {product};"
            f" --global-batch-size {next_multiple} would fit."
        )
    if train.max_seq_length is not None and not 1 <= train.max_seq_length <= block_size:
        # The model of a finetuned checkpoint is fixed.
        larger = "" if isinstance(settings, FinetuneSettings) else ", or a larger --model.block_size"
        problems.append(
            f"max_seq_length is {train.max_seq_length} but the model's block_size is {block_size}; expected 1 to"
            f" {block_size}: --max-seq-length {block_size}{larger}."
        )
    return problems


def _check_sharding(settings: RunSettings, optimizer: dict[str, Any]) -> list[str]:
    """Check for features that FSDP does not support, because they need complete matrices in one process."""
    if not is_sharded(settings):
        return []
    problems = []
    if not optimizer_traits(optimizer).supports_fsdp:
        problems.append(
            f"strategy fsdp shards every matrix, and {optimizer['class_path']} needs complete ones; --optimizer"
            " torch.optim.AdamW, or --strategy ddp."
        )
    if settings.eval.hellaswag is not None:
        problems.append(
            "strategy fsdp can't score HellaSwag during training; --eval.hellaswag null, and evaluate.py afterwards."
        )
    if settings.compile:
        problems.append("strategy fsdp does not support torch.compile; --compile false, or --strategy ddp.")
    if isinstance(settings, FinetuneSettings) and settings.lora_r:
        problems.append(
            "strategy fsdp does not support LoRA, which needs little memory: --strategy ddp, or --lora_r 0."
        )
    if choose_precision(settings.precision)[0] == "16-mixed":
        problems.append("strategy fsdp has no gradient scaler for fp16; --precision 32-true, or --strategy ddp.")
    return problems


def _check_schedule(settings: RunSettings) -> list[str]:
    problems = []
    train, schedule = settings.train, settings.schedule
    # A changed value would have no effect.
    if schedule.name != "wsd" and schedule.decay_fraction != ScheduleSettings.decay_fraction:
        problems.append(
            f"schedule.decay_fraction is {schedule.decay_fraction}, but the schedule {schedule.name} decays during the"
            " complete run; --schedule.name wsd"
        )
    if not (train.max_tokens or train.max_steps or train.epochs):
        problems.append(
            "no end is set; expected train.max_tokens, train.max_steps or train.epochs"
            " (train.max_time alone gives the learning-rate schedule no length)."
        )
    return problems


def _check_learning_rate(settings: RunSettings, optimizer: dict[str, Any]) -> list[str]:
    peak, minimum = (optimizer.get("init_args") or {}).get("lr"), settings.train.min_lr
    if not isinstance(peak, float):  # the optimizer has its own default
        return []
    if not 0 < peak < math.inf:
        return [f"the optimizer's lr is {peak}; expected more than 0, such as 3.0e-4."]
    if not 0 <= minimum <= peak:
        return [
            f"train.min_lr is {minimum} but the optimizer's lr is {peak}; expected a min_lr from 0 to lr:"
            f" --train.min_lr {peak / 10:.1e}"
        ]
    return []


def _check_checkpoints(settings: RunSettings) -> list[str]:
    keep_every, interval = settings.checkpoint.keep_every, settings.train.save_interval
    # Other multiples are never saved, or only by chance (every_minutes).
    if keep_every is None or (interval and keep_every >= 1 and keep_every % interval == 0):
        return []
    return [
        f"checkpoint.keep_every is {keep_every}, but the run saves every {interval} steps (train.save_interval);"
        " expected a multiple of that."
    ]


def _check_evaluation(settings: RunSettings) -> list[str]:
    problems = []
    for name in ("hellaswag_interval", "hellaswag_limit"):
        if getattr(settings.eval, name) is not None and settings.eval.hellaswag is None:
            problems.append(
                f"eval.{name} is set but nothing is scored; name the questions: --eval.hellaswag FILE_OR_HUB"
            )
    if settings.eval.evaluate_example != "first":
        problems.append("eval.evaluate_example means nothing here; set the sample's prompt with --sample.prompt.")
    return problems


def _check_start(settings: RunSettings) -> list[str]:
    problems = []
    if settings.initial_checkpoint_dir and settings.upcycle:
        problems.append(
            "both `initial_checkpoint_dir` and `upcycle` are set; choose one: the first starts from a checkpoint of the"
            " same model, the second makes experts of a dense one."
        )
    # Finetuning sets initial_checkpoint_dir itself.
    if settings.initial_checkpoint_dir and settings.resume and not isinstance(settings, FinetuneSettings):
        problems.append(
            "both `initial_checkpoint_dir` and `resume` are set; choose one: the first starts a new run from weights,"
            " the second continues an old one."
        )
    return problems


def _check_finetuning(settings: FinetuneSettings) -> list[str]:
    problems = _check_rules(settings, FINETUNE_RULES)
    # Conversations have different lengths, so a number of tokens is no number of steps.
    if settings.train.max_tokens:
        problems.append("train.max_tokens counts tokens of a text; expected train.epochs or train.max_steps.")
    parts = ("query", "key", "value", "projection", "mlp", "head")
    if settings.lora_r and not any(getattr(settings, f"lora_{part}") for part in parts):
        problems.append("lora_r is set but no part of the model gets LoRA; turn one on: --lora_query true")
    return problems


def _check_log(settings: RunSettings) -> list[str]:
    """Check the names for loggers: LitGPT has some for W&B, and some for a logger that is not offered here."""
    changed = {field.name for field in fields(LogArgs) if getattr(settings.log, field.name) != field.default}
    for_wandb = {"project", "run", "group"}
    problems = [f"log.{name} belongs to a logger that is not offered here." for name in sorted(changed - for_wandb)]
    if changed & for_wandb and "wandb" not in (settings.loggers or [settings.logger_name]):
        names = ", ".join(f"log.{name}" for name in sorted(changed & for_wandb))
        problems.append(f"{names} is read by W&B alone; add it: --loggers '[csv,wandb]'")
    return problems
