"""Write report.html: a page with the curves, scores, samples and settings of runs, which needs no server.

>>> write_report(read_runs([Path("out/gpt2")]), Path("out/gpt2/report.html"))
"""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from babygpt import files
from babygpt.errors import UserError
from babygpt.training import checkpoint, run_dir
from babygpt.training.log import COLUMNS, Row, column, loss_unit, read_samples, read_scores, standard_error
from babygpt.training.plots import HELLASWAG_EXAMPLES, Curves, Unit, smoothing_length

TEMPLATE = Path(__file__).with_name("report.html")  # the data replaces DATA in it
BINS = 3000  # longer curves are reduced to at most this many bins, each with its mean, minimum and maximum
NOISY = {"loss", "grad_norm", "tokens_per_s", "mfu", "step_ms"}  # columns whose minimum and maximum are shown


def write_report(runs: list[Curves], out: Path, x: Unit = "steps", smooth: int | None = None) -> None:
    """Write a page with the results of the runs. `x` and `smooth` are initial settings, as in `plots.plot`."""
    smooth = smooth or max(smoothing_length(len(run.column("loss")[1])) for run in runs)
    data = {"runs": [run_data(run) for run in runs], "x": x, "smooth": smooth}
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so that no sample contains </script>
    files.write(out, TEMPLATE.read_text(encoding="utf-8").replace("DATA", text).encode(errors="replace"))


def run_data(run: Curves) -> dict[str, Any]:
    """Return what the page shows about a run, in the format that report.html describes."""
    axes: list[dict[str, list]] = []
    columns: dict[str, dict[str, Any]] = {}
    for name in list(run.rows[0] if run.rows else COLUMNS)[1:]:  # finetuning may have more columns
        steps, values = column(run.rows, name)
        if values:
            is_noisy = name in NOISY or (name not in COLUMNS and not name.startswith("val_"))
            axis, columns[name] = bin_values(steps, values, is_noisy)
            if axis not in axes:
                axes.append(axis)
            columns[name]["axis"] = axes.index(axis)
    if "hellaswag" in columns and run.num_examples:
        columns["hellaswag"]["error"] = [standard_error(p, run.num_examples) for p in columns["hellaswag"]["values"]]
    samples, tasks = run.path / "samples.txt", run.path / "scores.csv"
    return {
        "name": run.name,
        "summary": summarize(run),
        "vocabulary": run.vocabulary,
        "loss_unit": loss_unit(run.rows),
        "has_all_examples": run.num_examples == HELLASWAG_EXAMPLES,
        "axes": axes,
        "columns": columns,
        "scores": [scores(row, run.num_examples) for row in run.rows if row["val_loss"] or row["hellaswag"]],
        "tasks": [[finite(value) for value in row] for row in read_scores(tasks)] if tasks.exists() else [],
        "samples": read_samples(samples) if samples.exists() else [],
        "facts": facts(run.path),
    }


def bin_values(steps: list[int], values: list[float], is_noisy: bool) -> tuple[dict[str, list], dict[str, Any]]:
    """Return the steps or the first and last steps of bins, and the values or the mean of each bin, with 6 digits.

    If `is_noisy`, the second dictionary also has the minimum and maximum of each bin.
    """
    size = math.ceil(len(values) / BINS)
    if size == 1:
        return {"steps": steps}, {"values": round_values(values)}
    starts = np.arange(0, len(values), size)
    ends = np.append(starts[1:], len(values))
    axis = {"first": [steps[i] for i in starts], "last": [steps[i - 1] for i in ends]}
    means = np.add.reduceat(np.asarray(values, np.float64), starts) / (ends - starts)
    binned: dict[str, Any] = {"size": size, "values": round_values(means)}
    if is_noisy:
        binned["low"] = round_values(np.minimum.reduceat(values, starts))
        binned["high"] = round_values(np.maximum.reduceat(values, starts))
    return axis, binned


def round_values(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def finite(value: Any) -> Any:
    """Return a non-finite float as text, which JSON can represent, and any other value unchanged."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def scores(row: Row, num_examples: int) -> list:
    """Return step, tokens, validation loss, bits per byte, HellaSwag accuracy and its standard error.

    The last four are None if they were not measured, or the text "nan" or "inf".
    """
    accuracy = row["hellaswag"]
    error = standard_error(accuracy, num_examples) if accuracy is not None and num_examples else None
    return [finite(value) for value in (row["step"], row["tokens"], row["val_loss"], row["val_bpb"], accuracy, error)]


def summarize(run: Curves) -> str:
    """Return the progress of the run, its note, the steps with a non-finite loss, and the time of the report."""
    if not run.rows:
        return "no steps logged"
    last, total = run.rows[-1], run.setting("training", "max_steps")
    parts = [f"step {last['step']:,}" + (f" of {total:,}" if total else ""), f"{last['tokens']:,} tokens"]
    nonfinite = [row["step"] for row in run.rows if row["loss"] is not None and not math.isfinite(row["loss"])]
    if nonfinite:
        parts.append(f"non-finite loss in {len(nonfinite):,} steps, first in step {nonfinite[0]:,}")
    parts += [run.setting("general", "note") or "", time.strftime("written at %Y-%m-%d %H:%M")]
    return " · ".join(filter(None, parts))


def facts(path: Path) -> dict[str, Any]:
    """Return the settings of a run and, from its newest checkpoint, the data order, tokenizer and versions."""
    sections: dict[str, Any] = dict(run_dir.read_config(path / "config.json"))
    for directory in checkpoint.list_checkpoints(path)[-1:]:
        with suppress(OSError, UserError, KeyError, IndexError, TypeError, ValueError):  # of another version
            state = checkpoint.read_state(directory)
            launches = state["launches"]
            found = {"dataset": state["data"], "tokenizer": state["tokenizer"], "versions": launches[-1]["provenance"]}
            found["launches"] = {"first_steps": [launch["step"] for launch in launches]}
            sections |= {name: dict(values) for name, values in found.items()}
    return {
        f"{section}.{name}": ", ".join(map(str, value)) if isinstance(value, list) else finite(value)
        for section, values in sections.items() for name, value in values.items()
    }  # fmt: skip
