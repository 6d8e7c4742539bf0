"""Embeddings of bigrams, pairs of a token and the one before it.

A table of all V^2 bigrams would be too large, so a hash chooses the entry, and several bigrams share one
(modded-nanogpt, record 62; arXiv:2601.07372).
"""

import torch
from torch import nn

from babygpt.nn.attention import KVCache, PackedRows

NO_TOKEN = -1  # before the first token of a text


class BigramEmbedding(nn.Embedding):
    """A table of embeddings (num_embeddings, C) in which a hash of the bigram chooses the entry."""

    def __init__(self, num_embeddings: int, width: int, eot_id: int | None = None):
        """With `eot_id`, this token has no token before it: nothing passes from one document to the next."""
        super().__init__(num_embeddings, width)
        self.eot_id = eot_id

    def forward(  # type: ignore[override]
        self, idx: torch.Tensor, positions: torch.Tensor, cache: KVCache | None, packed: PackedRows | None
    ) -> torch.Tensor:
        """Return the embeddings (B, T, C) of the bigrams that end with the tokens idx (B, T)."""
        previous = previous_tokens(idx, positions, cache, packed)
        if self.eot_id is not None:
            previous = previous.masked_fill(idx == self.eot_id, NO_TOKEN)
        # two primes, small enough that nothing overflows for vocabularies of up to 2^32 tokens
        return super().forward(((previous + 1) * 1_000_003 + idx * 7919).remainder(self.num_embeddings))


def previous_tokens(
    idx: torch.Tensor, positions: torch.Tensor, cache: KVCache | None, packed: PackedRows | None
) -> torch.Tensor:
    """Return the token before each of the tokens idx (B, T) in its text, (B, T) int64, or NO_TOKEN.

    With a cache, the first of them continues the cached text, whose last token the cache stores.
    """
    if packed is not None:
        return packed.previous
    before = idx[:, :1] if cache is None else cache.last_token.clone()
    previous = torch.cat([before, idx[:, :-1]], dim=1)
    if cache is not None:
        cache.last_token.copy_(idx[:, -1:])
    return previous.masked_fill(positions == 0, NO_TOKEN)
