"""What users of 0.1.0 rely on: flags, files, importable names and class paths. New ones are free, lost ones fail.

``tests/golden/surface.json`` was written by 0.1.0. A flag that is renamed keeps its old spelling working.
"""

import importlib
import json
import re
import subprocess
import sys

import pytest

import litmoe
from litmoe.cli import current_class_path
from litmoe.config import PROJECT

SURFACE = json.loads((PROJECT / "tests" / "golden" / "surface.json").read_text(encoding="utf-8"))


def flags_of(command: list[str]) -> list[str]:
    """The flags that ``--help`` of a script lists."""
    result = subprocess.run(
        [sys.executable, *command, "--help"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return sorted(set(re.findall(r"--[a-zA-Z][\w.]*", result.stdout)))


@pytest.mark.parametrize("command", SURFACE["flags"])
def test_no_flag_is_lost(command: str) -> None:
    lost = set(SURFACE["flags"][command]) - set(flags_of(command.split()))
    assert not lost


@pytest.mark.parametrize("path", SURFACE["class_paths"])
def test_class_paths_of_old_run_files_import(path: str) -> None:
    module, _, name = current_class_path(path).rpartition(".")
    assert getattr(importlib.import_module(module), name)


def test_old_package_name_warns() -> None:
    sys.modules.pop("recipe", None)
    with pytest.warns(DeprecationWarning, match="litmoe"):
        recipe = importlib.import_module("recipe")
    assert recipe.load is litmoe.load


def test_custom_moe_exports_the_same_names() -> None:
    import custom_moe

    assert set(SURFACE["custom_moe"]) <= set(custom_moe.__all__)
    assert all(hasattr(custom_moe, name) for name in SURFACE["custom_moe"])
