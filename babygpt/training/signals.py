"""Stop signals: a run that receives one finishes its step, saves a checkpoint and exits."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from threading import Thread

from babygpt.errors import exit_now


class StopRequested(Exception):
    """A stop was requested during a periodic task. All ranks raise it together."""


class StopSignals:
    """Record SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's early warning) in `requested`.

    While `nothing_to_save`, before the end of the first step, a signal exits the process immediately with code 0 and
    creates the empty file `marker`. A second SIGINT exits immediately with code 130. A thread does this, because
    Python's signal handlers wait while the main thread is in native code, such as a compiler or a collective.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested, self.nothing_to_save = False, True
        self.marker: Path | None = None

    def __enter__(self) -> "StopSignals":
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.previous = {number: signal.signal(number, self._request) for number in self.NUMBERS}
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)  # Python writes each signal's number to it
        Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.close(self.write_end)  # ends the thread

    def _request(self, *_: object) -> None:
        self.requested = True

    def _watch(self, read_end: int) -> None:
        interrupts = 0
        while number := os.read(read_end, 1):
            if number[0] not in self.NUMBERS:
                continue
            interrupts += number[0] == signal.SIGINT
            if self.nothing_to_save:
                name = signal.Signals(number[0]).name
                with suppress(OSError):  # os.write: the main thread may hold the lock of sys.stderr
                    os.write(2, f"{name} before the end of the first step: nothing to save\n".encode())
                # torchrun sends SIGTERM to the other ranks after one has failed: that is not a request to stop
                if self.marker is not None and (name != "SIGTERM" or "TORCHELASTIC_RUN_ID" not in os.environ):
                    with suppress(OSError):
                        self.marker.touch()
                exit_now(0)
            elif interrupts > 1:
                exit_now(130)
        os.close(read_end)
