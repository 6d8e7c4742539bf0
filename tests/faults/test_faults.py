"""Faults put in on purpose: signals in any scene, disks that fill up, kills between any two writes."""

import errno
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.fuzzing import MalformedInputs, fuzz
from support.helpers import call, save_hellaswag
from support.runs import (
    ROOT,
    STEPS,
    assert_bitwise_equal,
    completes_before_call,
    copy_killed_run,
    flags,
    fork_ranks,
    read_recorded_rows,
    torchrun,
)

import train
from babygpt.errors import ConfigError, UserError
from babygpt.training import checkpoint, metrics
from babygpt.training.checkpoint import Saver, checkpoints, latest, load
from babygpt.training.distributed import Ranks
from babygpt.training.log import read_log
from babygpt.training.run_dir import FINISHED, STOPPED, lock_run_dir

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
    [
        "babygpt.evaluation.validation.autocast",
        "hellaswag.collate",
        "babygpt.nn.generation.sample_token",
        "babygpt.training.checkpoint._sync",
    ],
    ids=["validation", "evaluation", "sampling", "saving"],
)
def test_a_signal_in_the_middle_of_a_scene_is_heeded_at_once_and_nothing_is_lost(inner, dataset, tmp_path, monkeypatch):
    changes = {
        "evaluation__file": save_hellaswag(tmp_path / "questions.jsonl", 200), "validation__every_n_steps": 6,
        "evaluation__every_n_steps": 6, "sampling__every_n_steps": 6, "saving__every_n_steps": 6,
        "model__block_size": 32, "model__n_layer": 1,
    }  # fmt: skip
    call(train.main, *flags(dataset, tmp_path / "uninterrupted", **changes))
    updates, calls = [], []
    module, name = inner.rsplit(".", 1)
    function, step_of = getattr(sys.modules[module], name), train.train_step

    def told(*args):
        if len(updates) == 6 or (inner == "babygpt.training.checkpoint._sync" and updates):
            calls.append(threading.current_thread())
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr("train.train_step", lambda *args, **named: (step_of(*args, **named), updates.append(0))[0])
        patch.setattr(inner, told)
        call(train.main, *flags(dataset, tmp_path / "run", **changes))
    if inner == "babygpt.training.checkpoint._sync":
        assert threading.main_thread() not in calls, "saved in the background"
        assert 6 < checkpoint.step_of(latest(tmp_path / "run")) < STEPS
    else:
        assert len(calls) == 1, "not one batch or token more"
        assert checkpoint.step_of(latest(tmp_path / "run")) == 6
    markers = [tmp_path / "run" / name for name in (STOPPED, FINISHED)]
    assert [marker.exists() for marker in markers] == [True, False]
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", **changes))
    assert [marker.exists() for marker in markers] == [False, True]
    assert_bitwise_equal(tmp_path / "run", tmp_path / "uninterrupted")


def test_a_signal_to_one_of_two_ranks_in_the_middle_of_a_scene_stops_both(dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", validation__every_n_steps=6, sampling__every_n_steps=0)
    fork_ranks(2, *line, fault="sigterm_in_validation 1 3")
    assert checkpoint.step_of(latest(tmp_path / "run")) == 6
    assert (tmp_path / "run" / STOPPED).exists()
    fork_ranks(2, *line, "--general.init-from", "resume")
    fork_ranks(2, *flags(dataset, tmp_path / "uninterrupted", validation__every_n_steps=6, sampling__every_n_steps=0))
    assert_bitwise_equal(tmp_path / "run", tmp_path / "uninterrupted")


def test_where_the_terminal_is_closed_the_run_stops_and_is_saved(dataset, tmp_path):
    """SIGHUP, and from then on nothing can be printed."""
    line = flags(dataset, tmp_path / "run", training__max_steps=5000, saving__every_n_steps=0)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *line])
    wait_for_a_step(tmp_path / "run")
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "run" / STOPPED).exists()
    assert checkpoint.step_of(latest(tmp_path / "run")) == len(read_log(tmp_path / "run" / "log.csv"))


