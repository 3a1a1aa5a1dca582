"""Checks of the settings: everything that can be known to be wrong before anything is read or written."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from litgpt import Config
from litgpt.args import LogArgs

from custom_moe import weights_are_constant
from litmoe.cli import UserError
from litmoe.config import FinetuneSettings, RunSettings, ScheduleSettings
from litmoe.hardware import choose_precision, is_sharded, processes
from litmoe.train.optimizers import optimizer_traits


def constant_weights_note(config: Config) -> str | None:
    """A line about a model that was trained elsewhere and whose routers the loss can't train; None for other models."""
    if config.mlp_class_name != "LLaMAMoE" or not weights_are_constant(config):
        return None
    return (
        "warning: this model sends each token to 1 expert, with a weight that is always 1. The loss gives its routers"
        " no gradient: training improves the experts, but not which of them a token goes to."
    )


def check(settings: RunSettings, optimizer: dict[str, Any]) -> None:
    """All that can be known to be wrong before anything is read or written, in one message.

    Raises:
        UserError: with a line for each problem.
    """
    problems = [
        *_check_seed(settings),
        *_check_paths(settings),
        *_check_model(settings.model),
        *_check_router_learns(settings),
        *_check_balance(settings),
        *_check_batches(settings),
        *_check_sharding(settings, optimizer),
        *_check_schedule(settings, optimizer),
        *_check_checkpoints(settings),
        *_check_evaluation(settings),
        *_check_log(settings),
    ]
    if settings.initial_checkpoint_dir and settings.upcycle:
        problems.append(
            "both `initial_checkpoint_dir` and `upcycle` are set; choose one: the first takes weights as they are, the"
            " second makes experts of them."
        )
    if isinstance(settings, FinetuneSettings):
        problems += _check_finetuning(settings)
    elif settings.initial_checkpoint_dir and settings.resume:
        problems.append(
            "both `initial_checkpoint_dir` and `resume` are set; choose one: the first starts a new run from weights,"
            " the second continues an old one."
        )
    if problems:
        raise UserError("\n  ".join(["the settings do not fit together:", *problems]))


def _check_seed(settings: RunSettings) -> list[str]:
    return [] if 0 <= settings.seed < 2**32 else ["seed is out of range; expected 0 to 2**32 - 1, as Lightning takes."]


def _check_paths(settings: RunSettings) -> list[str]:
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    paths = {name: value for name, value in values.items() if isinstance(value, str | Path)}
    return [f"{name} holds a zero byte; no file can have such a name." for name, p in paths.items() if "\0" in str(p)]


def _check_model(config: Config) -> list[str]:
    sizes = ("n_layer", "n_embd", "n_head", "block_size", "padded_vocab_size")
    problems = [f"{name} is {size}; expected at least 1." for name in sizes if (size := getattr(config, name)) < 1]
    if config.latent_attention:
        problems.append("the model has latent_attention (DeepSeek's), which is not covered here; expected none.")
    if config.mlp_class_name == "LLaMAMoE":
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
        else:
            problems += _check_routing(config)
        if config.moe_intermediate_size is None:
            problems.append("moe_intermediate_size is not set; expected the width of one expert, such as 2048.")
    elif config.n_expert:
        problems.append(
            f"n_expert is {config.n_expert} but mlp_class_name is {config.mlp_class_name}, which has no experts;"
            " set mlp_class_name: LLaMAMoE, or n_expert: 0."
        )
    return problems


