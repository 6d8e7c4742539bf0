"""A person's mistake: one message, exit code 2, no traceback.

A `UserError` says what is wrong, where, the value, and the mend. Anything else that is raised is a bug
of ours and keeps its traceback.
"""

import os
import sys
import time
from collections.abc import Callable

from babygpt.console import spoken, streams_that_never_fail


class UserError(Exception):
    """A mistake of the person at the keyboard, told in a sentence that says how to mend it."""


class ConfigError(UserError):
    """A mistake that every rank finds alike, in the settings for instance: the first of a node tells it."""


def run(main: Callable[[], None]) -> None:
    """Calls a script's `main()`; a UserError becomes one message on stderr and exit code 2."""
    code = 0
    streams_that_never_fail()
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
        if not isinstance(end.code, int | None):
            raise  # a message: Python prints it
        code = end.code or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if code and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)  # torchrun ends all with the first that ends: let it be who tells the mistake
        leave(code)
    with spoken():
        sys.stdout.flush()
    if code:
        sys.exit(code)


def leave(code: int) -> None:
    """Ends a rank without Python's own end: gloo's threads still let go of tensors then, and now and then abort it."""
    for stream in (sys.stdout, sys.stderr):
        with spoken():
            stream.flush()
    os._exit(code)
