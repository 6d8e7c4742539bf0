"""The order of the data: chunks of whole documents, a seeded shuffle, streams, rows, and prefetch.

N training tokens, T = block_size, S = num_streams, R = rows per step (batch_tokens / T), W ranks. For each epoch:

1. Chunks. A cursor is placed at every multiple of `chunk_tokens`. The EOT nearest to it starts the next chunk.

       data      |E..E...E|E....E.|E...E..E..|E....|        E = end of text, | = start of a chunk, always at an E
2. Shuffle. The chunks are sorted by a hash of (seed, epoch, chunk) and concatenated.

       shuffled  |E...E..E..|E..E...E|E....|E....E.|
3. Streams. The shuffled data is divided into S equal pieces of K rows of T tokens.

       shuffled  |----stream 0----|----stream 1----|----stream 2----| remainder, not read in this epoch
4. Rows. The streams are put into a seeded order, because neighbors often contain parts of the same long document. Row n
   of the epoch is row n // S of the stream at position n mod S of this order: T tokens and their T targets, shifted by
   one token. A step takes the next R rows, and rank r reads those with n mod W = r.

An epoch reads every token once, except for fewer than (R + S) T at its end. The rows of a step depend on the data, the
seed and (T, S, chunk_tokens, version of the order), but not on the number of ranks, the micro-batch size, or where a
run was resumed. The position in the data is (epoch, n). `python -m tools.inspect_step` prints the documents that a step
of a run reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from babygpt.console import counted
from babygpt.data.shards import Tokens
from babygpt.errors import ConfigError
from babygpt.nn.cross_entropy import IGNORE_INDEX
from babygpt.training.prefetch import Prefetcher
from babygpt.training.seeds import permutation

WINDOW = 20_000  # tokens on both sides of a cursor that are searched for an EOT, even if chunks are shorter
MAX_EPOCHS = 10  # a run with more epochs prints a warning
VAL_TOKENS = 20 * 524_288  # read by each validation, as in build-nanogpt: 20 steps of 524,288


# ---------------------------------------------------------------------------------------------------------
# the plan of an epoch: pure functions of data, seed and settings


def default_num_streams(num_tokens: int, block_size: int) -> int:
    """Return the largest power of two that leaves each stream at least 32 rows, at most 4,096.

    The rows of a stream follow each other in the data, so with more streams, a short run reads more documents. With 64
    streams, a run of 1,000 steps ended 0.04 nats higher than with 4,096 (results/windows/english.md).
    """
    max_streams = num_tokens // block_size // 32
    return 1 << min(12, max(1, max_streams).bit_length() - 1)


def default_chunk_tokens(num_tokens: int, num_streams: int, block_size: int) -> int:
    """Return a chunk length that gives about 16 chunks per stream, but at most 16,384 in all.

    It is at least 4 T + 1 and at most 1 M tokens.

    If no EOT is nearby, a chunk ends inside a document, and its last target is a token of another chunk. With chunks of
    T tokens, the last target of every row would be such a token, and the model would learn to predict noise there.
    """
    return min(1_000_000, max(4 * block_size + 1, num_tokens // min(16 * num_streams, 16_384)))


def rows_per_epoch(num_tokens: int, num_streams: int, block_size: int) -> int:
    """Return the number of rows of an epoch, K S in the description above."""
    return max(0, num_tokens - 1) // (num_streams * block_size) * num_streams


def find_chunk_starts(tokens: Tokens, eot_id: int, chunk_tokens: int) -> tuple[np.ndarray, int]:
    """Return where chunks start, (chunks,) int64 ascending from 0, and the number of cursors without an EOT nearby.

    A chunk starts at the EOT nearest to a cursor, or at the earlier one of two. The search window doubles until it
    contains an EOT, up to max(WINDOW, chunk_tokens) tokens on both sides. Without one, the chunk starts at the cursor.
    """
    max_radius = max(WINDOW, chunk_tokens)
    starts, without_eot = [0], 0
    for cursor in range(chunk_tokens, len(tokens), chunk_tokens):
        radius = 1000  # about the length of a web document, so most cursors need one or two reads
        while True:
            start, stop = max(0, cursor - radius), min(len(tokens), cursor + radius + 1)
            eots = start + np.flatnonzero(_read_window(tokens, start, stop) == eot_id)
            if len(eots):
                starts.append(int(eots[np.argmin(np.abs(eots - cursor))]))  # argmin returns the earlier of two
                break
            if radius == max_radius:
                starts.append(cursor)
                without_eot += 1
                break
            radius = min(2 * radius, max_radius)
    return np.unique(np.array(starts, np.int64)), without_eot


def _read_window(tokens: Tokens, start: int, stop: int) -> np.ndarray:
    """Return tokens start ... stop - 1, (stop - start,) in the dtype of the shards, without reading more of the files.

    The operating system reads up to megabytes around each access to a memory map. Since the windows are everywhere in
    the data, it would read all of it.
    """
    pieces = []
    for shard_index, first, end in tokens.ranges(start, stop):
        shard = tokens.shards[shard_index]
        if isinstance(shard, np.memmap):
            offset = shard.offset + first * shard.itemsize
            pieces.append(np.fromfile(str(shard.filename), shard.dtype, end - first, offset=offset))
        else:
            pieces.append(shard[first:end])
    return np.concatenate(pieces)


@dataclass(frozen=True)
class Epoch:
    """The shuffled data, streams and rows of one epoch."""

    chunks: np.ndarray  # (chunks, 2) int64: start and stop of each chunk in the data, in shuffled order
    offsets: np.ndarray  # (chunks + 1,) int64: start of each chunk in the shuffled data, then its length
    streams: np.ndarray  # (S,) int64: the streams, in the order in which rows are taken from them
    block_size: int

    @property
    def num_streams(self) -> int:
        return len(self.streams)

    @property
    def rows_per_stream(self) -> int:
        """K in the description above."""
        return self.num_rows // self.num_streams

    @property
    def num_rows(self) -> int:
        return rows_per_epoch(int(self.offsets[-1]), self.num_streams, self.block_size)

    def row_start(self, n: int | np.ndarray) -> int | np.ndarray:
        """Return the start of row n in the shuffled data; for an array of rows, (rows,) int64."""
        return (self.streams[n % self.num_streams] * self.rows_per_stream + n // self.num_streams) * self.block_size

    def row(self, n: int) -> list[tuple[int, int]]:
        """Return the token ranges [start, stop) of the data that form row n, in order, with T + 1 tokens in total.

        This defines the rows. `Order.read_rows` is a faster implementation, which a test compares with this one.
        """
        if not 0 <= n < self.num_rows:
            raise IndexError(f"Row {n} is out of range: the epoch has {self.num_rows} rows.")
        start = int(self.row_start(n))  # in the shuffled data
        end = start + self.block_size + 1
        ranges: list[tuple[int, int]] = []
        chunk = int(np.searchsorted(self.offsets, start, side="right")) - 1
        while start < end:
            stop = min(end, int(self.offsets[chunk + 1]))
            first = int(self.chunks[chunk, 0]) + start - int(self.offsets[chunk])  # in the data
            ranges.append((first, first + stop - start))
            start, chunk = stop, chunk + 1
        return ranges


@dataclass(frozen=True)
class Position:
    """The position of a run in the data: the next row is row n of the epoch."""

    epoch: int = 0
    n: int = 0


class Order:
    """The rows of a split, epoch after epoch.

    Without `shuffle`, all of the data is one chunk. Validation uses this with one stream to read the split in order.
    """

    def __init__(
        self, tokens: Tokens, eot_id: int, block_size: int, num_streams: int | None, seed: int,
        chunk_tokens: int | None = None, shuffle: bool = True, version: int = 2,
    ):  # fmt: skip
        """Find the chunks. Version 1, the order of earlier runs, takes rows from the streams in ascending order."""
        self.tokens, self.block_size = tokens, block_size
        self.seed, self.shuffle, self.version = seed, shuffle, version
        self.num_streams = num_streams or default_num_streams(len(tokens), block_size)
        self.chunk_tokens = chunk_tokens or default_chunk_tokens(len(tokens), self.num_streams, block_size)
        self.chunk_starts, self.chunks_without_eot = np.zeros(1, np.int64), 0
        if shuffle:
            self.chunk_starts, self.chunks_without_eot = find_chunk_starts(tokens, eot_id, self.chunk_tokens)
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # two: at the end of an epoch, the next one is needed too

    def _epoch(self, epoch: int) -> Epoch:
        chunks = np.stack([self.chunk_starts, np.append(self.chunk_starts[1:], len(self.tokens))], axis=1)
        if self.shuffle:
            chunks = chunks[permutation(len(chunks), self.seed, epoch)]
        offsets = np.concatenate([[0], np.cumsum(chunks[:, 1] - chunks[:, 0])])
        streams = np.arange(self.num_streams)
        if self.shuffle and self.version > 1:
            streams = permutation(self.num_streams, self.seed, epoch, 0)  # 0: other hashes than for the chunks
        return Epoch(chunks, offsets, streams, self.block_size)

    @property
    def rows_per_epoch(self) -> int:
        return self.epoch(0).num_rows  # the same for every epoch

    def check(self, rows_per_step: int) -> None:
        """Raise a ConfigError if an epoch has fewer rows than a step."""
        if self.rows_per_epoch < rows_per_step:
            raise ConfigError(
                f"The dataset has too few rows for one step: {len(self.tokens):,} training tokens give "
                f"{self.rows_per_epoch:,} rows of {self.block_size:,} tokens in {counted(self.num_streams, 'stream')}, "
                f"but a step takes {rows_per_step:,}. Use more data, or a smaller --training.batch-tokens, "
                "--data.num-streams or --model.block-size."
            )

    def summary(self, batch_tokens: int, max_steps: int) -> str:
        """Return a description of the chunks, the steps per epoch, and the number of epochs in `max_steps`."""
        steps = self.rows_per_epoch // (batch_tokens // self.block_size)
        unread = len(self.tokens) - steps * batch_tokens
        lines = [
            f"{batch_tokens:,} tokens per step; {len(self.tokens):,} tokens in "
            f"{counted(len(self.chunk_starts), 'chunk')} of about {self.chunk_tokens:,}",
            f"{steps:,} steps per epoch ({unread:,} tokens per epoch are not read), {max_steps / steps:.2f} epochs in "
            f"{max_steps:,} steps",
        ]
        if self.chunks_without_eot:
            number = counted(self.chunks_without_eot, "chunk")
            lines.append(f"{number} without an end-of-text token nearby, which start inside a document")
        return "\n".join(lines)

    def repetition_warning(self, batch_tokens: int, max_steps: int) -> str | None:
        """Return a warning if a run has more than 10 epochs, otherwise None."""
        epochs = max_steps / (self.rows_per_epoch // (batch_tokens // self.block_size))
        if epochs <= MAX_EPOCHS:
            return None
        return (
            f"{max_steps:,} steps x {batch_tokens:,} tokens = {max_steps * batch_tokens:,} tokens are {epochs:.1f} "
            f"epochs of the {len(self.tokens):,} training tokens. A model that is trained on the same text this often "
            "memorizes it. Use fewer steps, such as --training.epochs 4, or more data."
        )

    def step_start(self, position: Position, rows_per_step: int) -> Position:
        """Return `position`, or the start of the next epoch if this one has too few rows left for a step."""
        if position.n + rows_per_step > self.rows_per_epoch:
            return Position(position.epoch + 1, 0)
        return position

    def read_row(self, epoch: int, n: int, out: np.ndarray) -> None:
        """Read the tokens of a row into `out`, (T + 1,) int64."""
        filled = 0
        for start, stop in self.epoch(epoch).row(n):
            self.tokens.read(start, stop, out[filled : filled + stop - start])
            filled += stop - start

    def read_rows(self, epoch: int, rows: Sequence[int], out: np.ndarray) -> None:
        """Read the tokens of several rows into `out`, (rows, T + 1) int64, several times as fast as `read_row`.

        Almost every row is within one chunk and one shard, so it takes a single copy. NumPy finds these rows and their
        offsets for all rows at once. `read_row` reads the others and raises an IndexError for rows outside the epoch.
        """
        plan, shard_starts, size = self.epoch(epoch), self.tokens.starts, self.block_size + 1
        n = np.clip(np.array(rows, np.int64), 0, plan.num_rows - 1)
        start = plan.row_start(n)  # in the shuffled data
        chunk = np.searchsorted(plan.offsets, start, side="right") - 1
        first = plan.chunks[chunk, 0] + start - plan.offsets[chunk]  # in the data
        shard = np.searchsorted(shard_starts, first, side="right") - 1
        in_one_chunk = (n == rows) & (start + size <= plan.offsets[chunk + 1])
        is_contiguous = in_one_chunk & (first + size <= shard_starts[shard + 1])
        columns = (is_contiguous.tolist(), shard.tolist(), (first - shard_starts[shard]).tolist())
        for row, out_row, single_copy, number, offset in zip(rows, out, *columns, strict=True):
            if single_copy:
                out_row[:] = np.asarray(self.tokens.shards[number])[offset : offset + size]  # slicing a memmap is slow
            else:
                self.read_row(epoch, row, out_row)


# ---------------------------------------------------------------------------------------------------------
# the rows of one rank


@dataclass
class Batch:
    """The data of one optimizer step on one rank."""

    start: Position
    end: Position  # where the next step starts
    micro_batches: list[Any]  # in pretraining (micro_batch_size, T + 1) int64 each, in pinned memory for CUDA
    num_targets: int  # in the step, on all ranks
    num_tokens: int  # in the step, on all ranks


class DataLoader(Prefetcher[Batch]):
    """An endless iterator over the batches of one rank, from `position` on. A background thread prefetches them."""

    def __init__(
        self, order: Order, position: Position, rows_per_step: int, micro_batch_size: int,
        rank: int = 0, world_size: int = 1, device: torch.device | None = None,
    ):  # fmt: skip
        """Start the background thread. If `device` is CUDA, it reads the rows into pinned memory."""
        order.check(rows_per_step)
        self.order, self.rows_per_step, self.micro_batch_size = order, rows_per_step, micro_batch_size
        self.rank, self.world_size = rank, world_size
        super().__init__(position, device)

    def read_batch(self, position: Position) -> Batch:
        start, num_rows = self.order.step_start(position, self.rows_per_step), self.rows_per_step
        rows = [n for n in range(start.n, start.n + num_rows) if n % self.world_size == self.rank]
        micro_batches = []
        for i in range(0, len(rows), self.micro_batch_size):
            shape = (self.micro_batch_size, self.order.block_size + 1)
            micro_batch = torch.empty(shape, dtype=torch.int64, pin_memory=self.cuda_device is not None)
            self.order.read_rows(start.epoch, rows[i : i + self.micro_batch_size], micro_batch.numpy())
            micro_batches.append(micro_batch)
        num_tokens = num_rows * self.order.block_size
        return Batch(start, Position(start.epoch, start.n + num_rows), micro_batches, num_tokens, num_tokens)


def inputs_and_targets(batch: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy rows (B, T + 1) to the device and split them into inputs and targets, (B, T) each."""
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]


