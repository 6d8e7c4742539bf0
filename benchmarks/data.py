"""How fast text becomes token shards: fineweb.py against what a user would write or pick instead, in one run.

    python benchmarks/data.py PATH [--processes 1 2] [--runs 3] [--out results/data/speed.md]

PATH is a folder of parquet files with a column `text`. Every way is a command of its own, from the files to finished
shards, its start included, on a fresh folder; the ways take turns. Ours finds doubles, splits by document and hashes
every shard beside, the others don't. With GPT-2's vocabulary throughout:

    build-nanogpt   load_dataset, pool.imap over documents in chunks of 16, an array of a shard's size, np.save
    nanoGPT         load_dataset, train_test_split, datasets.map with num_proc, a memmap written in 1,024 batches
    tiktoken        pyarrow's batches of 256 documents to a pool, whose workers return flat uint16 arrays
    ours-tiktoken   fineweb.py where gigatoken is not installed
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

WAYS = ("build-nanogpt", "nanoGPT", "tiktoken", "ours-tiktoken", "ours")


# ---------------------------------------------------------------------------------------------------------
# the ways, each in a process of its own


encoding: "tiktoken.Encoding"  # of a process in which _start has run


def _start() -> None:
    from babygpt.data.tokenizer import GPT2Tokenizer

    global encoding
    encoding = GPT2Tokenizer().encoding


def _one_document(row: dict) -> np.ndarray:
    ids = np.array([50256, *encoding.encode_ordinary(row["text"])])
    assert (ids >= 0).all()
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def _flat(texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for text in texts:
        ids.append(50256)
        ids += encoding.encode_ordinary(text)
    return np.array(ids, np.uint16)


def build_nanogpt(files: list[str], out: Path, processes: int) -> None:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
    size, filled, shard = 10**8, 0, 0
    buffer = np.empty(size, np.uint16)
    with multiprocessing.Pool(processes, _start) as pool:
        for ids in pool.imap(_one_document, rows, chunksize=16):
            fits = min(len(ids), size - filled)
            buffer[filled : filled + fits] = ids[:fits]
            filled += fits
            if fits < len(ids):
                np.save(out / f"shard_{shard:06d}.npy", buffer)
                shard, filled = shard + 1, len(ids) - fits
                buffer[:filled] = ids[fits:]
    np.save(out / f"shard_{shard:06d}.npy", buffer[:filled])


def _with_length(row: dict) -> dict:
    ids = encoding.encode_ordinary(row["text"])
    ids.append(50256)
    return {"ids": ids, "len": len(ids)}


def nanogpt(files: list[str], out: Path, processes: int) -> None:
    from datasets import load_dataset

    _start()
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"), num_proc=processes)
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    done = splits.map(_with_length, remove_columns=rows.column_names, num_proc=processes)
    for name, split in done.items():
        bin_ = np.memmap(out / f"{name}.bin", np.uint16, "w+", shape=(int(np.sum(split["len"], dtype=np.uint64)),))
        at, batches = 0, min(1024, len(split))
        for i in range(batches):
            ids = np.concatenate(split.shard(batches, i, contiguous=True).with_format("numpy")["ids"])
            bin_[at : at + len(ids)] = ids
            at += len(ids)
        bin_.flush()


def tiktoken_best(files: list[str], out: Path, processes: int) -> None:
    import pyarrow.parquet as pq

    def batches() -> Iterator[list[str]]:
        for file in files:
            for rows in pq.ParquetFile(file).iter_batches(256, columns=["text"]):
                yield rows.column(0).to_pylist()

    with multiprocessing.Pool(processes, _start) as pool, open(out / "train.bin", "wb") as file:
        for ids in pool.imap(_flat, batches()):
            file.write(ids.data)


def ours(files: list[str], out: Path, processes: int) -> None:
    import fineweb
    from babygpt.errors import run

    arguments = ["files", "--input", *files, "--out-dir", str(out / "set"), "--workers", str(processes)]
    with mock.patch.object(sys, "argv", ["fineweb.py", *arguments]):
        run(fineweb.main)


def ours_tiktoken(files: list[str], out: Path, processes: int) -> None:
    (out / "absent").mkdir()
    (out / "absent" / "gigatoken.py").write_text("raise ImportError('left out')\n")
    sys.path.insert(0, str(out / "absent"))
    os.environ["PYTHONPATH"] = str(out / "absent")  # of the workers' parent
    ours(files, out, processes)


FUNCTIONS = dict(zip(WAYS, (build_nanogpt, nanogpt, tiktoken_best, ours_tiktoken, ours), strict=True))


# ---------------------------------------------------------------------------------------------------------
# measuring


def memory_of_tree(pid: int) -> int:
    """Bytes of a process and all below it, shared pages counted in parts (PSS); Linux."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            for task in os.listdir(f"/proc/{one}/task"):
                waiting += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total


