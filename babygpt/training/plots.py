"""Plot one or more runs from their log.csv.

>>> plot([Path("out/gpt2"), Path("out/modern")], Path("compare.png"), x="tokens")
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

from babygpt.training.log import column, read_log

GPT2_124M_HELLASWAG = 0.2955  # OpenAI's weights, karpathy acc_norm, as build-nanogpt reports
HELLASWAG_EXAMPLES = 10_042
COLORS = ("#2a6fbb", "#d1495b", "#3d9970", "#e0a030", "#7b5ea7", "#4a4a4a")


def plot(runs: list[Path], out: Path, x: Literal["steps", "tokens"] = "steps") -> None:
    """Plot losses, HellaSwag accuracy, learning rate, gradient norm and throughput of the runs into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {path: read_log(path / "log.csv") for path in runs}
    plt.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
    })  # fmt: skip
    figure, axes = plt.subplot_mosaic([["loss"] * 2 + ["hellaswag"], ["lr", "norm", "speed"]], figsize=(11, 6.2))  # type: ignore[list-item]
    titles = {
        "loss": "loss (nats per token)", "hellaswag": "HellaSwag (karpathy acc_norm)", "lr": "learning rate",
        "norm": "gradient norm", "speed": "tokens per second",
    }  # fmt: skip
    for name, title in titles.items():
        axes[name].set_title(title)
        axes[name].set_xlabel(x)
    for (path, rows), color in zip(logs.items(), COLORS * len(logs), strict=False):
        tokens_by_step = {row["step"]: row["tokens"] for row in rows}

        def plot_line(
            axis: str, name: str, rows=rows, tokens_by_step=tokens_by_step, **style: Any
        ) -> tuple[list, list[float]]:
            steps, values = column(rows, name)
            positions = [tokens_by_step[step] for step in steps] if x == "tokens" else steps
            axes[axis].plot(positions, values, **style)
            return positions, values

        name = path.name
        plot_line("loss", "loss", color=color, alpha=0.35, linewidth=0.8, label=f"{name}: training")
        marker = {"marker": "o", "markersize": 3.5, "linewidth": 1.6} if len(column(rows, "val_loss")[0]) < 60 else {}
        positions, val = plot_line("loss", "val_loss", color=color, label=f"{name}: validation", **marker)
        if val:
            axes["loss"].annotate(
                f"{val[-1]:.3f}", (positions[-1], val[-1]), textcoords="offset points",
                xytext=(4, 7), color=color, ha="right",
                bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "edgecolor": "none"},
            )  # fmt: skip
        tokens = tokens_by_step if x == "tokens" else None
        _plot_hellaswag(axes["hellaswag"], rows, tokens, color, name, _num_examples(path))
        plot_line("lr", "lr", color=color)
        plot_line("norm", "grad_norm", color=color, linewidth=0.8)
        plot_line("speed", "tokens_per_s", color=color, linewidth=0.8)
    for value, text in ((GPT2_124M_HELLASWAG, "GPT-2 124M, 0.2955"), (0.25, "chance")):
        axes["hellaswag"].axhline(value, color="black", linestyle="--", linewidth=0.8)
        transform = axes["hellaswag"].get_yaxis_transform()
        axes["hellaswag"].text(0.02, value, text, transform=transform, va="bottom", fontsize=8)
    axes["hellaswag"].set_xlim(axes["loss"].get_xlim())
    axes["speed"].set_ylim(bottom=0)
    for axis in axes.values():
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes["speed"].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes["loss"].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _plot_hellaswag(
    axis, rows: list[dict], tokens_by_step: dict[int, int] | None, color: str, name: str, num_examples: int
) -> None:
    """Plot the accuracy, with its standard error unless `num_examples` is 0 (unknown)."""
    steps, values = column(rows, "hellaswag")
    errors = [math.sqrt(p * (1 - p) / max(1, num_examples - 1)) if num_examples else 0.0 for p in values]
    positions = [tokens_by_step[step] for step in steps] if tokens_by_step else steps
    axis.errorbar(positions, values, yerr=errors, color=color, marker="o", markersize=3.5, capsize=2, label=name)


def _num_examples(run: Path) -> int:
    """Return the number of HellaSwag examples that a run evaluates, from its config.json, or 0 if it is unknown."""
    try:
        evaluation = json.loads((run / "config.json").read_text(encoding="utf-8"))["evaluation"]
        is_default = evaluation["file"] is None and evaluation["language"] == "en"
        return evaluation["limit"] or (HELLASWAG_EXAMPLES if is_default else 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
