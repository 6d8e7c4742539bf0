"""Score the endings of examples: the loss of each, and whether greedy decoding would generate it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from babygpt.evaluation.packing import Example, Segment, collate, make_segments, pack
from babygpt.nn.attention import PackedRows
from babygpt.training.device import autocast

# length of a packed row. Attention also computes the pairs that it masks: on a CPU, 512 tokens took 1.2 times as long
ROW_TOKENS = {"cpu": 256, "cuda": 512}
LOGIT_ROWS = {"cpu": 256, "cuda": 2048}  # rows of logits computed at a time


class Scorer(Protocol):
    """The interface that scoring needs of a model; model.GPT implements it."""

    config: Any  # with block_size

    def hidden(self, idx: torch.Tensor, *, packed: PackedRows) -> torch.Tensor: ...
    def logits(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class EndingScores:
    """Scores of all endings of all examples, one after the other. Incomplete if the evaluation was stopped."""

    losses: torch.Tensor  # (endings,) float64, the summed loss of each ending, given its context
    num_greedy: torch.Tensor  # (endings,) int64, the number of its tokens that are the most probable ones


@torch.no_grad()
def score_endings(
    model: Scorer, examples: list[Example], device: torch.device, dtype: str = "auto", batch_size: int = 16,
    progress: Callable[[int], Any] | None = None, stop: Callable[[], bool] = lambda: False,
) -> EndingScores:  # fmt: skip
    """Return the scores of all endings. The model must be in eval mode.

    A context is computed once for its endings, and logits only where the next token is scored. On CUDA all batches have
    the same shape, except for the first ones, whose segments are longer than a row. `progress` receives the number of
    new examples after each batch.
    """
    token_losses: list[torch.Tensor] = []  # on the device: the host does not wait for them
    is_greedy: list[torch.Tensor] = []
    loss_indices: list[torch.Tensor] = []  # which ending each of them belongs to
    logit_rows = LOGIT_ROWS.get(device.type, 256)
    row_tokens, done = ROW_TOKENS.get(device.type, 512), set[int]()
    rows = pack(make_segments(examples, model.config.block_size), row_tokens)
    for batch_rows in batched(rows, batch_size, row_tokens):
        if stop():
            break
        longest = max(sum(segment.size for segment in row) for row in batch_rows)
        length = max(row_tokens, math.ceil(longest / 64) * 64)
        empty_rows: list[list[Segment]] = [[]] * (batch_size - len(batch_rows) if device.type == "cuda" else 0)
        batch = collate(batch_rows + empty_rows, length, device)
        with autocast(device, dtype):
            hidden = model.hidden(batch.idx, packed=batch.packed()).flatten(0, 1)  # (B L, C)
            chunks = zip(batch.logit_indices.split(logit_rows), batch.targets.split(logit_rows), strict=True)
            for indices, targets in chunks:
                logits = model.logits(hidden[indices]).float()  # (logit_rows or fewer, V)
                token_losses.append(F.cross_entropy(logits, targets, reduction="none"))
                is_greedy.append(logits.argmax(dim=1) == targets)
        loss_indices.append(batch.loss_indices)
        if progress is not None:
            new_examples = {segment.example for row in batch_rows for segment in row} - done
            done |= new_examples
            progress(len(new_examples))
    num_endings = sum(len(example.endings) for example in examples)
    losses, num_greedy = torch.zeros(num_endings, dtype=torch.float64), torch.zeros(num_endings, dtype=torch.int64)
    if token_losses:
        indices = torch.cat(loss_indices)
        losses.index_add_(0, indices, torch.cat(token_losses).cpu().double())
        num_greedy.index_add_(0, indices, torch.cat(is_greedy).cpu().long())
    return EndingScores(losses, num_greedy)


def batched(rows: list[list[Segment]], batch_size: int, row_tokens: int) -> Iterator[list[list[Segment]]]:
    """Yield batches of rows, first of those with a segment longer than `row_tokens`, which would lengthen others."""
    num_long = sum(row[0].size > row_tokens for row in rows)  # the first rows, with one segment each
    for group in (rows[:num_long], rows[num_long:]):
        for i in range(0, len(group), batch_size):
            yield group[i : i + batch_size]
