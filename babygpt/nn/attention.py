"""Attention, plain and fused, its KV cache, and rotary embeddings.

Shapes: B batch, T time, H heads, K key/value heads, D head size; S is the time of keys and values, T or more with a
cache.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Without cuDNN, which PyTorch prefers on sm_90: it builds a plan for each new shape, and each decoded token has one
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KVCache:
    """Keys and values of the tokens seen so far, for a batch of B sequences of up to `block_size` tokens.

    Sequences of different lengths end together: `begins`, (B,), is the slot at which each begins.
    """

    def __init__(
        self, n_layer: int, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype,
        begins: torch.Tensor | None = None,
    ):  # fmt: skip
        """`shape` is that of one layer's keys: (B, K, block_size, D)."""
        batch_size, _, block_size, _ = shape
        # a tensor a layer: a compiler writes to it in place, but would copy the whole of one for all layers
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.documents = torch.zeros(batch_size, block_size, device=device, dtype=torch.int64)
        self.begins = begins
        self.length = 0  # slots in use

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts k, v (B, K, T, D) of new tokens behind the old ones; returns all, (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Attention written out; q (B, H, T, D), k and v (B, K, S, D), the T queries being the last of S.

    `mask`, (B or 1, 1, T, S) bool, tells which keys a query sees: all up to its own unless given. What `attention`
    computes with a fused kernel; the tests hold the two equal.
    """
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.size(-1)))  # (B, H, T, S)
    T, S = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights @ v  # (B, H, T, D)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: "torch.Tensor | BlockMask | None" = None,
    scale: float | None = None, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Attention by PyTorch's fused kernels; arguments as in `plain_attention`, or FlexAttention's mask."""
    T, S = q.size(2), k.size(2)
    grouped = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    if mask is None and 1 < T < S:  # several new tokens behind a filled cache; is_causal counts from the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    backends = sdpa_kernel(CUDA_BACKENDS) if q.is_cuda else nullcontext()
    with torch.autocast(q.device.type, enabled=False), backends:  # in the dtype it is given
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=T > 1 and mask is None, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )


def attention_backend(q: torch.Tensor, kv_heads: int, mask: torch.Tensor | None = None, dropout: float = 0.0) -> str:
    """Return the name of PyTorch's kernel that computes attention for queries like q, (B, H, T, D).

    It is flash, efficient or math; on other devices than CPU and CUDA there is no choice, and it is the device's.
    """
    if q.device.type not in ("cpu", "cuda"):
        return q.device.type
    k = q[:, :kv_heads]
    backends = sdpa_kernel(CUDA_BACKENDS) if q.is_cuda else nullcontext()
    with backends:  # private API, by which scaled_dot_product_attention chooses
        choice = torch._fused_sdp_choice(q, k, k, mask, dropout, mask is None, enable_gqa=kv_heads != q.size(1))
    return SDPBackend(choice).name.split("_")[0].lower()


def rotation(positions: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (B or 1, 1, T, D / 2) each, by which queries and keys at `positions` (B or 1, T) are turned.

    Half of the pairs turn, from 1 radian a token down to 1 / 1024; the others stay (modded-nanogpt's half-truncated
    RoPE).
    """
    half = head_size // 4
    speeds = (1 / 1024) ** torch.linspace(0, 1, half, device=positions.device)
    speeds = F.pad(speeds, (0, head_size // 2 - half))
    angles = positions[:, None, :, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D): its pairs (d, d + D / 2) turned by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)
