"""shift.py: the previous token's value. Caches and packed rows are tested with the whole model."""

import torch

from babygpt.nn.attention import apply_rotary_emb, rotary_cos_sin
from babygpt.nn.shift import Shift, offset_keys


def test_first_token_of_a_text_gets_zero():
    """Texts are rows, or documents if there is an eot_id."""
    idx = torch.tensor([[9, 5, 6, 9, 7], [1, 2, 9, 3, 4]])
    positions = torch.arange(5)[None]
    assert Shift.from_tokens(idx, positions, None, None)(idx).tolist() == [[0, 9, 5, 6, 9], [0, 1, 2, 9, 3]]
    assert Shift.from_tokens(idx, positions, None, 9)(idx).tolist() == [[0, 9, 5, 0, 9], [0, 1, 0, 9, 3]]


def test_keys_are_shifted_in_the_channels_that_are_not_rotated():
    torch.manual_seed(0)
    k, positions = torch.randn(2, 3, 6, 16), torch.arange(6)[None]
    rotated = (apply_rotary_emb(k, rotary_cos_sin(positions, 16)) != k).any(dim=2, keepdim=True).expand_as(k)
    assert rotated.float().mean() == 0.5
    expected = torch.where(rotated, k, torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, :-1]], dim=2))
    assert torch.equal(offset_keys(k, Shift(positions == 0), None), expected)


def test_incomplete_shift_has_a_hash():
    """PyTorch 2.11 hashes a called object while it compiles the call, before the fields of the object are set."""
    hash(object.__new__(Shift))
