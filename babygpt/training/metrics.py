"""The two records of a run: `log.csv`, a row a step, which plots and comparisons read, and `samples.txt`.

Row k holds the scores of the weights after k updates, then loss, norm and learning rate of update k; the last
row has scores alone. Floats are written so that they read back to the bit; what wasn't measured is empty.
"""

import csv
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from babygpt import files
from babygpt.errors import UserError
from babygpt.training.device import Mark, peak_flops, peak_memory_mib
from babygpt.training.distributed import Ranks

COLUMNS = (
    "step", "tokens", "epoch", "loss", "val_loss", "val_bpb", "hellaswag", "lr", "grad_norm", "tokens_per_s",
    "mfu", "step_ms", "memory_mib",
)  # fmt: skip
INTEGERS = ("step", "tokens", "epoch")
Row = dict[str, Any]  # by column: an int for INTEGERS, else a float, or None where it wasn't measured


class Log:
    """Appends rows to `path`. What a run resumed at `step` had written from there on is cut first."""

    def __init__(self, path: Path, step: int = 0):
        kept = read_log(path, step) if step > 0 and path.exists() else []
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *map(_cells, kept)])
        files.write(path, text.getvalue().encode())
        self.file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115, it stays open as long as the run
        self.writer = csv.writer(self.file, lineterminator="\n")

    def write(self, row: Row) -> None:
        self.writer.writerow(_cells(row))
        self.file.flush()

    def sync(self) -> None:
        """Until the rows are on the disk: a checkpoint must not be there before them."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class NullLog(Log):
    """A log that discards its rows, for ranks other than 0."""

    def __init__(self):
        pass

    def write(self, row: Row) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def _cells(row: Row) -> list:
    return [row.get(column) for column in COLUMNS]  # csv writes None as an empty cell and floats by repr: exact


def read_log(path: Path, before: float = math.inf) -> list[Row]:
    """The rows of a log of steps `before` this one, empty cells as None. A last line that a kill cut short is left
    out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    if lines and tuple(lines[0].split(",")) != COLUMNS:
        raise UserError(f"{path} is no log of BabyGPT: its columns are {lines[0]!r:.300}.")
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = zip(COLUMNS, next(csv.reader([line])), strict=True)
            row: Row = {k: None if v == "" and k != "step" else int(v) if k in INTEGERS else float(v) for k, v in cells}
            if row["step"] < before:
                rows.append(row)
        except (ValueError, csv.Error):
            if rows and rows[-1]["step"] >= before - 1:
                break  # what comes would be cut anyway; a power cut may have damaged it
            raise UserError(f"{path}, line {number} is damaged: {line!r:.300}") from None
    return rows


def column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values where a column was measured."""
    pairs = [(row["step"], row[name]) for row in rows if row[name] is not None and math.isfinite(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


class Samples:
    """`samples.txt`: a row of a Markdown table a sample."""

    HEADER = "| step | sample |\n|---:|---|\n"

    def __init__(self, path: Path, step: int):
        """Cuts what a run resumed at `step` had written from there on."""
        self.path = path
        rows = path.read_text(encoding="utf-8", errors="replace").split("\n")[2:] if path.exists() else []
        kept = [row + "\n" for row in rows if (found := re.match(r"\| (\d+) \|", row)) and int(found[1]) < step]
        files.write(path, (self.HEADER + "".join(kept)).encode())

    def write(self, step: int, texts: list[str]) -> None:
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            for text in texts:
                cell = text.replace("|", "\\|").replace("\r", "").replace("\n", "<br>")
                file.write(f"| {step} | {cell} |\n")


class NullSamples(Samples):
    """Samples that are discarded, for ranks other than 0."""

    def __init__(self):
        pass

    def write(self, step: int, texts: list[str]) -> None:
        pass


@dataclass
class Pending:
    """A step that is on its way: its row of the log, and what the host will read of it a step later."""

    row: Row
    status: torch.Tensor  # on the host, complete once `end` has been waited for
    begin: Mark
    end: Mark

    def speed(self, tokens: int, flops_per_token: int | None, ranks: Ranks) -> dict[str, float]:
        """Time, throughput, memory and MFU of a step of so many tokens, for the log; `end` must have been waited for.

        There is no MFU without FLOPs per token, or if the device's peak is unknown.
        """
        found = {"step_ms": self.end.ms_since(self.begin), "memory_mib": peak_memory_mib(ranks.device)}
        found["tokens_per_s"] = tokens / found["step_ms"] * 1e3
        if flops_per_token and (peak := peak_flops(ranks.device)):
            found["mfu"] = found["tokens_per_s"] * flops_per_token / (peak * ranks.world_size)
        return found


def console_line(row: Row) -> str:
    """A step's row of the log, for the console."""
    mfu = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"step {row['step']:>6} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f} | "
        f"{row['step_ms']:,.0f} ms | {row['tokens_per_s']:,.0f} tokens/s{mfu}"
    )
