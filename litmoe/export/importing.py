"""Import a Hugging Face folder as a checkpoint. Both models are run and compared before the checkpoint is saved."""

import json
import tempfile
from pathlib import Path
from typing import Any

from litgpt import Config
from transformers import AutoConfig, AutoTokenizer

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data import tokenizers
from litmoe.data.files import in_short
from litmoe.export.files import check_free, write_json
from litmoe.export.huggingface import litgpt_model, load_model
from litmoe.export.verify import Check, same_logits, same_text, same_tokens
from litmoe.export.weights import from_huggingface
from litmoe.hf_config import IMPORTED, litgpt_config


def import_folder(source: Path, out: Path) -> list[Check]:
    """Convert a local Hugging Face folder to a checkpoint, which all scripts and `litgpt` can read.

    Args:
        source: folder with config.json, weights and tokenizer. Code in it is never run.
        out: checkpoint folder to write.

    Returns:
        What was compared.

    Raises:
        UserError: the folder is not of a supported model family, uses something that LitGPT can't compute, or ``out``
            exists.
        RuntimeError: the two models do not compute the same; ``out`` is not written.
    """
    theirs = _read_config(source)
    check_free(out)
    # All checks of small files come before the weights are loaded.
    tokenizer_files = tokenizers.from_folder(source)
    their_tokenizer = _load_without_code(AutoTokenizer, source)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_dir = Path(scratch) / "tokenizer"
        # A copy of the tokenizer, because LitGPT needs other entries in its files.
        tokenizers.install(tokenizer_files, {"name": source.resolve().name}, tokenizer_dir)
        _save_bos_token(their_tokenizer, tokenizer_dir / "tokenizer_config.json")
        vocab_size = tokenizers.load(tokenizer_dir).vocab_size
        if vocab_size > theirs.vocab_size:
            raise UserError(
                f"the tokenizer in {source} has {vocab_size:,} tokens, but the model only {theirs.vocab_size:,};"
                " expected the tokenizer of the model."
            )
        config = _convert_config(theirs, source, vocab_size)
        tokenizer = tokenizers.litgpt_tokenizer(tokenizer_dir)
        checks = [same_tokens(tokenizer, their_tokenizer, may_end=True)]
        model = _load_weights(source)
        _check_output_biases(model, config, source)
        weights = from_huggingface(model.state_dict(), config)
        gpt = litgpt_model(weights, config)
        # The saved weights keep their dtype: float() makes new tensors unless they are fp32 already.
        model = model.float()
        checks += [same_logits(gpt, model), same_text(gpt, tokenizer, model, their_tokenizer)]
        checkpoints.save(
            out,
            weights=weights,
            config=config,
            hyperparameters={"imported_from": source.resolve().name, "model_type": theirs.model_type},
            step=0,
            tokens=0,
            tokenizer_dir=tokenizer_dir,
        )
    return checks


def _read_config(source: Path) -> Any:
    path = source / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (OSError, ValueError, AttributeError):  # AttributeError: not a dictionary
        raise UserError(
            f"found no readable {path}; expected a Hugging Face folder on this disk. `uv run hf download ORG/NAME"
            " --local-dir FOLDER` downloads one."
        ) from None
    if model_type not in IMPORTED:
        raise UserError(
            f"{source} has a model of type {model_type!r}; expected one of {', '.join(IMPORTED)}. `litgpt download` and"
            " `litgpt convert_to_litgpt` support more types."
        )
    if "quantization_config" in content:
        raise UserError(f"the weights in {source} are quantized (quantization_config); expected plain weights.")
    return _load_without_code(AutoConfig, source)


def _load_without_code(loader: Any, source: Path) -> Any:
    """Load a part of the folder; code in the folder is never run."""
    try:
        return loader.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of transformers, of tokenizers, or because of the values in the files
        raise UserError(f"transformers can't read {source}: {in_short(error)}") from None


def _convert_config(theirs: Any, source: Path, vocab_size: int) -> Config:
    name = source.resolve().name
    # LitGPT uses other norms for models with these names.
    if "Gemma" in name or "OLMo" in name:
        name = theirs.model_type
    try:
        config, problems = litgpt_config(theirs, name, vocab_size)
    except (AssertionError, ValueError) as error:  # of litgpt.Config
        problems = [str(error) or "sizes that can't be divided"]
    if problems:
        raise UserError(
            f"LitGPT can't compute the same as {source}, so nothing was written. Without counterpart in its"
            f" config.json: {'; '.join(problems)}."
        )
    return config


def _load_weights(source: Path) -> Any:
    if not any(source.glob("*.safetensors")) and not any(source.glob("pytorch_model*.bin")):
        raise UserError(f"{source} has no weights; expected model.safetensors or pytorch_model.bin.")
    try:
        # transformers reads pickled weights with torch.load(weights_only=True), which runs no code.
        return load_model(source, "auto")
    except RuntimeError as error:
        raise UserError(f"the weights in {source} do not fit its config.json: {in_short(error)}.") from error
    except Exception as error:
        # Each format has its own errors for a damaged file.
        raise UserError(f"the weights in {source} can't be read: {in_short(error)}. Download them again.") from error


def _check_output_biases(model: Any, config: Config, source: Path) -> None:
    """Raise UserError for an output projection with a bias, if LitGPT has one only for queries, keys and values."""
    if config.bias:
        return
    for name, parameter in model.named_parameters():
        if name.endswith(".o_proj.bias") and parameter.any():
            raise UserError(
                f"LitGPT can't compute the same as {source}, so nothing was written. Without counterpart: {name}, a"
                " bias of attention's output projection without biases in the feed-forward."
            )


def _save_bos_token(theirs: Any, path: Path) -> None:
    """Record for LitGPT's tokenizer whether, and which, begin-of-text token transformers adds."""
    first = theirs("a")["input_ids"][0]
    first_without = theirs("a", add_special_tokens=False)["input_ids"][0]
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["add_bos_token"] = first != first_without
    if first != first_without:
        settings["bos_token"] = theirs.convert_ids_to_tokens(first)
    elif theirs.bos_token is not None:
        settings["bos_token"] = theirs.bos_token
    write_json(path, settings)
