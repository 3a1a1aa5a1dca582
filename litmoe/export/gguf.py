"""Export a checkpoint to a GGUF file for llama.cpp, Ollama and LM Studio, with a Modelfile next to it.

The file is read back and compared with the checkpoint before it gets its name. If xllamacpp is installed, llama.cpp
also runs it, and its greedy text is compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from litgpt import Config, Tokenizer
from litgpt.prompts import PromptStyle
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError, quoted
from litmoe.data.conversations import encode_prompt, is_tuned, load_prompt_style, stop_sequences
from litmoe.data.tokenizers import text_ids
from litmoe.export import llama_cpp
from litmoe.export.chat_template import TEST_CONVERSATIONS, parts_of
from litmoe.export.gguf_model import (
    NamedTensor,
    add_model_metadata,
    architecture_of,
    gguf_tensors,
    problems_in_llama_cpp,
)
from litmoe.export.gguf_vocabulary import add_vocabulary, read_tokenizer
from litmoe.export.huggingface import litgpt_model, read_config, write_tokenizer
from litmoe.export.modelfile import FIRST_LINE, modelfile
from litmoe.export.verify import PROMPTS, Check
from litmoe.hf_config import without_counterpart
from litmoe.inference.generate import check_finite
from litmoe.renaming import rename

Quantization = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
# Largest rounding error of a weight, relative to the largest weight of its tensor. The quantized types round the scales
# of their blocks too.
_LARGEST_ERROR = {
    GGMLQuantizationType.F32: 0.0,
    GGMLQuantizationType.F16: 2**-11,
    GGMLQuantizationType.BF16: 2**-8,
    GGMLQuantizationType.Q8_0: 0.5 / 127 + 2**-10,
    GGMLQuantizationType.Q4_0: 1 / 8 + 2**-10,
}
# The defaults of generate.py and chat.py.
_TEMPERATURE, _TOP_K = 0.8, 50
_NEW_TOKENS = 32


class Exported(NamedTuple):
    """What was written."""

    modelfile: Path
    checks: list[Check]


class _Source(NamedTuple):
    """What the file is made from."""

    folder: Path
    config: Config
    weights: dict[str, Tensor]
    tied: bool
    tokenizer: Tokenizer
    style: PromptStyle

    def tensors(self) -> Iterator[NamedTensor]:
        return gguf_tensors(self.weights, self.config, tied=self.tied)


def export(checkpoint: Path, out: Path, *, quantization: Quantization = "f16") -> Exported:
    """Export a checkpoint to a GGUF file, with a Modelfile for Ollama in the same folder.

    Args:
        checkpoint: checkpoint folder.
        out: the file.
        quantization: type of the matrices. Vectors and routers stay in fp32.

    Returns:
        Path of the Modelfile, and what was compared.

    Raises:
        UserError: before anything is written, if llama.cpp can't compute the same, has no such tokenizer, ``out``
            exists, or the checkpoint is damaged.
        RuntimeError: the file is not what was intended, or llama.cpp computes something else; ``out`` is not written.
    """
    modelfile_path = _check_free(out)
    source = _read_checkpoint(checkpoint)
    _check_quantizable(source, quantization)
    content = read_tokenizer(source.folder, source.config.padded_vocab_size)
    template, template_checks = _chat_template(source)
    with _atomic_file(out) as partial:
        writer = GGUFWriter(partial, architecture_of(source.config))
        writer.add_name(out.stem)
        add_model_metadata(writer, source.config)
        add_vocabulary(
            writer,
            content,
            source.tokenizer,
            vocab_size=source.config.padded_vocab_size,
            end_of_turn_id=_end_of_turn_id(source),
            chat_template=template,
        )
        _write_tensors(writer, source, quantization)
        checks = [_check_tensors(partial, source, quantization)]
        if llama_cpp.is_available():
            checks += _compare_with_llama_cpp(partial, source, quantization, has_template=template is not None)
        else:
            checks.append(Check("llama.cpp", "not run: `uv pip install xllamacpp` compares its greedy text"))
    modelfile_path.write_text(_modelfile(out, source), encoding="utf-8", newline="\n")
    return Exported(modelfile_path, checks + template_checks)


def _check_free(out: Path) -> Path:
    """Return the path of the Modelfile; raise UserError if a file can't be written."""
    if out.suffix != ".gguf":
        raise UserError(f"the file is {out}; expected a name that ends in .gguf: {quoted(out.with_suffix('.gguf'))}.")
    if out.exists():
        raise UserError(f"{out} exists; use another name, or remove it.")
    path = out.with_name("Modelfile")
    # The newest export has the Modelfile of a folder. One that a user wrote stays.
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(FIRST_LINE):
        raise UserError(f"{path} exists and was not written by export_gguf.py; export into another folder.")
    return path


