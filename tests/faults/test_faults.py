"""Fault injection: signals, full disks, kills, lost ranks, non-finite values, lack of memory, malformed input."""

import errno
import os
import pty
import re
import shlex
import signal
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
    free_port,
    read_recorded_rows,
    torchrun,
)

import train
from babygpt.errors import ConfigError, UserError
from babygpt.training import checkpoint, metrics
from babygpt.training.checkpoint import Saver, latest, list_checkpoints, load
from babygpt.training.distributed import Ranks
from babygpt.training.log import read_log
from babygpt.training.run_dir import FINISHED, STOPPED, lock_run_dir

STATE = {"step": 1, "model": {}, "tokenizer": {"name": "gpt2"}}
NO_TASKS = {"validation__every_n_steps": 0, "sampling__every_n_steps": 0}


def tensors(value: float) -> tuple[dict, dict]:
    weight = torch.full((64, 64), value)
    return {"w": weight}, {"w": {"exp_avg": weight, "step": torch.tensor(value)}}


def save(run: Path, step: int, **settings: int) -> Path:
    return checkpoint.save(run, step, *tensors(float(step)), STATE | {"step": step}, **{"keep": 0} | settings)


def has_no_traceback(stderr: str) -> bool:
    return 'train.py", line' not in stderr


def assert_user_error(done: subprocess.CompletedProcess) -> None:
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    assert has_no_traceback(done.stderr)


# ---------------------------------------------------------------------------------------------------------
# stop signals


@pytest.mark.parametrize(
    "target",
    [
        "babygpt.evaluation.validation.autocast",
        "babygpt.evaluation.scoring.collate",
        "babygpt.nn.generation.sample_token",
        "babygpt.training.checkpoint._sync",
    ],
    ids=["validation", "evaluation", "sampling", "saving"],
)
def test_signal_during_a_periodic_task_stops_the_run_at_once(target, dataset, tmp_path, monkeypatch):
    """SIGTERM during a task stops it before its next batch or token (a save is completed). A resume loses nothing."""
    changes = {
        "evaluation__file": save_hellaswag(tmp_path / "questions.jsonl", 200), "validation__every_n_steps": 6,
        "evaluation__every_n_steps": 6, "sampling__every_n_steps": 6, "saving__every_n_steps": 6,
        "model__block_size": 32, "model__n_layer": 1,
    }  # fmt: skip
    call(train.main, *flags(dataset, tmp_path / "uninterrupted", **changes))
    updates, threads = [], []
    module, name = target.rsplit(".", 1)
    function, train_step = getattr(sys.modules[module], name), train.train_step

    def with_sigterm(*args):
        if len(updates) == 6 or (target == "babygpt.training.checkpoint._sync" and updates):
            threads.append(threading.current_thread())
            if len(threads) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr("train.train_step", lambda *args, **kwargs: (train_step(*args, **kwargs), updates.append(0))[0])
        patch.setattr(target, with_sigterm)
        call(train.main, *flags(dataset, tmp_path / "run", **changes))
    if target == "babygpt.training.checkpoint._sync":
        assert threading.main_thread() not in threads, "saved in the background"
        assert 6 < checkpoint.step_of(latest(tmp_path / "run")) < STEPS
    else:
        assert len(threads) == 1, "no further batch or token"
        assert checkpoint.step_of(latest(tmp_path / "run")) == 6
    markers = [tmp_path / "run" / name for name in (STOPPED, FINISHED)]
    assert [marker.exists() for marker in markers] == [True, False]
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", **changes))
    assert [marker.exists() for marker in markers] == [False, True]
    assert_bitwise_equal(tmp_path / "run", tmp_path / "uninterrupted")


