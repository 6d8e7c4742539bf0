"""The audit: an honest run passes to the bit, a run that was tampered with does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import call, save_hellaswag
from support.runs import STEPS, copy_killed_run, flags, fork_ranks, torchrun

import train
from babygpt.training import checkpoint
from tools import replay


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict[str, object]:
    return {
        "saving__every_n_steps": 4, "evaluation__every_n_steps": 4, "sampling__every_n_steps": 0,
        "evaluation__file": save_hellaswag(tmp_path_factory.mktemp("hellaswag") / "questions.jsonl", 6),
    }  # fmt: skip


@pytest.fixture(scope="module")
def honest(changes, dataset, tmp_path_factory) -> Path:
    """A run with HellaSwag, stopped and gone on with."""
    folder = tmp_path_factory.mktemp("honest")
    call(train.main, *flags(dataset, folder / "first", **changes))
    run = copy_killed_run(folder / "first", 8, folder / "run")
    call(train.main, *flags(dataset, run, general__init_from="resume", **changes))
    return run


def verdict(run: Path, *arguments: object) -> int:
    try:
        call(replay.main, run, "--device", "cpu", *arguments)
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


def test_a_run_whose_settings_changed_on_the_way_comes_out_equal_too(dataset, tmp_path, capsys):
    """Settings, stop and resume between two checkpoints that were kept; and two ranks."""
    run = tmp_path / "run"
    line = flags(
        dataset,
        run,
        general__init_from="resume",
        saving__every_n_steps=6,
        sampling__every_n_steps=0,
        model__dropout=0.0,
    )
    fork_ranks(2, *line, fault="sigterm 1 8")
    fork_ranks(2, *line, "--optimizer.max-lr", 0.02, "--validation.every-n-steps", 5)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [6, 11, 12, STEPS]
    shutil.rmtree(run / "checkpoints" / "step_00000011")
    audited = torchrun(2, run, "--device", "cpu", script="tools.replay", check=False)
    assert audited.stdout.count("equal to the bit") == 3, audited.stdout
    log = (run / "log.csv").read_text()
    better_loss(run)
    audited = torchrun(2, run, "--device", "cpu", script="tools.replay", check=False)
    assert "is NOT what it says" in audited.stdout
    assert "another rank has ended" not in audited.stderr, "all know the verdict"
    (run / "log.csv").write_text(log)
    assert verdict(run) == 0
    out = capsys.readouterr().out
    assert "steps 6 to 12: ranks was 2, is 1" in out
    assert "of their way apart" in out


def test_a_start_that_saved_nothing_changes_nothing(honest, changes, dataset, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    line = json.loads((run / "config.json").read_text())
    call(
        train.main, *flags(dataset, run, general__init_from="resume", **changes),
        "--training.compare-ranks-every-n-steps", 7,
    )  # fmt: skip
    assert json.loads((run / "config.json").read_text()) == line
    assert verdict(run, "--samples", 1) == 0


def test_a_run_that_was_made_longer_comes_out_equal(honest, changes, dataset, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    call(train.main, *flags(dataset, run, general__init_from="resume", **changes | {"training__max_steps": STEPS + 3}))
    assert verdict(run, "--samples", 9) == 0
    assert capsys.readouterr().out.count("equal to the bit") == 6


def test_on_other_hardware_rounding_passes_and_what_does_not_depend_on_it_must_be_equal(honest, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    for i in range(len(checkpoint.checkpoints(run))):
        with_manifest(lambda path: rewrite(path / "state.json", '"torch": "', '"torch": "1'), i)(run)
    lines = (run / "log.csv").read_text().splitlines()
    columns = lines[0].split(",")

    def with_other(column: str, factor: float) -> int:
        cells = lines[7].split(",")
        at = columns.index(column)
        cells[at] = repr(float(cells[at]) * factor)
        (run / "log.csv").write_text("\n".join([*lines[:7], ",".join(cells), *lines[8:]]) + "\n")
        return verdict(run)

    assert [with_other(*change) for change in (("loss", 1.01), ("grad_norm", 1.5), ("loss", 0.97), ("lr", 1.001))] == [
        0, 0, 1, 1,
    ]  # fmt: skip
    assert "of their way apart" in capsys.readouterr().out


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


def with_manifest(change: Callable[[Path], None], of: int = -1) -> Callable[[Path], None]:
    """A change of a checkpoint, the last one, by someone who knows how its files are verified."""

    def tamper(run: Path) -> None:
        path = checkpoint.checkpoints(run)[of]
        change(path)
        hashes = {name: checkpoint.sha256(path / name) for name in ("model.safetensors", "optimizer.pt", "state.json")}
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
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"max_lr": 0.01', '"max_lr": 0.011'))
    rewrite(path.parents[1] / "config.json", '"max_lr": 0.01', '"max_lr": 0.011')


def other_rate_at_first(path: Path) -> None:
    rewrite(path / "state.json", '"max_lr": 0.01', '"max_lr": 0.011')


def without_momentum(path: Path) -> None:
    torch.save({}, path / "optimizer.pt")


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
        (with_manifest(without_momentum), "holds other tensors than"),
        (with_manifest(other_rate), "log.csv, step 12: lr is"),
        (with_manifest(other_rate_at_first), "step 4 was launched otherwise"),
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