@contextmanager
def _atomic_file(out: Path) -> Iterator[Path]:
    """Yield a file next to ``out``, which gets its name at the end, or is removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        yield partial
        rename(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _read_checkpoint(checkpoint: Path) -> _Source:
    folder = checkpoints.resolve(checkpoint)
    config, router_problems = read_config(folder)
    problems = problems_in_llama_cpp(config) + router_problems
    if problems:
        if not router_problems and not without_counterpart(config):
            fix = f"transformers can: `uv run python export_hf.py {quoted(folder)} exported`."
        else:
            fix = f"generate.py and chat.py can: `uv run python generate.py {quoted(folder)}`."
        raise UserError(
            f"llama.cpp can't compute the same as {folder}, so nothing was written. It has no counterpart of:"
            f" {'; '.join(problems)}. {fix}"
        )
    weights = checkpoints.load_weights(folder)
    for tensor in weights.values():
        check_finite(tensor)
    tied = checkpoints.is_tied(weights)
    return _Source(folder, config, weights, tied, checkpoints.load_tokenizer(folder), load_prompt_style(folder))


# ---------------------------------------------------------------------------------------------------------------- chat


def _chat_template(source: _Source) -> tuple[str | None, list[Check]]:
    """Return the chat template, if it gives the tokens of finetuning, and what to know about it."""
    if not is_tuned(source.style):
        return None, []
    with TemporaryDirectory() as folder:
        checks = write_tokenizer(source.folder, Path(folder), source.tokenizer, source.style, source.config)
        path = Path(folder) / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else None
    return template, [check for check in checks if check.what == "chat template"]


def _end_of_turn_id(source: _Source) -> int | None:
    """Return the first token other than the end-of-text token that ends an answer alone."""
    for sequence in stop_sequences(source.style, source.tokenizer):
        if len(sequence) == 1 and sequence[0] != source.tokenizer.eos_id:
            return sequence[0]
    return None


def _modelfile(out: Path, source: _Source) -> str:
    processor, sequences = source.tokenizer.processor, stop_sequences(source.style, source.tokenizer)
    bos_id = source.tokenizer.bos_id
    # llama.cpp, and so Ollama, adds the begin-of-text token itself.
    bos_token = None if bos_id is None else processor.id_to_token(bos_id)
    return modelfile(
        out.name,
        parts_of(source.style, bos_token) if is_tuned(source.style) else None,
        eos_token=processor.id_to_token(source.tokenizer.eos_id),
        stop=[processor.decode(sequence, skip_special_tokens=False) for sequence in sequences],
        context=source.config.block_size,
        temperature=_TEMPERATURE,
        top_k=_TOP_K,
    )


# ------------------------------------------------------------------------------------------------------------- tensors


def _type_of(named: NamedTensor, quantization: Quantization) -> GGMLQuantizationType:
    """Return how a tensor is stored."""
    # llama.cpp multiplies with vectors and routers in fp32 only.
    if named.tensor.ndim < 2 or named.name.endswith(".ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    if quantization in ("f32", "f16", "bf16"):
        return GGMLQuantizationType[quantization.upper()]
    # A block is 32 weights of a row.
    if named.tensor.shape[-1] % 32:
        return GGMLQuantizationType.F16
    # Four bits in the first and the last layer cost most of the quality, and few bytes.
    if named.name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[quantization.upper()]


def _encode(named: NamedTensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of a tensor in the file."""
    with np.errstate(over="ignore"):
        encoded = quantize(named.tensor.float().contiguous().numpy(), kind)
    if kind == GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise UserError(
            f"{named.name} has weights above 65,504, the largest number in f16; expected smaller ones. Use --quantize"
            " bf16."
        )
    return np.ascontiguousarray(encoded).view(np.uint8)


def _shapes(source: _Source) -> list[NamedTensor]:
    """Return the tensors of the file on the meta device, which needs no copies."""
    weights = {name: tensor.to("meta") for name, tensor in source.weights.items()}
    return list(source._replace(weights=weights).tensors())


