"""A person's mistake: one message, exit code 2, no traceback.

A `UserError` says what is wrong, where, the value, and the mend. Anything else that is raised is a bug
of ours and keeps its traceback.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake of the person at the keyboard, told in a sentence that says how to mend it."""


class ConfigError(UserError):
    """A mistake that every rank finds alike, in the settings for instance: the first of a node tells it."""


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


def run(main: Callable[[], None]) -> None:
    """Calls a script's `main()`; a UserError becomes one message on stderr and exit code 2."""
    code = 0
    _streams_that_never_fail()
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError):
            where = "" if rank == "0" else f" (rank {rank})"
            with spoken():
                print(f"\nerror{where}: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if code and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)  # torchrun ends all with the first that ends: let it be who tells the mistake
        leave(code)
    with spoken():
        sys.stdout.flush()
    if code:
        sys.exit(code)


def _streams_that_never_fail() -> None:
    """Gives a process that was started without stdout or stderr some, and one of few letters a sign for the others."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not so in a notebook
            stream.reconfigure(errors="replace")


def leave(code: int) -> None:
    """Ends a rank without Python's own end: gloo's threads still let go of tensors then, and now and then abort it."""
    for stream in (sys.stdout, sys.stderr):
        with spoken():
            stream.flush()
    os._exit(code)
