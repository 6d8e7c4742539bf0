"""Plot one or more runs from their log.csv.

>>> plot(read_runs([Path("out/gpt2"), Path("out/modern")], "tokens"), Path("compare.png"), x="tokens")
"""

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from babygpt.errors import UserError
from babygpt.files import sha256
from babygpt.training.log import Row, column, loss_unit, read_log, standard_error

Unit = Literal["steps", "tokens", "hours"]

GPT2_124M_HELLASWAG = 0.2955  # OpenAI's weights, karpathy acc_norm, as build-nanogpt reports
HELLASWAG_EXAMPLES = 10_042
COLORS = (
    "#2a6fbb", "#d1495b", "#3d9970", "#e0a030", "#7b5ea7", "#4a4a4a", "#17becf", "#a0522d", "#e377c2", "#8fbc2e",
    "#1b1b8f", "#f2a48b",
)  # fmt: skip
START = 0.1  # initial fraction of a run that does not affect the limits of the y-axis
LEGEND_ROWS = 30
TITLES = {
    "loss": "loss", "hellaswag": "HellaSwag (karpathy acc_norm)", "lr": "learning rate",
    "norm": "gradient norm", "speed": "tokens per second",
}  # fmt: skip


@dataclass
class Curves:
    """The log of a run, with its name and its color in a plot, and positions on the x-axis by step."""

    path: Path
    name: str
    rows: list[Row]
    positions: dict[int, float]
    color: Any = None  # set by `draw`

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Return the positions at which a column was measured, and its values."""
        pairs = zip(*column(self.rows, name), strict=True)
        found = [(self.positions[step], value) for step, value in pairs if step in self.positions]
        return [position for position, _ in found], [value for _, value in found]

    @cached_property
    def config(self) -> Any:
        """The contents of config.json, None if it cannot be read."""
        try:
            return json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def setting(self, section: str, name: str) -> Any:
        """Return a setting from config.json, or None if it is unknown."""
        try:
            return self.config[section][name]
        except (KeyError, TypeError):
            return None

    @cached_property
    def vocabulary(self) -> str | None:
        """The vocabulary size and the sha256 of tokenizer.json ("gpt2" if there is none), or None if it is unknown."""
        size, file = self.setting("model", "vocab_size"), self.path / "tokenizer.json"
        return size and f"{size} {sha256(file) if file.exists() else 'gpt2'}"

    @cached_property
    def num_examples(self) -> int:
        """The number of HellaSwag examples that the run evaluates, or 0 if it is unknown."""
        is_default = self.setting("evaluation", "file") is None and self.setting("evaluation", "language") == "en"
        return self.setting("evaluation", "limit") or (HELLASWAG_EXAMPLES if is_default else 0)


def plot(runs: list[Curves], out: Path, x: Unit = "steps", smooth: int | None = None) -> None:
    """Plot losses, HellaSwag accuracy, learning rate, gradient norm and throughput of the runs into a PNG.

    Training losses, gradient norms and throughput are averaged over `smooth` steps; None: 1% of the steps of the run.
    If the runs have different vocabularies, the plot shows only the validation loss, in bits per byte.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(runs, x, smooth)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def read_runs(paths: list[Path], x: Unit = "steps") -> list[Curves]:
    """Read the logs of runs, with positions on the x-axis. UserError if `x` is hours and a log lacks elapsed times."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    logs = [read_log(path / "log.csv") for path in paths]
    for path, rows in zip(paths, logs, strict=True):
        if x == "hours" and any(row["elapsed_s"] is None for row in rows):
            raise UserError(f"{path}/log.csv lacks elapsed times, because an earlier version wrote it. Use --x steps.")
    runs = zip(paths, names, logs, strict=True)
    return [Curves(path, name, rows, positions_by_step(rows, x)) for path, name, rows in runs]


def positions_by_step(rows: list[Row], x: Unit) -> dict[int, float]:
    """Return the position of each step on the x-axis. Steps without a known time have no position in hours."""
    if x == "hours":
        return {row["step"]: row["elapsed_s"] / 3600 for row in rows if row["elapsed_s"] is not None}
    return {row["step"]: row["tokens"] if x == "tokens" else row["step"] for row in rows}


def choose_colors(count: int) -> list[Any]:
    """Return different colors, from a color map if there are more runs than COLORS."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    import matplotlib

    return [matplotlib.colormaps["turbo"](position) for position in np.linspace(0.03, 0.97, count)]


def smoothing_length(count: int) -> int:
    """Return the default length of moving averages of `count` values: 1% of them."""
    return max(1, count // 100)


def moving_average(values: list[float], length: int) -> np.ndarray:
    """Return the mean of each value and up to length - 1 values before it, (len(values),) float64."""
    if not values:
        return np.empty(0)
    padded = np.concatenate([np.full(length - 1, np.nan), values])  # each window is summed separately, for precision
    return np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, length), axis=1)


