"""The tasks of the tokenize and write stages, and the pools of worker processes that run them.

    >>> with local_workers(8, Setup(load_tokenizer("gpt2"))) as pool:
    ...     pool.submit(tokenize_task, task, "data/x/parts/00000-00000").result()

The output of a task depends only on its arguments and the Setup, not on the worker that runs it.
"""

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_digest

from babygpt import files
from babygpt.data.filters import FILTERED, KEPT, Filters
from babygpt.data.plan import Piece, load_index, token_ranges
from babygpt.data.quality import QualityModel, check_tokenizer
from babygpt.data.readers import read
from babygpt.data.shards import token_dtype, write_shard
from babygpt.data.tasks import UNDECODABLE, Batch, Task
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError
from babygpt.files import write_json

SAMPLE_BYTES = 20_000  # length of the text of each task on which gigatoken and the tokenizer must agree


@dataclass(frozen=True)
class Setup:
    """The tokenizer and the filters, which all tasks share."""

    tokenizer: Tokenizer
    filters: Filters = field(default_factory=Filters)
    quality: QualityModel | None = None  # for filters.min_quality

    def __post_init__(self):
        if self.quality is not None:
            check_tokenizer(self.quality, self.tokenizer)


@dataclass(frozen=True)
class Pool:
    """Worker processes; `submit(function, *arguments)` returns a Future."""

    submit: Callable[..., Future]
    workers: int
    is_cluster: bool = False  # whether the workers run on several machines


_setup: Setup  # of this process, assigned by `set_up`


def set_up(setup: Setup) -> None:
    """Prepare this process for running tasks."""
    global _setup
    _setup = setup
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process


def tokenize_task(task: Task, stem: str) -> tuple[int, int, str | None]:
    """Encode the documents of a task into `stem.bin` (tokens) and `stem.npz` (the index), committed in this order.

    A kept document becomes EOT followed by its tokens. plan.py describes the index. Returns the number of documents,
    the number of tokens, and a message if gigatoken is not used.
    """
    tokenizer, message = _setup.tokenizer, None
    dtype, eot = token_dtype(tokenizer.vocab_size), np.array([tokenizer.eot_id], np.uint32)
    hashes, sizes = bytearray(), array("Q")
    lengths, decisions = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint8)]
    with files.create(f"{stem}.bin") as file:
        for number, batch in enumerate(read(task)):
            if number == 0:
                message = tokenizer.use_gigatoken([t for t in batch.texts if t != UNDECODABLE], SAMPLE_BYTES)
            decision, ids = filter_and_encode(batch)
            if ids:
                file.write(np.concatenate([part for document in ids for part in (eot, document)]).astype(dtype).data)
            length = np.zeros(len(batch.texts), np.uint32)
            length[decision == KEPT] = [1 + len(document) for document in ids]
            lengths.append(length)
            decisions.append(decision)
            hashes += hash_texts(batch.texts)
            sizes.extend(map(len, batch.texts))
    tokens = np.concatenate(lengths)
    with files.create(f"{stem}.npz") as file:
        np.savez(
            file, hash=np.frombuffer(hashes, ">u8").reshape(-1, 2), tokens=tokens,
            bytes=np.frombuffer(sizes, np.uint64), decision=np.concatenate(decisions),
        )  # fmt: skip
    return len(tokens), int(tokens.sum(dtype=np.int64)), message


