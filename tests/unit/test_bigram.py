"""bigram.py: which entry of the table each bigram has. Caches and packed rows are tested with the whole model."""

import torch

from babygpt.nn.bigram import BigramEmbedding
from babygpt.nn.shift import Shift

V, TABLES = 300, 5


def entries(idx: torch.Tensor) -> torch.Tensor:
    """Return the entry of each token of idx (B, T), read from a table whose values are the indices."""
    table = BigramEmbedding(TABLES * V, 1)
    with torch.no_grad():
        table.weight.copy_(torch.arange(TABLES * V, dtype=torch.float32)[:, None])
        return table(idx, Shift(torch.arange(idx.size(1))[None] == 0))[..., 0]


def test_entry_depends_on_both_tokens_and_not_on_the_position():
    found = entries(torch.tensor([[5, 7, 5, 7], [6, 7, 5, 8]]))
    assert found[0, 1] == found[0, 3]
    assert found[0, 2] == found[1, 2]
    assert len({*found[:, 1].tolist(), found[1, 3].item()}) == 3


def test_first_token_has_an_entry_of_its_own():
    """It has no token before it, so its entry is that of no bigram of the text."""
    found = entries(torch.tensor([[7, 7, 7], [7, 0, 7]]))
    assert found[0, 0] == found[1, 0]
    assert found[0, 0] not in (*found[0, 1:], *found[1, 1:])


def test_bigrams_are_spread_over_the_table():
    """All 90,000 bigrams, 60 per entry on average: no entry has three times as many, and none is unused."""
    idx = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    counts = entries(idx)[:, 1].long().bincount(minlength=TABLES * V)
    assert counts.min() > 0
    assert counts.max() < 3 * counts.float().mean()
