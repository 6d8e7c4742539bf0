"""Read and write the log of a run: `log.csv` with one row per step, and `samples.txt`.

Row k of log.csv contains the scores of the weights after k updates, and the loss, gradient norm and learning rate of
update k. The last row has only scores. Floats are written with full precision. An empty cell means that the value was
not measured.
"""

import csv
import io
import math
import os
import re
from pathlib import Path
from typing import Any

from babygpt import files
from babygpt.errors import UserError

COLUMNS = (
    "step", "tokens", "epoch", "loss", "val_loss", "val_bpb", "hellaswag", "lr", "grad_norm", "tokens_per_s",
    "mfu", "step_ms", "memory_mib",
)  # fmt: skip
INTEGERS = ("step", "tokens", "epoch")
Row = dict[str, Any]  # by column: int for INTEGERS, else float; None or missing if it was not measured


class Log:
    """Appends rows to `path`. A run that resumes at `step` first removes the rows from this step on."""

    def __init__(self, path: Path, step: int = 0):
        kept = read_log(path, step) if step > 0 and path.exists() else []
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *map(_cells, kept)])
        files.write(path, text.getvalue().encode())
        self.file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115, it stays open during the run
        self.writer = csv.writer(self.file, lineterminator="\n")

    def write(self, row: Row) -> None:
        self.writer.writerow(_cells(row))
        self.file.flush()

    def sync(self) -> None:
        """Wait until the rows are on disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _cells(row: Row) -> list:
    return [row.get(column) for column in COLUMNS]  # csv writes None as an empty cell, and floats exactly, by repr


def read_log(path: Path, before_step: float = math.inf) -> list[Row]:
    """Return the rows with a step below `before_step`, empty cells as None. An incomplete last line is dropped."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    if lines and tuple(lines[0].split(",")) != COLUMNS:
        raise UserError(f"{path} is not a log.csv of this version of BabyGPT: its columns are {lines[0]!r:.300}.")
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = zip(COLUMNS, next(csv.reader([line])), strict=True)
            row: Row = {k: None if v == "" and k != "step" else int(v) if k in INTEGERS else float(v) for k, v in cells}
            if row["step"] < before_step:
                rows.append(row)
        except (ValueError, csv.Error):
            if rows and rows[-1]["step"] >= before_step - 1:
                break  # later rows are dropped anyway; a power failure may have corrupted them
            raise UserError(f"Line {number} of {path} is corrupted: {line!r:.300}") from None
    return rows


def column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a column was measured, and its values."""
    pairs = [(row["step"], row[name]) for row in rows if row[name] is not None and math.isfinite(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


class SampleLog:
    """`samples.txt`: a Markdown table with one row per sample."""

    HEADER = "| step | sample |\n|---:|---|\n"

    def __init__(self, path: Path, step: int):
        """Open `path`. A run that resumes at `step` first removes the rows from this step on."""
        self.path = path
        rows = path.read_text(encoding="utf-8", errors="replace").split("\n")[2:] if path.exists() else []
        kept = [row + "\n" for row in rows if (match := re.match(r"\| (\d+) \|", row)) and int(match[1]) < step]
        files.write(path, (self.HEADER + "".join(kept)).encode())

    def write(self, step: int, texts: list[str]) -> None:
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            for text in texts:
                cell = text.replace("|", "\\|").replace("\r", "").replace("\n", "<br>")
                file.write(f"| {step} | {cell} |\n")
