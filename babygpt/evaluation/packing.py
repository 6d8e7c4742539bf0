"""Pack multiple-choice examples into rows of tokens, so that the model computes a context once for its endings.

>>> rows = pack(make_segments(examples, block_size=1024), row_tokens=512)
>>> batch = collate(rows, 512, device)
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError
from babygpt.nn.attention import PackedRows


@dataclass(frozen=True)
class Example:
    """A context and its endings as token ids, with the index of the correct ending."""

    context: list[int]
    endings: list[list[int]]
    label: int
    lengths: list[int]  # of the endings, by which acc_norm divides their losses: tokens or characters


def make_example(context: str, endings: list[str], label: int, tokenizer: Tokenizer) -> Example:
    """Tokenize an example as lm-evaluation-harness does; acc_norm divides by the number of characters.

    Context and ending are encoded together, with a space between them, and divided after as many tokens as the context
    alone has. Trailing spaces of the context belong to the ending. An empty context is the end-of-text token.
    """
    encoded = tokenizer.encode(context.rstrip())
    tokens = [tokenizer.encode(f"{context} {ending}")[len(encoded) :] for ending in endings]
    if not all(tokens):
        raise UserError(f"An ending has no tokens: {endings[tokens.index([])]!r}. The tokenizer does not encode it.")
    return Example(encoded or [tokenizer.eot_id], tokens, label, [len(ending) for ending in endings])


@dataclass(frozen=True)
class Segment:
    """A context and the endings that share it. A row consists of segments, which do not attend to each other."""

    example: int  # index of the example
    context: list[int]
    endings: dict[int, list[int]]  # by their index among the endings of all examples

    @property
    def size(self) -> int:
        """The number of input tokens. The last token of an ending is only a target."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings.values())


def make_segments(examples: list[Example], block_size: int) -> Iterator[Segment]:
    """Yield one segment per example, or one per ending if an ending does not fit into the block size with the context.

    In that case the text is truncated on the left, for each ending only as far as needed, as in lm-evaluation-harness.
    An ending that is longer than the block size loses its first tokens, which are then not scored.
    """
    first = 0  # index of the first ending of the example
    for i, example in enumerate(examples):
        endings = dict(enumerate(example.endings, first))
        first += len(endings)
        if len(example.context) + max(map(len, example.endings)) <= block_size + 1:
            yield Segment(i, example.context, endings)
        else:
            for k, ending in endings.items():
                text, scored = (example.context + ending)[-(block_size + 1) :], min(len(ending), block_size)
                yield Segment(i, text[: len(text) - scored], {k: text[len(text) - scored :]})


def pack(segments: Iterable[Segment], row_tokens: int) -> list[list[Segment]]:
    """Pack segments into rows of at most `row_tokens` tokens; a larger segment gets a row for itself.

    Greedy: each row takes the largest remaining segment that fits, until none does.
    """
    remaining = sorted(segments, key=lambda segment: segment.size)
    sizes = [segment.size for segment in remaining]
    rows: list[list[Segment]] = []
    while remaining:
        rows.append([])
        free, largest = row_tokens, len(remaining) - 1
        while largest >= 0:
            rows[-1].append(remaining.pop(largest))
            free -= sizes.pop(largest)
            largest = bisect_right(sizes, free) - 1
    return rows


@dataclass(frozen=True)
class Batch:
    """Rows of segments as tensors, of B rows and L tokens. All are int64 and, except for `loss_indices`, on the device.

    The M targets are the tokens of all endings.
    """

    idx: torch.Tensor  # (B, L)
    positions: torch.Tensor  # (B, L), in the text of context and ending
    previous: torch.Tensor  # (B, L), the index in the row of each token's previous token; a first token has its own
    segment_ids: torch.Tensor  # (B, L), from 1 in each row; 0 is padding
    ending_ids: torch.Tensor  # (B, L), 0 in a context, k + 1 in ending k
    logit_indices: torch.Tensor  # (M,), the index in B L of the token that predicts each target
    targets: torch.Tensor  # (M,)
    loss_indices: torch.Tensor  # (M,), the ending of each target; on the CPU

    def packed(self) -> PackedRows:
        """Return the structure of the rows for the model.

        A token attends to itself and earlier tokens of its segment that are in the context or in its own ending.
        """
        later = torch.ones(self.idx.size(1), self.idx.size(1), dtype=torch.bool, device=self.idx.device).triu(1)
        same_segment = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]  # (B, L, L)
        key_ending = self.ending_ids[:, None, :]
        same_branch = (key_ending == 0) | (key_ending == self.ending_ids[:, :, None])
        return PackedRows(self.positions, (same_segment & same_branch & ~later)[:, None], self.previous)


def collate(rows: list[list[Segment]], row_tokens: int, device: torch.device) -> Batch:
    """Collate rows of segments into a batch, each row padded to `row_tokens` tokens."""
    inputs = np.zeros((5, len(rows), row_tokens), np.int64)  # idx, positions, previous, segment_ids, ending_ids
    logit_indices, targets, loss_indices = [], [], []
    for r, row in enumerate(rows):
        end = 0
        for segment_id, segment in enumerate(row, 1):
            n, start = len(segment.context), end
            end = start + n
            previous = [start, *range(start, end - 1)]
            inputs[:, r, start:end] = segment.context, range(n), previous, [segment_id] * n, [0] * n
            context_end = end
            for k, ending in segment.endings.items():
                m, start = len(ending) - 1, end
                end = start + m
                previous = [context_end - 1, *range(start, end - 1)][:m]
                inputs[:, r, start:end] = ending[:-1], range(n, n + m), previous, [segment_id] * m, [1 + k] * m
                logit_indices += [r * row_tokens + i for i in (context_end - 1, *range(start, end))]
                targets += ending
                loss_indices += [k] * len(ending)

    def to_device(values: torch.Tensor) -> torch.Tensor:  # from pinned memory, so that the host does not wait
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

    idx, positions, previous, segment_ids, ending_ids = to_device(torch.from_numpy(inputs))
    return Batch(
        idx, positions, previous, segment_ids, ending_ids, to_device(torch.tensor(logit_indices)),
        to_device(torch.tensor(targets)), torch.tensor(loss_indices),
    )  # fmt: skip
