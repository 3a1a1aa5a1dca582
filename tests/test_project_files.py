"""Check the files that GitHub and its tools read, and that imports point one way."""

import ast
import re
import shlex
import tomllib
from graphlib import TopologicalSorter

import yaml

from litmoe.config import PROJECT


def read(path: str) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


def test_workflow_pins_and_shell() -> None:
    text = read(".github/workflows/ci.yml")
    workflow = yaml.safe_load(text)
    assert workflow["defaults"]["run"]["shell"] == "bash"  # Windows runners use PowerShell by default
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["os"]) == {
        "ubuntu-latest",
        "windows-latest",
        "macos-latest",
    }
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert shlex.split(step.get("run", "uv"))[0] == "uv"
    used = re.findall(r"uses: (.+)", text)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used)


def test_issue_forms_are_valid() -> None:
    forms = sorted((PROJECT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.name for form in forms] == ["bug.yml", "config.yml", "feature.yml", "gpu.yml"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.name == "config.yml":
            assert content == {"blank_issues_enabled": True}
            continue
        assert {"name", "description", "body"} <= set(content)
        for field in content["body"]:
            assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
            assert "value" in field["attributes"] if field["type"] == "markdown" else field["attributes"]["label"]


def test_versions_agree() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert re.search(
        rf"^## {re.escape(version)} - (\d{{4}}-\d\d-\d\d|in preparation)$", read("CHANGELOG.md"), re.MULTILINE
    )


def test_pre_commit_config_names_ruff() -> None:
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[2:4] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]


def test_imports_have_no_cycles() -> None:
    """Imports within functions and for type checkers count as well."""
    files = [file for package in ("custom_moe", "litmoe") for file in (PROJECT / package).rglob("*.py")]
    modules = {".".join(file.relative_to(PROJECT).with_suffix("").parts): file for file in files}
    imported: dict[str, set[str]] = {}
    for name, file in modules.items():
        statements = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        # `from package import module` and `from package.module import name`
        names = {f"{node.module}.{alias.name}" for node in statements for alias in node.names}
        imported[name] = (names | {str(node.module) for node in statements}) & modules.keys()
    assert len(imported["litmoe.train.run"]) > 5
    # Raises CycleError with the modules of a cycle.
    list(TopologicalSorter(imported).static_order())
