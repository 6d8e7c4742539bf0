"""Read and write the log of a run: `log.csv` with one row per step, `samples.txt`, and `scores.csv`.

Row k of log.csv contains the scores of the weights after k updates, and the loss, gradient norm and learning rate of
update k. The last row has only scores. `elapsed_s` is the time in seconds since the log was opened, after the setup of
the run, without the time between launches. Floats are written with full precision. An empty cell means that the value
was not measured.
"""

import csv
import io
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from babygpt import files
from babygpt.errors import UserError

COLUMNS = (
    "step", "tokens", "epoch", "loss", "val_loss", "val_bpb", "hellaswag", "lr", "grad_norm", "tokens_per_s",
    "mfu", "step_ms", "memory_mib", "elapsed_s",
)  # fmt: skip
INTEGERS = ("step", "tokens", "epoch")
Row = dict[str, Any]  # by column: int for INTEGERS, else float; None or missing if it was not measured


class Log:
    """Appends rows to `path`. A run that resumes at `step` first removes the rows from this step on."""

    def __init__(self, path: Path, step: int = 0, columns: tuple[str, ...] = ()):
        """Open `path`, with `columns` in addition to COLUMNS."""
        self.columns = (*COLUMNS, *columns)
        kept = read_log(path, step) if step > 0 and path.exists() else []
        earlier = sum(row["step_ms"] or 0.0 for row in kept) / 1e3  # if an earlier version wrote the last row
        self.start = time.monotonic() - (kept[-1]["elapsed_s"] or earlier if kept else 0.0)
        files.write(path, _csv_text([self.columns, *map(self._cells, kept)]).encode())
        self.file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115, it stays open during the run
        self.writer = csv.writer(self.file, lineterminator="\n")

    def write(self, row: Row) -> None:
        self.writer.writerow(self._cells({"elapsed_s": self.elapsed_s()} | row))
        self.file.flush()

    def elapsed_s(self) -> float:
        return round(time.monotonic() - self.start, 3)

    def _cells(self, row: Row) -> list:
        return [row.get(column) for column in self.columns]  # csv writes None as an empty cell, and floats by repr

    def sync(self) -> None:
        """Wait until the rows are on disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_log(path: Path, before_step: float = math.inf) -> list[Row]:
    """Return the rows with a step below `before_step`, empty cells as None. An incomplete last line is dropped.

    Logs of earlier versions lack the column elapsed_s, and logs of finetuning may have more columns than COLUMNS.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    names = tuple(lines[0].split(",")) if lines else COLUMNS
    if names[: len(COLUMNS)] != COLUMNS and names != COLUMNS[:-1]:
        raise UserError(f"{path} is not a log.csv of this version of BabyGPT: its columns are {lines[0]!r:.300}.")
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = zip(names, next(csv.reader([line])), strict=True)
            row: Row = {k: None if v == "" and k != "step" else int(v) if k in INTEGERS else float(v) for k, v in cells}
            if row["step"] < before_step:
                rows.append(dict.fromkeys(COLUMNS) | row)
        except (ValueError, csv.Error):
            if rows and rows[-1]["step"] >= before_step - 1:
                break  # later rows are dropped anyway; a power failure may have corrupted them
            raise UserError(f"Line {number} of {path} is corrupted: {line!r:.300}") from None
    return rows


def column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a column was measured, and its values."""
    pairs = [(row["step"], row[name]) for row in rows if row[name] is not None and math.isfinite(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def loss_unit(rows: list[Row]) -> str:
    """Return the unit of loss and val_loss, which for DPO are losses of pairs of answers."""
    return "DPO loss per pair" if rows and "sft_loss" in rows[0] else "nats per token"


def standard_error(accuracy: float, num_examples: int) -> float:
    """Return the standard error of an accuracy, from the sample standard deviation of the scores 0 and 1."""
    return math.sqrt(accuracy * (1 - accuracy) / max(1, num_examples - 1))


SAMPLE_HEADER = re.compile(r"^=== step (\d+), sample \d+ ===\n", re.MULTILINE)


class SampleLog:
    """`samples.txt`: a header per sample, and the text, indented by two spaces."""

    def __init__(self, path: Path, step: int):
        """Open `path`. A run that resumes at `step` first removes the samples from this step on."""
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if step > 0 and path.exists() else ""
        later = (header.start() for header in SAMPLE_HEADER.finditer(text) if int(header[1]) >= step)
        kept = text[: next(later, len(text))]
        files.write(path, (kept + "\n" * bool(kept and not kept.endswith("\n"))).encode())

    def write(self, step: int, texts: list[str]) -> None:
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            for number, text in enumerate(texts, 1):
                indented = "\n".join(f"  {line}" for line in text.replace("\r", "").split("\n"))
                file.write(f"=== step {step}, sample {number} ===\n{indented}\n\n")


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Return the step and text of each sample."""
    text = path.read_text(encoding="utf-8", errors="replace")
    _, *parts = SAMPLE_HEADER.split(text)  # step and lines of each sample, alternating
    indented = [(int(step), lines.removesuffix("\n\n")) for step, lines in zip(parts[::2], parts[1::2], strict=True)]
    return [(step, "\n".join(line[2:] for line in lines.split("\n"))) for step, lines in indented]


SCORE_COLUMNS = ("step", "task", "metric", "value", "stderr", "examples")


class ScoreLog:
    """`scores.csv`: one row per step and metric of the tasks besides HellaSwag. Created with the first scores."""

    def __init__(self, path: Path, step: int):
        """Open `path`. A run that resumes at `step` first removes the scores from this step on."""
        self.path = path
        kept = read_scores(path, step) if step > 0 and path.exists() else []
        if kept:
            files.write(path, _csv_text([SCORE_COLUMNS, *kept]).encode())
        else:
            path.unlink(missing_ok=True)

    def write(self, scores: list[tuple]) -> None:
        """Append scores, each with the values of SCORE_COLUMNS."""
        text = _csv_text(scores if self.path.exists() else [SCORE_COLUMNS, *scores])
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(text)


def _csv_text(rows: Iterable[Iterable]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_scores(path: Path, before_step: float = math.inf) -> list[tuple]:
    """Return the scores with a step below `before_step`, up to the first line that is incomplete or corrupted."""
    text, scores = path.read_text(encoding="utf-8", errors="replace"), []
    for line in text[: text.rfind("\n") + 1].split("\n")[1:-1]:
        try:
            step, task, metric, value, stderr, examples = next(csv.reader([line]))
            scores.append((int(step), task, metric, float(value), float(stderr), int(examples)))
        except (ValueError, csv.Error, StopIteration):
            break
    return [score for score in scores if score[0] < before_step]