def test_signal_to_one_rank_during_validation_stops_both(dataset, tmp_path):
    arguments = flags(dataset, tmp_path / "run", validation__every_n_steps=6, sampling__every_n_steps=0)
    fork_ranks(2, *arguments, fault="sigterm_in_validation 1 3")
    assert checkpoint.step_of(latest(tmp_path / "run")) == 6
    assert (tmp_path / "run" / STOPPED).exists()
    fork_ranks(2, *arguments, "--general.init-from", "resume")
    fork_ranks(2, *flags(dataset, tmp_path / "uninterrupted", validation__every_n_steps=6, sampling__every_n_steps=0))
    assert_bitwise_equal(tmp_path / "run", tmp_path / "uninterrupted")


def test_closed_terminal_stops_the_run_after_a_save(dataset, tmp_path):
    """The run receives SIGHUP, and every later print fails."""
    arguments = flags(dataset, tmp_path / "run", training__max_steps=5000, saving__every_n_steps=0)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *arguments])
    wait_for_a_step(tmp_path / "run")
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "run" / STOPPED).exists()
    assert checkpoint.step_of(latest(tmp_path / "run")) == len(read_log(tmp_path / "run" / "log.csv"))


def test_run_completes_if_its_output_pipe_is_closed(dataset, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "train.py"), *flags(dataset, tmp_path / "run")]
    assert subprocess.run(command, stdout=writer, stderr=writer).returncode == 0
    os.close(writer)
    assert len(read_log(tmp_path / "run" / "log.csv")) == STEPS + 1


def test_failing_output_stream_does_not_disturb_the_run(dataset, tmp_path):
    """stdout is on a full disk, stdout or stderr is closed, or the encoding lacks characters of the prompt."""
    command = [sys.executable, str(ROOT / "tests/support/faulty_train.py")]
    environment = os.environ | {"TORCHELASTIC_RESTART_COUNT": "0", "PYTHONIOENCODING": "latin-1"}
    arguments = flags(dataset, tmp_path / "full", sampling__prompt="żółw")
    with open("/dev/full", "w") as full:
        nan = environment | {"FAULT": "nan_weight 0 3"}
        done = subprocess.run([*command, *arguments], env=nan, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "error: Step 3: the loss is nan" in done.stderr
    for i, redirection in enumerate((">&-", "2>&-", "> /dev/null")):
        arguments = flags(dataset, tmp_path / str(i), sampling__prompt="żółw")
        shell = f"{shlex.join([*command, *arguments])} {redirection}"
        assert subprocess.run(shell, shell=True, env=environment | {"FAULT": "sigterm 0 9"}).returncode == 0
        assert (tmp_path / str(i) / STOPPED).exists()


def wait_for_a_step(run: Path) -> None:
    while not (run / "log.csv").exists() or len(read_log(run / "log.csv")) < 2:
        time.sleep(0.05)


def test_signal_before_the_first_update_exits_at_once(dataset, tmp_path):
    """The first step may take minutes, because it compiles the model."""
    if (pid := os.fork()) == 0:
        train.clip_grad_norm_ = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30)
        call(train.main, *flags(dataset, tmp_path / "run"))
    start = time.perf_counter()
    assert os.waitpid(pid, 0)[1] == 0
    assert time.perf_counter() - start < 20
    assert (tmp_path / "run" / STOPPED).exists()
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", training__max_steps=2))
    assert not (tmp_path / "run" / STOPPED).exists()


def test_signal_while_the_first_step_is_logged_loses_nothing(dataset, tmp_path):
    if (pid := os.fork()) == 0:
        metrics.Metrics.plot = lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1)
        call(train.main, *flags(dataset, tmp_path / "run"))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert checkpoint.step_of(latest(tmp_path / "run")) == len(read_log(tmp_path / "run" / "log.csv")) > 0


# ---------------------------------------------------------------------------------------------------------
# spikes


