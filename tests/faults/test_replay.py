"""tools.replay: an unmodified run is reproduced bitwise, and a manipulated run fails the verification."""

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
def settings(tmp_path_factory) -> dict[str, object]:
    return {
        "saving__every_n_steps": 4, "evaluation__every_n_steps": 4, "sampling__every_n_steps": 0,
        "evaluation__file": save_hellaswag(tmp_path_factory.mktemp("hellaswag") / "questions.jsonl", 6),
    }  # fmt: skip


@pytest.fixture(scope="module")
def original(settings, dataset, tmp_path_factory) -> Path:
    """A run with HellaSwag that was killed and resumed."""
    directory = tmp_path_factory.mktemp("original")
    call(train.main, *flags(dataset, directory / "first", **settings))
    run = copy_killed_run(directory / "first", 8, directory / "run")
    call(train.main, *flags(dataset, run, general__init_from="resume", **settings))
    return run


def exit_code(run: Path, *arguments: object) -> int:
    """Return the exit code of tools.replay."""
    try:
        call(replay.main, run, "--device", "cpu", *arguments)
    except SystemExit as error:
        return error.code
    return 0


def test_unmodified_run_is_reproduced_bitwise(original, capsys):
    """All segments of a resumed run are reproduced, and nothing is written to its directory."""
    before = {path: path.stat().st_mtime_ns for path in original.rglob("*")}
    assert exit_code(original) == 0
    out = capsys.readouterr().out
    assert out.count("bitwise equal") == 4, out
    assert f"steps 12 to {STEPS}: reproduced, bitwise equal" in out
    assert "run: verification passed, 4 segments" in out
    assert before == {path: path.stat().st_mtime_ns for path in original.rglob("*")}, "nothing is written to it"


def test_changed_settings_and_ranks_are_replayed(dataset, tmp_path, capsys):
    """A run of two ranks with a stop, a resume and changed settings between two checkpoints is reproduced by two ranks
    bitwise, and by one rank within the tolerances."""
    run = tmp_path / "run"
    arguments = flags(
        dataset,
        run,
        general__init_from="resume",
        saving__every_n_steps=6,
        sampling__every_n_steps=0,
        model__dropout=0.0,
    )
    fork_ranks(2, *arguments, fault="sigterm 1 8")
    fork_ranks(2, *arguments, "--optimizer.max-lr", 0.02, "--validation.every-n-steps", 5)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)] == [6, 11, 12, STEPS]
    shutil.rmtree(run / "checkpoints" / "step_00000011")
    replayed = torchrun(2, run, "--device", "cpu", script="tools.replay", check=False)
    assert replayed.stdout.count("bitwise equal") == 3, replayed.stdout
    log = (run / "log.csv").read_text()
    lower_loss(run)
    replayed = torchrun(2, run, "--device", "cpu", script="tools.replay", check=False)
    assert "verification FAILED" in replayed.stdout
    assert "Another rank exited" not in replayed.stderr, "all ranks know the result"
    (run / "log.csv").write_text(log)
    assert exit_code(run) == 0
    out = capsys.readouterr().out
    assert "steps 6 to 12: ranks was 2 and is now 1" in out
    assert "of the distance they moved" in out


def test_launch_without_a_new_checkpoint_is_ignored(original, settings, dataset, tmp_path, capsys):
    """A launch with different settings that saves no checkpoint changes neither config.json nor the verification."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    config = json.loads((run / "config.json").read_text())
    call(
        train.main, *flags(dataset, run, general__init_from="resume", **settings),
        "--training.compare-ranks-every-n-steps", 7,
    )  # fmt: skip
    assert json.loads((run / "config.json").read_text()) == config
    assert exit_code(run, "--segments", 1) == 0


def test_extended_run_is_reproduced_bitwise(original, settings, dataset, tmp_path, capsys):
    """A finished run that was resumed with more max_steps is reproduced."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    call(train.main, *flags(dataset, run, general__init_from="resume", **settings | {"training__max_steps": STEPS + 3}))
    assert exit_code(run, "--segments", 9) == 0
    assert capsys.readouterr().out.count("bitwise equal") == 6


