"""The lock on ``out_dir``. A killed run that holds it is tested in tests/test_run_train.py."""

import json
import os
import re
import socket

import pytest

from litmoe.cli import UserError
from litmoe.train.saving import HOLDER, LOCK, locked


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_lock_names_its_holder(tmp_path):
    here = rf"process {os.getpid()} on {re.escape(socket.gethostname())}, since 20"
    with locked(tmp_path), pytest.raises(UserError, match=here), locked(tmp_path):
        pass
    with locked(tmp_path):  # the second run has not released it
        assert HOLDER in names(tmp_path)


def test_lock_leaves_nothing_behind(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), locked(out):
        assert names(out) == [HOLDER, LOCK]
        raise RuntimeError
    assert names(tmp_path) == []
    (tmp_path / "metrics.csv").touch()
    with locked(tmp_path):
        pass
    assert names(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_other_ranks_need_no_lock(tmp_path, monkeypatch, name):
    with locked(tmp_path):
        monkeypatch.setenv(name, "1")
        with locked(tmp_path):
            assert HOLDER in names(tmp_path)
        assert HOLDER in names(tmp_path)
        monkeypatch.undo()


def test_tasks_of_srun_are_one_run(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setenv("SLURM_NTASKS", "2")
        monkeypatch.setenv("SLURM_PROCID", "1")
        with locked(tmp_path):
            pass
        monkeypatch.setenv("SLURM_PROCID", "0")
        with pytest.raises(UserError), locked(tmp_path):
            pass


def test_lock_of_another_host_is_kept(tmp_path):
    holder = {"pid": 7, "host": "gpu-17", "since": "2026-01-02 03:04:05+00:00", "boot": "other"}
    (tmp_path / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"process 7 on gpu-17, since 2026-01-02.*delete .*\.run\.json"),
        locked(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / HOLDER).read_text(encoding="utf-8")) == holder


@pytest.mark.parametrize("content", ["", "[]", '{"pid": 7}', '{"pid": 7, "host": "HERE", "since": "then", "new": 1}'])
def test_lock_of_a_killed_run_is_taken_over(tmp_path, capsys, content):
    (tmp_path / HOLDER).write_text(content.replace("HERE", socket.gethostname()), encoding="utf-8")
    with locked(tmp_path):
        output = capsys.readouterr().out
    assert output.startswith(f"Taking over {tmp_path}") and output.count("\n") == 1
    assert ("process 7 on" in output) == ("HERE" in content)
    assert names(tmp_path) == []


def test_lock_of_a_killed_container(tmp_path, capsys):
    """Its host name differs, but its kernel is the same, so its locks are visible."""
    with locked(tmp_path):
        holder = json.loads((tmp_path / HOLDER).read_text(encoding="utf-8"))
    (tmp_path / HOLDER).write_text(json.dumps(holder | {"host": "0123abcd"}), encoding="utf-8")
    if holder["boot"]:
        with locked(tmp_path):
            assert "0123abcd" in capsys.readouterr().out
    else:  # not on Linux
        with pytest.raises(UserError), locked(tmp_path):
            pass


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_data_worker_does_not_hold_the_lock(tmp_path, capfd):
    """Forked workers survive a killed run for some seconds. The next run must not wait for them."""
    read, write = os.pipe()
    if (run := os.fork()) == 0:
        with locked(tmp_path):
            if os.fork() == 0:
                os.close(write)
                os.read(read, 1)  # until the test closes it
            os._exit(0)  # releases nothing, like a kill
    os.waitpid(run, 0)
    with locked(tmp_path):
        assert f"process {run} on" in capfd.readouterr().out
    os.close(write)
    os.close(read)
