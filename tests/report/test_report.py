"""The report of real small runs: what it contains, what it survives, and how a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.report.__main__ import main
from litmoe.report.journal import Journal, read_journal
from litmoe.report.live import RunReport
from litmoe.report.page import write_report
from litmoe.report.run_data import POINTS, Curve, read_curves, read_run, spread
from litmoe.run_files import JOURNAL_FILE, REPORT_FILE, RUN_CONFIG
from tests.helpers import DENSE_FIELDS, column, write_run_file
from tests.no_skips import find_browser

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def report_of(*folders: Path) -> str:
    """Write the report of runs and return it without BokehJS."""
    path = folders[0].parent / "page.html"
    write_report(folders, path)
    return without_library(path)


def without_library(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    # The first script to execute.
    return re.sub(r"(<script nonce=[^>]+>).*?</script>", r"\1</script>", page, count=1, flags=re.DOTALL)


def kinds(out: Path) -> list[str]:
    return [record["kind"] for record in read_journal(out / JOURNAL_FILE)]


# --- What it contains


def test_run_writes_its_report(trained: Path) -> None:
    page = without_library(trained / REPORT_FILE)
    for title in ("Loss over tokens", "Loss over time", "Learning rate", "Gradient norm", "Tokens per second"):
        assert f"<h3>{title}</h3>" in page
    for title in ("Peak memory, GiB", "Expert load", "Samples", "Plan", "Checkpoints", "Settings", "Versions"):
        assert title in page
    assert "finished, step 12 of 12" in page
    assert f"{column(trained, 'val_loss')[-1]:.4f}" in page
    assert f"uv run python chat.py {trained / 'final'}" in page
    assert "optimizer.init_args.lr" in page and "On the CPU" in page
    items = json.loads(re.search(r'id="items">(.*?)</script>', page)[1])
    assert len(items) == 7


def test_report_equals_that_of_the_folder(trained_copy: Path) -> None:
    (trained_copy / REPORT_FILE).unlink()
    main([str(trained_copy)])
    page = without_library(trained_copy / REPORT_FILE)
    assert "Expert load" in page and "Samples" in page and "finished, step 12 of 12" in page


def test_journal_of_a_run(trained: Path) -> None:
    records = list(read_journal(trained / JOURNAL_FILE))
    assert kinds(trained)[0] == "start" and kinds(trained)[-1] == "end"
    assert records[0]["steps"] == 12 and records[0]["bytes_per_token"] > 1
    states = [record for record in records if record["kind"] == "state"]
    assert [state["step"] for state in states] == list(range(1, 13))
    load = np.array(states[-1]["expert_load"])
    assert load.shape == (2, 4) and load.mean(axis=1) == pytest.approx(np.ones(2), abs=1e-3)
    assert all(state["memory"] > 2**20 for state in states)
    assert [record["step"] for record in records if record["kind"] == "sample"] == [4, 8, 12]


def test_end_of_run_table(train, capsys: pytest.CaptureFixture[str]) -> None:
    out = train()
    lines = capsys.readouterr().out.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines if re.match(r"[A-Z][\w/]+ {2,}\S", line))
    loss = column(out, "val_loss")[-1]
    assert table["Loss"] == f"{loss:.4f} nats per token (validation)"
    assert table["Perplexity"] == f"{np.exp(loss):,.2f}"
    assert 0 < float(table["Bits/byte"]) < loss / np.log(2)
    assert table["Tokens"] == "768" and table["Tokens/s"].endswith(" with validation and saving")
    assert table["Report"] == str(out / REPORT_FILE) and table["Checkpoint"] == str(out / "final")
    assert table["Chat"].startswith("uv run python chat.py")
    assert any(re.fullmatch(r"Peak memory [\d.]+ GiB of RAM", line) for line in lines)


def test_comparison_highlights_differences(train, trained: Path, tmp_path: Path, capsys) -> None:
    other = train("--optimizer.init_args.lr", "0.02", "--out_dir", str(tmp_path / "other"))
    path = tmp_path / "both.html"
    main([str(trained), str(other), "--out", str(path)])
    assert capsys.readouterr().out.endswith(f"Report      {path}\n")
    page = without_library(path)
    assert "Comparison of 2 runs" in page
    differing = set(re.findall(r'<tr class="differs"><th scope="row">(.+?)</th>', page))
    assert "optimizer.init_args.lr" in differing and "train.max_steps" not in differing
    assert page.count("Expert load</h3>") == 2


# --- Resumed runs and missing parts


def test_resumed_run_continues_its_report(train, trained_copy: Path) -> None:
    train("--resume", str(trained_copy / "step-00000008"), "--overwrite")
    records = list(read_journal(trained_copy / JOURNAL_FILE))
    assert [record["step"] for record in records if record["kind"] == "state"] == list(range(1, 13))
    assert [record["step"] for record in records if record["kind"] == "sample"] == [4, 8, 12]
    assert [record["step"] for record in records if record["kind"] == "start"] == [0, 8]
    assert kinds(trained_copy).count("end") == 1
    assert "resumed after step 8" in without_library(trained_copy / REPORT_FILE)


def test_dense_run_without_validation(train, tmp_path: Path, prepared: Path, moe_fields: dict) -> None:
    run_file = write_run_file(tmp_path, prepared, {**moe_fields, **DENSE_FIELDS})
    flags = ("--eval.final_validation", "false", "--eval.interval", "100", "--sample.prompt", "null")
    out = train("--config", str(run_file), *flags)
    page = without_library(out / REPORT_FILE)
    assert "Loss over tokens" in page and "nats per token" not in page.split("Curves")[1]
    assert "(training)" in page and "Expert load" not in page and 'id="samples"' not in page


def test_finetuning_has_a_report(tune) -> None:
    page = without_library(tune("--lora_r", "4") / REPORT_FILE)
    assert "finished, step 8 of 8" in page and "chat.py" in page and "generate.py" not in page


def test_run_of_an_older_version(trained_copy: Path) -> None:
    """Without journal and settings, and with a damaged row, a damaged cell and a row that a kill cut off."""
    for name in (JOURNAL_FILE, RUN_CONFIG):
        (trained_copy / name).unlink()
    shutil.rmtree(trained_copy / "final")
    metrics = trained_copy / "metrics.csv"
    lines = metrics.read_text(encoding="utf-8").splitlines()
    lines[2] = lines[2].replace(lines[2].split(",")[1], "?")
    metrics.write_text("\n".join([*lines[:5], "damaged", *lines[5:], "13,0."]), encoding="utf-8")
    page = report_of(trained_copy)
    assert "not finished, step 12" in page and "Loss over tokens" in page and "Expert load" not in page
    assert len(read_run(trained_copy).curves["train_loss"]) == 11


@pytest.mark.parametrize("content", ["", "step,train_loss\n", "\0\0\0"])
def test_metrics_without_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text(content, encoding="utf-8")
    assert "Curves" not in report_of(tmp_path / "run")


def test_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "error: " in capsys.readouterr().err and not (tmp_path / REPORT_FILE).exists()


# --- Safety


def test_hostile_text_is_escaped(trained_copy: Path) -> None:
    journal = Journal(trained_copy / JOURNAL_FILE, enabled=True)
    journal._keep_until = 12
    journal.sample(12, HOSTILE)
    settings = yaml.safe_load((trained_copy / RUN_CONFIG).read_text(encoding="utf-8"))
    settings |= {"run_name": HOSTILE, HOSTILE: HOSTILE}
    (trained_copy / RUN_CONFIG).write_text(yaml.safe_dump(settings), encoding="utf-8")
    hostile_folder = trained_copy.rename(trained_copy.with_name("<b onclick=alert(3)>'\""))
    page = report_of(hostile_folder)
    assert "<script>alert" not in page and "<img" not in page and "<b onclick" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3
    scripts = re.findall(r"<script([^>]*)>", page)
    assert len(scripts) == 3 and all("nonce=" in script or "application/json" in script for script in scripts)


def test_page_loads_nothing(trained: Path) -> None:
    page = (trained / REPORT_FILE).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'") and "http" not in policy and "unsafe-eval" not in policy
    assert "<link" not in without_library(trained / REPORT_FILE)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", without_library(trained / REPORT_FILE))


def test_unwritable_report_warns_once(trained_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained_copy / REPORT_FILE).unlink()
    # A folder cannot be replaced by a file, whoever runs the test.
    (trained_copy / REPORT_FILE / "folder").mkdir(parents=True)
    report = RunReport(trained_copy, enabled=True)
    report.write()
    report.write()
    assert capsys.readouterr().out.count("can't be written") == 1
    assert not list(trained_copy.glob(".*.partial"))


def test_run_survives_unwritable_files(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The names under which both files are written first.
    for name in (JOURNAL_FILE, REPORT_FILE):
        (tmp_path / "out" / f".{name}.partial" / "folder").mkdir(parents=True)
    out = train()
    printed = capsys.readouterr().out
    assert printed.count(f"warning: {out / JOURNAL_FILE}") == 1 and printed.count(f"warning: {out / REPORT_FILE}") == 1
    assert (out / "final").is_dir()


def test_frequent_evaluations_leave_the_report_out(trained_copy: Path) -> None:
    """Also those of the first seconds, so that tiny runs write it at their end only."""
    report = RunReport(trained_copy, enabled=True)
    for _ in range(2):
        (trained_copy / REPORT_FILE).unlink()
        report.write_if_due()
        assert not (trained_copy / REPORT_FILE).exists()
        report.write()
        assert report.seconds > 0 and (trained_copy / REPORT_FILE).exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    report = RunReport(tmp_path, enabled=False)
    report.journal.sample(1, "text")
    report.write()
    assert list(tmp_path.iterdir()) == []


def test_damaged_journal_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(b'{"kind": "sample", "step": 1, "text": "a"}\n\xff\n[1]\n{"step": 2}\n{"kind": "sample", "st')
    assert [record["step"] for record in read_journal(path)] == [1]


# --- Size


def test_long_curves_are_thinned() -> None:
    numbers = np.arange(100_000.0)
    value = np.ones(100_000)
    value[70_007] = 9.0
    curve = Curve(numbers, numbers, numbers, value).thinned()
    assert len(curve) <= POINTS + 2 and curve.value.max() == 9 and curve.step[[0, -1]].tolist() == [0, 99_999]


def test_states_of_a_long_run_are_few(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL_FILE, enabled=True)
    for step in range(1, 10_001):
        if journal.is_state_due(step, 10_000):
            journal.state(step, tokens=step, memory=1, expert_load=[], expected_seconds=1.0)
    assert len(kinds(tmp_path)) == 200


def test_validation_rows_get_the_tokens_of_their_step(trained: Path) -> None:
    curve = read_curves(trained / "metrics.csv")["val_loss"]
    assert curve.step.tolist() == [4, 8, 12] and curve.tokens.tolist() == [256, 512, 768]


def test_spread_keeps_first_and_last() -> None:
    assert spread([1, 2, 3], 5) == [1, 2, 3] and spread(range(100), 3) == [0, 50, 99]


def test_plotting_library_is_imported_late() -> None:
    code = "import sys, litmoe.train.run, litmoe.report.__main__; sys.exit('bokeh' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=280).returncode == 0


# --- In a browser


def wait_until(tab: Any, condition: str) -> None:
    """Wait for a JavaScript condition. Playwright's own function would need the page to allow eval."""
    deadline = time.monotonic() + 60
    while not tab.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


@pytest.mark.skipif(find_browser() is None, reason="needs a Chromium browser")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_page_in_a_browser(trained_copy: Path, scheme: str, width: int) -> None:
    """Every chart is drawn under the content policy, nothing is loaded, and a phone need not scroll sideways."""
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        write_report([trained_copy], trained_copy / REPORT_FILE)
        tab.goto((trained_copy / REPORT_FILE).as_uri())
        wait_until(tab, "Bokeh.documents.length == 7 && Bokeh.documents.every((page) => page.is_idle)")
        # The page colors the charts after all of them exist.
        ink = {"light": "#646b75", "dark": "#99a1ac"}[scheme]
        wait_until(tab, f"Bokeh.documents[0].roots()[0].below[0].major_label_text_color == '{ink}'")
        wait_until(tab, f"document.documentElement.scrollWidth <= {width}")
        browser.close()
    assert problems == []
