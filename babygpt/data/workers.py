"""The work on a task, and the processes that do it.

    >>> with local_workers(8, Setup(load_tokenizer("gpt2"))) as (pool, count):
    ...     pool.submit(map_task, task, "data/x/parts/00000-00000").result()

A worker is told everything by its task and the Setup: it shares nothing with the others, so what it writes does
not depend on which of them did it.
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
import uuid
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from xxhash import xxh3_128_digest

from babygpt import files
from babygpt.data.filters import FILTERED, KEPT, Filters
from babygpt.data.plan import load_index, runs
from babygpt.data.quality import QualityModel
from babygpt.data.readers import Task, read
from babygpt.data.shards import token_dtype, write_shard
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError
from babygpt.files import write_json

SAMPLE_BYTES = 20_000  # of each task's text that gigatoken must encode as the tokenizer itself


@dataclass(frozen=True)
class Setup:
    """What all tasks of a preparation have in common."""

    tokenizer: Tokenizer
    filters: Filters = field(default_factory=Filters)
    quality: QualityModel | None = None  # with filters.min_quality


class Pool(Protocol):
    """Runs tasks: a pool of local processes, or a Ray cluster."""

    def submit(self, function: Callable, /, *arguments: Any) -> Future: ...


_setup: Setup  # of this process, once `set_up` was called


# ---------------------------------------------------------------------------------------------------------
# map: text to tokens and an index


def map_task(task: Task, stem: str) -> tuple[int, int, str | None]:
    """Encodes a task's documents into `stem.bin` (tokens) and `stem.npz` (the index), committed in this order;
    returns how many documents and tokens, and why it was not done by gigatoken.

    A document that is kept is EOT followed by its tokens. The index has a row a document: xxh3-128 of its text
    as two uint64, tokens with EOT, bytes of UTF-8, decision.
    """
    tokenizer, filters = _setup.tokenizer, _setup.filters
    dtype, eot = token_dtype(tokenizer.vocab_size), np.array([tokenizer.eot_id], np.uint32)
    hashes, sizes, message = bytearray(), array("Q"), None
    lengths, decisions = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint8)]
    with files.create(f"{stem}.bin") as file:
        for number, batch in enumerate(read(task)):
            if number == 0:
                message = tokenizer.use_gigatoken(batch.texts, SAMPLE_BYTES)
            decision = filters.judge(batch)
            kept = np.flatnonzero(decision == KEPT)
            ids = tokenizer.encode_batch([batch.texts[i] for i in kept])
            if _setup.quality is not None:
                good = _setup.quality.score(ids) >= filters.min_quality
                decision[kept[~good]] = FILTERED["min_quality"]
                kept, ids = kept[good], list(compress(ids, good))
            if ids:
                file.write(np.concatenate([part for document in ids for part in (eot, document)]).astype(dtype).data)
            length = np.zeros(len(batch.texts), np.uint32)
            length[kept] = [1 + len(document) for document in ids]
            lengths.append(length)
            decisions.append(decision)
            hashes += fingerprint(batch.texts)
            sizes.extend(map(len, batch.texts))
    tokens = np.concatenate(lengths)
    with files.create(f"{stem}.npz") as file:
        np.savez(
            file,
            hash=np.frombuffer(hashes, ">u8").reshape(-1, 2),
            tokens=tokens,
            bytes=np.frombuffer(sizes, np.uint64),
            decision=np.concatenate(decisions),
        )
    return len(tokens), int(tokens.sum(dtype=np.int64)), message


def fingerprint(texts: list[bytes]) -> bytes:
    """xxh3-128 of each text, one behind the other."""
    return b"".join(map(xxh3_128_digest, texts))


# ---------------------------------------------------------------------------------------------------------
# write: ranges of tokens to a shard


def write_task(
    path: str, pieces: list[tuple[str, np.ndarray, int, int]], num_tokens: int, vocab_size: int, record: str
) -> None:
    """Copies the parts' tokens that a Plan names into one shard; `record`, written last, keeps what the manifest says
    of it."""
    dtype = token_dtype(vocab_size)
    documents = 0

    def tokens() -> Iterator[np.ndarray]:
        nonlocal documents
        for stem, mine, first, last in pieces:
            ranges, begun = runs(load_index(stem, ("tokens",))["tokens"], mine, first, last)
            documents += begun
            a, b = int(ranges[0, 0]), int(ranges[-1, 1])
            together = 4 * (last - first) > b - a  # close enough for one reading
            whole = _read_tokens(stem, dtype, a, b) if together else None
            for begin, end in ranges.tolist():
                yield _read_tokens(stem, dtype, begin, end) if whole is None else whole[begin - a : end - a]

    sha256 = write_shard(path, num_tokens, vocab_size, tokens())
    write_json(record, {"documents": documents, "sha256": sha256})


def _read_tokens(stem: str, dtype: np.dtype, begin: int, end: int) -> np.ndarray:
    data = files.read_bytes(f"{stem}.bin", begin * dtype.itemsize, end * dtype.itemsize)
    return np.frombuffer(data, dtype)


# ---------------------------------------------------------------------------------------------------------
# the processes


def warm_up() -> None:
    """Starts, in the background, the process that workers will be forked from, and has it import what they need."""
    if _context().get_start_method() == "forkserver":
        _context().set_forkserver_preload(
            ["__main__", "babygpt.data.workers", "pyarrow.parquet", "tiktoken", "tokenizers", "gigatoken"]
        )
        multiprocessing.forkserver.ensure_running()


def _context():
    """Fresh processes: no thread of this one lives on in them. Forked from a server where the system stands it."""
    return multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")


@contextmanager
def local_workers(count: int, setup: Setup) -> Iterator[tuple[ProcessPoolExecutor, int]]:
    """A pool of `count` processes of this machine, and their number."""
    pool = ProcessPoolExecutor(count, _context(), initializer=_start_worker, initargs=(setup,))
    try:
        yield pool, count
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(setup: Setup) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    set_up(setup)


def set_up(setup: Setup) -> None:
    """Makes this process ready for tasks."""
    global _setup
    _setup = setup


def _end_with_parent() -> None:
    """A killed parent can't end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


