import csv
import html
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from litmoe.train.logs import COLUMNS, Loggers, MetricsCSV, RunDisplay, TensorBoard


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_resume_continues_after_its_step(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path, resume_step=None)
    for step in (1, 2, 3):
        first.log_metrics({"train_loss": step / 2, "expert_load_max/layer_0": 1.5}, step)
    resumed = MetricsCSV(path, resume_step=2)
    resumed.log_metrics({"train_loss": 9.0}, 3)
    assert [(row["step"], row["train_loss"]) for row in read(path)] == [("1", "0.5"), ("2", "1.0"), ("3", "9.0")]
    assert read(path)[0]["expert_load_max/layer_0"] == "1.5"


def test_torn_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, resume_step=None).log_metrics({"train_loss": 0.5}, 1)
    with open(path, "a", encoding="utf-8") as file:
        file.write("2,0.4")
    MetricsCSV(path, resume_step=2).log_metrics({"train_loss": 0.25}, 2)
    assert [(row["step"], row["train_loss"]) for row in read(path)] == [("1", "0.5"), ("2", "0.25")]


def test_new_run_starts_new_file(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, resume_step=None).log_metrics({"train_loss": 0.5}, 1)
    MetricsCSV(path, resume_step=None).log_metrics({"train_loss": 0.75}, 1)
    assert [row["train_loss"] for row in read(path)] == ["0.75"]


def test_new_column_keeps_earlier_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path, resume_step=None)
    logger.log_metrics({"train_loss": 0.5}, 1)
    logger.log_metrics({"train_loss": 0.4, "expert_load_max/layer_0": 2.0}, 2)
    assert [row["expert_load_max/layer_0"] for row in read(path)] == ["", "2.0"]
    assert [row["train_loss"] for row in read(path)] == ["0.5", "0.4"]


def write_old(path, *lines, end="\r\n"):
    """A metrics file as another version wrote it."""
    path.write_bytes(("\r\n".join(lines) + end).encode())


OLD = [",".join(COLUMNS[:3]), "1,0.5,", "2,0.4,0.6", "3,0.3,"]


