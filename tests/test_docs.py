"""The documents say what is true of the tree."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from litgpt import Config

from litmoe.config import PROJECT, parse_run, run_parser
from litmoe.flops import count_parameters, training_flops_per_token
from tests.test_configs import MODELS, RUNS

README = (PROJECT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def tracked_files() -> set[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return {name for name in listing.stdout.split() if not name.startswith("tests/") and name != "README.md"}


def test_the_file_map_has_a_line_for_each_file():
    section = README.split("## File map")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \| \S", section, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == tracked_files()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).is_file(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_scripts_and_targets_that_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    for script in re.findall(r"uv run (?:--no-sync )?(?:python )?([\w/]+\.py)", text):
        assert (PROJECT / script).is_file(), script
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_promises_name_tests_that_exist():
    text = (PROJECT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("test_*.py"))
    named = re.findall(r"\b(test_\w+)(?!\w*\.py)\b", text)
    assert len(named) > 30
    assert not re.findall(r"@[A-Z_]+@", text), "a number that was not filled in"
    assert not [name for name in named if not re.search(rf"def {name}", tests)]
    assert all((PROJECT / path).is_file() for path in re.findall(r"`(tests/[\w/.]+\.py)`", text))


def test_the_speed_up_table_is_what_its_program_prints(monkeypatch, capsys):
    text = (PROJECT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    program, rest = text.split("<!-- speed-up -->\n```python\n")[1].split("```\n", 1)
    monkeypatch.chdir(PROJECT)
    exec(program, {})
    assert rest.strip().startswith("| model | machine |")
    assert capsys.readouterr().out == "".join(rest.strip().splitlines(keepends=True)[2:12])


def test_training_flags_of_the_readme_exist():
    known = {option for action in run_parser()._actions for option in action.option_strings}
    for line in README.splitlines():
        if "run_train.py" in line:
            for flag in re.findall(r"(--[\w.-]+)", line.split("run_train.py")[1].split("#")[0]):
                flag = flag.replace("-", "_").replace("__", "--", 1)
                assert flag in known or flag.startswith(("--optimizer.", "--data.")), flag


def test_the_sizes_table_is_that_of_the_configs():
    rows = re.findall(
        r"^\| .+? \| `(configs/models/.+?)` \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) ([MG]) \((\d+)\) \|", README, re.M
    )
    assert {file for file, *_ in rows} == {f"configs/models/{path.name}" for path in MODELS}
    for file, total, active, flops, unit, context in rows:
        config = Config.from_file(PROJECT / file)
        sizes = count_parameters(config, tie_embeddings=config.name.startswith(("gpt2", "quickstart")))
        assert (f"{sizes.total / 1e6:.1f}", f"{sizes.active / 1e6:.1f}") == (total, active)
        per_token = training_flops_per_token(config, int(context))
        assert (f"{per_token / {'M': 1e6, 'G': 1e9}[unit]:.2f}", int(context)) == (flops, config.block_size)


def test_the_table_of_recipes_is_that_of_the_run_files():
    rows = re.findall(
        r"^\| `(configs/.+?)` \| (.+?) \| ([\d.]+) M / ([\d.]+) M \| ([\d.]+) ([MB]) \| ([\d.,]+) PFLOP \| \S",
        README,
        re.M,
    )
    assert {row[0] for row in rows} == {path.relative_to(PROJECT).as_posix() for path in RUNS}
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


def test_the_table_of_memory_is_the_benchmarks():
    from benchmarks.memory import RESULT, table

    assert table(json.loads(RESULT.read_text(encoding="utf-8"))["rows"]) in README


def test_what_is_said_of_the_shakespeare_run_is_what_was_measured():
    result = json.loads((PROJECT / "benchmarks/results/shakespeare.json").read_text(encoding="utf-8"))
    said = f"alidation loss {result['evaluation']['loss']:.2f}", f"{result['evaluation']['bits_per_byte']:.2f} bits"
    for path in (PROJECT / "README.md", PROJECT / "configs/runs/shakespeare.yaml"):
        text = path.read_text(encoding="utf-8")
        assert all(number in text for number in said), path


def test_what_is_said_of_tokenizing_is_what_was_measured():
    results = PROJECT / "benchmarks/results"
    speed = json.loads((results / "data_prep.json").read_text(encoding="utf-8"))
    memory = json.loads((results / "data_memory.json").read_text(encoding="utf-8"))
    ratios, per_second = speed["ratio"], speed["tokens_per_second"]
    assert f"{per_second['TextFiles with']:,} tokens/s, {speed['peak_memory_gb']['TextFiles']:.2f} GB" in README
    assert f"{per_second['ours with']:,} tokens/s" in README
    assert f"{speed['peak_memory_gb']['ours']:.2f} GB: {ratios['with']} times" in README
    assert f"{per_second['TextFiles without']:,} against {per_second['ours without']:,} tokens/s" in README
    assert f"It is quick: {ratios['with']} times" in README
    assert ", ".join(f"{run['peak_memory_mb']:.0f}" for run in memory["runs"]) + " MB" in README


def test_what_is_said_of_finetuning_is_what_was_measured():
    result = json.loads((PROJECT / "benchmarks/results/finetuning.json").read_text(encoding="utf-8"))
    for name, key in (("as pretrained", "before"), ("all weights", "all weights"), ("LoRA of rank 16", "LoRA")):
        (row,) = (line for line in README.splitlines() if line.startswith(f"| {name}"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        found = result[key]
        assert cells[1:4] == [
            f"{found['loss']:.4f}",
            *map(str, (found["ended_by_themselves"], found["used_the_names"])),
        ]
        assert cells[4] == (f"{found['seconds']} s" if "seconds" in found else "")


def test_the_example_of_the_layer_alone_runs(capsys: pytest.CaptureFixture[str]):
    (example,) = re.findall(r"<!-- layer -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 11, "a short example"
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["x"].grad.abs().sum() > 0 and namespace["layer"].gate.weight.grad.abs().sum() > 0
    assert "max_over_mean" in capsys.readouterr().out
