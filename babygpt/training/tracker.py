"""Send the rows of log.csv to an experiment tracker as well. log.csv stays the record, and a failure stops no run."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babygpt.console import console
from babygpt.training.log import Row

ID_FILE = "tracker-id"  # in the run directory: a resumed run continues its run in W&B


class Tracker:
    """Logs scalars to TensorBoard or Weights & Biases.

    >>> tracker = Tracker("tensorboard", Path("out/gpt2"), start=0, config={})
    >>> tracker.log({"step": 0, "loss": 10.9})
    >>> tracker.finish()
    """

    def __init__(self, name: str, out: Path, start: int, config: dict[str, Any]):
        """Open the tracker `name`. A run that starts at step `start` > 0 continues the one that `out` names."""
        self.name, self.backend = name, None
        open_backend = {"tensorboard": open_tensorboard, "wandb": open_wandb}[name]
        self.backend = self.attempt(open_backend, out, start, config)

    def log(self, row: Row) -> None:
        scalars = {k: float(v) for k, v in row.items() if k != "step" and v is not None}
        if self.backend:
            self.attempt(self.backend[0], scalars, row["step"])

    def finish(self) -> None:
        if self.backend:
            self.attempt(self.backend[1])

    def attempt(self, call: Callable, *arguments: Any) -> Any:
        """Call a function of the tracker. After an error, print a warning and do not use the tracker any more."""
        try:
            return call(*arguments)
        except Exception as error:
            self.backend = None
            console.warning(f"The tracker {self.name} failed and is not used any more: {error!r:.300}")
            return None


def open_tensorboard(out: Path, start: int, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """Return functions that log scalars at a step, and that close the log in the run directory."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)

    def log(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def open_wandb(out: Path, start: int, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """Return functions that log scalars at a step, and that finish the run. W&B reads its own environment variables."""
    import wandb

    path = out / ID_FILE
    if start == 0 or not path.exists():
        path.write_text(uuid.uuid4().hex)
    run = wandb.init(project="babygpt", name=out.name, id=path.read_text(), resume="allow", dir=str(out), config=config)
    return run.log, run.finish