def test_older_file_with_fewer_columns(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    write_old(path, *OLD)
    MetricsCSV(path, resume_step=2).log_metrics({"train_loss": 0.25, "new/layer_0": 2.0}, 3)
    assert [(row["step"], row["train_loss"], row["val_loss"], row["new/layer_0"]) for row in read(path)] == [
        ("1", "0.5", "", ""),
        ("2", "0.4", "0.6", ""),
        ("3", "0.25", "", "2.0"),
    ]
    assert set(COLUMNS) <= read(path)[0].keys()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [path]


def test_columns_of_another_version(tmp_path, capsys):
    """Also text columns, in their order, with ``step`` in another place."""
    path = tmp_path / "metrics.csv"
    write_old(path, "perplexity,step,note,train_loss", '2.5,1,"a, b",0.5', "2.25,2,,0.4", ",3,late,0.3")
    logger = MetricsCSV(path, resume_step=2)
    logger.log_metrics({"train_loss": 0.25}, 3)
    logger.log_metrics({"train_loss": 0.2, "new": 1.0}, 4)
    table = read(path)
    assert list(table[0])[:4] == ["perplexity", "step", "note", "train_loss"]
    assert [(row["step"], row["perplexity"], row["note"], row["train_loss"], row["new"]) for row in table] == [
        ("1", "2.5", "a, b", "0.5", ""),
        ("2", "2.25", "", "0.4", ""),
        ("3", "", "", "0.25", ""),
        ("4", "", "", "0.2", "1.0"),
    ]
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("last", ["4", "4,0.2", "4,0.", "", "\n"])
def test_older_file_with_a_torn_end(tmp_path, capsys, last):
    path = tmp_path / "metrics.csv"
    write_old(path, *OLD, last, end="")
    MetricsCSV(path, resume_step=3).log_metrics({"train_loss": 0.25}, 4)
    assert [(row["step"], row["train_loss"]) for row in read(path)][2:] == [("3", "0.3"), ("4", "0.25")]
    assert capsys.readouterr().out == ""


def test_file_saved_by_a_spreadsheet(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    write_old(path, "\ufeff" + OLD[0], *OLD[1:])
    MetricsCSV(path, resume_step=3).log_metrics({"train_loss": 0.25}, 4)
    assert [row["step"] for row in read(path)] == ["1", "2", "3", "4"]
    assert capsys.readouterr().out == ""


def test_copies_of_damaged_files_are_kept(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    for number in (1, 2):
        write_old(path, OLD[0], f"1,0.{number},", "2,?,", "3,0.3,")
        for _ in range(2):  # a run that is killed before its first row
            MetricsCSV(path, resume_step=3)._read_earlier_rows(["train_loss"])
        MetricsCSV(path, resume_step=3).log_metrics({"train_loss": 0.25}, 4)
        assert [row["step"] for row in read(path)] == ["1", "3", "4"]
        assert "1 rows can't be read" in capsys.readouterr().out
    assert b"1,0.1," in (tmp_path / "metrics.csv.damaged").read_bytes()
    assert b"1,0.2," in (tmp_path / "metrics.csv.damaged-2").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_rows_damaged_during_the_run(tmp_path, capsys):
    """A new column rewrites the file, which must not drop them silently."""
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path, resume_step=None)
    logger.log_metrics({"train_loss": 0.5}, 1)
    logger.log_metrics({"train_loss": 0.4}, 2)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.\x00"))
    logger.log_metrics({"train_loss": 0.3, "new": 1.0}, 3)
    assert [row["step"] for row in read(path)] == ["2", "3"]
    assert "1 rows can't be read" in capsys.readouterr().out
    assert b"1,0.\x00" in (tmp_path / "metrics.csv.damaged").read_bytes()


def test_rows_wait_for_a_writable_disk(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    path.mkdir()
    logger = MetricsCSV(path, resume_step=None)
    logger.log_metrics({"train_loss": 0.5}, 1)
    logger.log_metrics({"train_loss": 0.4, "new": 1}, 2)
    assert capsys.readouterr().out.count("wait until") == 1
    logger.finalize("success")
    assert "2 rows, from step 1 on, are missing" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
    path.rmdir()
    logger.save()
    assert "is written again, with the 2 rows" in capsys.readouterr().out
    assert [(row["step"], row["train_loss"], row["new"]) for row in read(path)] == [("1", "0.5", ""), ("2", "0.4", "1")]


def test_other_logger_on_full_disk(tmp_path, capsys):

    class Full(MetricsCSV):
        def fail(self, *_):
            raise OSError(28, "No space left on device")

        log_metrics = save = finalize = fail

    loggers = Loggers([Full(tmp_path / "no.csv", None), MetricsCSV(tmp_path / "metrics.csv", resume_step=None)])
    loggers.log_metrics({"train_loss": 0.5}, 1)
    loggers.save()
    loggers.finalize("success")
    assert capsys.readouterr().out.count("Full can't write: No space left on device. The run continues") == 1
    assert [row["train_loss"] for row in read(tmp_path / "metrics.csv")] == ["0.5"]


@pytest.mark.parametrize(("dead", "text"), [((0.0, 0.0), ""), ((2.0, 1.0), " | dead experts 3")])
def test_terminal_line_shows_dead_experts(capsys, dead, text):
    row = {"total_tokens": 4096, "train_loss": 1.5, "tokens_per_second": 1000.0}
    row |= {f"dead_experts/layer_{layer}": count for layer, count in enumerate(dead)}
    RunDisplay(enabled=True, bar=False, steps=9, first_step=0).step(4, row, 61)
    assert capsys.readouterr().out == f"step 4/9 | 4,096 tokens | loss 1.500 | 1,000 tokens/s{text} | 0:01:01 left\n"


# --- TensorBoard


def board(tmp_path):
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    return found


def tensorboard(tmp_path):
    return TensorBoard(root_dir=tmp_path, name="tensorboard", version="")


def test_settings_add_no_chart(tmp_path):
    logger = tensorboard(tmp_path)
    logger.log_hyperparams({"train": {"max_steps": 3}, "resume": None})
    logger.log_metrics({"val_loss": 0.5}, 1)
    logger.finalize("success")
    shown = board(tmp_path)
    assert shown.Tags()["scalars"] == ["val_loss"]
    assert [event.value for event in shown.Scalars("val_loss")] == [0.5]
    content = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["train/max_steps"].number_value == 3
    experiment = shown.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert [info.name.tag for info in HParamsPluginData.FromString(experiment).experiment.metric_infos] == ["val_loss"]


@pytest.mark.parametrize(
    "text",
    ["The fox\nsat down.\n\n  *Why?* <b> & #1\n# No\n- one\n```\ncode", "One line with `x` and [a](b)", "  a\n\n\nb"],
)
def test_text_keeps_its_lines(text, tmp_path):
    """As TensorBoard shows it: rendered as Markdown."""
    logger = tensorboard(tmp_path)
    Loggers([logger]).log_text("sample", text, 2)
    logger.finalize("success")
    (event,) = board(tmp_path).Tensors("sample/text_summary")
    shown = markdown_to_safe_html(event.tensor_proto.string_val[0].decode())
    block = re.fullmatch(r"<pre><code>(.*)\n</code></pre>", shown, re.DOTALL)
    assert block is not None, shown
    assert html.unescape(block[1]) == text
