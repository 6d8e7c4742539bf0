"""The decoding loop: one prefill, then one decode step per token.

>>> params = SamplingParams(max_new_tokens=50, temperature=0.8)
>>> for tokens in generate(model, [[50256, 464], [50256, 1026, 373]], params, eot_id=50256):
...     ...  # the next token of each of the two texts
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge
from torch import nn

from babygpt.constraints import Positive, Probability, Seed, metavar
from babygpt.nn.attention import KVCache


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled."""

    max_new_tokens: Annotated[Positive, metavar("TOKENS")] = 200  # maximum number of new tokens per sample
    temperature: Annotated[float, Ge(0)] = 1.0  # softmax temperature; 0: greedy decoding
    # sample from the N most probable tokens; None: all tokens
    top_k: Annotated[Positive | None, metavar("N", "all tokens")] = 50
    # sample from the smallest set of most probable tokens whose total probability reaches this value
    top_p: Annotated[Probability | None, metavar("PROBABILITY", "off")] = None
    seed: Seed = 1337  # random seed; the same seed gives the same samples
    compile: bool = False  # compile the decode step (only on CUDA)


class Decoder(Protocol):
    """The interface that decoding needs of a model; model.GPT implements it."""

    config: Any  # with block_size
    wte: nn.Embedding
    training: bool

    def hidden(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor: ...
    def logits(self, x: torch.Tensor) -> torch.Tensor: ...
    def make_cache(self, batch_size: int, dtype: torch.dtype, starts: torch.Tensor | None = None) -> KVCache: ...
    def train(self, mode: bool = True) -> Any: ...


@torch.no_grad()
def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], params: SamplingParams, eot_id: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield the next token of each prompt, until all texts have ended, `max_new_tokens` are reached, or `stop()`.

    A text ends with `eot_id`; that token and all later ones are yielded as None. If the context of the longest text is
    full, its newer half is prefilled again, because learned positions cannot be shifted. The model runs in eval mode,
    and its training mode is restored.
    """
    was_training = model.training
    model.train(False)
    try:
        T = model.config.block_size
        decode = compile_decode_step() if params.compile else decode_step
        generator = torch.Generator().manual_seed(params.seed)
        tokens, starts = keep_last(*pad_left(prompts, eot_id or 0, model.wte.weight.device), T)
        cache, logits = prefill(model, tokens, starts)
        ended = [False] * len(prompts)
        for _ in range(params.max_new_tokens - 1):
            next_token = sample_token(logits, params, generator)
            yield mask_ended(next_token, ended, eot_id)
            if all(ended) or stop():
                return
            tokens = torch.cat([tokens, next_token[:, None]], dim=1)
            if cache.length < T:
                logits = decode(model, next_token[:, None], cache)
            else:
                tokens, starts = keep_last(tokens, starts, max(1, T // 2))
                cache, logits = prefill(model, tokens, starts)
        yield mask_ended(sample_token(logits, params, generator), ended, eot_id)
    finally:
        model.train(was_training)


def prefill(model: Decoder, tokens: torch.Tensor, starts: torch.Tensor | None) -> tuple[KVCache, torch.Tensor]:
    """Return a cache filled with tokens (B, T) int64, and the logits of the next token, (B, V)."""
    weight = model.wte.weight
    dtype = weight.dtype  # on a CPU, attention of one query is faster in float32 than in bfloat16
    if weight.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    cache = model.make_cache(tokens.size(0), dtype, starts)
    return cache, decode_step(model, tokens, cache)


def decode_step(model: Decoder, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Return the logits (B, V) after the last of the tokens (B, T) int64, which continue the cached ones."""
    return model.logits(model.hidden(tokens, cache)[:, -1])


def compile_decode_step() -> Callable[[Decoder, torch.Tensor, KVCache], torch.Tensor]:
    return torch.compile(decode_step, dynamic=True)


def sample_token(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """Sample the next token of each row of logits (B, V). Returns (B,) int64.

    `generator` is a CPU generator, so that a seed gives the same random numbers on all devices. For top_p, see Holtzman
    et al. 2019 (arXiv:1904.09751).
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / params.temperature
    ids = None
    if params.top_k is not None or params.top_p is not None:  # most probable first
        logits, ids = logits.topk(min(params.top_k or logits.size(-1), logits.size(-1)))
    probabilities = logits.softmax(dim=-1)
    if logits.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        probabilities = probabilities.cpu()  # MPS has no float64, CUDA no deterministic cumulative sum
    if params.top_p is not None:
        more_probable = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(more_probable >= params.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.rand(logits.size(0), 1, generator=generator, dtype=torch.float64).to(cumulative.device)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    index = index.clamp(max=logits.size(-1) - 1).to(logits.device)  # out of range if logits are NaN
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def mask_ended(next_token: torch.Tensor, ended: list[bool], eot_id: int | None) -> list[int | None]:
    """Return the tokens (B,) as a list, with None for ended texts. Updates `ended` for the texts that end now."""
    tokens = next_token.tolist()
    for row, token in enumerate(tokens):
        ended[row] |= token == eot_id
    return [None if has_ended else token for token, has_ended in zip(tokens, ended, strict=True)]


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompts as a tensor (B, T) int64, padded on the left, and the start of each, (B,) int64."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    return tokens, torch.tensor([length - len(prompt) for prompt in prompts], device=device)


def keep_last(
    tokens: torch.Tensor, starts: torch.Tensor | None, length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the last `length` tokens of each row, and the start of each text in them, or None if all are 0."""
    if starts is not None:
        starts = (starts - max(0, tokens.size(1) - length)).clamp(min=0)
        starts = starts if starts.any() else None
    return tokens[:, -length:], starts
