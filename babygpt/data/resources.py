"""Is there room for a preparation: disk, memory and cores of this machine.

>>> workers = check_room(source, settings, "data/x", None, 50257)
"""

import os
import shutil
from pathlib import Path

from babygpt import files
from babygpt.data.plan import BUCKET_ROWS
from babygpt.data.shards import token_dtype
from babygpt.data.sources import Source
from babygpt.errors import UserError

WORKER_MEMORY = 400 << 20  # bytes, a generous measure of one worker on FineWeb-sized row groups


def check_room(source: Source, settings: dict, folder: str, workers: int | None, vocab_size: int) -> int:
    """Tells the disk and memory needed, refuses what can't fit, and returns the number of workers: as many as
    asked for, else one a core as far as the memory reaches."""
    source_bytes = sum(unit.bytes for unit in source.units)
    tokens = int(source_bytes * source.tokens_per_byte)
    tokens = min(tokens, settings["max_tokens"] or tokens)
    largest = max(unit.bytes for unit in source.units) if source.downloads else 0
    disk = source.units_at_once * largest + (
        0 if files.is_remote(folder) else 2 * token_dtype(vocab_size).itemsize * tokens
    )
    documents = tokens // 1000  # FineWeb's have 1,000 tokens
    plan_memory = documents + min(documents, BUCKET_ROWS) * 100
    available = _available_memory()
    if workers is None:
        most = (available - plan_memory) // WORKER_MEMORY if available is not None else _cores()
        workers = max(1, min(_cores(), most))
    memory = plan_memory + workers * WORKER_MEMORY
    place = files.cache(folder).absolute()
    there = next(parent for parent in [place, *place.parents] if parent.exists())
    written = sum(path.stat().st_size for path in place.rglob("*.bin"))  # by a run that was stopped
    free = shutil.disk_usage(there).free
    if source_bytes:
        print(
            f"{source.name}: {len(source.units):,} files or batches, {source_bytes / 1e9:,.2f} GB, roughly "
            f"{tokens / 1e6:,.0f} M tokens; needs about {disk / 1e9:,.2f} GB of disk ({free / 1e9:,.0f} free) and "
            f"{memory / 1e9:,.1f} GB of memory for {workers} workers."
        )
    if (disk - written) / 2 > free:  # the estimate may be twice the truth
        raise UserError(
            f"{there} has too little room: {free / 1e9:,.2f} GB free. Give another --out-dir, or --max-tokens."
        )
    if disk - written > free:
        print("warning: the disk may not be enough.")
    if available is not None and memory > available:
        raise UserError(f"too little memory: {available / 1e9:,.1f} GB are free. Give fewer --workers than {workers}.")
    return workers


def _available_memory() -> int | None:
    """Bytes that programs can have, file caches counted in; None where the system doesn't tell (macOS)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
