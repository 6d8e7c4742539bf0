"""Takes a finished run at its word: trains again from some of its checkpoints to the next, and compares.

    python checkpoint.py audit out/gpt2 --samples 5          # the same as python audit.py out/gpt2 --samples 5
    torchrun --standalone --nproc_per_node=8 audit.py out/gpt2

Each checkpoint holds the settings, the data's fingerprint and the versions that it was made with. On a CPU, with the
same versions and as many ranks, the log's numbers, weights and optimizer must come out equal to the bit; else within
a tolerance, and the largest difference is told. Nothing is written to the run.
"""

import io
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

import checkpoint
from distributed import Ranks, process_group
from errors import UserError
from errors import run as run_script
from log import read_log
from start import made_by
from train import set_up, train
from train_config import from_json, read_config, resolve, variant

COMPARED = ("tokens", "epoch", "loss", "val_loss", "val_bpb", "hellaswag", "lr", "grad_norm")
# relative to the value, and to how far the weights moved meanwhile: other hardware rounds otherwise
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-2, 0.2


class Until:
    """Stop signals for a replay: it is told to stop as soon as the checkpoint at its end is there."""

    def __init__(self, path: Path):
        self.path, self.nothing_to_lose = path, False

    def told(self) -> bool:
        return self.path.exists()


@dataclass
class Segment:
    """What lies between two checkpoints that follow each other; the first begins with `begin` None."""

    begin: Path | None
    end: Path

    @property
    def steps(self) -> range:
        return range(checkpoint.step_of(self.begin) if self.begin else 0, checkpoint.step_of(self.end))

    def __str__(self) -> str:
        return f"steps {self.steps.start:,} to {self.steps.stop:,}"


def segments(run: Path) -> list[Segment]:
    """Those that can be trained again. UserError where there is none or a checkpoint is damaged."""
    found = [path for path in checkpoint.checkpoints(run) if path.suffix != ".old"]
    for path in found:
        checkpoint.verify(path)
        if "config" not in checkpoint.read_state(path):
            raise UserError(f"{path} was made before runs kept what an audit needs.")
    from_the_start = found and checkpoint.read_state(found[0])["config"]["general"]["init_from"] == "scratch"
    pairs = [*pairwise(found)]
    if from_the_start and checkpoint.step_of(found[0]) > 0:
        pairs.insert(0, (None, found[0]))
    if not pairs:
        raise UserError(
            f"{run} has no two checkpoints, and none from scratch: nothing can be trained again. A run keeps them all "
            "with --saving.keep 0, or every so many with --saving.keep-every."
        )
    return [Segment(*pair) for pair in pairs]


def complaints_about_the_record(run: Path) -> Iterator[str]:
    """What is wrong with log.csv and config.json without training anything again."""
    newest = checkpoint.read_state(checkpoint.checkpoints(run)[-1])
    steps = [row["step"] for row in read_log(run / "log.csv")]
    if steps != list(range(len(steps))):
        at = next(i for i, step in enumerate(steps) if step != i)
        yield f"log.csv: row {at} is of step {steps[at]}; each step must stand once, in order"
    if len(steps) < newest["step"]:
        yield f"log.csv ends with step {steps[-1] if steps else 0}, the checkpoints with {newest['step']}"
    told, kept = read_config(run / "config.json"), newest["config"]
    for section in ("data", "model", "training", "optimizer"):
        for name, value in kept[section].items():
            if told.get(section, {}).get(name) != value:
                yield f"config.json: {section}.{name} is not the {value} that the last checkpoint was made with"


def replay(segment: Segment, folder: Path, ranks: Ranks) -> Path:
    """Trains a segment again in `folder`; returns the run's folder."""
    out = folder / "run"
    target = out / "checkpoints" / segment.end.name
    kept = checkpoint.read_state(segment.end)["config"]
    config = variant(
        from_json(kept),
        general={
            "out_dir": str(out), "init_from": "resume", "device": ranks.device.type,
            "mode": tuple(mode for mode in kept["general"]["mode"] if mode != "sample"),
        },
        saving={"every_n_steps": segment.steps.stop, "keep": 0},
        logging={"every_n_steps": 0},
    )  # fmt: skip
    if ranks.is_main and segment.begin:
        target.parent.mkdir(parents=True)
        (target.parent / segment.begin.name).symlink_to(segment.begin.resolve())
    ranks.wait()
    config, dataset = resolve(config, ranks.world_size)
    with checkpoint.Saver(out, 0, 0) as saver:
        train(set_up(config, dataset, ranks), Until(target), saver)
    return out


