"""Measure how fast the data loader plans and reads, and how long a training step waits for it.

    python benchmarks/loader.py [--tokens 10e9] [--out results/loader/speed.md]

Planning: the dataset has --tokens tokens in shards of 100 M, with an EOT about every 10,000 tokens. Its files are
sparse, in a temporary directory, and take a fifth of their size on disk. A new process opens it and creates an `Order`
with default settings and the first epoch. The memory is the peak of the process, including pages of mapped files, minus
its peak before.
Reading: rows of T = 1,024 from 200 M tokens in the page cache, in the order of an epoch, on one thread, into one
(B, T + 1) int64 buffer. `read_row` reads one row per call, `read_rows` B rows. Rows across boundaries span
several chunks or shards.
Waiting: a consumer takes a step of 65,536 tokens and computes for 20 ms, 300 times.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from babygpt.data.shards import HEADER_BYTES, MAGIC_UINT16, VERSION_UINT16, open_dataset, shard_name  # noqa: E402
from benchmarks.table import write_table  # noqa: E402
from dataloader import DataLoader, Order, Position  # noqa: E402

EOT, T, NUM_STREAMS, SEED, SHARD_TOKENS = 50256, 1024, 1024, 1337, 100_000_000
STEP_TOKENS, NUM_STEPS, COMPUTE_S = 65_536, 300, 0.020


# ---------------------------------------------------------------------------------------------------------
# datasets


def write_shards(directory: Path, sizes: list[int], write_tokens: Callable[[BinaryIO, int], None]) -> Path:
    """Write shards of `sizes` tokens without a manifest. `write_tokens(file, size)` writes the tokens of a shard."""
    directory.mkdir()
    for number, size in enumerate(sizes, 1):
        with open(directory / shard_name(directory.name, "train", number), "wb") as file:
            header = np.zeros(256, "<i4")
            header[:3] = MAGIC_UINT16, VERSION_UINT16, size
            file.write(header.tobytes())
            write_tokens(file, size)
    return directory


def write_sparse(file: BinaryIO, size: int) -> None:
    """Write zeros, which take no disk space, and EOT tokens."""
    rng, eot = np.random.default_rng(file.fileno() + size), np.uint16(EOT).tobytes()
    positions = np.cumsum(rng.exponential(10_000, size // 5000 + 10).astype(np.int64) + 1)
    file.truncate(HEADER_BYTES + 2 * size)
    file.flush()
    for offset in (HEADER_BYTES + 2 * positions[positions < size]).tolist():
        os.pwrite(file.fileno(), eot, offset)


def write_random(file: BinaryIO, size: int) -> None:
    """Write random tokens in documents of about 1,000 tokens."""
    rng = np.random.default_rng(size)
    ids = rng.integers(0, EOT, size, np.uint16)
    ids[rng.integers(0, size, size // 1000)] = EOT
    file.write(ids.tobytes())


def drop_page_cache(directory: Path) -> None:
    """Drop the files of a directory from the page cache (Linux)."""
    for path in directory.glob("*.bin"):
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------------------------------------
# measurement


def plan(directory: Path) -> None:
    """Plan in this new process, and print the seconds and the additional peak memory in bytes as JSON."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    order = Order(open_dataset(directory).train, EOT, T, NUM_STREAMS, SEED)
    order.epoch(0)
    seconds = time.perf_counter() - start
    additional_peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << (
        10 if sys.platform == "linux" else 0
    )
    print(json.dumps({"seconds": seconds, "bytes": additional_peak, "chunks": len(order.chunk_starts)}))


def measure_planning(directory: Path) -> dict:
    return json.loads(subprocess.check_output([sys.executable, __file__, "--plan", str(directory)]))


def read_epoch(order: Order, read: Callable[[int], object], batch: int) -> float:
    """Return the tokens per second of `read(n)`, which reads `batch` rows from row n: the median of three epochs."""
    speeds = []
    for _ in range(3):
        start, rows = time.perf_counter(), range(0, order.rows_per_epoch - batch + 1, batch)
        for n in rows:
            read(n)
        speeds.append(len(rows) * batch * T / (time.perf_counter() - start))
    return statistics.median(speeds)


def measure_reading(order: Order, batch: int) -> tuple[float, float, float]:
    """Return the tokens per second of `read_row`, of `read_rows`, and of the loader's steps, which allocate tensors."""
    buffer, step_rows = np.empty((batch, T + 1), np.int64), STEP_TOKENS // T

    def row_by_row(n: int) -> None:
        for i, out in enumerate(buffer):
            order.read_row(0, n + i, out)

    loader = DataLoader(order, Position(), step_rows, batch)
    loader.close()  # stop its thread: this function reads the steps itself
    return (
        read_epoch(order, row_by_row, batch),
        read_epoch(order, lambda n: order.read_rows(0, range(n, n + batch), buffer), batch),
        read_epoch(order, lambda n: loader.read_batch(Position(0, n)), step_rows),
    )


