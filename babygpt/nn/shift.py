"""Shift values by one token: each token receives the value of the previous token of its text."""

from dataclasses import dataclass

import torch

from babygpt.nn.attention import PackedRows, rotated_channels


@dataclass(frozen=True, eq=False)  # eq=True hashes the fields; PyTorch 2.11 cannot compile a call of such an object
class Shift:
    """Shift values by one token. The first token of each text receives zero.

    >>> shift = Shift(torch.tensor([[True, False, False]]))
    >>> shift(torch.tensor([[5, 6, 7]]))
    tensor([[0, 5, 6]])
    """

    is_first: torch.Tensor  # (B or 1, T) bool, true for the first token of each text
    packed: PackedRows | None = None

    @classmethod
    def from_tokens(
        cls, idx: torch.Tensor, positions: torch.Tensor, packed: PackedRows | None, eot_id: int | None
    ) -> "Shift":
        """Return the Shift for token ids (B, T) at positions (B or 1, T). With `eot_id`, each document is a text."""
        is_first = positions == 0
        return cls(is_first if eot_id is None else is_first | (idx == eot_id), packed)

    def __call__(self, x: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (B, T, ...), shifted.

        With a cache, `last` (B, 1, ...) holds the value of the last cached token and is updated in place.
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


def offset_keys(k: torch.Tensor, shift: Shift, last: torch.Tensor | None) -> torch.Tensor:
    """Replace the channels of keys (B, K, T, D) that are not rotated by those of the previous token's key.

    This is the partial key offset of modded-nanogpt (record 49). It allows an induction head in a single layer: a query
    attends to the token that follows a matching one. `last` is (B, 1, K, D), as in Shift.
    """
    shifted = shift(k.transpose(1, 2), last).transpose(1, 2)
    return torch.where(rotated_channels(k.size(-1), k.device), k, shifted)
