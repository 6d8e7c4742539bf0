"""Schedules: when the periodic tasks run, and the learning rate of each step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """The periodic tasks of one step."""

    validation: bool = False
    evaluation: bool = False
    samples: bool = False
    checkpoint: bool = False

    def __bool__(self) -> bool:
        return self.validation or self.evaluation or self.samples or self.checkpoint


@dataclass(frozen=True)
class Schedule:
    """When the periodic tasks run: every n steps and after the last one. An interval of 0 means never."""

    validation: int
    evaluation: int
    samples: int
    checkpoint: int
    max_steps: int
    start: int = 0  # the step at which this process starts

    def due(self, step: int) -> Due:
        """Return the tasks that come before update `step`.

        Step 0 has only validation, and the step at which a run starts is not saved again.
        """

        def at(n: int) -> bool:
            return n > 0 and (step % n == 0 or step == self.max_steps)

        if step == 0:
            return Due(validation=at(self.validation))
        return Due(
            at(self.validation), at(self.evaluation), at(self.samples), at(self.checkpoint) and step != self.start
        )


@dataclass(frozen=True)
class LRSchedule:
    """Linear warmup to the peak learning rate, then half a cosine to `min_lr_ratio` of it.

    With a `cooldown`, the learning rate is constant after warmup, and decays linearly in this fraction of all steps, at
    the end.
    """

    max_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    cooldown: float | None = None
    momentum_warmup_steps: int = 0

    def learning_rate(self, step: int, max_lr: float) -> float:
        """Return the learning rate of update `step`, counted from 0, for a peak of `max_lr`."""
        if step < self.warmup_steps:
            return max_lr * (step + 1) / self.warmup_steps
        if self.cooldown is not None:
            remaining = min(1.0, (self.max_steps - step) / max(1.0, self.cooldown * self.max_steps))
            return max_lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * remaining)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return max_lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def momentum(self, step: int) -> float:
        """Return the momentum of Muon, which rises linearly from 0.85 to 0.95."""
        return 0.85 + 0.1 * (min(1.0, step / self.momentum_warmup_steps) if self.momentum_warmup_steps else 1.0)