def _check_routing(config: Config) -> list[str]:
    """What LitGPT's config accepts, and what then crashes in the first step or routes otherwise than it says."""
    problems = []
    dense, width, shared = config.first_k_dense_replace, config.moe_intermediate_size, config.n_shared_expert
    if dense is not None and not 0 <= dense < config.n_layer:
        problems.append(
            f"first_k_dense_replace is {dense}; expected a number from 0 to {config.n_layer - 1}, so that at least one"
            f" of the {config.n_layer} layers has experts."
        )
    if width is not None and width < 1:
        problems.append(f"moe_intermediate_size is {width}; expected the width of one expert, such as 2048.")
    if shared is not None and shared < 0:
        problems.append(f"n_shared_expert is {shared}; expected a number from 0.")
    if not 0 < config.routed_scaling_factor < math.inf:
        problems.append(
            f"routed_scaling_factor is {config.routed_scaling_factor}, which the weight of every expert is multiplied"
            " by; expected more than 0, such as 1.0."
        )
    groups, chosen = config.n_expert_groups, config.n_topk_groups
    if groups is None:
        unused = [name for name in ("n_topk_groups", "n_topk_scores_per_group") if getattr(config, name) is not None]
        if unused:
            problems.append(
                f"{' and '.join(unused)} would have no effect: n_expert_groups is not set. Set it, or leave"
                f" {'it' if len(unused) == 1 else 'them'} null."
            )
        return problems
    group_size = config.n_expert // groups
    if not 1 <= chosen <= groups:
        problems.append(f"n_topk_groups is {chosen}; expected a number from 1 to n_expert_groups ({groups}).")
    elif chosen * group_size < config.n_expert_per_token:
        problems.append(
            f"n_topk_groups is {chosen}, and {chosen} of the {groups} groups hold {chosen * group_size} experts, fewer"
            f" than n_expert_per_token ({config.n_expert_per_token}): experts outside of the chosen groups would be"
            f" taken. Expected at least --model.n_topk_groups {-(-config.n_expert_per_token // group_size)}."
        )
    if config.n_topk_scores_per_group < 1:
        problems.append(
            f"n_topk_scores_per_group is {config.n_topk_scores_per_group}, so that all groups would have the same"
            f" score; expected a number from 1 to {group_size}, the size of a group."
        )
    return problems


def _check_router_learns(settings: RunSettings) -> list[str]:
    """For a new model. One that was trained before is taken as it is, and the run says the same in a line
    (``constant_weights_note``)."""
    config = settings.model
    if settings.initial_checkpoint_dir or settings.resume or constant_weights_note(config) is None:
        return []
    if config.n_expert_groups:
        kind, alternative = "a sigmoid router with norm_topk_prob", "--model.norm_topk_prob false"
    else:
        kind, alternative = "a softmax router", _sigmoid_router(config)
    otherwise = "" if settings.upcycle else f", or {alternative}"  # an upcycled model has softmax routers
    return [
        f"n_expert_per_token is 1 with {kind}, which divides the weights of a token's experts by their sum: the one"
        " weight is always 1, so the loss would give the router no gradient, and it would not learn where to send a"
        f" token. --model.n_expert_per_token 2{otherwise}."
    ]


