"""The Hugging Face hub: which commit a name stands for, files that arrive whole, and faults that pass.

    >>> revision = hub.revision_of("HuggingFaceFW/fineweb-edu")
    >>> path = hub.download("openai-community/gpt2", "model.safetensors", None, Path("data/gpt2"), "model")

HF_ENDPOINT names another hub (a mirror).
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babygpt import files
from babygpt.errors import UserError

# what the HTTP libraries, `datasets` and the hub's library call it
UNREACHABLE = ("ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled")


class Unreachable(UserError):
    """There is no way to the hub from here."""


def client():
    """The hub's library, told to download by plain HTTP: its faults are what our tests know."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub

    return huggingface_hub


def revision_of(repo: str, revision: str | None = None, repo_type: str = "dataset") -> str:
    """The commit that `revision` (None: the main branch) is now; at once a UserError where the hub is out of reach."""
    api = client().HfApi()
    return call(lambda: api.repo_info(repo, repo_type=repo_type, revision=revision, timeout=10), repo, first=True).sha


def download(
    repo: str, name: str, revision: str | None, folder: Path, repo_type: str, sha256: str | None = None
) -> Path:
    """Brings one file of the hub to `folder`/`name`, and holds it against its sha256 where that is given.

    A `revision` of None is any: a file that is there already is taken as it is.
    """
    if revision is None and (folder / name).exists():
        return folder / name
    revision = revision or revision_of(repo, repo_type=repo_type)

    def fetch() -> Path:
        path = Path(client().hf_hub_download(repo, name, repo_type=repo_type, revision=revision, local_dir=folder))
        if sha256 is not None and files.sha256(path) != sha256:
            path.unlink()
            raise OSError("the file that came is not the one of the hub (its sha256 differs)")
        return path

    return call(fetch, f"{repo}/{name}")


def call(ask: Callable, what: str, waits: tuple[int, ...] = (1, 2, 4, 8, 16), first: bool = False):
    """Calls the hub, once more after each of `waits` seconds while the fault may pass; then a UserError.

    `first` is the first word with the hub: where there is no way to it, no time is lost with waiting.

    The library goes on by itself where a body was cut off and waits for a lost network, but raises at once
    on a 5xx to a GET, and on a connection dropped before the answer or reset within it.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library that this version of the hub's stands on
    for wait in (*waits, None):
        try:
            return ask()
        except (http_error, OSError, ValueError) as error:
            cause = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            unreachable = type(cause).__name__ in UNREACHABLE
            if unreachable and (first or wait is None):
                raise Unreachable(
                    f"the hub can't be reached for {what} ({cause}). HF_ENDPOINT can name a mirror of it."
                ) from None
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise UserError(f"{what} can't be stored: {cause}") from None
            missing = not unreachable and isinstance(cause, (EntryNotFoundError, FileNotFoundError, ValueError))
            if missing or (status is not None and status < 500 and status not in (408, 429)):
                raise UserError(f"the hub doesn't give {what}: {cause}") from None
            if wait is None:
                raise UserError(f"the hub keeps failing for {what}: {cause}\nGive the same command later.") from None
            print(f"\nthe hub fails for {what}, trying again in {wait} s: {cause}", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def stream(repo: str, config: str | None, split: str, revision: str):
    """The rows of a data set of the hub as they come, by the library `datasets`: an iterable of dicts."""
    client()
    from datasets import load_dataset

    return call(lambda: load_dataset(repo, config, split=split, revision=revision, streaming=True), repo)
