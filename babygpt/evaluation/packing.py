"""Multiple-choice examples packed into rows: a context is computed once for its four endings.

>>> rows = pack(trees(examples, block_size=1024), row_tokens=512)
>>> batch = lay_out(rows, 512, device)
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Example:
    """One question as token rows: the context, its four endings, which is right, and each ending's length
    as the style's acc_norm counts it (tokens, or characters)."""

    context: list[int]
    endings: list[list[int]]
    label: int
    lengths: list[int]


@dataclass(frozen=True)
class Tree:
    """A context and the endings that branch off it: the part of an example that is computed in one piece."""

    example: int
    context: list[int]
    endings: dict[int, list[int]]  # by number

    @property
    def size(self) -> int:
        """Tokens that the model reads: of an ending all but the last, which is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings.values())


def trees(examples: list[Example], block_size: int) -> Iterator[Tree]:
    """A tree an example; where a row is longer than the block size, one an ending, for then each loses as much of the
    beginning of its context as it must, and never of itself."""
    for i, example in enumerate(examples):
        room = [block_size + 1 - len(ending) for ending in example.endings]
        if len(example.context) <= min(room):
            yield Tree(i, example.context, dict(enumerate(example.endings)))
        else:
            for k, ending in enumerate(example.endings):
                yield Tree(i, example.context[-room[k] :], {k: ending})


def pack(found: Iterable[Tree], row_tokens: int) -> list[list[Tree]]:
    """Trees in rows of at most `row_tokens` tokens (a larger tree has a row of its own): into each row goes the largest
    one left that has room, as long as there is one."""
    left = sorted(found, key=lambda tree: tree.size)
    sizes = [tree.size for tree in left]
    rows: list[list[Tree]] = []
    while left:
        rows.append([])
        room, largest = row_tokens, len(left) - 1
        while largest >= 0:
            rows[-1].append(left.pop(largest))
            room -= sizes.pop(largest)
            largest = bisect_right(sizes, room) - 1
    return rows


@dataclass(frozen=True)
class Batch:
    """Rows of trees as tensors. Token j of a row sees token i if i <= j, both are of one tree, and i is of the context
    or of j's own ending."""

    idx: torch.Tensor  # (B, L) int64
    positions: torch.Tensor  # (B, L): in the text of context and ending
    tree: torch.Tensor  # (B, L): which of the row's, 0 behind the last
    branch: torch.Tensor  # (B, L): 0 for a context, 1 + k for ending k
    places: torch.Tensor  # (M,): in B L, those whose next token counts
    targets: torch.Tensor  # (M,): that token
    sums: torch.Tensor  # (M,): 4 x example + ending, the index of the loss it adds to; on the CPU

    def mask(self) -> torch.Tensor:
        """(B, 1, L, L) bool."""
        later = torch.ones(self.idx.size(1), self.idx.size(1), dtype=torch.bool, device=self.idx.device).triu(1)
        same_tree = self.tree[:, :, None] == self.tree[:, None, :]
        branch = self.branch[:, None, :]  # of the token that is seen
        return (same_tree & ((branch == 0) | (branch == self.branch[:, :, None])) & ~later)[:, None]


def lay_out(rows: list[list[Tree]], row_tokens: int, device: torch.device) -> Batch:
    """The tensors of some rows, each `row_tokens` long."""
    grid = np.zeros((4, len(rows), row_tokens), np.int64)  # idx, positions, tree, branch
    places, targets, sums = [], [], []
    for r, row in enumerate(rows):
        at = 0
        for number, tree in enumerate(row, 1):
            n = len(tree.context)
            grid[:, r, at : at + n] = tree.context, range(n), [number] * n, [0] * n
            last, at = at + n - 1, at + n
            for k, ending in tree.endings.items():
                m = len(ending) - 1
                grid[:, r, at : at + m] = ending[:-1], range(n, n + m), [number] * m, [1 + k] * m
                places += [r * row_tokens + place for place in (last, *range(at, at + m))]
                targets += ending
                sums += [4 * tree.example + k] * len(ending)
                at += m

    def on_device(values: torch.Tensor) -> torch.Tensor:  # from pinned memory, so that the host does not wait
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

    idx, positions, tree, branch = on_device(torch.from_numpy(grid))
    chosen, chosen_targets = on_device(torch.tensor(places)), on_device(torch.tensor(targets))
    return Batch(idx, positions, tree, branch, chosen, chosen_targets, torch.tensor(sums))
