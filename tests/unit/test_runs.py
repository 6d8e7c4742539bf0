"""tools.runs: a table of runs with their settings, results and states."""

import csv
import dataclasses
import fcntl
import io
import json

import pytest
from support.helpers import call
from support.runs import flags

import train
from arguments import to_json
from babygpt.errors import UserError
from babygpt.settings import variant
from babygpt.training.log import Log
from tools import runs
from train_config import preset


def make_run(path, losses: list[float], name: str = "gpt2", note: str = "", marker: str | None = "finished"):
    path.mkdir(parents=True)
    log = Log(path / "log.csv")
    for step, loss in enumerate(losses):
        row = {"step": step, "tokens": step * 1000, "epoch": 0, "val_loss": loss, "val_bpb": loss / 4}
        log.write(row | {"tokens_per_s": 100.0 + step})
    model = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}
    config = variant(preset(name), general={"note": note}, model=model)
    (path / "config.json").write_text(json.dumps(to_json(config)))
    if marker:
        (path / marker).touch()
    return path


@pytest.fixture
def out(tmp_path):
    make_run(tmp_path / "out" / "a", [5.0, 3.0, 4.0], note="lower rate, żółw")
    make_run(tmp_path / "out" / "b", [5.0, 2.5], "modern", marker="stopped")
    make_run(tmp_path / "out" / "sweep" / "c", [], marker=None)
    return tmp_path / "out"


def table(capsys, *arguments) -> list[list[str]]:
    """Return the cells of the csv output."""
    call(runs.main, *arguments, "--format", "csv")
    return list(csv.reader(io.StringIO(capsys.readouterr().out)))


def test_table_has_settings_and_best_results(out, capsys):
    header, *rows = table(capsys, out)
    b, a, c = (dict(zip(header, row, strict=True)) for row in rows)
    assert (a["run"], a["preset"], a["tokens"], a["note"]) == (f"{out}/a", "gpt2", "2000", "lower rate, żółw")
    assert (a["val_loss"], a["val_bpb"], a["tokens_per_s"], a["hellaswag"]) == ("3.0", "0.75", "101.0", "")
    assert int(a["parameters"]) == 300 * 16 + 8 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16
    assert (b["run"], b["state"], b["val_loss"]) == (f"{out}/b", "stopped", "2.5")
    assert (c["run"], c["state"], c["val_loss"], c["tokens"]) == (f"{out}/sweep/c", "interrupted", "", "0")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sort", "val_loss"], "b a c"), (["--sort", "tokens"], "a b c"), (["--sort", "note"], "a b c"),
        (["--sort", "parameters"], "b a c"), (["--where", "note=LOWER"], "a"), (["--where", "state=st"], "b"),
        (["--where", "preset=gpt2", "--where", "state=interrupted"], "c"), (["--where", "val_loss=7"], ""),
    ],
)  # fmt: skip
def test_runs_are_sorted_and_filtered(arguments, expected, out, capsys):
    assert [row[0][-1] for row in table(capsys, out, *arguments)[1:]] == expected.split()


def test_formats_contain_the_same_runs(out, capsys):
    call(runs.main, out)
    header, *lines = capsys.readouterr().out.splitlines()
    names = [field.name for field in dataclasses.fields(runs.RunSummary)]
    assert header.split() == [name for name in names if name != "hellaswag"], "no run has a score"
    assert [line.split()[0] for line in lines] == [f"{out}/b", f"{out}/a", f"{out}/sweep/c"]
    assert lines[1].endswith("3.0000   0.7500           101  finished     lower rate, żółw")
    call(runs.main, out, "--format", "json")
    assert [row["val_loss"] for row in json.loads(capsys.readouterr().out)] == [2.5, 3.0, None]
    call(runs.main, out, "--where", "run=nothing")
    assert capsys.readouterr().out == "No run matches run=nothing.\n"


def test_locked_run_is_running_even_after_a_stop(out):
    with open(out / "b" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert runs.find_state(out / "b") == "running"
    assert runs.find_state(out / "b") == "stopped"


def test_log_of_another_program_does_not_hide_the_runs(out, capsys):
    (out / "a" / "log.csv").write_text("time,value\n1,2\n")
    assert [row[0][-1] for row in table(capsys, out)[1:]] == ["b", "c"]


def test_run_without_a_readable_config_is_listed(out, capsys):
    (out / "a" / "config.json").write_text("{")
    config = json.loads((out / "b" / "config.json").read_text())
    (out / "b" / "config.json").write_text(json.dumps(config | {"model": {"unknown": 1}}))
    _, b, a, _ = table(capsys, out)
    assert a[:3] == [f"{out}/a", "", ""]
    assert b[:3] == [f"{out}/b", "modern", ""]


def test_note_of_a_run_is_listed(dataset, tmp_path, capsys):
    call(train.main, *flags(dataset, tmp_path / "run", training__max_steps=1), "--note", "a remark")
    capsys.readouterr()
    _, row = table(capsys, tmp_path / "run")
    assert row[-2:] == ["finished", "a remark"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["none"], "There are no runs in none: no log.csv"), (["--where", "state"], "is not COLUMN=TEXT"),
     (["--where", "states=x"], "Use one of run, preset")],
)  # fmt: skip
def test_wrong_arguments_are_explained(arguments, message, out, monkeypatch):
    monkeypatch.chdir(out.parent)
    with pytest.raises(UserError, match=message):
        call(runs.main, *arguments)
