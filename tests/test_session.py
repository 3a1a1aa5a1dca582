"""Run the sessions of README.md and docs/finetuning.md line by line in a fresh copy."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from litmoe.config import PROJECT
from litmoe.export.llama_cpp import LlamaCpp
from litmoe.inference.generate import load

UV = shutil.which("uv") or shutil.which("uv", path=str(PROJECT / ".uv" / "bin"))
# Replaces uv: the packages are installed, so `uv sync` does nothing and `uv run` is this environment.
FAKE_UV = f'#!/bin/sh\ncase "$1" in run) shift 2; exec {shlex.quote(sys.executable)} "$@";; esac\n'
TRAINING = "uv run python run_train.py --config configs/quickstart.yaml"


def blocks(document: str, heading: str) -> list[list[str]]:
    """Return the lines of the bash blocks of a section."""
    section = (PROJECT / document).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)]


def run(command: str, cwd: Path) -> str:
    """Run a line and return its stdout. `uv run` is this environment, unless the line asks for an isolated one."""
    spoken, _, call = command.rpartition(" | ")
    words = shlex.split(call)
    if words[:2] == ["uv", "run"]:
        words = [UV, *words[1:]] if "--isolated" in words else [sys.executable, *words[3:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "PYTHONUTF8": "1", "COLUMNS": "100"}
    result = subprocess.run(
        words,
        cwd=cwd,
        input=shlex.split(spoken)[1] + "\n" if spoken else "",
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )
    print(f"$ {command}\n{result.stderr}\n{result.stdout}", flush=True)
    assert result.returncode == 0, command
    return result.stdout


class Quickstart(NamedTuple):
    """A fresh copy in which the quickstart was trained, and what the command printed."""

    folder: Path
    output: str


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Trained once for both sessions: by make, or without it by the command that README.md names for that case."""
    folder = tmp_path_factory.mktemp("litmoe")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, folder / name)
    (_, training), (without_make,), *_ = blocks("README.md", "Quickstart")
    assert (training, without_make) == ("make quickstart", TRAINING)
    if shutil.which("make") is None or os.name == "nt":
        return Quickstart(folder, run(without_make, folder))
    uv = folder / "uv"
    uv.write_text(FAKE_UV, encoding="utf-8")
    uv.chmod(0o755)
    return Quickstart(folder, run(f"{training} UV={shlex.quote(str(uv))} PYTHON=true", folder))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_readme_session(quickstart: Quickstart) -> None:
    """From `make quickstart` to a GGUF file with which llama.cpp writes the story of the checkpoint."""
    folder, checkpoint = quickstart.folder, "checkpoints/quickstart/final"
    assert f"uv run python generate.py {checkpoint} --prompt 'Once upon a time'" in quickstart.output
    export, create, ask = blocks("README.md", "Quickstart")[-1]
    assert create == "ollama create story -f gguf/Modelfile" and ask == 'ollama run story "Once upon a time"'
    run(export, folder)

    story = run(f"uv run python generate.py {checkpoint} --prompt 'Once upon a time' --temperature 0", folder)
    assert len(story.split()) > 40
    # What the Modelfile tells Ollama: the file, the prompt without a template, the context.
    modelfile = (folder / "gguf" / "Modelfile").read_text(encoding="utf-8")
    told = re.search(r'FROM ./(.+)\nTEMPLATE """\{\{ \.Prompt \}\}"""\nPARAMETER num_ctx (\d+)\n', modelfile)
    assert told is not None
    llama = LlamaCpp(folder / "gguf" / told[1], int(told[2]))
    prompt = llama.tokenize("Once upon a time")
    ids = prompt + llama.generate(prompt, 256)
    tokenizer = load(folder / checkpoint, device="cpu").tokenizer
    assert tokenizer.processor.decode(ids, skip_special_tokens=True).strip() == story.strip()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(UV is None, reason="needs uv")
def test_finetuning_session(quickstart: Quickstart) -> None:
    lines = blocks("docs/finetuning.md", "A complete session")[0]
    assert lines[0] == TRAINING
    said = [quickstart.output, *(run(line, quickstart.folder) for line in lines[1:])]
    scripts = [next(word for word in shlex.split(line.rpartition(" | ")[2]) if word.endswith(".py")) for line in lines]
    expected = ["run_train.py", "prepare_data.py", "finetune.py", "chat.py", *["evaluate.py"] * 3, "export_hf.py"]
    assert scripts == [*expected, "scripts/answer.py"]

    tuned = json.loads(said[4])
    before = float(re.findall(r"step 0/\d+ \| val loss ([\d.]+)", said[2])[0])
    assert tuned["loss"] < 0.9 * before
    (score,) = json.loads(said[5])["scores"]
    assert score["task"] == "story_hero" and score["value"] > 0.9
    assert (quickstart.folder / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert "greedy text" in said[7]
    ours, theirs = said[3].strip(), said[8].strip()
    assert "Milo" in ours and ours == theirs
