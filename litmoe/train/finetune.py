"""Finetuning, of all weights or by LoRA: ``finetune`` calls LitGPT's ``setup``, which calls ``main`` here."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import litgpt.finetune.full
import litgpt.finetune.lora
import litgpt.lora
import torch
from litgpt import GPT

from litmoe import checkpoints
from litmoe.config import LORA_FIELDS, FinetuneSettings, ParsedRun
from litmoe.data.conversations import prompt_style
from litmoe.data.instructions import instructions_fingerprint
from litmoe.data.tokenizers import litgpt_tokenizer
from litmoe.hardware import choose_precision, is_sharded, processes
from litmoe.train.allocator import use_expandable_segments
from litmoe.train.distributed import make_strategy, report_lost_ranks
from litmoe.train.logs import logger_factory
from litmoe.train.lora import load_base_weights, load_lora_weights, lora_config
from litmoe.train.patches import patched_finetuning
from litmoe.train.preflight import question
from litmoe.train.run import run_training


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
    use_expandable_segments(torch.cuda.is_available())
    precision, note = choose_precision(settings.precision)
    devices, num_nodes = processes(settings)
    resume_step = checkpoints.read_metadata(resume_from).step if resume_from else None
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
        "logger_name": "csv",
        "seed": settings.seed,
    }
    if settings.lora_r:
        arguments |= {name: getattr(settings, name) for name in LORA_FIELDS}
    patched = patched_finetuning(
        module,
        main=partial(main, run=run, resume_from=resume_from, precision_note=note),
        choose_logger=logger_factory(
            settings.loggers or [settings.logger_name], run_name=settings.run_name, resume_step=resume_step
        ),
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
    fabric.seed_everything(settings.seed, verbose=False)
    weights = checkpoints.load_weights(resume_from if resume_from and not settings.lora_r else folder)
    with fabric.init_module(empty_init=not is_sharded(settings)):
        gpt = litgpt.lora.GPT(lora_config(settings)) if settings.lora_r else GPT(settings.model)
    # Tied embeddings stay tied, unless LoRA changes the head only.
    settings.train.tie_embeddings = checkpoints.is_tied(weights) and not (settings.lora_r and settings.lora_head)
    if settings.train.tie_embeddings:
        head = gpt.lm_head.linear if settings.lora_r else gpt.lm_head
        gpt.transformer.wte.weight = head.weight
    load_base_weights(gpt, weights)
    if settings.lora_r and resume_from:
        load_lora_weights(gpt, checkpoints.load_lora_weights(resume_from))
    gpt.max_seq_length = settings.train.max_seq_length or settings.model.block_size

    tokenizer = litgpt_tokenizer(folder)
    provenance = {"the conversations": instructions_fingerprint(data.data_dir)}
    if settings.lora_r:
        provenance["the checkpoint that it starts from"] = (
            checkpoints.read_metadata(folder).files[checkpoints.WEIGHTS].sha256
        )
    run_training(
        fabric,
        gpt,
        parsed=run,
        data=data,
        tokenizer=tokenizer,
        resume_from=resume_from,
        precision_note=precision_note,
        sample_prompt=question(settings, tokenizer),
        prompt_style=prompt_style(data.prompt_style),
        provenance=provenance,
    )
