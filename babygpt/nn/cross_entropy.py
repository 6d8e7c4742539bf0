"""The head and its loss in one, so that the logits are never there whole.

    >>> loss = linear_cross_entropy(hidden, head.weight, targets, vocab_size=50257)     # summed over the targets

Logits, (B T, V), are by far the largest tensor of a small GPT, and a loss makes several of them in float32. Here they
live a chunk of rows at a time, and the gradients of hidden states and head are computed while a chunk is there.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that does not count (PyTorch's ignore_index)
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}  # of logits that exist at the same time
COMPILED_CUDA_CHUNK_BYTES = 2 << 30  # larger products are faster, and compiled code makes no float32 copies
SLICE_BYTES = 2 << 20  # of float32 logits that a CPU turns into probabilities at once: what its cache holds


def padded_vocab_size(vocab_size: int) -> int:
    """Return the vocabulary size rounded up to a multiple of 128, the tile of a matrix product: 50,257 to 50,304."""
    return math.ceil(vocab_size / 128) * 128


def chunk_rows(rows: int, row_bytes: int, device_type: str, compiled: bool) -> int:
    """Return how many of `rows` rows of logits to compute at a time.

    When compiled for CUDA, a multiple of 128, the tile of a matrix product, that divides `rows` if possible: a compiler
    unrolls the loop over chunks, and a last chunk of another size would need kernels of its own.
    """
    if not (compiled and device_type == "cuda"):
        return math.ceil(rows / math.ceil(rows * row_bytes / CHUNK_BYTES.get(device_type, 128 << 20)))
    most = max(128, COMPILED_CUDA_CHUNK_BYTES // row_bytes // 128 * 128)
    if rows <= most:
        return rows
    divisors = (n for n in range(most, most // 4, -128) if rows % n == 0)
    return next(divisors, most)


def softcapped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """c tanh(logits / c), float32. By the sigmoid, which is ten times as fast on a CPU."""
    return torch.sigmoid(logits.float() * (2 / cap)) * (2 * cap) - cap


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float | None = None
) -> torch.Tensor:
    """Summed cross entropy, () float32, of logits x @ weight.T, softcapped if a cap is given.

    x (N, C), weight (V, C), targets (N,) int64, of which -100 doesn't count; entries from vocab_size on only pad, and
    get no probability. Matrix products run in autocast's dtype, all else in float32. F.cross_entropy of the whole
    logits, but for the order of sums over chunks.
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, vocab_size, softcap, learns)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, learns):
        device, (N, _), V = x.device.type, x.shape, weight.size(0)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_, weight_ = x.detach().to(dtype), weight.detach().to(dtype)
        loss = torch.zeros((), device=x.device)
        dx, dweight = (torch.empty_like(x), torch.empty_like(weight)) if learns else (None, None)
        compiled = torch.compiler.is_compiling()
        chunk = chunk_rows(N, V * dtype.itemsize, device, compiled)
        sliced = device == "cpu" and not compiled  # a compiler makes one pass of it anyway
        slice_rows = max(1, SLICE_BYTES // (V * 4)) if sliced else chunk
        buffer = x_.new_empty(chunk, V)
        for i in range(0, N, chunk):
            logits = buffer[: min(chunk, N - i)]  # (n, V)
            torch.mm(x_[i : i + chunk], weight_.mT, out=logits)
            for j in range(0, len(logits), slice_rows):
                part = logits[j : j + slice_rows]
                part_loss, d = _loss_and_gradient(part, targets[i + j : i + j + len(part)], vocab_size, softcap, learns)
                loss = loss + part_loss  # in place, torch 2.11's compiler makes every gradient zero
                if d is not None:
                    part.copy_(d)  # the gradient takes the logits' place
            if dx is not None and dweight is not None:
                dx[i : i + chunk] = logits @ weight_
                of_chunk = logits.mT @ x_[i : i + chunk]  # (V, C)
                dweight = dweight.copy_(of_chunk) if i == 0 else dweight.add_(of_chunk)
        if learns:
            ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None, None


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float | None, learns: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of a few rows of logits (n, V) before the cap, and its gradient by them, float32."""
    capped = logits.float() if softcap is None else softcapped(logits, softcap)
    z = capped.clone() if learns and softcap is not None else capped
    z[:, vocab_size:] = float("-inf")
    loss = F.cross_entropy(z, targets, ignore_index=IGNORED, reduction="sum")
    if not learns:
        return loss, None
    probabilities = F.softmax(z, dim=-1)
    if torch.compiler.is_compiling():  # pointwise, so that it is fused; a scatter would write float32 to memory first
        one_hot = torch.arange(z.size(1), device=z.device) == targets[:, None]
        d = (probabilities - one_hot.float()) * (targets >= 0)[:, None]
    else:
        counted = (targets >= 0).float()[:, None]
        d = probabilities.mul_(counted).scatter_add_(1, targets[:, None].clamp(min=0), -counted)
    if softcap is not None:
        d.mul_(1 - (capped / softcap).square())  # the slope of tanh
    return loss, d