def test_other_versions_have_tolerances(original, tmp_path, capsys):
    """With another PyTorch, rounding differences pass, but values that rounding does not affect must be equal."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    for i in range(len(checkpoint.list_checkpoints(run))):
        then_update_manifest(lambda path: rewrite(path / "state.json", '"torch": "', '"torch": "1'), i)(run)
    lines = (run / "log.csv").read_text().splitlines()
    columns = lines[0].split(",")

    def exit_code_with(column: str, factor: float) -> int:
        cells = lines[7].split(",")
        i = columns.index(column)
        cells[i] = repr(float(cells[i]) * factor)
        (run / "log.csv").write_text("\n".join([*lines[:7], ",".join(cells), *lines[8:]]) + "\n")
        return exit_code(run)

    changes = (("loss", 1.01), ("grad_norm", 1.5), ("loss", 0.97), ("lr", 1.001))
    assert [exit_code_with(*change) for change in changes] == [0, 0, 1, 1]
    assert "of the distance they moved" in capsys.readouterr().out


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def lower_loss(run: Path) -> None:
    lines = (run / "log.csv").read_text().splitlines()
    cells = lines[7].split(",")
    cells[3] = repr(float(cells[3]) - 1e-6)
    (run / "log.csv").write_text("\n".join([*lines[:7], ",".join(cells), *lines[8:]]) + "\n")


def higher_score(run: Path) -> None:
    lines = (run / "log.csv").read_text().splitlines()
    cells = lines[-1].split(",")
    cells[6] = "1.0"
    (run / "log.csv").write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")


def delete_row(run: Path) -> None:
    lines = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text("\n".join(lines[:6] + lines[7:]) + "\n")


def then_update_manifest(change: Callable[[Path], None], index: int = -1) -> Callable[[Path], None]:
    """Return a function that changes a checkpoint of a run, by default the last one, and updates its manifest."""

    def manipulate(run: Path) -> None:
        path = checkpoint.list_checkpoints(run)[index]
        change(path)
        hashes = {name: checkpoint.sha256(path / name) for name in ("model.safetensors", "optimizer.pt", "state.json")}
        (path / "manifest.json").write_text(json.dumps({"files": hashes}))

    return manipulate


def change_weights(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["wte.weight"][0, 0] += 1e-6
    save_file(tensors, path / "model.safetensors")


def change_optimizer(path: Path) -> None:
    tensors = torch.load(path / "optimizer.pt", weights_only=True)
    tensors["wte.weight"]["exp_avg"] += 1e-9
    torch.save(tensors, path / "optimizer.pt")


def change_max_lr(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"max_lr": 0.01', '"max_lr": 0.011'))
    rewrite(path.parents[1] / "config.json", '"max_lr": 0.01', '"max_lr": 0.011')


def change_first_max_lr(path: Path) -> None:
    rewrite(path / "state.json", '"max_lr": 0.01', '"max_lr": 0.011')


def delete_optimizer(path: Path) -> None:
    torch.save({}, path / "optimizer.pt")


def change_config(run: Path) -> None:
    rewrite(run / "config.json", '"max_lr": 0.01', '"max_lr": 0.003')


@pytest.mark.parametrize(
    ("manipulate", "message"),
    [
        (lower_loss, "log.csv, step 6: loss is"),
        (higher_score, f"log.csv, step {STEPS}: hellaswag is 1.0"),
        (delete_row, "log.csv: row 5 has step 6"),
        (then_update_manifest(change_weights), "the weights wte.weight differ"),
        (then_update_manifest(change_optimizer), "the optimizer state of wte.weight differs"),
        (then_update_manifest(delete_optimizer), "its tensors have other names"),
        (then_update_manifest(change_max_lr), "log.csv, step 12: lr is"),
        (then_update_manifest(change_first_max_lr), "step 4: its launches are not those"),
        (change_config, "config.json: optimizer.max_lr is 0.003, but 0.01"),
    ],
)
def test_manipulated_run_fails_verification(manipulate, message, original, tmp_path, capsys):
    """Every change of the log, the settings, the weights or the optimizer is reported with its place."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    manipulate(run)
    assert exit_code(run) == 1
    out = capsys.readouterr().out
    assert message in out
    assert "run: verification FAILED" in out
