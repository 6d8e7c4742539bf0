"""Inject faults many times and count the outcomes: kills, corrupted files, stops, NaN, malformed input.

    python benchmarks/faults.py [--stages kills damage resumes crashes ...] [--out results/faults/cpu.md]

    saving     how long a save blocks training, for GPT-2 124M with its optimizer, compared with torch.save
    kills      SIGKILL at random moments of repeated saves, and an exit before each system call of a save; the latest
               checkpoint must be intact and at least as recent as the last completed save
    damage     checkpoint files with a flipped bit or truncated, read by `checkpoint.load` and by torch.load
    resumes    a 40-step run with dropout that crosses the end of an epoch, resumed from each of its steps
    crashes    SIGKILL at random moments of a run with all periodic tasks; the same command runs until it completes
    stops      SIGTERM at random moments of such a run, on one rank and on two; the run is then resumed
    numbers    a weight that becomes NaN on one of two ranks, at different steps
    ranks      a run on 1, 2, 4, 8 and again 1 rank
    input      tests/support/fuzzing.py: malformed files of every kind, and every field of the configuration

All runs use tiny models on the CPU. Child processes are forked from this process, which has imported all modules.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from support.fuzzing import MalformedInputs, fuzz, make_small_dataset  # noqa: E402
from support.helpers import call, save_hellaswag  # noqa: E402
from support.runs import (  # noqa: E402
    assert_bitwise_equal,
    completes_before_call,
    copy_killed_run,
    flags,
    read_recorded_rows,
    torchrun,
)

import train  # noqa: E402
from babygpt.errors import UserError  # noqa: E402
from babygpt.training import checkpoint  # noqa: E402
from babygpt.training.log import read_log  # noqa: E402
from babygpt.training.optim import adamw, optimizer_state  # noqa: E402
from babygpt.training.run_dir import FINISHED, STOPPED  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

TableRow = tuple[str, str, str]  # fault, count, outcome
MODERN = {
    "model__value_embeddings": 1, "model__document_mask": [], "optimizer__momentum": 0.95,
    "optimizer__momentum_warmup_steps": 10, "optimizer__weight_decay": 0.1,
}  # fmt: skip


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process without output, and return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as devnull:
                os.dup2(devnull.fileno(), 1)
                os.dup2(devnull.fileno(), 2)
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)  # like Python
        finally:
            os._exit(code)
    return pid


def call_quietly(main: Callable[[], None], *arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        call(main, *arguments)


def make_tensors(step: int) -> tuple[dict, dict]:
    weight = torch.full((256, 256), float(step))
    return {"w": weight}, {"w": {"exp_avg": weight + 1, "step": torch.tensor(float(step))}}


# ---------------------------------------------------------------------------------------------------------
# checkpoints


def save_step(run: Path, step: int) -> None:
    checkpoint.save(run, step, *make_tensors(step), {"step": step, "model": {}, "tokenizer": {"name": "gpt2"}}, 2)


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint of `save_step` contains the tensors of its step."""
    loaded, step = checkpoint.load(path), checkpoint.step_of(path)
    model, optimizer = make_tensors(step)
    is_equal = torch.equal(loaded.model["w"], model["w"]) and loaded.state["step"] == step
    return is_equal and torch.equal(loaded.optimizer["w"]["exp_avg"], optimizer["w"]["exp_avg"])


def kill_saves(directory: Path, count: int, rng: random.Random) -> list[TableRow]:
    lost = corrupted = interrupted = 0
    run, step = directory / "run", 1
    save_step(run, 1)
    for _ in range(count):
        reader, writer = os.pipe()

        def save_steps(first: int = step, writer: int = writer) -> None:
            for step in range(first + 1, first + 1000):
                save_step(run, step)
                os.write(writer, step.to_bytes(8, "little"))

        pid = fork(save_steps)
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(writer)
        output = b"".join(iter(partial(os.read, reader, 65536), b""))
        os.close(reader)
        completed = int.from_bytes(output[-8:], "little") if output else step
        interrupted += any((run / "checkpoints").glob(".step_*"))
        latest = checkpoint.latest(run)
        if latest is None or checkpoint.step_of(latest) < completed:
            lost += 1
            continue
        step = checkpoint.step_of(latest)
        corrupted += not is_intact(latest)
    outcome = f"{lost} checkpoints lost, {corrupted} corrupted; {interrupted:,} kills interrupted a save"
    return [("SIGKILL at a random moment of repeated saves", f"{count:,}", outcome)]