def complaints_about_a_segment(run: Path, segment: Segment, replayed: Path, exact: bool) -> Iterator[str]:
    """Where log or checkpoint are not what training again gives."""
    rows = {row["step"]: row for row in read_log(run / "log.csv")}
    again = {row["step"]: row for row in read_log(replayed / "log.csv")}
    one, other = checkpoint.load(segment.end), checkpoint.load(replayed / "checkpoints" / segment.end.name)
    there, here = one.state, other.state
    is_last = segment.steps.stop == there["config"]["training"]["max_steps"]
    for step in [*segment.steps, *([segment.steps.stop] if is_last else [])]:
        for name in COMPARED:
            told, found = rows.get(step, {}).get(name), again[step][name]
            if told != found and (exact or not _close(told, found)):
                yield f"log.csv, step {step}: {name} is {told}, and {found} when trained again"
                return  # what follows from it differs too
    for name in ("step", "tokens", "position", "losses", "data", "model", "tokenizer"):
        if there[name] != here[name] and (exact or name != "losses"):
            yield f"{segment.end.name}: {name} is {there[name]}, and {here[name]} when trained again"
    if exact:
        for name, tensor in one.model.items():
            if not torch.equal(tensor, other.model[name]):
                yield f"{segment.end.name}: the weights {name} differ by {(tensor - other.model[name]).abs().max():.3g}"
        for name, state in one.optimizer.items():
            if not all(torch.equal(value, other.optimizer[name][key]) for key, value in state.items()):
                yield f"{segment.end.name}: the optimizer's {name} differs"
    elif (far := distance(segment, one, other)) > WEIGHT_TOLERANCE:
        yield f"{segment.end.name}: the weights are {far:.2g} of their way from where training again leads"


def _close(told: float | None, found: float | None) -> bool:
    return told is not None and found is not None and math.isclose(told, found, rel_tol=LOSS_TOLERANCE)


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


def audit(run: Path, samples: int, seed: int, ranks: Ranks) -> bool:
    """Prints what it finds; whether the run is what it says."""
    found = segments(run)
    chosen = random.Random(seed).sample(found, min(samples, len(found)))
    complaints = list(complaints_about_the_record(run))
    ranks.print(*complaints, sep="\n", end="\n" if complaints else "")
    now = made_by(ranks)
    # ranks of a node have a parent in common
    folder = Path(tempfile.gettempdir()) / f"audit-{run.resolve().name}-{os.getppid()}"
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of an audit that was killed
    for segment in sorted(chosen, key=lambda segment: segment.steps.start):
        then = checkpoint.read_state(segment.end)["made_by"]
        changed = [name for name in now if then.get(name) != now[name]]
        ranks.print(*(f"{segment}: {name} was {then.get(name)}, is {now[name]}\n" for name in changed), sep="", end="")
        exact = ranks.device.type == "cpu" and not set(changed) - {"commit"}
        try:
            with redirect_stdout(io.StringIO()):
                again = replay(segment, folder, ranks)
            if ranks.is_main:
                wrong = list(complaints_about_a_segment(run, segment, again, exact))
                ends = [checkpoint.load(path) for path in (segment.end, again / "checkpoints" / segment.end.name)]
                verdict = "equal to the bit" if exact else f"{distance(segment, *ends):.2g} of their way apart"
                ranks.print(
                    f"{segment}: " + ("\n  ".join(["NOT what training again gives", *wrong]) if wrong else verdict)
                )
                complaints += wrong
            ranks.wait()
        finally:
            if ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
    ranks.print(
        f"{run} " + ("is NOT what it says" if complaints else "is what it says") + f", by {len(chosen)} samples"
    )
    return not complaints


def main() -> None:
    import tyro

    def command(
        run: tyro.conf.Positional[Path],
        /,
        *,
        samples: int = 5,
        seed: int = 0,
        device: Literal["auto", "cuda", "cpu"] = "auto",
    ) -> None:
        """Trains again from some of a run's checkpoints to the next, and compares. Exit code 1 where it differs.

        Args:
            run: A run's folder (out/NAME), with its checkpoints.
            samples: How many pairs of checkpoints to take.
            seed: Of the choice.
            device: auto is cuda where there is one, else cpu.
        """
        if samples < 1:
            raise UserError(f"--samples {samples}: give at least 1.")
        if not (run / "log.csv").exists():
            raise UserError(f"there is no run at {run}.")
        with process_group(device) as ranks:
            if not audit(run, samples, seed, ranks):
                sys.exit(1)

    tyro.cli(command, prog="audit.py", description=__doc__)


if __name__ == "__main__":
    run_script(main)
