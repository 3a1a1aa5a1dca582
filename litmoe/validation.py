"""Checks of the settings before anything is read or written. All problems are reported in one message."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from litgpt import Config
from litgpt.args import LogArgs

from custom_moe import weights_are_constant
from litmoe.cli import UserError
from litmoe.config import MoESettings, RunSettings, ScheduleSettings
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
LIMITS = ("train.max_tokens", "train.max_steps", "train.epochs", "train.max_time", "hours", "minutes")
RULES = (
    *(Rule(name, lambda value: value >= 1, "at least 1") for name in AT_LEAST_1),
    *(Rule(name, lambda value: 0 < value <= 2**62, "more than 0, and at most 2**62") for name in LIMITS),
    Rule("seed", lambda value: 0 <= value < 2**32, "0 to 2**32 - 1, the range of Lightning"),
    Rule("model.moe_intermediate_size", lambda value: value >= 1, "the width of one expert, such as 2048"),
    Rule("model.n_shared_expert", lambda value: value >= 0, "a number from 0"),
    Rule("model.routed_scaling_factor", lambda value: 0 < value < math.inf, "more than 0, such as 1.0"),
    Rule("moe.bias_update_rate", lambda value: value >= 0, "0 for none, or a small step such as 0.001"),
    Rule("train.max_norm", lambda value: value > 0, "more than 0, or null for no clipping"),
    Rule("embedding_lr_factor", lambda value: 0 < value < math.inf, "more than 0, such as 10"),
    Rule("schedule.decay_fraction", lambda value: 0 < value <= 1, "a fraction above 0 and at most 1, such as 0.2"),
    Rule("checkpoint.every_minutes", lambda value: 0 < value < math.inf, "more than 0, or null"),
    # If one of two is damaged, the other one is left.
    Rule("checkpoint.keep_last", lambda value: value >= 2, "at least 2, or null to keep all"),
    Rule("eval.hellaswag_interval", lambda value: value >= 1, "at least 1, or null"),
    Rule("eval.hellaswag_limit", lambda value: value >= 1, "at least 1, or null"),
)
# Only `finetune.py` has these settings.
LORA_RULES = (
    Rule("lora_r", lambda value: value >= 0, "a rank from 1, or 0 to train all weights"),
    Rule("lora_alpha", lambda value: value >= 1, "at least 1"),
    Rule("lora_dropout", lambda value: 0 <= value < 1, "a probability from 0 to below 1"),
)
LORA_PARTS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")


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
        *_check_router_learns(settings),
        *_check_moe(settings),
        *_check_document_masking(settings),
        *_check_batches(settings),
        *_check_sharding(settings, optimizer),
        *_check_schedule(settings),
        *_check_learning_rate(settings, optimizer),
        *_check_checkpoints(settings),
        *_check_evaluation(settings),
        *_check_start(settings),
        *_check_log(settings),
        *_check_finetuning(settings),
    ]
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


def _check_rules(settings: RunSettings, rules: tuple[Rule, ...]) -> Iterator[str]:
    for rule in rules:
        value = attrgetter(rule.name)(settings)
        if value is not None and not rule.is_valid(value):
            yield f"{rule.name} is {str(value)[:30]}; expected {rule.expected}."


def _check_paths(settings: RunSettings) -> Iterator[str]:
    for field in fields(settings):
        value = getattr(settings, field.name)
        # Python raises a bare ValueError for such a path, wherever it is first used.
        if isinstance(value, str | Path) and "\0" in str(value):
            yield f"{field.name} contains a zero byte, which no file name can have."


# --- Model


def _check_document_masking(settings: RunSettings) -> Iterator[str]:
    if settings.document_masking and settings.model.sliding_window_size is not None:
        yield (
            "document_masking has no effect in layers with a sliding window (sliding_window_size), whose attention"
            " LitGPT computes with a mask of its own; expected one of the two."
        )


def _check_model(config: Config) -> Iterator[str]:
    # Training, decoding and export replace LitGPT's standard attention only.
    if config.latent_attention:
        yield "the model has latent_attention (DeepSeek's), which is not supported; expected none."
    if config.mlp_class_name == "LLaMAMoE":
        yield from _check_experts(config)
    elif config.n_expert:
        yield (
            f"n_expert is {config.n_expert} but mlp_class_name is {config.mlp_class_name}, which has no experts;"
            " set mlp_class_name: LLaMAMoE, or n_expert: 0."
        )


def _check_experts(config: Config) -> Iterator[str]:
    if config.n_expert < 1:
        yield (
            "mlp_class_name is LLaMAMoE but n_expert is 0, which would build a model without feed-forward layers;"
            " set n_expert, for example to 8, or mlp_class_name: LLaMAMLP for a dense model."
        )
    elif not 1 <= config.n_expert_per_token <= config.n_expert:
        yield (
            f"n_expert_per_token is {config.n_expert_per_token}; expected a number from 1 to n_expert"
            f" ({config.n_expert})."
        )
    else:
        yield from _check_groups(config)
    if config.moe_intermediate_size is None:
        yield "moe_intermediate_size is not set; expected the width of one expert, such as 2048."
    dense_layers = config.first_k_dense_replace
    if dense_layers is not None and not 0 <= dense_layers < config.n_layer:
        yield (
            f"first_k_dense_replace is {dense_layers}; expected a number from 0 to {config.n_layer - 1}, so that at"
            f" least one of the {config.n_layer} layers has experts."
        )


def _check_groups(config: Config) -> Iterator[str]:
    """Check groups of experts: LitGPT accepts values that crash in the first step or route in another way."""
    groups, chosen = config.n_expert_groups, config.n_topk_groups
    # Without groups the router is a softmax router, and LitGPT ignores the other two fields.
    if groups is None:
        for name in ("n_topk_groups", "n_topk_scores_per_group"):
            if getattr(config, name) is not None:
                yield f"{name} would have no effect: n_expert_groups is not set. Set it, or leave {name} null."
        return
    group_size = config.n_expert // groups
    if not 1 <= chosen <= groups:
        yield f"n_topk_groups is {chosen}; expected a number from 1 to n_expert_groups ({groups})."
    elif chosen * group_size < config.n_expert_per_token:
        needed = math.ceil(config.n_expert_per_token / group_size)
        yield (
            f"n_topk_groups is {chosen}, and {chosen} of the {groups} groups have {chosen * group_size} experts, fewer"
            f" than n_expert_per_token ({config.n_expert_per_token}), so experts of other groups would be chosen too."
            f" Expected at least --model.n_topk_groups {needed}."
        )
    if config.n_topk_scores_per_group < 1:
        yield (
            f"n_topk_scores_per_group is {config.n_topk_scores_per_group}, so all groups would have the same score;"
            f" expected a number from 1 to {group_size}, the size of a group."
        )


def _check_router_learns(settings: RunSettings) -> Iterator[str]:
    """Check that a new model's routers get a gradient. A trained model only gets ``constant_weights_note``."""
    config = settings.model
    # A router of the user's own may learn in another way.
    if settings.moe.router or settings.initial_checkpoint_dir or settings.resume:
        return
    if constant_weights_note(config) is None:
        return
    kind, alternative = "a softmax router", _sigmoid_router_flags(config)
    if config.n_expert_groups:
        kind, alternative = "a sigmoid router with norm_topk_prob", "--model.norm_topk_prob false"
    flags = "--model.n_expert_per_token 2"
    if not settings.upcycle:  # an upcycled model always has softmax routers
        flags += f", or {alternative}"
    yield (
        f"n_expert_per_token is 1 with {kind}, which divides the weights of a token's experts by their sum: the one"
        " weight is always 1, so the loss gives the router no gradient, and it does not learn where to send a token."
        f" {flags}."
    )


