"""Faults by the hundred, and what came of them: kills, damage, stops, bad numbers, malformed input.

    python benchmarks/faults.py [--stages kills damage resumes stops numbers ranks input] [--out results/faults/cpu.md]

    kills      SIGKILL at a random instant of saving, again and again; what `latest` finds must be whole, and no older
               than the last save that was complete
    damage     checkpoint files with a flipped bit or cut off, read by ours and by plain torch.load
    resumes    a checkpoint at every step of a 40-step run over an epoch's end, dropout on; gone on with from each
    stops      SIGTERM at random instants of a run with all scenes; then gone on with
    numbers    a weight that is no number, on one of two ranks, at some step
    ranks      a run on 1, 2, 4 and again 1 rank
    input      tests/fuzzing.py

All runs are tiny, on the CPU. Children are forked from this process, which has imported everything already.
"""

import argparse
import contextlib
import io
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from fuzzing import Kinds, fuzz, small_dataset  # noqa: E402
from helpers import call, save_hellaswag  # noqa: E402
from table import show  # noqa: E402

import checkpoint  # noqa: E402
import train  # noqa: E402
from errors import UserError  # noqa: E402
from log import read_log  # noqa: E402
from runs import assert_equal_to_the_bit, cut_back_to, flags, torchrun  # noqa: E402

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
            code = end.code or 0
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


def kills(folder: Path, count: int, rng: random.Random) -> list[Row]:
    lost = wrong = 0
    during = 0
    run, step = folder / "run", 1
    checkpoint.save(run, 1, *tensors(1), {"step": 1, "model": {}, "tokenizer": {"name": "gpt2"}}, 2)
    for _ in range(count):
        reader, writer = os.pipe()

        def save_on(first=step, writer=writer) -> None:
            for step in range(first, first + 1000):  # the first of them again, for it may be there
                state = {"step": step, "model": {}, "tokenizer": {"name": "gpt2"}}
                checkpoint.save(run, step, *tensors(step), state, 2)
                os.write(writer, step.to_bytes(8, "little"))

        pid = forked(save_on)
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(writer)
        told = b"".join(iter(lambda reader=reader: os.read(reader, 65536), b""))
        os.close(reader)
        complete = int.from_bytes(told[-8:], "little") if told else step
        during += any((run / "checkpoints").glob(".step_*"))
        found = checkpoint.latest(run)
        if found is None or checkpoint.step_of(found) < complete:
            lost += 1
            continue
        loaded, step = checkpoint.load(found), checkpoint.step_of(found)
        right = torch.equal(loaded.model["w"], tensors(step)[0]["w"]) and loaded.state["step"] == step
        wrong += not (right and torch.equal(loaded.optimizer["w"]["exp_avg"], tensors(step)[1]["w"]["exp_avg"]))
    return [
        ("SIGKILL at a random instant of saving", f"{count:,}", f"{lost} lost, {wrong} wrong; {during:,} hit a save")
    ]


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
            run = cut_back_to(whole, step, folder / "resumed")
            start(*flags(dataset, run, preset, general__init_from="resume", **line))
            assert_equal_to_the_bit(run, whole, steps)
            same += 1
            shutil.rmtree(run)
        rows.append((f"`{preset}` gone on with from a step, W = {world}", f"{len(at)}", f"{same} equal to the bit"))
    return rows


def stops(folder: Path, dataset: Path, count: int, rng: random.Random) -> list[Row]:
    changes = {
        "evaluation__file": save_hellaswag(folder / "questions.jsonl", 100), "evaluation__every_n_steps": 5,
        "sampling__every_n_steps": 5, "saving__every_n_steps": 5, "training__max_steps": 40, "model__block_size": 32,
    }  # fmt: skip
    whole = folder / "whole"
    quietly(train.main, *flags(dataset, whole, **changes))
    begin = time.perf_counter()
    pid = forked(lambda: call(train.main, *flags(dataset, folder / "timed", **changes)))
    os.waitpid(pid, 0)
    duration = time.perf_counter() - begin
    delays, codes, lost, at = [], set(), 0, set()
    for i in range(count):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        line = flags(dataset, run, general__init_from="resume", **changes)
        pid = forked(lambda line=line: call(train.main, *line))
        time.sleep(duration * (i + rng.random()) / count)
        done = len(read_log(run / "log.csv")) if (run / "log.csv").exists() else 0
        begin = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        delays.append(time.perf_counter() - begin)
        found = checkpoint.latest(run)
        kept = checkpoint.step_of(found) if found else 0
        lost += max(0, done - kept)
        at.add(kept)
        quietly(train.main, *line)
        assert_equal_to_the_bit(run, whole, 40)
    return [(
        "SIGTERM at a random instant of a run, then gone on with", f"{count}",
        f"{lost} steps lost, {len(at)} different steps, all equal to the bit; exit codes {sorted(codes)}; ended within "
        f"{max(delays):.1f} s, median {statistics.median(delays):.1f}",
    )]  # fmt: skip


def numbers(folder: Path, dataset: Path, count: int) -> list[Row]:
    right = 0
    for i in range(count):
        rank, step = i % 2, 1 + i // 2
        run = folder / str(i)
        line = flags(dataset, run, validation__every_n_steps=0, sampling__every_n_steps=0)
        done = torchrun(2, *line, fault=f"nan {rank} {step}", check=False)
        told = f"error: step {step}: loss is nan" in done.stderr
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
    changes = {"model__dropout": 0.0, "sampling__every_n_steps": 0}
    quietly(train.main, *flags(dataset, folder / "whole", **changes))
    line = flags(dataset, folder / "run", **changes, general__init_from="resume")
    for world in (1, 2, 4):
        torchrun(world, *line, fault=f"stop {world - 1} 2")
    quietly(train.main, *line)
    one, other = (read_log(folder / name / "log.csv") for name in ("run", "whole"))
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(one[:-1], other[:-1], strict=True))
    return [("a run on 1, 2, 4 and 1 rank", "1", f"losses within {apart:.1e} of one rank's, relative")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["kills", "damage", "resumes", "stops", "numbers", "ranks", "input"]
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
            dataset = small_dataset(Path(top))
        for stage in options.stages:
            folder, rng, begin = Path(top) / stage, random.Random(0), time.perf_counter()
            folder.mkdir()
            if stage == "kills":
                found = kills(folder, times(1000), rng)
            elif stage == "damage":
                found = damage(folder, times(300), rng)
            elif stage == "resumes":
                found = resumes(folder, dataset)
            elif stage == "stops":
                found = stops(folder, dataset, times(50), rng)
            elif stage == "numbers":
                found = numbers(folder, dataset, times(20))
            elif stage == "ranks":
                found = ranks(folder, dataset)
            else:
                counts, wrong = fuzz(Kinds(dataset, folder), times(10_000))
                found = [
                    (f"malformed: {name[2:].replace('_', ' ')}", f"{c.total():,}",
                     f"{c['refused']:,} refused in a sentence, {c['taken']:,} harmless, {c['wrong']} else")
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
    show(lines, options.out)


if __name__ == "__main__":
    main()
