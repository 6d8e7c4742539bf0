"""Check that the disk and memory of this machine are large enough for a preparation.

>>> workers = check_resources(work, vocab_size=50257, workers=None)
"""

import os
import shutil
from pathlib import Path

from babygpt import files
from babygpt.data.plan import BUCKET_ROWS
from babygpt.data.shards import token_dtype
from babygpt.data.workspace import Workspace
from babygpt.errors import UserError

WORKER_MEMORY = 400 << 20  # bytes per worker, an upper estimate for row groups as large as FineWeb's


def check_resources(work: Workspace, vocab_size: int, workers: int | None) -> int:
    """Check the estimated disk and memory; return `workers`, or if None, one per core or as many as memory allows."""
    source, max_tokens = work.source, work.settings["max_tokens"]
    source_bytes = sum(unit.bytes for unit in source.units)
    tokens = int(source_bytes * source.tokens_per_byte)
    tokens = min(tokens, max_tokens or tokens)
    largest_unit = max((unit.bytes for unit in source.units), default=0)
    downloads = source.max_open_units * largest_unit if source.is_on_hub else 0
    parts_and_shards = 0 if files.is_remote(work.directory) else 2 * token_dtype(vocab_size).itemsize * tokens
    disk, free = downloads + parts_and_shards, shutil.disk_usage(work.local).free
    plan_memory = tokens // 1000 + min(tokens // 1000, BUCKET_ROWS) * 100  # a FineWeb document has 1,000 tokens
    available = _available_memory()
    if workers is None:
        affordable_workers = _cores() if available is None else (available - plan_memory) // WORKER_MEMORY
        workers = max(1, min(_cores(), affordable_workers))
    memory = plan_memory + workers * WORKER_MEMORY
    if source_bytes:
        print(
            f"{source.name}: {source_bytes / 1e6:,.1f} MB, about {tokens / 1e6:,.1f}M tokens. Preparation needs about "
            f"{disk / 1e9:,.2f} GB of disk ({free / 1e9:,.0f} GB free) and {memory / 1e9:,.1f} GB of memory for "
            f"{workers} workers."
        )
    remaining = disk - sum(
        path.stat().st_size for path in work.local.rglob("*.bin")
    )  # without what an earlier run wrote
    shortage = f"{remaining / 1e9:,.2f} GB is needed, but {free / 1e9:,.2f} GB is free. Use a different --out-dir."
    if remaining / 2 > free:  # the estimate may be twice the real size
        raise UserError(f"Not enough disk space for {work.local}: about {shortage}")
    if remaining > free:
        print(f"warning: the disk space for {work.local} may not be enough: up to {shortage}")
    if available is not None and memory > available:
        raise UserError(
            f"--workers {workers} needs about {memory / 1e9:,.1f} GB of memory, but only {available / 1e9:,.1f} GB is "
            "available. Use fewer workers."
        )
    return workers


def _available_memory() -> int | None:
    """Return the bytes that programs can allocate, including file caches; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
