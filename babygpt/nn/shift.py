"""Shifts by one token: the value of the token before each token, in its text."""

from dataclasses import dataclass

import torch

from babygpt.nn.attention import PackedRows


@dataclass(frozen=True)
class Shift:
    """Gives each token the value of the token before it, and zero to the first token of a text.

    >>> shift = Shift(torch.tensor([[True, False, False]]))
    >>> shift(torch.tensor([[5, 6, 7]]))
    tensor([[0, 5, 6]])
    """

    is_first: torch.Tensor  # (B or 1, T) bool, whether a token is the first one of its text
    packed: PackedRows | None = None

    @classmethod
    def of(cls, idx: torch.Tensor, positions: torch.Tensor, packed: PackedRows | None, eot_id: int | None) -> "Shift":
        """Return the shift of token ids (B, T) at positions (B or 1, T). With `eot_id`, a document is a text."""
        is_first = positions == 0
        return cls(is_first if eot_id is None else is_first | (idx == eot_id), packed)

    def __call__(self, x: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """Return the shifted x (B, T, ...).

        If the rows continue cached tokens, `last` (B, 1, ...) has the value of the last of these, and is updated.
        """
        trailing = (1,) * (x.dim() - 2)
        if self.packed is not None:
            index = self.packed.previous
            shifted = x.gather(1, index.view(*index.shape, *trailing).expand_as(x))
        else:
            before = torch.zeros_like(x[:, :1]) if last is None else last.to(x.dtype, copy=True)
            shifted = torch.cat([before, x[:, :-1]], dim=1)
        if last is not None:
            last.copy_(x[:, -1:])
        return shifted.masked_fill(self.is_first.view(*self.is_first.shape, *trailing), 0)


def shift_keys(k: torch.Tensor, shift: Shift, last: torch.Tensor | None) -> torch.Tensor:
    """Shift the channels of keys (B, K, T, D) that rotary embeddings do not rotate (modded-nanogpt, record 49).

    A query can then attend to the token after one that it matches, in a single layer. `last` is (B, 1, K, D).
    """
    D = k.size(-1)
    unrotated = torch.arange(D, device=k.device) % (D // 2) >= D // 4
    return torch.where(unrotated, shift(k.transpose(1, 2), last).transpose(1, 2), k)
