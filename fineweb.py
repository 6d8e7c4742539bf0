#!/usr/bin/env python
"""Raw text to a data set of token shards, from the hub or from local files. A killed run goes on where it was.

    python fineweb.py                                        # FineWeb-Edu 10BT into data/fineweb-edu-10BT
    python fineweb.py fineweb2-pl --tokenizer data/pl.json   # or fineweb-10BT, wikipedia-en, stdlib, OWNER/NAME
    python fineweb.py files --input 'pages/*.jsonl.gz' --out-dir data/pages
    python fineweb.py verify data/pages

Three stages. Map: workers read, encode and index tasks that the source fixes. Plan: from the indexes alone,
drop doubles, split train from validation by document, and place every document. Write: a worker a shard.
Each task is committed by a rename, so the bytes follow from source and settings, not from the workers.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from errors import UserError, run
from plan import EMPTY, KEPT, Plan, load_index, plan, shard_ranges
from shards import MANIFEST, read_manifest, shard_name, token_dtype, verify, write_json, write_shard
from sources import Source, Task, find, read
from tokenizer import Tokenizer, load_tokenizer

BATCH = 256  # documents encoded at once
WORKER_MEMORY = 400 << 20  # bytes, a generous measure of one worker on FineWeb-sized row groups


# ---------------------------------------------------------------------------------------------------------
# map: text to tokens and an index, a task at a time


def map_task(task: Task, stem: Path) -> Path:
    """Encodes a task's documents into `stem.bin` (tokens) and `stem.npz` (the index), committed in this order.

    A document is EOT followed by its tokens. The index has a row a document: blake2b-128 of its text as
    two uint64, tokens with EOT, bytes of UTF-8, decision.
    """
    tokenizer = _worker_tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    hashes, tokens, sizes, decisions = bytearray(), array("I"), array("Q"), bytearray()
    texts = read(task)
    with open(f"{stem}.bin.tmp", "wb") as file:
        while batch := list(islice(texts, BATCH)):
            empty = [not text.strip() for text in batch]
            ids = iter(tokenizer.encode_batch([t for t, is_empty in zip(batch, empty, strict=True) if not is_empty]))
            for text, is_empty in zip(batch, empty, strict=True):
                data = text.encode("utf-8", "surrogatepass")
                document = [] if is_empty else [tokenizer.eot_id, *next(ids)]
                file.write(np.array(document, dtype))
                hashes += hashlib.blake2b(data, digest_size=16).digest()
                tokens.append(len(document))
                sizes.append(len(data))
                decisions.append(EMPTY if is_empty else KEPT)
        _sync(file)
    os.replace(f"{stem}.bin.tmp", f"{stem}.bin")
    with open(f"{stem}.npz.tmp", "wb") as file:
        np.savez(
            file,
            hash=np.frombuffer(hashes, ">u8").reshape(-1, 2),
            tokens=np.frombuffer(tokens, np.uint32),
            bytes=np.frombuffer(sizes, np.uint64),
            decision=np.frombuffer(decisions, np.uint8),
        )
        _sync(file)
    os.replace(f"{stem}.npz.tmp", f"{stem}.npz")
    return stem


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


class MapStage:
    """Runs the map tasks of a source in a pool, in source order, fetching units ahead as far as the source allows."""

    def __init__(self, source: Source, parts: Path, pool: ProcessPoolExecutor, max_tokens: int | None):
        from tqdm import tqdm

        self.source, self.parts, self.pool, self.max_tokens = source, parts, pool, max_tokens
        self.stems: list[Path] = []  # of all tasks begun, in source order
        self.running: dict[Future, int] = {}  # future -> unit
        self.tasks: dict[int, int] = {}  # unit -> its tasks
        self.left: dict[int, int] = {}  # unit that is fetched -> its tasks that are not done
        self.documents = self.tokens = self.found = 0  # `found`: tokens that an earlier run had done
        self.look_again_at = max_tokens or 0  # tokens at which max_tokens may be reached
        size = sum(unit.bytes for unit in source.units)
        self.bar = tqdm(total=size or None, unit="B", unit_scale=True, desc="map", smoothing=0.05)

    def run(self, ahead: int) -> list[Path]:
        """Does all tasks that aren't done yet, `ahead` at once; returns the stems of all, in source order."""
        for unit in range(len(self.source.units)):
            while len(self.left) >= self.source.units_at_once:
                self.reap()
            if self.enough():
                break
            for number, task in enumerate(self.fetch(unit)):
                while len(self.running) >= ahead:
                    self.reap()
                if self.enough():
                    break
                self.stems.append(self.parts / f"{unit:05d}-{number:05d}")
                if Path(f"{self.stems[-1]}.npz").exists():
                    before = self.tokens
                    self.done(unit, self.stems[-1])
                    self.found += self.tokens - before
                else:
                    self.running[self.pool.submit(map_task, task, self.stems[-1])] = unit
        while self.running:
            self.reap()
        self.bar.close()
        return self.stems

    def fetch(self, unit: int) -> list[Task | None]:
        marker = self.parts / f"{unit:05d}.json"
        if marker.exists():  # all its tasks are done: the file need not be here again
            tasks = [None] * json.loads(marker.read_text())["tasks"]
        else:
            tasks = self.source.fetch(unit, self.parts / "download")
        self.tasks[unit] = self.left[unit] = len(tasks)
        self.close_if_done(unit)  # a file may have no rows
        return tasks

    def reap(self) -> None:
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            self.done(self.running.pop(future), future.result())

    def done(self, unit: int, stem: Path) -> None:
        """Counts a finished task."""
        index = load_index(stem)
        self.documents += len(index["tokens"])
        self.tokens += int(index["tokens"].sum())
        self.left[unit] -= 1
        self.close_if_done(unit)
        self.bar.update(self.source.units[unit].bytes // self.tasks[unit])
        rate = (self.tokens - self.found) / max(self.bar.format_dict["elapsed"], 1e-3)
        self.bar.set_postfix_str(f"{self.documents:,} documents, {self.tokens:,} tokens, {rate:,.0f} tokens/s")

    def close_if_done(self, unit: int) -> None:
        if self.left[unit] == 0:
            write_json(self.parts / f"{unit:05d}.json", {"tasks": self.tasks[unit]})
            self.source.release(unit, self.parts / "download")
            del self.left[unit]

    def enough(self) -> bool:
        """Whether the finished tasks before the first unfinished one hold max_tokens without their doubles."""
        if self.max_tokens is None or self.tokens < self.look_again_at:
            return False
        done = list(takewhile(lambda stem: Path(f"{stem}.npz").exists(), self.stems))
        kept = plan(done, 0, None).tokens["train"] if done else 0
        self.look_again_at = self.tokens + self.max_tokens - kept
        return kept >= self.max_tokens


# ---------------------------------------------------------------------------------------------------------
# write: a task a shard


def write_task(
    path: Path, sources: list[tuple[Path, int, int]], num_tokens: int, vocab_size: int, record: Path
) -> None:
    """Copies ranges of parts into one shard; `record`, written last, keeps its sha256 for the manifest."""
    dtype = token_dtype(vocab_size)
    pieces = (np.fromfile(f"{stem}.bin", dtype, b - a, offset=a * dtype.itemsize) for stem, a, b in sources)
    write_json(record, {"sha256": write_shard(path, num_tokens, vocab_size, pieces)})


def write_shards(placed: Plan, stems: list[Path], folder: Path, pool, shard_tokens: int, vocab_size: int) -> list[dict]:
    """Writes all shards that aren't there yet; returns their rows of the manifest."""
    from tqdm import tqdm

    rows, futures, number = [], [], 0
    for split in ("val", "train"):
        number = max(number, 1) if split == "train" else 0  # llm.c's numbers: training begins at 1
        for begin in range(0, placed.tokens[split], shard_tokens):
            end = min(begin + shard_tokens, placed.tokens[split])
            name = shard_name(_name(folder), split, number)
            record = folder / "parts" / f"{name}.json"
            documents = np.searchsorted(placed.starts[split], [begin, end])
            rows.append({"file": name, "tokens": end - begin, "documents": int(documents[1] - documents[0])})
            if not (record.exists() and (folder / name).exists()):
                ranges = [(stems[part], a, b) for part, a, b in shard_ranges(placed.runs[split], begin, end)]
                futures.append(pool.submit(write_task, folder / name, ranges, end - begin, vocab_size, record))
            number += 1
    for future in tqdm(futures, desc="write", unit="shard"):
        future.result()
    for row in rows:
        row["sha256"] = json.loads((folder / "parts" / f"{row['file']}.json").read_text())["sha256"]
    return rows


# ---------------------------------------------------------------------------------------------------------
# the three together


def prepare(source: Source, tokenizer: Tokenizer, folder: Path, settings: dict, workers: int | None) -> dict:
    """Runs map, plan and write, going on where an earlier run of the same settings stopped; returns the manifest."""
    parts = folder / "parts"
    manifest = read_manifest(folder)
    if manifest is not None:
        if not source.downloads:  # what is here can be looked at again, the hub need not be asked
            source.open()
            settings = settings | {"revision": source.revision}
        _same_settings(manifest["settings"], settings, folder, "holds a finished data set made")
        shutil.rmtree(parts, ignore_errors=True)  # all that can be left of a run killed in its last breath
        print(f"{folder} is complete already.")
        return manifest
    begun = parts / "settings.json"
    if begun.exists():
        earlier = json.loads(begun.read_text())
        _same_settings(earlier, settings, folder, "holds a half-finished preparation begun")
        source.open(earlier["revision"])
        _same_settings(
            earlier, settings | {"revision": source.revision}, folder, "was begun when the source was another:"
        )
    else:
        if any(folder.glob("*.bin")):
            raise UserError(f"{folder} holds shards but no {MANIFEST}. Move them away or give another --out-dir.")
        source.open()
    if not source.units:
        raise UserError(f"the source {source.name} has no files.")
    workers = _check_room(source, settings, folder, workers, tokenizer.vocab_size)
    _only_one(parts)
    (parts / "download").mkdir(exist_ok=True)
    for stale in (parts / "download").rglob("*.incomplete"):  # of a killed download; it can't be gone on with
        stale.unlink()
    write_json(begun, settings | {"revision": source.revision})

    with _workers(workers, tokenizer) as pool:
        max_tokens = settings["max_tokens"]
        stems = MapStage(source, parts, pool, max_tokens).run(ahead=2 * workers if max_tokens else 4096)
        placed = plan(stems, settings["val_tokens"], max_tokens) if stems else None
        if placed is None or placed.documents["kept"] == 0:
            raise UserError(f"the source {source.name} has no text in its {len(source.units):,} files or batches.")
        wanted = settings["val_tokens"]
        if wanted and placed.tokens["val"] > 2 * wanted:
            print(f"warning: {placed.tokens['val']:,} tokens validate, as documents stay whole and some are large.")
        print("plan: " + ", ".join(f"{count:,} {what}" for what, count in placed.documents.items()))
        shards = write_shards(placed, stems, folder, pool, settings["shard_tokens"], tokenizer.vocab_size)

    beside = folder / _tokenizer_file(tokenizer)
    if not (beside.exists() and beside.samefile(tokenizer.file)):
        shutil.copyfile(tokenizer.file, beside)
    manifest = {
        "format": 1,
        "name": _name(folder),
        "settings": settings | {"revision": source.revision},
        "tokenizer": {"name": tokenizer.name, "file": _tokenizer_file(tokenizer), "sha256": tokenizer.sha256},
        "eot_id": tokenizer.eot_id,
        "vocab_size": tokenizer.vocab_size,
        "split_rule": "by document: the smallest blake2b-128 hashes of the text validate",
        "counts": {"documents": placed.documents, "tokens": placed.tokens, "text_bytes": placed.bytes},
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(parts)
    return manifest


def _only_one(parts: Path) -> None:
    """A lock that this process holds until it ends; UserError where another one prepares the same folder."""
    global _lock
    try:
        parts.mkdir(parents=True, exist_ok=True)
        _lock = open(parts / "lock", "w")  # noqa: SIM115, open as long as the process
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another fineweb.py prepares {parts.parent} right now. Let it end, or end it.") from None
    except OSError as error:
        raise UserError(f"can't write to {parts.parent}: {error}. Give another --out-dir.") from None


@contextmanager
def _workers(count: int, tokenizer: Tokenizer) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, started afresh (spawn) on every system; a killed one becomes a UserError."""
    spec = "gpt2" if tokenizer.name == "gpt2" else tokenizer.file
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(spec,))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely because the memory ran out. What is done is kept: give the same "
            f"command with fewer --workers than {count}."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("the disk is full. What is done is kept: make room and give the same command.") from None
    except KeyboardInterrupt:
        print("\nstopped: what is done is kept, and the same command goes on from there.", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer_spec: str | Path) -> None:
    global _worker_tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _worker_tokenizer = load_tokenizer(tokenizer_spec)


def _end_with_parent() -> None:
    """A killed parent can't end its workers, and they would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name


def _tokenizer_file(tokenizer: Tokenizer) -> str:
    return tokenizer.file.name if tokenizer.name == "gpt2" else "tokenizer.json"


def _same_settings(earlier: dict, now: dict, folder: Path, what: str) -> None:
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        raise UserError(
            f"{folder} {what} with other settings:\n"
            + "".join(f"  {key}: {earlier.get(key)!r} there, {now[key]!r} now\n" for key in differing)
            + f"Give the same settings to go on, another --out-dir, or delete {folder} to begin anew."
        )


def _check_room(source: Source, settings: dict, folder: Path, workers: int | None, vocab_size: int) -> int:
    """Tells the disk and memory needed, refuses what can't fit, and returns the number of workers: as many as
    asked for, else one a core as far as the memory reaches."""
    source_bytes = sum(unit.bytes for unit in source.units)
    tokens = int(source_bytes * source.tokens_per_byte)
    tokens = min(tokens, settings["max_tokens"] or tokens)
    largest = max(unit.bytes for unit in source.units) if source.downloads else 0
    disk = 2 * token_dtype(vocab_size).itemsize * tokens + source.units_at_once * largest
    plan_memory = tokens // 1000 * 150  # FineWeb's documents have 1,000 tokens; 150 bytes each were measured
    available = _available_memory()
    if workers is None:
        most = (available - plan_memory) // WORKER_MEMORY if available is not None else _cores()
        workers = max(1, min(_cores(), most))
    memory = plan_memory + workers * WORKER_MEMORY
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    written = sum(path.stat().st_size for path in folder.rglob("*.bin"))  # by a run that was stopped
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


def verify_command(arguments: list[str]) -> None:
    from tqdm import tqdm

    if len(arguments) != 1:
        raise UserError("give one folder: python fineweb.py verify data/NAME")
    folder = Path(arguments[0])
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        totals = verify(folder, bar.update)
    print(f"{folder} is sound: " + ", ".join(f"{count:,} {what}" for what, count in totals.items()))


def main() -> None:
    import tyro

    if sys.argv[1:2] == ["verify"]:
        return verify_command(sys.argv[2:])

    def command(
        source: tyro.conf.Positional[str] = "fineweb-edu-10BT",
        /,
        *,
        input: tuple[str, ...] = (),
        out_dir: Path | None = None,
        tokenizer: str = "gpt2",
        val_tokens: int | None = None,
        shard_tokens: int = 100_000_000,
        max_tokens: int | None = None,
        workers: int | None = None,
        text_column: str = "text",
        config: str | None = None,
        split: str = "train",
    ) -> None:
        """Prepares a data set of token shards. `verify FOLDER` checks one.

        Args:
            source: fineweb-edu-10BT, fineweb-edu-100BT, fineweb-10BT, fineweb2-pl (any language), wikipedia-en,
                stdlib (this Python's source code), files (with --input), or OWNER/NAME of a hub data set.
            input: Files, folders or patterns, for the source `files`: parquet, jsonl, txt; .gz .xz .zst too.
            out_dir: Where the data set goes [data/SOURCE].
            tokenizer: "gpt2" or the path of a tokenizer.json.
            val_tokens: Validation tokens, in whole documents [11 M, or 5 % if that is less].
            shard_tokens: Tokens a shard.
            max_tokens: Keep documents in source order up to the one that reaches it.
            workers: Processes [one a core, as memory allows]. The bytes written don't depend on it.
            text_column: The column or key that holds a document's text.
            config: Configuration of a hub data set given as OWNER/NAME.
            split: Split of a hub data set given as OWNER/NAME.
        """
        for name, value, low in (("val", val_tokens, 0), ("shard", shard_tokens, 1), ("max", max_tokens, 1)):
            if value is not None and not low <= value < 2**31 and not (name == "max" and value >= low):
                raise UserError(f"--{name}-tokens {value} is out of range: {low} to {2**31 - 1:,}.")
        if workers is not None and workers < 1:
            raise UserError(f"--workers {workers}: give at least 1.")
        found = find(source, input, text_column, config, split)
        folder = out_dir or Path("data") / source.split("/")[-1]
        encoder = load_tokenizer(tokenizer)
        settings = {
            "source": source, "config": config, "split": split, "text_column": text_column,
            "tokenizer_sha256": encoder.sha256, "val_tokens": val_tokens, "shard_tokens": shard_tokens,
            "max_tokens": max_tokens,
        }  # fmt: skip
        manifest = prepare(found, encoder, folder, settings, workers)
        counts = manifest["counts"]
        print(
            f"{folder}: {counts['documents']['kept']:,} documents, {counts['tokens']['train']:,} tokens to train on "
            f"and {counts['tokens']['val']:,} to validate, in {len(manifest['shards'])} shards.\n"
            f"next: python train.py --data.dataset {folder}"
        )
        if counts["documents"]["kept"] == 1:
            print(
                "note: this is a single document (a .txt file is one), and documents are never split, so nothing is "
                "left to validate on: give several files, or train with --general.mode train."
            )

    tyro.cli(command, prog="fineweb.py", description=__doc__)


if __name__ == "__main__":
    run(main)
