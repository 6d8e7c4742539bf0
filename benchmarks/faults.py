"""Faults by the hundred, and what came of them: kills, damage, stops, bad numbers, malformed input.

    python benchmarks/faults.py [--stages kills damage resumes crashes ...] [--out results/faults/cpu.md]

    saving     how long a save holds up training: GPT-2 124M with its optimizer, against a plain torch.save
    kills      SIGKILL at a random instant of saving, again and again, and before each of its calls of the system; what
               `latest` finds must be whole, and no older than the last save that was complete
    damage     checkpoint files with a flipped bit or cut off, read by ours and by plain torch.load
    resumes    a checkpoint at every step of a 40-step run over an epoch's end, dropout on; gone on with from each
    crashes    SIGKILL at random instants of a run with all scenes, the same command again and again until it is done
    stops      SIGTERM at random instants of such a run, on one rank and on two; then gone on with
    numbers    a weight that is no number, on one of two ranks, at some step
    ranks      a run on 1, 2, 4, 8 and again 1 rank
    input      tests/support/fuzzing.py: files of every kind, every field of the configuration

All runs are tiny, on the CPU. Children are forked from this process, which has imported everything already.
"""

import argparse
import contextlib
import io
import itertools
import os
import platform
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
from datetime import date
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
from benchmarks.table import write_table  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

Row = tuple[str, str, str]  # what was tried, how often, what came of it
MODERN = {
    "model__value_embeddings": 1, "model__document_mask": [], "optimizer__momentum_warmup_steps": 10,
    "optimizer__weight_decay": 0.1,
}  # fmt: skip


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does the work, in silence."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)  # as Python exits
        finally:
            os._exit(code)
    return pid


