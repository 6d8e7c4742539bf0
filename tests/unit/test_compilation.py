"""compilation.py: when a model is compiled, and that a resumed run repeats the decision."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import call
from support.runs import flags

import train
from babygpt.errors import ConfigError
from babygpt.training import compilation
from babygpt.training.device import make_deterministic
from babygpt.training.run_dir import provenance
from train_config import preset, variant


def ranks(device: str = "cpu", world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), world_size=world_size)


def resolve(tmp_path, setting="auto", seconds=0.0, monkeypatch=None, ratio=0.5, start=((), 0), **fields) -> str:
    """Resolve with passes that take `seconds` for the whole run, and half of it when compiled.

    `start` has the earlier launches and the first step.
    """
    config = variant(
        preset("demo"),
        general={"out_dir": tmp_path},
        training={"compile": setting, "micro_batch_size": 16},
        model={"vocab_size": 9},
    )
    passes = config.training.batch_tokens // 256 // 16 * config.training.max_steps
    monkeypatch.setattr(compilation.torch, "compile", lambda model, dynamic: "compiled")
    monkeypatch.setattr(
        compilation, "time_pass", lambda model, *_: seconds / passes * (ratio if model == "compiled" else 1)
    )
    return compilation.resolve(config, torch.nn.Identity(), ranks(**fields), *start)


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    make_deterministic(False)


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


@pytest.mark.parametrize(
    ("setting", "device", "ratio", "expected"),
    [("auto", "cpu", 0.5, True), ("auto", "cpu", 1.1, False), ("on", "cpu", 1.0, True), ("off", "cpu", 0.5, False),
     ("on", "cuda", 0.5, False)],
)  # fmt: skip
def test_compiled_code_on_a_cpu_is_deterministic(setting, device, ratio, expected, tmp_path, monkeypatch):
    """A resumed run must be bitwise equal. tests/slow/test_compiled_gradients.py runs the code."""
    compiled = resolve(tmp_path, setting, 1e6, monkeypatch, ratio, device=device)
    assert torch.are_deterministic_algorithms_enabled() == expected == (compiled == "on" and device == "cpu")


def test_resumed_compiled_run_is_deterministic(tmp_path, monkeypatch):
    launch = {"config": {"training": {"compile": "on"}}, "provenance": provenance(ranks())}
    assert resolve(tmp_path, monkeypatch=monkeypatch, start=([launch], 1)) == "on"
    assert torch.are_deterministic_algorithms_enabled()


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
    """If the last launch had another device, number of ranks or of threads, the decision is made again.

    Earlier versions recorded auto, and did not compile on a CPU.
    """
    here = provenance(ranks())

    def launch(**changes) -> dict:
        return {"config": {"training": {"compile": earlier}}, "provenance": here | changes}

    expected, opposite = ("on", "off") if earlier == "on" else ("off", "on")
    seconds = 0.0 if earlier == "on" else 1e6  # for which a first launch would decide the opposite
    kwargs = {"seconds": seconds, "monkeypatch": monkeypatch}
    other = launch(device="NVIDIA H200")
    assert resolve(tmp_path, **kwargs, start=([other, launch(commit="1")], 0)) == expected
    for changes in ({"device": "AVX2"}, {"bfloat16": not here["bfloat16"]}, {"ranks": 2}, {"threads": 999}):
        assert resolve(tmp_path, **kwargs, start=([launch(), launch(**changes)], 0)) == opposite
    assert resolve(tmp_path, **kwargs, start=([launch()], 0), device="cuda") == "on"


def test_few_remaining_steps_do_not_compile_to_find_out(tmp_path, monkeypatch):
    """The whole run takes an hour, of which a minute is left; the last launch was on a different machine."""
    steps = preset("demo").training.max_steps
    assert resolve(tmp_path, seconds=3600.0, monkeypatch=monkeypatch, start=([], steps // 60)) == "on"
    assert resolve(tmp_path, seconds=3600.0, monkeypatch=monkeypatch, start=([], steps - steps // 60)) == "off"


def test_slower_compiled_code_is_not_used(tmp_path, monkeypatch):
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch, ratio=0.9) == "on"
    assert resolve(tmp_path, seconds=1e6, monkeypatch=monkeypatch, ratio=1.1) == "off"


def test_failing_compiler_is_a_warning(tmp_path, monkeypatch, capsys):
    def time_pass(model, *_):
        if model == "compiled":
            raise RuntimeError("C++ compile error")
        return 1e3

    changes = {
        "general": {"out_dir": tmp_path},
        "model": {"vocab_size": 9},
        "training": {"compile": "auto", "micro_batch_size": 16},
    }
    monkeypatch.setattr(compilation.torch, "compile", lambda model, dynamic: "compiled")
    monkeypatch.setattr(compilation, "time_pass", time_pass)
    config = variant(preset("demo"), **changes)
    assert compilation.resolve(config, torch.nn.Identity(), ranks()) == "off"
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


def test_slow_passes_are_timed_once(monkeypatch):
    """After the warmup, which may be slow, a pass longer than SLOW_SECONDS is timed once, shorter ones three times."""
    now = [0.0]
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: now[0])

    def model_of(seconds, calls):
        def model(idx, targets, reduction):
            now[0] += seconds if calls else 30.0  # the first pass compiles
            calls.append(1)
            return (idx + targets).float().sum().requires_grad_()

        return model

    rows = torch.zeros(2, 9, dtype=torch.int64)
    slow, fast = [], []
    assert compilation.time_pass(model_of(6.0, slow), rows, "float32") == 6.0
    assert compilation.time_pass(model_of(1.0, fast), rows, "float32") == 1.0
    assert (len(slow), len(fast)) == (2, 4)


def test_decision_is_stored_and_does_not_change_the_run(dataset, tmp_path):
    """The passes that estimate the duration change neither the weights nor the random numbers of training."""
    weights = {}
    for name, setting in (("estimated", "auto"), ("fixed", "off")):
        changes = {"training__max_steps": 2, "training__compile": setting}
        call(train.main, *flags(dataset, tmp_path / name, **changes))
        weights[name] = (tmp_path / name / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / name / "config.json").read_text())["training"]["compile"] == "off"
    assert weights["estimated"] == weights["fixed"]


def test_existing_run_is_reported_before_a_model_is_compiled(dataset, tmp_path, monkeypatch):
    """The trial takes a minute, so the error comes before it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished").touch()
    monkeypatch.setattr(compilation, "resolve", lambda *_: pytest.fail("compiled first"))
    with pytest.raises(ConfigError, match="already contains a run"):
        call(train.main, *flags(dataset, tmp_path / "run"))


