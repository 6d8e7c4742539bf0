"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

The loss of a pair is -log sigmoid(beta ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)))),
where the log-probability of an answer is summed over its tokens, including the end token, and ref is the initial model.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from babygpt import files
from babygpt.chat.packing import PackedBatch, Sequences, collate_packed
from babygpt.errors import UserError
from babygpt.training.device import autocast
from babygpt.training.distributed import Ranks

# means over the pairs, in this order after the loss; a tie counts half for the accuracy, and sft_loss is the mean over
# the tokens of the chosen answers
COLUMNS = ("reward_chosen", "reward_rejected", "margin", "accuracy", "chosen_change", "sft_loss")


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of P pairs on the host."""

    batch: PackedBatch  # of 2 P sequences: chosen, rejected, chosen, ...
    reference: torch.Tensor  # (P, 2) float32, log-probabilities of the initial model
    pairs_per_token: float  # the number of pairs in the step, divided by that of tokens in their chosen answers


def collate_pairs(
    sequences: Sequences, pairs: Sequence[int], block_size: int, pad_id: int, pin: bool = False
) -> PackedBatch:
    """Pack the answers of pairs into few rows."""
    tokens = [sequences.get(2 * pair + answer, block_size) for pair in pairs for answer in (0, 1)]
    return collate_packed(tokens, block_size, pad_id, pin)


def log_probabilities(model: nn.Module, batch: PackedBatch, count: int) -> torch.Tensor:
    """Return the log-probability of the supervised tokens of each of `count` conversations, (count,) float32."""
    losses = model(batch.idx, batch.targets, packed=batch.packed(), reduction="none")  # (B, T)
    sums = torch.zeros(count + 1, device=losses.device)  # the last one is of padding
    return -sums.index_add(0, batch.sequences.flatten(), losses.flatten())[:count]


def dpo_loss(log_probs: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each pair, (P,), and the rewards of its chosen and rejected answer, (P, 2).

    The log-probabilities of model and reference are (P, 2).
    """
    rewards = beta * (log_probs - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def summed_losses(model: nn.Module, pairs: Pairs, device: torch.device, beta: float) -> torch.Tensor:
    """Return the loss and the values of COLUMNS, summed over the pairs, (7,) float32."""
    batch, reference = pairs.batch.to(device), pairs.reference.to(device, non_blocking=True)
    log_probs = log_probabilities(model, batch, 2 * len(reference)).view(-1, 2)
    losses, rewards = dpo_loss(log_probs, reference, beta)
    margins = rewards[:, 0] - rewards[:, 1]
    values = [rewards[:, 0], rewards[:, 1], margins, (margins.sign() + 1) / 2, log_probs[:, 0] - reference[:, 0]]
    values.append(-log_probs[:, 0] * pairs.pairs_per_token)
    return torch.stack([losses.sum(), *(value.sum().detach() for value in values)])


def reference_id(tensors: dict[str, torch.Tensor], settings: Iterable[Any]) -> str:
    """Return a hash of the weights and of the settings on which the log-probabilities depend."""
    digest = hashlib.sha256(repr(list(settings)).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def score_sequences(
    model: nn.Module, sequences: Sequences, block_size: int, ranks: Ranks, dtype: str, batch_size: int = 16
) -> np.ndarray:
    """Return the log-probability of the supervised tokens of each sequence, (count,) float64, on all ranks.

    A forward pass has `batch_size` sequences.
    """
    values = torch.zeros(len(sequences))
    for items in list(batched(range(len(sequences)), batch_size))[ranks.rank :: ranks.world_size]:
        batch = collate_packed([sequences.get(i, block_size) for i in items], block_size, pad_id=0).to(ranks.device)
        with autocast(ranks.device, dtype):
            values[items] = log_probabilities(model, batch, len(items)).cpu()
    return ranks.all_reduce(values.to(ranks.device)).cpu().double().numpy()


def reference_log_probs(
    model: nn.Module | None, sequences: Sequences, path: Path, block_size: int, ranks: Ranks, dtype: str,
    pairs_together: int,
) -> np.ndarray:  # fmt: skip
    """Return the log-probabilities of the answers under the initial model, (pairs, 2) float32.

    They are computed once, by all ranks, and stored at `path`, whose name identifies model and data. Without a model,
    they must be stored already.
    """
    if ranks.sum([path.exists()])[0] == ranks.world_size:
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is corrupted ({error}). Delete it; the next launch computes it again.") from None
    assert model is not None, "the caller has checked that all ranks have the file"
    model = model.to(ranks.device).eval()
    values = score_sequences(model, sequences, block_size, ranks, dtype, 2 * pairs_together)
    reference = values.reshape(-1, 2).astype(np.float32)
    if ranks.is_main:
        with files.create(path) as file:
            np.save(file, reference)
    ranks.barrier()
    return reference


def batched(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(items), size):
        yield list(items[i : i + size])
