"""The order of the data: chunks that begin at documents, a seeded shuffle, streams, rows, and their prefetch.

N training tokens, T = block_size, S = num_streams, R = rows a step (batch_tokens / T), W ranks.

1. Chunks. Every `chunk_tokens` a cursor stands in the data; the EOT nearest to it begins a chunk.

       data   |E..E...E|E....E.|E...E..E..|E....|        E = end of text, | = cut, always at an E
2. Shuffle. The chunks, sorted by a hash of (seed, epoch, chunk), are laid end to end: the line.

       line   |E...E..E..|E..E...E|E....|E....E.|
3. Streams. The line is cut into S equal pieces of K rows of T tokens.

       line   |----stream 0----|----stream 1----|----stream 2----| rest, unread in this epoch
4. Rows. Row n of the epoch is row n // S of stream n mod S: T tokens and, moved by one, their T targets.
   A step takes the next R rows, and rank r those with n mod W = r.

So an epoch visits every token once but for the last (R + S) T at the most, and which rows a step has follows
from the data, the seed and (T, S, chunk_tokens) alone: not from ranks, micro-batch, or where a run resumed.
The place in the data is (epoch, n), nothing else. `python -m tools.inspect_step` prints what a step of a run read.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from babygpt.data.shards import Tokens
from babygpt.errors import ConfigError
from babygpt.nn.cross_entropy import IGNORED

WINDOW = 20_000  # tokens on both sides of a cursor in which its EOT is sought at the least
VAL_TOKENS = 20 * 524_288  # what a validation reads, as build-nanogpt's 20 steps of 524,288


# ---------------------------------------------------------------------------------------------------------
# the plan of an epoch: pure functions of data, seed and settings


def default_chunk_tokens(num_tokens: int, num_streams: int, block_size: int) -> int:
    """About 16 chunks a stream, 1 M tokens at the most."""
    return min(1_000_000, max(block_size, num_tokens // (16 * num_streams)))


def chunk_cuts(tokens: Tokens, eot_id: int, chunk_tokens: int) -> tuple[np.ndarray, int]:
    """Where chunks begin, ascending from 0, (chunks,) int64, and how many cursors found no EOT to cut at.

    The EOT nearest to each cursor cuts, of two the earlier. The window of the search doubles while it holds
    none, up to max(WINDOW, chunk_tokens) on both sides; then the cursor itself cuts. No more is read.
    """
    widest = max(WINDOW, chunk_tokens)
    cuts, forced = [0], 0
    for cursor in range(chunk_tokens, len(tokens), chunk_tokens):
        width = 1000  # about a document of the web, so that most cursors need a read or two
        while True:
            start, stop = max(0, cursor - width), min(len(tokens), cursor + width + 1)
            found = start + np.flatnonzero(_window(tokens, start, stop) == eot_id)
            if len(found):
                cuts.append(int(found[np.argmin(np.abs(found - cursor))]))  # argmin takes the earlier of two
                break
            if width == widest:
                cuts.append(cursor)
                forced += 1
                break
            width = min(2 * width, widest)
    return np.unique(np.array(cuts, np.int64)), forced


def _window(tokens: Tokens, start: int, stop: int) -> np.ndarray:
    """Tokens start ... stop - 1 as they are stored, (stop - start,), without their surroundings.

    Of a memory map the system fetches up to megabytes around each place, which for windows all over the data is
    all of it. The file gives what is asked for.
    """
    parts = []
    for number, first, end in shard_ranges(tokens, start, stop):
        shard = tokens.shards[number]
        if isinstance(shard, np.memmap):
            offset = shard.offset + first * shard.itemsize
            parts.append(np.fromfile(str(shard.filename), shard.dtype, end - first, offset=offset))
        else:
            parts.append(shard[first:end])
    return np.concatenate(parts)


def shard_ranges(tokens: Tokens, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where tokens start ... stop - 1 lie: the number of a shard, and from where to where in it."""
    number = int(np.searchsorted(tokens.starts, start, side="right")) - 1
    while start < stop:
        base, end = int(tokens.starts[number]), min(stop, int(tokens.starts[number + 1]))
        yield number, start - base, end - base
        start, number = end, number + 1


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """0 ... count - 1 in an order that follows from seed and epoch, on any machine and version; (count,) int64."""
    keys = [hashlib.blake2b(f"{seed} {epoch} {i}".encode(), digest_size=16).digest() for i in range(count)]
    return np.array(sorted(range(count), key=keys.__getitem__), np.int64)


