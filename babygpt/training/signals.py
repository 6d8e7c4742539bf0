"""Handle stop signals: a run that receives one finishes its step, saves a checkpoint and exits."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from threading import Thread

from babygpt.errors import exit_now


class StopRequested(Exception):
    """Raised by all ranks if a stop is requested during a periodic task."""


class StopSignals:
    """Sets `requested` on SIGTERM, SIGINT, SIGHUP or SIGUSR1 (Slurm's early warning).

    Until the end of the first step, while `nothing_to_save` is set, a signal creates the empty file `marker` and exits
    immediately with code 0. After that, rank 0 acknowledges signals on stderr, and a second SIGINT exits immediately
    with code 130. A thread does this, because Python delays signal handlers while the main thread runs native code,
    such as a compiler or a collective.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested, self.nothing_to_save = False, True
        self.marker: Path | None = None

    def __enter__(self) -> "StopSignals":
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.previous = {number: signal.signal(number, self._request_stop) for number in self.NUMBERS}
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)  # Python writes each signal's number to it
        Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.close(self.write_end)  # the thread returns

    def _request_stop(self, *_: object) -> None:
        self.requested = True

    def _watch(self, read_end: int) -> None:
        interrupts = 0
        while number := os.read(read_end, 1):
            if number[0] not in self.NUMBERS:
                continue
            interrupts += number[0] == signal.SIGINT
            name = signal.Signals(number[0]).name
            # after a rank fails, torchrun sends SIGTERM to the others: this is not a request to stop
            is_from_torchrun = name == "SIGTERM" and "TORCHELASTIC_RUN_ID" in os.environ
            if self.nothing_to_save:
                self._print(f"Received {name} before the end of the first step; nothing to save.")
                if self.marker is not None and not is_from_torchrun:
                    with suppress(OSError):
                        self.marker.touch()
                exit_now(0)
            elif interrupts > 1:
                exit_now(130)
            elif os.environ.get("RANK", "0") == "0" and not is_from_torchrun:
                hint = " Press Ctrl-C again to exit without saving." if interrupts else ""
                self._print(f"Received {name}. The run will save a checkpoint after this step and exit.{hint}")
        os.close(read_end)

    @staticmethod
    def _print(text: str) -> None:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())  # the main thread may hold the lock of sys.stderr
