"""Tokenize conversations, and pack them into rows that hold several and almost no padding.

>>> sequences = tokenize(directory, "train", template, "conversations")
>>> rows = best_fit_decreasing(sequences.lengths(1024).tolist(), 1024)
>>> batch = collate([[sequences.get(i, 1024) for i in row] for row in rows[:8]], 1024, pad_id=50256)

Attention stays inside a conversation, whose positions start at 0.
"""

import math
import zipfile
from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from babygpt import files
from babygpt.chat.conversations import Kind, Split, read_manifest, read_split
from babygpt.chat.template import ChatTemplate
from babygpt.nn.attention import PackedRows
from babygpt.nn.cross_entropy import IGNORE_INDEX

Tokens = tuple[np.ndarray, np.ndarray]  # of a conversation: ids (n,) uint32, and supervised (n,) bool


@dataclass(frozen=True)
class Sequences:
    """Tokenized conversations. Those of preferences alternate: chosen, rejected, chosen, ..."""

    ids: np.ndarray  # (tokens,) uint32, of one conversation after the other
    supervised: np.ndarray  # (tokens,) bool
    starts: np.ndarray  # (count + 1,) int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, block_size: int) -> np.ndarray:
        """Return the number of input tokens of each conversation in a row of `block_size`, (count,) int64."""
        return np.minimum(np.diff(self.starts) - 1, block_size)

    def get(self, i: int, block_size: int) -> Tokens:
        """Return conversation i, truncated at its end to `block_size` inputs and their targets."""
        start = self.starts[i]
        stop = min(self.starts[i + 1], start + block_size + 1)
        return self.ids[start:stop], self.supervised[start:stop]

    def are_equal(self, i: int, j: int, block_size: int) -> bool:
        """Return whether two conversations are equal after truncation."""
        return np.array_equal(self.get(i, block_size)[0], self.get(j, block_size)[0])

    def num_supervised(self, block_size: int) -> np.ndarray:
        """Return the number of supervised tokens of each conversation after truncation, (count,) int64."""
        before = np.concatenate([[0], np.cumsum(self.supervised)])
        stops = np.minimum(self.starts[1:], self.starts[:-1] + block_size + 1)
        return before[stops] - before[self.starts[:-1]]


def tokenize(directory: Path, split: Split, template: ChatTemplate, kind: Kind) -> Sequences:
    """Return the conversations of a prepared directory as tokens, each up to its last supervised token.

    They are stored in the directory, so that the next call loads them. A file that is corrupted, or was written for
    other data or another template, is replaced.
    """
    path = directory / f"{split}-{template.sha256[:8]}.npz"
    key = f"{read_manifest(directory)['splits'][split]['sha256']} {template.sha256}"
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as stored:
        if str(stored["key"]) == key:
            return Sequences(stored["ids"], stored["supervised"], stored["starts"])
    ids, supervised, starts = list[np.ndarray](), list[np.ndarray](), [0]
    for record in tqdm(read_split(directory, split), desc="tokenize", unit=" records", leave=False, disable=None):
        if kind == "preferences":
            answers = ({"role": "assistant", "content": record[name]} for name in ("chosen", "rejected"))
            encoded = [template.encode([*record["prompt"], answer], only_last=True) for answer in answers]
        else:
            encoded = [template.encode(record["messages"])]
        for tokens, counted in encoded:
            size = len(counted) - counted[::-1].index(True)
            ids.append(np.array(tokens[:size], np.uint32))
            supervised.append(np.array(counted[:size]))
            starts.append(starts[-1] + size)
    arrays = np.concatenate([*ids, np.empty(0, np.uint32)]), np.concatenate([*supervised, np.empty(0, bool)])
    sequences = Sequences(*arrays, np.array(starts, np.int64))
    with files.create(path) as file:
        np.savez(file, key=key, **vars(sequences))
    return sequences


def best_fit_decreasing(lengths: Sequence[int], capacity: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Pack items into bins and return the items of each: the longest item first, each into the fullest bin it fits.

    `order`, a permutation of the items, decides among items of equal length. The lengths of the items in the bins do
    not depend on it.
    """
    items = sorted(range(len(lengths)) if order is None else order, key=lambda item: -lengths[item])  # stable
    bins: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # bins by their free space
    free_sizes: list[int] = []  # the keys of by_free, ascending
    for item in items:
        at = bisect_left(free_sizes, lengths[item])
        if at == len(free_sizes):
            bins.append([])
            index, free = len(bins) - 1, capacity
        else:
            free = free_sizes[at]
            index = by_free[free].pop()
            if not by_free[free]:
                del by_free[free], free_sizes[at]
        bins[index].append(item)
        free -= lengths[item]
        if free not in by_free:
            by_free[free] = []
            insort(free_sizes, free)
        by_free[free].append(index)
    return bins


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens. All tensors are (B, T) int64, on the host or on a device."""

    idx: torch.Tensor
    targets: torch.Tensor  # IGNORE_INDEX if not supervised
    positions: torch.Tensor  # in the conversation
    sequences: torch.Tensor  # the index of the conversation in the batch; their number for padding

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def packed(self) -> PackedRows:
        """Return the structure of the rows for the model: causal attention within each conversation."""
        T = self.idx.size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=self.idx.device).tril()
        mask = causal & (self.sequences[:, :, None] == self.sequences[:, None, :])  # (B, T, T)
        previous = torch.arange(T, device=self.idx.device) - (self.positions > 0).long()  # (B, T)
        return PackedRows(self.positions, mask[:, None], previous)


def collate(rows: Sequence[Sequence[Tokens]], row_tokens: int, pad_id: int, pin: bool = False) -> PackedBatch:
    """Collate rows of conversations, which fit into `row_tokens` input tokens. With `pin`, into pinned memory."""
    count = sum(map(len, rows))
    arrays = np.empty((4, len(rows), row_tokens), np.int64)
    number = 0
    for r, row in enumerate(rows):
        idx, targets, positions, sequences = arrays[:, r]
        start = 0
        for ids, supervised in row:
            stop = start + len(ids) - 1
            idx[start:stop] = ids[:-1]
            targets[start:stop] = np.where(supervised[1:], ids[1:].astype(np.int64), IGNORE_INDEX)
            positions[start:stop] = np.arange(stop - start)
            sequences[start:stop] = number
            start, number = stop, number + 1
        idx[start:], targets[start:], sequences[start:] = pad_id, IGNORE_INDEX, count
        positions[start:] = np.arange(row_tokens - start)
    tensor = torch.from_numpy(arrays)
    return PackedBatch(*(tensor.pin_memory() if pin else tensor))


def collate_packed(tokens: Sequence[Tokens], block_size: int, pad_id: int, pin: bool = False) -> PackedBatch:
    """Collate conversations into as few rows of at most `block_size` tokens as possible, at least one.

    `PackedBatch.sequences` has their indices in `tokens`.
    """
    lengths = [len(ids) - 1 for ids, _ in tokens]
    row_tokens = min(block_size, math.ceil(max(sum(lengths), 1) / 64) * 64)
    rows = best_fit_decreasing(lengths, row_tokens) or [[]]
    batch = collate([[tokens[i] for i in row] for row in rows], row_tokens, pad_id)
    indices = torch.tensor([*(i for row in rows for i in row), len(tokens)])  # in the order of the rows
    batch = PackedBatch(batch.idx, batch.targets, batch.positions, indices[batch.sequences])
    return PackedBatch(*(tensor.pin_memory() for tensor in vars(batch).values())) if pin else batch