# ---------------------------------------------------------------------------------------------------------
# the processes of a Ray cluster


class RayPool:
    """Tasks on a Ray cluster, by the method of a pool of processes. A task that a dead machine had is done again."""

    def __init__(self, ray, setup: Setup):
        self.ray, self.key, self.setup = ray, uuid.uuid4().hex, [ray.put(setup)]  # in a list it is fetched when needed
        self.remote = ray.remote(num_cpus=1, max_retries=3)(_on_ray)

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        done: Future = Future()

        def finish(of_ray: Future) -> None:
            error = of_ray.exception()
            if error is None:
                done.set_result(of_ray.result())
            else:
                done.set_exception(getattr(error, "cause", None) or error)  # as it was raised, without Ray's frames

        self.remote.remote(self.key, self.setup, function, *arguments).future().add_done_callback(finish)
        return done


@contextmanager
def ray_workers(address: str, setup: Setup) -> Iterator[tuple[RayPool, int]]:
    """A pool on the Ray cluster at `address` ("auto": the one of this machine), and how many tasks it does at once."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install ray") from None
    if " " in sys.executable:
        raise UserError(f"Ray can't start workers from a path with a space: {sys.executable}. Move the environment.")
    code = {"working_dir": str(Path(__file__).parents[2]), "excludes": ["/.git", "/.venv", "/data", "/out", "/results"]}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env=code, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"there is no Ray cluster at --address {address} ({error}). Start one: ray start --head, and on the other "
            "machines ray start --address HOST:PORT."
        ) from None
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        count = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
        print(f"Ray: {count} cores of {len(nodes)} machines")
        yield RayPool(ray, setup), count
    finally:
        ray.shutdown()


_ready_for = None  # key of the pool whose Setup this process has


def _on_ray(key: str, setup: list, function: Callable, *arguments):
    global _ready_for
    if _ready_for != key:
        import ray

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        set_up(ray.get(setup[0]))
        _ready_for = key
    return function(*arguments)
