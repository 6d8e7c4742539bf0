"""Output that survives closed terminals and pipes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spoken() -> Iterator[None]:
    """For what is printed: where the terminal is closed, a pipe's reader has ended or a disk is full, it and all later
    words for there are lost, and nothing else is."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b"\n")
            except OSError:
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def streams_that_never_fail() -> None:
    """Gives a process that was started without stdout or stderr some, and one of few letters a sign for the others."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not so in a notebook
            stream.reconfigure(errors="replace")