def test_spike_is_logged_and_optionally_skipped(dataset, tmp_path, monkeypatch, capsys):
    """A resumed run detects the same spike, since a checkpoint contains the recent losses."""
    monkeypatch.setattr("babygpt.training.guard.UpdateGuard.WINDOW", 4)
    train_step, forward, updates = train.train_step, train.GPT.forward, []
    monkeypatch.setattr("train.train_step", lambda *args, **kwargs: (train_step(*args, **kwargs), updates.append(0))[0])
    monkeypatch.setattr(
        "train.GPT.forward",
        lambda self, *args, **kw: forward(self, *args, **kw) * (3 if self.training and len(updates) == 8 else 1),
    )
    changes = {"optimizer__max_lr": 1e-3, **NO_TASKS}
    weights = {}
    for skip in ([], ["--training.skip-spikes", 8]):
        updates.clear()
        run = tmp_path / str(len(skip))
        call(train.main, *flags(dataset, run, **changes), *skip)
        messages = [line for line in capsys.readouterr().out.splitlines() if "standard deviations above" in line]
        assert [line.split("|")[0].split() for line in messages] == [["step", "8"]]
        assert ("is skipped" in messages[0]) == bool(skip)
        weights[len(skip)] = [load(path).model["wte.weight"] for path in list_checkpoints(run)[6:10]]  # steps 7 to 10
    assert not torch.equal(weights[0][1], weights[0][2])
    assert torch.equal(weights[2][1], weights[2][2]), "update 8 is skipped"
    assert not torch.equal(weights[2][0], weights[2][1])
    assert not torch.equal(weights[2][2], weights[2][3])
    resumed = copy_killed_run(tmp_path / "2", 7, tmp_path / "resumed")
    updates[:] = [0] * 7
    call(train.main, *flags(dataset, resumed, general__init_from="resume", **changes), *skip)
    assert "step      8 | the loss" in capsys.readouterr().out, "the recent losses were restored"
    assert_bitwise_equal(resumed, tmp_path / "2")


# ---------------------------------------------------------------------------------------------------------
# saving


def test_save_killed_at_any_write_loses_no_checkpoint(tmp_path):
    """Whichever system call of a save a process is killed before, the newest complete checkpoint stays intact.

    With `replace`, the save replaces a corrupted checkpoint of the same step. An intact one is never saved again,
    because a run resumes from it.
    """
    for replace in (False, True):
        n, completed = 0, False
        while not completed:
            run, n = tmp_path / f"{replace}-{n}", n + 1
            save(run, 1)
            save(run, 2)
            if replace:
                (run / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"")
            step = 2 if replace else 3
            completed = completes_before_call(n, lambda: save(run, step, keep=2))  # noqa: B023, called at once
            loaded = load(latest(run))
            assert loaded.state["step"] in ((1, 2) if replace else (2, 3))
            assert torch.equal(loaded.model["w"], tensors(float(loaded.state["step"]))[0]["w"])
            save(run, 4, keep=2)
            assert load(latest(run)).state["step"] == 4
            names = sorted(os.listdir(run / "checkpoints"))
            assert len(names) == 2, f"no stale files remain: {names}"
        assert n > 12


def test_save_syncs_every_file_before_the_rename(tmp_path, monkeypatch):
    run, calls = tmp_path / "run", []

    def record(function):
        def wrapper(path, *args):
            is_fsync = isinstance(path, int)
            calls.append(os.readlink(f"/proc/self/fd/{path}") if is_fsync else f"rename {Path(path).name}")
            return function(path, *args)

        return wrapper

    monkeypatch.setattr("os.fsync", record(os.fsync))
    monkeypatch.setattr("os.rename", record(os.rename))
    save(run, 1)
    temporary = run / "checkpoints" / ".step_00000001.tmp"
    files = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")
    assert set(calls[:5]) == {str(temporary), *(str(temporary / name) for name in files)}
    assert calls[4:] == [str(temporary), "rename .step_00000001.tmp", str(run / "checkpoints"), str(run)]


def test_save_works_on_a_drive_that_cannot_sync_directories(tmp_path, monkeypatch):
    fsync = os.fsync

    def fsync_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", fsync_files_only)
    save(tmp_path, 1)
    assert load(latest(tmp_path)).state["step"] == 1


