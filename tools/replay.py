"""Verify a run: train again from some of its checkpoints to the next ones, and compare the results.

    python -m tools.replay out/gpt2 --samples 5
    torchrun --standalone --nproc_per_node=8 -m tools.replay out/gpt2

Each checkpoint records the settings, the fingerprint of the data, and the versions that produced it. On a CPU, with the
same versions and number of ranks, the logged numbers, weights and optimizer state must be bitwise equal. Otherwise they
must agree within a tolerance, and the largest difference is printed. The run directory is not modified. The exit code
is 1 if anything differs.
"""

import hashlib
import logging
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from babygpt.console import console
from babygpt.constraints import Positive, RunArgument, parse_arguments
from babygpt.data.shards import open_dataset
from babygpt.errors import UserError
from babygpt.errors import run as run_script
from babygpt.training import checkpoint
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.log import read_log
from babygpt.training.run_dir import provenance, read_config
from babygpt.training.signals import StopSignals
from train import set_up, train
from train_config import bind, from_json, resolve, variant

COMPARED = ("tokens", "epoch", "loss", "val_loss", "val_bpb", "hellaswag", "lr", "grad_norm")
# where other hardware rounds otherwise, or other ranks draw other dropout: relative to the value, and for weights to
# how far they moved meanwhile. The norm of one gradient may be anywhere then
TOLERANCES = {"tokens": 0.0, "epoch": 0.0, "lr": 1e-12, "loss": 2e-2, "val_loss": 2e-2, "val_bpb": 2e-2}
WEIGHT_TOLERANCE = 0.2


@dataclass
class Segment:
    """What lies between two checkpoints that follow each other; the first begins with `begin` None.

    `pieces` are the steps and the launch of each time that the run was started or gone on with in there.
    """

    begin: Path | None
    end: Path

    def __post_init__(self):
        start, stop = checkpoint.step_of(self.begin) if self.begin else 0, checkpoint.step_of(self.end)
        self.steps, launches = range(start, stop), checkpoint.read_state(self.end)["launches"]
        ends = [*(launch["step"] for launch in launches[1:]), stop]
        spans = [range(max(start, launch["step"]), end) for launch, end in zip(launches, ends, strict=True)]
        self.pieces = [(span, launch) for span, launch in zip(spans, launches, strict=True) if span]

    def __str__(self) -> str:
        return f"steps {self.steps.start:,} to {self.steps.stop:,}"