@dataclass(frozen=True)
class Epoch:
    """One epoch's line, streams and rows.

    `chunks` (n, 2) int64 are the data's token ranges in the line's order; `at` (n + 1,) int64 where each
    begins in the line. `rows_per_stream` is K.
    """

    chunks: np.ndarray
    at: np.ndarray
    block_size: int
    num_streams: int

    @property
    def rows_per_stream(self) -> int:
        return max(0, int(self.at[-1]) - 1) // (self.num_streams * self.block_size)

    @property
    def num_rows(self) -> int:
        return self.rows_per_stream * self.num_streams

    def begin(self, n: int | np.ndarray) -> int | np.ndarray:
        """Where in the line row n begins, or each of several rows, (rows,) int64."""
        return (n % self.num_streams * self.rows_per_stream + n // self.num_streams) * self.block_size

    def row(self, n: int) -> list[tuple[int, int]]:
        """The data's token ranges [start, stop) that make row n: T + 1 tokens together, in order.

        Everything that asks which tokens a step has asks here: loader, validation, resume and tests. `read_rows` has
        a shorter way to most rows, which a test holds equal to this.
        """
        if not 0 <= n < self.num_rows:
            raise IndexError(f"row {n} of {self.num_rows}")
        begin = int(self.begin(n))
        end = begin + self.block_size + 1
        ranges: list[tuple[int, int]] = []
        chunk = int(np.searchsorted(self.at, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(self.at[chunk + 1]))
            start = int(self.chunks[chunk, 0]) + begin - int(self.at[chunk])
            ranges.append((start, start + stop - begin))
            begin, chunk = stop, chunk + 1
        return ranges


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: the next row is row n of the epoch."""

    epoch: int = 0
    n: int = 0


class Order:
    """Which rows each step has: the epochs of a split, one after the other.

    `shuffle=False` gives the split front to back (validation: one stream, one chunk).
    """

    def __init__(
        self, tokens: Tokens, eot_id: int, block_size: int, num_streams: int, seed: int,
        chunk_tokens: int | None = None, shuffle: bool = True,
    ):  # fmt: skip
        self.tokens, self.block_size, self.num_streams, self.seed, self.shuffle = (
            tokens, block_size, num_streams, seed, shuffle,
        )  # fmt: skip
        self.chunk_tokens = chunk_tokens or default_chunk_tokens(len(tokens), num_streams, block_size)
        if shuffle:
            self.cuts, self.forced_cuts = chunk_cuts(tokens, eot_id, self.chunk_tokens)
        else:
            self.cuts, self.forced_cuts = np.zeros(1, np.int64), 0
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # a step's last row and the next epoch's first

    def _epoch(self, epoch: int) -> Epoch:
        chunks = np.stack([self.cuts, np.append(self.cuts[1:], len(self.tokens))], axis=1)
        if self.shuffle:
            chunks = chunks[shuffled(len(chunks), self.seed, epoch)]
        at = np.concatenate([[0], np.cumsum(chunks[:, 1] - chunks[:, 0])])
        return Epoch(chunks, at, self.block_size, self.num_streams)

    @property
    def rows_per_epoch(self) -> int:
        return self.epoch(0).num_rows  # K depends on the number of tokens alone

    def check(self, rows_per_step: int) -> None:
        """ConfigError where an epoch has no step, or a step has more rows than the data."""
        if self.rows_per_epoch < rows_per_step:
            raise ConfigError(
                f"an epoch has no step: {len(self.tokens):,} training tokens give {self.rows_per_epoch:,} rows of "
                f"{self.block_size:,} in {self.num_streams} streams, and a step takes {rows_per_step:,}. Give more "
                "data, or a smaller --training.batch-tokens, --data.num-streams or --model.block-size."
            )

    def summary(self, batch_tokens: int, max_steps: int) -> str:
        """Summarize chunks, steps per epoch, and epochs of a run of `max_steps`."""
        steps = self.rows_per_epoch // (batch_tokens // self.block_size)
        unread = len(self.tokens) - steps * batch_tokens
        lines = [
            f"{batch_tokens:,} tokens per step; {len(self.tokens):,} tokens in {len(self.cuts):,} chunks of about "
            f"{self.chunk_tokens:,}",
            f"{steps:,} steps per epoch ({unread:,} tokens of each are not read), {max_steps / steps:.2f} epochs in "
            f"{max_steps:,} steps",
        ]
        if self.forced_cuts:
            lines.append(f"{self.forced_cuts:,} chunks begin inside a document: no end of text was near")
        return "\n".join(lines)

    def step_start(self, position: Position, rows_per_step: int) -> Position:
        """Where the step that comes at `position` really begins: no step straddles the end of an epoch."""
        if position.n + rows_per_step > self.rows_per_epoch:
            return Position(position.epoch + 1, 0)
        return position

    def read_row(self, epoch: int, n: int, out: np.ndarray) -> None:
        """Tokens of a row into `out`, (T + 1,) int64."""
        filled = 0
        for start, stop in self.epoch(epoch).row(n):
            self.tokens.read(start, stop, out[filled : filled + stop - start])
            filled += stop - start

    def read_rows(self, epoch: int, rows: Sequence[int], out: np.ndarray) -> None:
        """Tokens of several rows into `out`, (rows, T + 1) int64: what `read_row` reads, several times as fast.

        Nearly all rows lie in one chunk and one shard, and are one copy each. Which these are, and where, is found
        for all rows at once; the others go to `read_row`, and so do rows outside of the epoch, which it refuses.
        """
        plan, starts, size = self.epoch(epoch), self.tokens.starts, self.block_size + 1
        n = np.clip(np.array(rows, np.int64), 0, plan.num_rows - 1)
        begin = plan.begin(n)
        chunk = np.searchsorted(plan.at, begin, side="right") - 1
        start = plan.chunks[chunk, 0] + begin - plan.at[chunk]
        shard = np.searchsorted(starts, start, side="right") - 1
        in_one = (n == rows) & (begin + size <= plan.at[chunk + 1]) & (start + size <= starts[shard + 1])
        places = (in_one.tolist(), shard.tolist(), (start - starts[shard]).tolist())
        for row, one, whole, number, offset in zip(rows, out, *places, strict=True):
            if whole:
                one[:] = np.asarray(self.tokens.shards[number])[offset : offset + size]  # a memmap slices slowly
            else:
                self.read_row(epoch, row, one)


# ---------------------------------------------------------------------------------------------------------
# loading: what one rank reads


@dataclass
class Batch:
    """One optimizer step's data on one rank.

    `micro_batches` are int64 tensors, (micro_batch_size, T + 1) each, pinned where the device is CUDA.
    `num_targets` counts the targets of the whole step, over all ranks. `end` is the position after it.
    """

    start: Position
    end: Position
    micro_batches: list[torch.Tensor]
    num_targets: int


class DataLoader:
    """Yields the steps of one rank from `position` on, without end, read ahead by a background thread."""

    def __init__(
        self, order: Order, position: Position, rows_per_step: int, micro_batch_size: int,
        rank: int = 0, world_size: int = 1, device: torch.device | None = None,
    ):  # fmt: skip
        """`device` is the one that the rows go to: for CUDA, they are read into pinned memory."""
        order.check(rows_per_step)
        self.order, self.rows_per_step, self.micro_batch_size = order, rows_per_step, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.cuda_device = device if device is not None and device.type == "cuda" else None
        self.steps: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._read_ahead, args=(position,), daemon=True, name="dataloader")
        self.thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self.steps.get()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        """Ends the background thread."""
        self.stopped.set()
        while self.thread.is_alive():
            with suppress(queue.Empty):
                self.steps.get(timeout=0.01)  # make room, so that a waiting put returns

    def _read_ahead(self, position: Position) -> None:
        try:
            if self.cuda_device is not None:  # a new thread starts on device 0, and would pin memory through that one
                torch.cuda.set_device(self.cuda_device)
            while not self.stopped.is_set():
                step = self._read_step(self.order.step_start(position, self.rows_per_step))
                position = step.end
                self.steps.put(step)
        except BaseException as error:  # handed to the training thread, which raises it
            self.steps.put(error)

    def _read_step(self, start: Position) -> Batch:
        rows = [n for n in range(start.n, start.n + self.rows_per_step) if n % self.world_size == self.rank]
        micro_batches = []
        for i in range(0, len(rows), self.micro_batch_size):
            batch = torch.empty(
                (self.micro_batch_size, self.order.block_size + 1), dtype=torch.int64,
                pin_memory=self.cuda_device is not None,
            )  # fmt: skip
            self.order.read_rows(start.epoch, rows[i : i + self.micro_batch_size], batch.numpy())
            micro_batches.append(batch)
        end = Position(start.epoch, start.n + self.rows_per_step)
        return Batch(start, end, micro_batches, num_targets=self.rows_per_step * self.order.block_size)


def inputs_and_targets(batch: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits rows (B, T + 1) into inputs and targets, (B, T) each, on the device."""
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]


def validation_batches(
    tokens: Tokens, block_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1, pin: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the same rows in the same order every time: inputs and targets, (B, T) int64 each, of one rank.

    The rows cover the first VAL_TOKENS of the split. All batches are full, the last one with rows whose targets are
    IGNORED. With `pin`, they are in pinned memory.
    """
    if len(tokens) <= block_size:
        raise ConfigError(
            f"The data set has {len(tokens):,} validation tokens, fewer than one row of block_size {block_size:,}. "
            "Prepare it with more --val-tokens."
        )
    order = Order(tokens, eot_id=-1, block_size=block_size, num_streams=1, seed=0, shuffle=False)
    rows = [n for n in range(validation_rows(tokens, block_size)) if n % world_size == rank]
    for i in range(0, len(rows), micro_batch_size):
        idx = torch.zeros((micro_batch_size, block_size), dtype=torch.int64, pin_memory=pin)
        targets = torch.full((micro_batch_size, block_size), IGNORED, dtype=torch.int64, pin_memory=pin)
        count = len(rows[i : i + micro_batch_size])
        batch = torch.empty((count, block_size + 1), dtype=torch.int64)
        order.read_rows(0, rows[i : i + count], batch.numpy())
        idx[:count], targets[:count] = batch[:, :-1], batch[:, 1:]
        yield idx, targets


def validation_rows(tokens: Tokens, block_size: int) -> int:
    """How many rows a validation reads over all ranks."""
    return min(VAL_TOKENS // block_size, max(0, len(tokens) - 1) // block_size)
