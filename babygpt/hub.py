"""The Hugging Face hub: resolve revisions, download and verify files, stream datasets, and retry failed requests.

`download_wheel` downloads from the package index instead.

    >>> revision = hub.resolve_revision("HuggingFaceFW/fineweb-edu")
    >>> path = hub.download("openai-community/gpt2", "model.safetensors", None, Path("data/gpt2"), "model")

The environment variable HF_ENDPOINT selects another hub (a mirror).
"""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babygpt import files
from babygpt.errors import UserError

# exceptions of the HTTP libraries, `datasets` and huggingface_hub, by name
UNREACHABLE_ERRORS = ("ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled")


class UnreachableError(UserError):
    """The Hugging Face Hub cannot be reached."""


def client():
    """Import huggingface_hub with downloads by plain HTTP instead of Xet: the tests cover the failures of HTTP."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub

    return huggingface_hub


def resolve_revision(repo: str, revision: str | None = None, repo_type: str = "dataset") -> str:
    """Return the current commit of `revision` (None: the main branch). UserError at once if the hub is unreachable."""
    api = client().HfApi()

    def request() -> str:
        return api.repo_info(repo, repo_type=repo_type, revision=revision, timeout=10).sha

    return call_with_retries(request, repo, fail_fast=True)


def download(
    repo: str, name: str, revision: str | None, directory: Path, repo_type: str, sha256: str | None = None
) -> Path:
    """Download a file from the hub to `directory`/`name`, and check its sha256 if given.

    If `revision` is None, an existing file of any revision is returned unchanged.
    """
    if revision is None and (directory / name).exists():
        return directory / name
    revision = revision or resolve_revision(repo, repo_type=repo_type)

    def request() -> Path:
        path = Path(client().hf_hub_download(repo, name, repo_type=repo_type, revision=revision, local_dir=directory))
        if sha256 is not None and files.sha256(path) != sha256:
            path.unlink()
            raise OSError("the downloaded file is corrupted: its sha256 differs from that on the hub")
        return path

    return call_with_retries(request, f"{repo}/{name}")


def call_with_retries(
    request: Callable, what: str, delays: tuple[int, ...] = (1, 2, 4, 8, 16), fail_fast: bool = False
):
    """Call `request`, and after a temporary error retry it after each of `delays` seconds; then raise a UserError.

    With `fail_fast`, an unreachable hub is an error without retries: this is for the first request of a run.

    huggingface_hub itself resumes interrupted downloads and waits for a lost network. It does not retry a GET after a
    status of 500 or above, or after a connection that was dropped before or during the response.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    http_error: Any = HfHubHTTPError.__mro__[1]  # base class of the HTTP library that this version uses
    for delay in (*delays, None):
        try:
            return request()
        except (http_error, OSError, ValueError) as error:
            cause = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            is_unreachable = type(cause).__name__ in UNREACHABLE_ERRORS
            if is_unreachable and (fail_fast or delay is None):
                raise UnreachableError(
                    f"The Hugging Face Hub cannot be reached to download {what}: {cause}. Check the network, or set "
                    "HF_ENDPOINT to a mirror."
                ) from None
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise UserError(f"{what} cannot be stored: {cause}. Free disk space, or check permissions.") from None
            is_missing = not is_unreachable and isinstance(cause, (EntryNotFoundError, FileNotFoundError, ValueError))
            if is_missing or (status is not None and status < 500 and status not in (408, 429)):
                raise UserError(f"{what} is not available on the Hugging Face Hub: {cause}") from None
            if delay is None:
                raise UserError(
                    f"The request to the Hugging Face Hub for {what} failed: {cause}\nRun the same command again later."
                ) from None
            print(
                f"\nThe request to the Hugging Face Hub for {what} failed ({cause}). Retrying in {delay} s.",
                file=sys.stderr,
            )
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")


def stream(repo: str, config: str | None, split: str, revision: str):
    """Return a dataset on the hub as an iterable of rows (dicts) that the library `datasets` downloads as needed."""
    client()
    from datasets import load_dataset

    def request():
        return load_dataset(repo, config, split=split, revision=revision, streaming=True)

    return call_with_retries(request, repo)


def download_wheel(requirement: str, directory: Path) -> Path:
    """Download a package's wheel from the package index, without installing it. UserError if it is not available."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        pip_error = "".join(done.stderr.strip().splitlines()[-1:])
        raise UserError(f"{requirement} cannot be downloaded with `pip download` ({pip_error}). Check the network.")
    return wheels[0]
