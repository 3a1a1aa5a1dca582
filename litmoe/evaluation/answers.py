"""The loss on the answers of held-out conversations, as finetuning validates it: over each answer's tokens and its
end-of-text token, given what stands before them."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data import instructions
from litmoe.data.conversations import DEFAULT_STYLE, encode_conversation, is_tuned, load_prompt_style, prompt_style
from litmoe.data.instruction_module import IGNORED, EncodedConversations, collate, longer_context
from litmoe.evaluation.common import Precision, as_table, load_model, with_progress
from litmoe.forward import hidden_states, logits_of


@dataclass(frozen=True)
class AnswersEvaluation:
    """The result of ``evaluate``."""

    checkpoint: str
    step: int
    data_dir: str
    prompt_style: str
    """LitGPT's class of the style that the prompts were given in"""
    conversations: int
    answer_tokens: int
    """Those that the loss is the mean over"""
    cut: int
    """Conversations of the whole set that are longer than the context"""
    left_out: int
    """Conversations of the whole set whose first answer would begin beyond the context"""
    loss: float
    """Nats per answer token"""
    perplexity: float
    max_seq_length: int
    device: str
    precision: str


def find_conversations(folder: Path, data_dir: Path | None) -> Path | None:
    """``data_dir`` where it holds prepared conversations, or those that the checkpoint was tuned on; None where not.

    Raises:
        UserError: those that it was tuned on are gone.
    """
    if data_dir is None:
        data = checkpoints.load_hyperparameters(folder).get("data")
        named = ((data.get("init_args") or {}) if isinstance(data, dict) else {}).get("data_dir")
        data_dir = None if named is None else Path(named)
        if data_dir is not None and not (data_dir / instructions.MANIFEST).is_file():
            raise UserError(
                f"{folder} was tuned on the conversations of {data_dir}, which are not there (seen from {Path.cwd()});"
                " name others, or a prepared corpus, with --data_dir."
            )
    return data_dir if data_dir is not None and (data_dir / instructions.MANIFEST).is_file() else None


def evaluate(
    folder: Path,
    data_dir: Path,
    *,
    max_iters: int | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> AnswersEvaluation:
    """Measures a checkpoint on the validation conversations of a folder that ``prepare_data.py --instruct`` made.

    Prompts are given in the checkpoint's own style; one that was not tuned gets the default of finetuning. So the loss
    before tuning and the loss after it compare, where it was tuned in that style and measured at the same context.

    Args:
        max_iters: batches at most.
        batch_size: conversations at once (8 when None).
        max_seq_length: longer conversations are cut; as long as in training when None.
        device, precision: as `litmoe.evaluation.loss.evaluate`.

    Raises:
        UserError: no such checkpoint or conversations, a context out of range, or a loss that is not a number.
    """
    context = checkpoints.context_of(folder, max_seq_length)
    tokenizer, style = checkpoints.load_tokenizer(folder), load_prompt_style(folder)
    if not is_tuned(style):
        style = prompt_style(DEFAULT_STYLE)
    instructions.read(data_dir)
    messages = instructions.conversations(data_dir, "val")
    encoded = EncodedConversations((encode_conversation(each, tokenizer, style) for each in messages), context)
    if len(encoded) == 0:
        shortest, longest = encoded.counts.prompts
        raise UserError(
            f"no answer of {data_dir} begins within {context} tokens: {shortest:,} to {longest:,} come before the first"
            f" ones. {longer_context(context, checkpoints.load_config(folder).block_size)}"
        )
    size = batch_size or 8
    starts = range(0, len(encoded), size)[:max_iters]
    batches = ([encoded[index] for index in range(len(encoded))[start : start + size]] for start in starts)

    model = load_model(folder, device, precision, context)
    where = model.gpt.transformer.wte.weight.device
    nats, tokens = 0.0, 0
    with torch.inference_mode(), model.autocast:
        for batch in with_progress(batches, len(starts)):
            input_ids, targets, _ = collate(batch, tokenizer.eos_id or 0, context)
            logits = logits_of(model.gpt, hidden_states(model.gpt, input_ids.to(where))[0]).flatten(0, 1)
            wanted = targets.to(where).flatten()
            nats += float(F.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum"))
            tokens += int((targets != IGNORED).sum())
    if not math.isfinite(nats):
        raise UserError(f"the loss of {folder} is not a number: its training diverged. Use an earlier checkpoint.")
    return AnswersEvaluation(
        checkpoint=str(folder),
        step=checkpoints.read_mark(folder).step,
        data_dir=str(data_dir),
        prompt_style=type(style).__name__,
        conversations=min(len(starts) * size, len(encoded)),
        answer_tokens=tokens,
        cut=encoded.counts.cut,
        left_out=encoded.counts.left_out,
        loss=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        max_seq_length=context,
        device=model.device,
        precision=model.precision,
    )


def table(result: AnswersEvaluation) -> Table:
    """The result for people."""
    cut = f"; {result.cut:,} of all are longer than {result.max_seq_length:,} tokens and cut" if result.cut else ""
    if result.left_out:
        cut += f"; {result.left_out:,} of all left out: their first {result.max_seq_length:,} tokens hold no answer"
    return as_table(
        {
            "checkpoint": f"{result.checkpoint}, step {result.step:,}",
            "answers": f"{result.data_dir}, validation",
            "loss": f"{result.loss:.4f} nats per answer token",
            "perplexity": f"{result.perplexity:.3f}",
            "conversations": f"{result.conversations:,} with {result.answer_tokens:,} answer tokens{cut}",
            "prompt style": result.prompt_style,
            "computed": f"on {result.device} in {result.precision}",
        }
    )