def validation_batches(
    tokens: Tokens, block_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1, pin: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the validation batches of one rank, the same ones every time: inputs and targets, (B, T) int64 each.

    They cover the first VAL_TOKENS tokens of the split. The last batch is filled up with rows whose targets are
    IGNORE_INDEX. With `pin`, the batches are in pinned memory.
    """
    if len(tokens) <= block_size:
        raise ConfigError(
            f"The dataset has {len(tokens):,} validation tokens, but one row takes block_size + 1 = "
            f"{block_size + 1:,} tokens. Prepare it with a larger --val-tokens."
        )
    order = Order(tokens, eot_id=-1, block_size=block_size, num_streams=1, seed=0, shuffle=False)
    rows = [n for n in range(validation_rows(tokens, block_size)) if n % world_size == rank]
    for i in range(0, len(rows), micro_batch_size):
        idx = torch.zeros((micro_batch_size, block_size), dtype=torch.int64, pin_memory=pin)
        targets = torch.full((micro_batch_size, block_size), IGNORE_INDEX, dtype=torch.int64, pin_memory=pin)
        count = len(rows[i : i + micro_batch_size])
        batch = torch.empty((count, block_size + 1), dtype=torch.int64)
        order.read_rows(0, rows[i : i + count], batch.numpy())
        idx[:count], targets[:count] = batch[:, :-1], batch[:, 1:]
        yield idx, targets


def validation_rows(tokens: Tokens, block_size: int) -> int:
    """Return the number of rows that each validation reads, on all ranks."""
    return min(VAL_TOKENS // block_size, max(0, len(tokens) - 1) // block_size)
