"""The status of each step, read one step late, so that the host does not wait for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from babygpt.training.device import Mark
from babygpt.training.guard import StepStatus
from babygpt.training.log import Row


@dataclass
class InFlightStep:
    """A step that the device may still be computing."""

    row: Row
    status: torch.Tensor  # on the host, valid after `end`
    begin: Mark
    end: Mark


class StepMonitor:
    """Reads the status of a step while the device computes the next one.

    `read(row, status, ms)` is called for each step in order, with its row of the log, its status on the host and its
    duration in ms. It returns whether it took so long that the next step must not be timed from the end of this one.
    """

    def __init__(self, device: torch.device, read: Callable[[Row, StepStatus, float], bool]):
        self.device, self.read = device, read
        self.stop_requested = False  # on any rank, as far as statuses have been read
        self.in_flight: InFlightStep | None = None
        self.begin: Mark | None = None  # of the next step; None after other work

    def start(self) -> None:
        """Mark the beginning of a step, before it is launched."""
        self.begin = self.begin or Mark(self.device)

    def push(self, row: Row, status: torch.Tensor) -> None:
        """Record a launched step, and read the status of the previous one."""
        assert self.begin is not None, "start() comes before a step"
        status = status.to("cpu", non_blocking=self.device.type == "cuda")
        end = Mark(self.device)  # after the copy: once it is reached, the status can be read
        previous, self.in_flight = self.in_flight, InFlightStep(row, status, self.begin, end)
        self.begin = end
        if previous is not None:
            self._read(previous)

    def flush(self) -> None:
        """Read the step in flight, if there is one. The weights have had its update then."""
        if self.in_flight is not None:
            self._read(self.in_flight)
            self.in_flight = None
        self.begin = None

    def _read(self, step: InFlightStep) -> None:
        step.end.wait()
        status = StepStatus.unpack(step.status)
        self.stop_requested |= status.stop_requested.item() > 0
        if self.read(step.row, status, step.end.ms_since(step.begin)):
            self.begin = None
