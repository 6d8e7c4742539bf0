"""Verify a run: train random segments of it again, each from one checkpoint to the next, and compare the results.

    python -m tools.replay out/gpt2 --segments 5
    torchrun --standalone --nproc_per_node=8 -m tools.replay out/gpt2

Each checkpoint records the settings, the fingerprint of the data, and the software versions that produced it. On a CPU,
with the same versions and number of ranks, the logged numbers, weights and optimizer state must be bitwise equal.
Otherwise they must agree within a tolerance, and the distance between the weights is printed. The run directory is not
modified. The exit code is 1 if the verification fails.
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

import finetune
from arguments import bind, from_json, resolve
from babygpt import files
from babygpt.console import console, counted
from babygpt.constraints import Positive, RunArgument, parse_arguments
from babygpt.data.shards import open_dataset
from babygpt.errors import UserError
from babygpt.errors import run as run_script
from babygpt.settings import variant
from babygpt.training import checkpoint
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.log import COLUMNS, read_log
from babygpt.training.run_dir import identity_differences, provenance, read_config
from babygpt.training.signals import StopSignals
from finetune_config import FinetuneConfig
from train import Objective, Pretraining, set_up, train

COMPARED = ("tokens", "epoch", "loss", "val_loss", "val_bpb", "hellaswag", "lr", "grad_norm")
# Relative tolerances, since other hardware rounds differently and other ranks draw other dropout masks. That of the
# weights is relative to the distance they moved. The gradient norm of one step may differ by any amount.
TOLERANCES = {"tokens": 0.0, "epoch": 0.0, "lr": 1e-12, "loss": 2e-2, "val_loss": 2e-2, "val_bpb": 2e-2}
WEIGHT_TOLERANCE = 0.2


@dataclass
class Segment:
    """The steps between two consecutive checkpoints; `start` is None if they begin at the initial weights.

    `launches` has the steps and the record of each launch of the run that trained a part of the segment.
    """

    start: Path | None
    end: Path

    def __post_init__(self):
        first, stop = checkpoint.step_of(self.start) if self.start else 0, checkpoint.step_of(self.end)
        self.steps, launches = range(first, stop), checkpoint.read_state(self.end)["launches"]
        ends = [*(launch["step"] for launch in launches[1:]), stop]
        spans = [range(max(first, launch["step"]), end) for launch, end in zip(launches, ends, strict=True)]
        self.launches = [(span, launch) for span, launch in zip(spans, launches, strict=True) if span]

    def __str__(self) -> str:
        return f"steps {self.steps.start:,} to {self.steps.stop:,}"


def find_segments(run: Path) -> list[Segment]:
    """Return the segments that can be trained again. UserError if there are none or a checkpoint is corrupted."""
    checkpoints = checkpoint.list_checkpoints(run)
    for path in checkpoints:
        checkpoint.verify(path)
        if not checkpoint.read_state(path).get("launches"):
            raise UserError(f"{path} does not record how its run was started, so it cannot be verified.")
    pairs: list[tuple[Path | None, Path]] = [*pairwise(checkpoints)]
    if checkpoints and _initial_weights(checkpoints[0]) == "scratch":
        pairs.insert(0, (None, checkpoints[0]))
    if not pairs:
        raise UserError(
            f"{run} cannot be replayed: a replay needs two checkpoints, or one if the run started from scratch. "
            "Keep all checkpoints of a run with --keep 0, and save them more often."
        )
    try:
        return [Segment(*pair) for pair in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The checkpoints of {run} have an invalid record of its launches: {error!r:.100}.") from None


def _initial_weights(path: Path) -> str:
    return checkpoint.read_state(path)["launches"][0]["config"]["general"]["init_from"]


def check_records(run: Path) -> Iterator[str]:
    """Yield the inconsistencies between log.csv, config.json and the checkpoints, which show without training."""
    states = [checkpoint.read_state(path) for path in checkpoint.list_checkpoints(run)]
    newest = states[-1]
    for state in states:
        if state["launches"] != newest["launches"][: len(state["launches"])]:
            yield f"step {state['step']:,}: its launches are not those that the last checkpoint records"
    steps = [row["step"] for row in read_log(run / "log.csv")]
    if steps != list(range(len(steps))):
        row_index = next(i for i, step in enumerate(steps) if step != i)
        yield f"log.csv: row {row_index} has step {steps[row_index]}, but every step must occur once, in order"
    if len(steps) < newest["step"]:
        yield f"log.csv ends at step {steps[-1] if steps else 0}, but the last checkpoint is at step {newest['step']}"
    current, launch_configs = read_config(run / "config.json"), [launch["config"] for launch in newest["launches"]]
    sections = [name for name in ("data", "model", "training", "optimizer", "chat") if name in launch_configs[-1]]
    if any(all(current.get(section) == config[section] for section in sections) for config in launch_configs):
        return  # that of an earlier launch if the last one was killed before it wrote this file
    for section in sections:
        for name, value in launch_configs[-1][section].items():
            if (found := current.get(section, {}).get(name)) != value:
                yield f"config.json: {section}.{name} is {found}, but {value} in the last checkpoint"


def make_objective(settings: dict[str, dict], changes: dict[str, dict], ranks: Ranks) -> Objective:
    """Return the objective of a launch of train.py or finetune.py with these settings and `changes`."""
    if "chat" in settings:
        return finetune.make_objective(variant(from_json(settings, FinetuneConfig()), **changes), ranks)
    config = variant(from_json(settings), **changes)
    dataset = open_dataset(config.data.dataset)
    return Pretraining(bind(resolve(config, ranks.world_size), dataset), dataset)


def replay(run_directory: Path, segment: Segment, directory: Path, ranks: Ranks) -> tuple[Path, int]:
    """Train a segment of a run again in `directory`, with the settings of each launch.

    Returns the run directory of the replay, and the number of HellaSwag examples.
    """
    out = directory / "run"
    if ranks.is_main:
        (out / "checkpoints").mkdir(parents=True)
        settings, tokenizer = segment.launches[0][1]["config"], run_directory / "tokenizer.json"
        if "chat" in settings and tokenizer.exists():  # finetune.py reads both on resume
            files.write_json(out / "config.json", settings)
            shutil.copy(tokenizer, out)
        if segment.start:
            (out / "checkpoints" / segment.start.name).symlink_to(segment.start.resolve())
    ranks.barrier()
    for number, (steps, launch) in enumerate(segment.launches):
        init_from = "resume" if segment.start or number else "scratch"
        changes: dict[str, dict] = {
            "general": {
                "out_dir": out, "init_from": init_from, "device": ranks.device.type,
                "mode": tuple(mode for mode in launch["config"]["general"]["mode"] if mode != "sample"),
            },
            "saving": {"every_n_steps": steps.stop, "keep": 0},
            "logging": {"every_n_steps": 0, "tracker": None},
        }  # fmt: skip
        with checkpoint.Saver(out, 0, 0) as saver:
            run = set_up(make_objective(launch["config"], changes, ranks), ranks)
            train(run, StopSignals(), saver, until=steps.stop)
    return out, len(run.examples)


def compare(run: Path, segment: Segment, replayed: Path, num_examples: int, exact: bool) -> Iterator[str]:
    """Yield the differences of log and checkpoint between a segment of a run and its replay."""
    rows = {row["step"]: row for row in read_log(run / "log.csv")}
    replayed_rows = {row["step"]: row for row in read_log(replayed / "log.csv")}
    original, again = checkpoint.load(segment.end), checkpoint.load(replayed / "checkpoints" / segment.end.name)
    is_last = segment.steps.stop == original.state["launches"][-1]["config"]["training"]["max_steps"]
    if rows and (rows.get(segment.steps.stop, {}).get("loss") is not None or max(rows) > segment.steps.stop):
        is_last = False  # the run was continued beyond this step, which rewrote its row
    for step in [*segment.steps, *([segment.steps.stop] if is_last else [])]:
        others = replayed_rows[step].keys() - set(COLUMNS) if exact else ()  # of DPO
        for name in (*COMPARED, *sorted(others)):
            logged, value = rows.get(step, {}).get(name), replayed_rows[step][name]
            if logged != value and (exact or not _close(name, logged, value, num_examples)):
                yield f"log.csv, step {step}: {name} is {logged}, but {value} in the replay"
                return  # later values differ as a consequence
    for name in ("step", "tokens", "position", "losses"):
        if original.state[name] != again.state[name] and (exact or name != "losses"):
            yield f"{segment.end.name}: {name} is {original.state[name]}, but {again.state[name]} in the replay"
    sections = [{name: saved.state[name] for name in ("data", "model", "tokenizer")} for saved in (original, again)]
    for name, earlier, now in identity_differences(*sections):  # earlier versions had fewer fields
        yield f"{segment.end.name}: {name} is {earlier}, but {now} in the replay"
    if _names(original) != _names(again):
        yield f"{segment.end.name}: its tensors have other names than in the replay"
        return
    if exact:
        for name, tensor in original.model.items():
            if not torch.equal(tensor, again.model[name]):
                yield f"{segment.end.name}: the weights {name} differ by {(tensor - again.model[name]).abs().max():.3g}"
        for name, state in original.optimizer.items():
            if not all(torch.equal(value, again.optimizer[name][key]) for key, value in state.items()):
                yield f"{segment.end.name}: the optimizer state of {name} differs"
    elif (distance := weight_distance(segment, original, again)) > WEIGHT_TOLERANCE:
        yield f"{segment.end.name}: the weights differ by {distance:.2g} of the distance they moved"


def _names(saved: checkpoint.Checkpoint) -> tuple[list, list]:
    return sorted(saved.model), sorted((name, sorted(state)) for name, state in saved.optimizer.items())


def _close(name: str, logged: float | None, replayed: float | None, num_examples: int) -> bool:
    if logged is None or replayed is None:
        return False
    if name == "hellaswag":  # three standard errors of an accuracy of 0.5
        return abs(logged - replayed) <= 1.5 / math.sqrt(num_examples)
    return name == "grad_norm" or math.isclose(logged, replayed, rel_tol=TOLERANCES[name])


def weight_distance(segment: Segment, original: checkpoint.Checkpoint, again: checkpoint.Checkpoint) -> float:
    """Return the distance between the weights of two checkpoints, relative to the distance moved in the segment."""
    if segment.start is None:
        moved = original.model
    else:
        start = checkpoint.load(segment.start).model
        moved = {name: tensor - start[name] for name, tensor in original.model.items()}
    difference = [tensor - again.model[name] for name, tensor in original.model.items()]
    return _norm(difference) / max(_norm(list(moved.values())), 1e-12)


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@contextmanager
def silent_console() -> Iterator[None]:
    """Suppress the messages of the run."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def verify_run(run: Path, num_segments: int, seed: int, ranks: Ranks) -> bool:
    """Train some segments of a run again and print the results. Returns whether all of them agree with the run."""
    segments = find_segments(run)
    chosen = random.Random(seed).sample(segments, min(num_segments, len(segments)))
    problems = list(check_records(run))
    for problem in problems:
        console.info(problem)
    current = provenance(ranks)
    # the same directory on all ranks of a node, which have one parent process
    run_id = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"replay-{run_id}-{os.getppid()}"
    if ranks.is_main:
        shutil.rmtree(directory, ignore_errors=True)  # left by a killed replay
    for segment in sorted(chosen, key=lambda segment: segment.steps.start):
        recorded = [launch["provenance"] for _, launch in segment.launches]
        changed = {name: value for launch in recorded for name, value in launch.items() if current[name] != value}
        for name, value in changed.items():
            console.info(f"{segment}: {name} was {value} and is now {current[name]}")
        exact = ranks.device.type == "cpu" and not changed.keys() - {"commit"}
        try:
            with silent_console():
                replayed, num_examples = replay(run, segment, directory, ranks)
            if ranks.is_main:
                differing = list(compare(run, segment, replayed, num_examples, exact))
                ends = [checkpoint.load(path) for path in (segment.end, replayed / "checkpoints" / segment.end.name)]
                if differing:
                    result = "\n  ".join(["NOT reproduced", *differing])
                elif exact:
                    result = "reproduced, bitwise equal"
                else:
                    distance = weight_distance(segment, *ends)
                    result = f"reproduced, weights differ by {distance:.2g} of the distance they moved"
                console.info(f"{segment}: {result}")
                problems += differing
            ranks.barrier()
        finally:
            if ranks.is_main:
                shutil.rmtree(directory, ignore_errors=True)
    count = ranks.sum([len(problems)])[0]  # only rank 0 compares
    console.info(
        f"{run}: verification {'FAILED' if count else 'passed'}, {counted(len(chosen), 'segment')} trained again"
    )
    return not count


@dataclass(frozen=True, kw_only=True)
class ReplayArgs:
    """The command line: each field is a flag, and its comment is the help."""

    run: RunArgument  # run directory (out/NAME) with its checkpoints
    segments: Positive = 5  # number of segments to train again, each from one checkpoint to the next, chosen at random
    seed: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0  # seed for the random choice
    device: Literal["auto", "cuda", "cpu"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU


def main() -> None:
    args = parse_arguments(ReplayArgs, "python -m tools.replay", __doc__)
    if not (args.run / "log.csv").exists():
        raise UserError(
            f"There is no run at {args.run}: it has no log.csv. Use a directory that train.py or finetune.py wrote."
        )
    with process_group(args.device) as ranks:
        if not verify_run(args.run, args.segments, args.seed, ranks):
            sys.exit(1)


if __name__ == "__main__":
    run_script(main)