def measure(way: str, files: list[str], processes: int, watched: bool = False) -> float:
    """Seconds of one way as a command; or its peak bytes, for watching them takes time."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--way", way, "--processes", str(processes), "--into", out, *files]
        log, begin, peak = Path(out) / "log", time.perf_counter(), 0
        with open(log, "wb") as streams:
            process = subprocess.Popen(command, stdout=streams, stderr=streams)
        while watched and process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(0.1)
        if process.wait():
            sys.exit(f"error: {way} failed:\n{log.read_text()[-3000:]}")
        return peak if watched else time.perf_counter() - begin


def stages(files: list[str]) -> dict[str, float]:
    """Seconds of each stage of fineweb.py on one process that has imported all, by clocks put around its functions."""
    from babygpt.data import filters, readers, shards, workers
    from babygpt.data.plan import plan_shards
    from babygpt.data.tokenizer import load_tokenizer

    spent = dict.fromkeys(("read", "filter", "encode", "hash", "commit"), 0.0)

    def clocked(name: str, call: Callable) -> Callable:
        def clock(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - begin

        return clock

    def read(task: readers.Task) -> Iterator[readers.Batch]:
        batches = readers.read(task)
        while (batch := clocked("read", next)(batches, None)) is not None:
            yield batch

    tokenizer = load_tokenizer("gpt2")
    workers.set_up(workers.Setup(tokenizer))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(workers, "read", read),
        mock.patch.object(tokenizer, "encode_batch", clocked("encode", tokenizer.encode_batch)),
        mock.patch.object(filters.Filters, "decide", clocked("filter", filters.Filters.decide)),
        mock.patch.object(workers, "hash_texts", clocked("hash", workers.hash_texts)),
        mock.patch.object(os, "fsync", clocked("commit", os.fsync)),
    ):
        tasks, begin = [task for file in files for task in readers.split_parquet(file, ("text",))], time.perf_counter()
        stems = [f"{folder}/{i:05d}" for i in range(len(tasks))]
        for task, stem in zip(tasks, stems, strict=True):
            workers.tokenize_task(task, stem)
        tokenize_end = time.perf_counter()
        plan = plan_shards(stems, None, None, Path(folder) / "buckets")
        plan_end = time.perf_counter()
        for split, count in plan.tokens.items():
            pieces = plan.pieces(split, 0, count)
            workers.write_task(f"{folder}/{split}.bin", pieces, count, 50257, f"{folder}/{split}.json")
        end = time.perf_counter()
    assert shards.token_dtype(50257).itemsize == 2
    spent["join and write"] = tokenize_end - begin - sum(spent.values())
    return spent | {"plan": plan_end - tokenize_end, "write shards, sha256": end - plan_end}


def copied(files: list[str], copies: int, folder: Path) -> list[str]:
    """The files several times over, with the copy's number before every text so that no document is a double."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = []
    for copy in range(copies):
        for file in files:
            texts = pq.read_table(file, columns=["text"]).column(0).to_pylist()
            names.append(str(folder / f"{copy}-{Path(file).name}"))
            table = pa.table({"text": [f"Copy {copy}.\n{text}" for text in texts]})
            pq.write_table(table, names[-1], compression="zstd", row_group_size=2000)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="*", help="a folder of parquet files")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--copies", type=int, default=0, help="measure on so many copies of the folder, made different")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return FUNCTIONS[options.way](options.path, options.into, options.processes[0])
    if len(options.path) != 1 or not (files := sorted(map(str, Path(options.path[0]).glob("*.parquet")))):
        parser.error("give one folder of parquet files")

    with tempfile.TemporaryDirectory() as folder:
        compare(copied(files, options.copies, Path(folder)) if options.copies else files, options)


def compare(files: list[str], options: argparse.Namespace) -> None:
    """Measures all ways and prints the tables."""
    import pyarrow.parquet as pq

    texts = (pq.read_table(file, columns=["text"]).column(0) for file in files)
    size = sum(len(text.encode()) for column in texts for text in column.to_pylist())
    lines = [
        f"{len(files)} parquet files{f' ({options.copies} copies, made different)' if options.copies else ''}, "
        f"{size / 1e6:,.0f} MB of text; {date.today()}, {os.cpu_count()} cores, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "gigatoken", "datasets", "pyarrow")),
        "",
        "| way | processes | seconds, median (min to max) | MB of text/s | times build-nanogpt | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for processes in options.processes:
        found: dict[str, list[float]] = {way: [] for way in options.ways}
        for _ in range(options.runs):
            for way in options.ways:
                found[way].append(measure(way, files, processes))
                print(f"{way} {processes}: {found[way][-1]:.2f} s", file=sys.stderr, flush=True)
        for way, seconds in found.items():
            times = [base / own for base, own in zip(found[options.ways[0]], seconds, strict=True)]
            peak = measure(way, files, processes, watched=True)
            lines.append(
                f"| {way} | {processes} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
                f"| {size / 1e6 / statistics.median(seconds):,.1f} | {statistics.median(times):.1f} "
                f"| {peak / 2**20:,.0f} MiB |"
            )
    spent = stages(files)
    lines += ["", "Ours, one process that has imported all:", "", "| stage | seconds | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {second:.2f} | {second / sum(spent.values()):.0%} |" for name, second in spent.items()]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
