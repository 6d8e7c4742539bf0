"""Console output that does not fail on closed terminals, broken pipes and full disks.

>>> protect_streams()
>>> console.info("step 100 | loss 3.2")
"""

import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class ProtectedStream:
    """A text stream whose writes never fail: after an error, the output goes to /dev/null."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self._attempt(self.stream.write, text) or 0

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Any, *arguments: str) -> Any:
        try:
            return call(*arguments)
        except OSError:
            with suppress(OSError, ValueError), open(os.devnull, "w") as null:  # a notebook's stream has no descriptor
                os.dup2(null.fileno(), self.stream.fileno())  # discard buffered and future output
            return None

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # not set yet while the object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)


def protect_streams() -> None:
    """Protect stdout and stderr. Open them if they are closed, and replace characters that cannot be encoded."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w")  # noqa: SIM115, it stays open
        if isinstance(stream, ProtectedStream):
            continue
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")
        setattr(sys, name, ProtectedStream(stream))


def counted(count: int, noun: str) -> str:
    """Return the count with its noun, plural unless the count is 1: "1 shard", "1,024 shards", "2 batches"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('ch') else 's'}"


def duration(seconds: float) -> str:
    """Return, for instance, "48 s", "2 min 5 s", "12 min", "3 h 12 min" or "2 d 3 h"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{hours // 24} d {hours % 24} h"


class ConsoleHandler(logging.Handler):
    """Print messages to stdout, and warnings to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=stream)
        stream.flush()


console = logging.getLogger("babygpt")
console.propagate = False
console.setLevel(logging.INFO)
console.addHandler(ConsoleHandler())
