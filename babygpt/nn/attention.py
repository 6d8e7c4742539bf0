"""Attention, its masks, its KV cache, and rotary embeddings.

Shapes: B batch, T time, H query heads, K key and value heads, D head size; S is the number of keys, T or more with a
cache.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# without cuDNN, which PyTorch prefers on sm_90: it builds a plan for every new shape, and each decode step has one
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FLEX_DEVICES = ("cuda",)  # devices on which compiled code uses FlexAttention for masks

# (B or 1, 1, T, S) bool, true where a query attends to a key, or FlexAttention's mask, which skips blocks of keys.
# None: causal
Mask = torch.Tensor | BlockMask | None


@dataclass(frozen=True)
class PackedRows:
    """The structure of rows that contain several texts, which do not attend to each other."""

    positions: torch.Tensor  # (B, T) int64, of each token in its text
    mask: torch.Tensor  # (B, 1, T, T) bool, causal, true where a query attends to a key
    previous: torch.Tensor  # (B, T) int64, the index in the row of each token's previous token; ignored for the first


# ---------------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Keys and values of all previous tokens, for B sequences of up to `block_size` tokens.

    It also stores the id and the keys of the last token, which the next one needs (babygpt/nn/shift.py). Sequences of
    different lengths are padded on the left: `starts`, (B,) int64, is the slot of the first token of each.
    """

    def __init__(
        self, n_layer: int, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype,
        starts: torch.Tensor | None = None,
    ):  # fmt: skip
        """`shape` is the shape of the keys of one layer: (B, K, block_size, D)."""
        batch_size, K, block_size, D = shape
        # one tensor per layer: compiled code updates it in place, but would copy a single tensor of all layers
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.documents = torch.zeros(batch_size, block_size, device=device, dtype=torch.int64)
        self.last_token = torch.zeros(batch_size, 1, device=device, dtype=torch.int64)  # id + 1
        self.last_keys = [torch.zeros(batch_size, 1, K, D, device=device, dtype=dtype) for _ in range(n_layer)]
        self.starts = starts
        self.length = 0  # slots in use

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, K, T, D) of new tokens; return those of all tokens, (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def token_positions(idx: torch.Tensor, cache: KVCache | None, block_size: int) -> torch.Tensor:
    """Return the positions of token ids (B, T) in their texts, (B or 1, T) int64.

    Raises ValueError if the cached and the new tokens exceed block_size.
    """
    T, start = idx.size(1), cache.length if cache is not None else 0
    if start + T > block_size:
        raise ValueError(f"{start + T} tokens exceed the block size of {block_size}")
    positions = torch.arange(start, start + T, device=idx.device)[None]  # (1, T)
    if cache is not None and cache.starts is not None:
        positions = (positions - cache.starts[:, None]).clamp(min=0)  # (B, T)
    return positions


# ---------------------------------------------------------------------------------------------------------
# masks


@dataclass(frozen=True)
class MaskRule:
    """Limits of attention in addition to causality."""

    window: int | None = None  # number of keys that a query attends to, including its own; None: no limit
    eot_id: int | None = None  # no attention across documents, each of which starts with this token; None: no limit

    @property
    def causal_only(self) -> bool:
        return self.window is None and self.eot_id is None


def attention_mask(
    idx: torch.Tensor, positions: torch.Tensor, cache: KVCache | None = None, packed: PackedRows | None = None,
    rule: MaskRule = MaskRule(), can_use_flex: bool = False,
) -> Mask:  # fmt: skip
    """Return the mask of T queries and S keys: causality, `rule`, padding in the cache, and packed rows.

    idx is (B, T) int64, positions are (B or 1, T) int64. With `can_use_flex`, compiled code on FLEX_DEVICES gets
    FlexAttention's mask, unless there is a cache or packed rows.
    """
    padded = cache is not None and cache.starts is not None
    if rule.causal_only and not padded:
        return packed.mask if packed else None
    documents = torch.zeros_like(idx[:1])  # (1, T), all tokens in one document
    if rule.eot_id is not None:
        documents = (idx == rule.eot_id).cumsum(dim=1)  # (B, T)
    if can_use_flex and cache is None and packed is None and _can_compile_flex_attention(idx.device):
        return _flex_mask(documents, rule)

    key_positions, key_documents = positions, documents
    if cache is not None:
        start, end = cache.length, cache.length + idx.size(1)
        key_positions = torch.arange(end, device=idx.device)[None]  # slots
        positions = key_positions[:, start:]
        if start:
            documents = documents + cache.documents[:, start - 1 : start]
        if cache.starts is not None:
            documents = documents.masked_fill(positions < cache.starts[:, None], -1)
        cache.documents[:, start:end] = documents
        key_documents = cache.documents[:, :end]  # (B, S)
    distance = positions[:, :, None] - key_positions[:, None, :]  # (B or 1, T, S)
    mask = (distance >= 0) & (documents[:, :, None] == key_documents[:, None, :])
    if rule.window is not None:
        mask = mask & (distance < rule.window)
    return mask[:, None] & packed.mask if packed else mask[:, None]


def _can_compile_flex_attention(device: torch.device) -> bool:
    return torch.compiler.is_compiling() and device.type in FLEX_DEVICES


def _flex_mask(documents: torch.Tensor, rule: MaskRule) -> BlockMask:
    """Return FlexAttention's mask for documents (B or 1, T)."""
    T = documents.size(1)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        in_window = q >= k if rule.window is None else (q >= k) & (q - k < rule.window)
        return in_window if rule.eot_id is None else in_window & (documents[b, q] == documents[b, k])

    batch_size = None if rule.eot_id is None else documents.size(0)
    return create_block_mask(mask_mod, batch_size, None, T, T, documents.device)


# ---------------------------------------------------------------------------------------------------------
# attention


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Compute attention without fused kernels. The tests compare `attention` with it.

    q is (B, H, T, D), k and v are (B, K, S, D); the queries are the last T of the S tokens. `mask`, (B or 1, 1, T, S)
    bool, is true where a query attends to a key; None is causal. Returns (B, H, T, D).
    """
    group_size = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.size(-1)))  # (B, H, T, S)
    T, S = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights @ v  # (B, H, T, D)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Compute attention with PyTorch's fused kernels. The arguments are those of `plain_attention`, and dropout."""
    T, S = q.size(2), k.size(2)
    grouped = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    # with several new tokens after cached ones, is_causal would align the first query with the first key
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    backends = sdpa_kernel(CUDA_BACKENDS) if q.is_cuda else nullcontext()
    with torch.autocast(q.device.type, enabled=False), backends:  # keep the dtype of the arguments
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=T > 1 and mask is None, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )


