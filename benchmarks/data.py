"""Measure the speed of data preparation, from text to token shards: fineweb.py and the common alternatives.

    python benchmarks/data.py PATH [--processes 1 2] [--runs 3] [--out results/data/speed.md]

PATH is a directory of Parquet files with a column `text`. Each implementation runs as a separate command, from the
input files to the finished shards, in a new directory and with its startup time included. The implementations
alternate. All use GPT-2's tokenizer. Only ours drops duplicates and hashes every shard; only ours and nanoGPT split
the data into training and validation documents.

    build-nanogpt   load_dataset, pool.imap over documents in chunks of 16, a buffer of one shard, np.save
    nanoGPT         load_dataset, train_test_split, datasets.map with num_proc, a memmap written in 1,024 batches
    tiktoken        batches of 256 documents from pyarrow to a pool whose workers return flat uint16 arrays
    ours-tiktoken   fineweb.py without gigatoken installed
    ours            fineweb.py
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.table import write_table  # noqa: E402

if TYPE_CHECKING:
    import tiktoken

IMPLEMENTATIONS = ("build-nanogpt", "nanoGPT", "tiktoken", "ours-tiktoken", "ours")


# ---------------------------------------------------------------------------------------------------------
# the implementations, each run in a separate process


encoding: "tiktoken.Encoding"  # set by _init_worker


def _init_worker() -> None:
    from babygpt.data.tokenizer import GPT2Tokenizer

    global encoding
    encoding = GPT2Tokenizer().encoding


def _encode_document(row: dict) -> np.ndarray:
    ids = np.array([50256, *encoding.encode_ordinary(row["text"])])
    assert (ids >= 0).all()
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def _encode_texts(texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for text in texts:
        ids.append(50256)
        ids += encoding.encode_ordinary(text)
    return np.array(ids, np.uint16)


def build_nanogpt(files: list[str], out: Path, processes: int) -> None:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
    shard_tokens, filled, shard = 10**8, 0, 0
    buffer = np.empty(shard_tokens, np.uint16)
    with multiprocessing.Pool(processes, _init_worker) as pool:
        for ids in pool.imap(_encode_document, rows, chunksize=16):
            fits = min(len(ids), shard_tokens - filled)
            buffer[filled : filled + fits] = ids[:fits]
            filled += fits
            if fits < len(ids):
                np.save(out / f"shard_{shard:06d}.npy", buffer)
                shard, filled = shard + 1, len(ids) - fits
                buffer[:filled] = ids[fits:]
    np.save(out / f"shard_{shard:06d}.npy", buffer[:filled])


def _encode_row(row: dict) -> dict:
    ids = encoding.encode_ordinary(row["text"])
    ids.append(50256)
    return {"ids": ids, "len": len(ids)}


def nanogpt(files: list[str], out: Path, processes: int) -> None:
    from datasets import load_dataset

    _init_worker()
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"), num_proc=processes)
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoded = splits.map(_encode_row, remove_columns=rows.column_names, num_proc=processes)
    for name, split in encoded.items():
        bin_ = np.memmap(out / f"{name}.bin", np.uint16, "w+", shape=(int(np.sum(split["len"], dtype=np.uint64)),))
        offset, num_batches = 0, min(1024, len(split))
        for i in range(num_batches):
            ids = np.concatenate(split.shard(num_batches, i, contiguous=True).with_format("numpy")["ids"])
            bin_[offset : offset + len(ids)] = ids
            offset += len(ids)
        bin_.flush()


def tiktoken_pool(files: list[str], out: Path, processes: int) -> None:
    import pyarrow.parquet as pq

    def batches() -> Iterator[list[str]]:
        for file in files:
            for rows in pq.ParquetFile(file).iter_batches(256, columns=["text"]):
                yield rows.column(0).to_pylist()

    with multiprocessing.Pool(processes, _init_worker) as pool, open(out / "train.bin", "wb") as file:
        for ids in pool.imap(_encode_texts, batches()):
            file.write(ids.data)


def ours(files: list[str], out: Path, processes: int) -> None:
    import fineweb
    from babygpt.errors import run

    arguments = ["files", "--input", *files, "--out-dir", str(out / "set"), "--workers", str(processes)]
    with mock.patch.object(sys, "argv", ["fineweb.py", *arguments]):
        run(fineweb.main)


def ours_tiktoken(files: list[str], out: Path, processes: int) -> None:
    hidden = out / "hidden"
    hidden.mkdir()
    (hidden / "gigatoken.py").write_text("raise ImportError('hidden by the benchmark')\n")
    sys.path.insert(0, str(hidden))
    os.environ["PYTHONPATH"] = str(hidden)  # for the worker processes
    ours(files, out, processes)


FUNCTIONS = dict(zip(IMPLEMENTATIONS, (build_nanogpt, nanogpt, tiktoken_pool, ours_tiktoken, ours), strict=True))


# ---------------------------------------------------------------------------------------------------------
# measurement


def process_tree_memory(pid: int) -> int:
    """Return the memory of a process and its descendants in bytes. Shared pages count proportionally (PSS). Linux."""
    total, pids = 0, [pid]
    while pids:
        pid = pids.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            for task in os.listdir(f"/proc/{pid}/task"):
                pids += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total


def measure(name: str, files: list[str], processes: int, measure_memory: bool = False) -> float:
    """Run an implementation as a command. Return the seconds or, with `measure_memory`, the peak memory in bytes.

    The two are separate runs, because sampling the memory takes time.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--way", name, "--processes", str(processes), "--into", out, *files]
        log, start, peak = Path(out) / "log", time.perf_counter(), 0
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        while measure_memory and process.poll() is None:
            peak = max(peak, process_tree_memory(process.pid))
            time.sleep(0.1)
        if process.wait():
            sys.exit(f"error: {name} failed:\n{log.read_text()[-3000:]}")
        return peak if measure_memory else time.perf_counter() - start


