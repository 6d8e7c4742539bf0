"""Stop signals: a run that receives one finishes its step, saves and exits."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from threading import Thread

from babygpt.console import spoken
from babygpt.errors import leave


class Stopped(Exception):
    """A rank was told to stop in the middle of a scene, and all have left it."""


class StopSignals:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's early warning), so that the loop can stop at a step's end.

    While there is `nothing_to_lose`, before the first step is done, a signal ends the process at once, with code 0, and
    leaves an empty file `marker`. A second SIGINT ends it at once with code 130. Both by a thread: the main one may be
    in a compiler for minutes, or wait for a rank that never comes, and Python's handlers wait for it.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.marker: Path | None = None
        self.received: str | None = None
        self.nothing_to_lose = True

    def __enter__(self) -> "StopSignals":
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.write_end)  # the thread ends with it

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name

    def _watch(self) -> None:
        interrupts = 0
        while number := os.read(self.read_end, 1):
            if number[0] not in self.NUMBERS:
                continue
            interrupts += number[0] == signal.SIGINT
            if self.nothing_to_lose:
                name = signal.Signals(number[0]).name
                with spoken():
                    os.write(2, f"{name} before the first step was done: nothing to save\n".encode())
                # torchrun ends the others with one that crashed by SIGTERM: that is no wish to stop
                by_torchrun = number[0] == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
                if self.marker is not None and not by_torchrun:
                    with suppress(OSError):
                        self.marker.touch()
                leave(0)
            elif interrupts > 1:
                leave(130)
        os.close(self.read_end)

    def told(self) -> bool:
        """Whether there was one."""
        return self.received is not None
