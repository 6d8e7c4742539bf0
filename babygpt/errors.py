"""User errors: one message, exit code 2, no traceback.

A `UserError` says what is wrong, the value, why, and the fix. Any other exception is a bug and keeps its traceback.
"""

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable

from babygpt.console import protect_streams


class UserError(Exception):
    """A mistake in the settings, the files or the environment, explained in a message with the fix."""


class ConfigError(UserError):
    """A user error that is the same on every rank, such as one in the settings: one rank per node prints it."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the one that was probably meant, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def run(main: Callable[[], None]) -> None:
    """Call the `main()` of a script. A UserError becomes a message on stderr and exit code 2."""
    code = 0
    protect_streams()
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError):
            where = "" if rank == "0" else f" (rank {rank})"
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
            time.sleep(2)  # torchrun kills all ranks when the first one exits: let that be the one with the message
        exit_now(code)
    sys.stdout.flush()
    if code:
        sys.exit(code)


def exit_now(code: int) -> None:
    """Exit without Python's finalization, in which gloo's threads release tensors and sometimes abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