def exit_before_calls(directory: Path) -> list[TableRow]:
    """Exit before each system call of a save, for a new step and for a step whose checkpoint is corrupted."""
    rows = []
    for replace in (False, True):
        num_calls, completed, lost = 0, False, 0
        while not completed:
            run, num_calls = directory / f"{replace}-{num_calls}", num_calls + 1
            for step in (1, 2):
                save_step(run, step)
            if replace:
                (run / "checkpoints" / "step_00000002" / checkpoint.MODEL).write_bytes(b"")
            completed = completes_before_call(num_calls, partial(save_step, run, 2 if replace else 3))
            latest = checkpoint.latest(run)
            lost += latest is None or not is_intact(latest) or checkpoint.step_of(latest) < (1 if replace else 2)
        fault = "exit before each system call of a save" + " that replaces a corrupted checkpoint" * replace
        rows.append((fault, f"{num_calls - 1}", f"{lost} checkpoints lost"))
    return rows


def time_saves(directory: Path) -> list[TableRow]:
    """Measure the median times of three saves."""
    model = GPT(GPTConfig(vocab_size=50_257))
    optimizers = adamw(model, 1e-4, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    weights, state = checkpoint.model_tensors(model), optimizer_state(optimizers, model)
    size = sum(t.nbytes for t in [*weights.values(), *(t for s in state.values() for t in s.values())])
    blocked_times, total_times, torch_save_times = [], [], []
    for step in range(3):
        start = time.perf_counter()
        with checkpoint.Saver(directory / "run", 1, 0) as saver:
            saver.save(step, weights, state, {"step": step})
            blocked_times.append(time.perf_counter() - start)
            saver.wait()
        total_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.save({"model": weights, "optimizer": state}, directory / "torch_save.pt")
        torch_save_times.append(time.perf_counter() - start)
    return [(
        f"save of GPT-2 124M, {size / 2**30:.1f} GiB with the optimizer (no fault)", "3",
        f"blocks training for {statistics.median(blocked_times):.2f} s and is on disk after "
        f"{statistics.median(total_times):.1f} s; torch.save, without fsync, would block it for "
        f"{statistics.median(torch_save_times):.1f} s",
    )]  # fmt: skip


def corrupt_checkpoints(directory: Path, count: int, rng: random.Random) -> list[TableRow]:
    model, optimizer = make_tensors(1)
    path = checkpoint.save(directory / "run", 1, model, optimizer, {"step": 1}, 0)
    rows = []
    for kind in ("bit flip in", "truncated"):
        rejected = torch_load_failed = 0
        for _ in range(count):
            name = rng.choice((checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST))
            original = (path / name).read_bytes()
            data, offset = bytearray(original), rng.randrange(len(original))
            if kind == "truncated":
                del data[offset:]
            else:
                data[offset] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(data)
            try:
                checkpoint.load(path)
            except UserError:
                rejected += 1
            (path / name).write_bytes(original)
            buffer = io.BytesIO()
            torch.save({"model": model, "optimizer": optimizer}, buffer)
            data = bytearray(buffer.getbuffer())
            if kind == "truncated":
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            try:
                torch.load(io.BytesIO(data), weights_only=True)
            except Exception:
                torch_load_failed += 1
        outcome = f"{rejected:,} rejected; torch.load of a torch.save file rejects {torch_load_failed:,}"
        rows.append((f"{kind} checkpoint file", f"{count:,}", outcome))
    return rows


# ---------------------------------------------------------------------------------------------------------
# runs


def resume_runs(directory: Path, dataset: Path, steps: int = 40) -> list[TableRow]:
    rows = []
    for preset, world_size, changes in (("gpt2", 1, {}), ("modern", 1, MODERN), ("gpt2", 2, {}), ("modern", 2, MODERN)):
        reference = directory / f"{preset}-{world_size}"
        settings = {"training__max_steps": steps, **changes}
        start = (
            (lambda *a, n=world_size: torchrun(n, *a)) if world_size > 1 else (lambda *a: call_quietly(train.main, *a))
        )
        start(*flags(dataset, reference, preset, **settings))
        resume_steps = range(1, steps) if world_size == 1 else range(7, steps, 7)
        equal = 0
        for step in resume_steps:
            run = copy_killed_run(reference, step, directory / "resumed")
            start(*flags(dataset, run, preset, general__init_from="resume", **settings))
            assert_bitwise_equal(run, reference, steps)
            equal += 1
            shutil.rmtree(run)
        fault = f"`{preset}` resumed from a step, W = {world_size}"
        rows.append((fault, f"{len(resume_steps)}", f"{equal} bitwise equal"))
    return rows


def periodic_task_settings(directory: Path) -> dict[str, object]:
    """Return the settings of a run with all periodic tasks."""
    return {
        "evaluation__file": save_hellaswag(directory / "hellaswag.jsonl", 100), "evaluation__every_n_steps": 5,
        "sampling__every_n_steps": 5, "saving__every_n_steps": 5, "training__max_steps": 40, "model__block_size": 32,
    }  # fmt: skip


def kill_runs(directory: Path, dataset: Path, count: int, rng: random.Random) -> list[TableRow]:
    changes = periodic_task_settings(directory)
    reference = directory / "reference"
    start = time.perf_counter()
    call_quietly(train.main, *flags(dataset, reference, "gpt2", **changes))
    duration, killed = time.perf_counter() - start, 0
    for i in range(count):
        arguments = flags(dataset, directory / str(i), "gpt2", general__init_from="resume", **changes)
        for attempt in itertools.count():
            pid = fork(partial(call, train.main, *arguments))
            killer = threading.Timer(rng.uniform(0, duration / 2 * 1.2**attempt), os.kill, (pid, signal.SIGKILL))
            killer.start()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            killer.cancel()
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            killed += 1
        assert_bitwise_equal(directory / str(i), reference, 40)
    outcome = f"{count} runs, all bitwise equal to the uninterrupted run: log, weights, optimizer, samples"
    return [("SIGKILL at a random moment of a run, then the same command again", f"{killed}", outcome)]


def stop_runs(directory: Path, dataset: Path, count: int, rng: random.Random, world_size: int = 1) -> list[TableRow]:
    changes = periodic_task_settings(directory)
    reference, timed = directory / "reference", directory / "timed"

    def start(arguments: list[str]) -> int:
        """Start a run and return the process id of the run or its torchrun."""
        if world_size == 1:
            return fork(lambda: call(train.main, *arguments))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        return fork(lambda: os.execv(sys.executable, [*command, str(ROOT / "train.py"), *arguments]))

    for run in (reference, timed):
        start_time = time.perf_counter()
        os.waitpid(start(flags(dataset, run, "gpt2", **changes)), 0)
        duration = time.perf_counter() - start_time
    delays: list[float] = []
    codes: set[int] = set()
    stopped_steps: set[int] = set()
    lost = 0
    for i in range(count):
        run = directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        arguments = flags(dataset, run, "gpt2", general__init_from="resume", **changes)
        pid = start(arguments)
        time.sleep(duration * (i + rng.random()) / count)
        rows = read_log(run / "log.csv") if (run / "log.csv").exists() else []
        done = sum(row["loss"] is not None for row in rows)  # the last row contains only scores
        start_time = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        delays.append(time.perf_counter() - start_time)
        latest = checkpoint.latest(run)
        saved_step = checkpoint.step_of(latest) if latest else 0
        lost += max(0, done - saved_step)
        stopped_steps.add(saved_step)
        markers = [name for name in (STOPPED, FINISHED) if (run / name).exists()]
        assert len(markers) == 1 or (saved_step == 0 and not markers), markers  # no marker: no run directory yet
        os.waitpid(start(arguments), 0)
        assert_bitwise_equal(run, reference, 40)
    expected_codes = {0} if world_size == 1 else {0, 1, -signal.SIGTERM}  # torchrun exits with 1 if it stops a rank
    assert codes <= expected_codes, codes
    return [(
        f"SIGTERM at a random moment of a run, W = {world_size}, then resumed", f"{count}",
        f"{lost} steps lost, stopped at {len(stopped_steps)} different steps, all bitwise equal; exit codes "
        f"{sorted(codes)}; exit after at most {max(delays):.1f} s, median {statistics.median(delays):.1f} s",
    )]  # fmt: skip


def set_nan_weights(directory: Path, dataset: Path, count: int) -> list[TableRow]:
    stopped = 0
    for i in range(count):
        rank, step = i % 2, 1 + i // 2
        run = directory / str(i)
        arguments = flags(dataset, run, validation__every_n_steps=0, sampling__every_n_steps=0)
        process = torchrun(2, *arguments, fault=f"nan_weight {rank} {step}", check=False)
        is_reported = f"error: Step {step}: the loss is nan" in process.stderr
        is_log_complete = [row["step"] for row in read_log(run / "log.csv")] == list(range(step))
        is_finite = all(
            tensor.isfinite().all()
            for path in checkpoint.list_checkpoints(run)
            for tensor in checkpoint.load(path).model.values()
        )
        stopped += is_reported and is_log_complete and is_finite and process.returncode != 0
    outcome = f"{stopped} stopped at that step without saving a NaN"
    return [("a weight becomes NaN on one of two ranks", f"{count}", outcome)]


def change_world_size(directory: Path, dataset: Path) -> list[TableRow]:
    changes = {
        "model__dropout": 0.0, "sampling__every_n_steps": 0, "training__max_steps": 30, "training__micro_batch_size": 2,
    }  # fmt: skip
    torchrun(1, *flags(dataset, directory / "reference", "gpt2", **changes), fault="record_rows 0 0")
    arguments = flags(dataset, directory / "run", "gpt2", **changes, general__init_from="resume")
    for world_size in (1, 2, 4, 8):
        torchrun(world_size, *arguments, fault=f"sigterm {world_size - 1} 2")
    torchrun(1, *arguments, fault="record_rows 0 0")
    assert read_recorded_rows(directory / "run") == read_recorded_rows(directory / "reference")
    log, expected = (read_log(directory / name / "log.csv") for name in ("run", "reference"))
    difference = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(log[:-1], expected[:-1], strict=True))
    outcome = f"the same rows; losses within {difference:.1e} (relative) of a run on one rank"
    return [("a run on 1, 2, 4, 8 and 1 rank", "1", outcome)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["saving", "kills", "damage", "resumes", "crashes", "stops", "numbers", "ranks", "input"]
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages, help="stages to run (default: all)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="factor for the number of repetitions (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def scale(count: int) -> int:
        return max(2, round(count * options.share))

    rows: list[TableRow] = []
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dataset = make_small_dataset(Path(temporary))
        for stage in options.stages:
            directory, rng, start = Path(temporary) / stage, random.Random(0), time.perf_counter()
            directory.mkdir()
            if stage == "saving":
                stage_rows = time_saves(directory)
            elif stage == "kills":
                stage_rows = kill_saves(directory, scale(1000), rng) + exit_before_calls(directory)
            elif stage == "damage":
                stage_rows = corrupt_checkpoints(directory, scale(300), rng)
            elif stage == "resumes":
                stage_rows = resume_runs(directory, dataset)
            elif stage == "crashes":
                stage_rows = kill_runs(directory, dataset, scale(20), rng)
            elif stage == "stops":
                stage_rows = stop_runs(directory, dataset, scale(50), rng)
                shutil.rmtree(directory / "reference")
                shutil.rmtree(directory / "timed")
                stage_rows += stop_runs(directory, dataset, scale(10), rng, world_size=2)
            elif stage == "numbers":
                stage_rows = set_nan_weights(directory, dataset, scale(20))
            elif stage == "ranks":
                stage_rows = change_world_size(directory, dataset)
            else:
                inputs = MalformedInputs(dataset, directory)
                counts, failures = fuzz(inputs, scale(17_500))  # covers all changes of settings
                stage_rows = [
                    (f"malformed: {name.replace('_', ' ')}", f"{c.total():,}",
                     f"{c['rejected']:,} rejected with a message, {c['accepted']:,} accepted, {c['failed']} failed")
                    for name, c in counts.items()
                ]  # fmt: skip
                print(*failures, sep="\n", file=sys.stderr)
            print(f"{stage}: {stage_rows}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            rows += stage_rows
    lines = [
        machine(),
        "",
        "| fault | count | outcome |",
        "|---|---:|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
