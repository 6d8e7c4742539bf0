"""Send the rows of log.csv to an experiment tracker as well.

log.csv remains the complete record. If the tracker fails, the run continues without it.
"""

import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from babygpt.console import console
from babygpt.training.log import Row

ID_FILE = "tracker-id"  # in the run directory: the ID of the W&B run, reused on resume
FINISH_SECONDS = 60  # time limit for the last upload


class Tracker:
    """Logs scalars to TensorBoard or Weights & Biases.

    >>> tracker = Tracker("tensorboard", Path("out/gpt2"), start=0, config={})
    >>> tracker.log({"step": 0, "loss": 10.9})
    >>> tracker.finish()
    """

    def __init__(self, name: str, out: Path, start: int, config: dict[str, Any]):
        """Open the tracker `name`. If `start` > 0, continue the tracker's run recorded in `out`."""
        self.name, self.backend = name, None
        open_backend = {"tensorboard": open_tensorboard, "wandb": open_wandb}[name]
        self.backend = self.attempt(open_backend, out, start, config)

    def log(self, row: Row) -> None:
        scalars = {k: float(v) for k, v in row.items() if k != "step" and v is not None}
        if self.backend:
            self.attempt(self.backend[0], scalars, row["step"])

    def finish(self) -> None:
        """Close the tracker, at most FINISH_SECONDS later."""
        if self.backend:
            thread = Thread(target=self.attempt, args=(self.backend[1],), daemon=True)
            thread.start()
            thread.join(FINISH_SECONDS)

    def attempt(self, call: Callable, *arguments: Any) -> Any:
        """Call a function of the tracker. If it raises an error, print a warning and stop using the tracker."""
        try:
            return call(*arguments)
        except Exception as error:
            self.backend = None
            console.warning(
                f"The tracker {self.name} failed ({error!r:.300}). The run continues without it; log.csv has all rows."
            )
            return None


def open_tensorboard(out: Path, start: int, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """Return two functions: one logs scalars at a step, and the other closes the log in the run directory."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start, flush_secs=10)

    def log(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def open_wandb(out: Path, start: int, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """Return two functions: one logs scalars at a step, and the other finishes the run.

    W&B also reads its environment variables. `step` is a value, because W&B ignores rows with an earlier step of its
    own, which a resumed run repeats.
    """
    import wandb

    path = out / ID_FILE
    if start == 0 or not path.exists():
        path.write_text(uuid.uuid4().hex)
    run = wandb.init(project="babygpt", name=out.name, id=path.read_text(), resume="allow", dir=str(out), config=config)
    run.define_metric("*", step_metric="step")
    return lambda scalars, step: run.log({"step": step} | scalars), run.finish
