"""Validation: the mean loss over a fixed set of tokens."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from babygpt.nn.cross_entropy import IGNORE_INDEX
from babygpt.training.device import autocast
from babygpt.training.distributed import Ranks
from babygpt.training.signals import StopRequested


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[tuple], token_bytes: torch.Tensor, ranks: Ranks,
    dtype: str = "auto", stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:  # fmt: skip
    """Return the mean loss over the targets of all ranks, in nats per token and in bits per byte of their text.

    `batches` are this rank's inputs and targets, (B, T) int64 each, and, if the rows are packed, their PackedRows on
    the device; `token_bytes`, (V,) int64, is the length of each token's text in UTF-8 bytes. The model takes
    `reduction="sum"`; its training mode is restored. If `stop()` is true on any rank, all raise StopRequested.
    """
    was_training = model.training
    model.eval()
    losses: list[torch.Tensor] = []  # () float32 each, on the device: the host does not wait for them
    count = text_bytes = 0.0
    for idx, targets, *packed in batches:
        if stop():
            break
        with autocast(ranks.device, dtype):
            idx_, targets_ = (tensor.to(ranks.device, non_blocking=True) for tensor in (idx, targets))
            kwargs = {"packed": packed[0]} if packed else {}
            losses.append(model(idx_, targets_, reduction="sum", **kwargs))
        valid_targets = targets[targets != IGNORE_INDEX]
        count += valid_targets.numel()
        text_bytes += token_bytes[valid_targets].sum().item()
    model.train(was_training)
    nats = sum(torch.stack(losses).tolist()) if losses else 0.0
    nats, count, text_bytes, stops = ranks.sum([nats, count, text_bytes, stop()])
    if stops:
        raise StopRequested
    return nats / count, nats / math.log(2) / text_bytes if text_bytes else math.nan
