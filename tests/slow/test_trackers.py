"""TensorBoard and Weights & Biases, offline: they receive every row, and a run continues if they are killed."""

import os
import signal
import subprocess
import sys

import pytest
from support.helpers import call
from support.runs import ROOT, STEPS, assert_bitwise_equal, flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from babygpt.training.log import column, read_log


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_tensorboard_has_the_rows_of_the_log_after_a_resume(dataset, tmp_path):
    out = tmp_path / "run"
    for steps, init_from in ((9, "scratch"), (STEPS, "resume")):
        changes = {"training__max_steps": steps, "general__init_from": init_from}
        call(train.main, *flags(dataset, out, logging__tracker="tensorboard", **changes))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "val_loss", "lr", "grad_norm"):
        steps, values = column(read_log(out / "log.csv"), name)
        assert [event.step for event in events.Scalars(name)] == steps
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values, rel=1e-6)


def test_wandb_logs_offline(dataset, tmp_path, uninterrupted_run):
    call(train.main, *flags(dataset, tmp_path / "run", logging__tracker="wandb"))
    assert_bitwise_equal(tmp_path / "run", uninterrupted_run)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_killed_wandb_service_stops_no_run(dataset, tmp_path, monkeypatch):
    """Its process is killed in the middle of the run, whose results do not change."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of an earlier test: the run must start its own
    changes = {"training__max_steps": 200, "saving__every_n_steps": 100}
    call(train.main, *flags(dataset, tmp_path / "plain", **changes))
    arguments = flags(dataset, tmp_path / "run", logging__tracker="wandb", **changes)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    killed, output = [], []
    for line in process.stdout:
        output.append(line)
        if line.startswith("step      5 | loss"):
            command = ["pgrep", "-f", f"wandb-core .*--pid {process.pid}"]
            killed = subprocess.run(command, capture_output=True, text=True).stdout.split()
            for number in killed:
                os.kill(int(number), signal.SIGKILL)
    assert process.wait(timeout=120) == 0, "".join(output)
    assert killed
    assert_bitwise_equal(tmp_path / "run", tmp_path / "plain", step=200)
