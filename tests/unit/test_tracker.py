"""Trackers receive the rows of log.csv, and a run continues if they fail. tests/slow has the real packages."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from support.helpers import call
from support.runs import assert_bitwise_equal, flags

import train
from babygpt.training.log import read_log
from babygpt.training.tracker import ID_FILE


class FakeWandb:
    """A module wandb whose call number `fails_at` raises an error; the first call is init, the last is finish."""

    def __init__(self, fails_at: int | None = None):
        self.fails_at, self.calls, self.rows, self.runs = fails_at, 0, [], []

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError("the service is gone")

    def init(self, **settings: object) -> SimpleNamespace:
        self.count()
        self.runs.append(settings)
        return SimpleNamespace(log=self.log, finish=self.count, define_metric=lambda name, step_metric: None)

    def log(self, scalars: dict) -> None:
        self.count()
        self.rows.append(scalars)


@pytest.fixture
def train_with(dataset, tmp_path, monkeypatch):
    def train_run(module: FakeWandb | None, **changes: object):
        monkeypatch.setitem(sys.modules, "wandb", module)
        call(train.main, *flags(dataset, tmp_path / "run", logging__tracker="wandb", **changes))
        return tmp_path / "run"

    return train_run


def test_tracker_receives_the_rows_and_settings(train_with, uninterrupted_run):
    wandb = FakeWandb()
    out = train_with(wandb)
    logged = [{k: v for k, v in row.items() if v is not None} for row in read_log(out / "log.csv")]
    assert logged == wandb.rows
    assert wandb.runs[0]["config"]["optimizer"]["max_lr"] == 1e-2
    assert_bitwise_equal(out, uninterrupted_run)


def test_resumed_run_continues_and_a_new_one_does_not(train_with):
    wandb = FakeWandb()
    for steps, init_from in ((4, "scratch"), (14, "resume")):
        out = train_with(wandb, training__max_steps=steps, general__init_from=init_from)
    ids = [run["id"] for run in wandb.runs]
    assert ids[0] == ids[1] == (out / ID_FILE).read_text()
    shutil.rmtree(out / "checkpoints")
    (out / "finished").unlink()
    train_with(wandb, training__max_steps=4)
    assert wandb.runs[2]["id"] != ids[0]


@pytest.mark.parametrize("fails_at", [1, 2, 9, 17])
def test_failure_of_a_tracker_stops_no_run(fails_at, train_with, uninterrupted_run, capsys):
    """Its start, a row in the middle, and its end: the run continues without it, and the warning is printed once."""
    wandb = FakeWandb(fails_at)
    assert_bitwise_equal(train_with(wandb), uninterrupted_run)
    assert wandb.calls == fails_at
    assert capsys.readouterr().err.count("The tracker wandb failed (OSError('the service is gone')). The run ") == 1


def test_missing_package_is_a_warning(train_with, uninterrupted_run, capsys):
    assert_bitwise_equal(train_with(None), uninterrupted_run)
    assert "tracker wandb failed" in capsys.readouterr().err
