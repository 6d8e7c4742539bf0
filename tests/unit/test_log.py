"""log.csv and samples.txt: floats are exact, and each step occurs once after any resume."""

import math
import random

import pytest

from babygpt.errors import UserError
from babygpt.training import log as log_module
from babygpt.training.log import Log, SampleLog, column, read_log, read_samples


def row(step: int) -> dict:
    rng = random.Random(step)
    return {"step": step, "tokens": step * 100, "epoch": 0, "loss": rng.random() * math.pi, "lr": 1e-4 * rng.random()}


def test_rows_are_read_back_exactly(tmp_path):
    log = Log(tmp_path / "log.csv")
    for step in range(50):
        log.write(row(step))
    rows = read_log(tmp_path / "log.csv")
    elapsed = [read.pop("elapsed_s") for read in rows]
    assert 0 <= elapsed[0] <= elapsed[-1] < 60
    assert [{k: v for k, v in read.items() if v is not None} for read in rows] == [row(step) for step in range(50)]


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
        file.write("zero,1,0" + "," * 11 + "\n")
    with pytest.raises(UserError, match=r"Line 3 of .*log.csv"):
        read_log(tmp_path / "log.csv")
    Log(tmp_path / "log.csv", 1)  # the corrupted line is removed
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [0]
    (tmp_path / "log.csv").write_bytes(bytes(100) + b"\n")
    Log(tmp_path / "log.csv")
    assert read_log(tmp_path / "log.csv") == []


def test_elapsed_time_does_not_include_the_time_between_launches(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    log = Log(tmp_path / "log.csv")
    for step in range(4):
        now[0] += 10
        log.write(row(step))
    now[0] += 500
    log = Log(tmp_path / "log.csv", step=3)
    now[0] += 10
    log.write(row(3))
    assert column(read_log(tmp_path / "log.csv"), "elapsed_s") == ([0, 1, 2, 3], [10, 20, 30, 40])


def test_log_of_an_earlier_version_is_read_and_continued(tmp_path):
    """It has no elapsed_s."""
    path = tmp_path / "log.csv"
    log = Log(path)
    for step in range(3):
        log.write(row(step))
    path.write_text("".join(f"{line.rsplit(',', 1)[0]}\n" for line in path.read_text().splitlines()))
    assert [read["elapsed_s"] for read in read_log(path)] == [None] * 3
    Log(path, step=3).write(row(3))
    assert column(read_log(path), "elapsed_s")[0] == [3]
    assert [read["loss"] for read in read_log(path)] == [row(step)["loss"] for step in range(4)]


def test_samples_are_read_back_and_resume_removes_later_ones(tmp_path):
    samples, path = SampleLog(tmp_path / "samples.txt", 0), tmp_path / "samples.txt"
    separators = "a\x0bb\x0cc\x1cd\x85e\u2028f"  # str.splitlines would split at each
    texts = ["=== step 7, sample 1 ===\nA header in a text.\n\n", separators, ""]
    for step in (5, 10, 15):
        samples.write(step, texts)
    assert path.read_text(encoding="utf-8").startswith("=== step 5, sample 1 ===\n  === step 7, sample 1 ===\n  A h")
    assert read_samples(path) == [(step, text) for step in (5, 10, 15) for text in texts]
    with open(path, "ab") as file:
        file.write(b"=== step 9, sample 1 ===\n  \xff")  # incomplete and not UTF-8, as after a power failure
    SampleLog(path, 10)
    assert read_samples(path) == [(5, text) for text in texts]
    SampleLog(path, 0)
    assert read_samples(path) == []
