"""How fast the data loader plans and reads, and whether it ever lets a training step wait.

    python benchmarks/loader.py [--tokens 10e9] [--out results/loader/speed.md]

Planning: a data set of --tokens in shards of 100 M, an end of text about every 10,000 tokens, sparse files (a fifth of
the size on disk, in a temporary folder). A fresh process opens it, makes an `Order` with default settings and the
first epoch; its memory is the peak of the whole process, pages of mapped files included, less what it had before.
Reading: 200 M tokens in warm pages; rows of T = 1,024 in the order of an epoch, on one thread, into one
(B, T + 1) int64 buffer; "row by row" is the plain way, by `read_row`.
Waiting: a consumer takes a step of 65,536 tokens and computes 20 ms, 300 times.
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

EOT, T, STREAMS, SEED, SHARD = 50256, 1024, 64, 1337, 100_000_000
STEP_TOKENS, STEPS, COMPUTE_S = 65_536, 300, 0.020


# ---------------------------------------------------------------------------------------------------------
# data sets


def write(folder: Path, sizes: list[int], fill: Callable[[BinaryIO, int], None]) -> Path:
    """Shards of these many tokens without a manifest; `fill(file, tokens)` writes what stands behind the header."""
    folder.mkdir()
    for number, size in enumerate(sizes, 1):
        with open(folder / shard_name(folder.name, "train", number), "wb") as file:
            header = np.zeros(256, "<i4")
            header[:3] = MAGIC_UINT16, VERSION_UINT16, size
            file.write(header.tobytes())
            fill(file, size)
    return folder


def sparse(file: BinaryIO, size: int) -> None:
    """Zeros that take no disk, but for the ends of text."""
    rng, eot = np.random.default_rng(file.fileno() + size), np.uint16(EOT).tobytes()
    at = np.cumsum(rng.exponential(10_000, size // 5000 + 10).astype(np.int64) + 1)
    file.truncate(HEADER_BYTES + 2 * size)
    file.flush()
    for place in (HEADER_BYTES + 2 * at[at < size]).tolist():
        os.pwrite(file.fileno(), eot, place)


def dense(file: BinaryIO, size: int) -> None:
    """Random tokens in documents of about 1,000."""
    rng = np.random.default_rng(size)
    ids = rng.integers(0, EOT, size, np.uint16)
    ids[rng.integers(0, size, size // 1000)] = EOT
    file.write(ids.tobytes())


def forget(folder: Path) -> None:
    """Puts the files of a folder out of the page cache (Linux)."""
    for path in folder.glob("*.bin"):
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------------------------------------
# measuring


def plan(folder: Path) -> None:
    """In a process of its own: prints seconds and extra peak bytes of planning, as JSON."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    order = Order(open_dataset(folder).train, EOT, T, STREAMS, SEED)
    order.epoch(0)
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << (10 if sys.platform == "linux" else 0)
    print(json.dumps({"seconds": seconds, "bytes": peak, "chunks": len(order.chunk_starts)}))


def planned(folder: Path) -> dict:
    return json.loads(subprocess.check_output([sys.executable, __file__, "--plan", str(folder)]))


def passes(order: Order, read: Callable[[int], object], batch: int) -> float:
    """Tokens a second of `read(n)`, which reads the `batch` rows from row n on: the median of three passes."""
    speeds = []
    for _ in range(3):
        begin, rows = time.perf_counter(), range(0, order.rows_per_epoch - batch + 1, batch)
        for n in rows:
            read(n)
        speeds.append(len(rows) * batch * T / (time.perf_counter() - begin))
    return statistics.median(speeds)


def reading(order: Order, batch: int) -> tuple[float, float, float]:
    """Tokens a second row by row, by `read_rows`, and by the loader's whole steps with their fresh tensors."""
    buffer, step_rows = np.empty((batch, T + 1), np.int64), STEP_TOKENS // T

    def row_by_row(n: int) -> None:
        for i, out in enumerate(buffer):
            order.read_row(0, n + i, out)

    loader = DataLoader(order, Position(), step_rows, batch)
    loader.close()  # its thread: the steps are read here
    return (
        passes(order, row_by_row, batch),
        passes(order, lambda n: order.read_rows(0, range(n, n + batch), buffer), batch),
        passes(order, lambda n: loader._read_batch(Position(0, n)), step_rows),
    )