def split_rows_fraction(order: Order) -> float:
    """Return the fraction of rows that span several chunks or shards, estimated from 10,000 rows."""
    rows, starts = np.linspace(0, order.rows_per_epoch - 1, 10_000).astype(int).tolist(), order.tokens.starts
    ranges = [order.epoch(0).row(n) for n in rows]
    in_one_shard = [
        np.searchsorted(starts, r[0][0], side="right") == np.searchsorted(starts, r[-1][1] - 1, side="right")
        for r in ranges
    ]
    return 1 - sum(len(r) == 1 and same for r, same in zip(ranges, in_one_shard, strict=True)) / len(rows)


def measure_waiting(order: Order, compute: Callable[[], None]) -> Iterator[float]:
    """Yield the seconds that each step waits for its data."""
    loader = DataLoader(order, Position(), STEP_TOKENS // T, 16)
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        next(loader)
        yield time.perf_counter() - start
        compute()
    loader.close()


def sleep() -> None:
    """Compute as on a GPU: the Python thread sleeps."""
    time.sleep(COMPUTE_S)


def multiply_matrices() -> None:
    """Compute as on a CPU: torch uses all cores."""
    end, a = time.perf_counter() + COMPUTE_S, torch.ones(256, 256)
    while time.perf_counter() < end:
        a @ a


def run_python() -> None:
    """The worst case: the Python thread never releases the CPU."""
    end = time.perf_counter() + COMPUTE_S
    while time.perf_counter() < end:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=float, default=10e9, help="tokens of the dataset that is planned (default: 10e9)"
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the tables")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        return plan(options.plan)
    lines = [
        f"`python benchmarks/loader.py --tokens {options.tokens:g}`; {date.today()}, {os.cpu_count()} cores, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, torch {torch.__version__}",
        "", "| planning | tokens | shards | size on disk | chunks | seconds | additional peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        num_shards = round(options.tokens / SHARD_TOKENS)
        large = write_shards(Path(directory) / "large", [SHARD_TOKENS] * num_shards, write_sparse)
        disk_bytes = sum(path.stat().st_blocks * 512 for path in large.iterdir())
        for name, prepare in (("not in the page cache", drop_page_cache), ("in the page cache", lambda _: None)):
            prepare(large)
            planning = measure_planning(large)
            lines.append(
                f"| {name} | {num_shards * SHARD_TOKENS:,} | {num_shards} | {disk_bytes / 1e9:.1f} GB | "
                f"{planning['chunks']:,} | {planning['seconds']:.2f} | {planning['bytes'] / 2**20:,.0f} MiB |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        datasets = {
            "2 shards of 100 M": (write_shards(Path(directory) / "few", [SHARD_TOKENS] * 2, write_random), None),
            "2,000 shards of 100,000": (write_shards(Path(directory) / "many", [100_000] * 2000, write_random), None),
            "the same, chunks of 5,000": (Path(directory) / "many", 5000),
        }
        lines += [
            "",
            "| reading, one thread | rows across boundaries | B | `read_row` | `read_rows` | steps of the loader |",
            "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, (path, chunk_tokens) in datasets.items():
            order = Order(open_dataset(path).train, EOT, T, NUM_STREAMS, SEED, chunk_tokens)
            for batch in (16, 64):
                speeds = " | ".join(f"{speed / 1e6:,.0f} M tokens/s" for speed in measure_reading(order, batch))
                lines.append(f"| {name} | {split_rows_fraction(order):.1%} | {batch} | {speeds} |")
                print(lines[-1], file=sys.stderr, flush=True)
        lines += [
            "",
            "| consumer | longest wait of 299 steps | median | first step |",
            "|---|---:|---:|---:|",
        ]
        order = Order(open_dataset(datasets["2,000 shards of 100,000"][0]).train, EOT, T, NUM_STREAMS, SEED)
        consumers = {"sleeps": sleep, "multiplies matrices in torch": multiply_matrices, "runs pure Python": run_python}
        for name, compute in consumers.items():
            first, *rest = measure_waiting(order, compute)
            times = (max(rest), statistics.median(rest), first)
            lines.append(f"| {name} | " + " | ".join(f"{1e3 * t:.2f} ms" for t in times) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
