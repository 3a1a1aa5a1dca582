"""Pretraining: ``pretrain`` calls ``litgpt.pretrain.setup``, which calls ``main`` here.

LitGPT resolves devices, builds tokenizer, loggers and Fabric, and launches the processes. ``main`` builds the model and
trains it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import litgpt.pretrain
import torch
from litgpt import GPT, Config, Tokenizer
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.model import GptNeoxMLP
from torch import nn

from litmoe import checkpoints
from litmoe.config import ParsedRun
from litmoe.data.tokenizers import litgpt_tokenizer
from litmoe.hardware import choose_precision, is_sharded, keep_freed_memory, processes, use_expandable_segments
from litmoe.run_files import RUN_CONFIG
from litmoe.train.distributed import make_strategy, report_lost_ranks
from litmoe.train.logs import logger_factory
from litmoe.train.patches import patched_pretraining
from litmoe.train.run import run_training
from litmoe.upcycling import upcycle


def pretrain(run: ParsedRun, *, resume_from: Path | None) -> None:
    """Train as the settings say, and write checkpoints and metrics to ``settings.out_dir``.

    Args:
        run: parsed and checked settings, with prepared tokens.
        resume_from: a complete checkpoint folder to continue from.

    Raises:
        UserError: mistakes that are found only now: a checkpoint of another run, too little data, W&B without a login,
            a lost rank.
    """
    settings = run.settings
    # Before the first allocation.
    use_expandable_segments(torch.cuda.is_available())
    keep_freed_memory(torch.cuda.is_available())
    precision, note = choose_precision(settings.precision, settings.accelerator)
    devices, num_nodes = processes(settings)
    out_dir = settings.out_dir
    patched = patched_pretraining(
        main=partial(main, run=run, resume_from=resume_from, precision_note=note),
        choose_logger=logger_factory(settings, resume_from),
        strategy=partial(make_strategy, settings, precision),
        summary=f"Settings    {out_dir / RUN_CONFIG}",
        router=settings.moe.router,
    )
    with patched, report_lost_ranks():
        litgpt.pretrain.setup(
            model_name=settings.model.name,
            model_config=settings.model,
            out_dir=out_dir,
            precision=precision,
            initial_checkpoint_dir=settings.initial_checkpoint_dir,
            resume=resume_from or False,
            data=settings.data,
            train=settings.train,
            eval=settings.eval,
            log=settings.log,
            optimizer=run.optimizer,
            devices=devices,
            num_nodes=num_nodes,
            tokenizer_dir=settings.tokenizer_dir,
            # Has no effect, because choose_logger is replaced.
            logger_name="csv",
            seed=settings.seed,
        )


def main(
    fabric: L.Fabric,
    devices: int,
    seed: int,
    initial_checkpoint_dir: Path | None,
    resume: bool | Literal["auto"] | Path,
    config: Config,
    data: DataModule,
    out_dir: Path,
    tokenizer_dir: Path | None,
    tokenizer: Tokenizer | None,
    train: TrainArgs,
    eval: EvalArgs,
    optimizer: str | dict,
    num_nodes: int = 1,
    *,
    run: ParsedRun,
    resume_from: Path | None,
    precision_note: str | None,
) -> None:
    """Build the model and train it. Replaces ``litgpt.pretrain.main``."""
    # FSDP would leave the weights on the meta device.
    with fabric.init_module(empty_init=not is_sharded(run.settings)):
        gpt = GPT(config)
    # The same on every rank, so that all start from the same weights. After the model, because one that is not built
    # empty has drawn random numbers already.
    fabric.seed_everything(seed, verbose=False)
    litgpt.pretrain.initialize_weights(fabric, gpt, n_layer=config.n_layer, n_embd=config.n_embd)
    # After LitGPT's initialization, which it corrects.
    scale_gelu_projections(gpt)
    if run.settings.zero_init_projections:
        zero_projections(gpt)
    # After the initialization, so that the shared matrix has the values of the output layer.
    if train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    # Also sets the length of the rotary tables.
    gpt.max_seq_length = train.max_seq_length or config.block_size
    # Before Fabric wraps or shards the model, while its state dict has LitGPT's keys.
    if initial_checkpoint_dir:
        gpt.load_state_dict(checkpoints.load_weights(initial_checkpoint_dir))
    elif resume_from:
        gpt.load_state_dict(checkpoints.load_weights(resume_from))
    elif dense := run.settings.upcycle:
        gpt.load_state_dict(upcycle(checkpoints.load_weights(dense), gpt.state_dict()))
        fabric.print(f"Each of {config.n_expert} experts starts as a copy of the feed-forward of {dense}.")
    run_training(
        fabric,
        gpt,
        parsed=run,
        data=data,
        tokenizer=None if tokenizer is None else litgpt_tokenizer(run.settings.tokenizer_dir),
        resume_from=resume_from,
        precision_note=precision_note,
        sample_prompt=run.settings.sample.prompt,
    )


def scale_gelu_projections(gpt: GPT) -> None:
    """Initialize the output projection of ``GptNeoxMLP`` as LitGPT does in other layers: smaller with depth.

    Otherwise the feed-forward outputs of a dense GPT-2 would start several times larger than those of its mixture.
    """
    for module in gpt.modules():
        if isinstance(module, GptNeoxMLP):
            nn.init.normal_(module.proj.weight, std=1 / math.sqrt(gpt.config.n_embd) / gpt.config.n_layer)


@torch.no_grad()
def zero_projections(gpt: GPT) -> None:
    """Set the output projections of attention and feed-forward to zero, with their biases."""
    for name, parameter in gpt.transformer.h.named_parameters():
        # 0.attn.proj.weight, 0.mlp.proj.weight, 0.mlp.experts.proj_weight, 0.mlp.shared_experts.proj.weight, and biases
        *_, module, own_name = name.split(".")
        if module == "proj" or own_name.startswith("proj_"):
            parameter.zero_()
