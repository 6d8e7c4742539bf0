"""log.csv and samples.txt: floats are exact, and each step occurs once after any resume."""

import math
import random

import pytest

from babygpt.errors import UserError
from babygpt.training.log import Log, SampleLog, read_log


def row(step: int) -> dict:
    rng = random.Random(step)
    return {"step": step, "tokens": step * 100, "epoch": 0, "loss": rng.random() * math.pi, "lr": 1e-4 * rng.random()}


def test_rows_are_read_back_exactly(tmp_path):
    log = Log(tmp_path / "log.csv")
    for step in range(50):
        log.write(row(step))
    assert [{k: v for k, v in read.items() if v is not None} for read in read_log(tmp_path / "log.csv")] == [
        row(step) for step in range(50)
    ]


@pytest.mark.parametrize("num_bytes", [1, 7, 40])
def test_resumed_log_has_every_step_once(num_bytes, tmp_path):
    """An incomplete last line and the rows from the resumed step on are removed; earlier rows are kept."""
    path = tmp_path / "log.csv"
    log = Log(path)
    for step in range(20):
        log.write(row(step))
    path.write_bytes(path.read_bytes()[:-num_bytes])  # the process was killed while it wrote a line
    log = Log(path, step=12)
    for step in range(12, 20):
        log.write(row(step))
    assert [read["step"] for read in read_log(path)] == list(range(20))


def test_other_csv_file_and_corrupted_line_are_rejected(tmp_path):
    """A corrupted line is accepted only if a resume removes it anyway."""
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other.csv is not a log"):
        read_log(tmp_path / "other.csv")
    Log(tmp_path / "log.csv").write(row(0))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("zero,1,0" + "," * 10 + "\n")
    with pytest.raises(UserError, match=r"Line 3 of .*log.csv"):
        read_log(tmp_path / "log.csv")
    Log(tmp_path / "log.csv", 1)  # the corrupted line is removed
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [0]
    (tmp_path / "log.csv").write_bytes(bytes(100) + b"\n")
    Log(tmp_path / "log.csv")
    assert read_log(tmp_path / "log.csv") == []


def test_samples_are_table_rows_and_resume_removes_later_ones(tmp_path):
    samples = SampleLog(tmp_path / "samples.txt", 0)
    separators = "a\x0bb\x0cc\x1cd\x85e\u2028f"  # str.splitlines would split at each
    for step in (5, 10, 15):
        samples.write(step, [f"one | at\n{step}", separators])
    with open(tmp_path / "samples.txt", "ab") as file:
        file.write(b"| 10 | \xff")  # not UTF-8, as after a power failure
    SampleLog(tmp_path / "samples.txt", 10)
    expected = SampleLog.HEADER + f"| 5 | one \\| at<br>5 |\n| 5 | {separators} |\n"
    assert (tmp_path / "samples.txt").read_bytes().decode() == expected
