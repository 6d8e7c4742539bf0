"""User errors, which end a script with one message and exit code 2.

The message says what is wrong, the value, why, and the fix. Any other exception is a bug and prints a traceback.
"""

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable

from babygpt.console import protect_streams


class UserError(Exception):
    """An error in the settings, the files or the environment that the user can fix."""


class ConfigError(UserError):
    """A user error that all ranks raise, such as an invalid setting. One rank per node prints it."""


def suggest(name: object, known: Iterable[str]) -> str:
    """Return the fix of a message about an unknown name: the closest known name, or all known names."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def run(main: Callable[[], None]) -> None:
    """Call the `main()` of a script. On a UserError, print its message to stderr and exit with code 2."""
    code = 0
    protect_streams()
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError):
            suffix = "" if rank == "0" else f" (rank {rank})"
            print(f"\nerror{suffix}: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise  # Python prints the message
        code = error.code or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if code and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)  # torchrun kills all ranks when one exits: the one that prints the message must be first
        exit_now(code)
    sys.stdout.flush()
    if code:
        sys.exit(code)


def exit_now(code: int) -> None:
    """Exit without Python's finalization, during which gloo's threads sometimes abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