def test_keep_every_keeps_periodic_checkpoints(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=1, keep_every=3)
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path)] == [3, 6, 7]


def test_saver_copies_tensors_and_reports_errors(tmp_path, monkeypatch):
    """A save copies the tensors before it returns, waits for the previous save, and reports its error in `wait`."""
    model, optimizer = tensors(1.0)
    started, released = threading.Event(), threading.Event()
    save_file = checkpoint.save_file

    def slow_save_file(*args):
        started.set()
        assert released.wait(20)
        save_file(*args)

    monkeypatch.setattr("babygpt.training.checkpoint.save_file", slow_save_file)
    with Saver(tmp_path, keep=0, keep_every=0) as saver:
        saver.save(1, model, optimizer, STATE)
        assert started.wait(20)
        model["w"].fill_(7.0)  # training continues meanwhile
        optimizer["w"]["exp_avg"].fill_(7.0)
        assert latest(tmp_path) is None
        released.set()
        saver.save(2, model, optimizer, STATE)
        assert torch.equal(load(list_checkpoints(tmp_path)[0]).model["w"], tensors(1.0)[0]["w"])
        saver.wait()
        monkeypatch.setattr("babygpt.training.checkpoint._sync", lambda path: 1 / 0)
        saver.save(3, model, optimizer, STATE)
        with pytest.raises(UserError, match="step 3 could not be written: ZeroDivisionError"):
            saver.wait()
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path)] == [1, 2]
    monkeypatch.setattr("babygpt.training.checkpoint._on_host", lambda tensor: torch.empty(2**50))
    with Saver(tmp_path, keep=0, keep_every=0) as saver:
        saver.save(4, model, optimizer, STATE)
        with pytest.raises(UserError, match="does not fit in host memory"):
            saver.wait()


@pytest.mark.parametrize("world_size", [1, 2])
def test_failed_save_stops_all_ranks_and_keeps_the_previous(world_size, dataset, tmp_path):
    arguments = flags(dataset, tmp_path / "run", saving__every_n_steps=4, model__n_embd=32, **NO_TASKS)
    done = torchrun(world_size, *arguments, fault="disk_full 0 5", check=False)
    assert_user_error(done)
    assert "error: The checkpoint of step 8 could not be written" in done.stderr
    assert "File too large" in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step_00000004"]
    assert load(latest(tmp_path / "run")).state["step"] == 4
    assert read_log(tmp_path / "run" / "log.csv")[-1]["step"] < STEPS - 1, "training stops early"


@pytest.mark.parametrize(("kind", "cause"), [("read_only", "Permission denied"), ("deleted", "No such file")])
def test_deleted_or_read_only_run_directory_stops_the_run(kind, cause, dataset, tmp_path):
    arguments = flags(dataset, tmp_path / "run", saving__every_n_steps=4)
    done = torchrun(2, *arguments, fault=f"{kind} 0 5", check=False)
    assert_user_error(done)
    assert re.search(rf"\nerror: .*{cause}", done.stderr)
    for directory in ("run", "run/checkpoints"):
        (tmp_path / directory).chmod(0o755)
    saved = load(latest(tmp_path / "run")).state["step"]
    assert saved == (4 if kind == "read_only" else 8), "a deleted directory is created again for the next checkpoint"
    torchrun(2, *arguments, "--general.init-from", "resume")
    steps = [row["step"] for row in read_log(tmp_path / "run" / "log.csv")]
    assert steps == list(range(0 if kind == "read_only" else saved, STEPS + 1))


