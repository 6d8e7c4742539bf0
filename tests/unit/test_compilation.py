"""compilation.py: when a model is compiled, and that a resumed run repeats the decision."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from support.helpers import call
from support.runs import flags

import train
from babygpt.training import compilation
from train_config import preset, variant


def ranks(device: str = "cpu", world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), world_size=world_size)


def resolve(tmp_path, setting="auto", seconds=0.0, monkeypatch=None, ratio=0.5, **fields) -> str:
    """Resolve with passes that take `seconds` for the whole run, and half of it when compiled."""
    config = variant(
        preset("demo"), general={"out_dir": tmp_path}, training={"compile": setting}, model={"vocab_size": 9}
    )
    passes = config.training.batch_tokens // 256 // 16 * config.training.max_steps
    monkeypatch.setattr(compilation.torch, "compile", lambda model, dynamic: "compiled")
    monkeypatch.setattr(
        compilation, "time_pass", lambda model, *_: seconds / passes * (ratio if model == "compiled" else 1)
    )
    return compilation.resolve(config, lambda: torch.nn.Identity(), ranks(**fields))


@pytest.fixture(autouse=True)
def _linux_with_a_compiler(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("setting", "device", "seconds", "expected"),
    [
        ("auto", "cuda", 1.0, "on"), ("auto", "mps", 1e6, "off"), ("auto", "cpu", 60.0, "off"),
        ("auto", "cpu", 3600.0, "on"), ("on", "cpu", 1.0, "on"), ("off", "cuda", 1e6, "off"),
    ],
)  # fmt: skip
def test_auto_compiles_on_cuda_and_for_long_runs_on_a_cpu(setting, device, seconds, expected, tmp_path, monkeypatch):
    assert resolve(tmp_path, setting, seconds, monkeypatch, device=device) == expected


def test_auto_does_not_compile_without_a_compiler_or_on_macos(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None if name == "icpx" else f"/usr/bin/{name}")
    monkeypatch.setenv("CXX", "icpx")
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch) == "off"
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch) == "off"
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch) == "off"


def test_several_ranks_on_a_cpu_are_not_compiled(tmp_path, monkeypatch):
    """Each would decide by its own time, and ranks must run the same code."""
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch, world_size=2) == "off"


@pytest.mark.parametrize("earlier", ["on", "off", "auto"])
def test_resume_on_a_cpu_repeats_the_decision(earlier, tmp_path, monkeypatch):
    """An earlier version stored auto, and did not compile on a CPU."""
    (tmp_path / "config.json").write_text(json.dumps({"training": {"compile": earlier}}))
    assert resolve(tmp_path, seconds=0.0 if earlier == "on" else 1e6, monkeypatch=monkeypatch) == (
        "on" if earlier == "on" else "off"
    )
    assert resolve(tmp_path, seconds=0.0, monkeypatch=monkeypatch, device="cuda") == "on"


def test_slower_compiled_code_is_not_used(tmp_path, monkeypatch):
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch, ratio=0.9) == "on"
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch, ratio=1.1) == "off"


def test_failing_compiler_is_a_warning(tmp_path, monkeypatch, capsys):
    def time_pass(model, *_):
        if model == "compiled":
            raise RuntimeError("C++ compile error")
        return 1e3

    changes = {"general": {"out_dir": tmp_path}, "model": {"vocab_size": 9}, "training": {"compile": "auto"}}
    monkeypatch.setattr(compilation.torch, "compile", lambda model, dynamic: "compiled")
    monkeypatch.setattr(compilation, "time_pass", time_pass)
    config = variant(preset("demo"), **changes)
    assert compilation.resolve(config, lambda: torch.nn.Identity(), ranks()) == "off"
    assert "C++ compile error" in capsys.readouterr().err


def test_short_run_does_not_compile_to_find_out(tmp_path, monkeypatch):
    """A run of three minutes could not save the time of the compilation."""
    assert resolve(tmp_path, seconds=180.0, monkeypatch=monkeypatch, ratio=0.1) == "off"


def test_time_of_a_pass_is_positive_and_without_the_first():
    calls = []

    def model(idx, targets, reduction):
        calls.append(reduction)
        if len(calls) == 1:
            time.sleep(0.2)
        return (idx + targets).float().sum().requires_grad_()

    assert 0 < compilation.time_pass(model, torch.zeros(2, 9, dtype=torch.int64), "float32") < 0.1
    assert set(calls) == {"sum"}


def test_decision_is_stored_and_does_not_change_the_run(dataset, tmp_path):
    """The passes that estimate the duration change neither the weights nor the random numbers of training."""
    weights = {}
    for name, setting in (("estimated", "auto"), ("fixed", "off")):
        changes = {"training__max_steps": 2, "training__compile": setting}
        call(train.main, *flags(dataset, tmp_path / name, **changes))
        weights[name] = (tmp_path / name / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / name / "config.json").read_text())["training"]["compile"] == "off"
    assert weights["estimated"] == weights["fixed"]