def _sigmoid_router(config: Config) -> str:
    """The flags that give a model with a softmax router one with sigmoid scores, which chooses among all experts."""
    groups = next(number for number in range(2, config.n_expert + 1) if config.n_expert % number == 0)
    scores, normalized = min(2, config.n_expert // groups), config.n_expert_per_token > 1
    return (
        f"--model.n_expert_groups {groups} --model.n_topk_groups {groups} --model.n_topk_scores_per_group {scores}"
        f" --model.norm_topk_prob {str(normalized).lower()}"
    )


def _check_balance(settings: RunSettings) -> list[str]:
    rate, config = settings.moe.bias_update_rate, settings.model
    if settings.moe.backend != "auto" and config.mlp_class_name != "LLaMAMoE":
        return [f"moe.backend is {settings.moe.backend}, but this model has no experts; --moe.backend auto"]
    if rate < 0:
        return [f"moe.bias_update_rate is {rate}; expected 0 for none, or a small step such as 0.001."]
    if rate and (config.mlp_class_name != "LLaMAMoE" or not config.n_expert_groups):
        problem = (
            f"moe.bias_update_rate is {rate}, but only a sigmoid router has a selection bias and this model has none;"
        )
        if config.mlp_class_name != "LLaMAMoE" or config.n_expert < 2 or isinstance(settings, FinetuneSettings):
            return [f"{problem} --moe.bias_update_rate 0"]
        return [f"{problem} --moe.bias_update_rate 0, or train a model with sigmoid routers: {_sigmoid_router(config)}"]
    if rate and isinstance(settings, FinetuneSettings) and settings.lora_r:
        return [
            f"moe.bias_update_rate is {rate}, but LoRA leaves the routers' selection bias as the checkpoint has it;"
            " --moe.bias_update_rate 0, or train all weights: --lora_r 0"
        ]
    return []


def _check_batches(settings: RunSettings) -> list[str]:
    if settings.num_nodes < 1:
        return [f"num_nodes is {settings.num_nodes}; expected at least 1."]
    problems = []
    train, (devices, num_nodes) = settings.train, processes(settings)
    ranks = devices * num_nodes
    smallest = train.micro_batch_size * ranks
    if train.micro_batch_size < 1 or train.global_batch_size < smallest or train.global_batch_size % smallest:
        per_step = f"micro_batch_size {train.micro_batch_size}" + (f" x {ranks} devices" if ranks > 1 else "")
        upper = max(smallest, -(-train.global_batch_size // max(smallest, 1)) * smallest)
        problems.append(
            f"global_batch_size {train.global_batch_size} is no multiple of {per_step};"
            f" --global-batch-size {upper} would fit."
        )
    context = train.max_seq_length
    if context is not None and not 1 <= context <= settings.model.block_size:
        larger = "" if isinstance(settings, FinetuneSettings) else ", or a larger --model.block_size"
        problems.append(
            f"max_seq_length is {context} but the model's block_size is {settings.model.block_size}; expected at most"
            f" that: --max-seq-length {settings.model.block_size}{larger}."
        )
    for name in ("log_interval", "save_interval"):
        if (interval := getattr(train, name)) is not None and interval < 1:
            problems.append(f"train.{name} is {interval}; expected at least 1.")
    return problems


def _check_sharding(settings: RunSettings, optimizer: dict[str, Any]) -> list[str]:
    """What needs whole matrices in one process can't be had with FSDP."""
    if not is_sharded(settings):
        return []
    problems = []
    if not optimizer_traits(optimizer).supports_fsdp:
        problems.append(
            f"strategy fsdp shards every matrix, and {optimizer['class_path']} needs complete ones; --optimizer"
            " torch.optim.AdamW, or --strategy ddp."
        )
    if settings.eval.hellaswag is not None:
        problems.append("strategy fsdp scores no HellaSwag while it trains; --eval.hellaswag null, then evaluate.py.")
    if settings.compile:
        problems.append("strategy fsdp runs uncompiled; --compile false, or --strategy ddp.")
    if isinstance(settings, FinetuneSettings) and settings.lora_r:
        problems.append("strategy fsdp has no LoRA, which trains little enough for --strategy ddp; or --lora_r 0.")
    if choose_precision(settings.precision)[0] == "16-mixed":
        problems.append("strategy fsdp has no gradient scaler, so no fp16; --precision 32-true, or --strategy ddp.")
    return problems


def _check_schedule(settings: RunSettings, optimizer: dict[str, Any]) -> list[str]:
    problems, train, fraction = [], settings.train, settings.schedule.decay_fraction
    if not 0 < fraction <= 1:
        problems.append(
            f"schedule.decay_fraction is {fraction}; expected a part of the run, above 0 and at most 1, such as 0.2."
        )
    elif settings.schedule.name != "wsd" and fraction != ScheduleSettings.decay_fraction:
        problems.append(
            f"schedule.decay_fraction is {fraction}, but the schedule is {settings.schedule.name}, which goes down all"
            " the way; --schedule.name wsd"
        )
    limits = {name: getattr(train, name) for name in ("max_tokens", "max_steps", "epochs")}
    if not any(limits.values()):
        problems.append(
            "no end is set; expected train.max_tokens, train.max_steps or train.epochs"
            " (train.max_time alone gives the learning-rate schedule no length)."
        )
    for name, limit in {**limits, "max_time": train.max_time}.items():
        if limit is not None and not 0 < limit <= 2**62:  # also where it is not a number
            problems.append(f"train.{name} is {str(limit)[:30]}; expected more than 0, and at most 2**62.")
    if train.max_norm is not None and not train.max_norm > 0:
        problems.append(f"train.max_norm is {train.max_norm}; expected more than 0, or null for no clipping.")
    learning_rate = (optimizer.get("init_args") or {}).get("lr")
    if isinstance(learning_rate, float) and not 0 < learning_rate < math.inf:
        problems.append(f"the optimizer's lr is {learning_rate}; expected more than 0, such as 3.0e-4.")
    elif isinstance(learning_rate, float) and not 0 <= train.min_lr <= learning_rate:
        problems.append(
            f"train.min_lr is {train.min_lr} but the optimizer's lr is {learning_rate}; expected a min_lr from 0 to lr:"
            f" --train.min_lr {learning_rate / 10:.1e}"
        )
    return problems


def _check_checkpoints(settings: RunSettings) -> list[str]:
    problems = []
    checkpoint, interval = settings.checkpoint, settings.train.save_interval
    if checkpoint.every_minutes is not None and not 0 < checkpoint.every_minutes < math.inf:
        problems.append(f"checkpoint.every_minutes is {checkpoint.every_minutes}; expected more than 0, or null.")
    if checkpoint.keep_last is not None and checkpoint.keep_last < 2:
        problems.append(
            f"checkpoint.keep_last is {checkpoint.keep_last}; expected at least 2, so that one is there when another"
            " turns out to be damaged, or null to keep all."
        )
    if checkpoint.keep_every is not None and (
        not interval or checkpoint.keep_every < 1 or checkpoint.keep_every % interval
    ):
        problems.append(
            f"checkpoint.keep_every is {checkpoint.keep_every}, but the run saves every {interval} steps"
            " (train.save_interval); expected a multiple of that."
        )
    return problems


def _check_evaluation(settings: RunSettings) -> list[str]:
    problems = []
    if settings.eval.interval < 1 or settings.eval.max_iters < 1:
        problems.append(
            f"eval.interval is {settings.eval.interval} and eval.max_iters {settings.eval.max_iters};"
            " expected at least 1 each."
        )
    for name in ("hellaswag_interval", "hellaswag_limit"):
        value = getattr(settings.eval, name)
        if value is not None and value < 1:
            problems.append(f"eval.{name} is {value}; expected at least 1, or null.")
        if value is not None and settings.eval.hellaswag is None:
            problems.append(
                f"eval.{name} is set but nothing is scored; name the questions: --eval.hellaswag FILE_OR_HUB"
            )
    if settings.eval.evaluate_example != "first":
        problems.append("eval.evaluate_example means nothing here; the sample's prompt is --sample.prompt.")
    return problems


def _check_finetuning(settings: FinetuneSettings) -> list[str]:
    problems = []
    if settings.train.max_tokens:
        problems.append("train.max_tokens counts tokens of a text; expected train.epochs or train.max_steps.")
    if settings.lora_r < 0 or settings.lora_alpha < 1 or not 0 <= settings.lora_dropout < 1:
        problems.append(
            f"lora_r is {settings.lora_r}, lora_alpha {settings.lora_alpha}, lora_dropout {settings.lora_dropout};"
            " expected a rank from 0, an alpha from 1, and a dropout from 0 to below 1."
        )
    parts = ("query", "key", "value", "projection", "mlp", "head")
    if settings.lora_r and not any(getattr(settings, f"lora_{part}") for part in parts):
        problems.append("lora_r is set but no part of the model gets LoRA; turn one on: --lora_query true")
    return problems


def _check_log(settings: RunSettings) -> list[str]:
    """LogArgs of LitGPT are W&B's and those of a logger that is not here."""
    given = {field.name for field in fields(LogArgs) if getattr(settings.log, field.name) != field.default}
    read_by_wandb = {"project", "run", "group"}
    problems = [f"log.{name} belongs to a logger that is not offered here." for name in sorted(given - read_by_wandb)]
    if given & read_by_wandb and "wandb" not in (settings.loggers or [settings.logger_name]):
        names = ", ".join(f"log.{name}" for name in sorted(given & read_by_wandb))
        problems.append(f"{names} is read by W&B alone; add it: --loggers '[csv,wandb]'")
    return problems
