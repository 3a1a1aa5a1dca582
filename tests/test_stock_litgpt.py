"""LitGPT's commands read our checkpoints, and transformers computes the same by their ``config.json``. No network."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import lightning as L
import pytest
import torch
from litgpt import GPT, Config

from litmoe import checkpoints, load
from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.data.conversations import prompt_style
from litmoe.export.huggingface import export
from tests.helpers import (
    DENSE_FIELDS,
    NEOX_FIELDS,
    convert_for_transformers,
    litgpt_finetuning_flags,
    save_tiny,
    tiny_gpt,
)


@pytest.fixture
def folder(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> Path:
    """A checkpoint of a mixture of experts as a run saves it."""
    return save_tiny(tmp_path / "checkpoints" / "final", tiny_gpt(moe_fields), tokenizer_dir)


def litgpt(*arguments: str, cwd: Path, stdin: str = "") -> str:
    """Run `litgpt` without a network and return its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "litgpt", *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("style", ["default", pytest.param("phi-2", marks=pytest.mark.slow)])
def test_chat(folder: Path, tmp_path: Path, style: str) -> None:
    """The answer is the continuation of the prompt: as typed, or in the prompt style of a finetuned model."""
    question = prompt = "Once upon a time"
    if style != "default":
        save_tiny(folder, tiny_gpt(asdict(checkpoints.load_config(folder))), folder, prompt_style=prompt_style(style))
        prompt = prompt_style(style).apply(question)
    shown = litgpt(
        *("chat", str(folder), "--temperature", "0", "--max_new_tokens", "12", "--precision", "32-true"),
        cwd=tmp_path,
        stdin=f"{question}\n\n",
    )
    expected = load(folder, device="cpu").generate(prompt, max_new_tokens=12, temperature=0.0)
    reply = re.search(r">> Reply: (.*?)\n", shown, re.DOTALL)
    assert reply is not None, shown
    # chat decodes token by token, so each byte of a cut character becomes U+FFFD
    assert reply.group(1).split("\ufffd")[0] == expected.removeprefix(prompt).split("\ufffd")[0]
    assert len(reply.group(1)) > 5


@pytest.mark.slow
def test_generate(folder: Path, tmp_path: Path) -> None:
    """Its greedy text equals that of generate.py."""
    options = ("--max_new_tokens", "40", "--temperature", "0", "--precision", "32-true", "--prompt", "Once upon a time")
    shown = litgpt("generate", str(folder), *options, cwd=tmp_path)
    text = load(folder, device="cpu").generate("Once upon a time", max_new_tokens=40, temperature=0.0)
    assert text in shown


