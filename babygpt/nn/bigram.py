"""Embeddings of bigrams, pairs of a token and the one before it.

A table of all V^2 bigrams would be too large, so a hash chooses the entry, and several bigrams share one
(modded-nanogpt, record 62; arXiv:2601.07372).
"""

import torch
from torch import nn

from babygpt.nn.shift import Shift


class BigramEmbedding(nn.Embedding):
    """A table of embeddings (num_embeddings, C) in which a hash of the bigram chooses the entry."""

    def forward(self, idx: torch.Tensor, shift: Shift, last: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Return the embeddings (B, T, C) of the bigrams that end with the tokens idx (B, T); `last` is as in Shift."""
        previous = shift(idx + 1, last)  # id + 1, or 0 for the first token of a text
        # two primes, small enough that nothing overflows for vocabularies of up to 2^32 tokens
        return super().forward((previous * 1_000_003 + idx * 7919).remainder(self.num_embeddings))
