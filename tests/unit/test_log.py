"""log.csv and samples.txt: each step once, floats to the bit, whatever was cut off."""

import math
import random

import pytest

from babygpt.errors import UserError
from babygpt.training.log import Log, Samples, read_log


def row(step: int) -> dict:
    rng = random.Random(step)
    return {"step": step, "tokens": step * 100, "epoch": 0, "loss": rng.random() * math.pi, "lr": 1e-4 * rng.random()}


def test_rows_read_back_to_the_bit(tmp_path):
    log = Log(tmp_path / "log.csv")
    for step in range(50):
        log.write(row(step))
    assert [{k: v for k, v in read.items() if v is not None} for read in read_log(tmp_path / "log.csv")] == [
        row(step) for step in range(50)
    ]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_resume_keeps_earlier_rows_and_every_step_stands_once(cut, tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path)
    for step in range(20):
        log.write(row(step))
    path.write_bytes(path.read_bytes()[:-cut])  # a kill in the middle of a line
    log = Log(path, step=12)
    for step in range(12, 20):
        log.write(row(step))
    assert [read["step"] for read in read_log(path)] == list(range(20))


def test_a_file_that_is_no_log_is_refused_and_a_bad_line_named(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other.csv is not a log"):
        read_log(tmp_path / "other.csv")
    Log(tmp_path / "log.csv").write(row(0))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("zero,1,0" + "," * 10 + "\n")
    with pytest.raises(UserError, match=r"log.csv, line 3"):
        read_log(tmp_path / "log.csv")
    Log(tmp_path / "log.csv", 1)  # what would be cut anyhow may be damaged
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [0]
    (tmp_path / "log.csv").write_bytes(bytes(100) + b"\n")
    Log(tmp_path / "log.csv")
    assert read_log(tmp_path / "log.csv") == []


def test_samples_are_rows_of_a_table_and_are_cut_at_a_resume(tmp_path):
    samples = Samples(tmp_path / "samples.txt", 0)
    odd = "a\x0bb\x0cc\x1cd\x85e\u2028f"  # what splitlines would take for the end of a line
    for step in (5, 10, 15):
        samples.write(step, [f"one | at\n{step}", odd])
    with open(tmp_path / "samples.txt", "ab") as file:
        file.write(b"| 10 | \xff")  # a disk's fault
    Samples(tmp_path / "samples.txt", 10)
    expected = Samples.HEADER + f"| 5 | one \\| at<br>5 |\n| 5 | {odd} |\n"
    assert (tmp_path / "samples.txt").read_bytes().decode() == expected