@pytest.mark.slow
def test_evaluate(folder: Path, tmp_path: Path, stories: list[str]) -> None:
    """Bits per byte of a task with our own text."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": stories[0]}) + "\n", encoding="utf-8")
    task = {
        "task": "stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task), encoding="utf-8")
    litgpt("evaluate", str(folder), "--tasks", str(tmp_path / "task.yaml"), "--device", "cpu", cwd=tmp_path)
    results = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))

    model = load(folder, device="cpu", precision="32-true")
    ids = torch.cat((torch.tensor([model.tokenizer.eos_id]), model.tokenizer.encode(stories[0]).long()))
    with torch.no_grad():
        log_probabilities = model.gpt(ids[None, :-1])[0].log_softmax(-1)
    nats = -log_probabilities.gather(1, ids[1:, None]).sum().item()
    bits_per_byte = nats / math.log(2) / len(stories[0].encode())
    assert results["results"]["stories"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, rel=1e-5)
    assert checkpoints.verify(folder).step == 1, "the files that it adds to the folder do no harm"


@pytest.mark.slow
def test_finetune_full(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    gpt = tiny_gpt(moe_fields | {"block_size": 256})
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    litgpt("finetune_full", str(folder), *litgpt_finetuning_flags(tmp_path), cwd=tmp_path)
    tuned = checkpoints.load_weights(tmp_path / "finetuned" / "final")
    assert tuned.keys() == gpt.state_dict().keys()
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in gpt.state_dict().items())
    assert load(tmp_path / "finetuned" / "final", device="cpu").generate("Once", max_new_tokens=4).startswith("Once")


@pytest.mark.slow
def test_reads_what_litgpt_merges(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """`litgpt finetune_lora` merges its weights at the end as `litgpt merge_lora` does."""
    gpt = tiny_gpt(moe_fields | {"block_size": 256})
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    litgpt("finetune_lora", str(folder), *litgpt_finetuning_flags(tmp_path), cwd=tmp_path)
    tuned = tmp_path / "finetuned" / "final"
    command = [sys.executable, str(PROJECT / "generate.py"), str(tuned), "--prompt=Once", "--max_new_tokens=4"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=280, check=True)
    assert shown.stderr.count(f"warning: {tuned} was written by LitGPT") == 1
    assert shown.stdout.startswith("Once")
    assert dict(export(tuned, tmp_path / "out")).keys() >= {"logits", "greedy text", "chat template"}
    assert "exported by LitMoE" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (tuned / "lit_model.pth").unlink()
    with pytest.raises(UserError, match="uv run litgpt merge_lora"):
        load(tuned, device="cpu")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_serve(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--port", str(port), "--max_new_tokens", "8", "--temperature", "0", "--precision", "32-true")
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "litgpt", "serve", str(folder), "--accelerator", "cpu", *options],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,  # so that all its processes can be ended together
        )
    try:
        answer = _ask(f"http://127.0.0.1:{port}/predict", {"prompt": "Once upon"}, server)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    expected = load(folder, device="cpu").generate("Once upon", max_new_tokens=8, temperature=0.0)
    assert answer == {"output": expected.removeprefix("Once upon")}


def _ask(url: str, question: dict, server: subprocess.Popen) -> dict:
    request = urllib.request.Request(
        url, json.dumps(question).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=100) as response:
                return json.load(response)
        except OSError:
            time.sleep(1)  # not started yet; the timeout of the test ends this loop
    raise AssertionError("the server ended")


def test_pretrain_from_our_weights(folder: Path, moe_fields: dict) -> None:
    """The code of `litgpt pretrain --initial_checkpoint_dir`, which expects keys without a wrapper."""
    fabric = L.Fabric(devices=1, accelerator="cpu")
    model = fabric.setup(torch.compile(GPT(Config(**moe_fields))))
    fabric.load_raw(folder / "lit_model.pth", model)
    expected = tiny_gpt(moe_fields).state_dict()
    loaded = {name.removeprefix("_orig_mod."): tensor for name, tensor in model.state_dict().items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def converted(tmp_path: Path) -> Iterator[Path]:
    """Folder for a model that is converted as `litgpt evaluate` does."""
    yield tmp_path / "converted"
    shutil.rmtree(tmp_path / "converted", ignore_errors=True)


@pytest.mark.parametrize(
    ("changes", "tied", "architecture"),
    [
        ({}, False, "MixtralForCausalLM"),
        ({"n_expert_per_token": 1, "norm_eps": 1e-3, "rope_base": 500}, True, "MixtralForCausalLM"),
        ({"head_size": 16, "n_query_groups": 1, "padded_vocab_size": 512}, False, "MixtralForCausalLM"),
        (DENSE_FIELDS, True, "LlamaForCausalLM"),
        ({**NEOX_FIELDS, "parallel_residual": True, "rotary_percentage": 0.25}, False, "GPTNeoXForCausalLM"),
    ],
)
def test_transformers_computes_the_same(
    tmp_path: Path,
    moe_fields: dict,
    tokenizer_dir: Path,
    converted: Path,
    changes: dict,
    tied: bool,
    architecture: str,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt = tiny_gpt(moe_fields | changes)
    if tied:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    convert_for_transformers(save_tiny(tmp_path / "final", gpt, tokenizer_dir), converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert type(model).__name__ == architecture
    assert model.dtype == torch.float32
    ids = torch.randint(384, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = gpt(ids)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1, "a test on zeros would show nothing"
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert (
        tokenizer("Once upon a 🦊")["input_ids"] == load(tmp_path / "final").tokenizer.encode("Once upon a 🦊").tolist()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_percentage": 0.25},  # LitGPT would convert it to a wrong Mixtral
        {"norm_qk": True},  # transformers has a counterpart, but LitGPT does not convert it
        {"name": "phi-moe"},  # LitGPT decides by the name
        {**NEOX_FIELDS, "n_query_groups": 2},
        {**DENSE_FIELDS, "attn_bias": True},  # LitGPT would leave out the biases
    ],
)
def test_no_config_without_counterpart(tmp_path: Path, moe_fields: dict, changes: dict) -> None:
    folder = save_tiny(tmp_path / "final", GPT(Config(**moe_fields | changes)), None)
    assert not (folder / "config.json").exists()
