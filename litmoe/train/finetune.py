"""Finetuning, of all weights or by LoRA: checks, LitGPT's ``setup`` with our ``main``, and the LoRA weights."""

from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
import litgpt.finetune.full
import litgpt.finetune.lora
import litgpt.lora
import torch
from litgpt import GPT, Tokenizer
from torch import Tensor

from custom_moe.litgpt import LoRAExperts, LoRARouter
from litmoe import checkpoints
from litmoe.checksummed_json import file_sha256
from litmoe.cli import UserError
from litmoe.config import ParsedRun, RunSettings
from litmoe.data import InstructionData, conversations
from litmoe.data.conversations import Message, prompt_style
from litmoe.data.instructions import conversations as read_conversations
from litmoe.data.instructions import instructions_fingerprint
from litmoe.data.sft_data import longer_context
from litmoe.data.tokenizers import litgpt_tokenizer
from litmoe.finetune_config import LORA_FIELDS, FinetuneSettings
from litmoe.hardware import choose_precision, is_sharded, keep_freed_memory, processes, use_expandable_segments
from litmoe.inference.generate import check_sampling
from litmoe.train.distributed import make_strategy, report_lost_ranks
from litmoe.train.logs import logger_factory
from litmoe.train.patches import patched_finetuning
from litmoe.train.preflight import (
    check_same_model,
    check_same_router,
    check_vocabulary,
    find_checkpoint,
    find_moved_data,
)
from litmoe.train.resume import described_changes, refusal
from litmoe.train.run import run_training
from litmoe.train.state import Finetuning


def ready_to_finetune(settings: RunSettings) -> Path | None:
    """Prepare everything that finetuning needs, and return the checkpoint folder to resume from, or None.

    Raises:
        UserError: something is missing or does not fit. Nothing is lost then.
    """
    assert isinstance(settings, FinetuneSettings)
    if not isinstance(settings.data, InstructionData):
        raise UserError(
            f"finetuning needs conversations, and the run's data is {type(settings.data).__name__}; expected"
            " litmoe.data.InstructionData."
        )
    # What can fail in seconds comes first: the conversations take longer to read.
    checkpoints.check_router(settings.checkpoint_dir, settings.moe.router, "--moe.router")
    resume_from = find_checkpoint(settings)
    if resume_from is not None:
        check_same_router(resume_from, settings)
        check_same_model(resume_from, settings.model)
        check_same_tuning(resume_from, settings)
        _find_moved_instructions(settings, resume_from)
    tokenizer = check_vocabulary(settings.tokenizer_dir, settings.model)
    settings.data.connect(tokenizer, settings.train.micro_batch_size, settings.model.block_size)
    settings.data.prepare_data()
    check_sampling(1, settings.sample.max_new_tokens, settings.sample.temperature, settings.sample.top_k, 1.0)
    question(settings, tokenizer)
    return resume_from


def _find_moved_instructions(settings: FinetuneSettings, resume_from: Path) -> None:
    """Point ``data_dir`` to where the conversations of the checkpoint are now, if they were moved nearby.

    Otherwise ``prepare_data`` reports that there are none.
    """
    data = settings.data
    saved = resume_from / checkpoints.INSTRUCTIONS
    if data.manifest_path.is_file() or not saved.is_file():
        return
    content, name = saved.read_bytes(), data.manifest_path.name
    moved_to = find_moved_data(data.data_dir, lambda folder: (folder / name).read_bytes() == content)
    if moved_to is not None:
        data.data_dir = moved_to


def check_same_tuning(folder: Path, settings: FinetuneSettings) -> None:
    """Raise ``UserError`` if a resumed run would have other LoRA weights or another prompt style."""
    saved = checkpoints.load_hyperparameters(folder)
    if "lora_r" not in saved:
        problem = f"{folder} is from a pretraining run, which finetuning can't resume"
        raise refusal(folder, settings, problem, "Resume a finetuning run")
    # The prompt style is a setting of the data.
    saved |= saved["data"]["init_args"]
    changes = described_changes(saved, {"prompt_style": settings.data.prompt_style, **lora_fields(settings)})
    if changes:
        problem = f"{folder} can't be resumed with other settings: {'; '.join(changes.values())}"
        raise refusal(folder, settings, problem, "Resume with the old ones")