def test_a_run_goes_on_where_nobody_reads_what_it_prints(dataset, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    line = flags(dataset, tmp_path / "run")
    command = [sys.executable, str(ROOT / "train.py"), *line]
    assert subprocess.run(command, stdout=writer, stderr=writer).returncode == 0
    os.close(writer)
    assert len(read_log(tmp_path / "run" / "log.csv")) == STEPS + 1


def test_other_words_are_heard_where_some_are_lost(dataset, tmp_path):
    """stdout on a full disk, or closed, or of few letters."""
    command = [sys.executable, str(ROOT / "tests/support/faulty_train.py")]
    environment = os.environ | {
        "FAULT": "nan_weight 0 3",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONIOENCODING": "latin-1",
    }
    line = flags(dataset, tmp_path / "full", sampling__prompt="żółw")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, *line], env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "error: Step 3: the loss is nan" in done.stderr
    for i, end in enumerate((">&-", "2>&-", "> /dev/null")):
        line = flags(dataset, tmp_path / str(i), sampling__prompt="żółw")
        shell = f"{shlex.join([*command, *line])} {end}"
        assert subprocess.run(shell, shell=True, env=environment | {"FAULT": "sigterm 0 9"}).returncode == 0
        assert (tmp_path / str(i) / STOPPED).exists()


def wait_for_a_step(run: Path) -> None:
    while not (run / "log.csv").exists() or len(read_log(run / "log.csv")) < 2:
        time.sleep(0.05)


def test_a_signal_before_the_first_step_is_done_ends_at_once(dataset, tmp_path):
    """A compiler may work for minutes in there."""
    if (pid := os.fork()) == 0:
        train.clip_grad_norm_ = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30)
        call(train.main, *flags(dataset, tmp_path / "run"))
    begin = time.perf_counter()
    assert os.waitpid(pid, 0)[1] == 0
    assert time.perf_counter() - begin < 20
    assert (tmp_path / "run" / STOPPED).exists()
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", training__max_steps=2))
    assert not (tmp_path / "run" / STOPPED).exists()


def test_a_signal_while_the_first_step_is_written_down_loses_nothing(dataset, tmp_path):
    if (pid := os.fork()) == 0:
        metrics.Metrics.plot = lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1)
        call(train.main, *flags(dataset, tmp_path / "run"))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert checkpoint.step_of(latest(tmp_path / "run")) == len(read_log(tmp_path / "run" / "log.csv")) > 0


# ---------------------------------------------------------------------------------------------------------
# spikes