def crossing(order: Order) -> float:
    """The share of rows that lie in several chunks or shards, of 10,000."""
    rows, starts = np.linspace(0, order.rows_per_epoch - 1, 10_000).astype(int).tolist(), order.tokens.starts
    ranges = [order.epoch(0).row(n) for n in rows]
    inner = [np.searchsorted(starts, r[0][0], side="right") == np.searchsorted(starts, r[-1][1] - 1, side="right")
             for r in ranges]  # fmt: skip
    return 1 - sum(len(r) == 1 and same for r, same in zip(ranges, inner, strict=True)) / len(rows)


def waits(order: Order, compute: Callable[[], None]) -> Iterator[float]:
    """Seconds that each of the steps waits for its data."""
    loader = DataLoader(order, Position(), STEP_TOKENS // T, 16)
    for _ in range(STEPS):
        begin = time.perf_counter()
        next(loader)
        yield time.perf_counter() - begin
        compute()
    loader.close()


def idle() -> None:
    """As a GPU computes: the Python thread waits."""
    time.sleep(COMPUTE_S)


def products() -> None:
    """As a CPU computes: torch is busy on all cores."""
    end, a = time.perf_counter() + COMPUTE_S, torch.ones(256, 256)
    while time.perf_counter() < end:
        a @ a


def python() -> None:
    """The worst neighbour: the Python thread never rests."""
    end = time.perf_counter() + COMPUTE_S
    while time.perf_counter() < end:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=10e9, help="of the data set that is planned")
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        return plan(options.plan)
    lines = [
        f"`python benchmarks/loader.py --tokens {options.tokens:g}`; {date.today()}, {os.cpu_count()} cores, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, torch {torch.__version__}",
        "", "| planning | tokens | shards | on disk | chunks | seconds | extra peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        shards = round(options.tokens / SHARD)
        large = write(Path(folder) / "large", [SHARD] * shards, sparse)
        disk = sum(path.stat().st_blocks * 512 for path in large.iterdir())
        for name, prepare in (("not in the page cache", forget), ("in the page cache", lambda _: None)):
            prepare(large)
            found = planned(large)
            lines.append(
                f"| {name} | {shards * SHARD:,} | {shards} | {disk / 1e9:.1f} GB | {found['chunks']:,} "
                f"| {found['seconds']:.2f} | {found['bytes'] / 2**20:,.0f} MiB |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        sets = {
            "2 shards of 100 M": (write(Path(folder) / "few", [SHARD] * 2, dense), None),
            "2,000 shards of 100,000": (write(Path(folder) / "many", [100_000] * 2000, dense), None),
            "the same, chunks of 5,000": (Path(folder) / "many", 5000),
        }
        lines += [
            "",
            "| reading, one thread | rows across borders | B | row by row | `read_rows` | whole steps |",
            "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, (path, chunk_tokens) in sets.items():
            order = Order(open_dataset(path).train, EOT, T, STREAMS, SEED, chunk_tokens)
            for batch in (16, 64):
                speeds = " | ".join(f"{speed / 1e6:,.0f} M tokens/s" for speed in reading(order, batch))
                lines.append(f"| {name} | {crossing(order):.1%} | {batch} | {speeds} |")
                print(lines[-1], file=sys.stderr, flush=True)
        lines += ["", "| waiting for a step | longest of 299 | median | the first |", "|---|---:|---:|---:|"]
        order = Order(open_dataset(sets["2,000 shards of 100,000"][0]).train, EOT, T, STREAMS, SEED)
        for name, compute in (("sleeps", idle), ("torch's products", products), ("pure Python", python)):
            first, *rest = waits(order, compute)
            times = (max(rest), statistics.median(rest), first)
            lines.append(f"| the consumer: {name} | " + " | ".join(f"{1e3 * t:.2f} ms" for t in times) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
