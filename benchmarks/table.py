"""Shared by the benchmarks: a description of the machine, concurrent jobs, and Markdown output."""

import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import date
from importlib.metadata import version  # not torch.__version__: data.py measures its start without torch
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def machine() -> str:
    """Return the date, the machine, and the versions of Python and PyTorch."""
    return (
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{version('torch')}"
    )


def map_jobs(function: Callable[..., Result], items: Iterable[Any], jobs: int) -> list[Result]:
    """Return function(item) for each item, computed by `jobs` threads. After a failure, no further item starts."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, item) for item in items]
        wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
        failed = [future for future in futures if future.done() and not future.cancelled() and future.exception()]
        return [future.result() for future in failed or futures]


def write_table(lines: list[str], out: Path | None) -> None:
    """Print lines of Markdown and also write them to `out`, if given."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