def segments(run: Path) -> list[Segment]:
    """Those that can be trained again. UserError where there is none or a checkpoint is damaged."""
    found = checkpoint.checkpoints(run)
    for path in found:
        checkpoint.verify(path)
        if not checkpoint.read_state(path).get("launches"):
            raise UserError(f"{path} was made before runs kept what an audit needs.")
    pairs: list[tuple[Path | None, Path]] = [*pairwise(found)]
    if found and checkpoint.read_state(found[0])["launches"][0]["config"]["general"]["init_from"] == "scratch":
        pairs.insert(0, (None, found[0]))
    if not pairs:
        raise UserError(
            f"{run} has no two checkpoints, and none from scratch: nothing can be trained again. A run keeps them all "
            "with --saving.keep 0, or every so many with --saving.keep-every."
        )
    try:
        return [Segment(*pair) for pair in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoints of {run} don't tell how they were made ({error!r:.100}).") from None


def complaints_about_the_record(run: Path) -> Iterator[str]:
    """What is wrong with log.csv and config.json without training anything again."""
    states = [checkpoint.read_state(path) for path in checkpoint.checkpoints(run)]
    newest = states[-1]
    for state in states:
        if state["launches"] != newest["launches"][: len(state["launches"])]:
            yield f"step {state['step']:,} was launched otherwise than the last checkpoint says"
    steps = [row["step"] for row in read_log(run / "log.csv")]
    if steps != list(range(len(steps))):
        at = next(i for i, step in enumerate(steps) if step != i)
        yield f"log.csv: row {at} is of step {steps[at]}; each step must stand once, in order"
    if len(steps) < newest["step"]:
        yield f"log.csv ends with step {steps[-1] if steps else 0}, the checkpoints with {newest['step']}"
    told, sections = read_config(run / "config.json"), ("data", "model", "training", "optimizer")
    kept = [launch["config"] for launch in newest["launches"]]
    if any(all(told.get(section) == config[section] for section in sections) for config in kept):
        return  # an earlier launch's, where the last was killed between its checkpoint and this file
    for section in sections:
        for name, value in kept[-1][section].items():
            if told.get(section, {}).get(name) != value:
                yield f"config.json: {section}.{name} is not the {value} that the last checkpoint was made with"


def replay(segment: Segment, folder: Path, ranks: Ranks) -> tuple[Path, int]:
    """Trains a segment again in `folder`, each piece with its own settings; returns the run's folder, and how many
    questions of HellaSwag it was asked."""
    out = folder / "run"
    if ranks.is_main:
        (out / "checkpoints").mkdir(parents=True)
        if segment.begin:
            (out / "checkpoints" / segment.begin.name).symlink_to(segment.begin.resolve())
    ranks.barrier()
    for steps, launch in segment.pieces:
        config = variant(
            from_json(launch["config"]),
            general={
                "out_dir": out, "init_from": "resume", "device": ranks.device.type,
                "mode": tuple(mode for mode in launch["config"]["general"]["mode"] if mode != "sample"),
            },
            saving={"every_n_steps": steps.stop, "keep": 0},
            logging={"every_n_steps": 0},
        )  # fmt: skip
        dataset = open_dataset(config.data.dataset)
        config = bind(resolve(config, ranks.world_size), dataset)
        with checkpoint.Saver(out, 0, 0) as saver:
            run = set_up(config, dataset, ranks)
            train(run, StopSignals(), saver, until=steps.stop)
    return out, len(run.examples)


def complaints_about_a_segment(
    run: Path, segment: Segment, replayed: Path, questions: int, exact: bool
) -> Iterator[str]:
    """Where log or checkpoint are not what training again gives."""
    rows = {row["step"]: row for row in read_log(run / "log.csv")}
    again = {row["step"]: row for row in read_log(replayed / "log.csv")}
    one, other = checkpoint.load(segment.end), checkpoint.load(replayed / "checkpoints" / segment.end.name)
    there, here = one.state, other.state
    is_last = segment.steps.stop == there["launches"][-1]["config"]["training"]["max_steps"]
    if rows and (rows.get(segment.steps.stop, {}).get("loss") is not None or max(rows) > segment.steps.stop):
        is_last = False  # the run was gone on with beyond it, and that row begun anew
    for step in [*segment.steps, *([segment.steps.stop] if is_last else [])]:
        for name in COMPARED:
            told, found = rows.get(step, {}).get(name), again[step][name]
            if told != found and (exact or not _close(name, told, found, questions)):
                yield f"log.csv, step {step}: {name} is {told}, and {found} when trained again"
                return  # what follows from it differs too
    for name in ("step", "tokens", "position", "losses", "data", "model", "tokenizer"):
        if there[name] != here[name] and (exact or name != "losses"):
            yield f"{segment.end.name}: {name} is {there[name]}, and {here[name]} when trained again"
    if _names(one) != _names(other):
        yield f"{segment.end.name}: it holds other tensors than when trained again"
        return
    if exact:
        for name, tensor in one.model.items():
            if not torch.equal(tensor, other.model[name]):
                yield f"{segment.end.name}: the weights {name} differ by {(tensor - other.model[name]).abs().max():.3g}"
        for name, state in one.optimizer.items():
            if not all(torch.equal(value, other.optimizer[name][key]) for key, value in state.items()):
                yield f"{segment.end.name}: the optimizer's {name} differs"
    elif (far := distance(segment, one, other)) > WEIGHT_TOLERANCE:
        yield f"{segment.end.name}: the weights are {far:.2g} of their way from where training again leads"


def _names(end: checkpoint.Checkpoint) -> tuple[list, list]:
    return sorted(end.model), sorted((name, sorted(state)) for name, state in end.optimizer.items())


def _close(name: str, told: float | None, found: float | None, questions: int) -> bool:
    if told is None or found is None:
        return False
    if name == "hellaswag":  # three standard errors of a coin
        return abs(told - found) <= 1.5 / math.sqrt(questions)
    return name == "grad_norm" or math.isclose(told, found, rel_tol=TOLERANCES[name])


def distance(segment: Segment, one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> float:
    """Between two ends of a segment, relative to how far the weights moved in it."""
    if segment.begin is None:
        moved = one.model
    else:
        begin = checkpoint.load(segment.begin).model
        moved = {name: tensor - begin[name] for name, tensor in one.model.items()}
    apart = [tensor - other.model[name] for name, tensor in one.model.items()]
    return _length(apart) / max(_length(list(moved.values())), 1e-12)


def _length(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@contextmanager
def silent_console() -> Iterator[None]:
    """Suppress the messages of train.py."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def audit(run: Path, samples: int, seed: int, ranks: Ranks) -> bool:
    """Prints what it finds; whether the run is what it says."""
    found = segments(run)
    chosen = random.Random(seed).sample(found, min(samples, len(found)))
    complaints = list(complaints_about_the_record(run))
    for complaint in complaints:
        console.info(complaint)
    now = provenance(ranks)
    # ranks of a node have a parent in common
    whose = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"audit-{whose}-{os.getppid()}"
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of an audit that was killed
    for segment in sorted(chosen, key=lambda segment: segment.steps.start):
        made = [launch["provenance"] for _, launch in segment.pieces]
        changed = {name: value for then in made for name, value in then.items() if now[name] != value}
        for name, value in changed.items():
            console.info(f"{segment}: {name} was {value}, is {now[name]}")
        exact = ranks.device.type == "cpu" and not changed.keys() - {"commit"}
        try:
            with silent_console():
                again, questions = replay(segment, folder, ranks)
            if ranks.is_main:
                wrong = list(complaints_about_a_segment(run, segment, again, questions, exact))
                ends = [checkpoint.load(path) for path in (segment.end, again / "checkpoints" / segment.end.name)]
                verdict = "equal to the bit" if exact else f"{distance(segment, *ends):.2g} of their way apart"
                console.info(
                    f"{segment}: " + ("\n  ".join(["NOT what training again gives", *wrong]) if wrong else verdict)
                )
                complaints += wrong
            ranks.barrier()
        finally:
            if ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
    count = ranks.sum([len(complaints)])[0]  # of rank 0, which alone compares
    console.info(f"{run} " + ("is NOT what it says" if count else "is what it says") + f", by {len(chosen)} samples")
    return not count


@dataclass(frozen=True, kw_only=True)
class ReplayArgs:
    """The command line: each field is a flag, and its comment is the help."""

    run: RunArgument  # run directory (out/NAME) with its checkpoints
    samples: Positive = 5  # number of checkpoint pairs to train again, chosen at random
    seed: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0  # seed of the random choice
    device: Literal["auto", "cuda", "cpu"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU


def main() -> None:
    args = parse_arguments(ReplayArgs, "python -m tools.replay", __doc__)
    if not (args.run / "log.csv").exists():
        raise UserError(f"there is no run at {args.run}.")
    with process_group(args.device) as ranks:
        if not audit(args.run, args.samples, args.seed, ranks):
            sys.exit(1)


if __name__ == "__main__":
    run_script(main)
