"""Read the status of each step one step late, so that the host does not wait for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from babygpt.training.device import DeviceEvent
from babygpt.training.guard import StepStatus
from babygpt.training.log import Row


@dataclass
class InFlightStep:
    """A step that the device may still be computing."""

    row: Row
    status: torch.Tensor  # packed, on the host; valid once the device has reached `end`
    start: DeviceEvent
    end: DeviceEvent


class StepMonitor:
    """Reads the status of a step while the device computes the next one.

    For each step in order, the monitor calls `record(row, status, ms)` with its row of the log, its status on the host
    and its duration. `record` returns True if it did slow work, which must not count as time of the next step.
    """

    def __init__(
        self, device: torch.device, record: Callable[[Row, StepStatus, float], bool], num_values: int = 0
    ):  # fmt: skip
        """`num_values` is the length of StepStatus.values."""
        self.device, self.record, self.num_values = device, record, num_values
        self.stop_requested = False  # by any rank, according to the statuses read so far
        self.in_flight: InFlightStep | None = None
        self.next_start: DeviceEvent | None = None  # the end of the previous step; None after work between the steps

    def start(self) -> None:
        """Record when a step starts; call this before launching it."""
        self.next_start = self.next_start or DeviceEvent(self.device)

    def push(self, row: Row, status: torch.Tensor) -> None:
        """Take the status of a launched step, and read that of the previous one."""
        assert self.next_start is not None, "call start() before each step"
        status = status.to("cpu", non_blocking=self.device.type == "cuda")
        end = DeviceEvent(self.device)  # after the copy, so the status is complete once the device has reached it
        previous, self.in_flight = self.in_flight, InFlightStep(row, status, self.next_start, end)
        self.next_start = end
        if previous is not None:
            self._read(previous)

    def flush(self) -> None:
        """Wait for the in-flight step, if there is one, and read its status."""
        if self.in_flight is not None:
            self._read(self.in_flight)
            self.in_flight = None
        self.next_start = None

    def _read(self, step: InFlightStep) -> None:
        step.end.synchronize()
        status = StepStatus.unpack(step.status, self.num_values)
        self.stop_requested |= status.stop_requested.item() > 0
        if self.record(step.row, status, step.end.ms_since(step.start)):
            self.next_start = None
