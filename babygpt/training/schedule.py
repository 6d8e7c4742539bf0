"""Schedules of the periodic tasks, the learning rate, and the momentum of Muon."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """The periodic tasks that are due at one step."""

    validation: bool = False
    evaluation: bool = False
    samples: bool = False
    checkpoint: bool = False

    def __bool__(self) -> bool:
        return self.validation or self.evaluation or self.samples or self.checkpoint


@dataclass(frozen=True)
class Schedule:
    """The interval of each periodic task in steps; 0: never. With an interval, a task also runs after the last step."""

    validation: int
    evaluation: int
    samples: int
    checkpoint: int
    max_steps: int
    start: int = 0  # the step at which this process starts

    def due(self, step: int) -> Due:
        """Return the tasks that run before update `step`.

        At step 0 only validation runs. No checkpoint is saved at the step at which the process starts.
        """

        def is_due(n: int) -> bool:
            return n > 0 and (step % n == 0 or step == self.max_steps)

        if step == 0:
            return Due(validation=is_due(self.validation))
        return Due(
            is_due(self.validation),
            is_due(self.evaluation),
            is_due(self.samples),
            is_due(self.checkpoint) and step != self.start,
        )


@dataclass(frozen=True)
class LRSchedule:
    """Linear warmup to the peak learning rate, then cosine decay to `min_lr_ratio` times the peak.

    With `cooldown`, the learning rate is constant after warmup and decays linearly over this final fraction of the
    steps.
    """

    max_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    cooldown: float | None = None
    momentum: float = 0.95
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

    def momentum_at(self, step: int) -> float:
        """Return Muon's momentum at update `step`: a linear warmup from 0.85, or constant if `momentum` is smaller."""
        start = min(0.85, self.momentum)
        progress = min(1.0, step / self.momentum_warmup_steps) if self.momentum_warmup_steps else 1.0
        return start + (self.momentum - start) * progress