def _check_quantizable(source: _Source, quantization: Quantization) -> None:
    """Raise UserError if no tensor would get the type that the user named."""
    shapes = _shapes(source)
    if quantization.upper() not in {_type_of(named, quantization).name for named in shapes}:
        widths = sorted({named.tensor.shape[-1] for named in shapes if named.tensor.ndim > 1})
        raise UserError(
            f"no matrix of {source.folder} can be stored in {quantization}: their rows have"
            f" {', '.join(map(str, widths))} numbers; expected multiples of 32. Use --quantize f16."
        )


def _write_tensors(writer: GGUFWriter, source: _Source, quantization: Quantization) -> None:
    writer.add_file_type(_FILE_TYPES[quantization])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    # The names and shapes of all tensors come first in the file.
    for named in _shapes(source):
        kind = _type_of(named, quantization)
        shape = quant_shape_to_byte_shape(named.tensor.shape, kind)
        writer.add_tensor_info(named.name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for named in source.tensors():
            writer.write_tensor_data(_encode(named, _type_of(named, quantization)))
    finally:
        # Windows can't remove an open file.
        writer.close()


def _check_tensors(path: Path, source: _Source, quantization: Quantization) -> Check:
    """Read the file back and compare each tensor with the checkpoint.

    Raises:
        RuntimeError: a tensor is missing, left over, or differs by more than the rounding of its type.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    counts: dict[str, int] = {}
    rows_not_divisible, largest_error = 0, 0.0
    for named in source.tensors():
        kind = _type_of(named, quantization)
        expected = named.tensor.float().numpy()
        tensor = stored.pop(named.name)
        if tensor.tensor_type != kind or tensor.data.tobytes() != _encode(named, kind).tobytes():
            raise RuntimeError(f"{named.name} was not written as intended")
        scale = float(np.abs(expected).max()) or 1.0
        values = dequantize(tensor.data, kind).reshape(expected.shape)
        error = float(np.abs(values - expected).max()) / scale
        # Written with `not`, so that NaN is an error too.
        if not error <= _LARGEST_ERROR[kind]:
            raise RuntimeError(f"{named.name} in {kind.name} differs from the checkpoint by {error:.2g} of its maximum")
        largest_error = max(largest_error, error)
        counts[kind.name.lower()] = counts.get(kind.name.lower(), 0) + 1
        rows_not_divisible += kind == GGMLQuantizationType.F16 and quantization in ("q8_0", "q4_0")
    if stored:
        raise RuntimeError(f"the file has tensors that the checkpoint lacks: {sorted(stored)[:5]}")
    types = ", ".join(f"{count} in {kind}" for kind, count in counts.items())
    result = f"equal to the checkpoint when read back, rounded by at most {largest_error:.1e} of the maximum: {types}"
    if rows_not_divisible:
        result += f" ({rows_not_divisible} in f16, because {quantization} needs rows of a multiple of 32)"
    return Check("tensors", result)


# ----------------------------------------------------------------------------------------------------------- llama.cpp


def _compare_with_llama_cpp(
    path: Path, source: _Source, quantization: Quantization, *, has_template: bool
) -> list[Check]:
    llama = llama_cpp.LlamaCpp(path, source.config.block_size)
    tokenizer = source.tokenizer
    checks = [llama_cpp.same_ids(llama, tokenizer)]
    prompts = [text_ids(tokenizer, prompt) for prompt in PROMPTS]
    if has_template:
        checks.append(llama_cpp.same_chat(llama, tokenizer, source.style))
        prompts += [encode_prompt(messages, tokenizer, source.style) for messages in TEST_CONVERSATIONS]
    # A prompt may be longer than the context of a small model.
    prompts = [ids for ids in prompts if 1 <= len(ids) <= source.config.block_size]
    gpt = litgpt_model(source.weights, source.config)
    agreement = llama_cpp.compare_greedily(llama, gpt, prompts, _NEW_TOKENS)
    # Other types round weights and activations, so that a choice between two close tokens may differ.
    if quantization == "f32" and agreement.largest_gap > llama_cpp.TIE:
        raise RuntimeError(
            f"llama.cpp writes other texts: {agreement.equal} of {agreement.tokens} tokens are equal, and logits differ"
            f" by up to {agreement.largest_gap:.2g}; expected at most {llama_cpp.TIE:g}"
        )
    result = f"{agreement.equal} of {agreement.tokens} tokens in llama.cpp are the checkpoint's"
    if agreement.equal < agreement.tokens:
        result += f"; the others are up to {agreement.largest_gap:.2g} less probable in logits"
    return [*checks, Check("greedy text", result)]
