"""User errors, which end a script with one message and exit code 2.

The message says what is wrong, the value, why, and the fix. Any other exception is a bug and prints a traceback.
"""

import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress

from babygpt.console import protect_streams


class UserError(Exception):
    """An error in the settings, the files or the environment that the user can fix."""


class ConfigError(UserError):
    """A user error that all ranks raise, such as an invalid setting. One rank per node prints it."""


class OtherRankError(UserError):
    """A consequence of an error on another rank."""


class RankFailedError(OtherRankError, ConfigError):
    """Another rank has raised an error and prints its message. One rank per node prints this one."""


def suggest(name: object, known: Iterable[str]) -> str:
    """Return the fix of a message about an unknown name: the closest known name, or all known names."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def run(main: Callable[[], None]) -> None:
    """Call the `main()` of a script. On a UserError, print its message to stderr and exit with code 2."""
    code, is_first = 0, os.environ.get("LOCAL_RANK", "0") == "0"
    protect_streams()
    try:
        main()
    except UserError as error:
        rank, is_consequence = os.environ.get("RANK", "0"), isinstance(error, OtherRankError)
        prints = is_first or not isinstance(error, ConfigError)
        if prints:
            suffix = "" if rank == "0" else f" (rank {rank})"
            print(f"\nerror{suffix}: {error}", file=sys.stderr, flush=True)
            if not is_consequence:
                record_failure(str(error))
        is_first = prints and not is_consequence
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise  # Python prints the message
        code = error.code or 0
    except Exception:
        record_failure(traceback.format_exc())
        raise
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if code and not is_first:
            time.sleep(2)  # torchrun kills all ranks when one exits: the one with the message must be first
        exit_now(code)
    sys.stdout.flush()
    if code:
        sys.exit(code)


def record_failure(message: str) -> None:
    """Write a message to the file from which torchrun takes the text of its summary, if torchrun has started us.

    The format is that of torch.distributed.elastic.multiprocessing.errors.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError), open(path, "w") as file:
            extra = {"timestamp": str(int(time.time()))}
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def exit_now(code: int) -> None:
    """Exit without Python's finalization, during which gloo's threads sometimes abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
