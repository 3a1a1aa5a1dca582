"""Run a GGUF file in llama.cpp, in this process, and compare it with the checkpoint.

Needs the package xllamacpp, which is a tool for development: without it an export is not compared.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import ProxyHandler, Request, build_opener

import torch
from litgpt import GPT, Tokenizer
from litgpt.prompts import PromptStyle

from litmoe.data.conversations import Message, encode_prompt
from litmoe.data.tokenizers import text_ids
from litmoe.export.chat_template import TEST_CONVERSATIONS
from litmoe.export.verify import TEXTS, Check
from litmoe.inference.generate import room_after

TIE = 1e-3
"""Logits in fp32 that differ by less may be in another order in llama.cpp, which adds numbers in another order"""
_NEW_TOKENS = 32
_TIMEOUT = 600.0  # seconds for one request; a large model on one core is slow


def is_available() -> bool:
    """Return whether xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file in llama.cpp's server, on a local port."""

    def __init__(self, path: Path, context: int) -> None:
        """Load the file.

        Args:
            path: of the file.
            context: in tokens.

        Raises:
            RuntimeError: llama.cpp can't load it.
        """
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        # torch may use all cores in the same process.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        # Nothing between the file and the logits is rounded to 16 bits.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = params.fit_params = False
        params.use_jinja = True
        # Errors only.
        params.verbosity = 0
        self._server = xllamacpp.Server(params)
        self._open = build_opener(ProxyHandler({})).open

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        body = json.dumps(content).encode()
        request = Request(self._server.listening_address + path, body, {"Content-Type": "application/json"})
        with self._open(request, timeout=_TIMEOUT) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with the begin-of-text token if the file asks for it."""
        answer = self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        ids: list[int] = answer["tokens"]
        return ids

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation in the chat template of the file."""
        return self.tokenize(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the most probable continuation, which may end with an end-of-text token."""
        settings = {"n_predict": max_new_tokens, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
        new_ids: list[int] = self._post("/completion", {"prompt": ids, **settings})["tokens"]
        return new_ids


def same_ids(llama: LlamaCpp, tokenizer: Tokenizer) -> Check:
    """Compare the ids of texts.

    Raises:
        RuntimeError: they differ.
    """
    for text in TEXTS:
        our_ids, their_ids = text_ids(tokenizer, text), llama.tokenize(text)
        if our_ids != their_ids:
            raise RuntimeError(f"the token ids of {text!r} differ: {our_ids} here, {their_ids} in llama.cpp")
    return Check("tokenizer", f"the same ids of {len(TEXTS)} texts in llama.cpp")


def same_chat(llama: LlamaCpp, tokenizer: Tokenizer, style: PromptStyle) -> Check:
    """Compare the ids of conversations.

    Raises:
        RuntimeError: they differ.
    """
    for messages in TEST_CONVERSATIONS:
        our_ids, their_ids = encode_prompt(messages, tokenizer, style), llama.chat_prompt(messages)
        if our_ids != their_ids:
            raise RuntimeError(f"the token ids of {messages} differ: {our_ids} here, {their_ids} in llama.cpp")
    return Check("conversations", f"the same ids of {len(TEST_CONVERSATIONS)} conversations in llama.cpp")


class Agreement(NamedTuple):
    """How far the tokens that llama.cpp chooses are those of the checkpoint."""

    tokens: int
    equal: int
    """Of these, how many are the most probable ones of the checkpoint"""
    largest_gap: float
    """Largest difference between the logits, in the checkpoint, of its most probable token and llama.cpp's"""


@torch.no_grad()
def compare_greedily(llama: LlamaCpp, gpt: GPT, prompts: Sequence[list[int]], max_new_tokens: int) -> Agreement:
    """Compare each token that llama.cpp chooses with the checkpoint's choice after the same tokens.

    Two complete texts could not be compared token by token after their first difference.

    Args:
        llama: the file.
        gpt: the checkpoint in fp32.
        prompts: token ids.
        max_new_tokens: for each prompt.
    """
    tokens, equal, largest_gap = 0, 0, 0.0
    for prompt in prompts:
        new_ids = llama.generate(prompt, min(max_new_tokens, room_after(len(prompt), gpt.config.block_size)))
        if not new_ids:
            continue
        logits = gpt(torch.tensor([[*prompt, *new_ids[:-1]]]))[0, len(prompt) - 1 :]  # (new, V)
        chosen = logits[torch.arange(len(new_ids)), torch.tensor(new_ids)]
        gap = logits.max(dim=-1).values - chosen
        tokens += len(new_ids)
        equal += int((gap == 0).sum())
        largest_gap = max(largest_gap, gap.max().item())
    return Agreement(tokens, equal, largest_gap)
