"""Linear head and cross entropy in one function, which never materializes the full logits.

    >>> loss = linear_cross_entropy(hidden, head.weight, targets, vocab_size=50257)  # summed over the targets

The logits, (B T, V), are by far the largest tensor of a small GPT, and a plain loss makes several float32 tensors of
that size. This function computes them in chunks of rows, and the gradients in the same pass, chunk by chunk.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}  # of logits computed at a time
COMPILED_CUDA_CHUNK_BYTES = 2 << 30  # larger matrix products are faster, and compiled code makes no float32 copies
SLICE_BYTES = 1 << 20  # of float32 logits that a CPU processes at a time, so that they fit into its cache


def padded_vocab_size(vocab_size: int) -> int:
    """Return the vocabulary size rounded up to a multiple of 128, the tile of a matrix product (50,257: 50,304)."""
    return math.ceil(vocab_size / 128) * 128


def chunk_rows(rows: int, row_bytes: int, device_type: str, compiled: bool) -> int:
    """Return how many of `rows` rows of logits to compute at a time.

    When compiled for CUDA, it is a multiple of 128, the tile of a matrix product, and divides `rows` if possible: the
    compiler unrolls the loop over chunks, and a smaller last chunk would need additional kernels.
    """
    if not (compiled and device_type == "cuda"):
        return math.ceil(rows / math.ceil(rows * row_bytes / CHUNK_BYTES.get(device_type, 128 << 20)))
    max_rows = max(128, COMPILED_CUDA_CHUNK_BYTES // row_bytes // 128 * 128)
    if rows <= max_rows:
        return rows
    divisors = (n for n in range(max_rows, max_rows // 4, -128) if rows % n == 0)
    return next(divisors, max_rows)


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the summed cross entropy, () float32, of the logits x @ weight.T.

    x is (N, C), weight (V, C), targets (N,) int64; targets of -100 are ignored. The vocabulary entries from vocab_size
    on are padding and get no probability. Matrix products run in autocast's dtype, everything else in float32. Equal
    to F.cross_entropy of the full logits, except for rounding: the sums are over chunks.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, vocab_size, needs_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, needs_grad):
        device, (N, _), V = x.device.type, x.shape, weight.size(0)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_, weight_ = x.detach().to(dtype), weight.detach().to(dtype)
        loss = torch.zeros((), device=x.device)
        dx, dweight = (torch.empty_like(x), torch.empty_like(weight)) if needs_grad else (None, None)
        compiled = torch.compiler.is_compiling()
        chunk = chunk_rows(N, V * dtype.itemsize, device, compiled)
        sliced = device == "cpu" and not compiled  # a compiler fuses the operations anyway
        slice_rows = max(1, SLICE_BYTES // (V * 4)) if sliced else chunk
        buffer = x_.new_empty(chunk, V)
        for i in range(0, N, chunk):
            logits = buffer[: min(chunk, N - i)]  # (n, V)
            torch.mm(x_[i : i + chunk], weight_.mT, out=logits)
            for j in range(0, len(logits), slice_rows):
                part = logits[j : j + slice_rows]
                part_targets = targets[i + j : i + j + len(part)]
                part_loss, dlogits = _loss_and_gradient(part, part_targets, vocab_size, needs_grad)
                loss = loss + part_loss  # not in place: torch 2.11 would compile it to gradients of zero
                if dlogits is not None:
                    part.copy_(dlogits)  # `logits` now contains the gradient
            if dx is not None and dweight is not None:
                dx[i : i + chunk] = logits @ weight_
                chunk_dweight = logits.mT @ x_[i : i + chunk]  # (V, C)
                dweight = dweight.copy_(chunk_dweight) if i == 0 else dweight.add_(chunk_dweight)
        if needs_grad:
            ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed loss of logits (n, V) and its gradient with respect to them, float32."""
    scores = logits.float()  # (n, V)
    scores[:, vocab_size:] = float("-inf")
    compiled = torch.compiler.is_compiling()
    if not needs_grad or compiled:
        loss = F.cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if not needs_grad:
        return loss, None
    if compiled:  # pointwise, so that it is fused; a scatter would write float32 to memory first
        one_hot = torch.arange(scores.size(1), device=scores.device) == targets[:, None]
        return loss, (F.softmax(scores, dim=-1) - one_hot.float()) * (targets >= 0)[:, None]
    # in place and with one exponential, half the time of F.cross_entropy and F.softmax on a CPU
    index, counted = targets[:, None].clamp(min=0), (targets >= 0).float()[:, None]
    target_scores, maxima = scores.gather(1, index), scores.amax(dim=1, keepdim=True)  # (n, 1)
    sums = scores.sub_(maxima).exp_().sum(dim=1, keepdim=True)
    loss = ((maxima + sums.log() - target_scores) * counted).sum()
    return loss, scores.mul_(counted / sums).scatter_add_(1, index, -counted)
