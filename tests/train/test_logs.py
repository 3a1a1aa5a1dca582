import csv

import pytest

from litmoe.train.logs import COLUMNS, Loggers, MetricsCSV, RunDisplay


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_file_goes_on_after_the_step(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path, resume_step=None)
    for step in (1, 2, 3):
        first.log_metrics({"train_loss": step / 2, "expert_load_max/layer_0": 1.5}, step)
    resumed = MetricsCSV(path, resume_step=2)
    resumed.log_metrics({"train_loss": 9.0}, 3)
    assert [(row["step"], row["train_loss"]) for row in read(path)] == [("1", "0.5"), ("2", "1.0"), ("3", "9.0")]
    assert read(path)[0]["expert_load_max/layer_0"] == "1.5"


def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, resume_step=None).log_metrics({"train_loss": 0.5}, 1)
    with open(path, "a", encoding="utf-8") as file:
        file.write("2,0.4")
    MetricsCSV(path, resume_step=2).log_metrics({"train_loss": 0.25}, 2)
    assert [(row["step"], row["train_loss"]) for row in read(path)] == [("1", "0.5"), ("2", "0.25")]


def test_a_fresh_start_begins_a_fresh_file(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, resume_step=None).log_metrics({"train_loss": 0.5}, 1)
    MetricsCSV(path, resume_step=None).log_metrics({"train_loss": 0.75}, 1)
    assert [row["train_loss"] for row in read(path)] == ["0.75"]


def test_a_new_column_keeps_the_rows_before_it(tmp_path):
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


def test_older_file_with_fewer_columns_stays(tmp_path, capsys):
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


def test_columns_of_another_version_stay(tmp_path, capsys):
    """Also texts, in their order, and where ``step`` is not the first."""
    path = tmp_path / "metrics.csv"
    write_old(path, "perplexity,step,note,train_loss", '2.5,1,"a, b",0.5', "2.25,2,,0.4", ",3,late,0.3")
    logger = MetricsCSV(path, resume_step=2)
    logger.log_metrics({"train_loss": 0.25}, 3)
    logger.log_metrics({"train_loss": 0.2, "new": 1.0}, 4)
    found = read(path)
    assert list(found[0])[:4] == ["perplexity", "step", "note", "train_loss"]
    assert [(row["step"], row["perplexity"], row["note"], row["train_loss"], row["new"]) for row in found] == [
        ("1", "2.5", "a, b", "0.5", ""),
        ("2", "2.25", "", "0.4", ""),
        ("3", "", "", "0.25", ""),
        ("4", "", "", "0.2", "1.0"),
    ]
    assert "they stay: perplexity, note" in capsys.readouterr().out and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("last", ["4", "4,0.2", "4,0.", "", "\n"])
def test_older_file_with_a_torn_end(tmp_path, capsys, last):
    path = tmp_path / "metrics.csv"
    write_old(path, *OLD, last, end="")
    MetricsCSV(path, resume_step=3).log_metrics({"train_loss": 0.25}, 4)
    assert [(row["step"], row["train_loss"]) for row in read(path)][2:] == [("3", "0.3"), ("4", "0.25")]
    assert capsys.readouterr().out == ""


def test_file_saved_by_a_spreadsheet_stays(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    write_old(path, "\ufeff" + OLD[0], *OLD[1:])
    MetricsCSV(path, resume_step=3).log_metrics({"train_loss": 0.25}, 4)
    assert [row["step"] for row in read(path)] == ["1", "2", "3", "4"]
    assert capsys.readouterr().out == ""


def test_each_damaged_file_is_kept(tmp_path, capsys):
    """The second took the place of the first."""
    path = tmp_path / "metrics.csv"
    for number in (1, 2):
        write_old(path, OLD[0], f"1,0.{number},", "2,?,", "3,0.3,")
        for _ in range(2):  # as a run that is killed before its first row is written
            MetricsCSV(path, resume_step=3)._read_rows(["train_loss"])
        MetricsCSV(path, resume_step=3).log_metrics({"train_loss": 0.25}, 4)
        assert [row["step"] for row in read(path)] == ["1", "3", "4"]
        assert "1 of its rows can't be read" in capsys.readouterr().out
    assert b"1,0.1," in (tmp_path / "metrics.csv.damaged").read_bytes()
    assert b"1,0.2," in (tmp_path / "metrics.csv.damaged-2").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_rows_damaged_while_the_run_goes_are_kept(tmp_path, capsys):
    """They were dropped without a word when a new column came."""
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path, resume_step=None)
    logger.log_metrics({"train_loss": 0.5}, 1)
    logger.log_metrics({"train_loss": 0.4}, 2)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.\x00"))
    logger.log_metrics({"train_loss": 0.3, "new": 1.0}, 3)
    assert [row["step"] for row in read(path)] == ["2", "3"]
    assert "1 of its rows can't be read" in capsys.readouterr().out
    assert b"1,0.\x00" in (tmp_path / "metrics.csv.damaged").read_bytes()


def test_rows_that_cannot_be_written_wait(tmp_path, capsys):
    """An error of the disk at a log line ended the run. (A disk that is full: tests/chaos/test_full_disk.py.)"""
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


def test_another_logger_that_cannot_write_ends_no_run(tmp_path, capsys):
    """A full disk ended runs with TensorBoard, whose rows are in the CSV file all the same."""

    class Full(MetricsCSV):
        def fail(self, *_):
            raise OSError(28, "No space left on device")

        log_metrics = save = finalize = fail

    loggers = Loggers([Full(tmp_path / "no.csv", None), MetricsCSV(tmp_path / "metrics.csv", resume_step=None)])
    loggers.log_metrics({"train_loss": 0.5}, 1)
    loggers.save()
    loggers.finalize("success")
    assert capsys.readouterr().out.count("Full can't write: No space left on device. The run goes on") == 1
    assert [row["train_loss"] for row in read(tmp_path / "metrics.csv")] == ["0.5"]


@pytest.mark.parametrize(("dead", "said"), [((0.0, 0.0), ""), ((2.0, 1.0), " | dead experts 3")])
def test_dead_experts_are_said_where_there_are_some(capsys, dead, said):
    row = {"total_tokens": 4096, "train_loss": 1.5, "tokens_per_second": 1000.0}
    row |= {f"dead_experts/layer_{layer}": count for layer, count in enumerate(dead)}
    RunDisplay(enabled=True, bar=False, steps=9, first_step=0).step(4, row, 61)
    assert capsys.readouterr().out == f"step 4/9 | 4,096 tokens | loss 1.500 | 1,000 tokens/s{said} | 0:01:01 left\n"