def measure_stages(files: list[str]) -> dict[str, float]:
    """Return the seconds of each stage of fineweb.py, in this process, with timers around its functions."""
    from babygpt.data import filters, readers, shards, workers
    from babygpt.data.plan import plan_shards
    from babygpt.data.tokenizer import load_tokenizer

    seconds = dict.fromkeys(("read", "filter", "encode", "hash", "commit"), 0.0)

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return wrapper

    def read(task: readers.Task) -> Iterator[readers.Batch]:
        batches = readers.read(task)
        while (batch := timed("read", next)(batches, None)) is not None:
            yield batch

    tokenizer = load_tokenizer("gpt2")
    workers.set_up(workers.Setup(tokenizer))
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(workers, "read", read),
        mock.patch.object(tokenizer, "encode_batch", timed("encode", tokenizer.encode_batch)),
        mock.patch.object(filters.Filters, "decide", timed("filter", filters.Filters.decide)),
        mock.patch.object(workers, "hash_texts", timed("hash", workers.hash_texts)),
        mock.patch.object(os, "fsync", timed("commit", os.fsync)),
    ):
        tasks, start = [task for file in files for task in readers.split_parquet(file, ("text",))], time.perf_counter()
        stems = [f"{directory}/{i:05d}" for i in range(len(tasks))]
        for task, stem in zip(tasks, stems, strict=True):
            workers.tokenize_task(task, stem)
        tokenize_end = time.perf_counter()
        plan = plan_shards(stems, None, None, Path(directory) / "buckets")
        plan_end = time.perf_counter()
        for split, count in plan.tokens.items():
            pieces = plan.pieces(split, 0, count)
            workers.write_task(f"{directory}/{split}.bin", pieces, count, 50257, f"{directory}/{split}.json")
        end = time.perf_counter()
    assert shards.token_dtype(50257).itemsize == 2
    seconds["join and write"] = tokenize_end - start - sum(seconds.values())
    return seconds | {"plan": plan_end - tokenize_end, "write shards, sha256": end - plan_end}


def write_copies(files: list[str], copies: int, directory: Path) -> list[str]:
    """Write several copies of the files, with the number of the copy before each text to prevent duplicates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = []
    for copy in range(copies):
        for file in files:
            texts = pq.read_table(file, columns=["text"]).column(0).to_pylist()
            names.append(str(directory / f"{copy}-{Path(file).name}"))
            table = pa.table({"text": [f"Copy {copy}.\n{text}" for text in texts]})
            pq.write_table(table, names[-1], compression="zstd", row_group_size=2000)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", nargs="*", help="directory of Parquet files")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of worker processes (default: 1 2)"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs per implementation (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=0, help="use this many distinct copies of the files")
    parser.add_argument(
        "--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS, help="implementations"
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the tables")
    parser.add_argument("--way", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return FUNCTIONS[options.way](options.path, options.into, options.processes[0])
    if len(options.path) != 1 or not (files := sorted(map(str, Path(options.path[0]).glob("*.parquet")))):
        parser.error(f"PATH must be one directory of Parquet files, got {' '.join(options.path)!r}.")

    with tempfile.TemporaryDirectory() as directory:
        compare(write_copies(files, options.copies, Path(directory)) if options.copies else files, options)


def compare(files: list[str], options: argparse.Namespace) -> None:
    """Measure all implementations and print the tables."""
    import pyarrow.parquet as pq

    texts = (pq.read_table(file, columns=["text"]).column(0) for file in files)
    size = sum(len(text.encode()) for column in texts for text in column.to_pylist())
    lines = [
        f"{len(files)} parquet files{f' ({options.copies} distinct copies)' if options.copies else ''}, "
        f"{size / 1e6:,.0f} MB of text; {date.today()}, {os.cpu_count()} cores, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "gigatoken", "datasets", "pyarrow")),
        "",
        "| implementation | processes | seconds, median (min to max) | MB of text/s | speedup over "
        f"{options.implementations[0]} | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for processes in options.processes:
        runs: dict[str, list[float]] = {name: [] for name in options.implementations}
        for _ in range(options.runs):
            for name in options.implementations:
                runs[name].append(measure(name, files, processes))
                print(f"{name}, {processes} processes: {runs[name][-1]:.2f} s", file=sys.stderr, flush=True)
        for name, seconds in runs.items():
            speedups = [base / other for base, other in zip(runs[options.implementations[0]], seconds, strict=True)]
            peak = measure(name, files, processes, measure_memory=True)
            lines.append(
                f"| {name} | {processes} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
                f"| {size / 1e6 / statistics.median(seconds):,.1f} | {statistics.median(speedups):.1f} "
                f"| {peak / 2**20:,.0f} MiB |"
            )
    stages = measure_stages(files)
    lines += ["", "Ours, in one process, without imports:", "", "| stage | seconds | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {second:.2f} | {second / sum(stages.values()):.0%} |" for name, second in stages.items()]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
