"""Check that the disk and memory of this machine are large enough for a preparation.

>>> workers = check_resources(work, load_tokenizer("gpt2"), workers=None)
"""

import os
import shutil
from pathlib import Path

from tqdm import tqdm

from babygpt import files
from babygpt.console import counted
from babygpt.data.plan import BUCKET_ROWS
from babygpt.data.shards import token_dtype
from babygpt.data.tokenizer import Tokenizer
from babygpt.data.workspace import Workspace
from babygpt.errors import UserError

WORKER_MEMORY = 400 << 20  # bytes per worker, an upper estimate for row groups as large as FineWeb's


def check_resources(work: Workspace, tokenizer: Tokenizer, workers: int | None) -> int:
    """Check the estimated disk and memory; return `workers`, or if None, one per core or as many as memory allows."""
    source, max_tokens = work.source, work.settings["max_tokens"]
    source_bytes = sum(unit.bytes for unit in source.units)
    tokens = int(source_bytes * source.tokens_per_byte)
    if tokenizer.is_character_level:
        tokens *= 4  # a GPT-2 token is about 4 characters of English text
    tokens = min(tokens, max_tokens or tokens)
    largest_unit = max((unit.bytes for unit in source.units), default=0)
    downloads = source.max_open_units * largest_unit if source.is_on_hub else 0
    parts_and_shards = 0 if files.is_remote(work.directory) else 2 * token_dtype(tokenizer.vocab_size).itemsize * tokens
    disk, free = downloads + parts_and_shards, shutil.disk_usage(work.local).free
    plan_memory = tokens // 1000 + min(tokens // 1000, BUCKET_ROWS) * 100  # a FineWeb document has 1,000 tokens
    available = _available_memory()
    if workers is None:
        affordable_workers = _cores() if available is None else (available - plan_memory) // WORKER_MEMORY
        workers = max(1, min(_cores(), affordable_workers))
    memory = plan_memory + workers * WORKER_MEMORY
    if source_bytes:
        print(
            f"{source.name}: {format_size(source_bytes)}, about {format_count(tokens)} tokens. Preparation needs "
            f"about {format_size(disk)} of disk ({format_size(free)} free) and {format_size(memory)} of memory for "
            f"{counted(workers, 'worker')}."
        )
    remaining = disk - sum(
        path.stat().st_size for path in work.local.rglob("*.bin")
    )  # without what an earlier run wrote
    shortage = f"{format_size(remaining)} is needed, but {format_size(free)} is free. Use a different --out-dir."
    if remaining / 2 > free:  # the estimate may be twice the real size
        raise UserError(f"Not enough disk space for {work.local}: about {shortage}")
    if remaining > free:
        print(f"warning: the disk space for {work.local} may not be enough: up to {shortage}")
    if available is not None and memory > available:
        raise UserError(
            f"--workers {workers} needs about {format_size(memory)} of memory, but only {format_size(available)} is "
            "available. Use fewer workers."
        )
    return workers


def format_size(num_bytes: int) -> str:
    """Return a size such as 810 B, 56.4 MB or 20.0 GB."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    text = tqdm.format_sizeof(num_bytes)  # for instance 56.4M
    return f"{text[:-1]} {text[-1]}B"


def format_count(count: int) -> str:
    """Return a number such as 810, 1.12K, 56.4M or 10.0B."""
    return f"{count}" if count < 1000 else tqdm.format_sizeof(count).replace("k", "K").replace("G", "B")


def _available_memory() -> int | None:
    """Return the bytes that programs can allocate, including file caches; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
