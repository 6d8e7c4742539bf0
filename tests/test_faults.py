"""Faults put in on purpose: signals in any scene, disks that fill up, kills between any two writes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fuzzing import Kinds, fuzz
from helpers import call, save_hellaswag

import checkpoint
import train
from checkpoint import Saver, checkpoints, latest, load
from log import read_log
from runs import STEPS, assert_equal_to_the_bit, cut_back_to, flags, torchrun
from start import FINISHED, STOPPED

STATE = {"step": 1, "model": {}, "tokenizer": {"name": "gpt2"}}


def tensors(value: float) -> tuple[dict, dict]:
    weight = torch.full((64, 64), value)
    return {"w": weight}, {"w": {"exp_avg": weight, "step": torch.tensor(value)}}


def save(run: Path, step: int, **settings: int) -> Path:
    return checkpoint.save(run, step, *tensors(float(step)), STATE | {"step": step}, **{"keep": 0} | settings)


# ---------------------------------------------------------------------------------------------------------
# stop signals


@pytest.mark.parametrize(
    "inner",
    ["train.autocast", "hellaswag.lay_out", "sample.choose", "checkpoint._sync"],
    ids=["validation", "evaluation", "sampling", "saving"],
)
def test_a_signal_in_the_middle_of_a_scene_is_heeded_at_once_and_nothing_is_lost(inner, dataset, tmp_path, monkeypatch):
    changes = {
        "evaluation__file": save_hellaswag(tmp_path / "questions.jsonl", 200), "validation__every_n_steps": 6,
        "evaluation__every_n_steps": 6, "sampling__every_n_steps": 6, "saving__every_n_steps": 6,
        "model__block_size": 32, "model__n_layer": 1,
    }  # fmt: skip
    call(train.main, *flags(dataset, tmp_path / "unbroken", **changes))
    updates, calls = [], []
    module, name = inner.split(".")
    function, step_of = getattr(sys.modules[module], name), train.train_step

    def told(*args):
        if len(updates) == 6 or (inner == "checkpoint._sync" and updates):
            calls.append(threading.current_thread())
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr("train.train_step", lambda *args, **named: (step_of(*args, **named), updates.append(0))[0])
        patch.setattr(inner, told)
        call(train.main, *flags(dataset, tmp_path / "run", **changes))
    if inner == "checkpoint._sync":
        assert threading.main_thread() not in calls, "saved in the background"
        assert 6 < checkpoint.step_of(latest(tmp_path / "run")) < STEPS
    else:
        assert len(calls) == 1, "not one batch or token more"
        assert checkpoint.step_of(latest(tmp_path / "run")) == 6
    markers = [tmp_path / "run" / name for name in (STOPPED, FINISHED)]
    assert [marker.exists() for marker in markers] == [True, False]
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", **changes))
    assert [marker.exists() for marker in markers] == [False, True]
    assert_equal_to_the_bit(tmp_path / "run", tmp_path / "unbroken")


def test_a_signal_before_the_first_step_is_done_ends_at_once(dataset, tmp_path, monkeypatch):
    """A compiler may work for minutes in there."""
    monkeypatch.setattr("train.clip_grad_norm_", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30))
    begin = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        call(train.main, *flags(dataset, tmp_path / "run"))
    assert end.value.code == 0
    assert time.perf_counter() - begin < 20
    monkeypatch.undo()
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", training__max_steps=2))


# ---------------------------------------------------------------------------------------------------------
# spikes


def test_a_spike_is_told_of_and_its_update_left_out_where_that_is_asked_for(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("optim.Gate.WINDOW", 4)
    step_of, forward, updates = train.train_step, train.GPT.forward, []
    monkeypatch.setattr("train.train_step", lambda *args, **named: (step_of(*args, **named), updates.append(0))[0])
    monkeypatch.setattr(
        "train.GPT.forward",
        lambda self, *args: forward(self, *args) * (3 if self.training and len(updates) == 8 else 1),
    )
    changes = {"optimizer__max_lr": 1e-3, "validation__every_n_steps": 0, "sampling__every_n_steps": 0}
    weights = {}
    for skip in ([], ["--training.skip-spikes", 8]):
        updates.clear()
        run = tmp_path / str(len(skip))
        call(train.main, *flags(dataset, run, **changes), *skip)
        told = [line for line in capsys.readouterr().out.splitlines() if "standard deviations above" in line]
        assert [line.split("|")[0].split() for line in told] == [["step", "8"]]
        assert ("is left out" in told[0]) == bool(skip)
        weights[len(skip)] = [load(checkpoints(run)[i]).model["wte.weight"] for i in (6, 7, 8, 9)]  # of steps 7 to 10
    assert not torch.equal(weights[0][1], weights[0][2])
    assert torch.equal(weights[2][1], weights[2][2]), "update 8 is left out"
    assert not torch.equal(weights[2][0], weights[2][1])
    assert not torch.equal(weights[2][2], weights[2][3])
    resumed = cut_back_to(tmp_path / "2", 7, tmp_path / "resumed")
    updates[:] = [0] * 7
    call(train.main, *flags(dataset, resumed, general__init_from="resume", **changes), *skip)
    assert "step      8 | the loss" in capsys.readouterr().out, "what is usual is known still"
    assert_equal_to_the_bit(resumed, tmp_path / "2")


# ---------------------------------------------------------------------------------------------------------
# saving


def test_a_save_killed_between_any_two_writes_loses_no_checkpoint(tmp_path):
    """A child ends itself before its nth call of the system that saving makes, for every n, also where it saves a
    step again; what `latest` then finds is whole and is the newest that was complete."""
    names = ("os.rename", "os.fsync", "os.rmdir", "os.unlink", "checkpoint.save_file", "torch.save")
    for again in (False, True):
        at, ended = 0, False
        while not ended:
            run, at = tmp_path / f"{again}-{at}", at + 1
            save(run, 1)
            save(run, 2)
            if (child := os.fork()) == 0:
                left = [at]

                def or_die(function, left=left):
                    def call(*args, **named):
                        left[0] -= 1
                        if left[0] == 0:
                            os._exit(9)
                        return function(*args, **named)

                    return call

                for name in names:
                    module, function = name.rsplit(".", 1)
                    setattr(sys.modules[module], function, or_die(getattr(sys.modules[module], function)))
                save(run, 2 if again else 3, keep=2)
                os._exit(0)
            ended = os.waitpid(child, 0)[1] == 0
            found = load(latest(run))
            assert found.state["step"] in ((2,) if again else (2, 3))
            assert torch.equal(found.model["w"], tensors(float(found.state["step"]))[0]["w"])
            save(run, 4, keep=2)
            assert load(latest(run)).state["step"] == 4
            left = sorted(os.listdir(run / "checkpoints"))
            assert len(left) == 2, f"nothing stale is left: {left}"
        assert at > 12


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    run, done = tmp_path / "run", []

    def told(function):
        def call(path, *rest):
            is_fsync = isinstance(path, int)
            done.append(os.readlink(f"/proc/self/fd/{path}") if is_fsync else f"rename {Path(path).name}")
            return function(path, *rest)

        return call

    monkeypatch.setattr("os.fsync", told(os.fsync))
    monkeypatch.setattr("os.rename", told(os.rename))
    save(run, 1)
    temporary = run / "checkpoints" / ".step_00000001.tmp"
    files = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")
    before = {str(temporary), *(str(temporary / name) for name in files)}
    assert set(done[:5]) == before
    assert done[4:] == [str(temporary), "rename .step_00000001.tmp", str(run / "checkpoints"), str(run)]


def test_checkpoints_of_every_so_many_steps_stay(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=1, keep_every=3)
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [3, 6, 7]


def test_a_saver_copies_waits_for_the_one_before_and_tells_of_errors(tmp_path, monkeypatch):
    model, optimizer = tensors(1.0)
    begun, go_on = threading.Event(), threading.Event()
    write = checkpoint.save_file

    def slow(*args):
        begun.set()
        assert go_on.wait(20)
        write(*args)

    monkeypatch.setattr("checkpoint.save_file", slow)
    with Saver(tmp_path, keep=0, keep_every=0) as saver:
        saver.save(1, model, optimizer, STATE)
        assert begun.wait(20)
        model["w"].fill_(7.0)  # the training goes on meanwhile
        optimizer["w"]["exp_avg"].fill_(7.0)
        assert latest(tmp_path) is None
        go_on.set()
        saver.save(2, model, optimizer, STATE)
        assert torch.equal(load(checkpoints(tmp_path)[0]).model["w"], tensors(1.0)[0]["w"])
        saver.wait()
        monkeypatch.setattr("checkpoint._sync", lambda path: 1 / 0)
        saver.save(3, model, optimizer, STATE)
        with pytest.raises(ZeroDivisionError):
            saver.wait()
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [1, 2]


@pytest.mark.parametrize("world", [1, 2])
def test_where_a_checkpoint_cannot_be_written_all_ranks_end_and_the_one_before_is_whole(world, dataset, tmp_path):
    line = flags(
        dataset, tmp_path / "run", saving__every_n_steps=4, saving__keep=0, validation__every_n_steps=0,
        sampling__every_n_steps=0, model__n_embd=32,
    )  # fmt: skip
    done = torchrun(world, *line, fault="full 0 5", check=False)
    assert done.returncode != 0
    assert "error: the checkpoint of step 8 could not be written" in done.stderr
    assert "File too large" in done.stderr or "PytorchStreamWriter" in done.stderr
    assert 'train.py", line' not in done.stderr, "no traceback of ours"
    assert "exitcode  : 2" in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step_00000004"]
    assert load(latest(tmp_path / "run")).state["step"] == 4
    assert read_log(tmp_path / "run" / "log.csv")[-1]["step"] < STEPS - 1, "it does not train on in vain"


# ---------------------------------------------------------------------------------------------------------
# ranks

QUIET = {"validation__every_n_steps": 0, "sampling__every_n_steps": 0}


def no_traceback_of_ours(stderr: str) -> bool:
    return 'train.py", line' not in stderr


@pytest.mark.parametrize(("rank", "step"), [(0, 3), (1, 6)])
def test_a_number_that_is_not_finite_on_one_rank_stops_all_at_that_step(rank, step, dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", **QUIET)
    done = torchrun(2, *line, fault=f"nan {rank} {step}", check=False)
    assert done.returncode != 0
    assert f"error: step {step}: loss is nan" in done.stderr
    assert f"first on rank {rank}" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert no_traceback_of_ours(done.stderr)
    assert checkpoint.step_of(latest(tmp_path / "run")) == step
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.csv")] == list(range(step))
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", **QUIET))


def test_ranks_whose_weights_differ_are_told_of_by_name(dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", training__compare_ranks_every_n_steps=2, **QUIET)
    done = torchrun(2, *line, fault="flip 1 5", check=False)
    assert done.returncode != 0
    assert "error: step 6: the weights of rank 1 are not those of the others" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert no_traceback_of_ours(done.stderr)
    assert checkpoint.step_of(latest(tmp_path / "run")) == 6


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_where_a_rank_is_lost_the_others_end_in_time_and_say_in_what(kind, dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", general__timeout_minutes=0.1, **QUIET)
    begin = time.perf_counter()
    done = torchrun(2, *line, fault=f"{kind} 1 5", check=False)
    assert done.returncode != 0
    assert time.perf_counter() - begin < 60
    if kind == "hang":
        assert "error: another rank has ended, or was silent for 0.1 minutes, in step 5;" in done.stderr
        assert no_traceback_of_ours(done.stderr)
    assert checkpoint.step_of(latest(tmp_path / "run")) in (4, 5)


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_nothing_is_lost(dataset, tmp_path):
    torchrun(2, *flags(dataset, tmp_path / "unbroken"))
    line = flags(dataset, tmp_path / "run", general__init_from="resume", general__timeout_minutes=0.3)
    torchrun(2, *line, fault="kill 1 5", restarts=3)
    assert_equal_to_the_bit(tmp_path / "run", tmp_path / "unbroken")


def test_a_run_goes_on_with_another_number_of_ranks(dataset, tmp_path):
    """1, 2, 4 and 1, three steps or four each: as one rank does alone."""
    changes = {"model__dropout": 0.0, "sampling__every_n_steps": 0}
    call(train.main, *flags(dataset, tmp_path / "unbroken", **changes))
    for world in (1, 2, 4):
        line = flags(dataset, tmp_path / "run", **changes, general__init_from="resume")
        torchrun(world, *line, fault=f"stop {world - 1} 2")
        assert not (tmp_path / "run" / FINISHED).exists()
    call(train.main, *line)
    for one, other in zip(*(read_log(tmp_path / run / "log.csv") for run in ("run", "unbroken")), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert one[key] == (other[key] and pytest.approx(other[key], rel=1e-5))
        assert (one["tokens"], one["epoch"]) == (other["tokens"], other["epoch"])


# ---------------------------------------------------------------------------------------------------------
# memory


def test_where_memory_is_short_the_ways_to_less_are_told(dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", **QUIET)
    done = torchrun(2, *line, fault="memory 1 2", check=False)
    assert (
        "error (rank 1): out of memory in step 2 (CUDA out of memory. Tried to allocate 2.00 GiB.). Give" in done.stderr
    )
    assert "--training.micro-batch-size 2: " in done.stderr
    assert no_traceback_of_ours(done.stderr)
    for flag in (["--training.micro-batch-size", 2], ["--training.activation-checkpointing"]):
        run = tmp_path / flag[0]
        call(train.main, *flags(dataset, run, training__max_steps=3, model__dropout=0.0, **QUIET), *flag)
    one, other = (
        read_log(tmp_path / name / "log.csv")
        for name in ("--training.micro-batch-size", "--training.activation-checkpointing")
    )
    assert [row["loss"] for row in one[:3]] == pytest.approx([row["loss"] for row in other[:3]], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------
# input


def test_malformed_input_is_refused_in_a_sentence_or_harmless(dataset, tmp_path):
    """A few of each kind; `python tests/fuzzing.py 10000` tries more."""
    found, wrong = fuzz(Kinds(dataset, tmp_path), 180)
    assert wrong == []
    assert all(counts["refused"] for counts in found.values())