def test_a_spike_is_told_of_and_its_update_left_out_where_that_is_asked_for(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("babygpt.training.guard.UpdateGuard.WINDOW", 4)
    step_of, forward, updates = train.train_step, train.GPT.forward, []
    monkeypatch.setattr("train.train_step", lambda *args, **named: (step_of(*args, **named), updates.append(0))[0])
    monkeypatch.setattr(
        "train.GPT.forward",
        lambda self, *args, **named: forward(self, *args, **named) * (3 if self.training and len(updates) == 8 else 1),
    )
    changes = {"optimizer__max_lr": 1e-3, "validation__every_n_steps": 0, "sampling__every_n_steps": 0}
    weights = {}
    for skip in ([], ["--training.skip-spikes", 8]):
        updates.clear()
        run = tmp_path / str(len(skip))
        call(train.main, *flags(dataset, run, **changes), *skip)
        told = [line for line in capsys.readouterr().out.splitlines() if "standard deviations above" in line]
        assert [line.split("|")[0].split() for line in told] == [["step", "8"]]
        assert ("is skipped" in told[0]) == bool(skip)
        weights[len(skip)] = [load(checkpoints(run)[i]).model["wte.weight"] for i in (6, 7, 8, 9)]  # of steps 7 to 10
    assert not torch.equal(weights[0][1], weights[0][2])
    assert torch.equal(weights[2][1], weights[2][2]), "update 8 is left out"
    assert not torch.equal(weights[2][0], weights[2][1])
    assert not torch.equal(weights[2][2], weights[2][3])
    resumed = copy_killed_run(tmp_path / "2", 7, tmp_path / "resumed")
    updates[:] = [0] * 7
    call(train.main, *flags(dataset, resumed, general__init_from="resume", **changes), *skip)
    assert "step      8 | the loss" in capsys.readouterr().out, "what is usual is known still"
    assert_bitwise_equal(resumed, tmp_path / "2")


# ---------------------------------------------------------------------------------------------------------
# saving


def test_a_save_killed_between_any_two_writes_loses_no_checkpoint(tmp_path):
    """Whichever system call of a save a process is killed before, the newest complete checkpoint stays intact.

    With `again`, the save replaces a corrupted checkpoint of the same step. An intact one is never saved again, because
    a run resumes from it.
    """
    for again in (False, True):
        at, ended = 0, False
        while not ended:
            run, at = tmp_path / f"{again}-{at}", at + 1
            save(run, 1)
            save(run, 2)
            if again:
                (run / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"")
            ended = completes_before_call(at, lambda: save(run, 2 if again else 3, keep=2))  # noqa: B023, called at once
            found = load(latest(run))
            assert found.state["step"] in ((1, 2) if again else (2, 3))
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


def test_a_drive_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", of_files_alone)
    save(tmp_path, 1)
    assert load(latest(tmp_path)).state["step"] == 1


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

    monkeypatch.setattr("babygpt.training.checkpoint.save_file", slow)
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
        monkeypatch.setattr("babygpt.training.checkpoint._sync", lambda path: 1 / 0)
        saver.save(3, model, optimizer, STATE)
        with pytest.raises(UserError, match="step 3 could not be written: ZeroDivisionError"):
            saver.wait()
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [1, 2]
    monkeypatch.setattr("babygpt.training.checkpoint._on_host", lambda tensor: torch.empty(2**50))
    with Saver(tmp_path, keep=0, keep_every=0) as saver:
        saver.save(4, model, optimizer, STATE)
        with pytest.raises(UserError, match="do not fit in host memory"):
            saver.wait()


@pytest.mark.parametrize("world", [1, 2])
def test_where_a_checkpoint_cannot_be_written_all_ranks_end_and_the_one_before_is_whole(world, dataset, tmp_path):
    line = flags(
        dataset, tmp_path / "run", saving__every_n_steps=4, saving__keep=0, validation__every_n_steps=0,
        sampling__every_n_steps=0, model__n_embd=32,
    )  # fmt: skip
    done = torchrun(world, *line, fault="disk_full 0 5", check=False)
    assert done.returncode != 0
    assert "error: The checkpoint of step 8 could not be written" in done.stderr
    assert "File too large" in done.stderr
    assert 'train.py", line' not in done.stderr, "no traceback of ours"
    assert "exitcode  : 2" in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step_00000004"]
    assert load(latest(tmp_path / "run")).state["step"] == 4
    assert read_log(tmp_path / "run" / "log.csv")[-1]["step"] < STEPS - 1, "it does not train on in vain"


@pytest.mark.parametrize(("kind", "words"), [("read_only", "Permission denied"), ("deleted", "No such file")])
def test_where_the_folder_is_gone_or_locked_it_says_so_and_ends(kind, words, dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", saving__every_n_steps=4)
    done = torchrun(2, *line, fault=f"{kind} 0 5", check=False)
    assert done.returncode != 0
    assert re.search(rf"\nerror: .*{words}", done.stderr)
    assert "exitcode  : 2" in done.stderr
    assert 'train.py", line' not in done.stderr, "no traceback of ours"
    for folder in ("run", "run/checkpoints"):
        (tmp_path / folder).chmod(0o755)
    saved = load(latest(tmp_path / "run")).state["step"]
    assert saved == (4 if kind == "read_only" else 8), "where the folder is gone, weights at least are saved anew"
    torchrun(2, *line, "--general.init-from", "resume")
    steps = [row["step"] for row in read_log(tmp_path / "run" / "log.csv")]
    assert steps == list(range(0 if kind == "read_only" else saved, STEPS + 1))


def test_a_folder_that_another_process_trains_in_is_refused(dataset, tmp_path):
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    line = flags(dataset, tmp_path / "run", general__init_from="resume", training__max_steps=2)
    with lock_run_dir(tmp_path / "run", ranks):
        with pytest.raises(ConfigError, match=r"Another process is training in .*run"):
            call(train.main, *line)
        assert os.listdir(tmp_path / "run") == [".lock"], "it touches nothing"
    assert not (tmp_path / "run").exists(), "nothing came of it"
    call(train.main, *line)
    (tmp_path / "run" / STOPPED).touch()
    with pytest.raises(ConfigError, match="n_layer"):
        call(train.main, *line, "--model.n-layer", 3)
    markers = [name for name in (STOPPED, FINISHED) if (tmp_path / "run" / name).exists()]
    assert markers == [FINISHED], "a start that is refused has not been stopped, nor undone what is finished"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out-dir .* cannot be written to"):
        call(train.main, *flags(dataset, tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == ""


# ---------------------------------------------------------------------------------------------------------
# ranks

QUIET = {"validation__every_n_steps": 0, "sampling__every_n_steps": 0}


def no_traceback_of_ours(stderr: str) -> bool:
    return 'train.py", line' not in stderr


@pytest.mark.parametrize(("kind", "rank", "step"), [("nan_weight", 0, 3), ("nan_weight", 1, 6), ("nan_gradient", 1, 4)])
def test_a_number_that_is_not_finite_on_one_rank_stops_all_at_that_step(kind, rank, step, dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", **QUIET)
    done = torchrun(2, *line, fault=f"{kind} {rank} {step}", check=False)
    assert done.returncode != 0
    loss = r"nan" if kind == "nan_weight" else r"\d\.\d+"
    assert re.search(
        f"error: Step {step}: the loss is {loss}, the gradient norm nan, first on rank {rank}\\.", done.stderr
    )
    assert "exitcode  : 2" in done.stderr
    assert no_traceback_of_ours(done.stderr)
    assert checkpoint.step_of(latest(tmp_path / "run")) == step
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.csv")] == list(range(step))
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", **QUIET))


def test_ranks_whose_weights_differ_are_told_of_by_name(dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", training__compare_ranks_every_n_steps=2, **QUIET)
    done = torchrun(2, *line, fault="changed_weight 1 5", check=False)
    assert done.returncode != 0
    assert "error: Step 6: the weights of rank 1 differ from those of the other ranks" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert no_traceback_of_ours(done.stderr)
    assert checkpoint.step_of(latest(tmp_path / "run")) == 6


@pytest.mark.parametrize("kind", ["sigkill", "hang"])
def test_where_a_rank_is_lost_the_others_end_in_time_and_say_in_what(kind, dataset, tmp_path):
    """Without torchrun, which would end them by itself."""
    line = flags(dataset, tmp_path / "run", general__timeout_minutes=0.1, **QUIET)
    first, second = alone(line, (0, 1), fault=f"{kind} 1 5")
    assert first.wait(60) == 2
    assert "error: Another rank exited, or did not respond for 0.1 minutes, in step 5;" in (said := first.stderr.read())
    assert no_traceback_of_ours(said)
    assert second.wait(60) == (-signal.SIGKILL if kind == "sigkill" else 2)
    assert checkpoint.step_of(latest(tmp_path / "run")) in (4, 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_one_that_never_comes_says_so(rank, dataset, tmp_path):
    (process,) = alone(flags(dataset, tmp_path / "run", general__timeout_minutes=0.05), (rank,))
    assert process.wait(60) == 2
    assert "Another rank exited, or did not respond for 0.05 minutes, in the start;" in (said := process.stderr.read())
    assert no_traceback_of_ours(said)
    assert not (tmp_path / "run").exists()


def alone(line: list[str], ranks: tuple[int, ...], fault: str = "record_rows 0 0") -> list[subprocess.Popen]:
    """Some ranks of two, started as Slurm does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/faulty_train.py"), *line],
            env=environment | {"FAULT": fault, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in ranks
    ]  # fmt: skip


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_nothing_is_lost(dataset, tmp_path):
    """Though the address of the killed rank is in torchrun's store still when the other ones join again."""
    fork_ranks(2, *flags(dataset, tmp_path / "uninterrupted"))
    line = flags(dataset, tmp_path / "run", general__init_from="resume", general__timeout_minutes=0.3)
    torchrun(2, *line, fault="sigkill 1 5", restarts=3)
    assert_bitwise_equal(tmp_path / "run", tmp_path / "uninterrupted")


def test_a_run_goes_on_with_another_number_of_ranks(dataset, tmp_path):
    """1, 2, 4 and 1, three steps or four each: as one rank does alone."""
    changes = {"model__dropout": 0.0, "sampling__every_n_steps": 0}
    fork_ranks(1, *flags(dataset, tmp_path / "uninterrupted", **changes), fault="record_rows 0 0")
    for world in (1, 2, 4):
        line = flags(dataset, tmp_path / "run", **changes, general__init_from="resume")
        fork_ranks(world, *line, fault=f"sigterm {world - 1} 2")
        assert not (tmp_path / "run" / FINISHED).exists()
    fork_ranks(1, *line, fault="record_rows 0 0")
    assert read_recorded_rows(tmp_path / "run") == read_recorded_rows(tmp_path / "uninterrupted")
    for one, other in zip(*(read_log(tmp_path / run / "log.csv") for run in ("run", "uninterrupted")), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert one[key] == (other[key] and pytest.approx(other[key], rel=1e-5))
        assert (one["tokens"], one["epoch"]) == (other["tokens"], other["epoch"])


# ---------------------------------------------------------------------------------------------------------
# memory


def test_where_memory_is_short_the_ways_to_less_are_told(dataset, tmp_path):
    line = flags(dataset, tmp_path / "run", **QUIET)
    done = torchrun(2, *line, fault="out_of_memory 1 2", check=False)
    assert (
        "error (rank 1): Out of memory in step 2 (CUDA out of memory. Tried to allocate 2.00 GiB.). Use" in done.stderr
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
    """A few of each kind; `python tests/support/fuzzing.py 10000` tries more."""
    found, wrong = fuzz(MalformedInputs(dataset, tmp_path), 180)
    assert wrong == []
    assert all(counts["refused"] for counts in found.values())


@pytest.mark.parametrize(
    ("name", "value"), [("losses", ["x"]), ("launches", [True]), ("launches", 5), ("tokenizer", {"name": 3})]
)
def test_a_state_that_was_rewritten_is_refused_in_a_sentence(name, value, uninterrupted_run, dataset, tmp_path):
    run = copy_killed_run(uninterrupted_run, 1, tmp_path / "run")
    found = load(latest(run))
    checkpoint.save(run, 1, found.model, found.optimizer, found.state | {name: value}, keep=0)
    with pytest.raises(UserError, match=r"lacks what a resume needs|is not the state.json of a checkpoint"):
        call(train.main, *flags(dataset, run, general__init_from="resume"))


def test_a_record_of_the_settings_that_is_none_does_no_harm(uninterrupted_run, dataset, tmp_path):
    for i, text in enumerate(('{"general": 0, "model": [1]}', "[]", "{")):
        run = copy_killed_run(uninterrupted_run, 12, tmp_path / str(i))
        (run / "config.json").write_text(text)
        call(train.main, *flags(dataset, run, general__init_from="resume"))
        assert_bitwise_equal(run, uninterrupted_run)