def _sigmoid_router_flags(config: Config) -> str:
    """Return the flags that replace a softmax router with a sigmoid router that chooses among all experts."""
    # All groups are chosen, so they have no effect. LitGPT requires at least two.
    groups = next(number for number in range(2, config.n_expert + 1) if config.n_expert % number == 0)
    scores = min(2, config.n_expert // groups)
    # The normalized weight of a single expert is always 1 and gives no gradient.
    normalized = str(config.n_expert_per_token > 1).lower()
    return (
        f"--model.n_expert_groups {groups} --model.n_topk_groups {groups} --model.n_topk_scores_per_group {scores}"
        f" --model.norm_topk_prob {normalized}"
    )


def _check_moe(settings: RunSettings) -> Iterator[str]:
    moe = settings.moe
    if settings.model.mlp_class_name != "LLaMAMoE":
        # Without experts these settings would have no effect.
        for name, unused in (("backend", "auto"), ("router", "null"), ("bias_update_rate", "0")):
            if getattr(moe, name) != getattr(MoESettings, name):
                yield f"moe.{name} is {getattr(moe, name)}, but this model has no experts; --moe.{name} {unused}"
    elif moe.router is not None:
        # A router of the user's own may use the rate in any way.
        yield from _check_own_router(moe.router, settings)
    # NaN and negative rates are reported by their rule.
    elif moe.bias_update_rate > 0:
        yield from _check_bias_updates(settings)


def _check_bias_updates(settings: RunSettings) -> Iterator[str]:
    config, rate = settings.model, settings.moe.bias_update_rate
    if not config.n_expert_groups:
        flags = "--moe.bias_update_rate 0"
        # Finetuning can't change the router, and a single expert has nothing to route.
        if config.n_expert >= 2 and not settings.is_finetuning:
            flags += f", or train a model with sigmoid routers: {_sigmoid_router_flags(config)}"
        yield (
            f"moe.bias_update_rate is {rate}, but only a sigmoid router has a selection bias and this model has none;"
            f" {flags}"
        )
    elif settings.uses_lora:
        yield (
            f"moe.bias_update_rate is {rate}, but LoRA does not change the routers' selection bias;"
            " --moe.bias_update_rate 0, or train all weights: --lora_r 0"
        )


def _check_own_router(router: str, settings: RunSettings) -> Iterator[str]:
    if settings.upcycle:
        yield (
            f"moe.router is {router}, but a mixture computes the same as its dense checkpoint only if the weights of a"
            " token sum to 1, as those of the softmax router; --moe.router null"
        )
    else:
        try:
            import_router(router)
        except UserError as error:
            yield f"moe.router: {error}"


# --- Run


def _check_batches(settings: RunSettings) -> Iterator[str]:
    train, block_size = settings.train, settings.model.block_size
    if settings.num_nodes >= 1:  # else reported by its rule
        devices, num_nodes = processes(settings)
        ranks, is_auto = devices * num_nodes, str(train.micro_batch_size) == "auto"
        yield from _check_batch_sizes(1 if is_auto else train.micro_batch_size, train.global_batch_size, ranks)
        if is_auto and settings.is_finetuning:
            yield "train.micro_batch_size is auto, which only pretraining offers; --micro-batch-size 4"
    if train.max_seq_length is not None and not 1 <= train.max_seq_length <= block_size:
        # The model of a finetuned checkpoint is fixed.
        larger = "" if settings.is_finetuning else ", or a larger --model.block_size"
        yield (
            f"max_seq_length is {train.max_seq_length} but the model's block_size is {block_size}; expected 1 to"
            f" {block_size}: --max-seq-length {block_size}{larger}."
        )


def _check_batch_sizes(micro_batch: int, global_batch: int, ranks: int) -> Iterator[str]:
    # All ranks have the same number of micro batches in a step, so the smallest batch is one of each.
    smallest = micro_batch * ranks
    if micro_batch >= 1 and global_batch >= smallest and global_batch % smallest == 0:
        return
    # LitGPT would train a global batch of 10 with micro batches of 4 as 8, without a message.
    product = f"micro_batch_size {micro_batch}"
    if ranks > 1:
        product += f" x {ranks} devices"
    smallest = max(smallest, 1)
    next_multiple = max(smallest, (global_batch + smallest - 1) // smallest * smallest)
    yield (
        f"global_batch_size {global_batch} is no multiple of {product}; --global-batch-size {next_multiple} would fit."
    )


def _check_sharding(settings: RunSettings, optimizer: dict[str, Any]) -> Iterator[str]:
    """Check for features that FSDP does not support, because they need complete matrices in one process."""
    if not is_sharded(settings):
        return
    needs_matrices = f"{optimizer['class_path']} needs complete ones; --optimizer torch.optim.AdamW, or --strategy ddp."
    scores_hellaswag = settings.eval.hellaswag is not None
    uses_fp16 = choose_precision(settings.precision, settings.accelerator)[0] == "16-mixed"
    problems = (
        (not optimizer_traits(optimizer).supports_fsdp, f"shards every matrix, and {needs_matrices}"),
        (scores_hellaswag, "can't score HellaSwag during training; --eval.hellaswag null, and evaluate.py afterwards."),
        (settings.compile, "does not support torch.compile; --compile false, or --strategy ddp."),
        (settings.uses_lora, "does not support LoRA, which needs little memory: --strategy ddp, or --lora_r 0."),
        (uses_fp16, "has no gradient scaler for fp16; --precision 32-true, or --strategy ddp."),
    )
    for is_present, problem in problems:
        if is_present:
            yield f"strategy fsdp {problem}"


def _check_schedule(settings: RunSettings) -> Iterator[str]:
    train, schedule = settings.train, settings.schedule
    # A changed value would have no effect.
    if schedule.name != "wsd" and schedule.decay_fraction != ScheduleSettings.decay_fraction:
        yield (
            f"schedule.decay_fraction is {schedule.decay_fraction}, but the schedule {schedule.name} decays during the"
            " complete run; --schedule.name wsd"
        )
    if not (train.max_tokens or train.max_steps or train.epochs or settings.time_budget):
        yield (
            "no end is set; expected train.max_tokens, train.max_steps, train.epochs, hours or minutes"
            " (train.max_time alone gives the learning-rate schedule no length)."
        )


def _check_learning_rate(settings: RunSettings, optimizer: dict[str, Any]) -> Iterator[str]:
    peak, minimum = (optimizer.get("init_args") or {}).get("lr"), settings.train.min_lr
    if not isinstance(peak, float):  # the optimizer has its own default
        return
    if not 0 < peak < math.inf:
        yield f"the optimizer's lr is {peak}; expected more than 0, such as 3.0e-4."
    elif not 0 <= minimum <= peak:
        yield (
            f"train.min_lr is {minimum} but the optimizer's lr is {peak}; expected a min_lr from 0 to lr:"
            f" --train.min_lr {peak / 10:.1e}"
        )


def _check_checkpoints(settings: RunSettings) -> Iterator[str]:
    keep_every, interval = settings.checkpoint.keep_every, settings.train.save_interval
    if keep_every is None:
        return
    # Other multiples are never saved, or only by chance (every_minutes).
    is_multiple = interval and keep_every >= 1 and keep_every % interval == 0
    if not is_multiple:
        yield (
            f"checkpoint.keep_every is {keep_every}, but the run saves every {interval} steps (train.save_interval);"
            " expected a multiple of that."
        )


def _check_evaluation(settings: RunSettings) -> Iterator[str]:
    for name in ("hellaswag_interval", "hellaswag_limit"):
        if getattr(settings.eval, name) is not None and settings.eval.hellaswag is None:
            yield f"eval.{name} is set, but no questions are scored; name them: --eval.hellaswag FILE_OR_HUB"
    if settings.eval.evaluate_example != "first":
        yield "eval.evaluate_example has no effect here; set the sample's prompt with --sample.prompt."


def _check_start(settings: RunSettings) -> Iterator[str]:
    if settings.initial_checkpoint_dir and settings.upcycle:
        yield (
            "both `initial_checkpoint_dir` and `upcycle` are set; choose one: the first starts from a checkpoint of the"
            " same model, the second makes experts of a dense one."
        )
    # Finetuning sets initial_checkpoint_dir itself.
    if settings.initial_checkpoint_dir and settings.resume and not settings.is_finetuning:
        yield (
            "both `initial_checkpoint_dir` and `resume` are set; choose one: the first starts a new run from weights,"
            " the second continues an old one."
        )


def _check_finetuning(settings: RunSettings) -> Iterator[str]:
    if not settings.is_finetuning:
        return
    yield from _check_rules(settings, LORA_RULES)
    # Conversations have different lengths, so a number of tokens is no number of steps.
    if settings.train.max_tokens:
        yield "train.max_tokens counts tokens of a text; expected train.epochs or train.max_steps."
    # LoRA without a part to update would leave nothing to train.
    if settings.uses_lora and not any(attrgetter(*LORA_PARTS)(settings)):
        yield "lora_r is set but no part of the model gets LoRA; turn one on: --lora_query true"


def _check_log(settings: RunSettings) -> Iterator[str]:
    """Check the names for loggers: LitGPT has some for W&B, and some for a logger that is not offered here."""
    changed = {field.name for field in fields(LogArgs) if getattr(settings.log, field.name) != field.default}
    for_wandb = {"project", "run", "group"}
    for name in sorted(changed - for_wandb):
        yield f"log.{name} belongs to a logger that is not offered here."
    if changed & for_wandb and "wandb" not in (settings.loggers or [settings.logger_name]):
        names = ", ".join(f"log.{name}" for name in sorted(changed & for_wandb))
        yield f"{names} is only used by W&B; add that logger: --loggers '[csv,wandb]'"
