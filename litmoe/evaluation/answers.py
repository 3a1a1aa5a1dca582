"""Loss on the answers of held-out conversations, computed as finetuning does for validation.

Only the tokens of the answers count, including the end-of-text token after each answer.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from litgpt import GPT
from rich.table import Table

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data import instructions
from litmoe.data.conversations import DEFAULT_STYLE, encode_conversation, is_tuned, load_prompt_style, prompt_style
from litmoe.data.sft_data import IGNORE_INDEX, EncodedConversations, collate, longer_context
from litmoe.evaluation.common import ModelOptions, Result, as_table, load_model, with_progress
from litmoe.inference.generate import check_finite
from litmoe.layers import hidden_states, logits_of

_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class AnswersEvaluation(Result):
    """Loss of a checkpoint on answers."""

    data_dir: str
    prompt_style: str  # class of the prompt style in LitGPT
    conversations: int
    answer_tokens: int
    cut: int  # conversations of the complete set that are longer than the context
    left_out: int  # conversations of the complete set in which the first answer starts after the end of the context
    loss: float  # nats per answer token
    perplexity: float
    max_seq_length: int


def find_conversations(folder: Path, data_dir: Path | None) -> Path | None:
    """Return the folder with prepared conversations to evaluate on, None if there is none.

    Args:
        folder: checkpoint folder.
        data_dir: given by the user; if None, the one of finetuning is used.

    Raises:
        UserError: the conversations of finetuning do not exist any more.
    """
    if data_dir is not None:
        return data_dir if _has_conversations(data_dir) else None
    trained_on = checkpoints.setting(checkpoints.load_hyperparameters(folder), "data.init_args.data_dir")
    if trained_on is None:  # as in imported checkpoints
        return None
    data_dir = Path(trained_on)
    if not _has_conversations(data_dir):
        raise UserError(
            f"{folder} was finetuned on the conversations of {data_dir}, which do not exist (relative to {Path.cwd()})."
            " Name other conversations or a prepared corpus with --data_dir."
        )
    return data_dir


def _has_conversations(data_dir: Path) -> bool:
    return (data_dir / instructions.MANIFEST).is_file()


def evaluate(
    folder: Path,
    data_dir: Path,
    *,
    max_iters: int | None = None,
    batch_size: int | None = None,
    **options: Unpack[ModelOptions],
) -> AnswersEvaluation:
    """Evaluate a checkpoint on the validation conversations of a folder that ``prepare_data.py --instruct`` wrote.

    Prompts use the prompt style of the checkpoint. A pretrained checkpoint gets the default style of finetuning, so its
    loss can be compared with that after finetuning in this style with the same context. Arguments as
    `litmoe.evaluation.loss.evaluate`, but batches are of 8 conversations by default, and longer ones are cut.

    Raises:
        UserError: checkpoint or conversations are missing, the context is out of range, or the loss is not finite.
    """
    context = checkpoints.context_of(folder, options.get("max_seq_length"))
    tokenizer, style = checkpoints.load_tokenizer(folder), load_prompt_style(folder)
    # A base model has no prompt style: it is measured as it would be before finetuning.
    if not is_tuned(style):
        style = prompt_style(DEFAULT_STYLE)
    # Compares the files with their checksums.
    instructions.read(data_dir)
    messages = instructions.conversations(data_dir, "val")
    encoded = EncodedConversations((encode_conversation(each, tokenizer, style) for each in messages), context)
    if len(encoded) == 0:
        shortest, longest = encoded.counts.left_out_prompts
        raise UserError(
            f"no answer of {data_dir} starts within {context} tokens: the first ones start after {shortest:,} to"
            f" {longest:,} tokens. {longer_context(context, checkpoints.load_config(folder).block_size)}"
        )
    size = batch_size or _BATCH_SIZE
    indices = range(len(encoded))[: None if max_iters is None else max_iters * size]
    # After everything that can fail quickly.
    model = load_model(folder, **options)
    with model.autocast:
        nats, tokens = _sum_loss(model.gpt, encoded, indices, size, tokenizer.eos_id or 0, context)
    return AnswersEvaluation(
        **model.about,
        data_dir=str(data_dir),
        prompt_style=type(style).__name__,
        conversations=len(indices),
        answer_tokens=tokens,
        cut=encoded.counts.cut,
        left_out=encoded.counts.left_out,
        loss=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),  # exp(710) overflows
        max_seq_length=context,
    )


@torch.inference_mode()
def _sum_loss(
    gpt: GPT, encoded: EncodedConversations, indices: range, batch_size: int, padding: int, context: int
) -> tuple[float, int]:
    """Return the summed negative log-probability of the answer tokens in nats, and their number."""
    device = gpt.transformer.wte.weight.device
    nats, tokens = 0.0, 0
    for start in with_progress(indices[::batch_size]):
        batch = [encoded[index] for index in indices[start : start + batch_size]]
        rows = collate(batch, padding, context)
        logits_BTV = logits_of(gpt, hidden_states(gpt, rows.input_ids.to(device))[0])
        # Tokens of prompts and padding are IGNORE_INDEX in the targets.
        targets = rows.targets.flatten().to(device)
        # A sum and not a mean, because batches have different numbers of answer tokens.
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        nats += float(loss)
        tokens += int((targets != IGNORE_INDEX).sum())
    check_finite(torch.tensor(nats))
    return nats, tokens


def table(result: AnswersEvaluation) -> Table:
    """Return the result as a table for the terminal."""
    conversations = f"{result.conversations:,} with {result.answer_tokens:,} answer tokens"
    limit = f"{result.max_seq_length:,} tokens"
    if result.cut:
        conversations += f"; {result.cut:,} of all conversations are longer than {limit} and cut"
    if result.left_out:
        conversations += f"; {result.left_out:,} of all conversations are skipped: no answer in their first {limit}"
    rows = {
        "answers": f"{result.data_dir}, validation",
        "loss": f"{result.loss:.4f} nats per answer token",
        "perplexity": f"{result.perplexity:.3f}",
        "conversations": conversations,
        "prompt style": result.prompt_style,
    }
    return as_table(result, rows)
