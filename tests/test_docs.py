"""Check what documents refer to: links, commands, flags, computed tables and code examples.

Sentences can be edited freely. Numbers that come from benchmark results are checked in tests/benchmarks.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from litgpt import Config

from litmoe.config import PROJECT, parse_run
from litmoe.flops import count_parameters, training_flops_per_token
from tests.test_configs import MODELS, RUNS

DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
PUBLIC_FLAGS = json.loads((PROJECT / "tests" / "golden" / "surface.json").read_text(encoding="utf-8"))["flags"]
# Flags that are newer than that file, which 0.1.0 wrote. Other tests use them.
NEW_FLAGS = {
    "run_train.py": {"--moe.router", "--hours", "--minutes", "--accelerator"},
    "finetune.py": {"--moe.router", "--hours", "--minutes", "--accelerator"},
    "generate.py": {"--router"},
    "chat.py": {"--router", "--serve"},
    "evaluate.py": {"--router"},
    "prepare_data.py": {"--extensions"},
}
# Keys below these depend on the class that a run chooses, so --help does not list them.
OPEN_FLAGS = ("--optimizer.", "--data.")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def read(path: str) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub creates for the headings of a document."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def code_lines(text: str) -> list[str]:
    """Return the lines of code blocks, with continuation lines joined, and the spans of inline code."""
    blocks = re.findall(r"^```(?:bash|powershell)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]


def script_calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the script and the flags of each command."""
    for line in code_lines(text):
        call = re.search(r"\b(?:python|torchrun)\s[^|#]*?([\w/.]+\.py)\b([^#|>]*)", line)
        if call:
            script, arguments = call.groups()
            yield script, [flag.split("=")[0] for flag in re.findall(r"(?<!\S)--[a-zA-Z][\w.=-]*", arguments)]


@each_document
def test_links_point_to_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}: there is no such heading"


@each_document
def test_make_targets_exist(document: Path) -> None:
    makefile = read("Makefile")
    for line in code_lines(document.read_text(encoding="utf-8")):
        target = re.match(r"make ([a-z-]+)", line)
        if target:
            assert re.search(rf"^{target[1]}:", makefile, flags=re.MULTILINE), line


@each_document
def test_commands_and_flags_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    # Tables of results name the commands of the commits that they were measured at.
    text = re.sub(r"<!-- begin:\w+ -->.*?<!-- end:\w+ -->", "", text, flags=re.DOTALL)
    for script, flags in script_calls(text):
        if script.startswith("llama.cpp/"):
            continue
        assert (PROJECT / script).is_file(), script
        known = {*PUBLIC_FLAGS.get(script, []), *NEW_FLAGS.get(script, ())}
        if "--instruct" in flags:
            known = set(PUBLIC_FLAGS["prepare_data.py --instruct stories"])
        for flag in flags:
            # Dashes and underscores are interchangeable; --help lists underscores.
            name = "--" + flag[2:].replace("-", "_")
            checked = script in PUBLIC_FLAGS and not name.startswith(OPEN_FLAGS)
            assert not checked or name in known, f"{script} has no flag {flag}"


def test_script_calls_are_found() -> None:
    calls = dict(script_calls(read("docs/training.md")))
    assert "--config" in calls["run_train.py"]
    assert set(dict(script_calls(read("README.md")))) >= {"run_train.py", "prepare_data.py", "generate.py"}


def test_named_tests_exist() -> None:
    for path in (PROJECT / "docs" / "reliability.md", PROJECT / "docs" / "ARCHITECTURE.md"):
        for name in re.findall(r"`(tests/[\w/.]+)`", path.read_text(encoding="utf-8")):
            assert (PROJECT / name).exists(), name


def test_layer_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"<!-- layer -->\n```python\n(.*?)```", read("README.md"), re.DOTALL)
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["x"].grad.abs().sum() > 0
    assert namespace["layer"].gate.weight.grad.abs().sum() > 0
    assert "max_over_mean" in capsys.readouterr().out


def test_speed_up_table_is_computed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program, rest = read("docs/scaling.md").split("<!-- speed-up -->\n```python\n")[1].split("```\n", 1)
    monkeypatch.chdir(PROJECT)
    exec(program, {})
    table = [line for line in rest.strip().splitlines() if line.startswith("|")]
    assert capsys.readouterr().out.splitlines() == table[2:]


def test_torch_for_windows_is_the_pinned_one() -> None:
    pins = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    text = (PROJECT / "docs" / "windows-and-mac.md").read_text(encoding="utf-8")
    assert f"uv pip install {torch} --torch-backend=auto --reinstall-package torch" in text


def test_sizes_table_equals_the_configs() -> None:
    row = r"^\| .+? \| `(configs/models/.+?)` \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) ([MG]) \((\d+)\) \|"
    rows = re.findall(row, read("docs/training.md"), re.MULTILINE)
    assert {file for file, *_ in rows} == {f"configs/models/{path.name}" for path in MODELS}
    for file, total, active, flops, unit, context in rows:
        config = Config.from_file(PROJECT / file)
        sizes = count_parameters(config, tie_embeddings=config.name.startswith("gpt2"))
        assert (f"{sizes.total / 1e6:.1f}", f"{sizes.active / 1e6:.1f}") == (total, active)
        per_token = training_flops_per_token(config, int(context)) / {"M": 1e6, "G": 1e9}[unit]
        assert (f"{per_token:.2f}", int(context)) == (flops, config.block_size)


def test_recipe_table_equals_the_run_files() -> None:
    row = r"^\| `(configs/.+?)` \| (.+?) \| ([\d.]+) M / ([\d.]+) M \| ([\d.]+) ([MB]) \| ([\d.,]+) PFLOP \| \S"
    rows = re.findall(row, read("docs/training.md"), re.MULTILINE)
    assert {file for file, *_ in rows} == {path.relative_to(PROJECT).as_posix() for path in RUNS}
    for file, name, total, active, number, unit, petaflop in rows:
        settings = parse_run(["--config", str(PROJECT / file)]).settings
        train, config = settings.train, settings.model
        context = train.max_seq_length or config.block_size
        sizes = count_parameters(config, tie_embeddings=bool(train.tie_embeddings))
        assert (name, f"{sizes.total / 1e6:.1f}", f"{sizes.active / 1e6:.1f}") == (config.name, total, active)
        tokens = train.max_tokens or train.max_steps * train.global_batch_size * context
        assert number == f"{tokens / {'M': 1e6, 'B': 1e9}[unit]:.2f}"
        flops = tokens * training_flops_per_token(config, context) / 1e15
        assert petaflop in (f"{flops:,.0f}", f"{flops:.2f}")