def training_backend(config: Any, rule: MaskRule, device: torch.device, bfloat16: bool, compiled: bool) -> str:
    """Return the name of the attention kernel in training: flash, efficient, math, or flex for compiled masks.

    `config` has the fields of model.GPTConfig. On devices other than CPU and CUDA, where there is no choice, it is the
    name of the device.
    """
    if device.type not in ("cpu", "cuda"):
        return device.type
    T, D = config.block_size, config.head_size
    if not rule.causal_only and compiled and device.type in FLEX_DEVICES and D >= 16 and not config.dropout:
        return "flex"
    positions = torch.arange(T, device=device)[None]
    mask = cast("torch.Tensor | None", attention_mask(torch.zeros_like(positions), positions, rule=rule))
    q = torch.empty(1, config.n_head, T, D, dtype=torch.bfloat16 if bfloat16 else torch.float32, device=device)
    k = q[:, : config.kv_heads]
    backends = sdpa_kernel(CUDA_BACKENDS) if q.is_cuda else nullcontext()
    with backends:  # the private function by which scaled_dot_product_attention chooses a kernel
        choice = torch._fused_sdp_choice(
            q, k, k, mask, config.dropout, mask is None, enable_gqa=config.kv_heads != config.n_head
        )
    return SDPBackend(choice).name.split("_")[0].lower()


# ---------------------------------------------------------------------------------------------------------
# rotary embeddings


def rotary_cos_sin(positions: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines for rotary embeddings at positions (B or 1, T), each (B or 1, 1, T, D / 2).

    Half of the frequencies fall from 1 radian per token to 1 / 1024, the others are 0 (the half-truncated RoPE of
    modded-nanogpt).
    """
    half = head_size // 4
    inv_freq = (1 / 1024) ** torch.linspace(0, 1, half, device=positions.device)
    inv_freq = F.pad(inv_freq, (0, head_size // 2 - half))
    angles = positions[:, None, :, None] * inv_freq
    return angles.cos(), angles.sin()


def rotated_channels(head_size: int, device: torch.device) -> torch.Tensor:
    """Return which channels of a head rotary embeddings rotate, (D,) bool: the first half of each of its two halves."""
    return torch.arange(head_size, device=device) % (head_size // 2) < head_size // 4


def apply_rotary_emb(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (d, d + D / 2) of x (B, H, T, D) by the angles of their positions."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)
