"""Plots of one or more runs from their log.csv."""

import pytest
from support.helpers import call

from babygpt.errors import UserError
from babygpt.training import plots
from babygpt.training.log import Log
from tools import plot


def make_run(path, steps: int, with_scores: bool = True):
    path.mkdir()
    log = Log(path / "log.csv")
    for step in range(steps):
        row = {"step": step, "tokens": step * 1000, "epoch": 0, "loss": 5 / (step + 1), "lr": 1e-3, "grad_norm": 1.0}
        if with_scores and step % 5 == 0:
            row |= {"val_loss": 6 / (step + 1), "hellaswag": 0.25 + step / 1000}
        log.write(row | {"tokens_per_s": 1e5, "step_ms": 10.0})
    return path


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_plot_of_one_or_several_runs_is_a_png(tmp_path, capsys):
    one, two = make_run(tmp_path / "one", 30), make_run(tmp_path / "two", 12, with_scores=False)
    call(plot.main, one)
    assert is_png(one / "plot.png")
    call(plot.main, one, two, "--out", tmp_path / "both.png", "--x", "tokens")
    assert is_png(tmp_path / "both.png")


@pytest.mark.parametrize("steps", [0, 1])
def test_run_with_zero_or_one_rows_is_plotted(steps, tmp_path):
    plots.plot([make_run(tmp_path / "run", steps)], tmp_path / "plot.png")
    assert is_png(tmp_path / "plot.png")


def test_directory_without_a_log_is_rejected(tmp_path):
    with pytest.raises(UserError, match="There is no run at"):
        call(plot.main, tmp_path)
