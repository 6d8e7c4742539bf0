"""compilation.py: when a model is compiled, and that a resumed run repeats the decision."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from support.helpers import call
from support.runs import flags

import train
from babygpt.training import compilation
from model import build_model
from train_config import preset, variant


def ranks(device: str = "cpu", is_main: bool = True, of_rank_0: float | None = None) -> SimpleNamespace:
    """Ranks of which this one is the main process, unless `of_rank_0` is what the main process has decided."""
    return SimpleNamespace(
        device=torch.device(device),
        is_main=is_main,
        world_size=1 if of_rank_0 is None else 2,
        gather=lambda value: [value if of_rank_0 is None else of_rank_0],
    )


def resolve(tmp_path, setting="auto", seconds=0.0, monkeypatch=None, **fields) -> str:
    monkeypatch.setattr(compilation, "estimate_seconds", lambda *_: seconds)
    config = variant(preset("demo"), general={"out_dir": tmp_path}, training={"compile": setting})
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
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch) == "off"
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch) == "off"


def test_all_ranks_follow_the_main_process(tmp_path, monkeypatch):
    """A rank that would decide otherwise by its own time must not run different code."""
    for decision, expected in ((1.0, "on"), (0.0, "off")):
        seconds = 0.0 if decision else 1e6
        found = resolve(tmp_path, seconds=seconds, monkeypatch=monkeypatch, is_main=False, of_rank_0=decision)
        assert found == expected


@pytest.mark.parametrize("earlier", ["on", "off"])
def test_resume_on_a_cpu_repeats_the_decision(earlier, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"training": {"compile": earlier}}))
    assert resolve(tmp_path, seconds=0.0 if earlier == "on" else 1e6, monkeypatch=monkeypatch) == earlier
    assert resolve(tmp_path, seconds=0.0, monkeypatch=monkeypatch, device="cuda") == "on"


def test_estimate_is_proportional_to_the_steps():
    """It covers all steps: ten times the steps take about ten times as long."""
    config = variant(
        preset("demo"), model={"vocab_size": 300, "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32}
    )
    seconds = {}
    for max_steps in (100, 1000):
        config = variant(config, training={"max_steps": max_steps, "dtype": "float32"})
        seconds[max_steps] = compilation.estimate_seconds(config, build_model(config.model), 1)
    assert 0 < seconds[100] < seconds[1000] < 100 * seconds[100]


def test_decision_is_stored_and_does_not_change_the_run(dataset, tmp_path):
    """The passes that estimate the duration change neither the weights nor the random numbers of training."""
    weights = {}
    for name, setting in (("estimated", "auto"), ("fixed", "off")):
        changes = {"training__max_steps": 2, "training__compile": setting}
        call(train.main, *flags(dataset, tmp_path / name, **changes))
        weights[name] = (tmp_path / name / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / name / "config.json").read_text())["training"]["compile"] == "off"
    assert weights["estimated"] == weights["fixed"]
