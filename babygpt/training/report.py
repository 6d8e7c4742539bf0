"""Write report.html: a page with the curves, scores, samples and settings of runs, which needs no server.

>>> write_report([Path("out/gpt2")], Path("out/gpt2/report.html"))
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from babygpt import files
from babygpt.errors import UserError
from babygpt.training import checkpoint, run_dir
from babygpt.training.log import COLUMNS, column, read_samples
from babygpt.training.plots import Curves, Unit, read_runs, smoothing_length, standard_error

TEMPLATE = Path(__file__).with_name("report.html")  # contains DATA once, in place of the data
BINS = 3000  # a curve with more values is shown by means of bins of equal size, with their lowest and highest values


def write_report(paths: list[Path], out: Path, x: Unit = "steps", smooth: int | None = None) -> None:
    """Write a page about the runs. `x` and `smooth` are initial settings, as in `babygpt.training.plots.plot`."""
    runs = read_runs(paths, x)
    smooth = smooth or max(smoothing_length(len(run.column("loss")[1])) for run in runs)
    data = {"runs": [run_data(run) for run in runs], "x": x, "smooth": smooth}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    files.write(out, TEMPLATE.read_text(encoding="utf-8").replace("DATA", text).encode(errors="replace"))


def run_data(run: Curves) -> dict[str, Any]:
    """Return what the page shows about a run, in the format that report.html describes."""
    axes: dict[tuple, int] = {}
    columns = {}
    for name in COLUMNS[1:]:
        steps, values = column(run.rows, name)
        if values:
            axis, columns[name] = bin_values(steps, values)
            columns[name]["axis"] = axes.setdefault(tuple(axis), len(axes))
    if "hellaswag" in columns and run.num_examples:
        columns["hellaswag"]["error"] = [standard_error(p, run.num_examples) for p in columns["hellaswag"]["values"]]
    samples = run.path / "samples.txt"
    return {
        "name": run.name,
        "summary": summarize(run),
        "vocabulary": run.vocabulary,
        "axes": list(axes),
        "columns": columns,
        "scores": scores(run),
        "samples": read_samples(samples) if samples.exists() else [],
        "facts": facts(run.path),
    }


def bin_values(steps: list[int], values: list[float]) -> tuple[list[float], dict[str, Any]]:
    """Return the mean step of each bin, and the mean, lowest and highest value of each bin, with 6 digits."""
    size = math.ceil(len(values) / BINS)
    if size == 1:
        return list(steps), {"values": round_values(values)}
    starts = np.arange(0, len(values), size)
    counts = np.diff(starts, append=len(values))
    means, mean_steps = (np.add.reduceat(np.asarray(v, np.float64), starts) / counts for v in (values, steps))
    low, high = (function.reduceat(values, starts) for function in (np.minimum, np.maximum))
    return mean_steps.tolist(), {
        "size": size, "values": round_values(means), "low": round_values(low), "high": round_values(high),
    }  # fmt: skip


def round_values(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def scores(run: Curves) -> list[tuple]:
    """Return step, tokens, validation loss, bits per byte, HellaSwag accuracy and its standard error, or None each."""
    found = []
    for row in run.rows:
        if row["val_loss"] is not None or row["hellaswag"] is not None:
            accuracy, count = row["hellaswag"], run.num_examples
            error = standard_error(accuracy, count) if accuracy is not None and count else None
            values = (row["val_loss"], row["val_bpb"], accuracy, error)
            finite = (value if value is not None and math.isfinite(value) else None for value in values)
            found.append((row["step"], row["tokens"], *finite))
    return found


def summarize(run: Curves) -> str:
    """Return the progress of the run, its note, and the time of the report."""
    if not run.rows:
        return "no step is logged"
    last, total = run.rows[-1], run.setting("training", "max_steps")
    steps = f"step {last['step']:,}" + (f" of {total:,}" if total else "")
    note = run.setting("general", "note")
    parts = (steps, f"{last['tokens']:,} tokens", note, time.strftime("written at %Y-%m-%d %H:%M"))
    return " · ".join(filter(None, parts))


def facts(path: Path) -> dict[str, Any]:
    """Return the settings of a run and, from its newest checkpoint, the data order, tokenizer and versions."""
    sections: dict[str, Any] = dict(run_dir.read_config(path / "config.json"))
    for directory in checkpoint.list_checkpoints(path)[-1:]:
        try:
            state = checkpoint.read_state(directory)
            sections["versions"] = state["launches"][-1]["provenance"]
            sections["launches"] = {"steps": [launch["step"] for launch in state["launches"]]}
            sections |= {f"identity of the {name}": state[name] for name in ("data", "tokenizer")}
        except (OSError, UserError, KeyError, IndexError, TypeError):
            continue  # of another version
    return {
        f"{section}.{name}": ", ".join(map(str, value)) if isinstance(value, list) else value
        for section, values in sections.items() for name, value in values.items()
    }  # fmt: skip