def question(settings: FinetuneSettings, tokenizer: Tokenizer) -> str:
    """Return the prompt of the sample at each evaluation, in the run's style.

    It is ``sample.prompt``, or the first validation question that leaves room for an answer.

    Raises:
        UserError: the prompt is too long, or all validation questions are.
    """
    data = settings.data
    style = conversations.prompt_style(data.prompt_style)
    context = settings.train.max_seq_length or settings.model.block_size
    if settings.sample.prompt is not None:
        prompts = [[Message(role="user", content=settings.sample.prompt)]]
    else:
        # A prompt is everything before the first answer: a system message, if there is one, and the question.
        prompts = []
        for conversation in read_conversations(data.data_dir, "val"):
            prompts.append(list(takewhile(lambda message: message["role"] != "assistant", conversation)))
    lengths = []
    for messages in prompts:
        messages = [conversations.without_special_tokens(message, tokenizer) for message in messages]
        lengths.append(len(conversations.encode_prompt(messages, tokenizer, style)))
        if lengths[-1] < context:
            return conversations.prompt_text(messages, style)
    if settings.sample.prompt is not None:
        raise UserError(
            f"the sample's prompt has {lengths[0]} tokens, but the context has {context};"
            " use a shorter --sample.prompt."
        )
    raise UserError(
        f"none of the {len(lengths):,} held-out conversations of {data.data_dir} fits: {min(lengths):,} to"
        f" {max(lengths):,} tokens come before their first answer, and the context has {context:,}."
        f" {longer_context(context, settings.model.block_size)}"
    )


def finetune(run: ParsedRun, *, resume_from: Path | None) -> None:
    """Finetune a checkpoint as the settings say, and write checkpoints and metrics to ``settings.out_dir``.

    Args:
        run: parsed and checked settings, with prepared conversations.
        resume_from: a complete checkpoint folder to continue from.

    Raises:
        UserError: mistakes that are found only now: a checkpoint of another run, W&B without a login.
    """
    settings = run.settings
    assert isinstance(settings, FinetuneSettings)
    # Before the first allocation on the GPU.
    use_expandable_segments(torch.cuda.is_available())
    keep_freed_memory(torch.cuda.is_available())
    precision, note = choose_precision(settings.precision, settings.accelerator)
    devices, num_nodes = processes(settings)
    module = litgpt.finetune.lora if settings.lora_r else litgpt.finetune.full
    arguments: dict[str, Any] = {
        "checkpoint_dir": settings.checkpoint_dir,
        "out_dir": settings.out_dir,
        "precision": precision,
        "devices": devices,
        "num_nodes": num_nodes,
        "data": settings.data,
        "train": settings.train,
        "eval": settings.eval,
        "log": settings.log,
        "optimizer": run.optimizer,
        # Has no effect, because choose_logger is replaced.
        "logger_name": "csv",
        "seed": settings.seed,
    }
    if settings.lora_r:
        arguments |= lora_fields(settings)
    patched = patched_finetuning(
        module,
        main=partial(main, run=run, resume_from=resume_from, precision_note=note),
        choose_logger=logger_factory(settings, resume_from),
        strategy=partial(make_strategy, settings, precision),
        router=settings.moe.router,
    )
    with patched, report_lost_ranks():
        module.setup(**arguments)


def main(fabric: L.Fabric, *_: Any, run: ParsedRun, resume_from: Path | None, precision_note: str | None) -> None:
    """Load the model and train it. Replaces ``litgpt.finetune.full.main`` and ``litgpt.finetune.lora.main``.

    LitGPT's further arguments are in ``run``.
    """
    settings = run.settings
    assert isinstance(settings, FinetuneSettings)
    folder, data = settings.checkpoint_dir, settings.data
    # Before the model: LoRA's A matrices are drawn from it, the same on every rank.
    fabric.seed_everything(settings.seed, verbose=False)
    if settings.uses_lora:
        gpt = _build_lora_model(fabric, settings, resume_from)
    else:
        gpt = _build_model(fabric, settings, resume_from or folder)
    gpt.max_seq_length = settings.train.max_seq_length or settings.model.block_size
    # LitGPT's attention with a sliding window ignores masks.
    data.packed = gpt.config.sliding_window_size is None

    tokenizer = litgpt_tokenizer(folder)
    # A resumed run must see the same conversations, and with LoRA the same base weights.
    provenance = {"the conversations": instructions_fingerprint(data.data_dir)}
    if settings.uses_lora:
        sha256 = checkpoints.read_metadata(folder).files[checkpoints.WEIGHTS].sha256
        # A checkpoint of LitGPT has no checksums.
        provenance["the checkpoint that it starts from"] = sha256 or file_sha256(folder / checkpoints.WEIGHTS)
    run_training(
        fabric,
        gpt,
        parsed=run,
        data=data,
        tokenizer=tokenizer,
        resume_from=resume_from,
        precision_note=precision_note,
        sample_prompt=question(settings, tokenizer),
        finetuning=Finetuning(prompt_style(data.prompt_style), provenance, data.manifest_path, merge_weights),
    )


