"""A run directory for the tests of report.html."""

import json
from pathlib import Path

from babygpt.training.log import Log, SampleLog


def make_run(path: Path, steps: int, texts: tuple[str, ...] = ()) -> Path:
    """Write log.csv, config.json and samples.txt of a run with one spike of the loss."""
    path.mkdir(parents=True)
    log = Log(path / "log.csv")
    for step in range(steps + 1):
        row = {"step": step, "tokens": step * 1000, "epoch": 0}
        if step % 10 == 0:
            row |= {"val_loss": 6 / (step + 1), "val_bpb": 2 / (step + 1), "hellaswag": 0.25}
        if step < steps:
            row |= {"loss": 99.0 if step == 7 else 5 / (step + 1), "lr": 1e-3, "grad_norm": float("nan")}
        log.write(row)
    settings = {"training": {"max_steps": steps}, "evaluation": {"limit": 101}, "general": {"note": "a note"}}
    (path / "config.json").write_text(json.dumps(settings))
    samples = SampleLog(path / "samples.txt", 0)
    samples.write(0, ["Before training"])
    samples.write(steps, list(texts))
    return path
