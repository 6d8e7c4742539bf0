"""List runs with their settings and results.

    python -m tools.runs                                   # all runs in out/, the best validation loss first
    python -m tools.runs out/ --sort tokens --where preset=modern --where state=finished
    python -m tools.runs out/ --format csv > runs.csv

Losses in nats per token are comparable only between runs with the same tokenizer. For DPO, val_loss is the last loss of
the chosen answers, per token. Bits per byte are comparable between all runs with the same validation text.
"""

import csv
import fcntl
import io
import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import Positional

from babygpt.console import console
from babygpt.constraints import metavar, parse_arguments
from babygpt.errors import UserError, run
from babygpt.training import run_dir
from babygpt.training.log import column, read_log
from model import build_model, config_from_dict

THROUGHPUT_STEPS = 100  # the throughput is the median over this many of the latest steps

State = Literal["running", "finished", "stopped", "interrupted", "unknown"]


@dataclass(frozen=True)
class RunSummary:
    """A row of the table. None: not measured, or config.json is missing or of another version."""

    run: str  # path of the run directory
    preset: str | None
    parameters: int | None
    tokens: int  # number of tokens trained on
    val_loss: float | None  # lowest validation loss, or the last loss of chosen answers of DPO, in nats per token
    val_bpb: float | None  # lowest validation loss, in bits per byte
    hellaswag: float | None  # highest accuracy
    tokens_per_s: float | None
    state: State
    note: str | None


@dataclass(frozen=True, kw_only=True)
class RunsArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # run directories, or directories that contain run directories
    paths: Annotated[Positional[tuple[Path, ...]], metavar("[PATH ...]")] = (Path("out"),)
    # column to sort by: losses ascending, other numbers descending, runs without a value last
    sort: Literal[
        "run", "preset", "parameters", "tokens", "val_loss", "val_bpb", "hellaswag", "tokens_per_s", "state", "note"
    ] = "val_loss"
    # list only the runs in which this column contains this text; can be repeated
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, metavar("COLUMN=TEXT", "all runs")] = ()
    format: Literal["table", "csv", "json"] = "table"  # format of the list


def find_runs(paths: tuple[Path, ...]) -> list[Path]:
    """Return the directories with a log.csv, up to two levels below the paths. UserError if there are none."""
    patterns = ("log.csv", "*/log.csv", "*/*/log.csv")
    found = {log.parent for path in paths for pattern in patterns for log in path.glob(pattern)}
    if not found:
        raise UserError(
            f"There are no runs in {', '.join(map(str, paths))}: no log.csv was found up to two levels below. Use a "
            "directory that train.py wrote."
        )
    return sorted(found)


def summarize(path: Path) -> RunSummary:
    """Read the files of a run."""
    config, rows = run_dir.read_config(path / "config.json"), read_log(path / "log.csv")
    general = config.get("general", {})

    def values(name: str) -> list[float]:
        return column(rows, name)[1]

    is_dpo = "val_sft_loss" in (rows[0] if rows else {})  # its loss is lowest at the start
    speeds = values("tokens_per_s")[-THROUGHPUT_STEPS:]
    return RunSummary(
        run=str(path),
        preset=general.get("preset") or None,
        parameters=count_parameters(config.get("model")),
        tokens=rows[-1]["tokens"] if rows else 0,
        val_loss=min(values("val_sft_loss")[-1:] if is_dpo else values("val_loss"), default=None),
        val_bpb=min(values("val_bpb"), default=None),
        hellaswag=max(values("hellaswag"), default=None),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        state=find_state(path),
        note=general.get("note") or None,
    )


def count_parameters(model: dict[str, Any] | None) -> int | None:
    """Return the number of parameters of the model section of a config.json, None if it is of another version."""
    try:
        with torch.device("meta"):
            return build_model(config_from_dict(model)).num_params() if model else None
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None


def find_state(path: Path) -> State:
    """Return the state of a run from its marker files and its lock."""
    if (path / run_dir.FINISHED).exists():
        return "finished"
    try:
        with open(path / run_dir.LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except FileNotFoundError:
        pass
    except OSError:  # no permission, or a file system without locks
        return "unknown"
    return "stopped" if (path / run_dir.STOPPED).exists() else "interrupted"


def matches(summary: RunSummary, condition: str) -> bool:
    """Return whether a column contains a text, for a condition COLUMN=TEXT."""
    name, equals, text = condition.partition("=")
    values = asdict(summary)
    if not equals or name not in values:
        raise UserError(f"--where {condition} is not COLUMN=TEXT with a known column. Use one of {', '.join(values)}.")
    return text.lower() in str("" if values[name] is None else values[name]).lower()


def sort_key(summary: RunSummary, name: str) -> tuple:
    value = getattr(summary, name)
    descending = isinstance(value, int | float) and name not in ("val_loss", "val_bpb")
    return value is None, 0 if value is None else -value if descending else value, summary.run


def format_table(summaries: list[RunSummary]) -> str:
    """Return an aligned table, with numbers on the right, without columns that have no value in any run."""
    formats = {"parameters": "{:,}", "tokens": "{:,}", "tokens_per_s": "{:,.0f}"}
    formats |= dict.fromkeys(("val_loss", "val_bpb", "hellaswag"), "{:.4f}")
    columns = []
    for field in fields(RunSummary):
        values = [getattr(summary, field.name) for summary in summaries]
        if any(value is not None for value in values):
            texts = ["" if value is None else formats.get(field.name, "{}").format(value) for value in values]
            texts = [" ".join(text.split()) for text in texts]  # a note may have several lines
            width = max(map(len, [field.name, *texts]))
            align = str.rjust if field.name in formats else str.ljust
            columns.append([align(text, width) for text in (field.name, *texts)])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def main() -> None:
    args = parse_arguments(RunsArgs, "python -m tools.runs", __doc__)
    summaries = []
    for path in find_runs(args.paths):
        try:
            summaries.append(summarize(path))
        except (UserError, OSError) as error:  # a log.csv of another program, or of another user
            console.warning(str(error))
    summaries = [summary for summary in summaries if all(matches(summary, condition) for condition in args.where)]
    summaries.sort(key=lambda summary: sort_key(summary, args.sort))
    if args.format == "json":
        print(json.dumps([asdict(summary) for summary in summaries], indent=1, ensure_ascii=False))
    elif args.format == "csv":
        text = io.StringIO()
        rows = [asdict(summary).values() for summary in summaries]
        csv.writer(text, lineterminator="\n").writerows([[field.name for field in fields(RunSummary)], *rows])
        print(text.getvalue(), end="")
    else:
        print(format_table(summaries) if summaries else f"No run matches {' and '.join(args.where)}.")


if __name__ == "__main__":
    run(main)
