"""The audit: an honest run passes to the bit, a run that was tampered with does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import call, save_hellaswag
from safetensors.torch import load_file, save_file

import audit
import checkpoint
import train
from runs import STEPS, cut_back_to, flags


@pytest.fixture(scope="module")
def honest(dataset, tmp_path_factory) -> Path:
    """A run with HellaSwag, stopped and gone on with."""
    folder = tmp_path_factory.mktemp("honest")
    changes = {
        "saving__every_n_steps": 4, "evaluation__every_n_steps": 4, "sampling__every_n_steps": 0,
        "evaluation__file": save_hellaswag(folder / "questions.jsonl", 6),
    }  # fmt: skip
    call(train.main, *flags(dataset, folder / "first", **changes))
    run = cut_back_to(folder / "first", 8, folder / "run")
    call(train.main, *flags(dataset, run, general__init_from="resume", **changes))
    return run


def verdict(run: Path, *arguments: object) -> int:
    try:
        call(audit.main, run, "--device", "cpu", *arguments)
    except SystemExit as end:
        return end.code
    return 0


def test_an_honest_run_comes_out_equal_to_the_bit(honest, capsys):
    before = {path: path.stat().st_mtime_ns for path in honest.rglob("*")}
    assert verdict(honest) == 0
    out = capsys.readouterr().out
    assert out.count("equal to the bit") == 4, out
    assert f"steps 12 to {STEPS}: equal" in out
    assert "run is what it says, by 4 samples" in out
    assert before == {path: path.stat().st_mtime_ns for path in honest.rglob("*")}, "nothing is written to it"


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def better_loss(run: Path) -> None:
    lines = (run / "log.csv").read_text().splitlines()
    cells = lines[7].split(",")
    cells[3] = repr(float(cells[3]) - 1e-6)
    (run / "log.csv").write_text("\n".join([*lines[:7], ",".join(cells), *lines[8:]]) + "\n")


def better_score(run: Path) -> None:
    lines = (run / "log.csv").read_text().splitlines()
    cells = lines[-1].split(",")
    cells[6] = "1.0"
    (run / "log.csv").write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")


def without_a_bad_step(run: Path) -> None:
    lines = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text("\n".join(lines[:6] + lines[7:]) + "\n")


def with_manifest(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change of the last checkpoint by someone who knows how its files are verified."""

    def tamper(run: Path) -> None:
        path = checkpoint.checkpoints(run)[-1]
        change(path)
        hashes = {name: checkpoint._sha256(path / name) for name in ("model.safetensors", "optimizer.pt", "state.json")}
        (path / "manifest.json").write_text(json.dumps({"files": hashes}))

    return tamper


def other_weights(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["wte.weight"][0, 0] += 1e-6
    save_file(tensors, path / "model.safetensors")


def other_optimizer(path: Path) -> None:
    tensors = torch.load(path / "optimizer.pt", weights_only=True)
    tensors["wte.weight"]["exp_avg"] += 1e-9
    torch.save(tensors, path / "optimizer.pt")


def other_rate(path: Path) -> None:
    rewrite(path / "state.json", '"max_lr": 0.01', '"max_lr": 0.011')
    rewrite(path.parents[1] / "config.json", '"max_lr": 0.01', '"max_lr": 0.011')


def other_settings(run: Path) -> None:
    rewrite(run / "config.json", '"max_lr": 0.01', '"max_lr": 0.003')


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (better_loss, "log.csv, step 6: loss is"),
        (better_score, f"log.csv, step {STEPS}: hellaswag is 1.0"),
        (without_a_bad_step, "log.csv: row 5 is of step 6"),
        (with_manifest(other_weights), "the weights wte.weight differ"),
        (with_manifest(other_optimizer), "the optimizer's wte.weight differs"),
        (with_manifest(other_rate), "lr is"),
        (other_settings, "config.json: optimizer.max_lr is not the 0.01"),
    ],
)
def test_a_run_that_was_tampered_with_is_caught(tamper, words, honest, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    tamper(run)
    assert verdict(run) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "run is NOT what it says" in out
