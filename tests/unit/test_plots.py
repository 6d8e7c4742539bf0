"""Plots of one or more runs from their log.csv."""

import json

import matplotlib
import pytest
from support.helpers import call

from babygpt.errors import UserError
from babygpt.training import plots
from babygpt.training.log import Log, read_log
from tools import plot

matplotlib.use("Agg")
from matplotlib import pyplot


def make_run(path, steps: int, with_scores: bool = True, vocab_size: int = 300):
    path.mkdir(parents=True)
    log = Log(path / "log.csv")
    for step in range(steps):
        row = {"step": step, "tokens": step * 1000, "epoch": 0, "loss": 5 / (step + 1), "lr": 1e-3, "grad_norm": 1.0}
        if with_scores and step % 5 == 0:
            row |= {"val_loss": 6 / (step + 1), "val_bpb": 2 / (step + 1), "hellaswag": 0.25 + step / 1000}
        log.write(row | {"tokens_per_s": 1e5, "step_ms": 10.0})
    (path / "config.json").write_text(json.dumps({"model": {"vocab_size": vocab_size}}))
    return path


def draw(paths: list, x: str = "steps") -> tuple[dict, list[str]]:
    """Return the axes by title, and the labels of the legend outside of them."""
    figure = plots.draw(plots.read_runs(paths, x), x, None)
    pyplot.close(figure)
    prefixes = [legend.get_title().get_text().removesuffix("...") for legend in figure.legends]
    labels = [
        prefix + text.get_text() for legend in figure.legends for prefix in prefixes for text in legend.get_texts()
    ]
    return {axis.get_title(loc="left").split(" (")[0]: axis for axis in figure.axes}, labels


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_plot_of_one_or_several_runs_is_a_png(tmp_path, monkeypatch):
    one, two = make_run(tmp_path / "one", 30), make_run(tmp_path / "two", 12, with_scores=False)
    monkeypatch.chdir(tmp_path)
    call(plot.main, one)
    assert is_png(tmp_path / "plot.png")
    call(plot.main, one, two, "--out", tmp_path / "both.png", "--x", "tokens", "--smooth", 3)
    assert is_png(tmp_path / "both.png")


def test_plot_never_overwrites_the_plot_of_a_run(tmp_path, monkeypatch):
    one = make_run(tmp_path / "one", 3)
    monkeypatch.chdir(one)
    for out in ([], ["--out", one / "plot.png"]):
        with pytest.raises(UserError, match="the run itself writes"):
            call(plot.main, one, *out)
    assert not (one / "plot.png").exists()


def test_twelve_runs_have_a_color_and_a_legend_entry_each(tmp_path):
    paths = [make_run(tmp_path / f"run-{i}", 10) for i in range(12)]
    axes, labels = draw(paths)
    assert labels == [path.name for path in paths]
    assert axes["loss"].get_legend() is None
    assert len({line.get_color() for line in axes["learning rate"].lines}) == 12
    for count in (1, 12, 13, 40):
        assert len({*map(str, plots.choose_colors(count))}) == count


def test_common_prefix_ends_at_a_separator():
    assert plots.common_prefix(["out/run-10", "out/run-12"]) == "out/run-"
    assert plots.common_prefix(["demo", "demo-classic"]) == ""


def test_runs_of_equal_name_are_distinguished(tmp_path):
    paths = [make_run(tmp_path / parent / "run", 3) for parent in ("a", "b")]
    assert draw(paths)[1] == [str(path) for path in paths]


def test_different_vocabularies_are_compared_in_bits_per_byte(tmp_path):
    paths = [make_run(tmp_path / f"{size}", 11, vocab_size=size) for size in (300, 400)]
    axes, _ = draw(paths)
    assert axes["validation loss"].get_title(loc="left") == "validation loss (bits per byte)"
    assert [list(line.get_ydata()) for line in axes["validation loss"].lines] == [[2 / 1, 2 / 6, 2 / 11]] * 2
    equal_size = make_run(tmp_path / "equal size", 11)
    (equal_size / "tokenizer.json").write_text("{}")
    assert "validation loss" in draw([paths[0], equal_size])[0]
    axes, _ = draw([paths[0], paths[0]])
    assert [2 / 1, 2 / 6, 2 / 11] not in [list(line.get_ydata()) for line in axes["loss"].lines]


def test_first_losses_do_not_determine_the_scale(tmp_path):
    axes, _ = draw([make_run(tmp_path / "run", 100)])
    bottom, top = axes["loss"].get_ylim()
    assert top < 0.7 < 6  # the losses of the first steps are 5 and 6
    assert bottom < 5 / 100


def test_x_axis_is_steps_tokens_or_hours(tmp_path):
    run = make_run(tmp_path / "run", 5)
    assert list(draw([run], "tokens")[0]["learning rate"].lines[0].get_xdata()) == [0, 1000, 2000, 3000, 4000]
    hours = [row["elapsed_s"] / 3600 for row in read_log(run / "log.csv")]
    assert list(draw([run], "hours")[0]["learning rate"].lines[0].get_xdata()) == hours
    lines = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in lines))  # of an earlier version
    with pytest.raises(UserError, match="lacks elapsed times"):
        draw([run], "hours")


def test_moving_average_is_over_the_last_values():
    assert plots.moving_average([1.0, 2.0, 6.0, 4.0], 2).tolist() == [1.0, 1.5, 4.0, 5.0]
    assert plots.moving_average([1.0, 2.0], 1).tolist() == [1.0, 2.0]
    assert plots.moving_average([], 3).tolist() == []
    assert plots.moving_average([1.0, 1e30, 1.0, 1.0, 1.0], 2)[3:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("steps", [0, 1])
def test_run_with_zero_or_one_rows_is_plotted(steps, tmp_path):
    plots.plot(plots.read_runs([make_run(tmp_path / "run", steps)]), tmp_path / "plot.png")
    assert is_png(tmp_path / "plot.png")


def test_directory_without_a_log_is_rejected(tmp_path):
    with pytest.raises(UserError, match="There is no run at"):
        call(plot.main, tmp_path)
