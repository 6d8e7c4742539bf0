"""What the benchmarks share: the line about the machine, concurrent jobs, and output as Markdown."""

import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def machine() -> str:
    """Return the date, the machine, and the versions of Python and PyTorch."""
    return (
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )


def map_jobs(function: Callable[..., T], items: Iterable[Any], jobs: int) -> list[T]:
    """Return the results of function(item), up to `jobs` at a time. After a failure, no further item is started."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_table(lines: list[str], out: Path | None) -> None:
    """Print lines of Markdown and also write them to `out`, if given."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