def test_resumed_compiled_run_equals_an_uninterrupted_one(dataset, tmp_path, monkeypatch):
    """The resumed run is compiled again, and its checkpoint is bitwise equal."""
    backend = os.environ.get("TEST_BACKEND", "aot_eager")  # runs/test.sh --slow: inductor
    calls, compile = [], torch.compile

    def counting_compile(model, dynamic):
        calls.append(model)
        torch._dynamo.reset()
        return compile(model, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", counting_compile)
    changes = {"training__compile": "on", "training__max_steps": 4, "model__value_embeddings": 1}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    call(train.main, *flags(dataset, whole, "modern", **changes))
    shutil.copytree(whole, resumed)
    for step in (3, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    call(train.main, *flags(dataset, resumed, "modern", **changes, general__init_from="resume"))
    assert len(calls) == 2
    for name in ("model.safetensors", "optimizer.pt"):
        file = Path("checkpoints", "step_00000004", name)
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), name


def test_resumed_run_repeats_the_decision_of_its_checkpoint(dataset, tmp_path, monkeypatch):
    """It does not time a pass again."""
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    monkeypatch.setattr(compilation, "compiling_pays", lambda *_: True)
    call(train.main, *flags(dataset, tmp_path / "run", training__max_steps=2, training__compile="auto"))
    monkeypatch.setattr(compilation, "compiling_pays", lambda *_: pytest.fail("decides again"))
    changes = {"training__max_steps": 3, "training__compile": "auto", "general__init_from": "resume"}
    call(train.main, *flags(dataset, tmp_path / "run", **changes))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["compile"] == "on"