def quietly(main: Callable[[], None], *arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        call(main, *arguments)


def tensors(step: int) -> tuple[dict, dict]:
    weight = torch.full((256, 256), float(step))
    return {"w": weight}, {"w": {"exp_avg": weight + 1, "step": torch.tensor(float(step))}}


# ---------------------------------------------------------------------------------------------------------
# checkpoints


def save_step(run: Path, step: int) -> None:
    checkpoint.save(run, step, *tensors(step), {"step": step, "model": {}, "tokenizer": {"name": "gpt2"}}, 2)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint of `save_step` holds what its name says."""
    loaded, step = checkpoint.load(path), checkpoint.step_of(path)
    model, optimizer = tensors(step)
    right = torch.equal(loaded.model["w"], model["w"]) and loaded.state["step"] == step
    return right and torch.equal(loaded.optimizer["w"]["exp_avg"], optimizer["w"]["exp_avg"])


def kills(folder: Path, count: int, rng: random.Random) -> list[Row]:
    lost = wrong = 0
    during = 0
    run, step = folder / "run", 1
    save_step(run, 1)
    for _ in range(count):
        reader, writer = os.pipe()

        def save_on(first: int = step, writer: int = writer) -> None:
            for step in range(first, first + 1000):  # the first of them again, for it may be there
                save_step(run, step)
                os.write(writer, step.to_bytes(8, "little"))

        pid = forked(save_on)
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(writer)
        told = b"".join(iter(partial(os.read, reader, 65536), b""))
        os.close(reader)
        complete = int.from_bytes(told[-8:], "little") if told else step
        during += any((run / "checkpoints").glob(".step_*"))
        found = checkpoint.latest(run)
        if found is None or checkpoint.step_of(found) < complete:
            lost += 1
            continue
        step = checkpoint.step_of(found)
        wrong += not is_whole(found)
    return [
        ("SIGKILL at a random instant of saving", f"{count:,}", f"{lost} lost, {wrong} wrong; {during:,} hit a save")
    ]


def writes(folder: Path) -> list[Row]:
    """Ends before each call of the system that saving makes, for a new step and for one that is there already."""
    rows = []
    for again in (False, True):
        at, ended, lost = 0, False, 0
        while not ended:
            run, at = folder / f"{again}-{at}", at + 1
            for step in (1, 2):
                save_step(run, step)
            ended = completes_before_call(at, partial(save_step, run, 2 if again else 3))
            found = checkpoint.latest(run)
            lost += found is None or not is_whole(found) or checkpoint.step_of(found) < 2
        rows.append((
            "ended before each call of the system in saving" + " a step anew" * again, f"{at - 1}", f"{lost} lost",
        ))  # fmt: skip
    return rows


def saving(folder: Path) -> list[Row]:
    """Medians of three."""
    model = GPT(GPTConfig(vocab_size=50_257))
    optimizers = adamw(model, 1e-4, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    weights, state = checkpoint.model_tensors(model), optimizer_state(optimizers, model)
    size = sum(t.nbytes for t in [*weights.values(), *(t for s in state.values() for t in s.values())])
    held, whole, plain = [], [], []
    for step in range(3):
        begin = time.perf_counter()
        with checkpoint.Saver(folder / "run", 1, 0) as saver:
            saver.save(step, weights, state, {"step": step})
            held.append(time.perf_counter() - begin)
            saver.wait()
        whole.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        torch.save({"model": weights, "optimizer": state}, folder / "plain.pt")
        plain.append(time.perf_counter() - begin)
    return [(
        f"a save of 124M, {size / 2**30:.1f} GiB with the optimizer", "3",
        f"holds up training for {statistics.median(held):.2f} s and is on the disk after "
        f"{statistics.median(whole):.1f}; torch.save alone, without fsync, would hold it up for "
        f"{statistics.median(plain):.1f}",
    )]  # fmt: skip


def damage(folder: Path, count: int, rng: random.Random) -> list[Row]:
    model, optimizer = tensors(1)
    path = checkpoint.save(folder / "run", 1, model, optimizer, {"step": 1}, 0)
    rows = []
    for kind in ("with a bit flipped", "cut off"):
        refused = plain = 0
        for _ in range(count):
            name = rng.choice((checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST))
            sound = (path / name).read_bytes()
            data, at = bytearray(sound), rng.randrange(len(sound))
            if kind == "cut off":
                del data[at:]
            else:
                data[at] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(data)
            try:
                checkpoint.load(path)
            except UserError:
                refused += 1
            (path / name).write_bytes(sound)
            both = io.BytesIO()
            torch.save({"model": model, "optimizer": optimizer}, both)
            data = bytearray(both.getbuffer())
            if kind == "cut off":
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            try:
                torch.load(io.BytesIO(data), weights_only=True)
            except Exception:
                plain += 1
        rows.append(
            (f"a file of a checkpoint, {kind}", f"{count:,}", f"{refused:,} refused; plain torch.load {plain:,}")
        )
    return rows


# ---------------------------------------------------------------------------------------------------------
# runs


def resumes(folder: Path, dataset: Path, steps: int = 40) -> list[Row]:
    rows = []
    for preset, world, changes in (("gpt2", 1, {}), ("modern", 1, MODERN), ("gpt2", 2, {}), ("modern", 2, MODERN)):
        whole = folder / f"{preset}-{world}"
        line = {"training__max_steps": steps, **changes}
        start = (lambda *a, w=world: torchrun(w, *a)) if world > 1 else (lambda *a: quietly(train.main, *a))
        start(*flags(dataset, whole, preset, **line))
        at = range(1, steps) if world == 1 else range(7, steps, 7)
        same = 0
        for step in at:
            run = copy_killed_run(whole, step, folder / "resumed")
            start(*flags(dataset, run, preset, general__init_from="resume", **line))
            assert_bitwise_equal(run, whole, steps)
            same += 1
            shutil.rmtree(run)
        rows.append((f"`{preset}` gone on with from a step, W = {world}", f"{len(at)}", f"{same} equal to the bit"))
    return rows


def eventful(folder: Path) -> dict[str, object]:
    """Settings of a run with all scenes."""
    return {
        "evaluation__file": save_hellaswag(folder / "questions.jsonl", 100), "evaluation__every_n_steps": 5,
        "sampling__every_n_steps": 5, "saving__every_n_steps": 5, "training__max_steps": 40, "model__block_size": 32,
    }  # fmt: skip


def crashes(folder: Path, dataset: Path, count: int, rng: random.Random) -> list[Row]:
    changes = eventful(folder)
    whole = folder / "whole"
    begin = time.perf_counter()
    quietly(train.main, *flags(dataset, whole, "gpt2", **changes))
    duration, killed = time.perf_counter() - begin, 0
    for i in range(count):
        line = flags(dataset, folder / str(i), "gpt2", general__init_from="resume", **changes)
        for tries in itertools.count():
            pid = forked(partial(call, train.main, *line))
            killer = threading.Timer(rng.uniform(0, duration / 2 * 1.2**tries), os.kill, (pid, signal.SIGKILL))
            killer.start()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            killer.cancel()
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            killed += 1
        assert_bitwise_equal(folder / str(i), whole, 40)
    return [("SIGKILL at a random instant of a run, the same command again", f"{killed}",
             f"{count} runs all equal to the bit to the one unbroken: log, weights, optimizer, samples")]  # fmt: skip


def stops(folder: Path, dataset: Path, count: int, rng: random.Random, world: int = 1) -> list[Row]:
    changes = eventful(folder)
    whole, timed = folder / "whole", folder / "timed"

    def start(line: list[str]) -> int:
        """The pid of the run, or of its torchrun."""
        if world == 1:
            return forked(lambda: call(train.main, *line))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        return forked(lambda: os.execv(sys.executable, [*command, str(ROOT / "train.py"), *line]))

    for run in (whole, timed):
        begin = time.perf_counter()
        os.waitpid(start(flags(dataset, run, "gpt2", **changes)), 0)
        duration = time.perf_counter() - begin
    delays: list[float] = []
    codes: set[int] = set()
    at: set[int] = set()
    lost = 0
    for i in range(count):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        line = flags(dataset, run, "gpt2", general__init_from="resume", **changes)
        pid = start(line)
        time.sleep(duration * (i + rng.random()) / count)
        rows = read_log(run / "log.csv") if (run / "log.csv").exists() else []
        done = sum(row["loss"] is not None for row in rows)  # the last row has scores alone
        begin = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        delays.append(time.perf_counter() - begin)
        found = checkpoint.latest(run)
        kept = checkpoint.step_of(found) if found else 0
        lost += max(0, done - kept)
        at.add(kept)
        marker = [name for name in (STOPPED, FINISHED) if (run / name).exists()]
        assert len(marker) == 1 or (kept == 0 and not marker), marker  # none before the run's folder was there
        os.waitpid(start(line), 0)
        assert_bitwise_equal(run, whole, 40)
    assert codes <= ({0} if world == 1 else {0, 1, -signal.SIGTERM}), codes  # torchrun tells 1 of any it had to stop
    return [(
        f"SIGTERM at a random instant of a run, W = {world}, then gone on with", f"{count}",
        f"{lost} steps lost, {len(at)} different steps, all equal to the bit; exit codes {sorted(codes)}; ended within "
        f"{max(delays):.1f} s, median {statistics.median(delays):.1f}",
    )]  # fmt: skip


def numbers(folder: Path, dataset: Path, count: int) -> list[Row]:
    right = 0
    for i in range(count):
        rank, step = i % 2, 1 + i // 2
        run = folder / str(i)
        line = flags(dataset, run, validation__every_n_steps=0, sampling__every_n_steps=0)
        done = torchrun(2, *line, fault=f"nan_weight {rank} {step}", check=False)
        told = f"error: Step {step}: the loss is nan" in done.stderr
        logged = [row["step"] for row in read_log(run / "log.csv")] == list(range(step))
        sound = all(
            tensor.isfinite().all()
            for path in checkpoint.checkpoints(run)
            for tensor in checkpoint.load(path).model.values()
        )
        right += told and logged and sound and done.returncode != 0
    return [
        ("a weight that is no number, on one of two ranks", f"{count}", f"{right} stopped at that step, none saved")
    ]


def ranks(folder: Path, dataset: Path) -> list[Row]:
    changes = {
        "model__dropout": 0.0, "sampling__every_n_steps": 0, "training__max_steps": 30, "training__micro_batch_size": 2,
    }  # fmt: skip
    torchrun(1, *flags(dataset, folder / "whole", "gpt2", **changes), fault="record_rows 0 0")
    line = flags(dataset, folder / "run", "gpt2", **changes, general__init_from="resume")
    for world in (1, 2, 4, 8):
        torchrun(world, *line, fault=f"sigterm {world - 1} 2")
    torchrun(1, *line, fault="record_rows 0 0")
    assert read_recorded_rows(folder / "run") == read_recorded_rows(folder / "whole")
    one, other = (read_log(folder / name / "log.csv") for name in ("run", "whole"))
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(one[:-1], other[:-1], strict=True))
    return [
        ("a run on 1, 2, 4, 8 and 1 rank", "1", f"the same rows; losses within {apart:.1e} of one rank's, relative")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["saving", "kills", "damage", "resumes", "crashes", "stops", "numbers", "ranks", "input"]
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual numbers")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def times(usual: int) -> int:
        return max(2, round(usual * options.share))

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as top:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dataset = make_small_dataset(Path(top))
        for stage in options.stages:
            folder, rng, begin = Path(top) / stage, random.Random(0), time.perf_counter()
            folder.mkdir()
            if stage == "saving":
                found = saving(folder)
            elif stage == "kills":
                found = kills(folder, times(1000), rng) + writes(folder)
            elif stage == "damage":
                found = damage(folder, times(300), rng)
            elif stage == "resumes":
                found = resumes(folder, dataset)
            elif stage == "crashes":
                found = crashes(folder, dataset, times(20), rng)
            elif stage == "stops":
                found = stops(folder, dataset, times(50), rng)
                shutil.rmtree(folder / "whole")
                shutil.rmtree(folder / "timed")
                found += stops(folder, dataset, times(10), rng, world=2)
            elif stage == "numbers":
                found = numbers(folder, dataset, times(20))
            elif stage == "ranks":
                found = ranks(folder, dataset)
            else:
                inputs = MalformedInputs(dataset, folder)
                counts, wrong = fuzz(inputs, times(17_500))  # enough for every change of a setting
                found = [
                    (f"malformed: {name.replace('_', ' ')}", f"{c.total():,}",
                     f"{c['refused']:,} refused in a sentence, {c['accepted']:,} harmless, {c['failed']} else")
                    for name, c in counts.items()
                ]  # fmt: skip
                print(*wrong, sep="\n", file=sys.stderr)
            print(f"{stage}: {found}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            rows += found
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "",
        "| fault | times | what came of it |",
        "|---|---:|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