def draw(runs: list[Curves], x: Unit, smooth: int | None) -> Any:
    """Return a matplotlib figure of the runs."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plt.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
    })  # fmt: skip
    figure, axes = plt.subplot_mosaic(
        [["loss"] * 2 + ["hellaswag"], ["lr", "norm", "speed"]],  # type: ignore[list-item]
        figsize=(11 if len(runs) == 1 else 13.5, 6.2), layout="constrained",
    )  # fmt: skip
    for name, title in TITLES.items():
        axes[name].set_title(title)
        axes[name].set_xlabel({"tokens": "million tokens"}.get(x, x))
    units = {loss_unit(run.rows) for run in runs}
    loss_title = f"loss ({' or '.join(sorted(units))})"
    is_comparable = len({run.vocabulary for run in runs} - {None}) <= 1
    val_name = "val_loss" if is_comparable else "val_bpb"
    axes["loss"].set_title(loss_title if is_comparable else "validation loss (bits per byte)")
    visible: dict[str, list[float]] = {"loss": [], "norm": []}
    for run, color in zip(runs, choose_colors(len(runs)), strict=True):
        run.color = color
        is_alone = len(runs) == 1
        if is_comparable:
            visible["loss"] += plot_smoothed(axes["loss"], run, "loss", smooth, is_alone)
        visible["norm"] += plot_smoothed(axes["norm"], run, "grad_norm", smooth, is_alone)
        plot_smoothed(axes["speed"], run, "tokens_per_s", smooth, is_alone)
        plot_validation(axes["loss"], run, val_name, is_alone)
        visible["loss"] += after_start(*run.column(val_name))
        plot_hellaswag(axes["hellaswag"], run)
        axes["lr"].plot(*run.column("lr"), color=run.color)
    for name, values in visible.items():
        if values:
            bottom, top = np.quantile(values, [0.001, 0.999])
            margin = 0.05 * (top - bottom) or 0.1
            axes[name].set_ylim(bottom - margin, top + margin)
    accuracies = [(0.25, "chance")]
    if any(run.num_examples == HELLASWAG_EXAMPLES for run in runs):
        accuracies.append((GPT2_124M_HELLASWAG, "GPT-2 124M, 0.2955"))
    for value, text in accuracies:
        axes["hellaswag"].axhline(value, color="black", linestyle="--", linewidth=0.8)
        transform = axes["hellaswag"].get_yaxis_transform()
        axes["hellaswag"].text(0.02, value, text, transform=transform, va="bottom", fontsize=8)
    axes["hellaswag"].set_xlim(axes["loss"].get_xlim())
    axes["speed"].set_ylim(bottom=0)
    axes["speed"].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axis in axes.values():
        axis.xaxis.set_major_locator(MaxNLocator(6 if axis is axes["loss"] else 4))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:,.4g}" if x == "tokens" else f"{value:,.4g}")
    if len(runs) == 1:
        axes["loss"].legend()
    elif is_comparable:
        axes["loss"].set_title(f"{loss_title}: validation, and training (thin)")
    if len(runs) > 1:
        prefix = common_prefix([run.name for run in runs])
        names = [run.name.removeprefix(prefix) for run in runs]
        lines = [
            plt.Line2D([], [], color=run.color, linewidth=2, label=name) for run, name in zip(runs, names, strict=True)
        ]
        columns = math.ceil(len(runs) / LEGEND_ROWS)
        figure.legend(
            handles=lines, loc="outside right upper", ncols=columns, fontsize=9 if columns == 1 else 7,
            title=f"{prefix}..." if prefix else None, alignment="left",
        )  # fmt: skip
    return figure


def common_prefix(names: list[str]) -> str:
    """Return what all names begin with, up to a separator, such as out/shakespeare-."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071, not of paths
    return prefix[: max(prefix.rfind(separator) for separator in "-_./") + 1]


def plot_smoothed(axis: Any, run: Curves, name: str, smooth: int | None, is_alone: bool) -> list[float]:
    """Plot the moving average of a column, and the column itself if the run is the only one.

    Returns the plotted values after the start of the run.
    """
    positions, values = run.column(name)
    averages = moving_average(values, smooth or smoothing_length(len(values)))
    if is_alone:
        axis.plot(positions, values, color=run.color, alpha=0.25, linewidth=0.6)
    label = "training" if name == "loss" else None
    axis.plot(positions, averages, color=run.color, alpha=0.7, linewidth=0.9, label=label)
    return after_start(positions, values if is_alone else averages.tolist())


def after_start(positions: list[float], values: list[float]) -> list[float]:
    """Return the values after the first START of the positions, or all values if there are none."""
    if not positions:
        return []
    start = positions[0] + START * (positions[-1] - positions[0])
    return [value for position, value in zip(positions, values, strict=True) if position > start] or values


def plot_validation(axis: Any, run: Curves, name: str, is_alone: bool) -> None:
    positions, values = run.column(name)
    marker = {"marker": "o", "markersize": 3.5} if len(positions) < 60 else {}
    axis.plot(positions, values, color=run.color, linewidth=1.6, label="validation", **marker)
    if values and is_alone:
        axis.annotate(
            f"{values[-1]:.3f}", (positions[-1], values[-1]), textcoords="offset points", xytext=(4, 7),
            color=run.color, ha="right",
            bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "edgecolor": "none"},
        )  # fmt: skip


def plot_hellaswag(axis: Any, run: Curves) -> None:
    """Plot the accuracy, with its standard error if the number of examples is known."""
    positions, values = run.column("hellaswag")
    count = run.num_examples
    errors = [standard_error(p, count) if count else 0.0 for p in values]
    axis.errorbar(positions, values, yerr=errors, color=run.color, marker="o", markersize=3.5, capsize=2)