def filter_and_encode(batch: Batch) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the decision on each document, (documents,) uint8, and the ids of each kept document, without EOT."""
    decisions = _setup.filters.decide(batch)
    kept = np.flatnonzero(decisions == KEPT)
    ids = _setup.tokenizer.encode_batch([batch.texts[i] for i in kept])
    if _setup.quality is not None:
        is_good = _setup.quality.score(ids) >= _setup.filters.min_quality
        decisions[kept[~is_good]] = FILTERED["min_quality"]
        ids = list(compress(ids, is_good))
    return decisions, ids


def hash_texts(texts: list[bytes]) -> bytes:
    """Return the xxh3-128 hashes of texts, concatenated."""
    return b"".join(map(xxh3_128_digest, texts))


def write_task(path: str, pieces: list[Piece], num_tokens: int, vocab_size: int, record_path: str) -> None:
    """Copy the tokens of `pieces` into the shard `path`, then write its document count and sha256 to `record_path`."""
    dtype, documents = token_dtype(vocab_size), 0

    def read_tokens(stem: str, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(files.read_bytes(f"{stem}.bin", start * dtype.itemsize, stop * dtype.itemsize), dtype)

    def tokens() -> Iterator[np.ndarray]:
        nonlocal documents
        for stem, in_split, start, stop in pieces:
            ranges, num_documents = token_ranges(load_index(stem, ("tokens",))["tokens"], in_split, start, stop)
            documents += num_documents
            block_start, block_stop = int(ranges[0, 0]), int(ranges[-1, 1])
            is_dense = 4 * (stop - start) > block_stop - block_start  # then one read is faster than one per range
            block = read_tokens(stem, block_start, block_stop) if is_dense else None
            for first, end in ranges.tolist():
                yield read_tokens(stem, first, end) if block is None else block[first - block_start : end - block_start]

    sha256 = write_shard(path, num_tokens, vocab_size, tokens())
    write_json(record_path, {"documents": documents, "sha256": sha256})


def preload_workers() -> None:
    """Start the server process from which workers are forked. It imports their modules in the background."""
    if _context().get_start_method() == "forkserver":
        modules = ["__main__", "babygpt.data.workers", "pyarrow.parquet", "tiktoken", "tokenizers", "gigatoken"]
        _context().set_forkserver_preload(modules)
        multiprocessing.forkserver.ensure_running()


def _context():
    """Return a multiprocessing context with a start method that is safe while this process has threads."""
    return multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")


@contextmanager
def local_workers(count: int, setup: Setup) -> Iterator[Pool]:
    """Yield a pool of `count` processes on this machine."""
    executor = ProcessPoolExecutor(count, _context(), initializer=_start_worker, initargs=(setup,))
    try:
        yield Pool(executor.submit, count)
    finally:
        try:
            executor.shutdown(cancel_futures=True)  # waits for the running tasks
        except KeyboardInterrupt:  # a second Ctrl-C; if the workers are not killed, Python may hang at exit
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _start_worker(setup: Setup) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    set_up(setup)


def _exit_with_parent() -> None:
    """Exit when the parent process exits. Otherwise, if it is killed, the worker would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def ray_workers(address: str, setup: Setup) -> Iterator[Pool]:
    """Yield a pool of one process per core of the Ray cluster at `address`; "auto" is the cluster of this machine."""
    ray = _connect(address)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        count = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
        print(f"Ray: {count} cores on {len(nodes)} machines")
        remote = ray.remote(num_cpus=1, max_retries=3)(_run_on_ray)  # retry tasks of a lost machine
        boxed_reference = [ray.put(setup)]  # in a list, Ray passes the reference instead of the value

        def submit(function: Callable, /, *arguments: Any) -> Future:
            future: Future = Future()
            ray_future = remote.remote(boxed_reference, function, *arguments).future()
            ray_future.add_done_callback(lambda ray_future: _copy_result(ray_future, future))
            return future

        yield Pool(submit, count, is_cluster=True)
    finally:
        ray.shutdown()


def _connect(address: str):
    """Connect to a Ray cluster and return the module `ray`."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray requires the package ray. Install it with `pip install ray`.") from None
    if " " in sys.executable:
        raise UserError(
            f"Ray cannot start workers from {sys.executable}, because the path contains a space. Move the virtual "
            "environment to a path without spaces."
        )
    runtime_env = {
        "working_dir": str(Path(__file__).parents[2]),
        "excludes": ["/.git", "/.venv", "/data", "/out", "/results"],
    }
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host:  # fail after 10 s, since Ray tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"There is no Ray cluster at --address {address} ({error}). Start one with `ray start --head`, and join it "
            "from other machines with `ray start --address HOST:PORT`."
        ) from None
    return ray


def _copy_result(ray_future: Future, future: Future) -> None:
    error = ray_future.exception()
    if error is None:
        future.set_result(ray_future.result())
    else:
        future.set_exception(getattr(error, "cause", None) or error)  # the exception that the task raised


_setup_id = None  # of the reference from which this process has loaded its Setup


def _run_on_ray(boxed_reference: list, function: Callable, *arguments: Any) -> Any:
    global _setup_id
    if _setup_id != boxed_reference[0].hex():
        import ray

        set_up(ray.get(boxed_reference[0]))
        _setup_id = boxed_reference[0].hex()
    return function(*arguments)
