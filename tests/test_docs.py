"""The documents say what is true of the tree."""

import re
import subprocess
from pathlib import Path

import pytest

from recipe.flops import count_parameters, training_flops_per_token
from recipe.settings import PROJECT, read_run_file, run_parser

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


def test_training_flags_of_the_readme_exist():
    known = {option for action in run_parser()._actions for option in action.option_strings}
    for line in README.splitlines():
        if "run_train.py" in line:
            for flag in re.findall(r"(--[\w.-]+)", line.split("run_train.py")[1].split("#")[0]):
                flag = flag.replace("-", "_").replace("__", "--", 1)
                assert flag in known or flag.startswith(("--optimizer.", "--data.")), flag


def test_the_sizes_table_is_that_of_the_configs():
    from litgpt import Config

    rows = re.findall(
        r"^\| (.+?) \| `(.+?\.yaml)` \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) ([MG]) \((\d+)\) \|", README, re.M
    )
    assert {file for _, file, *_ in rows} == {"model_config.yaml", "configs/quickstart.yaml"}
    for name, file, total, active, flops, unit, context in rows:
        fields = read_run_file(PROJECT / file)
        tied = (fields.get("train") or {}).get("tie_embeddings", False)
        config = Config(**fields.get("model", fields))
        sizes = count_parameters(config, tie_embeddings=tied)
        assert (name, int(context)) == (config.name, config.block_size)
        assert (f"{sizes.total / 1e6:.1f}", f"{sizes.active / 1e6:.1f}") == (total, active)
        per_token = training_flops_per_token(config, config.block_size)
        assert f"{per_token / {'M': 1e6, 'G': 1e9}[unit]:.2f}" == flops