def test_locked_run_directory_is_rejected(dataset, tmp_path):
    """A rejected start changes no file. If the directory is not locked, it deletes a stale marker `stopped`."""
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    arguments = flags(dataset, tmp_path / "run", general__init_from="resume", training__max_steps=2)
    with lock_run_dir(tmp_path / "run", ranks):
        with pytest.raises(ConfigError, match=r"Another process is training in .*run"):
            call(train.main, *arguments)
        assert os.listdir(tmp_path / "run") == [".lock"], "no file is changed"
    assert not (tmp_path / "run").exists(), "the empty directory is deleted"
    call(train.main, *arguments)
    (tmp_path / "run" / STOPPED).touch()
    with pytest.raises(ConfigError, match="n_layer"):
        call(train.main, *arguments, "--model.n-layer", 3)
    markers = [name for name in (STOPPED, FINISHED) if (tmp_path / "run" / name).exists()]
    assert markers == [FINISHED], "`stopped` is deleted, `finished` is kept"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out-dir .* cannot be written to"):
        call(train.main, *flags(dataset, tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == ""


# ---------------------------------------------------------------------------------------------------------
# ranks


@pytest.mark.parametrize(("kind", "rank", "step"), [("nan_weight", 0, 3), ("nan_weight", 1, 6), ("nan_gradient", 1, 4)])
def test_nonfinite_value_on_one_rank_stops_all_ranks(kind, rank, step, dataset, tmp_path):
    done = torchrun(2, *flags(dataset, tmp_path / "run", **NO_TASKS), fault=f"{kind} {rank} {step}", check=False)
    assert_user_error(done)
    loss = r"nan" if kind == "nan_weight" else r"\d\.\d+"
    message = f"error: Step {step}: the loss is {loss} and the gradient norm is nan \\(non-finite on rank {rank}\\)\\."
    assert re.search(message, done.stderr)
    assert checkpoint.step_of(latest(tmp_path / "run")) == step
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.csv")] == list(range(step))
    call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", **NO_TASKS))


def test_rank_with_different_weights_is_named(dataset, tmp_path):
    arguments = flags(dataset, tmp_path / "run", training__compare_ranks_every_n_steps=2, **NO_TASKS)
    done = torchrun(2, *arguments, fault="changed_weight 1 5", check=False)
    assert_user_error(done)
    assert "error: Step 6: the weights of rank 1 differ from those of the other ranks" in done.stderr
    assert checkpoint.step_of(latest(tmp_path / "run")) == 6


@pytest.mark.parametrize("kind", ["sigkill", "hang"])
def test_other_ranks_exit_and_name_the_step_of_a_lost_rank(kind, dataset, tmp_path):
    """Without torchrun, which would kill the other ranks itself."""
    arguments = flags(dataset, tmp_path / "run", general__timeout_minutes=0.1, **NO_TASKS)
    first, second = start_ranks(arguments, (0, 1), fault=f"{kind} 1 5")
    assert first.wait(60) == 2
    stderr = first.stderr.read()
    assert "error: Another rank exited, or did not respond for 0.1 minutes, during step 5 (" in stderr
    assert has_no_traceback(stderr)
    assert second.wait(60) == (-signal.SIGKILL if kind == "sigkill" else 2)
    assert checkpoint.step_of(latest(tmp_path / "run")) in (4, 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_times_out_if_the_other_never_starts(rank, dataset, tmp_path):
    (process,) = start_ranks(flags(dataset, tmp_path / "run", general__timeout_minutes=0.05), (rank,))
    assert process.wait(60) == 2
    stderr = process.stderr.read()
    assert "Another rank exited, or did not respond for 0.05 minutes, during startup (" in stderr
    assert has_no_traceback(stderr)
    assert not (tmp_path / "run").exists()


def start_ranks(arguments: list[str], ranks: tuple[int, ...], fault: str = "record_rows 0 0") -> list[subprocess.Popen]:
    """Start `ranks` of a run with two ranks, without torchrun, as Slurm does."""
    command = [sys.executable, str(ROOT / "tests/support/faulty_train.py"), *arguments]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"TORCHELASTIC_RESTART_COUNT": "0", "FAULT": fault}
    return [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in ranks
    ]  # fmt: skip


def test_torchrun_restart_after_a_killed_rank_loses_nothing(dataset, tmp_path):
    """The store of torchrun still contains the address of the killed rank when the other ranks join again."""
    fork_ranks(2, *flags(dataset, tmp_path / "uninterrupted"))
    arguments = flags(dataset, tmp_path / "run", general__init_from="resume", general__timeout_minutes=0.3)
    torchrun(2, *arguments, fault="sigkill 1 5", restarts=3)
    assert_bitwise_equal(tmp_path / "run", tmp_path / "uninterrupted")


def test_run_resumes_with_another_number_of_ranks(dataset, tmp_path):
    """A run that resumes on 1, 2, 4 and 1 ranks has the rows and losses of an uninterrupted run on one rank."""
    changes = {"model__dropout": 0.0, "sampling__every_n_steps": 0}
    fork_ranks(1, *flags(dataset, tmp_path / "uninterrupted", **changes), fault="record_rows 0 0")
    for world_size in (1, 2, 4):
        arguments = flags(dataset, tmp_path / "run", **changes, general__init_from="resume")
        fork_ranks(world_size, *arguments, fault=f"sigterm {world_size - 1} 2")
        assert not (tmp_path / "run" / FINISHED).exists()
    fork_ranks(1, *arguments, fault="record_rows 0 0")
    assert read_recorded_rows(tmp_path / "run") == read_recorded_rows(tmp_path / "uninterrupted")
    for row, expected in zip(*(read_log(tmp_path / run / "log.csv") for run in ("run", "uninterrupted")), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert row[key] == (expected[key] and pytest.approx(expected[key], rel=1e-5))
        assert (row["tokens"], row["epoch"]) == (expected["tokens"], expected["epoch"])


def test_out_of_memory_message_suggests_settings(dataset, tmp_path):
    done = torchrun(2, *flags(dataset, tmp_path / "run", **NO_TASKS), fault="out_of_memory 1 2", check=False)
    message = "error (rank 1): Out of memory during step 2 (CUDA out of memory. Tried to allocate 2.00 GiB.). Use"
    assert message in done.stderr
    assert "--micro-batch-size 2: " in done.stderr
    assert has_no_traceback(done.stderr)
    losses = []
    for flag in (["--micro-batch-size", 2], ["--activation-checkpointing"]):
        run = tmp_path / flag[0]
        call(train.main, *flags(dataset, run, training__max_steps=3, model__dropout=0.0, **NO_TASKS), *flag)
        losses.append([row["loss"] for row in read_log(run / "log.csv")[:3]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------
# malformed input


def test_malformed_input_is_rejected_or_harmless(dataset, tmp_path):
    """This tries a few inputs of each kind; `python tests/support/fuzzing.py 10000` tries more."""
    counts, failures = fuzz(MalformedInputs(dataset, tmp_path), 180)
    assert failures == []
    assert all(outcomes["rejected"] for outcomes in counts.values())


@pytest.mark.parametrize(
    ("name", "value"), [("losses", ["x"]), ("launches", [True]), ("launches", 5), ("tokenizer", {"name": 3})]
)
def test_rewritten_state_json_is_rejected(name, value, uninterrupted_run, dataset, tmp_path):
    run = copy_killed_run(uninterrupted_run, 1, tmp_path / "run")
    loaded = load(latest(run))
    checkpoint.save(run, 1, loaded.model, loaded.optimizer, loaded.state | {name: value}, keep=0)
    with pytest.raises(UserError, match=r"cannot resume from|is not a valid checkpoint state"):
        call(train.main, *flags(dataset, run, general__init_from="resume"))


def test_invalid_config_json_does_not_prevent_a_resume(uninterrupted_run, dataset, tmp_path):
    for i, text in enumerate(('{"general": 0, "model": [1]}', "[]", "{")):
        run = copy_killed_run(uninterrupted_run, 12, tmp_path / str(i))
        (run / "config.json").write_text(text)
        call(train.main, *flags(dataset, run, general__init_from="resume"))
        assert_bitwise_equal(run, uninterrupted_run)
