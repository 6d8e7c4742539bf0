"""The decoding loop: one prefill, then one decode step per token.

>>> for token in generate(model, prompts, max_new_tokens=50): ...
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from babygpt.nn.attention import KVCache


class Decoder(Protocol):
    """The interface that decoding needs; model.GPT implements it."""

    config: Any  # with block_size
    wte: nn.Embedding

    def hidden(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor: ...
    def logits(self, x: torch.Tensor) -> torch.Tensor: ...
    def make_cache(self, batch_size: int, dtype: torch.dtype, begins: torch.Tensor | None = None) -> KVCache: ...


def choose(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> torch.Tensor:
    """The next token of each row: logits (B, V) to ids (B,) int64.

    Temperature 0 takes the likeliest. Else logits are divided by the temperature, cut to the top_k likeliest
    and to the fewest that hold top_p of the probability (Holtzman et al. 2019), and drawn from.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    ids = None
    if top_k is not None or top_p is not None:  # the likeliest first
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probabilities = logits.softmax(dim=-1)
    if logits.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        probabilities = probabilities.cpu()  # MPS has no float64, CUDA no deterministic cumulative sum
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier ones hold
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    # one number a row, drawn on the CPU: the same seed gives the same whatever the device
    drawn = torch.rand(logits.size(0), 1, generator=generator, dtype=torch.float64)
    up_to = probabilities.cumsum(dim=-1, dtype=torch.float64)
    chosen = torch.searchsorted(up_to, drawn.to(up_to.device) * up_to[:, -1:], right=True)  # the first that lies above
    chosen = chosen.clamp(max=logits.size(-1) - 1).to(logits.device)  # beyond the last where logits are NaN
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def read_on(model: Decoder, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The logits behind the last of tokens (B, T) int64, (B, V), given what the cache holds."""
    return model.logits(model.hidden(tokens, cache)[:, -1])


@torch.no_grad()
def generate(
    model: Decoder, prompts: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, generator: torch.Generator | None = None, begins: torch.Tensor | None = None,
    decode: Callable[[Decoder, torch.Tensor, KVCache], torch.Tensor] = read_on,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Yields the next token of each row, (B,) int64, `max_new_tokens` times; prompts are (B, T) int64.

    Prompts of different lengths end together: row b begins at `begins[b]`, (B,) int64, what stands before is not read.
    Keys and values of the past are kept, so a token costs one token's work. Where the longest row's context is full,
    the older half of all is let go and the newer half read in again: learned positions can't be moved on.
    `decode` is `read_on`, or that compiled; prompts are always read by the plain one.
    """
    T = model.config.block_size
    tokens, begins = _last(prompts, begins, T)
    cache, logits = _read_in(model, tokens, begins)
    for i in range(max_new_tokens):
        next_token = choose(logits, temperature, top_k, top_p, generator)
        yield next_token
        if i == max_new_tokens - 1:
            return
        tokens = torch.cat([tokens, next_token[:, None]], dim=1)
        if cache.length < T:
            logits = decode(model, next_token[:, None], cache)
        else:
            tokens, begins = _last(tokens, begins, max(1, T // 2))
            cache, logits = _read_in(model, tokens, begins)


def _last(tokens: torch.Tensor, begins: torch.Tensor | None, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last `length` tokens of each row, and where the rows begin in them: None where all do at once."""
    if begins is not None:
        begins = (begins - max(0, tokens.size(1) - length)).clamp(min=0)
        begins = begins if begins.any() else None
    return tokens[:, -length:], begins


def _read_in(model: Decoder, tokens: torch.Tensor, begins: torch.Tensor | None) -> tuple[KVCache, torch.Tensor]:
    """A cache filled with tokens (B, T), and the logits behind the last, (B, V)."""
    weight = model.wte.weight
    dtype = weight.dtype  # on a CPU attention of one query is faster in float32 than in bfloat16
    if weight.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    cache = model.make_cache(tokens.size(0), dtype, begins)
    return cache, read_on(model, tokens, cache)