def _build_model(fabric: L.Fabric, settings: FinetuneSettings, folder: Path) -> GPT:
    """Return the model with the weights of the checkpoint ``folder``, all of which are trained."""
    weights = checkpoints.load_weights(folder)
    with fabric.init_module(empty_init=not is_sharded(settings)):
        gpt = GPT(settings.model)
    # The weights decide, not the settings.
    settings.train.tie_embeddings = checkpoints.is_tied(weights)
    if settings.train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    gpt.load_state_dict(weights)
    return gpt


# --- LoRA


def _build_lora_model(fabric: L.Fabric, settings: FinetuneSettings, resume_from: Path | None) -> GPT:
    """Return LitGPT's LoRA model with the weights of the base checkpoint, and the updates of a run to resume."""
    # The checkpoints of a LoRA run have merged weights, so a resumed run starts from the base weights as well.
    weights = checkpoints.load_weights(settings.checkpoint_dir)
    # All parameters are loaded or drawn by load_base_weights.
    with fabric.init_module(empty_init=True):
        gpt = litgpt.lora.GPT(litgpt.lora.Config(**asdict(settings.model) | lora_fields(settings)))
    # Tied embeddings stay tied, unless LoRA changes the head only.
    settings.train.tie_embeddings = checkpoints.is_tied(weights) and not settings.lora_head
    if settings.train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.linear.weight
    load_base_weights(gpt, weights)
    if resume_from is not None:
        _load_part(gpt, checkpoints.load_lora_weights(resume_from), are_lora=True)
    return gpt


def lora_fields(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the LoRA settings of a run, in LitGPT's names."""
    return {name: getattr(settings, name) for name in LORA_FIELDS}


def load_base_weights(gpt: GPT, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights into a LoRA model. The LoRA updates start at zero.

    Raises:
        RuntimeError: the weights belong to another model.
    """
    _load_part(gpt, weights, are_lora=False)
    # The model was built without initial values.
    for module in gpt.modules():
        if isinstance(module, litgpt.lora.LoRALinear):
            module.reset_parameters()
        elif isinstance(module, (LoRAExperts, LoRARouter)):
            module.reset_lora()
    litgpt.lora.mark_only_lora_as_trainable(gpt)


def _load_part(gpt: GPT, weights: dict[str, Tensor], *, are_lora: bool) -> None:
    """Load all LoRA parameters of a model (as ``merge_weights`` returned them), or all others.

    Raises:
        RuntimeError: the weights belong to another model, or to other LoRA settings.
    """
    missing, unexpected = gpt.load_state_dict(weights, strict=False)
    wrong = [key for key in missing if litgpt.lora.lora_filter(key, None) == are_lora] + unexpected
    if wrong:
        raise RuntimeError(f"the weights do not fit the model (LoRA: {are_lora}): {', '.join(wrong[:5])}")


@torch.no_grad()
def merge_weights(gpt: GPT) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the weights of the model without LoRA, with the updates merged, and the LoRA parameters or None.

    Both have LitGPT's keys. Like ``litgpt merge_lora``, but from a model in memory, which does not change.
    """
    state = gpt.state_dict()
    if not isinstance(gpt, litgpt.lora.GPT):
        # Full finetuning has nothing to merge.
        return state, None
    modules = dict(gpt.named_modules())
    weights: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, attribute = key.partition(".linear.")
        if litgpt.lora.lora_filter(key, value):
            lora[key] = value
        elif isinstance(modules.get(layer), litgpt.lora.LoRALinear):
            # It wraps the original layer as its attribute `linear`.
            weights[f"{layer}.{attribute}"] = value
        else:
            weights[key] = value
    for key in lora:
        name, _, attribute = key.rpartition(".")
        # One update for each pair of A and B.
        if attribute != "lora_B":
            continue
        # The state dict names the experts' layers one by one, but the parameters belong to the stacked experts, two
        # levels above.
        module: Any = modules.get(name) or modules[name.rsplit(".", 2)[0]]
        if isinstance(module, litgpt.lora.LoRALinear):
            update = module.get_lora_AB()
        else:
            update = module.scaling * (lora[key] @ lora[f"{name}.lora_A"])
        # Not in place: the tensor belongs to the model, whose base weights must not change.
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + update
    return weights, lora
